//! What images say of their layers, once it was read: manifests, indexes and
//! configurations do not change.

use std::sync::Arc;

use lru::LruCache;
use prost_types::Timestamp;

use crate::service::NamedLayers;

/// Names of layers that are remembered, of all images together: 64 bytes each.
const MOST: usize = 1 << 16;
/// An image takes as much as so many, beside them.
const EACH: usize = 4;

/// When an image was last pulled: its content may have become more then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Age(i64, i32);

impl From<Option<Timestamp>> for Age {
    fn from(time: Option<Timestamp>) -> Self {
        let time = time.unwrap_or_default();
        Self(time.seconds, time.nanos)
    }
}

/// The images that were read, by their targets' digests, those used last.
#[derive(Debug)]
pub(super) struct Known {
    images: LruCache<String, Entry>,
    size: usize,
}

#[derive(Debug)]
struct Entry {
    named: Arc<NamedLayers>,
    /// Of which pull it is true, if something was missing.
    of: Option<Age>,
}

impl Entry {
    fn size(&self) -> usize {
        EACH + self.named.layers.len()
    }
}

impl Default for Known {
    fn default() -> Self {
        Self {
            images: LruCache::unbounded(),
            size: 0,
        }
    }
}

impl Known {
    /// What an image says that was last pulled at `age`.
    pub(super) fn get(&mut self, target: &str, age: Age) -> Option<Arc<NamedLayers>> {
        let entry = self.images.get(target)?;
        let holds = entry.of.is_none_or(|of| of == age);
        holds.then(|| Arc::clone(&entry.named))
    }

    /// Remembers it: for ever, or only for the pull `of`.
    pub(super) fn insert(&mut self, target: String, named: Arc<NamedLayers>, of: Option<Age>) {
        let entry = Entry { named, of };
        self.size += entry.size();
        let former = self.images.put(target, entry);
        self.size -= former.map_or(0, |former| former.size());
        while self.size > MOST
            && let Some((_, oldest)) = self.images.pop_lru()
        {
            self.size -= oldest.size();
        }
    }
}

#[cfg(test)]
mod tests {
    use sluice_oci::Digest;

    use super::*;

    fn named(count: usize) -> Arc<NamedLayers> {
        let digest = Digest::of(b"x");
        Arc::new(NamedLayers {
            layers: vec![(digest, None); count],
            cut: false,
        })
    }

    #[test]
    fn what_was_incomplete_is_read_again_after_the_next_pull() {
        let mut known = Known::default();
        let (first, second) = (Age(1, 0), Age(1, 1));
        assert_eq!(known.get("a", first), None);
        known.insert("a".into(), named(1), Some(first));
        assert_eq!(known.get("a", first), Some(named(1)));
        assert_eq!(known.get("a", second), None);
        known.insert("a".into(), named(2), None);
        assert_eq!(known.get("a", second), Some(named(2)));
    }

    #[test]
    fn those_used_longest_ago_are_forgotten_first() {
        let mut known = Known::default();
        let age = Age::default();
        for name in ["a", "b", "c"] {
            known.insert(name.into(), named(MOST / 3 - EACH), None);
        }
        assert!(known.get("a", age).is_some());
        known.insert("d".into(), named(MOST / 3 - EACH), None);
        assert!(known.get("b", age).is_none());
        assert!(["a", "c", "d"].iter().all(|n| known.get(n, age).is_some()));
        // One that is more than all is not remembered.
        known.insert("e".into(), named(MOST), None);
        assert!(known.get("e", age).is_none());
        assert_eq!((known.size, known.images.len()), (0, 0));
        known.insert("a".into(), named(1), None);
        known.insert("a".into(), named(3), None);
        assert_eq!(known.size, EACH + 3);
    }
}
