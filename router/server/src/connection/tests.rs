//! Deadlines and bounds of one connection, on a paused clock.

use super::admissible::check_capabilities;
use super::*;
use crate::inbox::{Taking, inbox};
use crate::log::Source;
use crate::shard_task::Health;
use crate::shards::{Here, Place, Sites};
use crate::time::Clocks;
use atp_core::placement::Placement;
use atp_proto::content::Capabilities;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

fn connect() -> (DuplexStream, JoinHandle<Ended>, Taking) {
    let (inbox, taking) = inbox(1 << 20);
    let tasks = TaskTracker::new();
    let shards = Shards::new(Placement::default());
    let health = tokio::sync::watch::channel(Health::default()).1;
    shards.set(0, Place::Here(Here { inbox, source: Source::local(""), health }));
    let peers = Peers::new("r1", None);
    let agents = Agents::new(Arc::default(), shards.clone(), Clocks::start(), tasks.clone(), 2, peers.clone());
    let shared = Arc::new(Shared {
        shards,
        agents,
        peers,
        sites: tokio::sync::watch::channel(Sites::default()).1,
        anonymous: Anonymous::Loopback,
        incarnation: "test".into(),
        heartbeat: Duration::from_secs(5),
        streams_max: 2,
        waiting_bytes: Arc::default(),
        stopping: CancellationToken::new(),
        tasks,
    });
    let (near, far) = tokio::io::duplex(1 << 20);
    let (reader, writer) = tokio::io::split(far);
    (near, tokio::spawn(serve(shared, ConnId(1), true, reader, writer)), taking)
}

async fn hello(io: &mut DuplexStream) {
    let mut bytes = BytesMut::new();
    let hello = Hello { minor_max: 1, role: Role::Client, token: None, redirect: false };
    codec::encode(&Frame::json("", 0, Flags::SYN, kind::HELLO, &hello), &mut bytes);
    io.write_all(&bytes).await.expect("open");
}

#[tokio::test(start_paused = true)]
async fn the_first_frame_is_due_within_five_seconds() {
    let (mut io, ended, _taking) = connect();
    io.write_all(&[0, 0]).await.expect("open");
    let begun = Instant::now();
    let Ended::Refused(error) = ended.await.expect("ends") else { panic!("not refused") };
    assert!(error.message.contains("first frame"), "{error}");
    assert!(begun.elapsed() >= Duration::from_millis(FIRST_FRAME_MS));
    assert!(begun.elapsed() < Duration::from_millis(FIRST_FRAME_MS + 2000));
}

#[tokio::test(start_paused = true)]
async fn a_begun_frame_is_due_within_thirty_seconds() {
    let (mut io, ended, _taking) = connect();
    hello(&mut io).await;
    let begun = Instant::now();
    let mut bytes = BytesMut::new();
    codec::encode(&Frame::raw("s", 1, Flags::SYN, kind::TASK_SUBMIT, vec![b'x'; 100].into()), &mut bytes);
    // A byte a second: never silent, and not whole in time.
    for byte in bytes.iter().take(60) {
        if io.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let Ended::Refused(error) = ended.await.expect("ends") else { panic!("not refused") };
    assert!(error.message.contains("not whole"), "{error}");
    assert!(begun.elapsed() >= Duration::from_millis(FRAME_MS));
}

#[tokio::test(start_paused = true)]
async fn three_silent_heartbeats_lose_a_connection() {
    let (mut io, ended, _taking) = connect();
    hello(&mut io).await;
    let begun = Instant::now();
    let ended = ended.await.expect("ends");
    assert!(matches!(ended, Ended::Lost), "{ended:?}");
    assert!(begun.elapsed() >= Duration::from_secs(15) && begun.elapsed() < Duration::from_secs(18));
}

#[tokio::test(start_paused = true)]
async fn a_heartbeat_in_time_keeps_it() {
    let (mut io, ended, _taking) = connect();
    hello(&mut io).await;
    let mut bytes = BytesMut::new();
    codec::encode(&Frame::heartbeat(false), &mut bytes);
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(14)).await;
        io.write_all(&bytes).await.expect("open");
    }
    assert!(!ended.is_finished());
    drop(io);
    assert!(matches!(ended.await.expect("ends"), Ended::Closed));
}

#[test]
fn capabilities_are_bounded() {
    let capabilities = |agent: &str, models: usize| Capabilities {
        agent: AgentName::new(agent),
        incarnation: "i".into(),
        models: vec![atp_proto::content::ModelInfo { id: "m".into(), ..Default::default() }; models],
        ..Capabilities::default()
    };
    assert!(check_capabilities(&capabilities("a", 256)).is_ok());
    assert!(check_capabilities(&capabilities("a", 257)).is_err());
    assert!(check_capabilities(&capabilities("a b", 1)).is_err());
    assert!(check_capabilities(&Capabilities { incarnation: String::new(), ..capabilities("a", 1) }).is_err());
}
