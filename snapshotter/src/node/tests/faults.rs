//! Registries that fail or send wrong bytes.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_is_wrong_once_is_fetched_again() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    let mut first = true;
    registry.misbehave(move |request| {
        let (start, end) = request.range?;
        std::mem::take(&mut first).then_some(Fault::Tamper((start + end) / 2))
    });
    let content = read(mount.join(&sample.files[0].name)).await.unwrap();
    assert!(content == sample.files[0].content);
    assert_eq!(registry.take_ranges().len(), 2);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_chunk_is_an_error_and_never_cached() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    registry.misbehave(|request| {
        let (start, _) = request.range?;
        Some(Fault::Tamper(start + 100))
    });
    let path = mount.join(&sample.files[0].name);
    assert!(is_eio(read(path.clone()).await));
    assert!(registry.take_ranges().len() >= 2);
    // Not even the parts before the wrong byte have become another file's.
    registry.misbehave(|_| None);
    assert!(read(path).await.unwrap() == sample.files[0].content);
    assert_content(&mount, &sample).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_break_off_are_resumed() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    let mut requests = 0;
    registry.misbehave(move |_| {
        requests += 1;
        (requests % 3 != 0).then_some(Fault::Cut(70_000))
    });
    assert_content(&mount, &sample).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_answer_holds_up_nobody_else_and_ends() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    let here = read(mount.join(&sample.files[0].name)).await.unwrap();
    let mut first = true;
    registry.misbehave(move |_| std::mem::take(&mut first).then_some(Fault::Stall(100)));
    let stalled = tokio::spawn(read(mount.join("large")));
    while registry.requests() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Present bytes and other missing ones are served meanwhile.
    assert!(read(mount.join(&sample.files[0].name)).await.unwrap() == here);
    assert!(read(mount.join(&sample.files[20].name)).await.unwrap() == sample.files[20].content);
    // The client gives the stalled answer up, and asks again.
    let large = &sample.files.last().unwrap().content;
    assert!(stalled.await.unwrap().unwrap() == *large);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_wait_for_a_failing_registry() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    for status in [503, 401, 403] {
        let mut requests = 0;
        registry.misbehave(move |_| {
            requests += 1;
            (requests < 6).then_some(Fault::Status(status))
        });
        let file = &sample.files[usize::from(status) % 30];
        assert!(
            read(mount.join(&file.name)).await.unwrap() == file.content,
            "{status}"
        );
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_fails_after_the_deadline_or_a_refusal_and_the_next_one_tries_again() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let mut config = config(&root);
    config.fetch.deadline = Duration::from_millis(100);
    let (registry, node, mount) = mounted_with(config, &sample).await;
    let path = mount.join(&sample.files[0].name);
    for status in [404, 500] {
        registry.misbehave(move |_| Some(Fault::Status(status)));
        assert!(is_eio(read(path.clone()).await), "{status}");
        assert!(is_eio(read(path.clone()).await), "{status}");
    }
    registry.misbehave(|_| None);
    assert!(read_in_the_end(path).await == sample.files[0].content);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_waits_can_be_killed() {
    for mode in [Mode::Erofs, Mode::Fuse] {
        let root = tempfile::tempdir().unwrap();
        let sample = sample();
        let mut config = config(&root);
        config.mode = Some(mode);
        let (registry, node, mount) = mounted_with(config, &sample).await;
        registry.misbehave(|_| Some(Fault::Status(503)));
        let large = mount.join("large");
        let mut reader = tokio::process::Command::new("cat")
            .arg(&large)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        while registry.requests() < 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        reader.start_kill().unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(30), reader.wait()).await;
        assert!(
            ended.is_ok_and(|ended| !ended.unwrap().success()),
            "{mode:?}"
        );
        registry.misbehave(|_| None);
        assert!(read(large).await.unwrap() == sample.files.last().unwrap().content);
        node.stop().await;
    }
}
