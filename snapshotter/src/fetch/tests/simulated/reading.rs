//! Readers and downloads without a plan, and outages.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_sequential_reader_keeps_the_link_busy() {
    let size = 24_000_000;
    let sample = one_file(size, 256 << 10);
    for (round_trip, least) in [(0, 0.95), (20, 0.9), (100, 0.75)] {
        let world = World::new(round_trip, std::slice::from_ref(&sample));
        world.read(0, 0, size as u64).await;
        let seen = format!(
            "{round_trip} ms: {} requests, {:.2} busy",
            world.asked().len(),
            world.busy()
        );
        // It takes some round trips to see that it is one.
        assert!(world.busy() > least, "{seen}");
        assert!(world.asked().len() < 40, "{seen}");
        assert_eq!(world.bytes(), world.all_bytes(0), "each byte once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_download_gets_on_a_little_while_readers_wait() {
    let world = World::new(30, &[small_files(300)]);
    let reader = world.engine.demand();
    let _handle = world.layers[0].download(Duration::ZERO, async {});
    let present = || world.layers[0].dir().present().count();
    sleep(Duration::from_secs(20)).await;
    let before = present();
    assert!((1..100).contains(&before), "{before}");
    sleep(Duration::from_secs(20)).await;
    assert!(present() > before);
    drop(reader);
    let went_on = Instant::now();
    let left = f64::from(300 - present()) * CHUNK as f64;
    world.until(|| world.layers[0].dir().is_complete()).await;
    assert_eq!(world.asked().len(), 1, "the same request went on");
    let busy = left / BANDWIDTH / went_on.elapsed().as_secs_f64();
    assert!(busy > 0.8, "{busy}");
}

#[tokio::test(start_paused = true)]
async fn a_download_goes_on_after_an_outage_of_hours() {
    let world = World::new(30, &[small_files(300)]);
    let down = |down| *world.wire.0.down.lock() = down;
    let present = || world.layers[0].dir().present().count();
    let _handle = world.layers[0].download(Duration::ZERO, async {});
    world.until(|| present() > 10).await;
    down(true);
    let before = world.asked().len();
    sleep(Duration::from_secs(3600)).await;
    let stopped = present();
    assert!(stopped < 300, "{stopped}");
    // In the deadline's five minutes every five seconds, then ever more rarely.
    let tries = world.asked().len() - before;
    assert!((60..90).contains(&tries), "{tries}");
    // A reader that comes first shares its bytes.
    down(false);
    world.read_file(0, 299).await;
    assert!(present() > stopped);
    let back = Instant::now();
    while !world.layers[0].dir().is_complete() {
        sleep(Duration::from_secs(1)).await;
        assert!(
            back.elapsed() < Duration::from_secs(700),
            "it is not resumed"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_waits_for_minutes_and_no_longer_than_the_deadline() {
    let world = World::new(30, &[small_files(20)]);
    let down = |down| *world.wire.0.down.lock() = down;
    down(true);
    let layer = Arc::clone(&world.layers[0]);
    let offset = world.starts[0][7];
    let mut reader = Box::pin(Arc::clone(&layer).read_missing(offset, 100));
    let early = tokio::time::timeout(Duration::from_secs(290), &mut reader).await;
    assert!(early.is_err(), "it waits");
    down(false);
    assert_eq!(reader.await.unwrap().len(), 100);

    down(true);
    let (since, offset) = (Instant::now(), world.starts[0][19]);
    let failed = Arc::clone(&layer).read_missing(offset, 100).await;
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    let waited = since.elapsed().as_secs();
    assert!((299..=301).contains(&waited), "{waited} s");
    // The next read tries again, and for as long.
    let mut reader = Box::pin(layer.read_missing(offset, 100));
    let early = tokio::time::timeout(Duration::from_secs(200), &mut reader).await;
    assert!(early.is_err(), "it waits");
    down(false);
    assert_eq!(reader.await.unwrap().len(), 100);
}
