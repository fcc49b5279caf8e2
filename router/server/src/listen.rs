//! Accept loops: native connections and HTTP. A full table, or a process out of file descriptors, never ends them.

use crate::connection::{self, Shared};
use atp_proto::{Code, ConnId, WireError};
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::DuplexStream;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A request's head is due after this long.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const HEADERS_MAX: usize = 64;
/// Connections that are told at once why they aren't taken.
const REFUSALS_MAX: usize = 64;
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// What is needed to serve one more native connection.
#[derive(Clone)]
pub(crate) struct Doors {
    pub(crate) shared: Arc<Shared>,
    pub(crate) next_conn: Arc<AtomicU64>,
    pub(crate) connections_max: usize,
}

impl Doors {
    fn conn(&self) -> ConnId {
        ConnId(self.next_conn.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn serve_memory(&self, io: DuplexStream) {
        let (reader, writer) = tokio::io::split(io);
        self.shared.tasks.spawn(connection::serve(self.shared.clone(), self.conn(), true, reader, writer));
    }
}

/// Accepts the next connection; pauses where the process has no room for one.
pub(crate) async fn accept(listener: &TcpListener, stop: &CancellationToken) -> Option<(TcpStream, SocketAddr)> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return None,
        };
        match accepted {
            Ok(accepted) => return Some(accepted),
            // The peer went away between its SYN and our accept.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves native connections until `stop`.
pub(crate) async fn native(listener: TcpListener, doors: Doors, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(doors.connections_max));
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    while let Some((stream, peer)) = accept(&listener, &stop).await {
        // Chunks are small and many; waiting for more would only add latency.
        let _ = stream.set_nodelay(true);
        let Ok(permit) = room.clone().try_acquire_owned() else {
            let error = WireError::new(
                Code::Limit,
                "connections: this router has as many as it may (limits.connections); try again later",
            )
            .used(doors.connections_max as u64, doors.connections_max as u64)
            .retry_after_ms(1000);
            // A crowd isn't owed an answer each: they would hold the process's last descriptors meanwhile.
            if let Ok(answering) = refusals.clone().try_acquire_owned() {
                tokio::spawn(async move {
                    connection::refuse(stream, error).await;
                    drop(answering);
                });
            }
            continue;
        };
        let (shared, conn) = (doors.shared.clone(), doors.conn());
        doors.shared.tasks.spawn(async move {
            let (reader, writer) = stream.into_split();
            let ended = connection::serve(shared, conn, peer.ip().is_loopback(), reader, writer).await;
            tracing::debug!(conn = conn.0, %peer, ?ended, "connection ended");
            drop(permit);
        });
    }
}

/// Serves HTTP until `stop`, then lets running requests end.
pub(crate) async fn http(listener: TcpListener, routes: Router, stop: CancellationToken, connections_max: usize) {
    let room = Arc::new(Semaphore::new(connections_max));
    let running = tokio_util::task::TaskTracker::new();
    while let Some((stream, peer)) = accept(&listener, &stop).await {
        let Ok(permit) = room.clone().try_acquire_owned() else { continue };
        let service = routes.clone().layer(axum::Extension(Peer(peer)));
        let stop = stop.clone();
        running.spawn(async move {
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_headers(HEADERS_MAX)
                .max_buf_size(HEAD_BYTES_MAX);
            let serving = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
            tokio::pin!(serving);
            tokio::select! {
                _ = &mut serving => {}
                () = stop.cancelled() => {
                    serving.as_mut().graceful_shutdown();
                    let _ = tokio::time::timeout(Duration::from_secs(5), serving).await;
                }
            }
            drop(permit);
        });
    }
    running.close();
    running.wait().await;
}

/// The address of an HTTP peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);
