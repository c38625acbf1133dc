//! A link of chosen bandwidth and latency in front of a registry.
//!
//! A queue that drops what does not fit starves one of several streams, by
//! chance, and not every kernel has a fair one. So the link is a proxy: bytes
//! take half a round trip in each direction, a connection costs one round trip
//! before its first byte, and what comes back is paced, piece by piece in turn,
//! so that streams share the bandwidth evenly. Slow start is not modelled.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

/// What streams take turns with. Small beside what one sends in a round trip.
const PIECE: usize = 16 << 10;
/// Pieces of one connection that are on their way, as a receive window of
/// 8 MiB allows.
const WINDOW: usize = 512;
/// Below this the timer is too coarse to wait.
const TICK: Duration = Duration::from_millis(1);

/// How a link is shaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Megabits a second.
    pub mbit: u64,
    /// Milliseconds of a round trip.
    pub round_trip_ms: u64,
}

impl Shape {
    /// Bytes a second.
    pub fn bytes_per_second(self) -> f64 {
        self.mbit as f64 * 1e6 / 8.0
    }

    fn one_way(self) -> Duration {
        Duration::from_micros(self.round_trip_ms * 500)
    }
}

/// One request and its answer, in seconds since the link was reset.
#[derive(Debug, Clone, Serialize)]
pub struct Transfer {
    /// Which connection, counted from 0.
    pub connection: usize,
    /// Method and path.
    pub request: String,
    /// The range asked for, as written.
    pub range: Option<String>,
    /// When the request was sent.
    pub sent: f64,
    /// When the first byte of the answer arrived.
    pub first: Option<f64>,
    /// When the last byte so far arrived.
    pub last: f64,
    /// Bytes that arrived, head included.
    pub bytes: u64,
}

impl Transfer {
    /// First and last byte of the range asked for, where it names both.
    pub fn span(&self) -> Option<(u64, u64)> {
        let range = self.range.as_deref()?.strip_prefix("bytes=")?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }

    /// When its first `count` bytes had arrived, if they have: they are taken
    /// to have come evenly.
    pub fn arrival(&self, count: u64) -> Option<f64> {
        let first = self.first.filter(|_| count <= self.bytes)?;
        let part = count as f64 / self.bytes.max(1) as f64;
        Some(first + (self.last - first) * part)
    }
}

/// The link. It ends with the process.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: SocketAddr,
    shape: Mutex<Shape>,
    /// When the wire is free again. Waiting for the lock is waiting in turn.
    free: tokio::sync::Mutex<Instant>,
    bytes: AtomicU64,
    log: Mutex<Log>,
    /// Connections end when it changes.
    resets: watch::Sender<u64>,
}

struct Log {
    since: Instant,
    connections: usize,
    transfers: Vec<Transfer>,
}

impl Link {
    /// In front of a registry; needs a runtime that goes on.
    pub async fn start(upstream: SocketAddr, shape: Shape) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            shape: Mutex::new(shape),
            free: tokio::sync::Mutex::new(Instant::now()),
            bytes: AtomicU64::new(0),
            log: Mutex::new(Log {
                since: Instant::now(),
                connections: 0,
                transfers: Vec::new(),
            }),
            resets: watch::Sender::new(0),
        });
        let accepting = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = Arc::clone(&accepting);
                // A client that goes away is no failure of the link.
                tokio::spawn(async move { drop(shared.connect(client).await) });
            }
        });
        Ok(Self { address, shared })
    }

    /// The near end, as references name it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Shapes it anew, forgets what was transferred, starts its clock and ends
    /// all connections: those that a client has kept cost nothing any more.
    pub fn reset(&self, shape: Shape) {
        self.shared.resets.send_modify(|resets| *resets += 1);
        *self.shared.shape.lock() = shape;
        self.shared.bytes.store(0, Ordering::Relaxed);
        *self.shared.log.lock() = Log {
            since: Instant::now(),
            connections: 0,
            transfers: Vec::new(),
        };
    }

    /// Bytes that came through since.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Requests since, in the order in which they were sent.
    pub fn transfers(&self) -> Vec<Transfer> {
        self.shared.log.lock().transfers.clone()
    }
}

