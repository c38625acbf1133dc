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

/// How much may be outstanding where somebody asks for more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// What may not be needed, or not now: before a layer's table of contents
    /// is here, or it is known what runs. Tables come first: what arrives in one
    /// round trip, with those that are on their way.
    Doubtful,
    /// What keeps the link busy.
    Plan,
    /// Twice as much: ranges are short, and each costs a round trip.
    Foreseen,
}

impl Share {
    /// Of what keeps the link busy.
    fn percent(self) -> u64 {
        match self {
            Self::Doubtful => 66,
            Self::Plan => 100,
            Self::Foreseen => 200,
        }
    }
}

/// What prefetches, of any layer, have asked one host for and do not have yet,
/// and who asks next. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    outstanding: u64,
    /// Of tables of contents. A host that does not deliver one keeps nobody
    /// from anything else.
    tables: u64,
    /// What is to be outstanding, as far as is known now.
    limit: u64,
    arrivals: u64,
    /// In the order of need, and of arrival where that is the same.
    waiting: BTreeMap<(Due, u64), Waiting>,
}

#[derive(Debug)]
struct Waiting {
    bytes: u64,
    share: Share,
    turn: oneshot::Sender<Turn>,
}

/// The right to ask for a range. Dropping it, or its bytes' arrival, lets the
/// next one ask.
#[derive(Debug)]
pub(super) struct Turn {
    pace: Pace,
    left: u64,
    of_table: bool,
}

impl Pace {
    /// From now on, so many bytes are to be outstanding. Who waits need not
    /// wait for an arrival to profit from a link that turns out to be faster.
    pub(super) fn set_limit(&self, bytes: u64) {
        self.0.lock().limit = bytes;
        self.grant();
    }

    /// The turn of a table of contents, which waits for nobody.
    pub(super) fn table(&self, bytes: u64) -> Turn {
        self.0.lock().tables += bytes;
        Turn {
            pace: self.clone(),
            left: bytes,
            of_table: true,
        }
    }

    /// Waits until less than `share` is outstanding and nobody who may ask has
    /// anything that is due earlier than `due`. `bytes` is what will be asked
    /// for, about.
    pub(super) async fn turn(&self, due: Due, bytes: u64, share: Share) -> Turn {
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
            while let Some(first) = queue.next() {
                if first.turn.is_closed() {
                    continue;
                }
                queue.outstanding += first.bytes;
                let turn = Turn {
                    pace: self.clone(),
                    left: first.bytes,
                    of_table: false,
                };
                if let Err(turn) = first.turn.send(turn) {
                    returned.push(turn);
                }
            }
        }
        drop(returned);
    }
}

impl Queue {
    /// Takes out who may ask next.
    fn next(&mut self) -> Option<Waiting> {
        let may = |share: Share| {
            let tables = match share {
                Share::Doubtful => self.tables,
                Share::Plan | Share::Foreseen => 0,
            };
            let limit = self.limit.saturating_mul(share.percent()) / 100;
            self.outstanding + tables < limit
        };
        let mut waiting = self.waiting.iter();
        let (&key, _) = waiting.find(|(_, waiting)| may(waiting.share))?;
        self.waiting.remove(&key)
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
        {
            let mut queue = self.pace.0.lock();
            match self.of_table {
                true => queue.tables -= bytes,
                false => queue.outstanding -= bytes,
            }
        }
        self.pace.grant();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.arrived(self.left);
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
        let turn =
            |seconds| pace.turn(Due::At(now + Duration::from_secs(seconds)), 60, Share::Plan);
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
        let _held = pace.turn(due(), 150, Share::Plan).await;
        let mut waiting = Box::pin(pace.turn(due(), 60, Share::Plan));
        assert!((&mut waiting).now_or_never().is_none());
        pace.set_limit(200);
        assert!((&mut waiting).now_or_never().is_some());
        let mut foreseen = Box::pin(pace.turn(due(), 1, Share::Foreseen));
        assert!((&mut foreseen).now_or_never().is_some(), "less than 400");
    }

    #[tokio::test]
    async fn a_table_of_contents_keeps_only_those_that_come_before_it() {
        let pace = Pace::default();
        pace.set_limit(100);
        let due = Instant::now();
        let mut table = pace.table(90);
        let mut before = Box::pin(pace.turn(Due::At(due), 10, Share::Doubtful));
        assert!((&mut before).now_or_never().is_none());
        let later = Due::At(due + Duration::from_secs(1));
        let plan = pace.turn(later, 30, Share::Plan).now_or_never();
        assert!(plan.is_some(), "whatever waits before it");
        table.arrived(40);
        assert!((&mut before).now_or_never().is_none(), "80 of 66");
        drop(plan);
        assert!((&mut before).now_or_never().is_some());
        drop((table, before));
        assert_eq!(pace.0.lock().tables, 0);
    }
}
