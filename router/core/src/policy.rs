//! Policies as typed values: which rule a task falls under, and what that rule asks for. The shell parses the text; choosing
//! agents, scoring them and paying for them is done by those who read this. Decides nothing about money.

use atp_proto::pb::Meta;
use atp_proto::{AgentName, Limit, Qos};
use std::collections::{BTreeMap, BTreeSet};

/// Parts per million of one.
pub const PPM: u32 = 1_000_000;

/// What `policy` in the configuration says. The default has the documented weights and no rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub weights: Weights,
    /// In the order of the file: the first whole match wins.
    pub rules: Vec<Rule>,
    /// What one stream may spend on a tool, by its name.
    pub tools_budget_caps: BTreeMap<String, Limit>,
}

/// Weights of the score's terms in ppm; their sum is 1,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    pub capability: u32,
    pub perf: u32,
    pub cost: u32,
    pub latency: u32,
    pub context: u32,
    pub predictability: u32,
    pub safety: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            capability: 300_000,
            perf: 200_000,
            cost: 150_000,
            latency: 100_000,
            context: 100_000,
            predictability: 100_000,
            safety: 50_000,
        }
    }
}

impl Weights {
    /// Names as in the file, in the order of `parts`.
    pub const NAMES: [&'static str; 7] =
        ["w_capability", "w_perf", "w_cost", "w_latency", "w_context", "w_predictability", "w_safety"];

    #[must_use]
    pub const fn parts(&self) -> [u32; 7] {
        [self.capability, self.perf, self.cost, self.latency, self.context, self.predictability, self.safety]
    }

    #[must_use]
    pub const fn from_parts(parts: [u32; 7]) -> Self {
        let [capability, perf, cost, latency, context, predictability, safety] = parts;
        Self { capability, perf, cost, latency, context, predictability, safety }
    }

    /// Sum of all seven in ppm.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.parts().iter().map(|w| u64::from(*w)).sum()
    }
}

/// One entry of `policies`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub when: Match,
    /// Agents of a task that names none; empty: by score.
    pub fanout: Vec<Pick>,
    pub escalation: Option<Escalation>,
    /// The task's budget is the component-wise minimum of this and the client's.
    pub budget: Limit,
    /// An agent needs one of these groups; empty: any agent may.
    pub security_groups_any: Vec<String>,
    /// No step of an account's ladder may go below this model.
    pub floor: Option<String>,
    /// True: one gold call may go to an agent that said PAUSE, never before its retry_after.
    pub gold_overrides_pause: bool,
}

/// Whom a rule's `fanout` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pick {
    Agent(AgentName),
    /// The best `top` of those whose handle begins so (the file's `reviewer.*` without its star).
    Prefix {
        prefix: String,
        top: u32,
    },
}

/// When a further lane is bought, and whom it asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Escalation {
    pub on: BTreeSet<Trigger>,
    /// One after the other, each at most once.
    pub to: Vec<AgentName>,
}

/// Why a task is escalated. The order is the one in which they are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trigger {
    Timeout,
    AgentDown,
    TestFail,
    Disagreement,
    WeakCitations,
    LowConf,
    Ambiguity,
}

impl Trigger {
    pub const ALL: [Self; 7] = [
        Self::Timeout,
        Self::AgentDown,
        Self::TestFail,
        Self::Disagreement,
        Self::WeakCitations,
        Self::LowConf,
        Self::Ambiguity,
    ];

    /// The name in files, records and bills.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::AgentDown => "agent_down",
            Self::TestFail => "test_fail",
            Self::Disagreement => "disagreement",
            Self::WeakCitations => "weak_citations",
            Self::LowConf => "low_conf",
            Self::Ambiguity => "ambiguity",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.as_str() == text)
    }
}

