//! The price book.
#[derive(Debug, Default)]
pub struct PriceBook {}
