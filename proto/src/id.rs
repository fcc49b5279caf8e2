//! Typed ids. An id that is kept owns its text; ids that only pass through stay slices of the received bytes.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Takes the text as it is; see the type's `check` where a peer chose it.
            #[must_use]
            pub fn new(text: &str) -> Self {
                Self(text.into())
            }
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

text_id!(
    /// Who pays. It comes from the credential of the connection, never from a frame.
    TenantId
);
text_id!(
    /// A client's stream, or (as a call id) one call's stream to an agent. Unique per tenant.
    StreamId
);
text_id!(
    /// An agent's handle: `reviewer.gemini`.
    AgentName
);

/// The longest stream id and agent name, in bytes.
pub const ID_BYTES_MAX: usize = 64;

/// True for 1 to 64 of `A-Za-z0-9._-` (ATP-4).
#[must_use]
pub fn is_id(text: &str) -> bool {
    (1..=ID_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// One connection of this process; never reused while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// `c-` and the first 10 bytes in hex of SHA-256(tenant, 0, stream id, 0, lane).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub [u8; 10]);

impl CallId {
    /// The id of one lane of a stream.
    #[must_use]
    pub fn of(tenant: &TenantId, stream: &StreamId, lane: u32) -> Self {
        let mut hash = Sha256::new();
        hash.update(tenant.as_str());
        hash.update([0]);
        hash.update(stream.as_str());
        hash.update([0]);
        hash.update(lane.to_string());
        let mut id = [0; 10];
        id.copy_from_slice(&hash.finalize()[..10]);
        Self(id)
    }

    /// Reads the text form, `c-` and 20 lower-case hex digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("c-")?.as_bytes();
        if hex.len() != 20 {
            return None;
        }
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let mut id = [0; 10];
        for (byte, pair) in id.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(id))
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut text = *b"c-00000000000000000000";
        for (i, byte) in self.0.iter().enumerate() {
            text[2 + 2 * i] = HEX[usize::from(byte >> 4)];
            text[3 + 2 * i] = HEX[usize::from(byte & 15)];
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

impl fmt::Debug for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for CallId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CallId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a call id is `c-` and 20 hex digits"))
    }
}

/// The stream id that belongs to try number `number` (from 1) of an idempotency key (ATP-4): every try of a key
/// reaches the same shard.
#[must_use]
pub fn stream_of_key(key: &str, number: u32) -> StreamId {
    StreamId::new(&format!("{}{number}", key_prefix(key)))
}

/// What every stream id of a key starts with: `k-`, 20 hex digits, `.`.
#[must_use]
pub fn key_prefix(key: &str) -> String {
    use fmt::Write;
    let mut text = String::from("k-");
    for byte in &Sha256::digest(key.as_bytes())[..10] {
        let _ = write!(text, "{byte:02x}");
    }
    text.push('.');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_bounded() {
        assert!(is_id(&"a".repeat(64)) && !is_id(&"a".repeat(65)) && !is_id(""));
        assert!(is_id("k-6f.2_A") && !is_id("a b") && !is_id("ä"));
    }

    #[test]
    fn call_ids_round_trip() {
        let id = CallId::of(&TenantId::new("acme"), &StreamId::new("s"), 1);
        assert_eq!(CallId::parse(&id.to_string()), Some(id));
        assert_ne!(id, CallId::of(&TenantId::new("acme"), &StreamId::new("s"), 2));
        assert_eq!(CallId::parse("c-xyz"), None);
        assert_eq!(CallId::parse("c-0000000000000000000G"), None);
    }

    #[test]
    fn a_key_names_its_streams() {
        assert!(is_id(stream_of_key("pr-17", 4_000_000_000).as_str()));
        assert!(stream_of_key("pr-17", 2).as_str().starts_with(&key_prefix("pr-17")));
    }
}
