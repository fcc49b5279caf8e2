//! Protobuf's wire format over a byte slice: reading without copying, writing without a second buffer.
//! Knows nothing of frames; every error names the field that it happened in.

use crate::code::WireError;
use bytes::{BufMut, BytesMut};

/// One field: its number and its value, still encoded where it is length-delimited.
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
}

/// Fixed-width values occur only in fields of later versions, so they are skipped without being read.
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed,
    Bytes(&'a [u8]),
}

/// Reads the fields of one message; `name` stands in front of errors.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    name: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8], name: &'static str) -> Self {
        Self { rest: bytes, name }
    }

    /// The next field; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Field<'a>>, WireError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|n| (1..1 << 29).contains(n));
        let Some(number) = number else { return Err(self.bad("a field number is out of range")) };
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            _ => return Err(self.bad("a field has a wire type that isn't taken (groups are not)")),
        };
        Ok(Some(Field { number, value }))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let Some((taken, rest)) = self.rest.split_at_checked(length) else {
            return Err(self.bad("a field is longer than the message that it is in"));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0;
        for (i, byte) in self.rest.iter().enumerate().take(10) {
            if i == 9 && *byte > 1 {
                return Err(self.bad("a number is larger than 64 bits"));
            }
            value |= u64::from(byte & 0x7f) << (7 * i);
            if *byte < 0x80 {
                self.rest = &self.rest[i + 1..];
                return Ok(value);
            }
        }
        Err(self.bad("a number is cut off or longer than 10 bytes"))
    }

    fn bad(&self, what: &str) -> WireError {
        WireError::proto(format!("{}: {what}", self.name))
    }
}

impl<'a> Value<'a> {
    /// # Errors
    /// EPROTO naming the field when it was sent with another wire type.
    pub(crate) fn bytes(self, name: &str) -> Result<&'a [u8], WireError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Varint(_) | Self::Fixed => Err(WireError::proto(format!("{name}: is not length-delimited"))),
        }
    }

    /// # Errors
    /// EPROTO naming the field when it was sent with another wire type.
    pub(crate) fn u64(self, name: &str) -> Result<u64, WireError> {
        match self {
            Self::Varint(n) => Ok(n),
            Self::Bytes(_) | Self::Fixed => Err(WireError::proto(format!("{name}: is not a number"))),
        }
    }

    /// # Errors
    /// EPROTO naming the field; a value beyond 32 bits is refused, not cut.
    pub(crate) fn u32(self, name: &str) -> Result<u32, WireError> {
        let n = self.u64(name)?;
        u32::try_from(n).map_err(|_| WireError::proto(format!("{name}: {n} is larger than 32 bits")))
    }
}

/// Bytes of `n` as a varint.
pub(crate) const fn varint_len(n: u64) -> usize {
    ((70 - (n | 1).leading_zeros()) / 7) as usize
}

pub(crate) fn put_varint(out: &mut BytesMut, mut n: u64) {
    while n >= 0x80 {
        out.put_u8(n as u8 | 0x80);
        n >>= 7;
    }
    out.put_u8(n as u8);
}

/// Bytes of a number field; zero is absent. All our field numbers are below 16, so a key is one byte.
pub(crate) const fn number_len(n: u64) -> usize {
    if n == 0 { 0 } else { 1 + varint_len(n) }
}

pub(crate) fn put_number(out: &mut BytesMut, field: u8, n: u64) {
    if n != 0 {
        out.put_u8(field << 3);
        put_varint(out, n);
    }
}

/// Bytes of a field of `length` bytes, present even when it is empty.
pub(crate) const fn message_len(length: usize) -> usize {
    1 + varint_len(length as u64) + length
}

/// Key and length of a length-delimited field; its bytes follow.
pub(crate) fn put_head(out: &mut BytesMut, field: u8, length: usize) {
    out.put_u8(field << 3 | 2);
    put_varint(out, length as u64);
}

/// Bytes of a text or bytes field; empty is absent.
pub(crate) const fn bytes_len(bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { message_len(bytes.len()) }
}

pub(crate) fn put_bytes(out: &mut BytesMut, field: u8, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_head(out, field, bytes.len());
        out.put_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_have_the_length_that_is_computed() {
        for n in (0..64).flat_map(|bit| [1u64 << bit, (1 << bit) - 1, (1 << bit) + 1]).chain([u64::MAX]) {
            let mut out = BytesMut::new();
            put_varint(&mut out, n);
            assert_eq!(out.len(), varint_len(n), "{n}");
            assert_eq!(Reader::new(&out, "n").varint().ok(), Some(n));
        }
    }

    #[test]
    fn numbers_beyond_64_bits_are_refused() {
        let mut bytes = [0xff; 10];
        bytes[9] = 1;
        assert_eq!(Reader::new(&bytes, "n").varint().ok(), Some(u64::MAX));
        bytes[9] = 2;
        assert!(Reader::new(&bytes, "n").varint().is_err());
        assert!(Reader::new(&[0x80; 11], "n").varint().is_err());
        assert!(Reader::new(&[0x80], "n").varint().is_err());
    }
}
