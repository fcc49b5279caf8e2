//! The low marks: from free bytes to `LogRoom`. A pure function; it never asks the disk itself.

use atp_core::message::LogRoom;

/// At the last 4 MiB that the log can surely or probably still write, running calls are told to stop.
pub const LAST_BYTES: u64 = 4 << 20;

/// `free`: free disk. `reserved`: zero-filled bytes that are the log's already (rest of the segment and spares).
pub(super) const fn room(free: u64, reserved: u64, segment_bytes: u64) -> LogRoom {
    if free.saturating_add(reserved) <= LAST_BYTES {
        LogRoom::Last
    } else if free < 2 * segment_bytes {
        LogRoom::Low
    } else {
        LogRoom::Enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marks_stand_at_two_segments_and_four_mebibytes() {
        const SEGMENT: u64 = 64 << 20;
        assert_eq!(room(2 * SEGMENT, 0, SEGMENT), LogRoom::Enough);
        assert_eq!(room(2 * SEGMENT - 1, SEGMENT, SEGMENT), LogRoom::Low);
        assert_eq!(room(0, LAST_BYTES + 1, SEGMENT), LogRoom::Low);
        assert_eq!(room(0, LAST_BYTES, SEGMENT), LogRoom::Last);
        assert_eq!(room(LAST_BYTES, 0, SEGMENT), LogRoom::Last);
        assert_eq!(room(u64::MAX, u64::MAX, SEGMENT), LogRoom::Enough);
    }
}
