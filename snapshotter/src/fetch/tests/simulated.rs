//! The engine over a link with a round trip and a bandwidth, in simulated time:
//! what is asked for, in which order, and whether the link is ever idle.

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
    fn chunks(&self, layer: usize, file: usize) -> Vec<ChunkId> {
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

#[tokio::test(start_paused = true)]
async fn a_plan_keeps_the_link_busy_in_its_order() {
    let sample = small_files(301);
    for (round_trip, least) in [(1, 0.95), (20, 0.9), (100, 0.7)] {
        let world = World::new(round_trip, std::slice::from_ref(&sample));
        let order = world.order(0, scattered(301).take(250));
        world.layers[0].judge_plan(true);
        let _handle = world.layers[0].prefetch(Plan::Order(order.clone()));
        let present = world.layers[0].dir().present();
        let mut early = 0;
        while present.count() < 250 {
            sleep(Duration::from_millis(1)).await;
            let missing = order.iter().position(|&chunk| !present.contains(chunk));
            early = early.max(present.count() as usize - missing.unwrap_or(250));
        }
        let requests = world.asked().len();
        let overhead = world.bytes() as f64 / (250.0 * CHUNK as f64);
        let seen = format!(
            "{round_trip} ms: {requests} requests, {:.2} busy, {overhead:.2} of the bytes, {early} early",
            world.busy()
        );
        assert!(world.present(0, scattered(301).take(250)));
        // The first round trip is spent waiting, whatever is done.
        assert!(world.busy() > least, "{seen}");
        assert!(overhead < 1.4, "{seen}");
        // What is needed in two pieces' time may come early, and what is on
        // its way.
        let link = world.layers[0].link();
        let together = link.piece() * 2 + link.outstanding() + link.piece();
        assert!(early as u64 * CHUNK as u64 <= together + PACKET, "{seen}");
    }
}

#[tokio::test(start_paused = true)]
async fn readers_ahead_of_a_plan_that_fits_do_not_stop_it() {
    let world = World::new(100, &[small_files(301)]);
    let files: Vec<usize> = scattered(301).take(250).collect();
    let order = world.order(0, files.iter().copied());
    let _handle = world.layers[0].prefetch(Plan::Order(order));
    for &file in files.iter().rev().take(10) {
        world.read_file(0, file).await;
    }
    // A second, in which as much came as the link carries.
    let present = world.layers[0].dir().present().count();
    assert!(present > 100, "{present}");
}

#[tokio::test(start_paused = true)]
async fn readers_wait_for_what_is_on_its_way_and_jump_what_is_not() {
    let world = World::new(20, &[small_files(301)]);
    world.layers[0].judge_plan(true);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..300)));
    sleep(Duration::from_millis(25)).await;
    world.read_file(0, 3).await;
    let asked = world.asked();
    assert_eq!(asked.iter().filter(|asked| asked.range.0 == 0).count(), 1);
    assert!(asked.iter().all(|asked| asked.at.is_zero()), "{asked:?}");
    let before = world.started.elapsed();
    assert!(!world.present(0, [250]));
    let jumped = world.unit(0, 250).offset;
    world.read_file(0, 250).await;
    let own = world
        .asked()
        .into_iter()
        .find(|asked| asked.range.0 == jumped);
    assert_eq!(own.expect("it has its own").at, before, "and at once");
    assert!(!world.present(0, [200]), "before its turn");
    world.until(|| world.present(0, 0..300)).await;
    let requests = world.asked().len();
    assert!(requests <= 20, "{requests}");
    // Nothing is fetched twice but small gaps.
    let whole: u64 = world.unit(0, 300).offset;
    assert!(
        world.bytes() < whole + whole / 20,
        "{} of {whole}",
        world.bytes()
    );
}

