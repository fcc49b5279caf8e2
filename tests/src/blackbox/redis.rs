//! A real Redis as a child of the test: killed, stopped, flushed, started again at the same place; and a wire to it that can
//! lose what it says.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A server of its own. It ends with the test's process, whatever becomes of that.
pub struct Redis {
    pid: String,
    address: SocketAddr,
    password: String,
}

fn launch(more: &[&str]) -> (String, SocketAddr) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/parts/redis.sh");
    let owner = std::process::id().to_string();
    let output = Command::new(script)
        .args(["start", "--owner", &owner])
        .args(more)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("the script starts");
    assert!(output.status.success(), "there is no Redis to test with: {script} start failed");
    let text = String::from_utf8(output.stdout).expect("text");
    let value = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
    };
    let url = value("ATP_REDIS_URL");
    let place = url.trim_end_matches('/').rsplit(['@', '/']).next().expect("a place");
    (value("ATP_REDIS_PID"), place.parse().expect("an address"))
}

fn signal(pid: &str, name: &str) {
    let status = Command::new("kill").args([name, pid]).status().expect("kill runs");
    assert!(status.success(), "kill {name} {pid}");
}

impl Redis {
    /// # Panics
    /// When there is none to be had: a test doesn't go on without.
    #[must_use]
    pub fn start() -> Self {
        let (pid, address) = launch(&[]);
        Self { pid, address, password: String::new() }
    }

    /// One that wants a password.
    ///
    /// # Panics
    /// As `start`.
    #[must_use]
    pub fn start_with_password(password: &str) -> Self {
        let (pid, address) = launch(&["--password", password]);
        Self { pid, address, password: password.into() }
    }

    /// SIGKILL; it has nothing on disk.
    pub fn kill(&self) {
        signal(&self.pid, "-KILL");
        super::wait_for("Redis to end", || TcpStream::connect(self.address).is_err().then_some(()));
    }

    /// Starts an empty one where the last one was.
    pub fn restart(&mut self) {
        let port = self.address.port().to_string();
        let mut more = vec!["--port", &port];
        if !self.password.is_empty() {
            more.extend(["--password", &self.password]);
        }
        (self.pid, _) = launch(&more);
    }

    /// SIGSTOP: connections stay, nothing is answered.
    pub fn stop(&self) {
        signal(&self.pid, "-STOP");
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        signal(&self.pid, "-CONT");
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// As `store.redis.url` takes it.
    #[must_use]
    pub fn url(&self) -> String {
        let who = if self.password.is_empty() { String::new() } else { format!(":{}@", self.password) };
        format!("redis://{who}{}/", self.address)
    }

    /// One command on a connection of its own.
    ///
    /// # Panics
    /// When Redis is away or says no.
    #[must_use]
    pub fn ask(&self, words: &[&str]) -> Value {
        let mut io = TcpStream::connect(self.address).expect("Redis listens");
        io.set_read_timeout(Some(super::PATIENCE)).expect("a socket");
        let mut input = BufReader::new(io.try_clone().expect("a socket"));
        if !self.password.is_empty() {
            say(&mut io, &["AUTH", &self.password]);
            let _ = answer(&mut input);
        }
        say(&mut io, words);
        answer(&mut input)
    }

    /// A hash as an object.
    #[must_use]
    pub fn hash(&self, key: &str) -> Value {
        let flat = self.ask(&["HGETALL", key]);
        let flat = flat.as_array().expect("a list");
        let pairs = flat.chunks(2).map(|p| (p[0].as_str().unwrap_or_default().to_owned(), p[1].clone()));
        Value::Object(pairs.collect())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", &self.pid]).stderr(Stdio::null()).status();
    }
}

fn say(io: &mut TcpStream, words: &[&str]) {
    let mut text = format!("*{}\r\n", words.len());
    words.iter().for_each(|word| text += &format!("${}\r\n{word}\r\n", word.len()));
    io.write_all(text.as_bytes()).expect("open");
}

fn answer(input: &mut impl BufRead) -> Value {
    let mut line = String::new();
    input.read_line(&mut line).expect("an answer");
    let (kind, rest) = line.trim_end().split_at(1);
    match kind {
        "+" => rest.into(),
        ":" => rest.parse::<i64>().expect("a number").into(),
        "$" if rest == "-1" => Value::Null,
        "$" => {
            let mut bytes = vec![0; rest.parse::<usize>().expect("a length") + 2];
            input.read_exact(&mut bytes).expect("whole");
            bytes.truncate(bytes.len() - 2);
            String::from_utf8(bytes).expect("text").into()
        }
        "*" => (0..rest.parse::<usize>().expect("a length")).map(|_| answer(input)).collect(),
        _ => panic!("Redis says {}", line.trim_end()),
    }
}

/// A wire to Redis. While it is deaf, commands arrive and their answers don't.
pub struct Wire {
    address: SocketAddr,
    deaf: Arc<AtomicBool>,
}

impl Wire {
    /// # Panics
    /// When there is no port.
    #[must_use]
    pub fn to(redis: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let wire = Self { address: listener.local_addr().expect("an address"), deaf: Arc::default() };
        let deaf = wire.deaf.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(redis) else { continue };
                let (Ok(from_near), Ok(from_far)) = (near.try_clone(), far.try_clone()) else { continue };
                let deaf = deaf.clone();
                std::thread::spawn(move || pass(from_near, far, &AtomicBool::new(false)));
                std::thread::spawn(move || pass(from_far, near, &deaf));
            }
        });
        wire
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://{}/", self.address)
    }

    pub fn deaf(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::Relaxed);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, lose: &AtomicBool) {
    let mut some = [0; 16 * 1024];
    while let Ok(n) = from.read(&mut some) {
        if n == 0 || (!lose.load(Ordering::Relaxed) && to.write_all(&some[..n]).is_err()) {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
