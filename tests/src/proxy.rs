//! A registry that misbehaves: an HTTP proxy in front of a good one, which
//! breaks chosen answers and counts everything.

mod access;
mod http;
mod schedule;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::net::connect_unspec;

pub use access::{Access, TOKEN};
pub use schedule::{Fault, Rule};

use crate::command::wait_for;
use access::Gate;
use http::Head;
use schedule::{Schedule, Strike};

/// How often a stalled answer looks whether its client has left.
const LOOK: Duration = Duration::from_millis(50);

/// One request that came, and what was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// GET or HEAD.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// The range asked for, as written.
    pub range: Option<String>,
    /// Whether it carried credentials or a token.
    pub authorized: bool,
    /// The status sent, 0 for none.
    pub status: u16,
    /// Bytes of body sent.
    pub bytes: u64,
}

/// The proxy. It ends when dropped.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    host: String,
    schedule: Mutex<Schedule>,
    gate: Mutex<Gate>,
    asked: Mutex<Vec<String>>,
    seen: Mutex<Vec<Seen>>,
    open: Mutex<Open>,
    /// Told when connections are closed.
    closed: Condvar,
}

/// Connections, and whether there may be more.
#[derive(Default)]
struct Open {
    /// Counts up whenever the proxy goes down: what was begun before ends.
    life: u64,
    up: bool,
    next: u64,
    clients: HashMap<u64, TcpStream>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// In front of a registry, given as `host:port`.
    pub fn start(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            host: format!("127.0.0.1:{port}"),
            schedule: Mutex::default(),
            gate: Mutex::default(),
            asked: Mutex::default(),
            seen: Mutex::default(),
            open: Mutex::default(),
            closed: Condvar::new(),
        });
        let proxy = Self { port, shared };
        proxy.listen(listener);
        Ok(proxy)
    }

    fn listen(&self, listener: TcpListener) {
        let life = {
            let mut open = lock(&self.shared.open);
            open.up = true;
            open.life
        };
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if !shared.accept(life, stream) {
                    return;
                }
            }
        });
    }

    /// Host and port, as references name it.
    pub fn host(&self) -> String {
        self.shared.host.clone()
    }

    /// A reference to an image of the registry behind, through the proxy.
    pub fn reference(&self, image: &str) -> String {
        format!("{}/{image}", self.host())
    }

    /// Dies: connections break off, and new ones are refused.
    pub fn down(&self) {
        {
            let mut open = lock(&self.shared.open);
            open.life += 1;
            open.up = false;
            for client in open.clients.values() {
                let _ = client.shutdown(Shutdown::Both);
            }
        }
        self.shared.closed.notify_all();
        // Wakes the listener, which sees that its time is over. It is gone
        // once connections are refused.
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether it has not died.
    pub fn is_up(&self) -> bool {
        lock(&self.shared.open).up
    }

    /// Comes back at the same address.
    pub fn up(&self) -> Result<()> {
        // Somebody may have the port for a moment, as one end of a connection.
        let listener = wait_for("the proxy's port", || {
            Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).ok())
        })?;
        self.listen(listener);
        Ok(())
    }

    /// Adds a rule. Of several that are due, the first strikes; delays come
    /// on top.
    pub fn schedule(&self, rule: Rule) {
        lock(&self.shared.schedule).add(rule);
    }

    /// Breaks the next `times` answers to requests whose path holds the text.
    pub fn fail(&self, part_of_path: &str, times: u64, fault: Fault) {
        self.schedule(Rule::new(fault).on(part_of_path).times(times));
    }

    /// The same, for requests with a range only.
    pub fn fail_ranges(&self, part_of_path: &str, times: u64, fault: Fault) {
        self.schedule(Rule::new(fault).on(part_of_path).ranged().times(times));
    }

    /// Behaves well from now on.
    pub fn heal(&self) {
        lock(&self.shared.schedule).clear();
    }

    /// Faults so far that had an effect, by name.
    pub fn struck(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.shared.schedule).struck()
    }

    /// Asks for credentials, or for other ones, from now on.
    pub fn demand(&self, access: Access) {
        lock(&self.shared.gate).access = access;
    }

    /// Refuses every token given out so far.
    pub fn expire_tokens(&self) {
        lock(&self.shared.gate).expire();
    }

    /// Requests so far whose path holds the text, those included that have no
    /// whole answer yet.
    pub fn asked(&self, part_of_path: &str) -> usize {
        lock(&self.shared.asked)
            .iter()
            .filter(|path| path.contains(part_of_path))
            .count()
    }

    /// All requests that were answered so far.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared.seen).clone()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        lock(&self.shared.asked).clear();
        lock(&self.shared.seen).clear();
    }

    /// Requests so far whose path holds the text.
    pub fn requests(&self, part_of_path: &str) -> usize {
        lock(&self.shared.seen)
            .iter()
            .filter(|seen| seen.path.contains(part_of_path))
            .count()
    }

    /// Bytes of bodies sent so far for paths that hold the text.
    pub fn bytes(&self, part_of_path: &str) -> u64 {
        lock(&self.shared.seen)
            .iter()
            .filter(|seen| seen.path.contains(part_of_path))
            .map(|seen| seen.bytes)
            .sum()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if lock(&self.shared.open).up {
            self.down();
        }
    }
}

