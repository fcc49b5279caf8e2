//! What peers may say at all: the payload types of this version, and what an agent's capabilities may hold.

use atp_proto::WireError;
use atp_proto::content::Capabilities;
use atp_proto::frame::kind;
use atp_proto::id::is_id;

/// The payload types that this version knows; others are ignored and counted.
pub(super) fn is_known(text: &str) -> bool {
    matches!(
        text,
        kind::TASK_SUBMIT
            | kind::TASK_ANSWER
            | kind::TASK_CANCEL
            | kind::RESULT_PARTIAL
            | kind::RESULT_PROVISIONAL
            | kind::RESULT_FINAL
            | kind::AGENT_LOG
            | kind::ESTIMATE
            | kind::ESTIMATE_RESULT
            | kind::DISPATCH
            | kind::AGENT_CANCEL
            | kind::TOOL_REQUEST
            | kind::TOOL_RESULT
            | kind::HELLO
            | kind::REDIRECT
            | kind::CAPABILITIES
            | kind::ACCEPTED
            | kind::RESUME
            | kind::BILL
            | kind::STATUS
            | kind::WINDOW_UPDATE
            | kind::BUDGET_UPDATE
            | kind::ACK
            | kind::ERROR
    )
}

/// What the registry needs of capabilities; the rest is judged by the `Agent`.
pub(super) fn check_capabilities(c: &Capabilities) -> Result<(), WireError> {
    let bad = |field: &str, why: &str| Err(WireError::proto(format!("control.capabilities: {field}: {why}")));
    if !is_id(c.agent.as_str()) {
        return bad("agent", "a handle is 1 to 64 of A-Za-z0-9._-");
    }
    if !(1..=64).contains(&c.incarnation.len()) {
        return bad("incarnation", "random text of 1 to 64 bytes, new per start of the agent's process");
    }
    if c.host.len() > 255 || c.adapter.len() > 64 {
        return bad("host, adapter", "at most 255 and 64 bytes");
    }
    if c.models.len() > 256 || c.skills.len() > 256 || c.tools.len() > 256 || c.raw_apis.len() > 16 {
        return bad("models, skills, tools, raw_apis", "at most 256, 256, 256 and 16 entries");
    }
    if c.models.iter().any(|m| m.id.len() > 128 || m.id.is_empty()) {
        return bad("models[].id", "1 to 128 bytes");
    }
    if [&c.tool_permissions, &c.security_groups].iter().any(|l| l.len() > 256) {
        return bad("tool_permissions, security_groups", "at most 256 entries each");
    }
    if [&c.tools, &c.tool_permissions].into_iter().flatten().any(|t| !is_id(t)) {
        return bad("tools[], tool_permissions[]", "1 to 64 of A-Za-z0-9._-");
    }
    if c.calls.len() > 4096 {
        return bad("calls", "at most 4096 entries");
    }
    Ok(())
}
