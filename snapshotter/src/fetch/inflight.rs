//! One fetch in flight per unit, however many readers wait for it.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use sluice_layer::Unit;
use tokio::sync::watch;

use super::{FetchError, Unstored};

/// What a fetch has brought: chunks that are present now, and those that are
/// not to be had but here.
type Outcome = Result<Unstored, FetchError>;

/// How far a fetch has come.
#[derive(Debug, Clone)]
enum Progress {
    /// Somebody has taken it on.
    Claimed,
    /// A registry is asked for it: whoever waits, waits for nobody else.
    Requested,
    Ended(Outcome),
}

type Units = HashMap<u64, watch::Receiver<Progress>>;

/// The units of one layer that are being fetched.
#[derive(Debug, Clone, Default)]
pub(super) struct InFlight(Arc<Mutex<Units>>);

/// The duty to fetch a unit. Dropped unfinished, another may take it over.
#[derive(Debug)]
pub(super) struct Claim {
    in_flight: InFlight,
    unit: Unit,
    progress: watch::Sender<Progress>,
}

/// Waits for a unit that somebody fetches.
#[derive(Debug)]
pub(super) struct Waiter(watch::Receiver<Progress>);

/// The fetch was given up before it came to an end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Abandoned;

impl InFlight {
    /// For each unit that is not present: waits with whoever fetches it, and
    /// takes on the duty where nobody does. `present` is asked under the lock,
    /// so that a fetch that ends meanwhile is not repeated.
    pub(super) fn join(
        &self,
        units: impl IntoIterator<Item = Unit>,
        present: impl Fn(Unit) -> bool,
    ) -> (Vec<Claim>, Vec<Waiter>) {
        let mut claims = Vec::new();
        let mut waiters = Vec::new();
        let mut map = self.0.lock();
        for unit in units {
            if let Some(receiver) = map.get(&unit.offset) {
                waiters.push(Waiter(receiver.clone()));
            } else if !present(unit) {
                let claim = self.start(&mut map, unit);
                waiters.push(Waiter(claim.progress.subscribe()));
                claims.push(claim);
            }
        }
        (claims, waiters)
    }

    /// Whether anybody fetches the unit.
    pub(super) fn contains(&self, unit: Unit) -> bool {
        self.0.lock().contains_key(&unit.offset)
    }

    /// Waits with whoever fetches the unit.
    pub(super) fn waiter(&self, unit: Unit) -> Option<Waiter> {
        self.0.lock().get(&unit.offset).cloned().map(Waiter)
    }

    /// Takes on a unit that is neither present nor being fetched.
    pub(super) fn claim(&self, unit: Unit, present: impl Fn(Unit) -> bool) -> Option<Claim> {
        let mut map = self.0.lock();
        let free = !map.contains_key(&unit.offset) && !present(unit);
        free.then(|| self.start(&mut map, unit))
    }

    /// Waits with whoever has asked a registry for the unit. Who waits only
    /// for those cannot wait in a circle.
    pub(super) fn coming(&self, unit: Unit) -> Option<Waiter> {
        let map = self.0.lock();
        let receiver = map.get(&unit.offset)?;
        let requested = matches!(*receiver.borrow(), Progress::Requested);
        requested.then(|| Waiter(receiver.clone()))
    }

    fn start(&self, map: &mut Units, unit: Unit) -> Claim {
        let (progress, receiver) = watch::channel(Progress::Claimed);
        map.insert(unit.offset, receiver);
        Claim {
            in_flight: self.clone(),
            unit,
            progress,
        }
    }
}

impl Claim {
    pub(super) fn unit(&self) -> Unit {
        self.unit
    }

    /// Whether anybody waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        // One receiver is the table's.
        self.progress.receiver_count() > 1
    }

    /// A registry is about to be asked for it.
    pub(super) fn request(&self) {
        self.progress.send_replace(Progress::Requested);
    }

    /// Tells everyone who waits. Of a success, the chunks are present already.
    pub(super) fn finish(self, outcome: Outcome) {
        // Nobody may join a fetch that has ended: a read that follows a failed
        // one tries again.
        self.in_flight.0.lock().remove(&self.unit.offset);
        self.progress.send_replace(Progress::Ended(outcome));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Once finished, the unit may be somebody else's claim already.
        if !matches!(*self.progress.borrow(), Progress::Ended(_)) {
            self.in_flight.0.lock().remove(&self.unit.offset);
        }
    }
}

impl Waiter {
    /// Waits for the end of the fetch.
    pub(super) async fn wait(mut self) -> Result<Outcome, Abandoned> {
        let ended = |progress: &Progress| matches!(progress, Progress::Ended(_));
        match self.0.wait_for(ended).await.as_deref() {
            Ok(Progress::Ended(outcome)) => Ok(outcome.clone()),
            _ => Err(Abandoned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Unit = Unit {
        offset: 7,
        size: 10,
    };

    #[tokio::test]
    async fn one_claim_and_many_waiters() {
        let in_flight = InFlight::default();
        let (mut claims, first) = in_flight.join([UNIT], |_| false);
        assert_eq!((claims.len(), first.len()), (1, 1));
        let (more, second) = in_flight.join([UNIT], |_| false);
        assert_eq!((more.len(), second.len()), (0, 1));
        assert!(in_flight.claim(UNIT, |_| false).is_none());
        claims.remove(0).finish(Ok(Unstored::default()));
        for waiter in first.into_iter().chain(second) {
            assert!(waiter.wait().await.unwrap().is_ok());
        }
        let (claims, waiters) = in_flight.join([UNIT], |_| true);
        assert_eq!((claims.len(), waiters.len()), (0, 0));
    }

    #[tokio::test]
    async fn an_abandoned_unit_can_be_taken_over() {
        let in_flight = InFlight::default();
        let (claims, mut waiters) = in_flight.join([UNIT], |_| false);
        drop(claims);
        assert_eq!(waiters.remove(0).wait().await.unwrap_err(), Abandoned);
        let claim = in_flight.claim(UNIT, |_| false).expect("nobody has it");
        claim.finish(Err(FetchError::Closed));
        assert!(in_flight.claim(UNIT, |_| false).is_some());
    }
}
