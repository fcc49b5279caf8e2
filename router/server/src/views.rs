//! Rows over all shards, out of each shard's own: what `ps`, `agents` and `accounts` show. Only picks and adds up.

use atp_core::message::{Answer, Position};
use atp_core::placement::Placement;
use atp_core::view::{AccountView, AgentView, StatisticsView, StreamView};
use atp_proto::{AgentName, Amount, Limit, UsdMicros};
use std::collections::BTreeMap;

/// Each shard's answer, by number.
pub(crate) type Answers = Vec<(u32, Answer)>;

/// The streams of all shards.
pub(crate) fn streams(answers: Answers) -> Vec<StreamView> {
    let rows = answers.into_iter().filter_map(|(_, answer)| match answer {
        Answer::Streams(rows) => Some(rows),
        _ => None,
    });
    rows.flatten().collect()
}

/// The windows of all accounts, and the sum of the positions that they are true for. An account stands at its home; what
/// other shards have settled and held is added.
pub(crate) fn accounts(answers: Answers, placement: &Placement) -> (Position, Vec<AccountView>) {
    let (mut sum, mut rows) = (0, Vec::new());
    for (shard, answer) in answers {
        let Answer::Accounts { position, accounts } = answer else { continue };
        sum += position;
        rows.extend(accounts.into_iter().map(|row| (shard, row)));
    }
    (sum, accounts_of(rows, placement))
}

/// The windows of all accounts, a row each, out of the rows that the shards have of them.
pub fn accounts_of(rows: impl IntoIterator<Item = (u32, AccountView)>, placement: &Placement) -> Vec<AccountView> {
    let mut windows = BTreeMap::<(String, String), Vec<(bool, AccountView)>>::new();
    for (shard, row) in rows {
        let at_home = placement.home_of(&row.account) == shard;
        windows.entry((row.account.clone(), row.window_id.clone())).or_default().push((at_home, row));
    }
    windows.into_values().filter_map(account).collect()
}

/// One window of an account, of its home (true) and of others.
fn account(mut rows: Vec<(bool, AccountView)>) -> Option<AccountView> {
    let home = rows.iter().position(|(at_home, _)| *at_home).unwrap_or(0);
    let (settled, held) = (total(rows.iter().map(|(_, row)| row.settled)), total(rows.iter().map(|(_, row)| row.held)));
    let shares = rows.iter().filter(|(_, row)| row.of_shares);
    let spent_of_shares = total(shares.flat_map(|(_, row)| [row.settled, row.held]));
    let (_, row) = (!rows.is_empty()).then(|| rows.swap_remove(home))?;
    let used = total([settled, held]);
    let remaining = Limit {
        tokens: row.limit.tokens.map(|limit| limit.less(used.tokens)),
        usd_micros: row.limit.usd_micros.map(|limit| limit.less(used.usd_micros)),
    };
    let lent = row.lent.less(spent_of_shares);
    Some(AccountView { settled, held, remaining, lent, ..row })
}

fn total(amounts: impl IntoIterator<Item = Amount>) -> Amount {
    amounts.into_iter().fold(Amount::ZERO, |sum, one| Amount {
        tokens: sum.tokens.add(one.tokens).unwrap_or(sum.tokens),
        usd_micros: sum.usd_micros.add(one.usd_micros).unwrap_or(sum.usd_micros),
    })
}

/// The agents, a row each. How an agent stands every shard knows; its home has it in its log. Its calls and what they cost are
/// added up; of what was learned of it the shard with the most runs speaks.
pub(crate) fn agents(answers: Answers, placement: &Placement) -> Vec<AgentView> {
    let mut agents = BTreeMap::<AgentName, Vec<(bool, AgentView)>>::new();
    for (shard, answer) in answers {
        let Answer::Agents(rows) = answer else { continue };
        for row in rows {
            let at_home = placement.home_of_agent(&row.name) == shard;
            agents.entry(row.name.clone()).or_default().push((at_home, row));
        }
    }
    agents.into_values().filter_map(agent).collect()
}

/// One agent, as its home (true) and others have it.
fn agent(mut rows: Vec<(bool, AgentView)>) -> Option<AgentView> {
    let in_flight = rows.iter().map(|(_, row)| row.in_flight).sum();
    let spent = rows.iter().fold(0_u64, |sum, (_, row)| sum.saturating_add(row.spent_usd_micros.0));
    let mut learned = BTreeMap::<(String, String), StatisticsView>::new();
    for statistic in rows.iter_mut().flat_map(|(_, row)| std::mem::take(&mut row.statistics)) {
        let key = (statistic.model.clone(), statistic.task_type.clone());
        if learned.get(&key).is_none_or(|known| known.runs < statistic.runs) {
            learned.insert(key, statistic);
        }
    }
    let known = |of: fn(&AgentView) -> Option<u64>| rows.iter().find_map(|(_, row)| of(row));
    let (mape, under, overage) =
        (known(|r| r.mape_7d_ppm), known(|r| r.under_rate_7d_ppm), known(|r| r.p95_overage_ppm));
    let home = rows.iter().position(|(at_home, _)| *at_home).unwrap_or(0);
    let (_, row) = (!rows.is_empty()).then(|| rows.swap_remove(home))?;
    Some(AgentView {
        in_flight,
        spent_usd_micros: UsdMicros(spent),
        mape_7d_ppm: row.mape_7d_ppm.or(mape),
        under_rate_7d_ppm: row.under_rate_7d_ppm.or(under),
        p95_overage_ppm: row.p95_overage_ppm.or(overage),
        statistics: learned.into_values().collect(),
        ..row
    })
}
