//! What JSON of people and of other languages may look like: 64-bit integers as strings, `null` for absent.
//! Never reads a number through a float.

use crate::limits::FRAME_ENTRIES_MAX;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Unexpected, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// For `#[serde(deserialize_with)]` and `#[serde(default)]`.
pub(crate) fn lenient<'de, D: Deserializer<'de>, T: Lenient<'de>>(d: D) -> Result<T, D::Error> {
    T::lenient(d)
}

pub(crate) fn is_default<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

pub(crate) trait Lenient<'de>: Sized {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error>;
}

impl<'de> Lenient<'de> for Option<u64> {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Int)
    }
}

impl<'de> Lenient<'de> for u64 {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Option::<u64>::lenient(d).map(Option::unwrap_or_default)
    }
}

impl<'de> Lenient<'de> for Option<u32> {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let narrow = |n| u32::try_from(n).map_err(|_| D::Error::custom(format!("{n} is larger than 32 bits")));
        Option::<u64>::lenient(d)?.map(narrow).transpose()
    }
}

impl<'de> Lenient<'de> for u32 {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Option::<u32>::lenient(d).map(Option::unwrap_or_default)
    }
}

impl<'de> Lenient<'de> for String {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Option::deserialize(d).map(Option::unwrap_or_default)
    }
}

/// At most `FRAME_ENTRIES_MAX`, counted while they are read.
impl<'de, T: Deserialize<'de>> Lenient<'de> for Vec<T> {
    fn lenient<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(List(PhantomData))
    }
}

struct Int;

impl Visitor<'_> for Int {
    type Value = Option<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number from 0 to 2^64-1")
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<Option<u64>, E> {
        Ok(Some(v))
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<Option<u64>, E> {
        u64::try_from(v).map(Some).map_err(|_| E::invalid_value(Unexpected::Signed(v), &self))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Option<u64>, E> {
        v.parse().map(Some).map_err(|_| E::invalid_value(Unexpected::Str(v), &self))
    }
    fn visit_unit<E: Error>(self) -> Result<Option<u64>, E> {
        Ok(None)
    }
}

struct List<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }
    fn visit_unit<E: Error>(self) -> Result<Vec<T>, E> {
        Ok(Vec::new())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = seq.next_element()? {
            if list.len() == FRAME_ENTRIES_MAX {
                return Err(A::Error::custom(format!("a list of more than {FRAME_ENTRIES_MAX} entries")));
            }
            list.push(entry);
        }
        Ok(list)
    }
}
