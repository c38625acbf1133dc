//! Who may send a request: one pool of connections and one memory budget for
//! the node, in three priorities.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// How urgent a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A reader waits.
    OnDemand,
    /// A reader is expected soon.
    Prefetch,
    /// For later, when the link is idle.
    Background,
}

impl Priority {
    const ALL: [Self; 3] = [Self::OnDemand, Self::Prefetch, Self::Background];

    fn index(self) -> usize {
        self as usize
    }

    /// The part of the whole that this priority and those below it may hold
    /// together, so that an urgent request always finds room soon.
    fn share(self, whole: u64) -> u64 {
        match self {
            Self::OnDemand => whole,
            Self::Prefetch => (whole / 2).max(1),
            Self::Background => (whole / 4).max(1),
        }
    }
}

/// Gives out permits. Clones share one budget.
#[derive(Debug, Clone)]
pub struct Admission(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bytes: u64,
    slots: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used_bytes: [u64; 3],
    used_slots: [u64; 3],
    waiting: [VecDeque<Waiting>; 3],
}

#[derive(Debug)]
struct Waiting {
    bytes: u64,
    granted: oneshot::Sender<Permit>,
}

/// The right to have one request under way and some bytes in memory, until it
/// is dropped.
#[derive(Debug)]
pub struct Permit {
    shared: Arc<Shared>,
    priority: Priority,
    bytes: u64,
}

impl Admission {
    /// A budget of `bytes` and `slots` requests under way.
    pub fn new(bytes: u64, slots: u64) -> Self {
        Self(Arc::new(Shared {
            bytes: bytes.max(1),
            slots: slots.max(1),
            state: Mutex::default(),
        }))
    }

    /// Waits until `bytes` and a connection are free. More bytes than the
    /// priority may ever have count as all that it may have.
    pub async fn admit(&self, priority: Priority, bytes: u64) -> Permit {
        let bytes = bytes.min(priority.share(self.0.bytes));
        let (granted, receiver) = oneshot::channel();
        self.0.state.lock().waiting[priority.index()].push_back(Waiting { bytes, granted });
        self.0.grant();
        match receiver.await {
            Ok(permit) => permit,
            Err(_) => unreachable!("the queue lives as long as the budget"),
        }
    }

    /// Bytes and requests that are under way.
    pub fn in_use(&self) -> (u64, u64) {
        let state = self.0.state.lock();
        (state.used_bytes.iter().sum(), state.used_slots.iter().sum())
    }
}

impl State {
    fn fits(&self, shared: &Shared, priority: Priority, bytes: u64) -> bool {
        // Each class above must also have room for what those below hold.
        Priority::ALL[..=priority.index()].iter().all(|class| {
            let held = class.index()..;
            let held_bytes: u64 = self.used_bytes[held.clone()].iter().sum();
            let held_slots: u64 = self.used_slots[held].iter().sum();
            held_bytes + bytes <= class.share(shared.bytes)
                && held_slots < class.share(shared.slots)
        })
    }
}

impl Shared {
    /// Grants in order of priority, first come first served within one.
    fn grant(self: &Arc<Self>) {
        // A permit whose waiter has gone comes back and is dropped, which
        // grants anew, so not under the lock.
        let mut returned = Vec::new();
        {
            let mut state = self.state.lock();
            for priority in Priority::ALL {
                let at = priority.index();
                while let Some(first) = state.waiting[at].pop_front() {
                    if first.granted.is_closed() {
                        continue;
                    }
                    if !state.fits(self, priority, first.bytes) {
                        state.waiting[at].push_front(first);
                        break;
                    }
                    state.used_bytes[at] += first.bytes;
                    state.used_slots[at] += 1;
                    let permit = Permit {
                        shared: Arc::clone(self),
                        priority,
                        bytes: first.bytes,
                    };
                    if let Err(permit) = first.granted.send(permit) {
                        returned.push(permit);
                    }
                }
                if !state.waiting[at].is_empty() && priority == Priority::OnDemand {
                    // Nobody goes before a reader that waits.
                    break;
                }
            }
        }
        drop(returned);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state.lock();
            state.used_bytes[self.priority.index()] -= self.bytes;
            state.used_slots[self.priority.index()] -= 1;
        }
        self.shared.grant();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn urgent_requests_go_first() {
        let admission = Admission::new(100, 16);
        let held = admission.admit(Priority::OnDemand, 100).await;
        let mut background = Box::pin(admission.admit(Priority::Background, 10));
        let mut prefetch = Box::pin(admission.admit(Priority::Prefetch, 10));
        let mut urgent = Box::pin(admission.admit(Priority::OnDemand, 100));
        assert!((&mut background).now_or_never().is_none());
        assert!((&mut prefetch).now_or_never().is_none());
        assert!((&mut urgent).now_or_never().is_none());
        drop(held);
        assert!((&mut prefetch).now_or_never().is_none());
        let urgent = (&mut urgent).now_or_never().expect("it is first");
        drop(urgent);
        let _prefetch = (&mut prefetch).now_or_never().expect("it is next");
        let _background = (&mut background).now_or_never().expect("it is last");
        assert_eq!(admission.in_use(), (20, 2));
    }

    #[tokio::test]
    async fn less_urgent_requests_leave_room() {
        let admission = Admission::new(100, 4);
        let first = admission.admit(Priority::Prefetch, 1_000).await;
        assert_eq!(admission.in_use(), (50, 1));
        let mut second = Box::pin(admission.admit(Priority::Prefetch, 1));
        assert!((&mut second).now_or_never().is_none(), "half is the limit");
        // Waiting prefetches do not stop an urgent request.
        let urgent = admission.admit(Priority::OnDemand, 50).now_or_never();
        assert!(urgent.is_some());
        drop(first);
        drop(urgent);
        let _slots = [
            (&mut second).await,
            admission.admit(Priority::Background, 1).await,
        ];
        assert!(
            admission
                .admit(Priority::Prefetch, 1)
                .now_or_never()
                .is_none(),
            "half of the connections are taken"
        );
        assert!(
            admission
                .admit(Priority::OnDemand, 1)
                .now_or_never()
                .is_some()
        );
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_takes_nothing() {
        let admission = Admission::new(100, 16);
        let held = admission.admit(Priority::OnDemand, 100).await;
        let mut gone = Box::pin(admission.admit(Priority::OnDemand, 100));
        assert!((&mut gone).now_or_never().is_none());
        drop(held);
        // It was granted, but nobody will collect it.
        drop(gone);
        assert_eq!(admission.in_use(), (0, 0));
        let whole = admission.admit(Priority::OnDemand, 100).now_or_never();
        assert!(whole.is_some());
    }
}
