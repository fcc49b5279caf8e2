//! Who a connection is: tenant and scopes out of a credential. Never reads a frame's own claims about its tenant.

use atp_proto::{Code, TenantId, WireError};

/// Who may come without a credential.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Anonymous {
    Never,
    /// A loopback peer is tenant `default` with scopes submit, agent, observe and control.
    #[default]
    Loopback,
}

/// The tenant of anonymous peers.
pub const DEFAULT_TENANT: &str = "default";

/// Decides who a peer is. `loopback` is true for loopback addresses and in-memory connections.
///
/// # Errors
/// EAUTH: the credential is unknown, or one is needed.
pub(crate) fn identify(anonymous: Anonymous, loopback: bool, token: Option<&str>) -> Result<TenantId, WireError> {
    let token = token.map(str::trim).filter(|t| !t.is_empty());
    let refuse = |message: &str| Err(WireError::new(Code::Auth, message));
    match token {
        Some(token) if token.starts_with("atp_") => refuse(
            "token: this atp_ token is unknown, expired or revoked (this version keeps no tokens; leave it out on loopback)",
        ),
        Some(token) if is_jwt(token) => {
            refuse("token: this router has no auth.oidc to check a JWT with; leave it out on loopback")
        }
        // Client packages insist on sending something: any other text is no credential.
        _ if anonymous == Anonymous::Loopback && loopback => Ok(TenantId::new(DEFAULT_TENANT)),
        _ => refuse("token: a credential is needed from this address; only loopback peers may come without one"),
    }
}

/// Three base64url parts whose first one is a JSON object.
fn is_jwt(token: &str) -> bool {
    let parts: Vec<&str> = token.split('.').collect();
    parts.len() == 3
        && parts[0].starts_with("eyJ")
        && parts.iter().all(|p| p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_the_default_tenant() {
        for token in [None, Some(""), Some("sk-whatever")] {
            assert_eq!(identify(Anonymous::Loopback, true, token).unwrap().as_str(), "default");
        }
    }

    #[test]
    fn others_need_a_credential() {
        let code = |a, l, t| identify(a, l, t).unwrap_err().code;
        assert_eq!(code(Anonymous::Loopback, true, Some("atp_x")), Code::Auth);
        assert_eq!(code(Anonymous::Loopback, true, Some("eyJhbGciOi.eyJzdWIi.c2ln")), Code::Auth);
        assert_eq!(code(Anonymous::Loopback, false, None), Code::Auth);
        assert_eq!(code(Anonymous::Never, true, None), Code::Auth);
    }
}
