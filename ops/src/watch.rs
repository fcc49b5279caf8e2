//! `atp watch` and `atp cancel`: follow what runs, or ask it to stop. Watching spends nothing and changes nothing.

use crate::api::Api;
use crate::cli::{self, Global};
use crate::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::follow::Follower;
use crate::look;
use crate::rows;
use crate::screen::Screen;
use crate::submit::{End, interrupt, summary};
use atp_proto::StreamId;
use atp_proto::content::TaskState;
use atp_proto::json::{View, to_json};
use atp_sdk::{Client, Event, EventKind};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often the list of streams is asked for.
const LOOK: Duration = Duration::from_millis(500);
/// Streams that are followed at once; further ones are taken up as those end.
const FOLLOWED_MAX: usize = 256;

pub(crate) async fn run(global: &Global, screen: Screen, args: &cli::Watch) -> Outcome {
    match &args.stream {
        Some(stream) => one(global, screen, &StreamId::new(stream), args.from).await,
        None => everything(global, screen).await,
    }
}

async fn one(global: &Global, screen: Screen, id: &StreamId, from: u64) -> Outcome {
    let client = connect::client(global).await?;
    let watched = tokio::select! {
        watched = client.watch(id.clone(), from) => watched,
        () = interrupt() => return Err(Failure::interrupted()),
    };
    let mut stream = watched.map_err(|e| connect::failure(&e))?;
    let mut follower = Follower::new(screen, String::new());
    follower.accepted(stream.accepted());
    let mut end = None;
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            () = interrupt() => {
                follower.flush()?;
                return Err(Failure::interrupted());
            }
        };
        let Some(event) = event else { break };
        let event = event.map_err(|e| connect::failure(&e))?;
        if let Some(state) = show(screen, &mut follower, event, &mut end)? {
            client.close().await;
            return if state == TaskState::Done { Ok(()) } else { Err(Failure::silent(Exit::Task)) };
        }
    }
    // `--from` can stand behind the bill: then there was nothing to follow.
    follower.flush()?;
    Ok(())
}

/// Shows an event; the stream's state once its bill is there.
fn show(
    screen: Screen,
    follower: &mut Follower,
    event: Event,
    final_: &mut Option<atp_proto::content::Final>,
) -> Result<Option<TaskState>, Failure> {
    if screen.json {
        screen.line(&to_json(View::new(&event.frame)))?;
    }
    match event.kind {
        EventKind::Partial(partial) if !screen.json => follower.partial(&partial)?,
        EventKind::Final(end) => *final_ = Some(*end),
        EventKind::Bill(bill) => {
            follower.flush()?;
            let state = bill.state;
            if let (false, Some(final_)) = (screen.json, final_.take()) {
                let end = End { stream_id: bill.stream_id.clone(), final_, bill: *bill };
                screen.line(&summary(screen, &end))?;
            }
            return Ok(Some(state));
        }
        EventKind::Window(update) => follower.note(&update.scope, rows::left(&update)),
        EventKind::Partial(_) | EventKind::Accepted(_) | EventKind::Log | EventKind::Other => {}
    }
    Ok(None)
}

/// Follows each stream that is open or begins, and how agents stand, until Ctrl-C.
async fn everything(global: &Global, screen: Screen) -> Outcome {
    let api = Api::new(global)?;
    let client = connect::client(global).await?;
    let (ended, mut ends) = mpsc::channel::<String>(FOLLOWED_MAX);
    let (mut followed, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let mut standing = BTreeMap::new();
    screen.progress("following everything that runs; Ctrl-C ends");
    loop {
        let streams = api.streams("limit=1000").await?.streams;
        let listed: BTreeSet<String> = streams.iter().map(|s| s.stream_id.clone()).collect();
        // What the router no longer lists can't come again.
        seen.retain(|id| listed.contains(id));
        for stream in streams.iter().filter(|s| !s.state.is_closed()) {
            if followed.len() < FOLLOWED_MAX && seen.insert(stream.stream_id.clone()) {
                followed.insert(stream.stream_id.clone());
                tokio::spawn(follow(screen, client.clone(), stream.stream_id.clone(), ended.clone()));
            }
        }
        for agent in look::fetch_agents(&api).await?.agents {
            let now = rows::standing(&agent);
            if standing.get(&agent.name) != Some(&now) {
                screen.progress(&now);
                standing.insert(agent.name, now);
            }
        }
        let look = tokio::time::sleep(LOOK);
        tokio::pin!(look);
        loop {
            tokio::select! {
                () = &mut look => break,
                Some(id) = ends.recv() => { followed.remove(&id); }
                () = interrupt() => return Err(Failure::interrupted()),
            }
        }
    }
}

async fn follow(screen: Screen, client: Client, id: String, ended: mpsc::Sender<String>) {
    let mut follower = Follower::new(screen, format!("{id} "));
    match client.watch(StreamId::new(&id), 0).await {
        Ok(mut stream) => {
            let mut end = None;
            while let Some(event) = stream.next().await {
                let shown = match event {
                    Ok(event) => show(screen, &mut follower, event, &mut end),
                    Err(error) => Err(connect::failure(&error)),
                };
                match shown {
                    Ok(None) => {}
                    Ok(Some(_)) => break,
                    Err(failure) => {
                        screen.progress(&format!("{id}: {}", failure.text));
                        break;
                    }
                }
            }
        }
        Err(error) => screen.progress(&format!("{id}: {}", connect::failure(&error).text)),
    }
    let _ = ended.send(id).await;
}

pub(crate) async fn cancel(global: &Global, screen: Screen, args: &cli::StreamName) -> Outcome {
    let client = connect::client(global).await?;
    let asked = client.cancel(StreamId::new(&args.stream)).await;
    asked.map_err(|e| connect::failure(&e))?;
    // Closing flushes: the request is on its way before the process ends.
    client.close().await;
    if screen.json {
        return Ok(screen.document(&serde_json::json!({"stream_id": args.stream, "asked": "cancel"}))?);
    }
    Ok(screen.line(&format!("asked {} to stop; its bill follows: atp bill {}", args.stream, args.stream))?)
}
