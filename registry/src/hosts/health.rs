//! Which hosts have failed, and until when they are left alone.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::rest;
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind};
use crate::redirect::Key;

/// A host that does not answer is tried again after so long at first, and
/// after so long at most.
const DOWN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// The same for a blob that a host lacks, or has wrongly.
const LACKS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
/// Blobs and hosts remembered; beyond it everything is forgotten, which costs
/// a request each.
const CAPACITY: usize = 4096;

/// The failures of every host that has others beside it.
#[derive(Default)]
pub(crate) struct Health(Mutex<State>);

#[derive(Default)]
struct State {
    /// By the host's origin.
    hosts: HashMap<String, Rest>,
    blobs: HashMap<Key, Rest>,
}

struct Rest {
    failures: u32,
    until: Instant,
    /// Whether somebody tries again before that.
    tried: bool,
    error: Error,
}

/// Whether a host may be asked.
#[derive(Debug, Clone)]
pub(super) enum Readiness {
    Ready,
    /// It failed in this way and is left alone until then.
    Resting {
        until: Instant,
        error: Error,
        /// Whether that is about the host, and not about one of its blobs.
        down: bool,
    },
}

impl Health {
    /// Whether to ask a host now, for a blob if it is about one. Of several
    /// that ask when its time has come, one is let through to try.
    pub(super) fn ask(&self, endpoint: &Endpoint, blob: Option<&Key>, now: Instant) -> Readiness {
        let readiness = self.readiness(endpoint, blob, now);
        if matches!(readiness, Readiness::Ready) {
            self.tries(endpoint, now);
        }
        readiness
    }

    /// The same, without asking for leave to try.
    pub(super) fn readiness(
        &self,
        endpoint: &Endpoint,
        blob: Option<&Key>,
        now: Instant,
    ) -> Readiness {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_host = state.hosts.get(endpoint.origin()).map(|rest| (rest, true));
        let of_blob = blob
            .and_then(|key| state.blobs.get(key))
            .map(|rest| (rest, false));
        let resting = |(failed, _): &(&Rest, bool)| failed.until > now;
        match of_host.filter(resting).or_else(|| of_blob.filter(resting)) {
            Some((failed, down)) => Readiness::Resting {
                until: failed.until,
                error: failed.error.clone(),
                down,
            },
            None => Readiness::Ready,
        }
    }

    /// Somebody tries a host that failed; others leave it alone meanwhile.
    pub(super) fn tries(&self, endpoint: &Endpoint, now: Instant) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failed) = state.hosts.get_mut(endpoint.origin()) {
            failed.until = now + rest(DOWN.0, DOWN.1, failed.failures);
            failed.tried = true;
        }
    }

    /// A host has failed.
    pub(super) fn failed(
        &self,
        endpoint: &Endpoint,
        blob: Option<&Key>,
        error: &Error,
        now: Instant,
    ) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State { hosts, blobs } = &mut *state;
        let down = error.kind().is_transient()
            || matches!(error.kind(), ErrorKind::Tls | ErrorKind::Credentials);
        let failures = if down {
            let asked = error.retry_after().unwrap_or_default().min(LACKS.1);
            note(hosts, endpoint.origin().to_owned(), DOWN, asked, error, now)
        } else if let Some(key) = blob {
            note(blobs, key.clone(), LACKS, Duration::ZERO, error, now)
        } else {
            return;
        };
        drop(state);
        if failures > 1 {
            tracing::debug!(host = endpoint.name(), "still: {error}");
        } else if down {
            tracing::warn!(host = endpoint.name(), "other hosts are asked: {error}");
        } else {
            tracing::info!(host = endpoint.name(), "other hosts are asked: {error}");
        }
    }

    /// A host has delivered what it was asked for.
    pub(super) fn delivered(&self, endpoint: &Endpoint, blob: Option<&Key>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = blob {
            state.blobs.remove(key);
        }
        if state.hosts.remove(endpoint.origin()).is_some() {
            drop(state);
            tracing::info!(host = endpoint.name(), "delivers again");
        }
    }
}

/// Notes a failure; how many there were in a row. Those of requests that were
/// under way together count once.
fn note<K: Eq + std::hash::Hash>(
    map: &mut HashMap<K, Rest>,
    key: K,
    (first, longest): (Duration, Duration),
    asked: Duration,
    error: &Error,
    now: Instant,
) -> u32 {
    if map.len() >= CAPACITY {
        map.clear();
    }
    let failed = map.entry(key).or_insert(Rest {
        failures: 0,
        until: now,
        tried: false,
        error: error.clone(),
    });
    failed.error = error.clone();
    if failed.until <= now || failed.tried {
        failed.failures = failed.failures.saturating_add(1);
        failed.tried = false;
        failed.until = now + rest(first, longest, failed.failures).max(asked);
        return failed.failures;
    }
    // Not the first of these requests to tell.
    failed.failures + 1
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sluice_oci::Digest;

    use super::*;
    use crate::Config;
    use crate::error::Context;
    use crate::hosts::Hosts;

    struct World {
        health: Health,
        endpoint: Endpoint,
        context: Context,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            let context = Context {
                action: "fetch",
                subject: "x".to_owned(),
                host: "r.io".to_owned(),
            };
            let hosts = Hosts::new(&Config::default()).unwrap();
            let host = Arc::clone(&hosts.of("r.io", &context).unwrap()[0]);
            Self {
                health: Health::default(),
                endpoint: Endpoint::new(host, "app"),
                context,
                now: Instant::now(),
            }
        }

        fn advance(&mut self, millis: u64) {
            self.now += Duration::from_millis(millis);
        }

        fn fail(&self, kind: ErrorKind, blob: Option<&Key>) {
            let error = self.context.error(kind, "so");
            self.health.failed(&self.endpoint, blob, &error, self.now);
        }

        fn ready(&self, blob: Option<&Key>) -> bool {
            let answer = self.health.ask(&self.endpoint, blob, self.now);
            matches!(answer, Readiness::Ready)
        }
    }

    #[test]
    fn a_host_rests_longer_with_each_failure_up_to_a_limit() {
        let mut world = World::new();
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert!(world.ready(None));
            // Requests that were under way together fail together.
            for _ in 0..5 {
                world.fail(ErrorKind::Connect, None);
            }
            world.advance(seconds * 1000 - 1);
            assert!(!world.ready(None), "{seconds}");
            world.advance(2);
        }
        assert!(world.ready(None), "one may try");
        assert!(!world.ready(None), "and no other meanwhile");
        world.health.delivered(&world.endpoint, None);
        assert!(world.ready(None) && world.ready(None));
        world.fail(ErrorKind::Server, None);
        world.advance(1001);
        assert!(world.ready(None), "it starts from the beginning");
    }

    #[test]
    fn what_is_wrong_with_a_blob_is_about_that_blob() {
        let mut world = World::new();
        let [one, other] =
            ["one", "other"].map(|text| world.endpoint.key(Digest::of(text.as_bytes())));
        world.fail(ErrorKind::NotFound, Some(&one));
        assert!(!world.ready(Some(&one)));
        assert!(world.ready(Some(&other)) && world.ready(None));
        world.advance(11_000);
        assert!(world.ready(Some(&one)));
        world.fail(ErrorKind::DigestMismatch, Some(&one));
        world.advance(11_000);
        assert!(!world.ready(Some(&one)), "longer the second time");
    }
}
