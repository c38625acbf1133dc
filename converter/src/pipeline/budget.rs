//! A bound on bytes in flight.

use std::sync::{Condvar, Mutex, PoisonError};

/// Bytes that may be in flight at once. One taker, one giver.
#[derive(Debug)]
pub(super) struct Budget {
    state: Mutex<State>,
    changed: Condvar,
    limit: u64,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    closed: bool,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            limit,
        }
    }

    /// Waits until `bytes` fit. More than the limit fits when nothing else
    /// is in flight. `false` if the giver has gone.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let full =
            |state: &mut State| state.used > 0 && state.used + bytes > self.limit && !state.closed;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self
            .changed
            .wait_while(state, full)
            .unwrap_or_else(PoisonError::into_inner);
        state.used += bytes;
        !state.closed
    }

    /// Says that `bytes` have left.
    pub(super) fn give(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.used = state.used.saturating_sub(bytes);
        self.changed.notify_one();
    }

    /// Whether the giver has gone.
    pub(super) fn is_closed(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed
    }

    /// Says that nothing will be given any more.
    pub(super) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        self.changed.notify_one();
    }
}
