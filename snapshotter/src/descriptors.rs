//! File descriptors: every open layer holds one, and however many layers there
//! are, those that are mounted must find enough to go on.

use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What the daemon opens beside layers and connections to registries: its
/// database, sockets and FUSE devices, and files that are read or written for
/// a moment.
const OTHERS: u64 = 96;

/// Seats for open layers. Clones share them.
#[derive(Debug, Clone)]
pub struct Seats {
    free: Arc<Semaphore>,
    limit: u64,
}

/// The right to hold one layer open, until it is dropped.
#[derive(Debug)]
pub struct Seat(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// All seats are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "as many layers are open as a limit of {limit} file descriptors allows; remove images that \
     are not used, or raise the daemon's limit (LimitNOFILE, or ulimit -n)"
)]
pub struct Full {
    limit: u64,
}

/// Raises the process' limit as far as it may without asking anybody, and
/// returns what it is now. The soft limit is low for the sake of programs that
/// use select(2).
pub fn raise_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    // Without success it is what it was.
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    limit.unwrap_or(u64::MAX)
}

impl Seats {
    /// As many as the process' limit allows beside `connections` and all else.
    pub fn new(connections: u64) -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Self::within(limit, connections)
    }

    fn within(limit: u64, connections: u64) -> Self {
        let layers = limit.saturating_sub(OTHERS.saturating_add(connections));
        // A node that cannot hold a single layer would be of no use.
        let layers = usize::try_from(layers.max(1)).unwrap_or(usize::MAX);
        Self {
            free: Arc::new(Semaphore::new(layers.min(Semaphore::MAX_PERMITS))),
            limit,
        }
    }

    /// A seat for one layer more.
    pub fn take(&self) -> Result<Seat, Full> {
        let free = Arc::clone(&self.free).try_acquire_owned();
        free.map(Seat).map_err(|_| Full { limit: self.limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_leave_room_for_the_rest() {
        let seats = Seats::within(OTHERS + 16 + 2, 16);
        let first = seats.take().unwrap();
        let _second = seats.take().unwrap();
        let full = seats.take().unwrap_err();
        assert!(
            full.to_string().contains("limit of 114 file descriptors"),
            "{full}"
        );
        drop(first);
        seats.take().unwrap();
    }

    #[test]
    fn a_tiny_limit_still_holds_a_layer_and_none_holds_many() {
        assert!(Seats::within(10, 16).take().is_ok());
        assert!(Seats::within(u64::MAX, 16).take().is_ok());
    }
}