/// Conditions that all have to hold; none: every task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match(pub Vec<Condition>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The value is one of these; of a field that has several values, one of them is.
    OneOf(TextField, Vec<String>),
    /// Every one of these stands in `meta.tool_permissions`.
    Requires(Vec<String>),
    /// The number lies in one of these.
    In(NumberField, Vec<Span>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextField {
    Tenant,
    TaskType,
    Phase,
    Category,
    Risk,
    Qos,
    Languages,
    DataScope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberField {
    DiffLoc,
    PromptTokens,
    FileCount,
    ReasoningDepth,
}

impl TextField {
    pub const ALL: [(&'static str, Self); 8] = [
        ("tenant", Self::Tenant),
        ("task_type", Self::TaskType),
        ("phase", Self::Phase),
        ("category", Self::Category),
        ("risk", Self::Risk),
        ("qos", Self::Qos),
        ("languages", Self::Languages),
        ("data_scope", Self::DataScope),
    ];
}

impl NumberField {
    pub const ALL: [(&'static str, Self); 4] = [
        ("diff_loc", Self::DiffLoc),
        ("prompt_tokens", Self::PromptTokens),
        ("file_count", Self::FileCount),
        ("reasoning_depth", Self::ReasoningDepth),
    ];
}

/// Whole numbers from `from` to `to`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from: u64,
    pub to: u64,
}

impl Span {
    /// Reads `200`, `>200`, `>=200`, `<200`, `<=200` or `50..200` (both included).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let number = |t: &str| t.trim().parse::<u64>().ok();
        let text = text.trim();
        let span = if let Some(rest) = text.strip_prefix(">=") {
            Self { from: number(rest)?, to: u64::MAX }
        } else if let Some(rest) = text.strip_prefix('>') {
            Self { from: number(rest)?.checked_add(1)?, to: u64::MAX }
        } else if let Some(rest) = text.strip_prefix("<=") {
            Self { from: 0, to: number(rest)? }
        } else if let Some(rest) = text.strip_prefix('<') {
            Self { from: 0, to: number(rest)?.checked_sub(1)? }
        } else if let Some((from, to)) = text.split_once("..") {
            Self { from: number(from)?, to: number(to)? }
        } else {
            let exact = number(text)?;
            Self { from: exact, to: exact }
        };
        (span.from <= span.to).then_some(span)
    }

    #[must_use]
    pub const fn has(self, n: u64) -> bool {
        self.from <= n && n <= self.to
    }
}

/// What a task is matched by. The tenant is the connection's, never the frame's.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    pub tenant: &'a str,
    pub qos: Qos,
    pub meta: Option<&'a Meta>,
}

impl Policy {
    /// The first rule whose whole match holds, and its number from 1.
    #[must_use]
    pub fn rule(&self, facts: &Facts<'_>) -> Option<(u32, &Rule)> {
        (1..).zip(&self.rules).find(|(_, rule)| rule.when.holds(facts))
    }
}

impl Match {
    /// True when all conditions hold; an absent field fails its condition.
    #[must_use]
    pub fn holds(&self, facts: &Facts<'_>) -> bool {
        self.0.iter().all(|condition| condition.holds(facts))
    }
}

impl Condition {
    fn holds(&self, facts: &Facts<'_>) -> bool {
        let meta = facts.meta;
        match self {
            Self::OneOf(field, wanted) => {
                let is = |value: &str| !value.is_empty() && wanted.iter().any(|w| w == value);
                let any = |values: Option<&Vec<String>>| values.is_some_and(|v| v.iter().any(|v| is(v)));
                match field {
                    TextField::Tenant => is(facts.tenant),
                    TextField::Qos => is(facts.qos.as_str()),
                    TextField::TaskType => is(meta.map_or("", |m| &m.task_type)),
                    TextField::Phase => is(meta.map_or("", |m| &m.phase)),
                    TextField::Category => is(meta.map_or("", |m| &m.category)),
                    TextField::Risk => is(meta.map_or("", |m| &m.risk)),
                    TextField::Languages => any(meta.map(|m| &m.languages)),
                    TextField::DataScope => any(meta.map(|m| &m.data_scope)),
                }
            }
            Self::Requires(wanted) => wanted.iter().all(|w| meta.is_some_and(|m| m.tool_permissions.contains(w))),
            Self::In(field, spans) => {
                let value = meta.and_then(|m| match field {
                    NumberField::DiffLoc => m.diff_loc,
                    NumberField::PromptTokens => m.prompt_tokens,
                    NumberField::FileCount => m.file_count,
                    NumberField::ReasoningDepth => m.reasoning_depth,
                });
                value.is_some_and(|n| spans.iter().any(|s| s.has(n)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(condition: Condition, meta: &Meta) -> bool {
        Match(vec![condition]).holds(&Facts { tenant: "acme", qos: Qos::Gold, meta: Some(meta) })
    }

    #[test]
    fn the_default_weights_sum_to_one() {
        assert_eq!(Weights::default().sum(), u64::from(PPM));
        assert_eq!(Weights::from_parts(Weights::default().parts()), Weights::default());
    }

    #[test]
    fn comparisons_end_where_they_say() {
        let span = |text| Span::parse(text).map(|s| (s.from, s.to));
        assert_eq!(span(">200"), Some((201, u64::MAX)));
        assert_eq!(span(">= 200"), Some((200, u64::MAX)));
        assert_eq!(span("<200"), Some((0, 199)));
        assert_eq!(span("<=200"), Some((0, 200)));
        assert_eq!(span("50..200"), Some((50, 200)));
        assert_eq!(span("200"), Some((200, 200)));
        for bad in ["", "~200", "200..50", "<0", ">18446744073709551615", "2e3", "-1", "..5", "many"] {
            assert_eq!(Span::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_number_is_compared_at_its_bounds() {
        let loc = |n| Meta { diff_loc: n, ..Meta::default() };
        let over = || Condition::In(NumberField::DiffLoc, vec![Span { from: 201, to: u64::MAX }]);
        assert!(holds(over(), &loc(Some(201))) && !holds(over(), &loc(Some(200))));
        assert!(!holds(over(), &loc(None)), "an absent field fails");
    }

    #[test]
    fn lists_match_when_they_meet_and_requirements_when_all_are_there() {
        let meta = Meta {
            languages: vec!["rust".into(), "c".into()],
            tool_permissions: vec!["fs.read".into(), "http.get".into()],
            ..Meta::default()
        };
        let one = |v: &[&str]| Condition::OneOf(TextField::Languages, v.iter().map(|s| (*s).to_owned()).collect());
        let all = |v: &[&str]| Condition::Requires(v.iter().map(|s| (*s).to_owned()).collect());
        assert!(holds(one(&["c", "go"]), &meta) && !holds(one(&["go"]), &meta));
        assert!(holds(all(&["fs.read", "http.get"]), &meta) && !holds(all(&["fs.read", "fs.write"]), &meta));
        assert!(!holds(Condition::OneOf(TextField::Risk, vec![String::new()]), &meta), "absent is no value");
    }

    #[test]
    fn the_first_whole_match_wins() {
        let rule = |tenant: &str, top| Rule {
            when: Match(vec![Condition::OneOf(TextField::Tenant, vec![tenant.into()])]),
            fanout: vec![Pick::Prefix { prefix: "r.".into(), top }],
            ..Rule::default()
        };
        let policy = Policy { rules: vec![rule("x", 1), rule("acme", 2), Rule::default()], ..Policy::default() };
        let of = |tenant| policy.rule(&Facts { tenant, qos: Qos::Silver, meta: None }).map(|(n, _)| n);
        assert_eq!((of("x"), of("acme"), of("other")), (Some(1), Some(2), Some(3)));
        assert_eq!(Policy::default().rule(&Facts { tenant: "x", qos: Qos::Gold, meta: None }), None);
    }
}
