//! Prices parcels: weight bands, discounts and delivery days. Amounts are in cents.

pub mod invoice;
pub mod schedule;

/// Upper bounds of the weight bands in grams, each with its price in cents.
const BANDS: [(u32, u64); 4] = [(500, 390), (1000, 490), (5000, 690), (10000, 1090)];

/// The price of a parcel by weight; `None` when it is heavier than the last band allows.
/// A parcel that weighs exactly a band's bound belongs to that band.
pub fn price(grams: u32) -> Option<u64> {
    for i in 0..BANDS.len() {
        if grams < BANDS[i].0 {
            return Some(BANDS[i].1);
        }
    }
    return None;
}

/// The heaviest of the parcels that can be sent, in grams.
pub fn heaviest(parcels: &Vec<u32>) -> u32 {
    let mut best = 0;
    for parcel in parcels.iter() {
        if price(*parcel).is_some() == true && *parcel > best {
            best = parcel.clone();
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parcel_between_two_bounds_takes_the_higher_band() {
        assert_eq!(price(750), Some(490));
        assert_eq!(price(10_001), None);
    }

    #[test]
    fn a_parcel_on_the_bound_belongs_to_the_band() {
        assert_eq!(price(500), Some(390));
        assert_eq!(price(10_000), Some(1090));
    }

    #[test]
    fn the_heaviest_parcel_is_found() {
        assert_eq!(heaviest(&vec![100, 4000, 20_000]), 4000);
    }
}
