//! An HTTP/1.1 server over bare sockets that answers what a test tells it to,
//! well-formed or not, and records what it was asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What a client sent.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// First byte and number of bytes of `Range: bytes=a-b`.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self
            .header("range")?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        let first: usize = first.parse().ok()?;
        let last: usize = last.parse().ok()?;
        Some((first, last + 1 - first))
    }
}

/// What to do with a request.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Announced in place of the body's real length.
    length: Option<usize>,
    /// Sent when so many requests have come.
    after: usize,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Then {
    KeepAlive,
    Close,
    /// Keep the connection open and silent.
    Hang,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            length: None,
            after: 0,
            then: Then::KeepAlive,
        }
    }

    /// The part of `blob` that `request` asks for, as a good server sends it.
    pub fn part(blob: &[u8], request: &Request) -> Self {
        let size = blob.len();
        let (first, len) = match request
            .header("range")
            .and_then(|r| r.strip_prefix("bytes=-"))
        {
            Some(suffix) => {
                let len = suffix.parse::<usize>().unwrap().min(size);
                (size - len, len)
            }
            None => match request.range() {
                Some((first, len)) => (first, len.min(size - first)),
                None => return Self::new(200, blob),
            },
        };
        Self::new(206, &blob[first..first + len]).with(
            "Content-Range",
            format!("bytes {first}-{}/{size}", first + len - 1),
        )
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Waits until so many requests have come in all, this one among them.
    pub fn after_requests(mut self, count: usize) -> Self {
        self.after = count;
        self
    }

    /// Announces more than it sends, then closes.
    pub fn cut_to(mut self, len: usize) -> Self {
        self.length = Some(self.body.len());
        self.body.truncate(len);
        self.then = Then::Close;
        self
    }

    /// Announces more than it sends, then says nothing.
    pub fn stall_after(mut self, len: usize) -> Self {
        self = self.cut_to(len);
        self.then = Then::Hang;
        self
    }
}

/// Says nothing at all.
pub fn silence() -> Reply {
    let mut reply = Reply::new(0, "");
    reply.then = Then::Hang;
    reply
}

/// Closes the connection without an answer.
pub fn hang_up() -> Reply {
    let mut reply = Reply::new(0, "");
    reply.then = Then::Close;
    reply
}

type Handler = dyn Fn(&Request, usize) -> Reply + Send + Sync;

/// A running server; ends with this handle.
pub struct FaultServer {
    pub host: String,
    requests: Arc<Mutex<Vec<Request>>>,
    connections: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl FaultServer {
    /// `handler` gets each request and how many came before it.
    pub async fn start(handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(listener, handler)
    }

    /// One whose handler needs to know its own address.
    pub async fn start_with_host<H>(make: impl FnOnce(String) -> H) -> Self
    where
        H: Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        Self::serve(listener, make(host))
    }

    fn serve(
        listener: TcpListener,
        handler: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let address: SocketAddr = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, handler): (_, Arc<Handler>) = (Arc::clone(&requests), Arc::new(handler));
        let connections = Arc::<AtomicUsize>::default();
        let accepted = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::Relaxed);
                open.spawn(connection(stream, Arc::clone(&log), Arc::clone(&handler)));
            }
        });
        Self {
            host: address.to_string(),
            requests,
            connections,
            accepting,
        }
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// `METHOD path` of all requests so far.
    pub fn log(&self) -> Vec<String> {
        let line = |request: &Request| format!("{} {}", request.method, request.target);
        self.requests().iter().map(line).collect()
    }

    pub fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// How many connections clients have made so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn connection(stream: TcpStream, log: Arc<Mutex<Vec<Request>>>, handler: Arc<Handler>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read_request(&mut stream).await {
        let before = {
            let mut log = log.lock().unwrap();
            log.push(request.clone());
            log.len() - 1
        };
        let reply = handler(&request, before);
        while log.lock().unwrap().len() < reply.after {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if reply.status != 0 {
            let bytes = render(&request, &reply);
            if stream.get_mut().write_all(&bytes).await.is_err() {
                return;
            }
        }
        match reply.then {
            Then::KeepAlive => {}
            Then::Close => return,
            Then::Hang => std::future::pending().await,
        }
    }
    // As any server answers what is no HTTP; nobody listens at a clean end.
    let refusal = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
    let _ = stream.get_mut().write_all(refusal).await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length");
    let length = length.map_or(0, |text| text.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request {
        method,
        target,
        headers,
        body,
    })
}

fn render(request: &Request, reply: &Reply) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {} Told\r\n", reply.status);
    for (name, value) in &reply.headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    let length = reply.length.unwrap_or(reply.body.len());
    text.push_str(&format!("Content-Length: {length}\r\n\r\n"));
    let mut bytes = text.into_bytes();
    if request.method != "HEAD" {
        bytes.extend_from_slice(&reply.body);
    }
    bytes
}
