//! How much is spent on finding out what files load: an image may have been made
//! to cost as much as possible.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of memory for all images that start.
const MEMORY: u64 = 32 << 20;
/// Paths that are looked up for one image. Programs need some thousands.
const LOOKUPS: u64 = 200_000;

/// Memory for what is known of all images that start. Clones are the same.
#[derive(Debug, Clone)]
pub struct Memory(Arc<AtomicU64>);

impl Default for Memory {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(MEMORY)))
    }
}

/// What one image may cost; its memory comes back when this is dropped.
#[derive(Debug)]
pub(super) struct Budget {
    memory: Memory,
    taken: AtomicU64,
    lookups: AtomicU64,
}

impl Budget {
    pub(super) fn new(memory: Memory) -> Self {
        Self {
            memory,
            taken: AtomicU64::new(0),
            lookups: AtomicU64::new(LOOKUPS),
        }
    }

    /// Takes so many bytes of memory, if they are left.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let taken = take(&self.memory.0, bytes as u64);
        if taken {
            self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        taken
    }

    /// Whether a path may be looked up.
    pub(super) fn look_up(&self) -> bool {
        take(&self.lookups, 1)
    }
}

fn take(left: &AtomicU64, amount: u64) -> bool {
    let less = |left: u64| left.checked_sub(amount);
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
        .is_ok()
}

impl Drop for Budget {
    fn drop(&mut self) {
        let taken = *self.taken.get_mut();
        self.memory.0.fetch_add(taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_takes_comes_back_with_its_end() {
        let memory = Memory::default();
        let (one, other) = (Budget::new(memory.clone()), Budget::new(memory));
        assert!(one.take(MEMORY as usize - 10));
        assert!(!other.take(11));
        assert!(other.take(10));
        drop(one);
        assert!(other.take(11));
        assert!((0..LOOKUPS).all(|_| other.look_up()));
        assert!(!other.look_up());
    }
}
