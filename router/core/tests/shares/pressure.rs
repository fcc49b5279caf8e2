//! Gold that waits, and who gives way to it in other shards (ATP-10-7, ATP-10-8).

use crate::fleet::{Fleet, TENANT, settings};
use atp_core::settings::{Settings, WindowSettings};
use atp_proto::content::{Finish, TaskState};
use atp_proto::frame::kind;
use atp_proto::{CallId, Code, Qos, StreamId, TenantId};

const GOLD: Qos = Qos::Gold;
const SILVER: Qos = Qos::Silver;
const BRONZE: Qos = Qos::Bronze;

fn slots(n: u32) -> Settings {
    Settings {
        agent_window: WindowSettings { max_parallel: Some(n), ..WindowSettings::default() },
        ..settings(100_000, None)
    }
}

impl Fleet {
    /// A stream on the n-th shard from the account's home.
    fn task(&self, n: u32) -> String {
        self.stream_on(self.away(n)).find(|id| self.state_of(id).is_none()).unwrap()
    }

    fn state_of(&self, id: &str) -> Option<&atp_core::stream::Stream> {
        let shard = self.settings.placement.shard_of(&TenantId::new(TENANT), &StreamId::new(id)) as usize;
        let state = self.shards[shard].state();
        state.stream_no(TENANT, id).and_then(|no| state.stream(no))
    }

    fn begin(&mut self, qos: Qos, n: u32) -> String {
        let id = self.task(n);
        self.submit_as(qos, &id, true);
        assert!(self.state_of(&id).is_some(), "{id} is accepted");
        id
    }

    fn call(&self, id: &str) -> String {
        CallId::of(&TenantId::new(TENANT), &StreamId::new(id), 1).to_string()
    }

    fn is_asked_to_stop(&self, id: &str) -> bool {
        let call = self.call(id);
        self.to_agent.iter().any(|f| &*f.kind == kind::AGENT_CANCEL && *f.stream_id == *call)
    }

    fn runs(&self, id: &str) -> bool {
        self.calls.contains_key(&self.call(id))
    }
}

#[test]
fn atp_10_8_the_oldest_bronze_of_any_shard_gives_way_for_a_slot() {
    let mut fleet = Fleet::new(slots(3));
    let silver = fleet.begin(SILVER, 3);
    fleet.wait(200);
    let older = fleet.begin(BRONZE, 1);
    fleet.wait(200);
    let younger = fleet.begin(BRONZE, 2);
    fleet.wait(200);
    assert!([&silver, &older, &younger].iter().all(|id| fleet.runs(id)));
    let gold = fleet.begin(GOLD, 3);
    fleet.wait(1_900);
    assert!(!fleet.is_asked_to_stop(&older), "limits.preempt_after is 2 s");
    fleet.wait(400);
    assert!(fleet.is_asked_to_stop(&older));
    fleet.wait(2_000);
    assert!(!fleet.is_asked_to_stop(&younger) && !fleet.is_asked_to_stop(&silver), "one at a time, bronze first");
    assert!(!fleet.runs(&gold), "a request to stop frees nothing");
    fleet.finish(&fleet.call(&older), 1, Finish::Cancelled);
    assert!(fleet.runs(&gold), "its slot is gold's");
    let answer = fleet.final_of(&older).unwrap();
    assert_eq!(answer.error.unwrap().code, Code::Preempt);
    fleet.wait(10_000);
    assert!(!fleet.is_asked_to_stop(&younger));
}

#[test]
fn atp_10_8_the_next_one_of_any_shard_is_asked_when_the_first_does_not_stop() {
    let mut fleet = Fleet::new(slots(2));
    let silver = fleet.begin(SILVER, 1);
    let bronze = fleet.begin(BRONZE, 2);
    fleet.begin(GOLD, 3);
    fleet.wait(2_500);
    assert!(fleet.is_asked_to_stop(&bronze) && !fleet.is_asked_to_stop(&silver));
    fleet.wait(4_000);
    assert!(!fleet.is_asked_to_stop(&silver), "5 s to end the call");
    fleet.wait(3_000);
    assert!(fleet.is_asked_to_stop(&silver));
}

#[test]
fn atp_10_8_gold_gives_way_to_nobody_in_any_shard() {
    let mut fleet = Fleet::new(slots(2));
    let (first, second) = (fleet.begin(GOLD, 1), fleet.begin(GOLD, 2));
    fleet.begin(GOLD, 3);
    fleet.wait(20_000);
    assert!(!fleet.is_asked_to_stop(&first) && !fleet.is_asked_to_stop(&second));
}

#[test]
fn atp_10_7_new_bronze_is_shed_in_every_shard_while_gold_waits_and_no_longer() {
    let mut fleet = Fleet::new(slots(1));
    let silver = fleet.begin(SILVER, 1);
    let gold = fleet.begin(GOLD, 0);
    fleet.wait(1_900);
    fleet.begin(BRONZE, 2);
    fleet.wait(300);
    for n in 0..4 {
        let id = fleet.task(n);
        fleet.submit_as(BRONZE, &id, true);
        let error = fleet.refusal_of(&id).unwrap();
        assert_eq!((error.code, error.scope.as_deref()), (Code::Window, Some("qos:bronze")));
    }
    fleet.finish(&fleet.call(&silver), 1, Finish::Complete);
    assert!(fleet.runs(&gold));
    fleet.wait(2_100);
    fleet.begin(BRONZE, 3);
}

#[test]
fn atp_10_10_money_that_gives_way_comes_to_gold_of_another_shard() {
    // For two calls at 10 and no third.
    let mut fleet = Fleet::new(settings(29, None));
    let older = fleet.begin(BRONZE, 1);
    fleet.wait(300);
    let younger = fleet.begin(BRONZE, 2);
    fleet.wait(300);
    assert!(fleet.runs(&older) && fleet.runs(&younger));
    let waits = fleet.begin(BRONZE, 1);
    let gold = fleet.begin(GOLD, 3);
    fleet.wait(2_500);
    assert!(fleet.is_asked_to_stop(&older) && !fleet.is_asked_to_stop(&younger));
    fleet.finish(&fleet.call(&older), 1, Finish::Cancelled);
    fleet.wait(1_500);
    assert!(fleet.runs(&gold), "what bronze gave back is gold's");
    assert!(!fleet.runs(&waits), "and not bronze's of the same shard");
    fleet.wait(10_000);
    assert!(!fleet.is_asked_to_stop(&younger));
    fleet.finish_all(5);
    fleet.wait(3_000);
    assert!(fleet.runs(&waits));
    fleet.finish_all(5);
    fleet.wait(61_000);
    assert_eq!(fleet.account(fleet.home()), (29, 16, 0, 0));
    assert_eq!(fleet.final_of(&gold).unwrap().state, TaskState::Done);
}

#[test]
fn pressure_that_others_do_not_hear_stays_at_home() {
    let mut fleet = Fleet::new(slots(2));
    let (bronze, silver) = (fleet.begin(BRONZE, 1), fleet.begin(SILVER, 3));
    let (here, there) = (fleet.away(3), fleet.away(1));
    fleet.cut.extend([(here, there), (there, here)]);
    fleet.begin(GOLD, 3);
    fleet.wait(4_000);
    assert!(fleet.is_asked_to_stop(&silver) && !fleet.is_asked_to_stop(&bronze), "only its own is to be had");
}
