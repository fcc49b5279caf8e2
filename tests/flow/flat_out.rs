//! Long calls that stream as fast as they may: none keeps others from beginning, and what many of them leave behind at once is
//! no more than the router can write down.

use crate::alone;
use atp_tests::blackbox::atp;
use atp_tests::blackbox::process::Router;
use serde_json::Value;

const STREAMS: u64 = 256;

#[test]
fn every_stream_begins_beside_those_that_stream_flat_out() {
    let _alone = alone();
    // Half of the streams spend what their account's home, the other shard, lends them.
    let mut router = Router::start(
        "shards: {count: 2}\n\
         log: {kind: local, durability: async}\n\
         windows: {stream: {max_parallel: 8, max_tokens: 1000000000000, max_usd: 1000000.00}, \
         agent: {max_parallel: 4096, max_tokens: 1000000000000, max_usd: 1000000.00}}\n\
         limits: {aimd_base: 4096, aimd_cap: 4096, burst: 100000, cool_off_percent: 1000000}\n\
         accounts: {default: {usd: 10000000.00, tokens: 10000000000000, per: day}}",
    );
    let (address, streams) = (router.atp().to_string(), STREAMS.to_string());
    // The agents of the second run are other processes of the same names: the calls of the first end all at once.
    for run in 1..=2 {
        let args = ["bench", "relay", "--router", &address, "--streams", &streams];
        let out = atp::command(&args).args(["--seconds", "1", "--rounds", "1", "--json"]).output().expect("it runs");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "run {run}: {said}\n{}", router.stderr());
        let report: Value = serde_json::from_slice(&out.stdout).expect("a document");
        let row = &report["rows"][1];
        assert_eq!((&row["disordered"], &row["streams_ended"]), (&0.into(), &0.into()), "run {run}: {report}");
        assert!(row["frames_per_second"].as_f64() > Some(0.0), "run {run}: {report}");
    }
    router.verify();
    router.kill();
}
