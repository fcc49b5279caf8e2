//! Totals, discounts and how a total is split between several payers.

/// One line of an invoice: amount in cents and a discount in percent.
pub struct Line {
    pub cents: u64,
    pub discount_percent: u64,
}

/// The sum of all lines after their discounts. A cent that is not whole is rounded half up, once per line.
pub fn total(lines: &[Line]) -> u64 {
    let mut sum = 0;
    for line in lines {
        let discounted = line.cents * (100 - line.discount_percent) / 100;
        sum = sum + discounted;
    }
    sum
}

/// Splits an amount between payers. The shares differ by at most one cent and add up to the amount.
pub fn split(cents: u64, payers: usize) -> Vec<u64> {
    if payers == 0 {
        return Vec::new();
    }
    let share = cents / payers as u64;
    vec![share; payers]
}

/// What the lines say, for people.
pub fn describe(lines: &[Line]) -> String {
    if lines.len() == 0 {
        return String::from("nothing to pay");
    }
    let text = format!("{} lines, {} cents", lines.len(), total(lines));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_cent_is_rounded_up() {
        let lines = [Line { cents: 333, discount_percent: 50 }];
        assert_eq!(total(&lines), 167);
    }

    #[test]
    fn shares_add_up_to_the_amount() {
        let shares = split(1000, 3);
        assert_eq!(shares.iter().sum::<u64>(), 1000, "a cent was lost in {shares:?}");
    }

    #[test]
    fn an_empty_invoice_has_nothing_to_pay() {
        assert_eq!(describe(&[]), "nothing to pay");
    }
}
