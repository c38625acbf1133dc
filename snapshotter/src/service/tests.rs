//! The service over a strict fake of the data plane.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sluice_oci::Digest;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::*;

mod claims;
mod disputes;
mod expected;
mod fake;
mod model;
mod restart;

use fake::Fake;

struct Rig {
    runtime: Runtime,
    root: TempDir,
    fake: Arc<Fake>,
    snapshots: Option<Arc<Snapshots<Fake>>>,
}

impl Rig {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut rig = Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .build()
                .unwrap(),
            fake: Fake::new(root.path()),
            root,
            snapshots: None,
        };
        rig.restart();
        rig
    }

    fn start(&self) -> Result<Snapshots<Fake>, Error> {
        let store = Store::open(self.root.path())?;
        self.runtime.block_on(Snapshots::start(
            self.root.path(),
            store,
            Arc::clone(&self.fake),
            OverlayOptions::default(),
        ))
    }

    fn stop(&mut self) {
        if let Some(snapshots) = self.snapshots.take() {
            self.runtime.block_on(snapshots.close());
        }
    }

    fn restart(&mut self) {
        self.stop();
        self.snapshots = Some(Arc::new(self.start().unwrap()));
    }

    fn run<T>(&self, call: impl AsyncFnOnce(&Snapshots<Fake>) -> T) -> T {
        let snapshots = self.snapshots.as_ref().unwrap();
        self.runtime.block_on(call(snapshots))
    }

    fn prepare(&self, name: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, Error> {
        self.run(async |s| {
            s.prepare(key(name), Key::try_from(parent).ok(), labels)
                .await
        })
    }

    fn view(&self, name: &str, parent: &str) -> Result<Vec<Mount>, Error> {
        self.run(async |s| {
            let parent = Key::try_from(parent).ok();
            s.view(key(name), parent, Labels::new()).await
        })
    }

    fn commit(&self, name: &str, active: &str) -> Result<(), Error> {
        self.run(async |s| s.commit(key(name), key(active), Labels::new()).await)
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        self.run(async |s| s.remove(key(name)).await)
    }

    fn stat(&self, name: &str) -> Result<Info, Error> {
        self.run(async |s| s.stat(key(name)).await)
    }

    fn mounts(&self, name: &str) -> Result<Vec<Mount>, Error> {
        self.run(async |s| s.mounts(key(name)).await)
    }

    fn list(&self) -> Vec<Info> {
        self.run(async |s| s.list(Vec::new()).await).unwrap()
    }

    fn directories(&self) -> usize {
        fs::read_dir(self.root.path().join("snapshots"))
            .unwrap()
            .count()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop();
    }
}

fn key(text: &str) -> Key {
    Key::try_from(text).unwrap()
}

fn layer(n: u8) -> Digest {
    Digest::of(&[n])
}

fn lazy(target: &str, digest: Digest) -> Labels {
    [
        ("containerd.io/snapshot.ref", target),
        ("containerd.io/snapshot/cri.image-ref", "r.io/app:1"),
        (
            "containerd.io/snapshot/cri.layer-digest",
            &digest.to_string(),
        ),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into()
}

#[track_caller]
fn assert_kind<T: std::fmt::Debug>(result: Result<T, Error>, kind: ErrorKind) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
}

#[test]
fn a_lazy_layer_is_committed_and_answered_with_already_exists() {
    let rig = Rig::new();
    let labels = lazy("chain-1", layer(1));
    assert_kind(
        rig.prepare("extract-1", "", labels.clone()),
        ErrorKind::AlreadyExists,
    );
    let info = rig.stat("chain-1").unwrap();
    assert_eq!((info.kind, &info.labels), (Kind::Committed, &labels));
    assert_kind(rig.stat("extract-1"), ErrorKind::NotFound);
    let usage = rig.run(async |s| s.usage(key("chain-1")).await).unwrap();
    assert_eq!((usage.bytes, usage.inodes), (77, 7));

    // On top of it, a container.
    let mounts = rig.prepare("c", "chain-1", Labels::new()).unwrap();
    let lower = rig.fake.directory(layer(1));
    let lower = format!("lowerdir={}", lower.display());
    assert_eq!(mounts[0].options.last(), Some(&lower));
    assert_eq!(rig.mounts("c").unwrap(), mounts);

    // Asked again, it is there: nothing is opened twice.
    assert_kind(
        rig.prepare("extract-2", "", labels),
        ErrorKind::AlreadyExists,
    );
    assert_eq!(rig.fake.opened.load(Ordering::Relaxed), 1);
}

