//! Questions and an operator's words to shards wherever they are: each router answers for those that it owns, within a bounded
//! time. Who doesn't answer is named.

use super::Peers;
use crate::inbox::ToShard;
use crate::shards::{Here, Place, Shards};
use atp_core::message::{Answer, Input, Query};
use atp_proto::codec::Received;
use atp_proto::content::TaskCancel;
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, ConnId, Flags, Frame, StreamId, TenantId};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long another router may take to answer.
const WAIT: Duration = Duration::from_secs(2);
/// The connection that HTTP's own frames come from; native ones count from 1.
const HTTP_CONN: ConnId = ConnId(0);

/// Each shard's answer, by number.
pub(crate) type Answers = Vec<(u32, Answer)>;

/// What is asked, and of which shard (`None`: all).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) shard: Option<u32>,
    pub(crate) what: What,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum What {
    Query(Query),
    DrainAgent { agent: AgentName, drained: bool },
    Faster { account: TenantId, more: Amount, for_ms: u64, by: String },
    Cancel { tenant: TenantId, stream: StreamId },
}

/// Shards that didn't answer, by the router that has them; "" where nobody is known to.
pub(crate) type Missing = BTreeMap<String, Vec<u32>>;

/// Asks the shards that are here; one that doesn't know any more says nothing.
pub(crate) async fn here(shards: &Shards, ask: &Ask) -> Answers {
    let all = match ask.shard {
        Some(shard) => shards.here(shard).map(|here| (shard, here)).into_iter().collect(),
        None => shards.all_here(),
    };
    let asked = all.into_iter().map(async |(shard, here)| Some((shard, one(&here, &ask.what).await?)));
    join_all(asked).await.into_iter().flatten().collect()
}

async fn one(here: &Here, what: &What) -> Option<Answer> {
    match what {
        What::Query(query) => here.inbox.ask(query.clone()).await,
        What::DrainAgent { agent, drained } => here.inbox.drain_agent(agent.clone(), *drained).await,
        What::Faster { account, more, for_ms, by } => {
            here.inbox.faster(account.clone(), *more, *for_ms, by.clone()).await
        }
        What::Cancel { tenant, stream } => {
            let reason = TaskCancel { reason: Some("DELETE over HTTP".into()) };
            let frame = Frame::json(stream.as_str(), 0, Flags::NONE, kind::TASK_CANCEL, &reason);
            let (tenant, received) = (tenant.clone(), Received::from_frame(frame));
            let input = Input::Client { conn: HTTP_CONN, tenant: tenant.clone(), received };
            here.inbox.send(256, ToShard::Input(Box::new(input))).await.ok()?;
            // How it stands now.
            here.inbox.ask(Query::Stream { tenant, stream: stream.clone() }).await
        }
    }
}

/// Asks them wherever they are.
pub(crate) async fn everywhere(shards: &Shards, peers: &Peers, ask: &Ask) -> (Answers, Missing) {
    let numbers = match ask.shard {
        Some(shard) => shard..shard + 1,
        None => 0..shards.placement().shards(),
    };
    let mut places = Missing::new();
    for shard in numbers.clone() {
        match shards.place(shard) {
            Place::Here(_) => {}
            Place::At(site) => places.entry(site.router.clone()).or_default().push(shard),
            Place::Unknown => places.entry(String::new()).or_default().push(shard),
        }
    }
    let routers = places.keys().filter(|router| !router.is_empty());
    let far = join_all(routers.map(|router| peers.ask(router, ask, WAIT)));
    let (mut answers, far) = tokio::join!(here(shards, ask), far);
    for (shard, answer) in far.into_iter().flatten().flatten() {
        if answers.iter().all(|(known, _)| *known != shard) {
            answers.push((shard, answer));
        }
    }
    answers.sort_by_key(|(shard, _)| *shard);
    let missing = numbers.filter(|shard| answers.binary_search_by_key(shard, |(known, _)| *known).is_err());
    let mut unanswered = Missing::new();
    for shard in missing {
        let router = places.iter().find(|(_, shards)| shards.contains(&shard)).map(|(router, _)| router.clone());
        unanswered.entry(router.unwrap_or_default()).or_default().push(shard);
    }
    (answers, unanswered)
}
