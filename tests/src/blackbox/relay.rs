//! A wire between agents and router that is watched: it passes bytes on unchanged and keeps what was dispatched. It outlives
//! the router; while that is away, connections to it end at once.

use super::PATIENCE;
use atp_proto::content::Dispatch;
use atp_proto::{codec, frame::kind};
use bytes::BytesMut;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

#[derive(Default)]
struct Seen {
    frames: u64,
    /// How often each call was dispatched; questions to an agent that may run it don't count.
    dispatches: BTreeMap<String, u32>,
}

#[derive(Clone)]
pub struct Relay {
    address: SocketAddr,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    silent: Arc<AtomicBool>,
}

impl Relay {
    /// Listens on a port of its own for as long as the test runs.
    ///
    /// # Panics
    /// When there is no port.
    #[must_use]
    pub fn to(router: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let relay = Self { address, seen: Arc::default(), silent: Arc::default() };
        let accepting = relay.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if let Ok(far) = TcpStream::connect(router) {
                    accepting.join(near, far);
                }
            }
        });
        relay
    }

    fn join(&self, near: TcpStream, far: TcpStream) {
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let (Ok(from_near), Ok(from_far)) = (near.try_clone(), far.try_clone()) else { return };
        let (up, down) = (self.clone(), self.clone());
        std::thread::spawn(move || up.pass(from_near, far));
        std::thread::spawn(move || down.pass(from_far, near));
    }

    /// Passes bytes on until one end closes; then the other end is closed too.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut some = [0; 64 * 1024];
        let mut bytes = BytesMut::new();
        while let Ok(n) = from.read(&mut some) {
            while self.silent.load(Ordering::Relaxed) {
                std::thread::park_timeout(super::process::LOOK / 50);
            }
            if n == 0 {
                break;
            }
            bytes.extend_from_slice(&some[..n]);
            // What is passed on may act before this thread runs again: it is noted first.
            self.note(&mut bytes);
            if to.write_all(&some[..n]).is_err() {
                break;
            }
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    }

    fn note(&self, bytes: &mut BytesMut) {
        let (seen, changed) = &*self.seen;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some(received)) = codec::decode(bytes) {
            seen.frames += 1;
            if &*received.frame.kind == kind::DISPATCH
                && let Ok(dispatch) = received.frame.read::<Dispatch>()
                && !dispatch.go_on
            {
                *seen.dispatches.entry(dispatch.call_id.to_string()).or_default() += 1;
            }
        }
        changed.notify_all();
    }

    /// A silent wire passes nothing on and closes nothing: neither end learns of it. What is under way goes on afterwards.
    pub fn be_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Frames that went by, in both directions.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).frames
    }

    /// Waits until `frames` have gone by; false when `or` says that no more will come.
    ///
    /// # Panics
    /// When they don't come.
    pub fn wait_for(&self, frames: u64, or: impl Fn() -> bool) -> bool {
        let (seen, changed) = &*self.seen;
        let end = Instant::now() + PATIENCE;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        while seen.frames < frames {
            if or() {
                return false;
            }
            assert!(Instant::now() < end, "{} of {frames} frames went by", seen.frames);
            seen = changed.wait_timeout(seen, super::process::LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// How often each call was dispatched.
    #[must_use]
    pub fn dispatches(&self) -> BTreeMap<String, u32> {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).dispatches.clone()
    }
}
