//! Every limit of the wire in one place. Each is tested at n and n+1.

/// Bytes of a binary or text message: the encoded `Envelope` behind the length prefix.
pub const FRAME_BYTES_MAX: usize = 256 * 1024;
/// Bytes of content in one fragment, as offered in the hello.
pub const FRAGMENT_BYTES: usize = 64 * 1024;
/// Bytes of a reassembled message and of an HTTP body.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Sub-messages and list entries of one frame, counted before decoding.
pub const FRAME_ENTRIES_MAX: usize = 4096;
/// Bytes that wait to be written to one connection.
pub const UNSENT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long a connection may stay full before it is closed.
pub const UNSENT_FULL_MS: u64 = 10_000;
/// The first frame of a connection is due after this long.
pub const FIRST_FRAME_MS: u64 = 5_000;
/// A begun frame is due after this long.
pub const FRAME_MS: u64 = 30_000;
/// Heartbeat interval offered in the hello; nothing at all for three of them: the connection is lost.
pub const HEARTBEAT_MS: u64 = 5_000;
/// Streams of one connection.
pub const STREAMS_MAX: usize = 1024;
/// Numbered messages per stream and direction that may wait behind a gap.
pub const GAP_MESSAGES_MAX: usize = 64;
/// Bytes per stream that may wait behind a gap or for their last fragment.
pub const GAP_BYTES_MAX: usize = MESSAGE_BYTES_MAX + FRAME_BYTES_MAX;
/// Fragments of one message: 16 MiB in pieces of 4 KiB.
pub const FRAGMENTS_MAX: u32 = 4096;
/// What a fragment that waits is charged beside its bytes, so that a million tiny ones can't outgrow the bound.
pub const FRAGMENT_OVERHEAD: usize = 256;
/// Ranges that one list of missing fragments names; the next list names what is left.
pub const MISSING_RANGES_MAX: usize = 256;
/// Completed msg_seq per stream that answer a duplicate.
pub const DEDUPE_WINDOW: u64 = 1024;
/// A stream that names missing fragments is told so after these intervals, then reset with ESEQ_RETRY.
pub const RETRY_MS: [u64; 5] = [200, 400, 800, 1600, 3200];

const _: () = assert!(FRAGMENT_BYTES < FRAME_BYTES_MAX);
// A whole message in fragments of the offered size fits, with what its fragments are charged.
const _: () =
    assert!(MESSAGE_BYTES_MAX / FRAGMENT_BYTES * (FRAGMENT_OVERHEAD + 512) < GAP_BYTES_MAX - MESSAGE_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX < MESSAGE_BYTES_MAX);
const _: () = assert!(UNSENT_BYTES_MAX > 2 * FRAME_BYTES_MAX);
