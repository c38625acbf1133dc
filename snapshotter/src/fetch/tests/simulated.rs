//! The engine over a link with a round trip and a bandwidth, in simulated time:
//! what is asked for, in which order, and whether the link is ever idle.

mod prefetch;
mod reading;

use tokio::time::{Instant, sleep, sleep_until};

use super::*;
use crate::layer_dir::ChunkId;

/// 100 Mbit/s.
const BANDWIDTH: f64 = 12.5e6;
/// Bytes that cross the link in one go: in four milliseconds, since timers know
/// no less than one.
const PACKET: u64 = 50_000;
pub(super) const CHUNK: usize = 20_000;

/// A link that all answers share, packet by packet.
#[derive(Clone)]
struct Wire(Arc<WireState>);

struct WireState {
    round_trip: Duration,
    free: Mutex<Instant>,
    busy: Mutex<Duration>,
    under_way: Mutex<(usize, usize)>,
    down: Mutex<bool>,
}

/// A request: of which layer, when, from where to where.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Asked {
    layer: usize,
    at: Duration,
    range: (u64, u64),
}

#[derive(Clone)]
struct Server {
    wire: Wire,
    layer: usize,
    blob: Arc<Vec<u8>>,
    started: Instant,
    asked: Arc<Mutex<Vec<Asked>>>,
}

struct Answer {
    server: Server,
    position: u64,
    end: u64,
    /// When the next packet is here: it is sent without being waited for, and
    /// only one is.
    there: Option<Instant>,
}

impl RangeSource for Server {
    fn range(
        &self,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'_, Result<Box<dyn RangeBody>, SourceError>> {
        self.asked.lock().push(Asked {
            layer: self.layer,
            at: self.started.elapsed(),
            range: (offset, offset + len),
        });
        {
            let mut under_way = self.wire.0.under_way.lock();
            under_way.0 += 1;
            under_way.1 = under_way.1.max(under_way.0);
        }
        let answer = Answer {
            server: self.clone(),
            position: offset,
            end: offset + len,
            there: None,
        };
        async move {
            sleep(self.wire.0.round_trip).await;
            self.up()?;
            Ok(Box::new(answer) as Box<dyn RangeBody>)
        }
        .boxed()
    }

    fn host(&self) -> &str {
        "r.example"
    }
}

impl Server {
    fn up(&self) -> Result<(), SourceError> {
        match *self.wire.0.down.lock() {
            false => Ok(()),
            true => Err(SourceError {
                message: "r.example is down".to_owned(),
                transient: true,
                retry_after: None,
            }),
        }
    }
}

impl Answer {
    fn packet_end(&self) -> u64 {
        (self.position + PACKET).min(self.end)
    }

    /// Takes the link for the next packet.
    fn send(&self) -> Instant {
        let wire = &self.server.wire.0;
        let len = self.packet_end() - self.position;
        let takes = Duration::from_secs_f64(len as f64 / BANDWIDTH);
        let mut free = wire.free.lock();
        *free = (*free).max(Instant::now()) + takes;
        *wire.busy.lock() += takes;
        *free
    }
}

impl RangeBody for Answer {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        async move {
            if self.position == self.end {
                return Ok(None);
            }
            let there = match self.there {
                Some(there) => there,
                None => *self.there.insert(self.send()),
            };
            sleep_until(there).await;
            self.server.up()?;
            let (start, end) = (self.position, self.packet_end());
            self.position = end;
            self.there = (end < self.end).then(|| self.send());
            let bytes = &self.server.blob[start as usize..end as usize];
            Ok(Some(Bytes::copy_from_slice(bytes)))
        }
        .boxed()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.server.wire.0.under_way.lock().0 -= 1;
    }
}

/// Layers of one registry.
pub(crate) struct World {
    _root: TempDir,
    wire: Wire,
    engine: Engine,
    started: Instant,
    asked: Arc<Mutex<Vec<Asked>>>,
    pub(crate) layers: Vec<Arc<LazyLayer>>,
    starts: Vec<Vec<u64>>,
}

