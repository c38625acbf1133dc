//! A registry that misbehaves: an HTTP proxy in front of a good one, which
//! breaks chosen answers and counts everything.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};

/// What goes wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// An error status instead of the answer, with extra header lines.
    Status(u16, &'static str),
    /// The whole blob with status 200, whatever range was asked for.
    IgnoreRange,
    /// The right head, then only so many bytes of the body.
    Truncate(u64),
    /// The right head, so many bytes, then silence until the proxy ends.
    Stall(u64),
    /// The connection closed without an answer.
    Close,
    /// The byte at this offset of the blob inverted. Answers without that
    /// byte do not count.
    Tamper(u64),
    /// The whole body replaced, with its length in the head.
    Replace(Vec<u8>),
}

/// A fault, where and how often.
#[derive(Debug, Clone)]
struct Rule {
    number: u64,
    part_of_path: String,
    ranged_only: bool,
    remaining: u64,
    fault: Fault,
}

/// One request that came, and what was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// GET or HEAD.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// The range asked for, as written.
    pub range: Option<String>,
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
    rules: Mutex<Vec<Rule>>,
    asked: Mutex<Vec<String>>,
    seen: Mutex<Vec<Seen>>,
    ended: AtomicBool,
    end: (Mutex<()>, Condvar),
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
            rules: Mutex::default(),
            asked: Mutex::default(),
            seen: Mutex::default(),
            ended: AtomicBool::new(false),
            end: Default::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || {
                    // A client that goes away is no failure of the proxy.
                    let _ = shared.serve(stream);
                });
            }
        });
        Ok(Self { port, shared })
    }

    /// Host and port, as references name it.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A reference to an image of the registry behind, through the proxy.
    pub fn reference(&self, image: &str) -> String {
        format!("{}/{image}", self.host())
    }

    /// Breaks the next `times` answers to requests whose path holds the text.
    pub fn fail(&self, part_of_path: &str, times: u64, fault: Fault) {
        self.add(part_of_path, false, times, fault);
    }

    /// The same, for requests with a range only.
    pub fn fail_ranges(&self, part_of_path: &str, times: u64, fault: Fault) {
        self.add(part_of_path, true, times, fault);
    }

    fn add(&self, part_of_path: &str, ranged_only: bool, times: u64, fault: Fault) {
        let mut rules = lock(&self.shared.rules);
        let number = rules.last().map_or(0, |rule| rule.number + 1);
        rules.push(Rule {
            number,
            part_of_path: part_of_path.to_owned(),
            ranged_only,
            remaining: times,
            fault,
        });
    }

    /// Behaves well from now on.
    pub fn heal(&self) {
        lock(&self.shared.rules).clear();
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
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.end.1.notify_all();
        // Wakes the listener.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

/// First line and headers of a message.
struct Head {
    first: String,
    headers: Vec<(String, String)>,
}

impl Head {
    fn read(from: &mut impl BufReadExt) -> Result<Option<Self>> {
        let Some(first) = from.line()? else {
            return Ok(None);
        };
        let mut headers = Vec::new();
        loop {
            match from.line()?.as_deref() {
                None => bail!("the head is cut short"),
                Some("") => return Ok(Some(Self { first, headers })),
                Some(line) => {
                    let (name, value) = line.split_once(':').context("a header has no colon")?;
                    headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
            }
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(header, _)| header == name)
            .map(|(_, value)| value.as_str())
    }
}

trait BufReadExt {
    fn line(&mut self) -> Result<Option<String>>;
}

impl<R: Read> BufReadExt for BufReader<R> {
    fn line(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        if self.by_ref().take(64 << 10).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
    }
}

impl Shared {
    /// Answers requests on one connection until either side is done.
    fn serve(&self, stream: TcpStream) -> Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = Head::read(&mut reader)? {
            if !self.answer(&request, &stream)? {
                stream.shutdown(Shutdown::Both)?;
                break;
            }
        }
        Ok(())
    }

    /// The first rule that fits, if any is left.
    fn fault_for(&self, path: &str, ranged: bool) -> Option<(u64, Fault)> {
        let mut rules = lock(&self.rules);
        let rule = rules.iter_mut().find(|rule| {
            rule.remaining > 0 && path.contains(&rule.part_of_path) && (ranged || !rule.ranged_only)
        })?;
        rule.remaining -= 1;
        Some((rule.number, rule.fault.clone()))
    }

    /// Gives a fault back that had no effect.
    fn return_fault(&self, number: u64) {
        if let Some(rule) = (lock(&self.rules).iter_mut()).find(|rule| rule.number == number) {
            rule.remaining += 1;
        }
    }

    /// Answers one request; whether the connection can take another.
    fn answer(&self, request: &Head, client: &TcpStream) -> Result<bool> {
        let mut words = request.first.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let path = words.next().unwrap_or_default().to_owned();
        lock(&self.asked).push(path.clone());
        let range = request.get("range").map(str::to_owned);
        let fault = self.fault_for(&path, range.is_some());
        let mut seen = Seen {
            method,
            path,
            range,
            status: 0,
            bytes: 0,
        };
        let (number, fault) = fault.unzip();
        let mut touched = false;
        let outcome = self.forward(request, client, fault.as_ref(), &mut seen, &mut touched);
        if let (Some(number), Some(Fault::Tamper(_)), false) = (number, fault, touched) {
            self.return_fault(number);
        }
        lock(&self.seen).push(seen);
        outcome
    }

    fn forward(
        &self,
        request: &Head,
        mut client: &TcpStream,
        fault: Option<&Fault>,
        seen: &mut Seen,
        touched: &mut bool,
    ) -> Result<bool> {
        if seen.method != "GET" && seen.method != "HEAD" {
            write!(
                client,
                "HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )?;
            seen.status = 405;
            return Ok(false);
        }
        match fault {
            Some(Fault::Close) => return Ok(false),
            Some(Fault::Status(status, headers)) => {
                seen.status = *status;
                write!(
                    client,
                    "HTTP/1.1 {status} Broken\r\nContent-Length: 0\r\n{headers}\r\n"
                )?;
                return Ok(true);
            }
            _ => {}
        }

        let mut upstream = TcpStream::connect(&self.upstream)?;
        let mut head = format!("{} {} HTTP/1.1\r\n", seen.method, seen.path);
        for (name, value) in &request.headers {
            let dropped = name == "connection"
                || name == "host"
                || (name == "range" && fault == Some(&Fault::IgnoreRange));
            if !dropped {
                head += &format!("{name}: {value}\r\n");
            }
        }
        head += &format!("host: {}\r\nconnection: close\r\n\r\n", self.upstream);
        upstream.write_all(head.as_bytes())?;
        let mut upstream = BufReader::new(upstream);
        let answer = Head::read(&mut upstream)?.context("the registry gave no answer")?;
        seen.status = answer
            .first
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .context("the registry's answer has no status")?;

        let mut body: Box<dyn Read> = Box::new(upstream);
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
        client.write_all(head.as_bytes())?;
        if seen.method == "HEAD" {
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
        self.copy_body(&mut *body, start, client, fault, seen, touched)
    }

    fn copy_body(
        &self,
        body: &mut dyn Read,
        start: u64,
        mut client: &TcpStream,
        fault: Option<&Fault>,
        seen: &mut Seen,
        touched: &mut bool,
    ) -> Result<bool> {
        let limit = match fault {
            Some(Fault::Truncate(bytes) | Fault::Stall(bytes)) => *bytes,
            _ => u64::MAX,
        };
        let mut body = body.take(limit);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = body.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let piece = &mut buffer[..count];
            if let Some(Fault::Tamper(offset)) = fault {
                let inside = offset.checked_sub(start + seen.bytes);
                if let Some(byte) = inside
                    .and_then(|inside| usize::try_from(inside).ok())
                    .and_then(|inside| piece.get_mut(inside))
                {
                    *byte ^= 0xff;
                    *touched = true;
                }
            }
            client.write_all(piece)?;
            seen.bytes += count as u64;
        }
        match fault {
            Some(Fault::Truncate(_)) => Ok(false),
            Some(Fault::Stall(_)) => {
                let mut guard = lock(&self.end.0);
                while !self.ended.load(Ordering::SeqCst) {
                    guard = self
                        .end
                        .1
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Ok(false)
            }
            _ => Ok(true),
        }
    }
}
