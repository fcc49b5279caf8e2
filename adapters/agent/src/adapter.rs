//! From one configuration to one adapter. A field that a kind doesn't use is refused, so that no setting is lost in
//! silence.

use crate::command::{self, CommandConfig};
use crate::config::{AgentConfig, ConfigError, Kind};
use crate::llm::{ConfigProblem, Llm, LlmConfig, Prices};
use crate::{anthropic, gemini, ollama, openai, scripted};
use atp_proto::content::Capabilities;
use atp_sdk::Handler;
use std::sync::Arc;

/// What `serve` needs for this agent.
///
/// # Errors
/// Names the field and the fix.
pub fn build(config: AgentConfig) -> Result<(Capabilities, Arc<dyn Handler>), ConfigError> {
    refuse_unused(&config)?;
    if config.max_parallel == Some(0) {
        return Err(ConfigError::new("max_parallel", "is 0", "allow at least one call at a time"));
    }
    let (mut capabilities, handler) = match config.kind {
        Kind::Scripted => scripted::build(&config)?,
        Kind::Command => program(&config)?,
        Kind::Openai => model(&config, openai::handler)?,
        Kind::Anthropic => model(&config, anthropic::handler)?,
        Kind::Gemini => model(&config, gemini::handler)?,
        Kind::Ollama => model(&config, ollama::handler)?,
    };
    // Only Linux says it in a file; elsewhere the host stays unnamed.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    host.trim().clone_into(&mut capabilities.host);
    Ok((capabilities, handler))
}

fn named(config: &AgentConfig) -> Result<Capabilities, ConfigError> {
    Ok(Capabilities {
        agent: config.handle()?,
        skills: config.task_types.clone(),
        max_parallel: config.max_parallel.unwrap_or(1),
        ..Capabilities::default()
    })
}

type Make = fn(LlmConfig) -> Result<Llm, ConfigProblem>;

fn model(config: &AgentConfig, make: Make) -> Result<(Capabilities, Arc<dyn Handler>), ConfigError> {
    let mut capabilities = named(config)?;
    let mut llm = LlmConfig::new(config.model.clone().unwrap_or_default());
    llm.base_url.clone_from(&config.base_url);
    llm.api_key = config.api_key.as_ref().map(|key| key.0.clone());
    llm.output_tokens_max = config.output_tokens_max;
    llm.prices = config.prices.map(|p| Prices {
        in_usd_micros_per_mtok: p.in_usd_per_mtok.0.0,
        out_usd_micros_per_mtok: p.out_usd_per_mtok.0.0,
    });
    let handler = make(llm).map_err(of_problem)?;
    handler.describe(&mut capabilities);
    Ok((capabilities, Arc::new(handler)))
}

fn program(config: &AgentConfig) -> Result<(Capabilities, Arc<dyn Handler>), ConfigError> {
    let mut capabilities = named(config)?;
    let cwd = config.cwd.clone().unwrap_or_else(|| ".".into());
    let mut command = CommandConfig::new(config.argv.clone(), cwd);
    if let Some(timeout) = config.timeout {
        command.timeout = timeout.0;
    }
    if let Some(n) = config.output_bytes_max {
        command.output_bytes_max = usize::try_from(n).unwrap_or(usize::MAX);
    }
    if let Some(effects) = config.effects {
        command.effects = effects;
    }
    command.usd_micros_per_run = config.usd_per_run.unwrap_or_default().0.0;
    let handler = command::handler(command).map_err(of_problem)?;
    handler.describe(&mut capabilities);
    Ok((capabilities, Arc::new(handler)))
}

/// The adapters say what is wrong and what would be right in one sentence, apart by a semicolon.
fn of_problem(problem: ConfigProblem) -> ConfigError {
    let text = problem.problem;
    let (message, fix) = text.split_once("; ").unwrap_or((&text, "correct it"));
    ConfigError::new(problem.field, message, fix)
}

fn refuse_unused(config: &AgentConfig) -> Result<(), ConfigError> {
    use Kind::{Command, Scripted};
    let llm = !matches!(config.kind, Command | Scripted);
    let (command, scripted) = (config.kind == Command, config.kind == Scripted);
    for (field, given, used) in [
        ("model", config.model.is_some(), llm),
        ("base_url", config.base_url.is_some(), llm),
        ("api_key", config.api_key.is_some(), llm),
        ("prices", config.prices.is_some(), llm),
        ("output_tokens_max", config.output_tokens_max.is_some(), llm),
        ("task_types", !config.task_types.is_empty(), !scripted),
        ("cwd", config.cwd.is_some(), command),
        ("argv", !config.argv.is_empty(), command),
        ("timeout", config.timeout.is_some(), command),
        ("output_bytes_max", config.output_bytes_max.is_some(), command),
        ("effects", config.effects.is_some(), command),
        ("usd_per_run", config.usd_per_run.is_some(), command),
        ("script", config.script.is_some(), scripted),
    ] {
        if given && !used {
            let message = format!("means nothing to kind `{}`", config.kind);
            return Err(ConfigError::new(field, message, "leave it out"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn field(config: AgentConfig) -> String {
        build(config).map(|_| ()).unwrap_err().field
    }

    #[test]
    fn every_kind_is_built_from_its_own_fields() {
        for kind in [Kind::Openai, Kind::Anthropic, Kind::Gemini, Kind::Ollama] {
            let base_url = Some("http://127.0.0.1:9/v1".to_owned());
            let config = AgentConfig { model: Some("m".into()), base_url, ..AgentConfig::new(kind, "a") };
            let (capabilities, _) = build(AgentConfig { task_types: vec!["t".into()], ..config }).unwrap();
            assert_eq!((capabilities.adapter.as_str(), capabilities.models[0].id.as_str()), (kind.as_str(), "m"));
            assert_eq!((capabilities.max_parallel, capabilities.skills), (1, vec!["t".to_owned()]));
        }
        let config = AgentConfig { argv: vec!["true".into()], ..AgentConfig::new(Kind::Command, "a") };
        assert_eq!(build(config).unwrap().0.adapter, "command");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let new = AgentConfig::new;
        assert_eq!(field(new(Kind::Openai, "a b")), "name");
        assert_eq!(field(new(Kind::Openai, "a")), "model");
        assert_eq!(field(new(Kind::Command, "a")), "argv");
        assert_eq!(field(new(Kind::Scripted, "")), "script");
        assert_eq!(field(AgentConfig { argv: vec!["x".into()], ..new(Kind::Gemini, "a") }), "argv");
        assert_eq!(field(AgentConfig { model: Some("m".into()), ..new(Kind::Command, "a") }), "model");
        assert_eq!(field(AgentConfig { max_parallel: Some(0), ..new(Kind::Openai, "a") }), "max_parallel");
        let script = Some(PathBuf::from("no-such-script.yaml"));
        let error = build(AgentConfig { script, ..new(Kind::Scripted, "") }).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("no-such-script.yaml") && error.contains("--script FILE"), "{error}");
    }
}
