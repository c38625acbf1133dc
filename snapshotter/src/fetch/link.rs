//! What the link to a host is like, measured while it is used.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::pace::{Due, Pace, Share, Turn};

/// Before anything was measured: a registry not far away.
const INITIAL_ROUND_TRIP: Duration = Duration::from_millis(10);
const INITIAL_BANDWIDTH: f64 = 12.5e6;
/// Bandwidth is taken over at least this long.
const SAMPLE: Duration = Duration::from_millis(50);
/// A transfer that ends earlier than that still says something once it has
/// taken this long and brought so much.
const SHORT_SAMPLE: Duration = Duration::from_millis(5);
const SHORT_BYTES: u64 = 64 << 10;
/// So many samples are looked back on.
const SAMPLES: usize = 8;
/// The shortest answer within this time is the round trip. Routes change, so
/// not for ever.
const ROUND_TRIP_MEMORY: Duration = Duration::from_secs(30);
/// Whatever the link, a gap of this many bytes is not worth a request of its
/// own, and one of more than the second is.
const SMALLEST_GAP: u64 = 16 << 10;
const LARGEST_GAP: u64 = 512 << 10;
/// Requests that are under way at once where nobody waits for a single one.
const PARALLEL: u64 = 16;
/// One range of a stream takes about this long, or two round trips. A reader
/// that waits for its last byte waits no longer.
const PIECE: Duration = Duration::from_millis(50);
const SMALLEST_PIECE: u64 = 256 << 10;
/// As much as an HTTP/2 answer may have on its way before it is read: of a
/// longer one, the rest would take another round trip.
const LARGEST_PIECE: u64 = 4 << 20;
/// Of what may not be needed, so much is fetched before that is known, in so
/// many pieces. Over a longer round trip than this, all of it is: processors
/// wait anyway, and what is not asked for then costs another round trip.
const DOUBTFUL: u64 = 1 << 20;
const DOUBTFUL_PIECES: u64 = 4;
const FAR: Duration = Duration::from_millis(60);
/// A miss costs so much even where the registry is next door: requests,
/// decoding, and a link that is idle until the reader goes on.
const LEAST_MISS: Duration = Duration::from_millis(5);
/// Over a faster link bytes are no cheaper: a processor verifies and stores
/// about so many compressed bytes a second, and the program needs it as well.
const DIGESTED: f64 = 60e6;
/// A sequential reader may be busy with something else for about this long.
const WINDOW: Duration = Duration::from_millis(500);
/// How much earlier than needed the next range is asked for: what registries
/// and schedulers vary by.
const SLACK: Duration = Duration::from_millis(10);
const LEAST_OUTSTANDING: u64 = 128 << 10;
/// A larger table of contents is waited for no longer, in bytes.
const LARGEST_TABLE: u64 = 1 << 30;

/// What is known of a link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkFigures {
    /// Round-trip time.
    pub round_trip: Duration,
    /// Bytes a second.
    pub bandwidth: u64,
}

/// Round-trip time and bandwidth to one host.
#[derive(Debug, Default)]
pub struct Link {
    state: Mutex<State>,
    pace: Pace,
}

#[derive(Debug, Default)]
struct State {
    /// The shortest waits for an answer in this and in the former period.
    shortest: [Option<Duration>; 2],
    /// The round trip, where none was measured.
    supposed: Option<Duration>,
    period: Option<Instant>,
    /// Bytes a second.
    samples: VecDeque<f64>,
    /// Answers that are being received, those left out that are paused.
    receiving: u32,
    sample: Option<Sample>,
}

/// Bandwidth being measured.
#[derive(Debug, Clone, Copy)]
struct Sample {
    since: Instant,
    bytes: u64,
}

impl Link {
    /// An answer began `waited` after its request was sent.
    pub fn answered(&self, waited: Duration) {
        self.measure(|state| state.answered(waited));
    }

    /// About how long a round trip takes, for as long as nothing was measured.
    pub fn suppose(&self, round_trip: Duration) {
        self.measure(|state| state.supposed = Some(round_trip));
    }

    /// Notes what was measured, and has the pace follow it.
    fn measure(&self, note: impl FnOnce(&mut State)) {
        note(&mut self.state.lock());
        self.pace.set_limit(self.outstanding());
    }