impl Shared {
    async fn connect(self: Arc<Self>, client: TcpStream) -> Result<()> {
        let mut resets = self.resets.subscribe();
        let shape = *self.shape.lock();
        let opened = Instant::now();
        client.set_nodelay(true)?;
        let server = TcpStream::connect(self.upstream)
            .await
            .with_context(|| format!("cannot reach {}", self.upstream))?;
        server.set_nodelay(true)?;
        let connection = {
            let mut log = self.log.lock();
            log.connections += 1;
            log.connections - 1
        };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        // The handshake: nothing is sent before its round trip is over.
        let established = opened + shape.one_way() * 2;
        let (up, up_line) = mpsc::channel(WINDOW);
        let (down, down_line) = mpsc::channel(WINDOW);
        // Each ends when what it reads from does.
        let all = async {
            tokio::join!(
                self.requests(from_client, up, connection, established),
                deliver(up_line, to_server),
                self.answers(from_server, down, connection),
                deliver(down_line, to_client),
            )
        };
        tokio::select! {
            _ = all => {}
            _ = resets.changed() => {}
        }
        Ok(())
    }

    async fn requests(
        &self,
        mut from: OwnedReadHalf,
        line: mpsc::Sender<(Instant, Vec<u8>)>,
        connection: usize,
        established: Instant,
    ) {
        let mut head = Vec::new();
        let mut buffer = vec![0; PIECE];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            head.extend_from_slice(&buffer[..count]);
            // Pulls send no bodies, so all that comes is heads.
            while let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
                self.note_request(&head[..end], connection);
                head.drain(..end + 4);
            }
            let due = Instant::now().max(established) + self.shape.lock().one_way();
            if line.send((due, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    }

    async fn answers(
        &self,
        mut from: OwnedReadHalf,
        line: mpsc::Sender<(Instant, Vec<u8>)>,
        connection: usize,
    ) {
        let mut buffer = vec![0; PIECE];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            self.pace(count).await;
            let due = Instant::now() + self.shape.lock().one_way();
            self.note_answer(count, connection, due);
            if line.send((due, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    }

    /// Waits until the wire has carried so many bytes.
    async fn pace(&self, count: usize) {
        let rate = self.shape.lock().bytes_per_second();
        let mut free = self.free.lock().await;
        // What a timer overslept is caught up with; an idle wire is not.
        let earliest = Instant::now() - TICK * 2;
        *free = (*free).max(earliest) + Duration::from_secs_f64(count as f64 / rate);
        if *free > Instant::now() + TICK {
            sleep_until(*free).await;
        }
    }

    fn note_request(&self, head: &[u8], connection: usize) {
        let head = String::from_utf8_lossy(head);
        let mut lines = head.lines();
        let first = lines.next().unwrap_or_default();
        let request = first.strip_suffix(" HTTP/1.1").unwrap_or(first).to_owned();
        let range = lines
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("range"))
            .map(|(_, value)| value.trim().to_owned());
        let mut log = self.log.lock();
        let sent = log.since.elapsed().as_secs_f64();
        log.transfers.push(Transfer {
            connection,
            request,
            range,
            sent,
            first: None,
            last: sent,
            bytes: 0,
        });
    }

    fn note_answer(&self, count: usize, connection: usize, due: Instant) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        let mut log = self.log.lock();
        let at = due.saturating_duration_since(log.since).as_secs_f64();
        let mut latest = log.transfers.iter_mut().rev();
        if let Some(transfer) = latest.find(|transfer| transfer.connection == connection) {
            transfer.first.get_or_insert(at);
            transfer.last = at;
            transfer.bytes += count as u64;
        }
    }
}

/// Hands on what is due. Ends, and closes the far side, with the sender.
async fn deliver(mut line: mpsc::Receiver<(Instant, Vec<u8>)>, mut to: OwnedWriteHalf) {
    while let Some((due, bytes)) = line.recv().await {
        // Timers count in milliseconds, so not for nothing.
        if due > Instant::now() {
            sleep_until(due).await;
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
