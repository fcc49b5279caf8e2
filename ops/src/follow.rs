//! A stream as it happens, for people: each agent's text in whole lines under its name. Decides nothing about money.

use crate::screen::{Paint, Screen};
use atp_proto::content::{Accepted, Partial};
use atp_proto::money::show_usd;
use atp_proto::{AgentName, CallId};
use std::collections::BTreeMap;
use std::io;

/// A line that hasn't ended is shown in pieces of about this many characters.
const WRAP: usize = 100;

/// Prints partial results so that lines of several agents don't run into each other.
#[derive(Debug)]
pub(crate) struct Follower {
    screen: Screen,
    lanes: BTreeMap<CallId, Lane>,
    /// What stands before each line, e.g. a stream id when several are followed.
    prefix: String,
    noted: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Lane {
    agent: AgentName,
    rest: String,
}

impl Follower {
    pub(crate) fn new(screen: Screen, prefix: String) -> Self {
        Self { screen, lanes: BTreeMap::new(), prefix, noted: BTreeMap::new() }
    }

    pub(crate) fn accepted(&self, accepted: &Accepted) {
        let budget =
            accepted.window.max_usd_micros.map(|v| format!(", window {} USD", show_usd(v))).unwrap_or_default();
        self.screen.progress(&format!("stream {} {}{budget}", accepted.stream_id, accepted.state.as_str()));
    }

    /// Beside the text: stderr, so that what agents say can be piped on. What was said of `about` last isn't said again.
    pub(crate) fn note(&mut self, about: &str, text: String) {
        if self.noted.get(about) != Some(&text) {
            self.screen.progress(&format!("{}{text}", self.prefix));
            self.noted.insert(about.into(), text);
        }
    }

    pub(crate) fn partial(&mut self, partial: &Partial) -> io::Result<()> {
        let lane = self
            .lanes
            .entry(partial.call_id)
            .or_insert_with(|| Lane { agent: partial.agent.clone(), rest: String::new() });
        lane.rest.push_str(partial.text.as_deref().unwrap_or_default());
        let mut lines = Vec::new();
        while let Some(end) = line_end(&lane.rest) {
            let line: String = lane.rest.drain(..end).collect();
            lines.push(line.trim_end_matches('\n').to_owned());
        }
        if let Some(ended) = &partial.ended {
            if !lane.rest.is_empty() {
                lines.push(std::mem::take(&mut lane.rest));
            }
            let tokens = partial.cost.in_tokens.0.saturating_add(partial.cost.out_tokens.0);
            lines.push(format!("[{ended}: {} USD, {tokens} tokens]", show_usd(partial.cost.usd_micros)));
        }
        let agent = lane.agent.clone();
        if ended_or_empty(partial) {
            self.lanes.remove(&partial.call_id);
        }
        for line in lines {
            self.line(&agent, &line)?;
        }
        Ok(())
    }

    /// What hasn't ended with a line feed.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        for (_, lane) in std::mem::take(&mut self.lanes) {
            if !lane.rest.is_empty() {
                self.line(&lane.agent, &lane.rest)?;
            }
        }
        Ok(())
    }

    fn line(&self, agent: &AgentName, line: &str) -> io::Result<()> {
        let name = self.screen.paint(Paint::Cyan, &self.screen.foreign(agent.as_str()));
        self.screen.line(&format!("{}{name} | {}", self.prefix, self.screen.foreign(line)))
    }
}

fn ended_or_empty(partial: &Partial) -> bool {
    partial.ended.is_some()
}

/// Where the next line to print ends: behind a line feed, or at a space when it has grown long.
fn line_end(text: &str) -> Option<usize> {
    if let Some(at) = text.find('\n') {
        return Some(at + 1);
    }
    let (at, _) = text.char_indices().nth(WRAP)?;
    text[at..].find(' ').map(|space| at + space + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_line_feeds_or_when_long() {
        assert_eq!(line_end("no end"), None);
        assert_eq!(line_end("a\nb"), Some(2));
        let long = "x".repeat(WRAP);
        assert_eq!(line_end(&long), None);
        assert_eq!(line_end(&format!("{long} y")), Some(WRAP + 1));
        assert_eq!(line_end(&format!("{long}yy")), None);
    }
}