impl World {
    pub(crate) fn new(round_trip: u64, samples: &[Sample]) -> Self {
        let config = Config {
            decoders: 2,
            ..Config::default()
        };
        let root = tempfile::tempdir().unwrap();
        let engine = Engine::new(config, tokio::runtime::Handle::current());
        let started = Instant::now();
        let wire = Wire(Arc::new(WireState {
            round_trip: Duration::from_millis(round_trip),
            free: Mutex::new(started),
            busy: Mutex::default(),
            under_way: Mutex::default(),
            down: Mutex::new(false),
        }));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (layers, starts) = (0..)
            .zip(samples)
            .map(|(layer, sample)| {
                let server = Server {
                    wire: wire.clone(),
                    layer,
                    blob: Arc::new(sample.blob.clone()),
                    started,
                    asked: Arc::clone(&asked),
                };
                let path = make(root.path(), sample).unwrap();
                let dir = LayerDir::open(&path, sample.digest()).unwrap();
                let lazy = LazyLayer::new(dir, Box::new(server), &engine, Box::new(|_| None));
                let mut end = 0;
                let starts = sample.files.iter().map(|file| {
                    let start = end;
                    end += (file.content.len() as u64).next_multiple_of(4096);
                    start
                });
                (lazy, starts.collect())
            })
            .unzip();
        Self {
            _root: root,
            wire,
            engine,
            started,
            asked,
            layers,
            starts,
        }
    }

    /// The chunks of a file.
    pub(super) fn chunks(&self, layer: usize, file: usize) -> Vec<ChunkId> {
        let table = self.layers[layer].dir().chunks();
        let first = table.overlapping(self.starts[layer][file], 1).next();
        let first = first.unwrap();
        std::iter::once(first)
            .chain(table.after(first))
            .take_while(|&chunk| chunk == first || !table.get(chunk).starts_file)
            .collect()
    }

    fn unit(&self, layer: usize, file: usize) -> sluice_layer::Unit {
        let table = self.layers[layer].dir().chunks();
        table.get(self.chunks(layer, file)[0]).unit
    }

    /// Compressed bytes of all units.
    pub(super) fn all_bytes(&self, layer: usize) -> u64 {
        let table = self.layers[layer].dir().chunks();
        table.units_from(0).map(|unit| unit.size).sum()
    }

    async fn until(&self, condition: impl Fn() -> bool) {
        let limit = Instant::now() + Duration::from_secs(100);
        while !condition() {
            assert!(Instant::now() < limit, "it never comes");
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn order(&self, layer: usize, files: impl IntoIterator<Item = usize>) -> Arc<[ChunkId]> {
        files
            .into_iter()
            .flat_map(|file| self.chunks(layer, file))
            .collect()
    }

    /// Reads as the kernel does, up to 128 KiB at a time.
    pub(crate) async fn read(&self, layer: usize, offset: u64, len: u64) {
        let lazy = &self.layers[layer];
        for at in (offset..offset + len).step_by(128 << 10) {
            let len = (offset + len - at).min(128 << 10);
            if !lazy.try_read(at, &mut vec![0; len as usize]).unwrap() {
                let missing = Arc::clone(lazy).read_missing(at, len as usize);
                missing.await.unwrap();
                assert!(lazy.try_read(at, &mut vec![0; len as usize]).unwrap());
            }
        }
    }

    pub(crate) async fn read_file(&self, layer: usize, file: usize) {
        let chunks = self.chunks(layer, file);
        let table = self.layers[layer].dir().chunks();
        let start = table.get(chunks[0]).data_offset;
        let end = table.get(*chunks.last().unwrap()).data_end();
        self.read(layer, start, end - start).await;
    }

    pub(crate) fn present(&self, layer: usize, files: impl IntoIterator<Item = usize>) -> bool {
        let present = self.layers[layer].dir().present();
        let order = self.order(layer, files);
        order.iter().all(|&chunk| present.contains(chunk))
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }

    pub(crate) fn bytes(&self) -> u64 {
        let asked = self.asked.lock();
        asked
            .iter()
            .map(|asked| asked.range.1 - asked.range.0)
            .sum()
    }

    /// The part of the time so far in which the link carried bytes.
    fn busy(&self) -> f64 {
        self.wire.0.busy.lock().as_secs_f64() / self.started.elapsed().as_secs_f64()
    }
}

/// Small files, one chunk each.
pub(super) fn small_files(count: usize) -> Sample {
    let layout = Layout {
        chunk: CHUNK,
        ..Layout::default()
    };
    Sample::new(files(count, CHUNK), &layout)
}

pub(super) fn one_file(size: usize, chunk: usize) -> Sample {
    let file = SampleFile {
        name: "large".to_owned(),
        content: noise(5, size),
    };
    let layout = Layout {
        chunk,
        ..Layout::default()
    };
    Sample::new(vec![file], &layout)
}

/// Every number below `count` once, far from the one before.
pub(super) fn scattered(count: usize) -> impl Iterator<Item = usize> + Clone {
    (0..count).map(move |index| index * 7919 % count)
}