    /// A table of contents of about so many bytes is asked for. They are measured
    /// as they come, and come before the content of layers that are not open.
    pub fn expect_table(self: &Arc<Self>, bytes: u64) -> ExpectedTable {
        ExpectedTable {
            // What an image says of it is not checked yet.
            turn: self.pace.table(bytes.min(LARGEST_TABLE)),
            receiving: self.receive(),
        }
    }

    /// An answer's body is going to be received, until the guard is dropped.
    pub(super) fn receive(self: &Arc<Self>) -> Receiving {
        Receiving {
            link: Arc::clone(self),
            active: false,
            behind: true,
        }
    }

    /// Bytes that come in a second while anything is asked for.
    pub fn bandwidth(&self) -> f64 {
        self.state.lock().bandwidth()
    }

    /// Time from a request to the first byte of its answer.
    pub fn round_trip(&self) -> Duration {
        self.state.lock().round_trip()
    }

    /// What was measured, or is supposed until something was.
    pub fn figures(&self) -> LinkFigures {
        let state = self.state.lock();
        LinkFigures {
            round_trip: state.round_trip(),
            bandwidth: state.bandwidth() as u64,
        }
    }

    /// Bytes that arrive in `time`.
    fn bytes_in(&self, time: impl Fn(Duration) -> Duration) -> u64 {
        let state = self.state.lock();
        (time(state.round_trip()).as_secs_f64() * state.bandwidth()) as u64
    }

    /// Bytes that arrive in one round trip.
    pub(super) fn product(&self) -> u64 {
        self.bytes_in(|round_trip| round_trip)
    }

    /// A gap between two ranges that is cheaper to fetch than to wait another
    /// round trip for what lies behind it.
    pub fn worthwhile_gap(&self) -> u64 {
        self.product().clamp(SMALLEST_GAP, LARGEST_GAP)
    }

    /// The same where many requests are under way: a gap costs its bytes all
    /// the same, and saves one of them.
    pub(super) fn parallel_gap(&self) -> u64 {
        (self.product() / PARALLEL).max(SMALLEST_GAP)
    }

    /// The length of one range where any length would do.
    pub(super) fn piece(&self) -> u64 {
        self.bytes_in(|round_trip| PIECE.max(round_trip * 2))
            .clamp(SMALLEST_PIECE, LARGEST_PIECE)
    }

    /// How much of a layer is fetched by a plan before it is known whether that
    /// is of what runs.
    pub(super) fn doubtful(&self) -> u64 {
        match self.round_trip() < FAR {
            true => DOUBTFUL,
            false => u64::MAX,
        }
    }

    /// The length of one range of a plan.
    pub(super) fn piece_of_plan(&self, is_in_doubt: bool) -> u64 {
        match is_in_doubt {
            true => self.piece().min(self.doubtful() / DOUBTFUL_PIECES),
            false => self.piece(),
        }
    }

    /// Bytes that could have come and been stored while a reader waits for one
    /// that misses.
    pub(super) fn price_of_miss(&self) -> u64 {
        let state = self.state.lock();
        let miss = state.round_trip().max(LEAST_MISS);
        (miss.as_secs_f64() * state.bandwidth().min(DIGESTED)) as u64
    }

    /// How far to fetch ahead of a sequential reader at most: one range that
    /// arrives, one on its way, and both again while the reader is busy.
    pub(super) fn window(&self) -> u64 {
        self.bytes_in(|round_trip| WINDOW.max(round_trip * 4))
    }

    /// Bytes that have to be on their way for the link to be always busy: the
    /// next range is asked for when fewer are left.
    pub(super) fn outstanding(&self) -> u64 {
        self.bytes_in(|round_trip| round_trip * 3 / 2 + SLACK)
            .max(LEAST_OUTSTANDING)
    }

    /// Waits for the turn to prefetch about so many bytes from this host.
    pub(super) async fn turn(&self, due: Due, bytes: u64, share: Share) -> Turn {
        self.pace.set_limit(self.outstanding());
        self.pace.turn(due, bytes, share).await
    }
}

impl State {
    fn answered(&mut self, waited: Duration) {
        let now = Instant::now();
        let since = *self.period.get_or_insert(now);
        if now.duration_since(since) > ROUND_TRIP_MEMORY {
            self.shortest = [None, self.shortest[0]];
            self.period = Some(now);
        }
        // Longer waits are those of queues: the link's is the shortest.
        let shortest = &mut self.shortest[0];
        *shortest = Some(shortest.map_or(waited, |known| known.min(waited)));
    }

