//! `atp-ready`, the health check of containers, asked of a real router.

use crate::root;
use atp_tests::blackbox::process::Router;
use std::process::{Command, Output};

fn ask(port: u16) -> Output {
    Command::new(root().join("ops/docker/atp-ready")).arg(port.to_string()).output().expect("bash")
}

#[test]
fn a_router_that_serves_is_ready_and_one_that_is_gone_is_not() {
    let mut router = Router::start("");
    let port = router.http_addr().port();
    let said = ask(port);
    assert!(said.status.success(), "{said:?}");
    router.kill();
    assert!(!ask(port).status.success());
}
