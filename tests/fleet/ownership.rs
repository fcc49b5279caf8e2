//! Who owns which shard: commands and pages say the same as the log does, whatever happens to routers.

use crate::fleet::{Fleet, pauses};
use atp_proto::content::{Hello, Redirect, Role};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame};
use atp_tests::blackbox::peer::Peer;
use atp_tests::blackbox::process::Asked;
use atp_tests::blackbox::{PATIENCE, atp, wait_for};
use serde_json::{Value, json};
use std::time::Duration;

/// Whether a router owns as many.
fn has(fleet: &Fleet, router: usize, shards: usize) -> bool {
    fleet.owned(router).len() == shards
}

fn shown(pauses: &[Duration]) -> String {
    let at = |percent: usize| pauses[(pauses.len() - 1) * percent / 100].as_millis();
    format!("p50 {} ms, max {} ms", at(50), at(100))
}

#[test]
fn a_router_that_joins_gets_its_part_and_one_that_is_drained_gives_it_up() {
    let mut fleet = Fleet::start(1, 64, 1);
    assert_eq!(fleet.shared_by(&[0])[&0], 64, "one alone has all");
    fleet.launch(1);
    let part = fleet.part_of(1, &[0, 1]).len();
    let joined = pauses(&fleet, &[0, 1], || has(&fleet, 1, part));
    let shared = fleet.each_has_its_part(&[0, 1]);
    println!("joined: {shared:?}; without an owner: {}", shown(&joined));

    let url = fleet.routers[0].url();
    wait_for("a standby for every shard that has read all", || {
        let shards = atp::run_json(&["--url", &url, "shards"]);
        let rows = shards["shards"].as_array()?.clone();
        let whole = |row: &Value| {
            let standby = if row["owner"] == "r1" { "r2" } else { "r1" };
            let owned = row["epoch"].as_u64() > Some(0) && row["since"].is_string();
            owned && row["standby"] == standby && row["lag"] == 0
        };
        rows.iter().all(whole).then_some(())
    });

    // Told to the one, done by the other.
    let row = atp::run_json(&["--url", &url, "drain", "router", "r2"]);
    assert_eq!((&row["id"], &row["drained"]), (&"r2".into(), &true.into()), "{row}");
    let drained = pauses(&fleet, &[0, 1], || has(&fleet, 0, 64));
    println!("drained; without an owner: {}", shown(&drained));
    assert!(fleet.routers[1].is_ready(), "it serves by the other's shards");
    let mut client = Peer::dial(fleet.routers[1].atp()).expect("a router");
    let hello = Hello { minor_max: 1, role: Role::Client, token: None, redirect: true };
    client.send(&Frame::json("", 0, Flags::SYN, kind::HELLO, &hello));
    let sent: Redirect = client.expect(kind::REDIRECT).read().expect("a redirect");
    assert_eq!(sent.url, format!("atp://{}", fleet.wires[0].address()), "a new client goes where the shards are");
    let row = atp::run_json(&["--url", &fleet.routers[1].url(), "drain", "router", "r2", "--undo"]);
    assert_eq!(row["drained"], false, "{row}");
    assert_eq!(fleet.each_has_its_part(&[0, 1]), shared, "the same part as before");
    let unknown = fleet.routers[0].http("POST", "/v1/routers/r9/drain");
    assert_eq!(unknown.0, 404, "{unknown:?}");

    // The last one gives what it has to nobody, and the next takes it at once.
    fleet.routers[1].stop();
    assert_eq!(fleet.shared_by(&[0])[&0], 64);
    fleet.routers[0].stop();
    fleet.launch(2);
    assert_eq!(fleet.shared_by(&[2])[&2], 64);
    let log = fleet.routers[2].log();
    let verified = atp::run_json(&["verify", "--log", &log]);
    assert_eq!(verified["ok"], true, "{verified:#}");
}

