//! Segments made small for the corpus: a run of one byte is counted, everything else stands as it is.
//!
//! A packed file is a sequence of parts: length of a literal (4 bytes, little-endian) and the literal, then length of a run (4
//! bytes) and its byte.

/// A shorter run costs more to count than to keep.
const RUN_MIN: usize = 16;

pub(crate) fn pack(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let (mut literal, mut at) = (0, 0);
    while at < bytes.len() {
        let run = bytes[at..].iter().take_while(|byte| **byte == bytes[at]).count();
        if run >= RUN_MIN {
            part(&mut packed, &bytes[literal..at], run, bytes[at]);
            literal = at + run;
        }
        at += run;
    }
    part(&mut packed, &bytes[literal..], 0, 0);
    packed
}

fn part(packed: &mut Vec<u8>, literal: &[u8], run: usize, byte: u8) {
    packed.extend_from_slice(&u32::try_from(literal.len()).unwrap().to_le_bytes());
    packed.extend_from_slice(literal);
    packed.extend_from_slice(&u32::try_from(run).unwrap().to_le_bytes());
    packed.push(byte);
}

pub(crate) fn unpack(mut packed: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = |packed: &mut &[u8]| {
        let (length, rest) = packed.split_first_chunk::<4>().expect("a length");
        *packed = rest;
        u32::from_le_bytes(*length) as usize
    };
    while !packed.is_empty() {
        let literal = length(&mut packed);
        bytes.extend_from_slice(&packed[..literal]);
        packed = &packed[literal..];
        let run = length(&mut packed);
        bytes.resize(bytes.len() + run, packed[0]);
        packed = &packed[1..];
    }
    bytes
}

#[test]
fn what_is_packed_comes_back() {
    let mut bytes = vec![0; 5000];
    bytes.extend(1..=200);
    bytes.extend([7; 15]);
    bytes.extend([8; 16]);
    bytes.push(9);
    for end in [0, 1, 16, 5000, 5100, 5215, 5231, bytes.len()] {
        assert_eq!(unpack(&pack(&bytes[..end])), &bytes[..end], "{end}");
    }
    assert!(pack(&bytes).len() < 300);
}
