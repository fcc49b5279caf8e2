//! `atp check FILE`: validates a configuration offline. Starts nothing.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::{Paint, Screen, escape};
use serde_json::json;

pub(crate) fn run(screen: Screen, args: &cli::Check) -> Outcome {
    let text = std::fs::read_to_string(&args.file)
        .map_err(|e| Failure::usage(format!("FILE: {}: {e}", args.file.display())))?;
    let problems = atp_router::config::check(&text);
    let file = args.file.display().to_string();
    if screen.json {
        screen.document(&json!({"file": file, "ok": problems.is_empty(), "problems": problems}))?;
    } else if problems.is_empty() {
        screen.line(&format!("{}: {}", escape(&file), screen.paint(Paint::Green, "good")))?;
    } else {
        screen.line(&escape(&crate::router::listed(&args.file, &problems)))?;
    }
    if problems.is_empty() { Ok(()) } else { Err(Failure::silent(Exit::Difference)) }
}
