//! What could have been finished by somebody who knew every length beforehand. Two such figures, both without concurrency
//! and deadlines: neither can make such a policy finish less.

/// The most answers that the budget pays: the cheapest first. No policy can finish more within the budget; one that doesn't
/// see the future can't choose so.
pub(crate) fn cheapest(costs: &[u64], budget: u64) -> usize {
    let mut costs = costs.to_vec();
    costs.sort_unstable();
    in_order(&costs, budget)
}

/// The answers that the budget pays in order of arrival, up to the first one that it doesn't.
pub(crate) fn in_order(costs: &[u64], budget: u64) -> usize {
    let mut left = budget;
    costs
        .iter()
        .take_while(|cost| {
            let paid = **cost <= left;
            left = left.saturating_sub(**cost);
            paid
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_optima_on_a_tiny_trace() {
        let costs = [50, 10, 40, 10, 20];
        for (budget, most, first) in
            [(0, 0, 0), (39, 2, 0), (40, 3, 0), (50, 3, 1), (99, 4, 2), (100, 4, 3), (130, 5, 5)]
        {
            assert_eq!((cheapest(&costs, budget), in_order(&costs, budget)), (most, first), "{budget}");
        }
    }
}