#[test]
fn a_snapshots_usage_is_what_its_own_files_take() {
    let rig = Rig::new();
    let usage = |name: &str| rig.run(async |s| s.usage(key(name)).await).unwrap();
    let _ = rig.prepare("x", "", lazy("chain-1", layer(1)));
    let mounts = rig.prepare("c", "chain-1", Labels::new()).unwrap();
    let mut options = mounts[0].options.iter();
    let upper = options.find_map(|o| o.strip_prefix("upperdir=")).unwrap();
    let file = Path::new(upper).join("file");
    let empty = usage("c");
    assert_eq!(empty.inodes, 1);

    // Blocks and not lengths, and one file by two names once.
    fs::write(&file, vec![1; 300_000]).unwrap();
    fs::hard_link(&file, file.with_file_name("again")).unwrap();
    let sparse = fs::File::create(file.with_file_name("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    let written = usage("c");
    assert_eq!(written.inodes, 3);
    let more = written.bytes - empty.bytes;
    assert!((300_000..400_000).contains(&more), "{more}");

    fs::remove_file(&file).unwrap();
    fs::remove_file(file.with_file_name("again")).unwrap();
    assert_eq!(usage("c").inodes, 2);
    assert!(usage("c").bytes < written.bytes - 250_000);
    // A committed one keeps what it had.
    let last = usage("c");
    rig.commit("done", "c").unwrap();
    assert_eq!(usage("done"), last);
}

#[test]
fn a_layer_that_cannot_be_lazy_is_an_ordinary_snapshot() {
    let rig = Rig::new();
    rig.fake.state.lock().not_lazy.insert(layer(1));
    let mounts = rig.prepare("x", "", lazy("chain-1", layer(1))).unwrap();
    assert_eq!(mounts[0].fs_type, "bind");
    let info = rig.stat("x").unwrap();
    assert_eq!(info.kind, Kind::Active);
    // The client can tell people why.
    let why = "containerd.io/snapshot/sluice.not-lazy";
    assert_eq!(info.labels[why], "it has no table of contents");
    rig.commit("chain-1", "x").unwrap();
    // And so is one whose labels do not say enough.
    let mut labels = lazy("chain-2", layer(2));
    labels.remove("containerd.io/snapshot/cri.image-ref");
    rig.prepare("y", "chain-1", labels).unwrap();
    assert_eq!(rig.fake.opened.load(Ordering::Relaxed), 1);
}

#[test]
fn one_target_over_two_parents_is_served_to_both() {
    let rig = Rig::new();
    for base in ["ns1/base", "ns2/base"] {
        rig.prepare("tmp", "", Labels::new()).unwrap();
        rig.commit(base, "tmp").unwrap();
        assert_kind(
            rig.prepare("tmp", base, lazy("chain", layer(1))),
            ErrorKind::AlreadyExists,
        );
    }
    let filter = "labels.\"containerd.io/snapshot.ref\"==chain,parent==\"ns2/base\"";
    let found = rig
        .run(async |s| s.list(vec![Filter::parse(filter).unwrap()]).await)
        .unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(rig.stat("chain").unwrap().parent, Some(key("ns1/base")));
    // The third time nothing is added.
    assert_kind(
        rig.prepare("tmp", "ns2/base", lazy("chain", layer(1))),
        ErrorKind::AlreadyExists,
    );
    assert_eq!(rig.list().len(), 4);
    // The layer goes with the last of the two.
    rig.remove("chain").unwrap();
    assert_eq!(rig.fake.on_disk(), [layer(1)].into());
    rig.remove(found[0].name.as_str()).unwrap();
    assert_eq!(rig.fake.on_disk(), [].into());
}

#[test]
fn one_bad_layer_fails_alone() {
    let rig = Rig::new();
    for n in 1..=2 {
        let _ = rig.prepare("x", "", lazy(&format!("chain-{n}"), layer(n)));
        rig.prepare(&format!("c{n}"), &format!("chain-{n}"), Labels::new())
            .unwrap();
    }
    rig.fake.state.lock().broken.insert(layer(1));
    let error = rig.mounts("c1").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&layer(1).to_string()), "{error}");
    assert!(rig.mounts("c2").is_ok());
    // Its removal is tried again by a cleanup.
    rig.remove("c1").unwrap();
    rig.remove("chain-1").unwrap();
    assert!(rig.fake.on_disk().contains(&layer(1)));
    assert_kind(rig.run(async |s| s.cleanup().await), ErrorKind::Unavailable);
    rig.fake.state.lock().broken.clear();
    rig.run(async |s| s.cleanup().await).unwrap();
    assert_eq!(rig.fake.on_disk(), [layer(2)].into());
}

