//! The native protocol as commands use it: where the router is, one client connection, errors as exit codes.

use crate::api::Api;
use crate::cli::Global;
use crate::failure::{Exit, Failure};
use atp_proto::WireError;
use atp_proto::code::Code;
use atp_sdk::{Backoff, Client, ClientOptions, Dialer, Endpoint, Error, parse_url};
use std::sync::Arc;
use std::time::Duration;

/// How long a command waits for a router that has gone, before it gives up with exit 3.
const GIVE_UP: Duration = Duration::from_secs(60);

/// A dialer for each URL in turn: for its own address under `atp://`, else for what the router at the `http://` URL names
/// whenever it is dialled.
///
/// # Errors
/// Usage: a URL of another form.
pub(crate) fn dialer(global: &Global) -> Result<Dialer, Failure> {
    let mut each = Vec::new();
    for url in &global.url {
        match parse_url(url).map_err(|e| Failure::usage(format!("--{e}")))? {
            Endpoint::Atp(address) => each.push(Dialer::tcp(address)),
            Endpoint::Http(_) => {
                let api = Arc::new(Api::new(&Global { url: vec![url.clone()], ..global.clone() })?);
                let dialer = Dialer::new(move || {
                    let api = api.clone();
                    async move { native(&api).await?.dial().await }
                });
                each.push(dialer.named(url));
            }
        }
    }
    Ok(Dialer::any(each))
}

async fn native(api: &Api) -> std::io::Result<Dialer> {
    let named = api.native().await.map_err(|failure| std::io::Error::other(failure.text))?;
    let url = if named.contains("://") { named } else { format!("atp://{named}") };
    match parse_url(&url) {
        Ok(Endpoint::Atp(address)) => Ok(Dialer::tcp(address)),
        _ => Err(std::io::Error::other(format!("the router names `{url}` as its native address"))),
    }
}

pub(crate) async fn client(global: &Global) -> Result<Client, Failure> {
    let reconnect = Backoff { give_up: Some(GIVE_UP), ..Backoff::default() };
    let options = ClientOptions { token: global.token.clone(), reconnect, ..ClientOptions::default() };
    Client::connect(dialer(global)?, options).await.map_err(|e| failure(&e))
}

/// What the SDK says, as an exit code and a sentence.
pub(crate) fn failure(error: &Error) -> Failure {
    match error {
        Error::Refused(wire) => Failure::new(exit_of(wire), refusal(wire)),
        Error::Auth(wire) => Failure::new(Exit::Unauthorised, refusal(wire)),
        Error::Unreachable(_) => Failure::new(Exit::Unreachable, error),
        Error::Request(_) => Failure::new(Exit::Usage, error),
        Error::Protocol(_) | Error::Closed => Failure::new(Exit::Task, error),
    }
}

pub(crate) const fn exit_of(error: &WireError) -> Exit {
    match error.code {
        Code::Auth | Code::Sec => Exit::Unauthorised,
        _ => Exit::Task,
    }
}

/// Code, scope, figures and when to come again: `EBUDGET (tenant:acme, 5 of 5 used): ...; retry after 100 ms`.
pub(crate) fn refusal(error: &WireError) -> String {
    let mut facts: Vec<String> = error.scope.iter().cloned().collect();
    match (error.used, error.limit) {
        (Some(used), Some(limit)) => facts.push(format!("{used} of {limit} used")),
        (None, Some(limit)) => facts.push(format!("limit {limit}")),
        _ => {}
    }
    let facts = if facts.is_empty() { String::new() } else { format!(" ({})", facts.join(", ")) };
    let after = error.retry_after_ms.map(|ms| format!("; retry after {ms} ms")).unwrap_or_default();
    let reset = error.reset_at.as_ref().map(|at| format!("; resets at {at}")).unwrap_or_default();
    format!("{}{facts}: {}{after}{reset}", error.code, error.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_code_scope_figures_and_when() {
        let error = WireError::new(Code::Budget, "spent").scope("tenant:acme").used(5, 6).retry_after_ms(100);
        assert_eq!(refusal(&error), "EBUDGET (tenant:acme, 5 of 6 used): spent; retry after 100 ms");
        assert_eq!(failure(&Error::Refused(error)).exit, Exit::Task);
        assert_eq!(failure(&Error::Auth(WireError::new(Code::Auth, "no"))).exit, Exit::Unauthorised);
        assert_eq!(failure(&Error::Unreachable("x".into())).exit, Exit::Unreachable);
    }
}
