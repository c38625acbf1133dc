//! Several recordings of one image as one.

use std::collections::HashMap;
use std::time::Duration;

use crate::toc::Unit;

use super::{MAX_READS, MAX_STARTS, Profile, ProfileError, Read};

/// What was read in less than one of so many starts is chance.
const RARE: u64 = 3;

/// One recording's word on a read.
struct Seen {
    at: Duration,
    /// Position in its recording, which decides among equal times.
    position: usize,
    starts: u32,
    unit: Option<Unit>,
}

pub(super) fn merge(profiles: &[Profile]) -> Result<Profile, ProfileError> {
    let (first, others) = profiles.split_first().ok_or(ProfileError::Nothing)?;
    if let Some(other) = others.iter().position(|p| p.layers != first.layers) {
        return Err(ProfileError::OtherImage(other + 2));
    }
    let total: u64 = profiles.iter().map(|p| u64::from(p.starts)).sum();
    let mut seen: HashMap<(usize, &[u8], u64, u64), Vec<Seen>> = HashMap::new();
    for profile in profiles {
        for (position, read) in profile.reads.iter().enumerate() {
            let key = (read.layer, &*read.path, read.offset, read.len);
            seen.entry(key).or_default().push(Seen {
                at: read.at,
                position,
                starts: read.starts,
                unit: read.unit,
            });
        }
    }
    // Everything is brought back to what one profile can hold.
    let scaled = |starts: u64| {
        let scaled = starts * u64::from(MAX_STARTS).min(total) / total;
        u32::try_from(scaled).unwrap_or(MAX_STARTS).max(1)
    };
    let mut reads: Vec<(usize, Read)> = Vec::new();
    for ((layer, path, offset, len), mut seen) in seen {
        let starts: u64 = seen.iter().map(|seen| u64::from(seen.starts)).sum();
        if starts * RARE < total {
            continue;
        }
        seen.sort_by_key(|seen| (seen.at, seen.position));
        let (at, position) = median(&seen, starts);
        let read = Read {
            layer,
            path: path.into(),
            offset,
            len,
            at,
            starts: scaled(starts),
            // The layers are the same, so all that are honest say the same.
            unit: seen.iter().filter_map(|seen| seen.unit).min(),
        };
        reads.push((position, read));
    }
    reads.sort_by(|(p, a), (q, b)| {
        let a = (a.at, p, a.layer, &a.path, a.offset, a.len);
        a.cmp(&(b.at, q, b.layer, &b.path, b.offset, b.len))
    });
    reads.truncate(MAX_READS);
    let mut shared = HashMap::new();
    let reads = reads.into_iter().map(|(_, mut read)| {
        let path = shared.entry(read.path.clone()).or_insert(read.path);
        read.path = path.clone();
        read
    });
    Profile::new(scaled(total), first.layers.clone(), reads.collect())
}

/// The time, and the position at that time, before which no more than half of
/// the starts needed it.
fn median(seen: &[Seen], starts: u64) -> (Duration, usize) {
    let mut before = 0;
    for seen in seen {
        before += u64::from(seen.starts);
        if before * 2 >= starts {
            return (seen.at, seen.position);
        }
    }
    (Duration::ZERO, 0)
}
