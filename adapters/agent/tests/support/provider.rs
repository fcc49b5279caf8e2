//! A provider on a loopback port: takes one request, keeps it, and plays its script byte for byte.

use super::PATIENCE;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;

pub enum Step {
    /// Status line and headers, then the body in chunks by the steps that follow.
    Head(&'static str),
    Send(Vec<u8>),
    /// The body is whole.
    End,
    /// The connection is reset in the middle of the body.
    Reset,
    /// Sends this again and again until the adapter closes the connection.
    Forever(Vec<u8>),
    /// Sends nothing more and waits until the adapter closes the connection.
    UntilClosed,
    /// Waits until the test lets it go on.
    Gate(oneshot::Receiver<()>),
}

pub const OK: &str = "200 OK\r\ncontent-type: text/event-stream";

#[derive(Debug, Default)]
pub struct Request {
    pub line: String,
    pub headers: BTreeMap<String, String>,
    pub body: serde_json::Value,
}

pub struct Provider {
    pub url: String,
    played: oneshot::Receiver<(Request, bool)>,
}

impl Provider {
    pub async fn plays(steps: Vec<Step>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let (done, played) = oneshot::channel();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let _ = done.send(play(stream, steps).await);
        });
        Self { url, played }
    }

    /// An answer of status 200 whose body comes in pieces of `piece` bytes.
    pub async fn answers(body: &[u8], piece: usize) -> Self {
        let mut steps = vec![Step::Head(OK)];
        steps.extend(body.chunks(piece).map(|piece| Step::Send(piece.to_vec())));
        steps.push(Step::End);
        Self::plays(steps).await
    }

    /// The request, and whether the adapter closed the connection before the script's end.
    pub async fn played(self) -> (Request, bool) {
        timeout(PATIENCE, self.played).await.expect("the script ends in time").unwrap()
    }
}

async fn play(mut stream: TcpStream, steps: Vec<Step>) -> (Request, bool) {
    stream.set_nodelay(true).unwrap();
    let request = read_request(&mut stream).await;
    let mut closed = false;
    for step in steps {
        let result = match step {
            Step::Head(head) => {
                stream.write_all(format!("HTTP/1.1 {head}\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes()).await
            }
            Step::Send(bytes) => stream.write_all(&chunk(&bytes)).await,
            Step::End => stream.write_all(b"0\r\n\r\n").await,
            Step::Reset => {
                drop(stream);
                return (request, false);
            }
            Step::Forever(bytes) => loop {
                if let Err(error) = stream.write_all(&chunk(&bytes)).await {
                    break Err(error);
                }
                // The adapter sends nothing more, so a byte or an end can only be its close.
                let mut byte = [0];
                match stream.try_read(&mut byte) {
                    Ok(0) => break Err(std::io::ErrorKind::BrokenPipe.into()),
                    Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => break Err(error),
                    _ => tokio::task::yield_now().await,
                }
            },
            Step::UntilClosed => {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            Step::Gate(gate) => {
                gate.await.unwrap();
                Ok(())
            }
        };
        if result.is_err() {
            closed = true;
            break;
        }
    }
    (request, closed)
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

async fn read_request(stream: &mut TcpStream) -> Request {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "the request ended early");
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let mut lines = head.lines();
    let line = lines.next().unwrap().to_owned();
    let headers: BTreeMap<String, String> =
        lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned())).collect();
    let length: usize = headers["content-length"].parse().unwrap();
    while bytes.len() < head_end + length {
        assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "the body ended early");
    }
    Request { line, headers, body: serde_json::from_slice(&bytes[head_end..]).unwrap() }
}
