//! `atp submit`: a task goes out, what comes back is shown as it comes, then the result and the bill.

use crate::api::Api;
use crate::cli::{self, Global};
use crate::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::follow::Follower;
use crate::screen::{Paint, Screen};
use crate::{finding, rows};
use atp_proto::code::WireError;
use atp_proto::content::{Bill, Final, InputText, Submit, TaskState};
use atp_proto::id::stream_of_key;
use atp_proto::limits::MESSAGE_BYTES_MAX;
use atp_proto::{AgentName, Limit, Tokens};
use atp_sdk::{Client, Error, EventKind, SubmitRequest, TaskStream};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;

pub(crate) async fn run(global: &Global, screen: Screen, args: &cli::Submit) -> Outcome {
    let mut request = request(args)?;
    if let Some(key) = &args.key {
        request.try_number = next_try(global, key).await?;
    }
    let client = connect::client(global).await?;
    let submitted = tokio::select! {
        submitted = client.submit(request.clone()) => submitted,
        () = interrupt() => return Err(Failure::interrupted()),
    };
    let stream = match submitted {
        Ok(stream) => stream,
        Err(error) => return refused(screen, &request, &error),
    };
    if args.detach {
        let accepted = stream.accepted();
        if screen.json {
            screen.document(&json!({"stream_id": accepted.stream_id, "state": accepted.state}))?;
        } else {
            screen.line(&accepted.stream_id)?;
        }
        client.close().await;
        return Ok(());
    }
    let end = follow(screen, stream, screen.json && args.stream).await?;
    finish(screen, &end, args.sarif.as_deref(), client).await
}

/// A stream that was read to its bill.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) stream_id: String,
    pub(crate) final_: Final,
    pub(crate) bill: Bill,
}

/// Reads a stream to its end and shows it. Ctrl-C leaves; the task goes on.
pub(crate) async fn follow(screen: Screen, mut stream: TaskStream, frames: bool) -> Result<End, Failure> {
    let stream_id = stream.id().to_string();
    let mut follower = Follower::new(screen, String::new());
    follower.accepted(stream.accepted());
    let mut final_ = None;
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            () = interrupt() => {
                follower.flush()?;
                screen.progress(&format!("the task goes on: atp watch {stream_id}, or stop it: atp cancel {stream_id}"));
                return Err(Failure::interrupted());
            }
        };
        let Some(event) = event else {
            return Err(Failure::new(Exit::Task, format!("stream {stream_id} ended without a bill")));
        };
        let event = event.map_err(|e| connect::failure(&e))?;
        if frames {
            screen.line(&atp_proto::json::to_json(atp_proto::json::View::new(&event.frame)))?;
        }
        match event.kind {
            EventKind::Partial(partial) if !screen.json => follower.partial(&partial)?,
            EventKind::Final(end) => final_ = Some(*end),
            EventKind::Bill(bill) => {
                follower.flush()?;
                let final_ = final_.ok_or_else(|| Failure::new(Exit::Task, "a bill came without a final"))?;
                return Ok(End { stream_id, final_, bill: *bill });
            }
            EventKind::Partial(_)
            | EventKind::Accepted(_)
            | EventKind::Log
            | EventKind::Window(_)
            | EventKind::Other => {}
        }
    }
}

/// Prints result and bill; exit 1 unless the task is done.
async fn finish(screen: Screen, end: &End, sarif: Option<&Path>, client: Client) -> Outcome {
    client.close().await;
    if let Some(path) = sarif {
        let log = serde_json::to_vec_pretty(&atp_canonicalizer::to_sarif(
            &end.final_.result.findings,
            env!("CARGO_PKG_VERSION"),
        ))?;
        std::fs::write(path, log).map_err(|e| Failure::new(Exit::Task, format!("--sarif: {}: {e}", path.display())))?;
    }
    if screen.json {
        screen.document(&document(end))?;
    } else {
        screen.line(&summary(screen, end))?;
    }
    if end.final_.state == TaskState::Done { Ok(()) } else { Err(Failure::silent(Exit::Task)) }
}

