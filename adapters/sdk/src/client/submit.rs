//! A task as the caller writes it, and the frame that it becomes.

use crate::error::Error;
use atp_proto::content::{InputText, Submit};
use atp_proto::frame::{Meta, kind};
use atp_proto::id::{is_id, stream_of_key};
use atp_proto::{AgentName, Flags, Frame, Limit, Qos, StreamId, Tokens, UsdMicros};
use std::time::Duration;

/// What to do when the router says no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Further attempts after the first refusal.
    pub attempts: u32,
    /// The longest single wait; a refusal that asks for more is final.
    pub wait_max: Duration,
}

impl Default for Retry {
    /// Five further attempts, none later than 30 s.
    fn default() -> Self {
        Self { attempts: 5, wait_max: Duration::from_secs(30) }
    }
}

/// A task and how it is to be run. With a key the stream id is made of the key and the number of the try; without one it
/// is the given id or a fresh UUID.
#[derive(Clone, Debug)]
pub struct SubmitRequest {
    pub submit: Submit,
    pub qos: Qos,
    pub meta: Meta,
    pub idempotency_key: Option<String>,
    /// Number of the try under the key, from 1.
    pub try_number: u32,
    pub stream_id: Option<StreamId>,
    /// `None`: every refusal is the caller's to judge.
    pub retry: Option<Retry>,
}

impl SubmitRequest {
    #[must_use]
    pub fn new(task: impl Into<String>) -> Self {
        Self::of(Submit { task: task.into(), ..Submit::default() })
    }

    #[must_use]
    pub fn of(submit: Submit) -> Self {
        Self {
            submit,
            qos: Qos::default(),
            meta: Meta::default(),
            idempotency_key: None,
            try_number: 1,
            stream_id: None,
            retry: None,
        }
    }

    #[must_use]
    pub fn input(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.submit.inputs.push(InputText { name: name.into(), content_type: String::new(), text: text.into() });
        self
    }

    #[must_use]
    pub fn budget(mut self, budget: Limit) -> Self {
        self.submit.budget = budget;
        self
    }

    #[must_use]
    pub fn budget_usd_micros(mut self, usd_micros: u64) -> Self {
        self.submit.budget.usd_micros = Some(UsdMicros(usd_micros));
        self
    }

    #[must_use]
    pub fn budget_tokens(mut self, tokens: u64) -> Self {
        self.submit.budget.tokens = Some(Tokens(tokens));
        self
    }

    /// Named agents, each one a lane.
    #[must_use]
    pub fn agents<'a>(mut self, agents: impl IntoIterator<Item = &'a str>) -> Self {
        self.submit.agents.extend(agents.into_iter().map(AgentName::new));
        self
    }

    #[must_use]
    pub fn fanout(mut self, n: u32) -> Self {
        self.submit.fanout = Some(n);
        self
    }

    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.submit.deadline_ms = Some(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// False: refused at once instead of queued.
    #[must_use]
    pub fn wait(mut self, wait: bool) -> Self {
        self.submit.wait = wait;
        self
    }

    #[must_use]
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }

    #[must_use]
    pub fn task_type(mut self, task_type: impl Into<String>) -> Self {
        self.meta.task_type = task_type.into();
        self
    }

    /// Tools that the task's agents may use; its account must have all of them.
    #[must_use]
    pub fn tools(mut self, tools: impl IntoIterator<Item = String>) -> Self {
        self.meta.tool_permissions = tools.into_iter().collect();
        self
    }

    /// The idempotency key: work is done once per key, whatever happens to connections.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    #[must_use]
    pub fn stream_id(mut self, id: StreamId) -> Self {
        self.stream_id = Some(id);
        self
    }

    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = Some(retry);
        self
    }

    /// The same work under the key's next stream id: after a refusal.
    #[must_use]
    pub fn next_try(mut self) -> Self {
        self.try_number = self.try_number.saturating_add(1);
        self
    }

    /// The stream id that this request goes out under.
    ///
    /// # Errors
    /// An id that isn't 1 to 64 of `A-Za-z0-9._-`, an id beside a key, an empty key.
    pub fn resolve_stream_id(&self) -> Result<StreamId, Error> {
        let bad = |why: &str| Err(Error::Request(why.to_owned()));
        match (&self.idempotency_key, &self.stream_id) {
            (Some(key), _) if key.is_empty() => bad("idempotency_key: is empty; leave it out or give it a text"),
            (Some(_), None) if self.try_number == 0 => bad("try_number: is 0; tries count from 1"),
            (Some(key), None) => Ok(stream_of_key(key, self.try_number)),
            (Some(_), Some(_)) => bad("stream_id: is made of the idempotency key; leave it out"),
            (None, Some(id)) if is_id(id.as_str()) => Ok(id.clone()),
            (None, Some(_)) => bad("stream_id: use 1 to 64 of A-Z a-z 0-9 . _ -"),
            (None, None) => Ok(StreamId::new(&uuid::Uuid::new_v4().to_string())),
        }
    }

    pub(crate) fn frame(&self, stream: &StreamId) -> Frame {
        let mut frame = Frame::json(stream.as_str(), 1, Flags::SYN, kind::TASK_SUBMIT, &self.submit);
        frame.qos = self.qos as u32;
        let mut meta = self.meta.clone();
        if let Some(key) = &self.idempotency_key {
            meta.idempotency_key.clone_from(key);
        }
        frame.meta = (meta != Meta::default()).then(|| Box::new(meta));
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_the_stream_and_a_try_the_next() {
        let request = SubmitRequest::new("t").key("pr-17");
        let first = request.resolve_stream_id().unwrap();
        assert_eq!(first, stream_of_key("pr-17", 1));
        assert_eq!(request.next_try().resolve_stream_id().unwrap(), stream_of_key("pr-17", 2));
    }

    #[test]
    fn bad_ids_name_the_field() {
        let long = StreamId::new(&"a".repeat(65));
        for (request, field) in [
            (SubmitRequest::new("t").key(""), "idempotency_key"),
            (SubmitRequest::new("t").key("k").stream_id(StreamId::new("s")), "stream_id"),
            (SubmitRequest::new("t").stream_id(long), "stream_id"),
            (SubmitRequest { try_number: 0, ..SubmitRequest::new("t").key("k") }, "try_number"),
        ] {
            let error = request.resolve_stream_id().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        assert!(SubmitRequest::new("t").stream_id(StreamId::new(&"a".repeat(64))).resolve_stream_id().is_ok());
    }

    #[test]
    fn qos_and_meta_stand_in_the_frame() {
        let request = SubmitRequest::new("t").qos(Qos::Gold).key("k").task_type("code_review");
        let frame = request.frame(&StreamId::new("s"));
        let meta = frame.meta.unwrap();
        assert_eq!((frame.qos, frame.msg_seq), (1, 1));
        assert_eq!((meta.idempotency_key.as_str(), meta.task_type.as_str()), ("k", "code_review"));
    }
}
