//! What a restart finds, and what a disk has lost.

use super::*;

#[test]
fn everything_is_there_after_a_restart() {
    let mut rig = Rig::new();
    let labels = lazy("chain-1", layer(1));
    let _ = rig.prepare("x", "", labels);
    rig.prepare("c", "chain-1", Labels::new()).unwrap();
    rig.prepare("d", "", Labels::new()).unwrap();
    let upper = PathBuf::from(&rig.mounts("d").unwrap()[0].source);
    fs::write(upper.join("kept"), "x").unwrap();
    rig.commit("plain", "d").unwrap();
    let (before, mounts) = (rig.list(), rig.mounts("c").unwrap());

    rig.stop();
    // What a crash leaves: directories without a record, a layer without one.
    let snapshots = rig.root.path().join("snapshots");
    fs::create_dir_all(snapshots.join("900/fs/deep")).unwrap();
    fs::create_dir_all(snapshots.join("new-1")).unwrap();
    fs::write(snapshots.join("file"), "").unwrap();
    rig.fake.state.lock().on_disk.insert(layer(9));
    // And a record whose directory never reached the disk.
    fs::remove_dir_all(snapshots.join("2")).unwrap();
    rig.restart();

    assert_eq!(rig.list(), before);
    assert_eq!(rig.mounts("c").unwrap(), mounts);
    assert_eq!(fs::read(upper.join("kept")).unwrap(), b"x");
    assert_eq!(rig.directories(), 2);
    assert!(snapshots.join("2/work").is_dir());
    assert_eq!(rig.fake.on_disk(), [layer(1)].into());
    // Numbers go on where they were.
    let new = rig.prepare("e", "", Labels::new()).unwrap();
    assert_eq!(Path::new(&new[0].source), snapshots.join("4/fs"));
}

#[test]
fn lost_content_is_not_replaced_by_nothing() {
    let mut rig = Rig::new();
    rig.prepare("tmp", "", Labels::new()).unwrap();
    rig.commit("base", "tmp").unwrap();
    rig.stop();
    fs::remove_dir_all(rig.root.path().join("snapshots/1")).unwrap();
    rig.restart();
    assert_kind(rig.prepare("c", "base", Labels::new()), ErrorKind::Internal);
    assert_eq!(rig.directories(), 0);
    rig.remove("base").unwrap();
    assert!(rig.list().is_empty());
}

#[test]
fn a_layer_that_the_disk_has_lost_is_made_again() {
    let rig = Rig::new();
    assert_kind(
        rig.prepare("tmp", "", lazy("chain", layer(1))),
        ErrorKind::AlreadyExists,
    );
    rig.prepare("c", "chain", Labels::new()).unwrap();
    rig.fake.state.lock().on_disk.clear();
    let mounts = rig.mounts("c").unwrap();
    assert_eq!(mounts[0].options.len(), 3);
    let requests = rig.fake.state.lock().requests.clone();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[0], requests[1]);
    // Where that fails, the reason is told and nothing is forgotten.
    let mut state = rig.fake.state.lock();
    state.on_disk.clear();
    state.not_lazy.insert(layer(1));
    drop(state);
    let error = rig.mounts("c").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.to_string().contains("no table of contents"),
        "{error}"
    );
    rig.stat("c").unwrap();
}

#[test]
fn what_a_rebuilt_database_does_not_know_is_set_aside() {
    let mut rig = Rig::new();
    assert_kind(
        rig.prepare("tmp", "", lazy("chain", layer(1))),
        ErrorKind::AlreadyExists,
    );
    rig.prepare("c", "chain", Labels::new()).unwrap();
    rig.stop();
    let root = rig.root.path();
    let upper = root.join("snapshots/2/fs");
    fs::write(upper.join("precious"), "written").unwrap();
    // Both copies of the records are gone.
    fs::write(root.join("state.redb"), "rubbish").unwrap();
    fs::remove_file(root.join("state.journal")).unwrap();
    rig.restart();
    assert_eq!(rig.list(), []);
    let kept = rig.root.path().join("lost/2-0/fs/precious");
    assert_eq!(fs::read(kept).unwrap(), b"written");
    assert_eq!(rig.fake.on_disk(), [layer(1)].into(), "not this time");
    // Numbers are not given out again.
    rig.prepare("new", "", Labels::new()).unwrap();
    assert!(rig.root.path().join("snapshots/3").is_dir());
}
