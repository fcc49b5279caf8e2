//! Contents of estimates: what an agent says that a call will cost, in its capabilities or asked about one task (ATP-7).

use super::InputText;
use crate::id::CallId;
use crate::json::Ppm;
use crate::money::{Tokens, UsdMicros, parse_scaled};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// The figures of an estimate, as declared in capabilities or answered to `agent.estimate` (`agent.estimate.result`). Also
/// read: `usd`, `p95_usd`, `variance.usd`, `confidence` as decimals; the integer counts where both stand.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "FiguresIn")]
pub struct EstimateFigures {
    pub in_tokens: Tokens,
    pub out_tokens: Tokens,
    /// Absent: priced by the model's price from the tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_micros: Option<UsdMicros>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p95_tokens: Option<Tokens>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p95_usd_micros: Option<UsdMicros>,
    /// tokens squared, micro-USD squared.
    pub variance: Variance,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence_ppm: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "VarianceIn")]
pub struct Variance {
    pub tokens: u64,
    pub usd_micros: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EstimateMode {
    Preflight,
    #[default]
    Declared,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "FiguresIn")]
pub struct EstimateDeclaration {
    pub mode: EstimateMode,
    #[serde(flatten)]
    pub figures: EstimateFigures,
}

/// `SYN agent.estimate`, router to agent, on a stream of its own (`<call_id>.e`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EstimateRequest {
    /// The call that it is about, should it come to be.
    pub call_id: CallId,
    #[serde(default)]
    pub task: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<InputText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub task_type: String,
}

/// The id of the stream on which an agent is asked what call `call` would cost.
#[must_use]
pub fn estimate_stream(call: CallId) -> String {
    format!("{call}.e")
}

/// The call that a preflight's stream is about.
#[must_use]
pub fn estimated_call(stream: &str) -> Option<CallId> {
    CallId::parse(stream.strip_suffix(".e")?)
}

/// A decimal of JSON, times 10^`SCALE`.
struct Scaled<const SCALE: u32>(u64);

impl<'de, const SCALE: u32> Deserialize<'de> for Scaled<SCALE> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(d)?;
        let raw = raw.get();
        let text = raw.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(raw);
        parse_scaled(text, SCALE).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct FiguresIn {
    mode: Option<EstimateMode>,
    in_tokens: Option<Tokens>,
    out_tokens: Option<Tokens>,
    usd_micros: Option<UsdMicros>,
    usd: Option<Scaled<6>>,
    p95_tokens: Option<Tokens>,
    p95_usd_micros: Option<UsdMicros>,
    p95_usd: Option<Scaled<6>>,
    variance: Option<Variance>,
    confidence: Option<Ppm>,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    confidence_ppm: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct VarianceIn {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    tokens: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    usd_micros: Option<u64>,
    /// USD squared.
    usd: Option<Scaled<12>>,
}

impl From<VarianceIn> for Variance {
    fn from(v: VarianceIn) -> Self {
        let usd_micros = v.usd_micros.or(v.usd.map(|usd| usd.0)).unwrap_or(0);
        Self { tokens: v.tokens, usd_micros }
    }
}

impl From<FiguresIn> for EstimateFigures {
    fn from(v: FiguresIn) -> Self {
        let usd = |micros: Option<UsdMicros>, usd: Option<Scaled<6>>| micros.or(usd.map(|usd| UsdMicros(usd.0)));
        Self {
            in_tokens: v.in_tokens.unwrap_or_default(),
            out_tokens: v.out_tokens.unwrap_or_default(),
            usd_micros: usd(v.usd_micros, v.usd),
            p95_tokens: v.p95_tokens,
            p95_usd_micros: usd(v.p95_usd_micros, v.p95_usd),
            variance: v.variance.unwrap_or_default(),
            confidence_ppm: v.confidence_ppm.or(v.confidence.map(|ratio| ratio.0)),
        }
    }
}

impl From<FiguresIn> for EstimateDeclaration {
    fn from(v: FiguresIn) -> Self {
        Self { mode: v.mode.unwrap_or_default(), figures: v.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Flags, Frame, kind};

    fn read(content: &'static str) -> Result<EstimateFigures, String> {
        let content = bytes::Bytes::from_static(content.as_bytes());
        Frame::raw("c.e", 1, Flags::FIN, kind::ESTIMATE_RESULT, content).read().map_err(|e| e.message.to_string())
    }

    #[test]
    fn atp_7_1_dollars_may_be_decimals() {
        let figures = read(
            r#"{"in_tokens":"100","out_tokens":500,"usd":0.10,"p95_usd":"0.2","variance":{"tokens":250000,"usd":4e-4},"confidence":0.9}"#,
        );
        let exact = EstimateFigures {
            in_tokens: Tokens(100),
            out_tokens: Tokens(500),
            usd_micros: Some(UsdMicros(100_000)),
            p95_usd_micros: Some(UsdMicros(200_000)),
            variance: Variance { tokens: 250_000, usd_micros: 400_000_000 },
            confidence_ppm: Some(900_000),
            ..EstimateFigures::default()
        };
        assert_eq!(figures, Ok(exact.clone()));
        let text = serde_json::to_string(&exact).unwrap();
        assert_eq!(serde_json::from_str::<EstimateFigures>(&text).unwrap(), exact);
        let both = read(r#"{"usd_micros":7,"usd":1.0,"usd_extra":null,"p95_tokens":null}"#).unwrap();
        assert_eq!((both.usd_micros, both.p95_tokens), (Some(UsdMicros(7)), None));
        let declared: EstimateDeclaration = serde_json::from_str(r#"{"mode":"preflight","usd":0.5}"#).unwrap();
        assert_eq!((declared.mode, declared.figures.usd_micros), (EstimateMode::Preflight, Some(UsdMicros(500_000))));
        let text = serde_json::to_string(&declared).unwrap();
        assert_eq!(serde_json::from_str::<EstimateDeclaration>(&text).unwrap(), declared);
    }

    #[test]
    fn atp_7_2_what_is_no_figure_fails() {
        for (text, field) in [
            (r#"{"usd":NaN}"#, "usd"),
            (r#"{"usd":"NaN"}"#, "usd"),
            (r#"{"usd":-0.5}"#, "usd"),
            (r#"{"usd":"inf"}"#, "usd"),
            (r#"{"p95_usd":1e99}"#, "p95_usd"),
            (r#"{"in_tokens":-1}"#, "in_tokens"),
            (r#"{"out_tokens":1.5}"#, "out_tokens"),
            (r#"{"variance":{"usd":-1}}"#, "variance.usd"),
            (r#"{"variance":{"tokens":-1}}"#, "variance.tokens"),
        ] {
            let message = read(text).unwrap_err();
            assert!(message.contains(field), "{text}: {message}");
        }
    }

    #[test]
    fn a_preflight_has_a_stream_of_its_own() {
        let call = CallId([7; 10]);
        assert_eq!(estimated_call(&estimate_stream(call)), Some(call));
        assert_eq!(estimated_call(&call.to_string()), None);
    }
}
