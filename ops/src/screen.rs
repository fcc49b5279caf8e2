//! What goes to a terminal or a pipe: colour, tables, escaping. Knows nothing of tasks or money.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

/// How this process may write to stdout.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Screen {
    /// Stdout is a terminal: control characters of others are escaped.
    pub(crate) terminal: bool,
    pub(crate) colour: bool,
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paint {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Cyan,
}

impl Screen {
    pub(crate) fn of_process(json: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        Self { terminal, colour: terminal && !json && !plain, json }
    }

    pub(crate) fn paint(self, paint: Paint, text: &str) -> String {
        if !self.colour || text.is_empty() {
            return text.into();
        }
        let code = match paint {
            Paint::Bold => "1",
            Paint::Dim => "2",
            Paint::Red => "31",
            Paint::Green => "32",
            Paint::Yellow => "33",
            Paint::Cyan => "36",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Text that somebody else wrote, harmless on a terminal.
    pub(crate) fn foreign(self, text: &str) -> Cow<'_, str> {
        if self.terminal { escape(text) } else { Cow::Borrowed(text) }
    }

    /// One line on stdout.
    pub(crate) fn line(self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// One JSON document on one line of stdout.
    pub(crate) fn document(self, value: &impl serde::Serialize) -> io::Result<()> {
        self.line(&serde_json::to_string(value)?)
    }

    /// A word about progress, on stderr and never with `--json`.
    pub(crate) fn progress(self, text: &str) {
        if !self.json {
            let _ = writeln!(io::stderr().lock(), "{}", escape(text));
        }
    }
}

/// Control characters (but line feed and tab) and those that turn the direction of text, as `\u{1b}`.
pub(crate) fn escape(text: &str) -> Cow<'_, str> {
    fn dangerous(c: char) -> bool {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
    }
    if !text.contains(dangerous) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if dangerous(c) { safe.extend(c.escape_unicode()) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// Rows under headings, each column as wide as its widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    /// Heading, and true for a column of numbers.
    columns: Vec<(&'static str, bool)>,
    rows: Vec<Vec<(String, Option<Paint>)>>,
}

impl Table {
    /// A heading that starts with `>` is set flush right.
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        let columns = headings.iter().map(|h| h.strip_prefix('>').map_or((*h, false), |h| (h, true))).collect();
        Self { columns, rows: Vec::new() }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) -> &mut Self {
        self.rows.push(cells.into_iter().map(|c| (one_line(&c), None)).collect());
        self
    }

    /// Paints a cell of the last row.
    pub(crate) fn paint(&mut self, column: usize, paint: Paint) {
        if let Some(cell) = self.rows.last_mut().and_then(|r| r.get_mut(column)) {
            cell.1 = Some(paint);
        }
    }

    pub(crate) fn render(&self, screen: Screen) -> String {
        let width = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i)).map(|c| c.0.chars().count());
            cells.chain([self.columns[i].0.chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let last = self.columns.len().saturating_sub(1);
        let line = |cells: &[(String, Option<Paint>)]| {
            let mut text = String::new();
            for (i, (cell, paint)) in cells.iter().enumerate() {
                let pad = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
                let cell = paint.map_or_else(|| cell.clone(), |p| screen.paint(p, cell));
                if self.columns[i].1 {
                    text.push_str(&pad);
                    text.push_str(&cell);
                } else {
                    text.push_str(&cell);
                    text.push_str(if i == last { "" } else { &pad });
                }
                text.push_str(if i == last { "" } else { "  " });
            }
            text.push('\n');
            text
        };
        let head: Vec<_> = self.columns.iter().map(|c| (c.0.to_owned(), Some(Paint::Bold))).collect();
        self.rows.iter().fold(line(&head), |text, row| text + &line(row))
    }
}

/// A cell is one line, whoever wrote it.
fn one_line(text: &str) -> String {
    escape(text).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_hide_nothing_and_obey_nothing() {
        assert_eq!(escape("plain\ttext\n"), "plain\ttext\n");
        assert_eq!(escape("\x1b[2Jgone\r"), "\\u{1b}[2Jgone\\u{d}");
        assert_eq!(escape("a\u{202e}b\u{9b}c"), "a\\u{202e}b\\u{9b}c");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", ">USD", "STATE"]);
        table.row(["a".into(), "0.50".into(), "done".into()]);
        table.row(["long\nname".into(), "12.00".into(), "x".into()]);
        let text = table.render(Screen::default());
        assert_eq!(text, "NAME         USD  STATE\na           0.50  done\nlong name  12.00  x\n");
    }
}
