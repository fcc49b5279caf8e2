//! A provider's stream of bytes cut into events: server-sent events, or one JSON document per line.
//! Knows nothing of any provider; never holds more than one event, and that is bounded.

/// The longest event in bytes.
pub(crate) const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// How events are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// `text/event-stream`.
    Sse,
    /// `application/x-ndjson`.
    Lines,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Event {
    /// Empty where the stream gives none.
    pub(crate) name: String,
    pub(crate) data: String,
}

/// An event or line that is longer than `EVENT_BYTES_MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

/// Takes bytes as they come and gives whole events.
#[derive(Debug)]
pub(crate) struct Events {
    framing: Framing,
    line: Vec<u8>,
    /// The last byte was `\r`: a `\n` right after it ends the same line.
    after_return: bool,
    started: bool,
    event: Event,
    has_data: bool,
}

impl Events {
    pub(crate) fn new(framing: Framing) -> Self {
        Self {
            framing,
            line: Vec::new(),
            after_return: false,
            started: false,
            event: Event::default(),
            has_data: false,
        }
    }

    /// Calls `each` for each event that `bytes` complete.
    ///
    /// # Errors
    /// When an event is longer than the bound; nothing more should be read then.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(Event)) -> Result<(), TooLong> {
        for &byte in bytes {
            match byte {
                b'\n' if std::mem::take(&mut self.after_return) => {}
                b'\n' | b'\r' => {
                    self.after_return = byte == b'\r';
                    let line = std::mem::take(&mut self.line);
                    self.line_ended(&line, &mut each);
                    self.line = line;
                    self.line.clear();
                }
                byte => {
                    self.after_return = false;
                    if self.line.len() + self.event.data.len() >= EVENT_BYTES_MAX {
                        return Err(TooLong);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    /// The stream has ended. A last line without its end counts under `Lines` only; an SSE event without its blank line
    /// was cut off and is dropped, as the standard says.
    pub(crate) fn end(&mut self, mut each: impl FnMut(Event)) {
        if self.framing == Framing::Lines {
            let line = std::mem::take(&mut self.line);
            self.line_ended(&line, &mut each);
        }
    }

    fn line_ended(&mut self, line: &[u8], each: &mut impl FnMut(Event)) {
        let line = if std::mem::replace(&mut self.started, true) {
            line
        } else {
            line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line)
        };
        let line = String::from_utf8_lossy(line);
        match self.framing {
            Framing::Lines if line.trim().is_empty() => {}
            Framing::Lines => each(Event { name: String::new(), data: line.into_owned() }),
            Framing::Sse => self.field(&line, each),
        }
    }

    fn field(&mut self, line: &str, each: &mut impl FnMut(Event)) {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            if std::mem::take(&mut self.has_data) {
                each(event);
            }
            return;
        }
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
            }
            "event" => value.clone_into(&mut self.event.name),
            // A comment (empty name), `id`, `retry` or something unknown.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(framing: Framing, pieces: &[&[u8]]) -> Vec<(String, String)> {
        let mut events = Events::new(framing);
        let mut out = Vec::new();
        for piece in pieces {
            events.feed(piece, |e| out.push((e.name, e.data))).unwrap();
        }
        events.end(|e| out.push((e.name, e.data)));
        out
    }

    fn expected() -> Vec<(String, String)> {
        [("", "{\"a\":\"ü\"}"), ("ping", "one\ntwo"), ("", ""), ("", "[DONE]")]
            .map(|(n, d)| (n.to_owned(), d.to_owned()))
            .to_vec()
    }

    #[test]
    fn events_are_the_same_wherever_the_bytes_are_cut() {
        for end in ["\n", "\r\n", "\r"] {
            let text = "\u{feff}: hello\nid: 7\ndata: {\"a\":\"ü\"}\n\nevent: ping\ndata:one\ndata: two\nretry: 3\n\n\
                event: nothing\n\ndata\n\ndata: [DONE]\n\ndata: cut off"
                .replace('\n', end);
            let bytes = text.as_bytes();
            for cut in 0..=bytes.len() {
                assert_eq!(all(Framing::Sse, &[&bytes[..cut], &bytes[cut..]]), expected(), "{end:?} cut at {cut}");
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(all(Framing::Sse, &single), expected());
        }
    }

    #[test]
    fn lines_are_events_and_the_last_needs_no_end() {
        let text = "{\"a\":1}\n\n{\"b\":2}\r\n{\"c\":\"ü\"}".as_bytes();
        for cut in 0..=text.len() {
            let found: Vec<String> =
                all(Framing::Lines, &[&text[..cut], &text[cut..]]).into_iter().map(|e| e.1).collect();
            assert_eq!(found, ["{\"a\":1}", "{\"b\":2}", "{\"c\":\"ü\"}"], "cut at {cut}");
        }
    }

    #[test]
    fn an_event_is_bounded_at_n_and_n_plus_1() {
        for framing in [Framing::Sse, Framing::Lines] {
            let mut events = Events::new(framing);
            let line = vec![b'x'; EVENT_BYTES_MAX];
            assert_eq!(events.feed(&line, |_| {}), Ok(()));
            assert_eq!(events.feed(b"x", |_| {}), Err(TooLong));
        }
        // Many short data lines of one event count together.
        let mut events = Events::new(Framing::Sse);
        let line = [b"data:".as_slice(), &[b'y'; 1000], b"\n"].concat();
        let fed = (0..EVENT_BYTES_MAX / 1000 + 2).map(|_| events.feed(&line, |_| {})).find(Result::is_err);
        assert_eq!(fed, Some(Err(TooLong)));
    }
}