#[test]
fn the_data_plane_is_told_of_what_is_about_to_run() {
    let rig = Rig::new();
    let manifest = Digest::of(b"manifest");
    let mut top = lazy("chain-2", layer(2));
    let label = "containerd.io/snapshot/cri.manifest-digest";
    top.insert(label.to_owned(), manifest.to_string());
    let _ = rig.prepare("x", "", lazy("chain-1", layer(1)));
    let _ = rig.prepare("x", "chain-1", top);
    // An upper layer that is unpacked runs nothing, nor does who only looks.
    rig.fake.state.lock().not_lazy.insert(layer(3));
    rig.prepare("x", "chain-2", lazy("chain-3", layer(3)))
        .unwrap();
    rig.view("look", "chain-2").unwrap();
    rig.prepare("nothing-lazy", "", Labels::new()).unwrap();
    assert!(rig.fake.state.lock().starts.is_empty());

    let asked = [("containerd.io/snapshot/sluice.record", "ci")];
    let asked = asked.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    rig.prepare("one", "chain-2", Labels::new()).unwrap();
    rig.prepare("two", "chain-2", asked).unwrap();
    let image = ImageUse {
        reference: Some("r.io/app:1".to_owned()),
        manifest_digest: Some(manifest),
        layers: vec![layer(1), layer(2)],
        recording: None,
    };
    let named = ImageUse {
        recording: Some("ci".to_owned()),
        ..image.clone()
    };
    assert_eq!(rig.fake.state.lock().starts, [image.clone(), named]);
    // And whoever asks, of what is in use: two containers, the view, and the
    // snapshot into which the third layer is unpacked.
    let used = rig.run(async |s| s.images().await).unwrap();
    assert_eq!(used, [(image, 4)]);
}

#[test]
fn a_snapshot_that_is_not_made_leaves_nothing() {
    let rig = Rig::new();
    rig.prepare("a", "", Labels::new()).unwrap();
    assert_kind(
        rig.prepare("a", "", Labels::new()),
        ErrorKind::AlreadyExists,
    );
    assert_kind(rig.prepare("b", "no", Labels::new()), ErrorKind::NotFound);
    assert_kind(rig.view("b", "a"), ErrorKind::InvalidArgument);
    let remote = lazy("chain", layer(1));
    assert_kind(rig.prepare("b", "no", remote), ErrorKind::NotFound);
    assert_eq!(rig.fake.opened.load(Ordering::Relaxed), 0);
    assert_eq!(rig.directories(), 1);
}

#[test]
fn many_at_once_agree() {
    let rig = Rig::new();
    let snapshots = rig.snapshots.clone().unwrap();
    rig.runtime.block_on(async {
        let tasks = (0..64).map(|n| {
            let snapshots = Arc::clone(&snapshots);
            tokio::spawn(async move {
                // Eight tasks a layer race to make it, use it, remove it.
                let target = format!("chain-{}", n % 8);
                let labels = lazy(&target, layer(n % 8));
                for round in 0..4 {
                    let name = key(&format!("x-{n}-{round}"));
                    let made = snapshots.prepare(name, None, labels.clone()).await;
                    assert_kind(made, ErrorKind::AlreadyExists);
                    let name = key(&format!("c-{n}-{round}"));
                    match snapshots
                        .prepare(name.clone(), Some(key(&target)), Labels::new())
                        .await
                    {
                        Ok(_) => {
                            snapshots.mounts(name.clone()).await.unwrap();
                            snapshots.cleanup().await.unwrap();
                            snapshots.remove(name).await.unwrap();
                        }
                        // Another task removed the layer's snapshot meanwhile.
                        Err(error) => assert!(
                            matches!(
                                error.kind(),
                                ErrorKind::NotFound | ErrorKind::FailedPrecondition
                            ),
                            "{error}"
                        ),
                    }
                    let _ = snapshots.remove(key(&target)).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
    });
    let left = rig.list();
    let layers: HashSet<String> = left.iter().map(|info| info.name.to_string()).collect();
    assert_eq!(rig.fake.on_disk().len(), layers.len(), "{left:?}");
    assert_eq!(rig.directories(), 0);
}

#[test]
fn what_is_mounted_is_told_before_anything_is_evicted() {
    let rig = Rig::new();
    let told = || {
        rig.run(async |s| s.make_room().await);
        rig.fake.state.lock().in_use.take().unwrap()
    };
    for (n, (chain, parent)) in (1..).zip([("a", ""), ("b", "a"), ("c", "b"), ("x", "")]) {
        assert_kind(
            rig.prepare("tmp", parent, lazy(chain, layer(n))),
            ErrorKind::AlreadyExists,
        );
    }
    assert_eq!(
        told(),
        HashSet::new(),
        "nothing is mounted from committed ones"
    );
    rig.prepare("container", "b", Labels::new()).unwrap();
    assert_eq!(told(), [layer(1), layer(2)].into());
    rig.view("view", "x").unwrap();
    assert_eq!(told(), [layer(1), layer(2), layer(4)].into());
    rig.remove("container").unwrap();
    assert_eq!(told(), [layer(4)].into());
}

fn chain_id(below: Digest, diff_id: Digest) -> Digest {
    Digest::of(format!("{below} {diff_id}").as_bytes())
}

impl Rig {
    fn proves(&self, layer: Digest, diff_id: Digest, certain: bool) {
        let proof = Proof {
            diff_id: Some(diff_id),
            padded: None,
            tree_fits: true,
            certain,
        };
        self.fake.state.lock().proofs.insert(layer, proof);
    }

    fn standing(&self, name: &str) -> String {
        let label = "containerd.io/snapshot/sluice.content";
        let info = self.run(async |s| s.stat_with_standing(key(name)).await);
        info.unwrap().labels[label].clone()
    }
}
