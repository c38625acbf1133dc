//! Whether everything that the daemon keeps tells the same story: its
//! database, its directories, its mounts, and containerd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde_json::Value;
use sluice_oci::Digest;
use sluice_snapshotter::layer_dir::LayerDir;
use sluice_snapshotter::mount::{self, Mount};

use crate::command::text;
use crate::containerd::Containerd;
use crate::daemon::{Daemon, Mode};

/// All that may be in a root directory.
const ROOT: [&str; 13] = [
    "blobs",
    "chunk-index",
    "layers",
    "lock",
    "m",
    "next-layer",
    "profiles",
    "running",
    "scrubbed",
    "snapshots",
    "state.journal",
    "state.redb",
    "t",
];

/// A snapshot, as far as both sides know it: kind and parent, by name.
type Snapshots = BTreeMap<String, (String, String)>;

/// What the database says.
struct State {
    snapshots: BTreeMap<String, Value>,
    children: BTreeSet<(u64, u64)>,
    layers: BTreeSet<(Digest, u64)>,
    next_id: u64,
}

/// Checks an idle daemon: one whose last call has been answered. With
/// `containerd`, also that containerd's snapshots of the snapshotter `name`
/// are the daemon's.
pub fn check_agreement(
    daemon: &Daemon,
    mode: Mode,
    containerd: Option<(&Containerd, &str)>,
) -> Result<()> {
    let root = fs::canonicalize(daemon.root())?;
    let state = State::read(&root)?;
    state.check_links()?;
    check_root(&root)?;
    check_snapshots(&root, &state)?;
    let numbers = check_layers(&root, &state)?;
    check_mounts(&root, mode, &numbers)?;
    if let Some((containerd, name)) = containerd {
        let theirs = of_containerd(containerd, name)?;
        let ours = state.as_containerd_names_them();
        ensure!(
            theirs == ours,
            "containerd has the snapshots {theirs:#?}, the daemon {ours:#?}"
        );
    }
    Ok(())
}

impl State {
    /// Reads a copy: the daemon holds the original, whose last change is
    /// durable.
    fn read(root: &Path) -> Result<Self> {
        const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
        const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
        const LAYERS: TableDefinition<'_, (&[u8; 32], u64), ()> = TableDefinition::new("layers");
        const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

        let copy = tempfile::NamedTempFile::new()?;
        fs::copy(root.join("state.redb"), copy.path())?;
        let database = Database::open(copy.path()).context("the database does not open")?;
        let transaction = database.begin_read()?;
        let mut snapshots = BTreeMap::new();
        for entry in transaction.open_table(SNAPSHOTS)?.iter()? {
            let (key, record) = entry?;
            let record = serde_json::from_slice(record.value())?;
            snapshots.insert(key.value().to_owned(), record);
        }
        let mut children = BTreeSet::new();
        for entry in transaction.open_table(CHILDREN)?.iter()? {
            children.insert(entry?.0.value());
        }
        let mut layers = BTreeSet::new();
        for entry in transaction.open_table(LAYERS)?.iter()? {
            let key = entry?.0;
            let (digest, id) = key.value();
            layers.insert((Digest::from_raw(*digest), id));
        }
        let next_id = transaction.open_table(META)?.get("next_id")?;
        Ok(Self {
            snapshots,
            children,
            layers,
            next_id: next_id.map_or(1, |next| next.value()),
        })
    }

    /// The tables beside the snapshots say what the snapshots say.
    fn check_links(&self) -> Result<()> {
        let mut children = BTreeSet::new();
        let mut layers = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for (key, record) in &self.snapshots {
            let id = id_of(record)?;
            ensure!(ids.insert(id), "snapshot {key} has another's number {id}");
            ensure!(id < self.next_id, "number {id} of {key} is not yet given");
            if let Some(parent) = record["parent"].as_str() {
                let parent = self.snapshots.get(parent);
                let parent = parent.with_context(|| format!("{key} has lost its parent"))?;
                ensure!(parent["kind"] == "committed", "{key} is over {parent}");
                children.insert((id_of(parent)?, id));
            }
            if let Some(layer) = layer_of(record)? {
                layers.insert((layer, id));
            }
        }
        ensure!(children == self.children, "children: {:?}", self.children);
        ensure!(layers == self.layers, "layers: {:?}", self.layers);
        Ok(())
    }

    /// The daemon knows a snapshot as `<namespace>/<number>/<name>`, and one
    /// that serves a second namespace or parent as `<...>@<number>`.
    fn as_containerd_names_them(&self) -> Snapshots {
        let plain = |key: &str| key.splitn(3, '/').nth(2).unwrap_or(key).to_owned();
        let each = self.snapshots.iter().map(|(key, record)| {
            let text = |field: &str| record[field].as_str().unwrap_or_default();
            (plain(key), (text("kind").to_owned(), plain(text("parent"))))
        });
        each.collect()
    }
}

fn id_of(record: &Value) -> Result<u64> {
    record["id"].as_u64().context("a record without a number")
}

fn layer_of(record: &Value) -> Result<Option<Digest>> {
    Ok(record["layer"].as_str().map(str::parse).transpose()?)
}