/// `submit`'s object.
fn document(end: &End) -> Value {
    let mut value = json!({"stream_id": end.stream_id, "state": end.final_.state, "result": end.final_.result,
        "consensus": end.final_.consensus, "bill": end.bill});
    if let Some(error) = &end.final_.error {
        value["error"] = json!(error);
    }
    value
}

/// State, findings and bill, for people. The texts were shown as they came.
pub(crate) fn summary(screen: Screen, end: &End) -> String {
    let state = end.final_.state;
    let mut text = format!("\n{}", screen.paint(rows::state_paint(state), state.as_str()));
    if let Some(error) = &end.final_.error {
        text.push_str(&format!(": {}", crate::screen::escape(&connect::refusal(error))));
    }
    text.push('\n');
    let findings = &end.final_.result.findings;
    if !findings.is_empty() {
        text.push_str(&format!("\n{} findings\n", screen.paint(Paint::Bold, &findings.len().to_string())));
        text.push_str(&finding::render(screen, findings));
    }
    for doubt in &end.final_.consensus.uncertainties {
        text.push_str(&format!("({})\n", crate::screen::escape(doubt)));
    }
    if end.final_.result.truncated {
        text.push_str("(a text was longer than the result keeps; the stream had all of it)\n");
    }
    text.push_str(&format!("\nbill of {}\n{}", end.stream_id, rows::bill(screen, &end.bill)));
    text.trim_end().to_owned()
}

fn refused(screen: Screen, request: &SubmitRequest, error: &Error) -> Outcome {
    if let (true, Some(wire)) = (screen.json, error.wire()) {
        screen.document(&refusal_document(request, wire))?;
    }
    Err(connect::failure(error))
}

/// `submit`'s object when there is no stream to show.
fn refusal_document(request: &SubmitRequest, error: &WireError) -> Value {
    let stream = request.idempotency_key.as_ref().map(|key| stream_of_key(key, request.try_number));
    json!({"stream_id": stream, "state": TaskState::Refused, "result": Value::Null, "consensus": Value::Null,
        "bill": Value::Null, "error": error})
}

fn request(args: &cli::Submit) -> Result<SubmitRequest, Failure> {
    let task = match (&args.text, &args.file) {
        (Some(text), _) if text == "-" => read_stdin()?,
        (Some(text), _) => text.clone(),
        (None, Some(file)) => read_text("--file", file)?,
        (None, None) => return Err(Failure::usage("TEXT: give a task, --file F, or - for stdin")),
    };
    if task.trim().is_empty() {
        return Err(Failure::usage("TEXT: the task is empty; say what is to be done"));
    }
    if let Some(agent) = args.agents.iter().find(|a| !atp_proto::id::is_id(a)) {
        return Err(Failure::usage(format!("--agents: `{agent}` is not a handle; write 1 to 64 of A-Za-z0-9._-")));
    }
    let inputs = args.inputs.iter().map(|path| input(path)).collect::<Result<Vec<_>, _>>()?;
    let bytes = inputs.iter().fold(task.len(), |sum, input| sum.saturating_add(input.text.len()));
    if bytes > MESSAGE_BYTES_MAX {
        return Err(Failure::usage(format!(
            "--input: task and inputs are {bytes} bytes, more than a message of {MESSAGE_BYTES_MAX}; leave some out"
        )));
    }
    let mut request = SubmitRequest::of(Submit {
        task,
        inputs,
        budget: Limit { tokens: args.budget_tokens.map(Tokens), usd_micros: args.budget_usd },
        agents: args.agents.iter().map(|a| AgentName::new(a)).collect(),
        fanout: args.fanout,
        strategy: args.strategy.clone(),
        deadline_ms: args.deadline,
        wait: !args.no_wait,
    })
    .qos(args.qos)
    .task_type(args.task_type.clone().unwrap_or_default())
    .tools(args.tools.clone());
    request.idempotency_key.clone_from(&args.key);
    // A fault of the key shows before anything is sent.
    request.resolve_stream_id().map_err(|e| connect::failure(&e))?;
    Ok(request)
}