#[tokio::test(start_paused = true)]
async fn a_prefetch_gives_way_to_readers_and_still_gets_on() {
    let sample = small_files(600);
    // Far apart, so that none helps another.
    let reads = (330..600).step_by(14);
    let mut took = Vec::new();
    for plan in [0..0, 0..300] {
        let world = World::new(20, std::slice::from_ref(&sample));
        let order = world.order(0, plan);
        let _handle = world.layers[0].prefetch(Plan::Order(order));
        let started = Instant::now();
        for file in reads.clone() {
            world.read_file(0, file).await;
        }
        took.push(started.elapsed().as_secs_f64());
        let ahead = (0..300).filter(|&file| world.present(0, [file])).count();
        assert!(ahead < 200, "{ahead} files came while readers waited");
        world
            .until(|| world.present(0, 0..took.len() / 2 * 40))
            .await;
    }
    assert!(took[1] < took[0] * 1.15, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_does_not_fit_is_given_up_until_it_does() {
    let world = World::new(20, &[small_files(1200)]);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..600)));
    let ahead = || (0..600).filter(|&file| world.present(0, [file])).count();
    for file in (610..1200).step_by(14) {
        world.read_file(0, file).await;
        sleep(Duration::from_millis(2)).await;
    }
    sleep(Duration::from_secs(1)).await;
    let given_up = ahead();
    assert!(given_up < 300, "{given_up}");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(ahead(), given_up, "nothing is fetched for nobody");
    for file in 0..8 {
        world.read_file(0, file).await;
    }
    world.until(|| ahead() == 600).await;
}

#[tokio::test(start_paused = true)]
async fn regression_readers_do_not_wait_with_prefetches_that_may_not_ask() {
    let world = World::new(20, &[small_files(20)]);
    let admission = world.engine.admission();
    let mut held = Vec::new();
    while let Some(permit) = admission.admit(Priority::Prefetch, 1).now_or_never() {
        held.push(permit);
    }
    world.layers[0].fetch_again(&world.chunks(0, 7));
    sleep(Duration::from_secs(10)).await;
    assert!(
        world.asked().is_empty(),
        "prefetches hold all they may have"
    );
    let reading = world.read_file(0, 7);
    let read = tokio::time::timeout(Duration::from_secs(1), reading).await;
    assert!(read.is_ok() && world.asked().len() == 1);
}

#[tokio::test(start_paused = true)]
async fn a_plan_in_doubt_is_followed_a_little_way() {
    let world = World::new(20, &[small_files(300), small_files(301)]);
    let [doubtful, fitting] = [0, 1].map(|layer| &world.layers[layer]);
    let come = |layer: &Arc<LazyLayer>| layer.dir().present().count() as u64 * CHUNK as u64;
    let _handle = doubtful.prefetch(Plan::Order(world.order(0, 0..300)));
    sleep(Duration::from_millis(300)).await;
    let before = come(doubtful);
    let (most, piece) = (doubtful.link().doubtful(), doubtful.link().doubtful_piece());
    assert!((most / 2..most + piece).contains(&before), "{before}");
    // It may be of something else, while another one is known not to be.
    doubtful.judge_plan(false);
    fitting.judge_plan(true);
    let _other = fitting.prefetch(Plan::Order(world.order(1, 0..300)));
    world.until(|| world.present(1, 0..300)).await;
    assert_eq!(come(doubtful), before);
    doubtful.judge_plan(true);
    world.until(|| world.present(0, 0..300)).await;
}

#[tokio::test(start_paused = true)]
async fn a_plan_goes_on_where_nothing_starts() {
    let world = World::new(20, &[small_files(300)]);
    // Nor does it wait for ever for a table of contents that does not come.
    let _table = world.layers[0].link().expect_table(1 << 30);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..300)));
    sleep(Duration::from_millis(300)).await;
    assert!(world.asked().is_empty());
    world.until(|| world.present(0, 0..300)).await;
}

#[tokio::test(start_paused = true)]
async fn layers_come_in_the_order_of_need() {
    let samples = [small_files(200), small_files(201)];
    let world = World::new(20, &samples);
    // The second layer's files are needed first, and the first one's last.
    let timed = |layer, after: u64| -> Plan {
        let order = world.order(layer, 0..200);
        let at = |index| Duration::from_millis(after + index);
        Plan::Timed((0..).zip(order.iter()).map(|(i, &c)| (c, at(i))).collect())
    };
    for layer in &world.layers {
        layer.judge_plan(true);
    }
    let _late = world.layers[0].prefetch(timed(0, 1000));
    let _early = world.layers[1].prefetch(timed(1, 0));
    world.until(|| world.present(1, 0..200)).await;
    let late = (0..200).filter(|&file| world.present(0, [file])).count();
    // One was under way when the other came, and one keeps the link busy.
    let early = 2 * world.layers[0].link().piece() / CHUNK as u64;
    assert!(late as u64 <= early + 1, "{late} came too early");
    world.until(|| world.present(0, 0..200)).await;
}

