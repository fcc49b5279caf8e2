//! YAML text as a tree whose nodes know their line and column. Scalars stay text, so that decimals lose nothing.

use super::Problem;
use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, Span};
use std::collections::BTreeMap;

/// Nodes of one file, those of expanded aliases included.
const NODES_MAX: usize = 50_000;
const DEPTH_MAX: usize = 32;

/// Line and column, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) line: u64,
    pub(super) column: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) mark: Mark,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// `plain`: written without quotes, so an empty one or `null` means absent.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<(String, Mark, Node)>),
}

impl Node {
    pub(super) fn is_absent(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, plain: true } if text.is_empty() || text == "~" || text == "null")
    }

    pub(super) const fn what(&self) -> &'static str {
        match self.kind {
            Kind::Scalar { .. } => "a value",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a map",
        }
    }
}

/// What is open while the events are read.
enum Open {
    List(Vec<Node>),
    Map(Vec<(String, Mark, Node)>, Option<(String, Mark)>),
}

/// Reads one document; an empty text is an empty map.
pub(super) fn parse(text: &str) -> Result<Node, Problem> {
    let mut reading = Reading { open: Vec::new(), anchors: BTreeMap::new(), root: None, nodes: 0 };
    for next in Parser::new_from_str(text) {
        let (event, span) = next.map_err(|e| {
            let mark = Mark { line: e.marker().line() as u64, column: e.marker().col() as u64 + 1 };
            problem(mark, &format!("this is no YAML: {}", e.info()), "check indentation, quotes and brackets here")
        })?;
        reading.event(event, mark(&span))?;
    }
    let empty = Node { mark: Mark { line: 1, column: 1 }, kind: Kind::Map(Vec::new()) };
    Ok(reading.root.filter(|root| !root.is_absent()).unwrap_or(empty))
}

struct Reading {
    open: Vec<(Mark, usize, Open)>,
    anchors: BTreeMap<usize, (Node, usize)>,
    root: Option<Node>,
    nodes: usize,
}

impl Reading {
    fn event(&mut self, event: Event<'_>, at: Mark) -> Result<(), Problem> {
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let kind = Kind::Scalar { text: text.into_owned(), plain: matches!(style, ScalarStyle::Plain) };
                self.put(Node { mark: at, kind }, anchor)
            }
            Event::SequenceStart(_, anchor, _) => self.begin(at, anchor, Open::List(Vec::new())),
            Event::MappingStart(_, anchor, _) => self.begin(at, anchor, Open::Map(Vec::new(), None)),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some((mark, anchor, Open::List(items))) => self.put(Node { mark, kind: Kind::List(items) }, anchor),
                Some((mark, anchor, Open::Map(pairs, _))) => self.put(Node { mark, kind: Kind::Map(pairs) }, anchor),
                None => Ok(()),
            },
            Event::Alias(id) => {
                let Some((node, size)) = self.anchors.get(&id).cloned() else {
                    return Err(problem(at, "an alias to something that isn't here", "write the value out"));
                };
                self.nodes += size;
                self.put(Node { mark: at, ..node }, 0)
            }
            Event::DocumentStart(..) if self.root.is_some() => {
                Err(problem(at, "a second YAML document", "keep one document in the file"))
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, at: Mark, anchor: usize, open: Open) -> Result<(), Problem> {
        if self.open.len() >= DEPTH_MAX {
            return Err(problem(
                at,
                &format!("nested more than {DEPTH_MAX} levels deep"),
                "no key of this file is that deep",
            ));
        }
        self.open.push((at, anchor, open));
        Ok(())
    }

    fn put(&mut self, node: Node, anchor: usize) -> Result<(), Problem> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(problem(
                node.mark,
                &format!("more than {NODES_MAX} values"),
                "aliases count each time they are used",
            ));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, (node.clone(), count(&node)));
        }
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some((_, _, Open::List(items))) => items.push(node),
            Some((_, _, Open::Map(pairs, key @ None))) => {
                let Kind::Scalar { text, .. } = node.kind else {
                    return Err(problem(node.mark, "a key that isn't text", "keys are names like `listen`"));
                };
                if pairs.iter().any(|(name, _, _)| *name == text) {
                    return Err(problem(node.mark, &format!("`{text}` stands here twice"), "keep one of them"));
                }
                *key = Some((text, node.mark));
            }
            Some((_, _, Open::Map(pairs, key))) => {
                if let Some((name, mark)) = key.take() {
                    pairs.push((name, mark, node));
                }
            }
        }
        Ok(())
    }
}

fn count(node: &Node) -> usize {
    1 + match &node.kind {
        Kind::Scalar { .. } => 0,
        Kind::List(items) => items.iter().map(count).sum(),
        Kind::Map(pairs) => pairs.iter().map(|(_, _, node)| count(node)).sum(),
    }
}

fn mark(span: &Span) -> Mark {
    Mark { line: span.start.line() as u64, column: span.start.col() as u64 + 1 }
}

fn problem(mark: Mark, message: &str, fix: &str) -> Problem {
    Problem { line: mark.line, column: mark.column, field: String::new(), message: message.into(), fix: fix.into() }
}
