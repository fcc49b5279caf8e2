//! What an adapter is told before it starts: the flags of `atp agent KIND` and the entries of `agents:` in YAML, one
//! type for both. Reads no environment and opens no file.

use atp_proto::content::Effects;
use atp_proto::id::is_id;
use atp_proto::money::parse_usd;
use atp_proto::{AgentName, UsdMicros};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Which adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Openai,
    Anthropic,
    Gemini,
    Ollama,
    Command,
    Scripted,
}

impl Kind {
    pub const ALL: [Self; 6] =
        [Self::Openai, Self::Anthropic, Self::Gemini, Self::Ollama, Self::Command, Self::Scripted];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Anthropic => "anthropic",
            Self::Gemini => "gemini",
            Self::Ollama => "ollama",
            Self::Command => "command",
            Self::Scripted => "scripted",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        let names = Self::ALL.map(Self::as_str).join(", ");
        found.ok_or_else(|| ConfigError::new("kind", format!("`{text}` is unknown"), format!("use one of {names}")))
    }
}

/// What is wrong with a configuration: the field, why, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}; {fix}")]
pub struct ConfigError {
    pub field: String,
    pub message: String,
    pub fix: String,
    /// Line and column, from 1, where a file was read.
    pub place: Option<(u64, u64)>,
}

impl ConfigError {
    #[must_use]
    pub fn new(field: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into(), fix: fix.into(), place: None }
    }
}

/// Prices as people write them: USD per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    pub in_usd_per_mtok: Usd,
    pub out_usd_per_mtok: Usd,
}

/// One agent. What a kind doesn't use is refused by `build`, never ignored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    pub kind: Kind,
    /// The handle; empty: the script's own name (`scripted` only).
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub model: Option<String>,
    /// Without the path of the API: `https://api.openai.com/v1`.
    #[serde(default)]
    pub base_url: Option<String>,
    #[serde(default)]
    pub api_key: Option<Secret>,
    #[serde(default)]
    pub max_parallel: Option<u32>,
    /// None: any task type.
    #[serde(default)]
    pub task_types: Vec<String>,
    #[serde(default)]
    pub prices: Option<Prices>,
    /// Never asks for more output than this.
    #[serde(default)]
    pub output_tokens_max: Option<u64>,
    /// Where `command` runs.
    #[serde(default)]
    pub cwd: Option<PathBuf>,
    /// The program of `command` and its arguments; no shell.
    #[serde(default)]
    pub argv: Vec<String>,
    #[serde(default)]
    pub timeout: Option<Span>,
    #[serde(default)]
    pub output_bytes_max: Option<u64>,
    /// Whether `command` changes something outside; it does unless it is said not to.
    #[serde(default)]
    pub effects: Option<Effects>,
    /// What one run of `command` costs.
    #[serde(default)]
    pub usd_per_run: Option<Usd>,
    /// The script of `scripted`.
    #[serde(default)]
    pub script: Option<PathBuf>,
}

impl AgentConfig {
    /// A configuration of this kind and name in which nothing else is said.
    #[must_use]
    pub fn new(kind: Kind, name: impl Into<String>) -> Self {
        Self {
            kind,
            name: name.into(),
            model: None,
            base_url: None,
            api_key: None,
            max_parallel: None,
            task_types: Vec::new(),
            prices: None,
            output_tokens_max: None,
            cwd: None,
            argv: Vec::new(),
            timeout: None,
            output_bytes_max: None,
            effects: None,
            usd_per_run: None,
            script: None,
        }
    }

    /// The handle, checked.
    ///
    /// # Errors
    /// Names the field and the fix.
    pub fn handle(&self) -> Result<AgentName, ConfigError> {
        if is_id(&self.name) {
            return Ok(AgentName::new(&self.name));
        }
        let message = format!("`{}` is not an agent's handle", self.name);
        Err(ConfigError::new("name", message, "use 1 to 64 of A-Z a-z 0-9 . _ -, like reviewer.gemini"))
    }
}

/// An amount of USD, written as a decimal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Usd(pub UsdMicros);

impl FromStr for Usd {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        parse_usd(text).map(Self)
    }
}

impl<'de> Deserialize<'de> for Usd {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// A key that never shows in a debug print.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A duration as people write it: `500ms`, `30s`, `5m`, `2h`, `7d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let bad = || format!("`{text}` is not a duration like 500ms, 30s, 5m, 2h or 7d");
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
        let (number, unit) = text.split_at(unit_at);
        let unit_ms: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        let number: u64 = number.trim().parse().map_err(|_| bad())?;
        let ms = number.checked_mul(unit_ms).ok_or_else(|| format!("`{text}` is longer than a duration can be"))?;
        Ok(Self(Duration::from_millis(ms)))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let ms = |text: &str| text.parse::<Span>().map(|span| span.0.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("30s"), Ok(30_000));
        assert_eq!(ms("7d"), Ok(604_800_000));
        assert_eq!(ms("0"), Ok(0));
        for bad in ["", "5", "-1s", "1.5s", "1y", "s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_entry_of_the_configuration() {
        let yaml = "kind: openai\nname: reviewer.qwen\nmodel: qwen\nbase_url: http://127.0.0.1:9/v1\n\
                    prices: {in_usd_per_mtok: 0.10, out_usd_per_mtok: 0.40}\ntimeout: 30s\n";
        let config: AgentConfig = serde_saphyr::from_str(yaml).unwrap();
        assert_eq!(config.kind, Kind::Openai);
        assert_eq!(config.prices.unwrap().out_usd_per_mtok, Usd(UsdMicros(400_000)));
        assert_eq!(config.timeout, Some(Span(Duration::from_secs(30))));
        assert!(config.handle().is_ok());
        let error = serde_saphyr::from_str::<AgentConfig>("kind: openai\nmodle: x\n").unwrap_err().to_string();
        assert!(error.contains("modle"), "{error}");
        assert!("opanai".parse::<Kind>().unwrap_err().to_string().contains("openai, anthropic"));
    }

    #[test]
    fn handles_are_bounded() {
        assert!(AgentConfig::new(Kind::Openai, "a".repeat(64)).handle().is_ok());
        assert!(AgentConfig::new(Kind::Openai, "a".repeat(65)).handle().is_err());
        assert!(AgentConfig::new(Kind::Openai, "").handle().is_err());
    }

    #[test]
    fn a_key_never_shows() {
        assert!(!format!("{:?}", Secret("sk-canary".to_owned())).contains("canary"));
    }
}