/// A refusal stays with its stream id, so work that was refused goes out under the key's next one.
async fn next_try(global: &Global, key: &str) -> Result<u32, Failure> {
    let Ok(api) = Api::new(global) else { return Ok(1) };
    let mut number = 1;
    while number < 10_000 && api.state(stream_of_key(key, number).as_str()).await? == Some(TaskState::Refused) {
        number += 1;
    }
    Ok(number)
}

pub(crate) fn input(path: &Path) -> Result<InputText, Failure> {
    let text = read_text("--input", path)?;
    Ok(InputText { name: path.display().to_string(), content_type: content_type(path).into(), text })
}

/// What a file's ending says of its content.
pub(crate) fn content_type(path: &Path) -> &'static str {
    match path.extension().and_then(|e| e.to_str()).unwrap_or_default() {
        "rs" => "text/x-rust",
        "py" => "text/x-python",
        "md" => "text/markdown",
        "diff" | "patch" => "text/x-diff",
        "json" => "application/json",
        "toml" => "application/toml",
        "yaml" | "yml" => "application/yaml",
        _ => "text/plain",
    }
}

pub(crate) fn read_text(flag: &str, path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::metadata(path).map(|m| m.len());
    let wrong = |e: std::io::Error| Failure::usage(format!("{flag}: {}: {e}", path.display()));
    if bytes.map_err(wrong)? > MESSAGE_BYTES_MAX as u64 {
        return Err(Failure::usage(format!("{flag}: {} is larger than {MESSAGE_BYTES_MAX} bytes", path.display())));
    }
    std::fs::read_to_string(path).map_err(wrong)
}

fn read_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    let limit = MESSAGE_BYTES_MAX as u64 + 1;
    let read = std::io::stdin().lock().take(limit).read_to_string(&mut text);
    read.map_err(|e| Failure::usage(format!("TEXT: stdin: {e}")))?;
    if text.len() > MESSAGE_BYTES_MAX {
        return Err(Failure::usage(format!("TEXT: stdin has more than {MESSAGE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// Ctrl-C or SIGTERM; never, where signals can't be heard.
pub(crate) async fn interrupt() {
    let mut term = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(term) => term,
        Err(_) => return std::future::pending().await,
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn parsed(args: &[&str]) -> Result<SubmitRequest, Failure> {
        let cli = Cli::try_parse_from([&["atp", "submit"], args].concat()).expect("parses");
        match cli.command {
            Command::Submit(args) => request(&args),
            _ => unreachable!("submit"),
        }
    }

    #[test]
    fn flags_become_a_submit() {
        let request =
            parsed(&["do it", "--budget-usd", "0.50", "--fanout", "2", "--no-wait", "--deadline", "5s"]).expect("good");
        assert_eq!(request.submit.budget.usd_micros, Some(atp_proto::UsdMicros(500_000)));
        assert_eq!(
            (request.submit.fanout, request.submit.wait, request.submit.deadline_ms),
            (Some(2), false, Some(5000))
        );
    }

    #[test]
    fn bad_values_name_the_flag() {
        for (args, word) in [
            (vec!["  "], "TEXT"),
            (vec!["x", "--agents", "a,b c"], "--agents"),
            (vec!["--file", "/nonexistent/task"], "--file"),
            (vec!["x", "--input", "/nonexistent/in"], "--input"),
            (vec!["x", "--key", ""], "idempotency_key"),
        ] {
            let failure = parsed(&args).expect_err("refused");
            assert!(failure.exit == Exit::Usage && failure.text.contains(word), "{args:?}: {}", failure.text);
        }
    }
}
