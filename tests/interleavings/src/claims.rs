//! One fetch in flight a unit.

use std::sync::Arc;

use parking_lot::Mutex;
use sluice_layer::Unit;
use tokio::task::JoinHandle;

use crate::fetch::{FetchError, Unstored};

#[path = "../../../snapshotter/src/fetch/inflight.rs"]
#[allow(dead_code, reason = "not everything of it is wanted here")]
mod inflight;

use inflight::{Claim, InFlight};

const UNITS: [Unit; 2] = [
    Unit {
        offset: 0,
        size: 10,
    },
    Unit {
        offset: 10,
        size: 5,
    },
];
const READERS: usize = 3;

/// Units that are there, and how often each was fetched.
#[derive(Clone, Default)]
struct World {
    in_flight: InFlight,
    present: Arc<Mutex<Vec<u64>>>,
    fetched: Arc<Mutex<Vec<u64>>>,
}

impl World {
    fn has(&self, unit: Unit) -> bool {
        self.present.lock().contains(&unit.offset)
    }

    fn fetch(&self, claim: Claim) {
        let unit = claim.unit();
        assert!(!self.has(unit), "fetched though it is present");
        self.fetched.lock().push(unit.offset);
        self.present.lock().push(unit.offset);
        claim.finish(Ok(Unstored::default()));
    }

    /// Reads until everything is there. `give_up` says which claims are
    /// dropped instead of fetched.
    async fn read(&self, give_up: impl Fn(&Claim) -> bool) {
        loop {
            let (claims, waiters) = self.in_flight.join(UNITS, |unit| self.has(unit));
            if waiters.is_empty() {
                return;
            }
            for claim in claims {
                match give_up(&claim) {
                    true => drop(claim),
                    false => {
                        let world = self.clone();
                        tokio::spawn(async move { world.fetch(claim) });
                    }
                }
            }
            for waiter in waiters {
                // One that was abandoned is taken over in the next round.
                if let Ok(outcome) = waiter.wait().await {
                    drop(outcome.expect("nothing fails"));
                }
            }
        }
    }

    /// Every unit was fetched, exactly once, and nobody fetches any more.
    fn check(&self) {
        let mut fetched = self.fetched.lock().clone();
        fetched.sort_unstable();
        assert_eq!(fetched, UNITS.map(|unit| unit.offset));
        let (claims, waiters) = self.in_flight.join(UNITS, |_| false);
        assert_eq!(
            (claims.len(), waiters.len()),
            (2, 2),
            "a fetch is left in the table"
        );
    }
}

async fn all(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        task.await.expect("no task panics");
    }
}

/// Readers of the same units: each unit is fetched once, and all are told.
pub async fn readers_share_fetches() {
    let world = World::default();
    let readers = (0..READERS).map(|_| {
        let world = world.clone();
        tokio::spawn(async move { world.read(|_| false).await })
    });
    all(readers.collect()).await;
    world.check();
}

/// Some readers give up what they have claimed: others take it over, and
/// nobody waits for ever.
pub async fn abandoned_fetches_are_taken_over() {
    let world = World::default();
    let given_up = Arc::new(Mutex::new(0));
    let readers = (0..READERS).map(|_| {
        let (world, given_up) = (world.clone(), Arc::clone(&given_up));
        tokio::spawn(async move {
            let give_up = |_: &Claim| {
                let mut times = given_up.lock();
                *times += 1;
                *times <= 3
            };
            world.read(give_up).await;
        })
    });
    all(readers.collect()).await;
    world.check();
}

/// A background stream claims beside readers: together they fetch each unit
/// once.
pub async fn a_stream_beside_readers_fetches_nothing_twice() {
    let world = World::default();
    let stream = {
        let world = world.clone();
        tokio::spawn(async move {
            for unit in UNITS {
                if let Some(claim) = world.in_flight.claim(unit, |unit| world.has(unit)) {
                    world.fetch(claim);
                }
            }
        })
    };
    let reader = {
        let world = world.clone();
        tokio::spawn(async move { world.read(|_| false).await })
    };
    all(vec![stream, reader]).await;
    world.check();
}

/// A read that follows a failed one tries again: it never hears of the old
/// failure a second time.
pub async fn a_failure_is_told_once_to_each() {
    let in_flight = InFlight::default();
    let unit = [UNITS[0]];
    let tries = Arc::new(Mutex::new(0_u32));
    let readers = (0..READERS).map(|_| {
        let (in_flight, tries) = (in_flight.clone(), Arc::clone(&tries));
        tokio::spawn(async move {
            let mut failures = 0;
            loop {
                let begun = *tries.lock();
                let (claims, mut waiters) = in_flight.join(unit, |_| false);
                for claim in claims {
                    let tries = Arc::clone(&tries);
                    tokio::spawn(async move {
                        let now = {
                            let mut tries = tries.lock();
                            *tries += 1;
                            *tries
                        };
                        let why = now.to_string();
                        let layer = sluice_oci::Digest::of(b"layer");
                        claim.finish(Err(FetchError::Registry { layer, why }));
                    });
                }
                let waiter = waiters.pop().expect("one unit");
                let outcome = waiter.wait().await.expect("nobody gives up");
                let Err(FetchError::Registry { why, .. }) = outcome else {
                    panic!("{outcome:?}");
                };
                let heard: u32 = why.parse().expect("a number");
                // Nobody joins a fetch whose outcome others know already.
                assert!(
                    heard > failures && heard >= begun,
                    "{heard} after {failures}"
                );
                failures = heard;
                if failures >= 2 {
                    return;
                }
            }
        })
    });
    all(readers.collect()).await;
    let (claims, _) = in_flight.join(unit, |_| false);
    assert_eq!(claims.len(), 1, "a fetch is left in the table");
}