    fn round_trip(&self) -> Duration {
        let known = self.shortest.iter().flatten().min();
        let known = known.copied().or(self.supposed);
        known.unwrap_or(INITIAL_ROUND_TRIP)
    }

    /// The second best of the last samples: a transfer that had to wait for
    /// something else says less than one that had not, and the best may be
    /// what some queue on the way let go at once.
    fn bandwidth(&self) -> f64 {
        let mut best = [0.0; 2];
        for &sample in &self.samples {
            if sample > best[0] {
                best = [sample, best[0]];
            } else if sample > best[1] {
                best[1] = sample;
            }
        }
        match self.samples.len() {
            0 => INITIAL_BANDWIDTH,
            1 => best[0],
            _ => best[1],
        }
    }

    /// One answer fewer is being received.
    fn stop(&mut self) {
        self.receiving -= 1;
        if self.receiving > 0 {
            return;
        }
        // The time in which nothing is received says nothing about the link.
        if let Some(sample) = self.sample.take() {
            self.finish_short(sample, Instant::now());
        }
    }

    fn finish_short(&mut self, mut sample: Sample, now: Instant) {
        if sample.bytes < SHORT_BYTES {
            return;
        }
        if now.duration_since(sample.since) < SHORT_SAMPLE {
            // The link is at least so fast, which says nothing more where it
            // is known to be faster.
            let least = sample.bytes as f64 / SHORT_SAMPLE.as_secs_f64();
            let Some(since) = now.checked_sub(SHORT_SAMPLE) else {
                return;
            };
            if least <= self.bandwidth() {
                return;
            }
            sample.since = since;
        }
        self.finish_sample(sample, now);
    }

    fn finish_sample(&mut self, sample: Sample, now: Instant) {
        let passed = now.duration_since(sample.since).as_secs_f64();
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(sample.bytes as f64 / passed);
    }
}

/// An answer that is being received.
#[derive(Debug)]
pub(super) struct Receiving {
    link: Arc<Link>,
    active: bool,
    /// Whether what comes now may have been lying in a buffer.
    behind: bool,
}

impl Receiving {
    /// The answer is not read for a while.
    pub(super) fn pause(&mut self) {
        self.behind = true;
        if std::mem::take(&mut self.active) {
            self.link.measure(State::stop);
        }
    }

    /// `bytes` came; `waited` says that they were not there when they were
    /// asked for. Only between two such moments do the bytes tell the link's
    /// bandwidth: at others they may have been in a buffer for long.
    pub(super) fn received(&mut self, bytes: u64, waited: bool) {
        let now = Instant::now();
        let link = Arc::clone(&self.link);
        let mut state = link.state.lock();
        if !std::mem::replace(&mut self.active, true) {
            state.receiving += 1;
        }
        if waited {
            self.behind = false;
        }
        let Some(mut sample) = state.sample else {
            if waited {
                state.sample = Some(Sample {
                    since: now,
                    bytes: 0,
                });
            }
            return;
        };
        if !self.behind {
            sample.bytes += bytes;
        }
        let passed = now.duration_since(sample.since);
        // A reader that never waits is itself what limits the rate.
        if passed < SAMPLE || (passed < SAMPLE * 4 && !waited) {
            state.sample = Some(sample);
            return;
        }
        state.sample = Some(Sample {
            since: now,
            bytes: 0,
        });
        drop(state);
        link.measure(|state| state.finish_sample(sample, now));
    }
}

/// See [`Link::expect_table`]. Dropping it, nothing more is expected.
#[derive(Debug)]
pub struct ExpectedTable {
    turn: Turn,
    receiving: Receiving,
}

