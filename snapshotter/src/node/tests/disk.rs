//! What the disk has damaged, lost or has no room for.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use tokio::sync::mpsc;

use super::*;
use crate::scrub::{Report, Scrubber as _};

/// What a daemon tells the node when it asks which layers are in use.
fn in_use(layers: &[&Sample]) -> InUse {
    let layers: HashSet<Digest> = layers.iter().map(|sample| sample.digest()).collect();
    Arc::new(move || Some(layers.clone()))
}

fn content_size(root: &TempDir, sample: &Sample) -> u64 {
    let path = root.path().join("layers").join(sample.digest().hex());
    LayerDir::content_size(&path).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_used_longest_ago_is_evicted_and_fetched_again() {
    for mode in [Mode::Erofs, Mode::Fuse] {
        let root = tempfile::tempdir().unwrap();
        let layers: Vec<Sample> = (0..3)
            .map(|n| {
                let mut all = files(2, 100 + n);
                all.push(SampleFile {
                    name: "large".to_owned(),
                    content: noise(70 + n as u64, 1 << 20),
                });
                Sample::new(all, &Layout::default())
            })
            .collect();
        let described: Vec<_> = layers.iter().map(|s| (s, labels(s))).collect();
        let registry = Registry::serve(&described);
        let mut config = config(&root);
        config.mode = Some(mode);
        let mounts = async |node: &Node| {
            let mut mounts = Vec::new();
            for sample in &layers {
                node.open(request(&registry, sample)).await.unwrap();
                let mount = node.mount(sample.digest()).await.unwrap();
                assert_content(&mount, sample).await;
                mounts.push(mount);
            }
            mounts
        };
        // Without a quota nothing goes, whatever is in use.
        let node = Node::start(config.clone(), client()).unwrap();
        mounts(&node).await;
        node.make_room(in_use(&[])).await;
        assert!(layers.iter().all(|s| content_size(&root, s) > 1 << 20));
        node.stop().await;

        // The order of use outlives the process: 1 after 0 and 2.
        let at = |n: usize| root.path().join("layers").join(layers[n].digest().hex());
        for (n, age) in [(0, 300), (1, 100), (2, 200)] {
            let chunks = fs::File::open(at(n).join("chunks")).unwrap();
            let then = std::time::SystemTime::now() - Duration::from_secs(age);
            chunks.set_modified(then).unwrap();
        }
        let usage: u64 = (0..3)
            .map(|n| LayerDir::usage(&at(n)).unwrap().unwrap().0)
            .sum();
        config.quota.limit = Some(usage - 1);
        let node = Node::start(config.clone(), client()).unwrap();
        let mount = node.mount(layers[0].digest()).await.unwrap();
        let evicted = |n: usize| content_size(&root, &layers[n]) == 0;
        // 0 is the oldest, but in use.
        node.make_room(in_use(&[&layers[0]])).await;
        assert_eq!(
            [evicted(0), evicted(1), evicted(2)],
            [false, false, true],
            "{mode:?}"
        );
        // Then everything may go, and 0 was in use just now.
        node.stop().await;
        config.quota.limit = Some(usage / 2);
        let node = Node::start(config, client()).unwrap();
        let again = node.mount(layers[0].digest()).await.unwrap();
        assert_eq!(again, mount);
        node.make_room(in_use(&[])).await;
        assert_eq!(
            [evicted(0), evicted(1), evicted(2)],
            [false, true, true],
            "{mode:?}"
        );
        // containerd is told so.
        let told = async |n: usize| node.usage(layers[n].digest()).await.unwrap();
        let (kept, gone) = (told(0).await, told(1).await);
        assert!(kept.bytes > gone.bytes + (1 << 20), "{kept:?}, {gone:?}");
        // What was evicted needs its content alone.
        registry.take_log();
        let mount = node.mount(layers[1].digest()).await.unwrap();
        assert!(registry.take_log().is_empty());
        assert_content(&mount, &layers[1]).await;
        assert!(!registry.take_ranges().is_empty());
        assert!(told(1).await.bytes > gone.bytes + (1 << 20));
        assert_content(&again, &layers[0]).await;
        assert!(registry.take_ranges().is_empty());
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_background_download_keeps_within_the_quota() {
    const FILES: usize = 40;
    let root = tempfile::tempdir().unwrap();
    let sample = Sample::new(files(FILES, 100_000), &Layout::default());
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let mut config = config(&root);
    config.background = Some(Duration::ZERO);
    config.quota.limit = Some(1 << 20);
    let start = |config: &Config| Node::start(config.clone(), client()).unwrap();
    let node = start(&config);
    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    let size = || content_size(&root, &sample);
    // Nothing is fetched ahead before it is known what there is.
    assert_eq!(size(), 0);
    node.make_room(in_use(&[&sample])).await;
    until(|| size() > (1 << 20) - 200_000).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    node.make_room(in_use(&[&sample])).await;
    assert!(size() < (1 << 20) + 100_000, "{}", size());
    // What is read is fetched all the same.
    assert_content(&mount, &sample).await;
    assert!(size() > 2 << 20);
    node.stop().await;
    config.quota.limit = Some(100 << 20);
    let evicted = LayerDir::open(&layer_path(&root, &sample), sample.digest()).unwrap();
    evicted.evict().unwrap();
    let node = start(&config);
    node.mount(sample.digest()).await.unwrap();
    node.make_room(in_use(&[&sample])).await;
    until(|| size() > FILES as u64 * 100_000).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_that_is_in_use_after_all_keeps_its_content() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    assert_content(&mount, &sample).await;
    node.stop().await;
    let mut config = config(&root);
    config.quota.limit = Some(1);
    // Complete, so that the kernel reads the file itself.
    let node = Node::start(config, client()).unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    let open = fs::File::open(mount.join("large")).unwrap();
    node.make_room(in_use(&[])).await;
    assert!(content_size(&root, &sample) > 1 << 20, "something holds it");
    assert_content(&mount, &sample).await;
    drop(open);
    node.make_room(in_use(&[])).await;
    assert_eq!(content_size(&root, &sample), 0);
    registry.take_log();
    let mount = node.mount(sample.digest()).await.unwrap();
    assert_content(&mount, &sample).await;
    assert!(!registry.take_ranges().is_empty());
    node.stop().await;
}

fn layer_path(root: &TempDir, sample: &Sample) -> PathBuf {
    root.path().join("layers").join(sample.digest().hex())
}

/// Opens the directory beside whoever else has it open.
fn look(root: &TempDir, sample: &Sample) -> LayerDir {
    LayerDir::open(&layer_path(root, sample), sample.digest()).unwrap()
}

fn flip(path: &std::path::Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn scrub(node: &Node) -> Vec<Report> {
    let (each, mut reports) = mpsc::channel(1);
    let collected = async {
        let mut all = Vec::new();
        while let Some(report) = reports.recv().await {
            all.push(report);
        }
        all
    };
    tokio::join!(node.scrub(each), collected).1
}

/// A process that dies: its mounts go with it, and nothing is made durable
/// that was not.
async fn die(node: Node) {
    tokio::task::spawn_blocking(move || drop(node))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_describes_a_layer_is_mended_and_its_content_kept() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    assert_content(&mount, &sample).await;
    node.stop().await;
    for (file, at) in [("meta.erofs", 3000), ("chunks", 4200)] {
        flip(&layer_path(&root, &sample).join(file), at);
        registry.take_log();
        // While the registry is away the layer fails, and nothing is lost.
        let node = Node::start(config(&root), client()).unwrap();
        registry.misbehave(|_| Some(Fault::Status(500)));
        let error = node.mount(sample.digest()).await.unwrap_err().to_string();
        assert!(
            error.contains(file) && error.contains("cannot be mended now"),
            "{error}"
        );
        registry.misbehave(|_| None);
        registry.take_log();
        assert_eq!(node.mount(sample.digest()).await.unwrap(), mount);
        assert_eq!(registry.take_log().len(), 1, "the table of contents");
        assert_content(&mount, &sample).await;
        assert!(registry.take_log().is_empty(), "the content was there");
        node.stop().await;
    }
}

/// Another program touches what is mounted and mapped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_describes_a_layer_is_mended_where_it_is_mounted() {
    let cut = |file: &File| file.set_len(2000).unwrap();
    let overwrite = |file: &File| {
        file.write_all_at(&[0xff; 500], 2000).unwrap();
        // Clocks of file systems are coarse.
        let then = std::time::SystemTime::now() + Duration::from_secs(1);
        file.set_modified(then).unwrap();
    };
    let cut_within_a_page = |file: &File| {
        let size = file.metadata().unwrap().len();
        file.set_len(size - 1).unwrap();
    };
    type Damage = fn(&File);
    let damages: [(&str, Damage); 3] = [
        ("meta.erofs", cut),
        ("meta.erofs", overwrite),
        ("chunks", cut_within_a_page),
    ];
    for mode in [Mode::Erofs, Mode::Fuse] {
        let root = tempfile::tempdir().unwrap();
        let sample = sample();
        let mut config = config(&root);
        config.mode = Some(mode);
        let (registry, node, mount) = mounted_with(config, &sample).await;
        for (name, damage) in damages {
            let path = layer_path(&root, &sample).join(name);
            let whole = fs::read(&path).unwrap();
            damage(&File::options().write(true).open(&path).unwrap());
            registry.misbehave(|_| Some(Fault::Status(500)));
            node.look_at_descriptions().await;
            assert!(fs::read(&path).unwrap() != whole);
            registry.misbehave(|_| None);
            node.look_at_descriptions().await;
            assert!(fs::read(&path).unwrap() == whole, "{mode:?}: {name}");
        }
        registry.take_log();
        node.look_at_descriptions().await;
        assert!(registry.take_log().is_empty(), "all is well");
        assert_content(&mount, &sample).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_process_that_died_what_it_left_is_verified() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    assert_content(&mount, &sample).await;
    node.persist().await;
    die(node).await;
    let dir = look(&root, &sample);
    let all = dir.present().count();
    assert!(dir.is_complete());
    let wrong = dir.chunks().overlapping(0, u64::MAX).nth(4).unwrap();
    flip(&dir.data_path(), dir.chunks().get(wrong).data_offset);
    registry.take_log();
    let node = Node::start(config(&root), client()).unwrap();
    until(|| look(&root, &sample).present().count() == all - 1).await;
    let again = node.mount(sample.digest()).await.unwrap();
    assert_content(&again, &sample).await;
    assert_eq!(registry.take_ranges().len(), 1);
    node.stop().await;
    // After an end in order nobody looks.
    flip(&dir.data_path(), dir.chunks().get(wrong).data_offset);
    let node = Node::start(config(&root), client()).unwrap();
    assert!(node.0.scrubbing.try_lock().is_ok());
    node.stop().await;
    assert!(look(&root, &sample).is_complete());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_power_loss_nothing_is_read_unverified() {
    for mode in [Mode::Erofs, Mode::Fuse] {
        let root = tempfile::tempdir().unwrap();
        let sample = sample();
        let mut config = config(&root);
        config.mode = Some(mode);
        let (_registry, node, mount) = mounted_with(config.clone(), &sample).await;
        assert_content(&mount, &sample).await;
        node.persist().await;
        die(node).await;
        // The disk has lost what it said it had; and the machine is another's
        // boot.
        let dir = look(&root, &sample);
        let size = dir.identity().data_size;
        let holes = File::options().write(true).open(dir.data_path()).unwrap();
        holes.set_len(0).unwrap();
        holes.set_len(size).unwrap();
        fs::write(root.path().join("running"), "another\n").unwrap();
        // The check of everything never gets its turn: this is about what is
        // read before.
        config.scrub_rate = 1;
        let node = Node::start(config, client()).unwrap();
        let again = node.mount(sample.digest()).await.unwrap();
        assert_content(&again, &sample).await;
        node.stop().await;
        assert!(
            root.path().join("running").exists(),
            "the doubt is not settled"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scrub_finds_what_has_rotted_and_has_it_fetched_again() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    assert_content(&mount, &sample).await;
    let reports = scrub(&node).await;
    let dir = look(&root, &sample);
    assert_eq!(reports.len(), 1);
    assert!(reports[0].is_clean(), "{reports:?}");
    assert_eq!(reports[0].checked, u64::from(dir.chunks().len()));
    node.stop().await;

    // Complete: the kernel reads the file itself, and so nobody would ask for
    // what is taken back.
    let node = Node::start(config(&root), client()).unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    let wrong = dir.chunks().overlapping(0, u64::MAX).nth(9).unwrap();
    let at = dir.chunks().get(wrong).data_offset;
    flip(&dir.data_path(), at);
    registry.take_log();
    let reports = scrub(&node).await;
    assert_eq!((reports[0].wrong, &reports[0].failed), (1, &None));
    let record = dir.chunks().get(wrong);
    let data = File::open(dir.data_path()).unwrap();
    until(|| {
        let mut bytes = vec![0; record.size as usize];
        data.read_exact_at(&mut bytes, at).unwrap();
        Digest::of(&bytes) == record.digest
    })
    .await;
    assert_eq!(registry.take_ranges().len(), 1);
    assert_content(&mount, &sample).await;
    assert!(scrub(&node).await[0].is_clean());

    // What describes it, under the mount.
    for (file, at) in [("meta.erofs", 3000), ("chunks", 4200)] {
        flip(&layer_path(&root, &sample).join(file), at);
        registry.misbehave(|_| Some(Fault::Status(500)));
        let reports = scrub(&node).await;
        let why = reports[0].failed.as_deref().unwrap();
        assert!(
            why.contains(file) && why.contains("cannot be mended now"),
            "{why}"
        );
        registry.misbehave(|_| None);
        let reports = scrub(&node).await;
        let what = reports[0].repaired.as_deref().unwrap();
        assert!(what.contains(file) && what.contains("mended"), "{what}");
        assert_content(&mount, &sample).await;
        assert!(scrub(&node).await[0].is_clean());
    }
    // A layer that nobody mounts is opened for this alone.
    node.stop().await;
    let node = Node::start(config(&root), client()).unwrap();
    assert!(scrub(&node).await[0].is_clean());
    assert!(node.0.slots.lock().is_empty());

    // On a timer, when so long has passed since the last time.
    const HOUR: Duration = Duration::from_secs(3600);
    let start_timer = || {
        let timer = node.clone();
        tokio::spawn(async move { timer.scrub_every(HOUR).await })
    };
    let stamp = File::open(root.path().join("scrubbed")).unwrap();
    let last = || stamp.metadata().unwrap().modified().unwrap();
    flip(&dir.data_path(), at);
    let before = last();
    let timer = start_timer();
    tokio::time::sleep(Duration::from_millis(50)).await;
    timer.abort();
    assert_eq!(last(), before, "it is not due");
    stamp.set_modified(before - HOUR * 2).unwrap();
    let timer = start_timer();
    until(|| last() >= before).await;
    timer.abort();
    let present = |chunk| look(&root, &sample).present().contains(chunk);
    assert!(!present(wrong));

    // Not sooner, either, when it cannot be written down, as on a read-only
    // file system.
    let path = root.path().join("scrubbed");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let stamp = File::open(&path).unwrap();
    stamp.set_modified(before - HOUR * 2).unwrap();
    let [first, second] = [11, 13].map(|n| dir.chunks().overlapping(0, u64::MAX).nth(n).unwrap());
    flip(&dir.data_path(), dir.chunks().get(first).data_offset);
    let timer = start_timer();
    until(|| !present(first)).await;
    flip(&dir.data_path(), dir.chunks().get(second).data_offset);
    tokio::time::sleep(Duration::from_millis(200)).await;
    timer.abort();
    assert!(present(second), "it is not due again");
    node.stop().await;
}