impl Shared {
    /// Serves a new connection on a thread of its own; whether the listener
    /// goes on.
    fn accept(self: &Arc<Self>, life: u64, stream: TcpStream) -> bool {
        let number = {
            let mut open = lock(&self.open);
            if open.life != life {
                return false;
            }
            let Ok(kept) = stream.try_clone() else {
                return true;
            };
            let number = open.next;
            open.next += 1;
            open.clients.insert(number, kept);
            number
        };
        let shared = Arc::clone(self);
        std::thread::spawn(move || {
            // A client that goes away is no failure of the proxy.
            let _ = shared.serve(&stream, life);
            let _ = stream.shutdown(Shutdown::Both);
            lock(&shared.open).clients.remove(&number);
        });
        true
    }

    /// Answers requests on one connection until either side is done.
    fn serve(&self, stream: &TcpStream, life: u64) -> Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = Head::read(&mut reader)? {
            if !self.answer(&request, stream, life)? {
                break;
            }
        }
        Ok(())
    }

    /// Answers one request; whether the connection can take another.
    fn answer(&self, request: &Head, client: &TcpStream, life: u64) -> Result<bool> {
        let mut words = request.first.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let path = words.next().unwrap_or_default().to_owned();
        lock(&self.asked).push(path.clone());
        let range = request.get("range").map(str::to_owned);
        let strike = lock(&self.schedule).strike(&path, range.is_some());
        let mut answer = Answer {
            shared: self,
            client,
            life,
            touched: false,
            seen: Seen {
                method,
                path,
                range,
                authorized: request.get("authorization").is_some(),
                status: 0,
                bytes: 0,
            },
        };
        let outcome = answer.give(request, &strike);
        if matches!(strike.fault, Some(Fault::Tamper(_))) && !answer.touched {
            lock(&self.schedule).missed(&strike);
        }
        lock(&self.seen).push(answer.seen);
        outcome
    }
}

/// One answer.
struct Answer<'a> {
    shared: &'a Shared,
    client: &'a TcpStream,
    life: u64,
    /// Whether the byte to be tampered with was among those sent.
    touched: bool,
    seen: Seen,
}

