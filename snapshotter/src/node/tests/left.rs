//! What other processes, and earlier ones, have left.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_needs_no_registry() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    let half = &sample.files[..15];
    for file in half {
        read(mount.join(&file.name)).await.unwrap();
    }
    node.stop().await;
    assert!(!mount.exists());
    registry.take_log();
    registry.misbehave(|_| Some(Fault::Status(500)));

    let mut impatient = config(&root);
    impatient.fetch.deadline = Duration::from_millis(50);
    let node = Node::start(impatient, client()).unwrap();
    let again = node.mount(sample.digest()).await.unwrap();
    assert_eq!(again, mount, "a layer keeps its number");
    for file in half {
        assert!(read(again.join(&file.name)).await.unwrap() == file.content);
    }
    assert!(registry.take_log().is_empty());
    assert!(is_eio(read(again.join("large")).await));
    registry.misbehave(|_| None);
    for file in &sample.files {
        assert!(read_in_the_end(again.join(&file.name)).await == file.content);
    }
    node.stop().await;

    // Complete: the next mount needs no FUSE for it.
    let node = Node::start(config(&root), client()).unwrap();
    let again = node.mount(sample.digest()).await.unwrap();
    let sessions = std::mem::take(&mut *node.0.sessions.lock());
    tokio::task::spawn_blocking(move || drop(sessions))
        .await
        .unwrap();
    assert_content(&again, &sample).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_mounts_of_a_killed_process_are_taken_away() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    node.stop().await;
    // What is left when the process that served a FUSE mount is gone.
    let blobs = root.path().join("blobs");
    let device = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        std::os::fd::AsRawFd::as_raw_fd(&device)
    );
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount(
        "dead",
        &blobs,
        "fuse.sluice",
        rustix::mount::MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    drop(device);
    let error = fs::read_dir(&blobs).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));

    let node = Node::start(config(&root), client()).unwrap();
    assert_eq!(node.mount(sample.digest()).await.unwrap(), mount);
    assert_content(&mount, &sample).await;
    drop(registry);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn regression_every_start_clears_the_probe_of_a_killed_process() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("probe/mnt");
    fs::create_dir_all(&target).unwrap();
    fs::write(root.path().join("probe/data"), "left").unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("left", &target, "tmpfs", flags, None).unwrap();
    // The mode is given, so that nothing is probed.
    let mut config = config(&root);
    config.mode = Some(Mode::Fuse);
    let node = Node::start(config, client()).unwrap();
    assert!(!root.path().join("probe").exists());
    node.stop().await;
    assert!(mount::mounts_below(root.path()).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_dropped_leaves_no_mount() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (_registry, node, mount) = mounted(&root, &sample).await;
    read(mount.join(&sample.files[0].name)).await.unwrap();
    tokio::task::spawn_blocking(move || drop(node))
        .await
        .unwrap();
    let left = mount::mounts_below(root.path()).unwrap();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_directory_is_made_again() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, _) = mounted(&root, &sample).await;
    node.stop().await;
    let chunks = root
        .path()
        .join("layers")
        .join(sample.digest().hex())
        .join("chunks");
    fs::write(&chunks, "rubbish").unwrap();
    let node = Node::start(config(&root), client()).unwrap();
    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    assert_content(&mount, &sample).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_start_depends_on_profiles_or_the_index_of_chunks() {
    let root = tempfile::tempdir().unwrap();
    // What neither can be read nor be made.
    for name in ["profiles", "chunk-index"] {
        fs::write(root.path().join(name), "no directory").unwrap();
    }
    let sample = sample();
    let (_registry, node, mount) = mounted(&root, &sample).await;
    assert_content(&mount, &sample).await;
    node.stop().await;
}
