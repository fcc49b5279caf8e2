//! Registry text -> what runs cost. The file is a catalogue of agents with much else in it; only the figures of
//! `agents.NAME.models.MODEL` are read here.

use super::read::{Read, Walk};
use super::table::Takes;
use super::tree::{Kind, Node};
use atp_core::estimate::CALL_AMOUNT_MAX;
use atp_core::registry::{Registry, RunCost};

const FIGURES: [&str; 6] = ["mean", "p50", "p90", "runs", "preliminary", "in_ppm"];
const PPM: u64 = 1_000_000;

/// True when the text is a registry: its agents are maps by name, a configuration's are a list.
pub(super) fn is_registry(root: &Node) -> bool {
    let Kind::Map(pairs) = &root.kind else { return false };
    pairs.iter().any(|(name, _, node)| match &node.kind {
        Kind::Map(agents) if name == "agents" => agents.iter().all(|(.., a)| matches!(a.kind, Kind::Map(_))),
        _ => false,
    })
}

impl Walk<'_> {
    /// Reads a whole registry; what is wrong stands in `problems`.
    pub(super) fn registry(&mut self, root: &Node) -> Registry {
        let mut registry = Registry::default();
        for (name, path, agents) in self.entries(root, "", None) {
            if name != "agents" {
                continue;
            }
            for (agent, path, entry) in self.entries(agents, &path, None) {
                for (name, path, models) in self.entries(entry, &path, None) {
                    if name != "models" {
                        continue;
                    }
                    for (model, path, figures) in self.entries(models, &path, None) {
                        // Beside the models stand `preferred` and `supported`, which name some.
                        if matches!(figures.kind, Kind::Map(_))
                            && let Some(cost) = self.run_cost(figures, &path)
                        {
                            registry.add(&agent, &model, cost);
                        }
                    }
                }
            }
        }
        registry
    }

    fn run_cost(&mut self, node: &Node, path: &str) -> Option<RunCost> {
        let mut cost = RunCost { mean: 0, p90: 0, runs: 0, preliminary: false, in_ppm: None };
        let (mut mean, mut p90) = (None, None);
        for (name, path, node) in self.entries(node, path, Some(&FIGURES)) {
            let most = if name == "in_ppm" { PPM } else { CALL_AMOUNT_MAX };
            let takes = if name == "preliminary" { Takes::Bool } else { Takes::Whole(0, most) };
            match (name.as_str(), self.read(node, &path, takes)?) {
                ("mean", Read::Whole(n)) => mean = Some(n),
                ("p90", Read::Whole(n)) => p90 = Some(n),
                ("runs", Read::Whole(n)) => cost.runs = n,
                ("in_ppm", Read::Whole(n)) => cost.in_ppm = u32::try_from(n).ok(),
                ("preliminary", Read::Bool(is)) => cost.preliminary = is,
                // p50 is for people.
                _ => {}
            }
        }
        let Some(mean) = mean else {
            self.problem(node.mark, path, "has no mean", "add `mean`, the tokens (in + out) of a run");
            return None;
        };
        (cost.mean, cost.p90) = (mean, p90.unwrap_or(mean));
        Some(cost)
    }
}