impl ExpectedTable {
    /// So many of the bytes have come.
    pub fn arrived(&mut self, bytes: u64) {
        self.turn.arrived(bytes);
        self.receiving.received(bytes, true);
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.pause();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    async fn transfer(link: &Arc<Link>, round_trip: Duration, step: u64, steps: u32) {
        tokio::time::advance(round_trip).await;
        link.answered(round_trip);
        let mut receiving = link.receive();
        for _ in 0..steps {
            tokio::time::advance(Duration::from_millis(10)).await;
            receiving.received(step, true);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_fat_link_merges_more_than_a_short_one() {
        let (near, far) = (Arc::<Link>::default(), Arc::<Link>::default());
        for _ in 0..3 {
            transfer(&near, Duration::from_micros(200), 100_000, 20).await;
            transfer(&far, Duration::from_millis(40), 100_000, 20).await;
        }
        assert_eq!(near.worthwhile_gap(), SMALLEST_GAP);
        assert!((390_000..=410_000).contains(&far.worthwhile_gap()));
        assert!((9.9e6..10.1e6).contains(&far.bandwidth()));
        assert!((390_000..=410_000).contains(&far.price_of_miss()));
        assert_eq!(near.piece(), 500_000);
        assert_eq!(far.piece(), 800_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_miss_costs_no_more_than_can_be_stored_meanwhile() {
        let link = Arc::<Link>::default();
        for _ in 0..3 {
            transfer(&link, Duration::from_millis(20), 1_250_000, 20).await;
        }
        assert!(link.bandwidth() > 120e6);
        assert_eq!(link.price_of_miss(), 1_200_000);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_and_buffers_do_not_count() {
        let link = Arc::<Link>::default();
        transfer(&link, Duration::from_millis(1), 100_000, 20).await;
        let mut receiving = link.receive();
        for _ in 0..20 {
            // Nobody reads for a second; then a megabyte is there at once.
            receiving.pause();
            tokio::time::advance(Duration::from_secs(1)).await;
            receiving.received(1_000_000, false);
            tokio::time::advance(Duration::from_millis(10)).await;
            receiving.received(100_000, true);
        }
        drop(receiving);
        assert!(link.bandwidth() < 10.1e6, "{}", link.bandwidth());
        // Beside one that is paused, short answers with long waits between.
        let mut paused = link.receive();
        paused.received(1, true);
        paused.pause();
        for _ in 0..20 {
            transfer(&link, Duration::from_millis(100), 100_000, 3).await;
        }
        assert!(link.bandwidth() > 9.9e6, "{}", link.bandwidth());
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_otherwise_is_measured_and_waited_for() {
        let ms = Duration::from_millis;
        let link = Arc::<Link>::default();
        let mut little = link.expect_table(SHORT_BYTES - 1);
        little.arrived(1);
        tokio::time::advance(ms(5)).await;
        little.arrived(SHORT_BYTES - 2);
        drop(little);
        assert_eq!(link.figures().bandwidth, INITIAL_BANDWIDTH as u64);
        let mut other = link.expect_table(1_100_000);
        let due = Due::At(Instant::now());
        let mut turn = Box::pin(link.turn(due, 1, Share::Doubtful));
        assert!((&mut turn).now_or_never().is_none());
        other.arrived(100_000);
        tokio::time::advance(ms(10)).await;
        other.arrived(500_000);
        assert!((&mut turn).now_or_never().is_none());
        drop(other);
        assert_eq!(link.figures().bandwidth, 50_000_000);
        assert!((&mut turn).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_at_once_says_how_fast_the_link_is_at_least() {
        let link = Arc::<Link>::default();
        let at_once = |bytes| {
            let mut other = link.expect_table(bytes);
            other.arrived(0);
            other.arrived(bytes);
        };
        tokio::time::advance(Duration::from_secs(9)).await;
        at_once(SHORT_BYTES);
        assert!(link.bandwidth() > INITIAL_BANDWIDTH);
        at_once(200_000);
        at_once(400_000);
        let known = link.bandwidth();
        assert_eq!(known, 40e6);
        at_once(100_000);
        assert_eq!(link.bandwidth(), known);
    }

    #[tokio::test(start_paused = true)]
    async fn the_round_trip_is_the_shortest_of_late() {
        let link = Arc::<Link>::default();
        link.suppose(Duration::from_millis(5));
        assert_eq!(link.round_trip(), Duration::from_millis(5));
        for wait in [80, 20, 500, 60] {
            link.answered(Duration::from_millis(wait));
        }
        assert_eq!(link.round_trip(), Duration::from_millis(20));
        for _ in 0..3 {
            tokio::time::advance(ROUND_TRIP_MEMORY + Duration::from_secs(1)).await;
            link.answered(Duration::from_millis(90));
        }
        assert_eq!(link.round_trip(), Duration::from_millis(90));
    }
}
