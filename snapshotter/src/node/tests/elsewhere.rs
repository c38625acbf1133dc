//! Layers that take chunks from others.

use std::collections::HashSet;
use std::path::Path;

use super::*;
use crate::node::elsewhere::INDEX;

/// Files of which those from `new` on are this version's own.
fn version(number: u64, new: usize) -> Sample {
    let mut all = files(12, 30_000);
    for (index, file) in all.iter_mut().enumerate().skip(new) {
        file.content = noise(number * 1_000 + index as u64, 30_000);
    }
    Sample::new(all, &Layout::default())
}

fn serve(layers: &[&Sample]) -> Registry {
    let layers: Vec<_> = layers.iter().map(|layer| (*layer, labels(layer))).collect();
    Registry::serve(&layers)
}

/// As each image had one layer.
async fn mount(node: &Node, registry: &Registry, sample: &Sample) -> PathBuf {
    node.open(request(registry, sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    registry.take_log();
    mount
}

/// Reads a file, and returns how many requests that took.
async fn requests_for(registry: &Registry, mount: &Path, file: &SampleFile) -> usize {
    let found = read(mount.join(&file.name)).await.unwrap();
    assert!(found == file.content, "{}", file.name);
    registry.take_log().len()
}

fn without_read_ahead(root: &TempDir) -> Config {
    let mut config = config(root);
    config.fetch.read_ahead = 0;
    config
}

/// Waits until the index has all layers.
async fn indexed(node: &Node, layers: &[&Sample]) {
    let known = || {
        let all = node.0.elsewhere.indexed();
        layers.iter().all(|layer| all.contains(&layer.digest()))
    };
    while !known() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_repository_holds_is_given_to_no_other_unless_the_node_shares() {
    let [one, two] = [(1, 12), (2, 9)].map(|(number, new)| version(number, new));
    for (sharing, requests) in [
        (Sharing::Repository, 1),
        (Sharing::Registry, 0),
        (Sharing::Node, 0),
    ] {
        let root = tempfile::tempdir().unwrap();
        let registry = serve(&[&one, &two]);
        let mut config = without_read_ahead(&root);
        config.sharing = sharing;
        let node = Node::start(config, client()).unwrap();
        let first = mount(&node, &registry, &one).await;
        assert_content(&first, &one).await;
        indexed(&node, &[&one]).await;
        let mut other = request(&registry, &two);
        let host = other.reference.host().to_owned();
        other.reference = format!("{host}/other/app:v1").parse().unwrap();
        node.open(other).await.unwrap();
        let second = node.mount(two.digest()).await.unwrap();
        registry.take_log();
        let found = requests_for(&registry, &second, &two.files[0]).await;
        assert_eq!(found, requests, "{sharing:?}");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_version_fetches_what_is_new_before_and_after_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let [one, two, three] = [(1, 12), (2, 9), (3, 8)].map(|(number, new)| version(number, new));
    let registry = serve(&[&one, &two, &three]);
    let node = Node::start(without_read_ahead(&root), client()).unwrap();
    let first = mount(&node, &registry, &one).await;
    assert_content(&first, &one).await;
    indexed(&node, &[&one]).await;
    let second = mount(&node, &registry, &two).await;
    for (index, file) in two.files.iter().enumerate() {
        let requests = requests_for(&registry, &second, file).await;
        assert_eq!(requests, usize::from(index >= 9), "{}", file.name);
    }
    let reused: u64 = node
        .status()
        .layers
        .iter()
        .map(|layer| layer.activity.reused)
        .sum();
    assert_eq!(reused, 9 * 30_000);
    node.stop().await;

    // Neither is open now.
    let node = Node::start(without_read_ahead(&root), client()).unwrap();
    let third = mount(&node, &registry, &three).await;
    for (index, file) in three.files.iter().enumerate() {
        let requests = requests_for(&registry, &third, file).await;
        assert_eq!(requests, usize::from(index >= 8), "{}", file.name);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_is_lost_is_made_of_the_layers() {
    let root = tempfile::tempdir().unwrap();
    let [one, two] = [(1, 12), (2, 12)].map(|(number, new)| version(number, new - number as usize));
    let registry = serve(&[&one, &two]);
    let index = root.path().join(INDEX);
    let node = Node::start(without_read_ahead(&root), client()).unwrap();
    let first = mount(&node, &registry, &one).await;
    assert_content(&first, &one).await;
    indexed(&node, &[&one]).await;
    node.stop().await;
    for (lose, power) in [(true, false), (false, true)] {
        if lose {
            fs::remove_dir_all(&index).unwrap();
        }
        if power {
            fs::write(root.path().join("running"), "another\n").unwrap();
            fs::write(index.join("99"), "half").unwrap();
        }
        let node = Node::start(without_read_ahead(&root), client()).unwrap();
        indexed(&node, &[&one]).await;
        let second = mount(&node, &registry, &two).await;
        assert_eq!(requests_for(&registry, &second, &two.files[3]).await, 0);
        assert_eq!(requests_for(&registry, &second, &two.files[11]).await, 1);
        node.remove(two.digest()).await.unwrap();
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_evicted_or_removed_is_neither_taken_nor_held() {
    let root = tempfile::tempdir().unwrap();
    let [one, two] = [(1, 12), (2, 11)].map(|(number, new)| version(number, new));
    let registry = serve(&[&one, &two]);
    let mut with_quota = without_read_ahead(&root);
    with_quota.quota.limit = Some(1);
    let node = Node::start(with_quota, client()).unwrap();
    let first = mount(&node, &registry, &one).await;
    assert_content(&first, &one).await;
    indexed(&node, &[&one]).await;
    node.stop().await;
    let mut with_quota = without_read_ahead(&root);
    with_quota.quota.limit = Some(1);
    let node = Node::start(with_quota, client()).unwrap();
    let second = mount(&node, &registry, &two).await;
    indexed(&node, &[&two]).await;
    // The first layer is not open; now it is held, for what may follow.
    assert_eq!(requests_for(&registry, &second, &two.files[0]).await, 0);
    let used = HashSet::from([two.digest()]);
    node.make_room(std::sync::Arc::new(move || Some(used.clone())))
        .await;
    assert_eq!(requests_for(&registry, &second, &two.files[1]).await, 1);
    nothing_is_held(root.path()).await;

    let first = mount(&node, &registry, &one).await;
    assert_eq!(requests_for(&registry, &first, &one.files[2]).await, 1);
    assert_eq!(
        requests_for(&registry, &first, &one.files[1]).await,
        0,
        "from the second"
    );
    assert_eq!(requests_for(&registry, &second, &two.files[2]).await, 0);
    node.remove(one.digest()).await.unwrap();
    assert_eq!(requests_for(&registry, &second, &two.files[3]).await, 1);
    nothing_is_held(root.path()).await;
    node.stop().await;
}

/// Waits until no content below the root is held open that has no name any
/// more: who copied from it lets go a moment later.
async fn nothing_is_held(root: &Path) {
    let layers = fs::canonicalize(root).unwrap().join("layers");
    let held = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let open = open.filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut open = open.filter(|path| path.starts_with(&layers));
        open.any(|path| path.to_string_lossy().ends_with(" (deleted)"))
    };
    while held() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
