//! The header of a message: who wrote it, as which one. Bytes in, facts out; it never looks at an entry.

use super::LogId;

/// The name of the Kafka record header that carries it.
pub const NAME: &str = "atp";
const VERSION: u8 = 1;
const ENTRY_BYTES: usize = 24;
const LOG_ID_BYTES: usize = ENTRY_BYTES + size_of::<LogId>();

/// What a message of ours is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// The first message of a partition.
    Genesis { log_id: LogId },
    /// A new owner; the offset of this message is its epoch.
    Epoch { log_id: LogId },
    /// The `n`-th entry, from 1, of the owner whose Epoch has the offset `epoch`.
    Entry { epoch: u64, n: u64, checkpoint: bool },
}

/// What the header of a message, or its absence, says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    Ours(Header),
    /// Somebody else's message, or damage.
    Foreign,
    /// A newer version wrote it: this one can't judge it.
    Newer {
        version: u8,
    },
}

impl Header {
    /// The bytes of the record header.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, checkpoint, epoch, n, log_id) = match self {
            Self::Genesis { log_id } => (1, false, 0, 0, Some(log_id)),
            Self::Epoch { log_id } => (2, false, 0, 0, Some(log_id)),
            Self::Entry { epoch, n, checkpoint } => (3, *checkpoint, *epoch, *n, None),
        };
        let mut bytes = Vec::with_capacity(LOG_ID_BYTES);
        bytes.extend([VERSION, kind, u8::from(checkpoint), 0, 0, 0, 0, 0]);
        bytes.extend(epoch.to_le_bytes());
        bytes.extend(n.to_le_bytes());
        bytes.extend(log_id.into_iter().flatten());
        bytes
    }
}

impl Parsed {
    /// `bytes`: the value of the header, if the message has one.
    #[must_use]
    pub fn of(bytes: Option<&[u8]>) -> Self {
        let Some(bytes) = bytes else { return Self::Foreign };
        match bytes.first() {
            None | Some(0) => Self::Foreign,
            Some(&VERSION) => read(bytes).map_or(Self::Foreign, Self::Ours),
            Some(&version) => Self::Newer { version },
        }
    }
}

fn read(bytes: &[u8]) -> Option<Header> {
    let number = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let log_id = || bytes.get(ENTRY_BYTES..)?.try_into().ok();
    let (epoch, n) = (number(8)?, number(16)?);
    if bytes[2] > 1 || bytes[3..8] != [0; 5] {
        return None;
    }
    match (bytes[1], bytes[2], epoch, n) {
        (1, 0, 0, 0) => Some(Header::Genesis { log_id: log_id()? }),
        (2, 0, 0, 0) => Some(Header::Epoch { log_id: log_id()? }),
        (3, checkpoint, _, 1..) if bytes.len() == ENTRY_BYTES => {
            Some(Header::Entry { epoch, n, checkpoint: checkpoint == 1 })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: LogId = [7; 16];

    #[test]
    fn every_header_reads_back() {
        for header in [
            Header::Genesis { log_id: ID },
            Header::Epoch { log_id: ID },
            Header::Entry { epoch: 1, n: 1, checkpoint: false },
            Header::Entry { epoch: u64::MAX, n: u64::MAX, checkpoint: true },
        ] {
            assert_eq!(Parsed::of(Some(&header.encode())), Parsed::Ours(header));
        }
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let entry = Header::Entry { epoch: 0x0102, n: 3, checkpoint: true }.encode();
        assert_eq!(entry, [&[1, 3, 1, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3][..], &[0; 7]].concat());
        let epoch = Header::Epoch { log_id: ID }.encode();
        assert_eq!(epoch, [&[1, 2][..], &[0; 22], &ID].concat());
    }

    #[test]
    fn a_newer_version_is_told_from_rubbish() {
        assert_eq!(Parsed::of(Some(&[2, 9, 9])), Parsed::Newer { version: 2 });
        let unnumbered = [&[1, 3][..], &[0; 22]].concat();
        let cut = &Header::Epoch { log_id: ID }.encode()[..39];
        for rubbish in [&[][..], &[0], &[1], cut, &unnumbered] {
            assert_eq!(Parsed::of(Some(rubbish)), Parsed::Foreign, "{rubbish:?}");
        }
        assert_eq!(Parsed::of(None), Parsed::Foreign);
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_written_the_same(bytes in prop::collection::vec(any::<u8>(), 0..48)) {
            if let Parsed::Ours(header) = Parsed::of(Some(&bytes)) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn no_changed_byte_reads_as_the_same(at in 0_usize..24, by in 1_u8..) {
            let header = Header::Entry { epoch: 5, n: 6, checkpoint: false };
            let mut bytes = header.encode();
            bytes[at] ^= by;
            prop_assert_ne!(Parsed::of(Some(&bytes)), Parsed::Ours(header));
        }
    }
}
