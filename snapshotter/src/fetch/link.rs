//! What a link to a host is like, measured while it is used.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Before anything was measured: a registry not far away.
const INITIAL_ROUND_TRIP: f64 = 0.010;
const INITIAL_BANDWIDTH: f64 = 12.5e6;
/// Whatever the link, a gap of this many bytes is not worth a request of its
/// own, and one of more than the second is.
const SMALLEST_GAP: u64 = 16 << 10;
const LARGEST_GAP: u64 = 512 << 10;
/// Bandwidth is taken over at least this long.
const SAMPLE: Duration = Duration::from_millis(50);

/// What is known of a link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkFigures {
    /// Round-trip time.
    pub round_trip: Duration,
    /// Bytes a second.
    pub bandwidth: u64,
}

/// Round-trip time and bandwidth to one host.
#[derive(Debug)]
pub struct Link(Mutex<State>);

#[derive(Debug)]
struct State {
    round_trip: f64,
    bandwidth: f64,
    since: Option<Instant>,
    bytes: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self(Mutex::new(State {
            round_trip: INITIAL_ROUND_TRIP,
            bandwidth: INITIAL_BANDWIDTH,
            since: None,
            bytes: 0,
        }))
    }
}

impl Link {
    /// An answer began `waited` after its request was sent.
    pub fn answered(&self, waited: Duration) {
        let mut state = self.0.lock();
        let sample = waited.as_secs_f64();
        // The shortest times are those of the link, longer ones are those of
        // queues: fall fast, rise slowly.
        let weight = if sample < state.round_trip { 0.5 } else { 0.1 };
        state.round_trip += (sample - state.round_trip) * weight;
    }

    /// `bytes` arrived at `now`, on any connection to the host.
    pub fn received(&self, bytes: u64, now: Instant) {
        let mut state = self.0.lock();
        let since = *state.since.get_or_insert(now);
        state.bytes += bytes;
        let passed = now.saturating_duration_since(since);
        if passed < SAMPLE {
            return;
        }
        // A pause says nothing about the link.
        if passed < SAMPLE * 10 {
            let sample = state.bytes as f64 / passed.as_secs_f64();
            let weight = if sample > state.bandwidth { 0.5 } else { 0.1 };
            state.bandwidth += (sample - state.bandwidth) * weight;
        }
        state.since = Some(now);
        state.bytes = 0;
    }

    /// What was measured, or is supposed until something was.
    pub fn figures(&self) -> LinkFigures {
        let state = self.0.lock();
        LinkFigures {
            round_trip: Duration::from_secs_f64(state.round_trip),
            bandwidth: state.bandwidth as u64,
        }
    }

    /// Bytes that arrive in one round trip: a smaller gap between two ranges
    /// is cheaper to fetch than to leave out.
    pub fn worthwhile_gap(&self) -> u64 {
        let state = self.0.lock();
        ((state.round_trip * state.bandwidth) as u64).clamp(SMALLEST_GAP, LARGEST_GAP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_fat_link_merges_more_than_a_short_one() {
        let near = Link::default();
        let far = Link::default();
        let start = Instant::now();
        for step in 1..100 {
            near.answered(Duration::from_micros(200));
            far.answered(Duration::from_millis(40));
            let now = start + SAMPLE * step;
            near.received(500_000, now);
            far.received(500_000, now);
        }
        assert_eq!(near.worthwhile_gap(), SMALLEST_GAP);
        assert!((300_000..=450_000).contains(&far.worthwhile_gap()));
    }
}
