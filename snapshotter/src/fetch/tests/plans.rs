//! By which plan it is judged whether following one pays.

use sluice_layer::Unit;

use super::*;
use crate::fetch::reads::{Planned, Reads};
use crate::layer_dir::{ChunkId, Kin, Present, Record};

const CHUNKS: u32 = 300;

/// A chunk of one byte, alone in the unit that begins at its position.
fn record(position: u32) -> Record {
    Record {
        data_offset: u64::from(position) * 4096,
        size: 1,
        unit: Unit {
            offset: u64::from(position),
            size: 1,
        },
        inner_offset: 0,
        starts_file: true,
        kin: Kin::default(),
        digest: sluice_oci::Digest::of(b"x"),
    }
}

fn read(reads: &Reads, positions: std::ops::Range<u32>) {
    for position in positions {
        reads.read(ChunkId::at(position), &record(position));
    }
}

fn pays(reads: &Reads) -> bool {
    reads.pays().now_or_never().is_some()
}

#[test]
fn a_new_plan_is_what_counts_from_then_on() {
    let reads = Reads::new(CHUNKS);
    let planned = |position| reads.is_planned(ChunkId::at(position), &record(position));
    reads.plan(Planned::Before(50));
    assert!(planned(49) && !planned(50) && !planned(120));
    // Everything that is read is beside it, until following it is given up.
    read(&reads, 50..90);
    assert!(!reads.fits() && !pays(&reads));
    let mut waiting = Box::pin(reads.pays());
    assert!(waiting.as_mut().now_or_never().is_none());

    let chunks = Present::empty(CHUNKS);
    for position in 100..150 {
        chunks.insert(ChunkId::at(position));
    }
    reads.plan(Planned::Chunks(chunks));
    // What was read beside the former one is not held against this one, and who
    // waits to follow one is told.
    assert!(waiting.now_or_never().is_some());
    assert!(reads.fits() && pays(&reads));
    assert!(planned(120) && !planned(49));
    read(&reads, 100..120);
    assert!(reads.fits());
    // What only the former one named is beside this one.
    read(&reads, 0..40);
    assert!(!reads.fits() && !pays(&reads));
    read(&reads, 120..150);
    assert!(reads.fits() && pays(&reads));
}

#[test]
fn a_plan_of_something_else_rests_until_it_is_read() {
    let reads = Reads::new(CHUNKS);
    let planned = |position| reads.is_planned(ChunkId::at(position), &record(position));
    reads.plan(Planned::Before(200));
    reads.judge_plan(false);
    assert!(!pays(&reads) && !reads.fits());
    // Nobody else leaves to it what it does not bring.
    assert!(!planned(0) && reads.has_plan());
    // Any program reads the C library, and this one something else as well.
    read(&reads, 200..220);
    read(&reads, 0..100);
    assert!(!pays(&reads));
    read(&reads, 100..130);
    assert!(pays(&reads) && planned(0));
    // Or something is started that it is of.
    reads.judge_plan(false);
    assert!(!pays(&reads));
    reads.judge_plan(true);
    assert!(pays(&reads) && reads.fits());
}

#[tokio::test(start_paused = true)]
async fn a_plan_is_in_doubt_until_something_is_known_of_what_runs() {
    let soon = Duration::from_millis(300);
    let known = |reads: &Reads| reads.without_doubt().now_or_never().is_some();
    let judged = Reads::new(CHUNKS);
    judged.plan(Planned::Before(50));
    assert!(judged.is_in_doubt());
    // Whichever way.
    for fits in [true, false] {
        judged.judge_plan(fits);
        assert!(!judged.is_in_doubt() && known(&judged));
    }

    let reads = Reads::new(CHUNKS);
    reads.plan(Planned::Before(50));
    let mut waiting = Box::pin(reads.without_doubt());
    // Whoever starts a container reads this.
    read(&reads, 0..2);
    assert!((&mut waiting).now_or_never().is_none() && reads.is_in_doubt());
    let large = Record {
        size: 512 << 10,
        ..record(60)
    };
    reads.read(ChunkId::at(60), &large);
    assert!(waiting.now_or_never().is_some() && !reads.is_in_doubt());

    // Nothing starts.
    let idle = Reads::new(CHUNKS);
    idle.plan(Planned::Before(50));
    tokio::time::advance(soon).await;
    idle.plan(Planned::Before(60));
    assert!(idle.is_in_doubt() && !known(&idle));
    tokio::time::advance(soon).await;
    assert!(!idle.is_in_doubt() && known(&idle));
}