impl Answer<'_> {
    fn give(&mut self, request: &Head, strike: &Strike) -> Result<bool> {
        if self.seen.method != "GET" && self.seen.method != "HEAD" {
            self.head(405, "Connection: close\r\n", "")?;
            return Ok(false);
        }
        if !strike.delay.is_zero() {
            std::thread::sleep(strike.delay);
        }
        match &strike.fault {
            Some(Fault::Close) => return Ok(false),
            Some(Fault::Status(status, headers)) => {
                self.head(*status, headers, "")?;
                return Ok(true);
            }
            Some(Fault::Redirect { to, query }) => {
                let path = &self.seen.path;
                let joint = if path.contains('?') { '&' } else { '?' };
                let location = format!("Location: http://{to}{path}{joint}{query}\r\n");
                self.head(307, &location, "")?;
                return Ok(true);
            }
            _ => {}
        }
        let (token, challenge) = {
            let mut gate = lock(&self.shared.gate);
            let token = gate.token(&self.seen.path);
            (token, gate.challenge(request, &self.shared.host))
        };
        if let Some(token) = token {
            self.head(200, "", &token)?;
            return Ok(true);
        }
        if let Some(challenge) = challenge {
            self.head(401, &format!("WWW-Authenticate: {challenge}\r\n"), "")?;
            return Ok(true);
        }
        self.forward(request, strike)
    }

    /// An answer of the proxy's own.
    fn head(&mut self, status: u16, headers: &str, body: &str) -> Result<()> {
        self.seen.status = status;
        let mut client = self.client;
        let length = body.len();
        write!(
            client,
            "HTTP/1.1 {status} Told\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        )?;
        Ok(())
    }

    fn forward(&mut self, request: &Head, strike: &Strike) -> Result<bool> {
        let upstream = &self.shared.upstream;
        let fault = strike.fault.as_ref();
        let mut connection = TcpStream::connect(upstream)?;
        let mut head = format!("{} {} HTTP/1.1\r\n", self.seen.method, self.seen.path);
        for (name, value) in &request.headers {
            let dropped = ["connection", "host", "authorization"].contains(&name.as_str())
                || (name == "range" && fault == Some(&Fault::IgnoreRange));
            if !dropped {
                head += &format!("{name}: {value}\r\n");
            }
        }
        head += &format!("host: {upstream}\r\nconnection: close\r\n\r\n");
        connection.write_all(head.as_bytes())?;
        let mut connection = BufReader::new(connection);
        let answer = Head::read(&mut connection)?.context("the registry gave no answer")?;
        self.seen.status = answer
            .first
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .context("the registry's answer has no status")?;

        let mut body: Box<dyn Read> = Box::new(connection);
        let mut length = answer.get("content-length").map(str::to_owned);
        if let Some(Fault::Replace(bytes)) = fault {
            length = Some(bytes.len().to_string());
            body = Box::new(std::io::Cursor::new(bytes.clone()));
        }
        let mut head = format!("{}\r\n", answer.first);
        for (name, value) in &answer.headers {
            if !["connection", "content-length", "transfer-encoding"].contains(&name.as_str()) {
                head += &format!("{name}: {value}\r\n");
            }
        }
        // Without a length the end of the connection is the end of the body;
        // the registry sends lengths for all that is fetched here.
        match &length {
            Some(length) => head += &format!("content-length: {length}\r\n\r\n"),
            None => bail!("the registry's answer has no length"),
        }
        let mut client = self.client;
        client.write_all(head.as_bytes())?;
        if self.seen.method == "HEAD" {
            return Ok(true);
        }

        // `bytes 100-199/1000` starts at byte 100 of the blob.
        let start: u64 = answer
            .get("content-range")
            .and_then(|range| {
                range
                    .strip_prefix("bytes ")?
                    .split_once('-')?
                    .0
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        self.copy_body(&mut *body, start, strike)
    }

    fn copy_body(&mut self, body: &mut dyn Read, start: u64, strike: &Strike) -> Result<bool> {
        let limit = match strike.fault {
            Some(Fault::Truncate(bytes) | Fault::Stall(bytes) | Fault::Reset(bytes)) => bytes,
            _ => u64::MAX,
        };
        let mut client = self.client;
        let mut body = body.take(limit);
        let piece = if strike.pause.is_zero() { 64 } else { 4 };
        let mut buffer = vec![0; piece << 10];
        loop {
            let count = body.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let piece = &mut buffer[..count];
            if let Some(Fault::Tamper(offset)) = strike.fault {
                let inside = offset.checked_sub(start + self.seen.bytes);
                if let Some(byte) = inside
                    .and_then(|inside| usize::try_from(inside).ok())
                    .and_then(|inside| piece.get_mut(inside))
                {
                    *byte ^= 0xff;
                    self.touched = true;
                }
            }
            client.write_all(piece)?;
            self.seen.bytes += count as u64;
            if !strike.pause.is_zero() {
                std::thread::sleep(strike.pause);
            }
        }
        match strike.fault {
            Some(Fault::Truncate(_)) => Ok(false),
            Some(Fault::Reset(_)) => {
                // This is how a reset is sent while there are other handles
                // of the socket.
                connect_unspec(client)?;
                Ok(false)
            }
            Some(Fault::Stall(_)) => {
                self.stall()?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Says nothing until the client or the proxy goes.
    fn stall(&self) -> Result<()> {
        self.client
            .set_read_timeout(Some(Duration::from_millis(1)))?;
        let mut open = lock(&self.shared.open);
        while open.life == self.life {
            let waited = self.shared.closed.wait_timeout(open, LOOK);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            match self.client.peek(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            open = lock(&self.shared.open);
        }
        Ok(())
    }
}
