//! The content of every payload type: one JSON document each (ATP-3, and the shapes people rely on).
//! Unknown fields are ignored; money and tokens are integers; absent means default.

mod agent;
mod bill;
mod call;
mod estimate;
mod peer;
mod session;
mod task;
mod tool;

pub use agent::*;
pub use bill::*;
pub use call::*;
pub use estimate::*;
pub use peer::*;
pub use session::*;
pub use task::*;
pub use tool::*;

fn is_default<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{Code, WireError};
    use crate::frame::{Flags, Frame};
    use crate::money::Tokens;

    fn read<T: serde::de::DeserializeOwned>(content: &'static str) -> Result<T, WireError> {
        Frame::raw("s", 1, Flags::NONE, "k", bytes::Bytes::from_static(content.as_bytes())).read()
    }

    #[test]
    fn atp_3_3_null_is_absent_and_numbers_may_be_strings() {
        let submit: Submit = read(
            r#"{"task":"t","agents":null,"budget":{"tokens":"5","usd_micros":null},"deadline_ms":"7","wait":null}"#,
        )
        .unwrap();
        assert_eq!((submit.deadline_ms, submit.budget.tokens, submit.wait), (Some(7), Some(Tokens(5)), true));
        assert!(submit.agents.is_empty() && submit.budget.usd_micros.is_none());
    }

    #[test]
    fn atp_3_3_what_is_wrong_is_named() {
        let message = |e: Result<Submit, WireError>| e.map_err(|e| (e.code, e.message)).unwrap_err();
        let (code, text) = message(read(r#"{"task":"t","budget":{"tokens":-1}}"#));
        assert!(code == Code::Proto && text.starts_with("k: budget.tokens: "), "{text}");
        assert!(message(read(r#"{"task":null}"#)).1.starts_with("k: "));
        assert!(message(read("{")).1.starts_with("k: "));
    }

    #[test]
    fn confidence_is_a_decimal_on_the_wire() {
        for ppm in [0, 1, 900_000, 333_333, 1_000_000] {
            let end = AgentFinal { confidence_ppm: Some(ppm), ..AgentFinal::default() };
            let text = serde_json::to_string(&end).unwrap();
            assert!(text.contains("\"confidence\":"), "{text}");
            assert_eq!(serde_json::from_str::<AgentFinal>(&text).unwrap(), end);
        }
        let end: AgentFinal = read(r#"{"confidence_ppm":5,"text":null,"cost":null}"#).unwrap();
        assert_eq!(end.confidence_ppm, Some(5));
        assert!(read::<AgentFinal>(r#"{"confidence":1.5}"#).unwrap_err().message.contains("confidence"));
    }
}