#[test]
fn a_router_that_stood_still_past_its_lease_claims_nothing_that_others_took() {
    let fleet = Fleet::start(1, 64, 2);
    let former = fleet.each_has_its_part(&[0, 1])[&0];
    fleet.routers[0].signal("STOP");
    assert_eq!(fleet.shared_by(&[1])[&1], 64);
    // It reads these before anything else when it goes on.
    let first = fleet.routers[0].http_addr();
    let ask = |path: &str| Asked::at(first, "GET", path, PATIENCE).expect("it listens");
    let (ready, shards) = (ask("/readyz"), ask("/v1/shards"));
    let told = |asked: Asked| -> (u16, Value) {
        let (status, body) = asked.text().expect("it answers");
        (status, serde_json::from_str(&body).expect("a document"))
    };
    fleet.routers[0].signal("CONT");
    let ((status, ready), (_, shards)) = (told(ready), told(shards));
    assert_eq!((status, &ready["shards"]["owned"]), (503, &json!([])), "{ready}");
    let rows = shards["shards"].as_array().expect("rows");
    assert_eq!(rows.len(), 64);
    assert!(rows.iter().all(|row| row["owner"] != "r1"), "{shards}");
    let finds_out = || fleet.routers[0].stderr().matches("owned here no longer").count() == former;
    wait_for("it to find out of each", || {
        let owned = fleet.owned(0);
        // Asked first: what is found out of the last one is told before it gets one back.
        if finds_out() {
            return Some(());
        }
        assert!(owned.is_empty(), "{owned:?}");
        None
    });
    assert_eq!(fleet.each_has_its_part(&[0, 1])[&0], former);
}

#[test]
fn redis_away_stops_no_shard_and_moves_none() {
    let mut fleet = Fleet::start(1, 8, 2);
    let before = fleet.each_has_its_part(&[0, 1]);
    fleet.redis.kill();
    let store = |n: usize| fleet.routers[n].http("GET", "/readyz").1["store"].clone();
    wait_for("both to notice", || {
        let away = |n| store(n).as_str().is_some_and(|said: &str| said.contains("away"));
        (away(0) && away(1)).then_some(())
    });
    assert_eq!(fleet.shared_by(&[0, 1]), before);
    assert!(fleet.routers[0].is_ready() && fleet.routers[1].is_ready());
    let told = fleet.routers[0].http("POST", "/v1/routers/r2/drain");
    assert_eq!((told.0, &told.1["code"]), (503, &Value::from("EDRAINING")), "{told:?}");
    fleet.redis.restart();
    wait_for("the store to be back", || (store(0) == "ok" && store(1) == "ok").then_some(()));
    assert_eq!(fleet.shared_by(&[0, 1]), before, "nobody took what had an owner");
    fleet.routers[0].kill();
    assert_eq!(fleet.shared_by(&[1])[&1], 8, "leases work as before");
}

#[test]
fn a_second_router_of_the_same_id_is_refused_and_a_new_run_of_a_killed_one_is_not() {
    let mut fleet = Fleet::start(1, 8, 1);
    assert_eq!(fleet.shared_by(&[0])[&0], 8);
    fleet.change(1, "id: r2", "id: r1");
    fleet.routers[1].launch();
    assert_eq!(fleet.routers[1].ended(), Some(2), "as for any other fault of its configuration");
    let said = fleet.routers[1].stderr();
    assert!(said.contains("router.id: `r1` is the id of another run") && said.contains("an id of its own"), "{said}");
    assert_eq!(fleet.shared_by(&[0])[&0], 8, "the first one is undisturbed");

    // Its word still lives, but it doesn't answer: whoever comes in its place starts at once, here from another address.
    fleet.routers[0].kill();
    fleet.launch(1);
    wait_for("the new run to own all", || has(&fleet, 1, 8).then_some(()));
}

#[test]
fn leases_granted_twice_move_their_shards_by_the_logs_word() {
    let fleet = Fleet::start(1, 8, 2);
    let before = fleet.each_has_its_part(&[0, 1]);
    let second = fleet.redis.ask(&["GET", "{atp}:alive:r2"]);
    let second = second.as_str().expect("the second router's word");
    for shard in fleet.owned(0) {
        // Redis lost who has it, and gave it to another one while its owner goes on.
        let _ = fleet.redis.ask(&["SET", &format!("{{atp:{shard}}}:lease"), second, "PX", "2000"]);
    }
    wait_for("the first one to find another owner in the log", || {
        fleet.routers[0].stderr().contains("owned here no longer").then_some(())
    });
    assert_eq!(fleet.each_has_its_part(&[0, 1]), before, "each gets its part again");
    fleet.routers[0].settled();
    let verified = atp::run_json(&["verify", "--log", &fleet.routers[0].log()]);
    assert_eq!(verified["ok"], true, "{verified:#}");
}