#[tokio::test(start_paused = true)]
async fn a_sequential_reader_keeps_the_link_busy() {
    let size = 24_000_000;
    let sample = one_file(size, 256 << 10);
    for (round_trip, least) in [(0, 0.95), (20, 0.9), (100, 0.75)] {
        let world = World::new(round_trip, std::slice::from_ref(&sample));
        world.read(0, 0, size as u64).await;
        let seen = format!(
            "{round_trip} ms: {} requests, {:.2} busy",
            world.asked().len(),
            world.busy()
        );
        // It takes some round trips to see that it is one.
        assert!(world.busy() > least, "{seen}");
        assert!(world.asked().len() < 40, "{seen}");
        assert_eq!(world.bytes(), world.all_bytes(0), "each byte once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_download_gets_on_a_little_while_readers_wait() {
    let world = World::new(30, &[small_files(300)]);
    let reader = world.engine.demand();
    let _handle = world.layers[0].download(Duration::ZERO, async {});
    let present = || world.layers[0].dir().present().count();
    sleep(Duration::from_secs(20)).await;
    let before = present();
    assert!((1..100).contains(&before), "{before}");
    sleep(Duration::from_secs(20)).await;
    assert!(present() > before);
    drop(reader);
    let went_on = Instant::now();
    let left = f64::from(300 - present()) * CHUNK as f64;
    world.until(|| world.layers[0].dir().is_complete()).await;
    assert_eq!(world.asked().len(), 1, "the same request went on");
    let busy = left / BANDWIDTH / went_on.elapsed().as_secs_f64();
    assert!(busy > 0.8, "{busy}");
}

#[tokio::test(start_paused = true)]
async fn a_download_goes_on_after_an_outage_of_hours() {
    let world = World::new(30, &[small_files(300)]);
    let down = |down| *world.wire.0.down.lock() = down;
    let present = || world.layers[0].dir().present().count();
    let _handle = world.layers[0].download(Duration::ZERO, async {});
    world.until(|| present() > 10).await;
    down(true);
    let before = world.asked().len();
    sleep(Duration::from_secs(3600)).await;
    let stopped = present();
    assert!(stopped < 300, "{stopped}");
    // In the deadline's five minutes every five seconds, then ever more rarely.
    let tries = world.asked().len() - before;
    assert!((60..90).contains(&tries), "{tries}");
    // A reader that comes first shares its bytes.
    down(false);
    world.read_file(0, 299).await;
    assert!(present() > stopped);
    let back = Instant::now();
    while !world.layers[0].dir().is_complete() {
        sleep(Duration::from_secs(1)).await;
        assert!(
            back.elapsed() < Duration::from_secs(700),
            "it is not resumed"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_waits_for_minutes_and_no_longer_than_the_deadline() {
    let world = World::new(30, &[small_files(20)]);
    let down = |down| *world.wire.0.down.lock() = down;
    down(true);
    let layer = Arc::clone(&world.layers[0]);
    let offset = world.starts[0][7];
    let mut reader = Box::pin(Arc::clone(&layer).read_missing(offset, 100));
    let early = tokio::time::timeout(Duration::from_secs(290), &mut reader).await;
    assert!(early.is_err(), "it waits");
    down(false);
    assert_eq!(reader.await.unwrap().len(), 100);

    down(true);
    let (since, offset) = (Instant::now(), world.starts[0][19]);
    let failed = Arc::clone(&layer).read_missing(offset, 100).await;
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    let waited = since.elapsed().as_secs();
    assert!((299..=301).contains(&waited), "{waited} s");
    // The next read tries again, and for as long.
    let mut reader = Box::pin(layer.read_missing(offset, 100));
    let early = tokio::time::timeout(Duration::from_secs(200), &mut reader).await;
    assert!(early.is_err(), "it waits");
    down(false);
    assert_eq!(reader.await.unwrap().len(), 100);
}
