//! Delivery days: weekdays are counted from Monday = 0 to Sunday = 6.

/// The weekday on which a parcel arrives that needs `days` working days. Nothing moves on Saturdays and Sundays.
pub fn arrival(sent_on: u8, days: u8) -> u8 {
    let mut day = sent_on % 7;
    let mut left = days;
    while left > 0 {
        day = (day + 1) % 7;
        if !(day == 6) {
            left -= 1;
        }
    }
    day
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parcel_sent_on_monday_arrives_within_the_week() {
        assert_eq!(arrival(0, 3), 3);
    }

    #[test]
    fn the_weekend_is_skipped() {
        assert_eq!(arrival(4, 1), 0);
    }
}