fn of_containerd(containerd: &Containerd, name: &str) -> Result<Snapshots> {
    let list = text(
        containerd
            .ctr()
            .args(["snapshots", "--snapshotter", name, "list"]),
    )?;
    let mut lines = list.lines();
    let header = lines.next().unwrap_or_default();
    let column = header.find("KIND").context("a list without kinds")?;
    let parent = header.find("PARENT").context("a list without parents")?;
    let field = |line: &str, range: std::ops::Range<usize>| {
        let text = line.get(range.start..range.end.min(line.len()));
        text.unwrap_or_default().trim().to_owned()
    };
    Ok(lines
        .map(|line| {
            let kind = field(line, column..usize::MAX).to_lowercase();
            (field(line, 0..parent), (kind, field(line, parent..column)))
        })
        .collect())
}

fn names_in(directory: &Path) -> Result<BTreeSet<String>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn check_root(root: &Path) -> Result<()> {
    let mut strange = names_in(root)?;
    strange.retain(|name| !ROOT.contains(&name.as_str()));
    ensure!(strange.is_empty(), "in the root are left {strange:?}");
    Ok(())
}

/// A directory for each snapshot that is not a lazily mounted layer, and no
/// other.
fn check_snapshots(root: &Path, state: &State) -> Result<()> {
    let snapshots = root.join("snapshots");
    let mut expected = BTreeSet::new();
    for (key, record) in &state.snapshots {
        if layer_of(record)?.is_some() {
            continue;
        }
        let directory = snapshots.join(id_of(record)?.to_string());
        let mut parts = BTreeSet::from(["fs".to_owned()]);
        let work = directory.join("work").exists();
        if record["kind"] == "active" || work && record["kind"] == "committed" {
            parts.insert("work".to_owned());
        }
        let found = names_in(&directory).with_context(|| format!("snapshot {key}"))?;
        ensure!(found == parts, "snapshot {key} has {found:?}");
        expected.insert(id_of(record)?.to_string());
    }
    let found = names_in(&snapshots)?;
    ensure!(found == expected, "directories {found:?}, not {expected:?}");
    Ok(())
}

/// A whole directory for each layer that a snapshot refers to, and no other;
/// what counts as present is what the table of contents promises. Returns the
/// layers' numbers.
fn check_layers(root: &Path, state: &State) -> Result<BTreeSet<u64>> {
    let layers = root.join("layers");
    let wanted: BTreeSet<_> = state.layers.iter().map(|(digest, _)| *digest).collect();
    let expected = wanted.iter().map(|digest| digest.hex()).collect();
    let found = names_in(&layers)?;
    ensure!(found == expected, "layers {found:?}, not {expected:?}");
    let mut numbers = BTreeSet::new();
    for digest in wanted {
        let path = layers.join(digest.hex());
        let dir = LayerDir::open(&path, digest)?;
        let mut files = names_in(&path)?;
        // An evicted layer has none.
        files.insert("present".to_owned());
        let known = ["chunks", "data", "meta.erofs", "present"];
        // What shows what its tar is, or will: never both for long.
        let proven = files.remove("diff-id");
        let rest = files.remove("tar-rest");
        ensure!(!(proven && rest), "layer {digest} is proven, and goes on");
        ensure!(
            files.iter().eq(known),
            "layer {digest} has the files {files:?}"
        );
        check_present(&dir)?;
        let number = dir.identity().number;
        ensure!(numbers.insert(number), "number {number} is taken twice");
    }
    if let Some(last) = numbers.last() {
        let next: u64 = fs::read_to_string(root.join("next-layer"))?
            .trim()
            .parse()?;
        ensure!(*last < next, "number {last} would be given again");
    }
    Ok(numbers)
}

/// Every chunk that counts as present on the disk has its bytes.
pub fn check_present(dir: &LayerDir) -> Result<()> {
    let table = dir.chunks();
    for chunk in table.overlapping(0, dir.identity().data_size) {
        if !dir.present().contains(chunk) {
            continue;
        }
        let record = table.get(chunk);
        let mut bytes = vec![0; record.size as usize];
        dir.read_at(&mut bytes, record.data_offset)?;
        ensure!(
            Digest::of(&bytes) == record.digest,
            "wrong bytes count as present at {} of {}",
            record.data_offset,
            dir.data_path().display()
        );
    }
    Ok(())
}

/// The one FUSE mount of the mode, layers of the node on it, nothing else.
fn check_mounts(root: &Path, mode: Mode, numbers: &BTreeSet<u64>) -> Result<()> {
    let mounts = mount::mounts_below(root)?;
    let at =
        |place: &Path| -> Vec<&Mount> { mounts.iter().filter(|m| m.target == place).collect() };
    let (own, other) = match mode {
        Mode::Erofs => ("blobs", "t"),
        Mode::Fuse => ("t", "blobs"),
    };
    let (own, other) = (root.join(own), root.join(other));
    ensure!(at(&own).len() == 1, "{:?} at {}", at(&own), own.display());
    ensure!(at(&other).is_empty(), "{:?}", at(&other));
    let layers: BTreeSet<PathBuf> = mounts
        .iter()
        .filter(|mount| mount.target != own)
        .map(|mount| mount.target.clone())
        .collect();
    ensure!(
        layers.len() + 1 == mounts.len(),
        "mounted twice: {mounts:?}"
    );
    let possible: BTreeSet<PathBuf> = numbers
        .iter()
        .map(|number| root.join("m").join(number.to_string()))
        .collect();
    ensure!(layers.is_subset(&possible), "{layers:?} of {possible:?}");
    let points = names_in(&root.join("m"))?;
    let points: BTreeSet<PathBuf> = points.iter().map(|n| root.join("m").join(n)).collect();
    ensure!(
        points == layers,
        "mount points {points:?}, mounts {layers:?}"
    );
    Ok(())
}
