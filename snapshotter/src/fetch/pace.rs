//! How fast prefetches ask one host: just so that it is never idle.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::foreseen::Need;

/// When something is needed: what the files that are read name is, before what a
/// plan names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    Foreseen(Need),
    At(Instant),
}

/// What prefetches, of any layer, have asked one host for and do not have yet,
/// and who asks next. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    outstanding: u64,
    /// What is to be outstanding, as far as is known now.
    limit: u64,
    arrivals: u64,
    /// In the order of need, and of arrival where that is the same.
    waiting: BTreeMap<(Due, u64), Waiting>,
}

#[derive(Debug)]
struct Waiting {
    bytes: u64,
    /// It asks while less than so many percent of the limit are outstanding.
    share: u64,
    turn: oneshot::Sender<Turn>,
}

/// The right to ask for a range. Dropping it, or its bytes' arrival, lets the
/// next one ask.
#[derive(Debug)]
pub(super) struct Turn {
    pace: Pace,
    left: u64,
}

impl Pace {
    /// From now on, so many bytes are to be outstanding. Who waits need not
    /// wait for an arrival to profit from a link that turns out to be faster.
    pub(super) fn set_limit(&self, bytes: u64) {
        self.0.lock().limit = bytes;
        self.grant();
    }

    /// A turn that is not waited for.
    pub(super) fn take(&self, bytes: u64) -> Turn {
        self.0.lock().outstanding += bytes;
        Turn {
            pace: self.clone(),
            left: bytes,
        }
    }

    /// Waits until fewer than `share` percent of the limit are outstanding and
    /// nobody has anything that is due earlier than `due`. `bytes` is what will
    /// be asked for, about.
    pub(super) async fn turn(&self, due: Due, bytes: u64, share: u64) -> Turn {
        let (turn, receiver) = oneshot::channel();
        let waiting = Waiting { bytes, share, turn };
        {
            let mut queue = self.0.lock();
            queue.arrivals += 1;
            let key = (due, queue.arrivals);
            queue.waiting.insert(key, waiting);
        }
        self.grant();
        match receiver.await {
            Ok(turn) => turn,
            Err(_) => unreachable!("the queue lives as long as its waiters"),
        }
    }

    fn grant(&self) {
        // A turn whose waiter has gone comes back and is dropped, which grants
        // anew, so not under the lock.
        let mut returned = Vec::new();
        {
            let mut queue = self.0.lock();
            let may = |queue: &Queue, first: &Waiting| {
                queue.outstanding < queue.limit.saturating_mul(first.share) / 100
            };
            while let Some((_, first)) = queue.waiting.first_key_value()
                && may(&queue, first)
                && let Some((_, first)) = queue.waiting.pop_first()
            {
                if first.turn.is_closed() {
                    continue;
                }
                queue.outstanding += first.bytes;
                let turn = Turn {
                    pace: self.clone(),
                    left: first.bytes,
                };
                if let Err(turn) = first.turn.send(turn) {
                    returned.push(turn);
                }
            }
        }
        drop(returned);
    }

    fn arrived(&self, bytes: u64) {
        self.0.lock().outstanding -= bytes;
        self.grant();
    }
}

impl Turn {
    /// So many bytes will be asked for in fact.
    pub(super) fn resize(&mut self, bytes: u64) {
        let mut queue = self.pace.0.lock();
        queue.outstanding = queue.outstanding - self.left + bytes;
        self.left = bytes;
        drop(queue);
        self.pace.grant();
    }

    /// So many of them have come.
    pub(super) fn arrived(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left);
        self.left -= bytes;
        self.pace.arrived(bytes);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.pace.arrived(self.left);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn what_is_due_first_goes_first_and_the_rest_waits() {
        let pace = Pace::default();
        pace.set_limit(100);
        let now = Instant::now();
        let turn = |seconds| pace.turn(Due::At(now + Duration::from_secs(seconds)), 60, 100);
        let mut first = turn(5).await;
        let second = turn(9).await;
        let mut late = Box::pin(turn(8));
        let mut early = Box::pin(turn(2));
        let mut gone = Box::pin(turn(1));
        for waiting in [&mut late, &mut early, &mut gone] {
            assert!(waiting.now_or_never().is_none(), "120 are outstanding");
        }
        drop(gone);
        first.arrived(30);
        assert!((&mut late).now_or_never().is_none());
        let early = (&mut early).now_or_never().expect("90 are outstanding");
        drop(first);
        assert!((&mut late).now_or_never().is_none(), "120 again");
        drop(early);
        let mut late = (&mut late).now_or_never().expect("60 are left");
        late.resize(10);
        drop(late);
        drop(second);
        assert_eq!(pace.0.lock().outstanding, 0);
    }

    #[tokio::test]
    async fn who_waits_goes_on_once_the_link_turns_out_to_be_faster() {
        let pace = Pace::default();
        pace.set_limit(100);
        let due = || Due::At(Instant::now());
        let _held = pace.take(150);
        let mut waiting = Box::pin(pace.turn(due(), 60, 100));
        assert!((&mut waiting).now_or_never().is_none());
        pace.set_limit(200);
        assert!((&mut waiting).now_or_never().is_some());
        let mut twice = Box::pin(pace.turn(due(), 1, 200));
        assert!((&mut twice).now_or_never().is_some(), "of 400, 150 or more");
    }
}
