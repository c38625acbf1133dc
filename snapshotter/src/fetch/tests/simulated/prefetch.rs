//! Prefetches, and readers beside them.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_plan_keeps_the_link_busy_in_its_order() {
    let sample = small_files(301);
    for (round_trip, least) in [(1, 0.95), (20, 0.9), (100, 0.7)] {
        let world = World::new(round_trip, std::slice::from_ref(&sample));
        let order = world.order(0, scattered(301).take(250));
        world.layers[0].judge_plan(true);
        let _handle = world.layers[0].prefetch(Plan::Order(order.clone()));
        let present = world.layers[0].dir().present();
        let mut early = 0;
        while present.count() < 250 {
            sleep(Duration::from_millis(1)).await;
            let missing = order.iter().position(|&chunk| !present.contains(chunk));
            early = early.max(present.count() as usize - missing.unwrap_or(250));
        }
        let requests = world.asked().len();
        let overhead = world.bytes() as f64 / (250.0 * CHUNK as f64);
        let seen = format!(
            "{round_trip} ms: {requests} requests, {:.2} busy, {overhead:.2} of the bytes, {early} early",
            world.busy()
        );
        assert!(world.present(0, scattered(301).take(250)));
        // The first round trip is spent waiting, whatever is done.
        assert!(world.busy() > least, "{seen}");
        assert!(overhead < 1.4, "{seen}");
        // What is needed in two pieces' time may come early, and what is on
        // its way.
        let link = world.layers[0].link();
        let together = link.piece() * 2 + link.outstanding() + link.piece();
        assert!(early as u64 * CHUNK as u64 <= together + PACKET, "{seen}");
    }
}

#[tokio::test(start_paused = true)]
async fn readers_ahead_of_a_plan_that_fits_do_not_stop_it() {
    let world = World::new(100, &[small_files(301)]);
    let files: Vec<usize> = scattered(301).take(250).collect();
    let order = world.order(0, files.iter().copied());
    let _handle = world.layers[0].prefetch(Plan::Order(order));
    for &file in files.iter().rev().take(10) {
        world.read_file(0, file).await;
    }
    // A second, in which as much came as the link carries.
    let present = world.layers[0].dir().present().count();
    assert!(present > 100, "{present}");
}

#[tokio::test(start_paused = true)]
async fn readers_wait_for_what_is_on_its_way_and_jump_what_is_not() {
    let world = World::new(20, &[small_files(301)]);
    world.layers[0].judge_plan(true);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..300)));
    sleep(Duration::from_millis(25)).await;
    world.read_file(0, 3).await;
    let asked = world.asked();
    assert_eq!(asked.iter().filter(|asked| asked.range.0 == 0).count(), 1);
    assert!(asked.iter().all(|asked| asked.at.is_zero()), "{asked:?}");
    let before = world.started.elapsed();
    assert!(!world.present(0, [250]));
    let jumped = world.unit(0, 250).offset;
    world.read_file(0, 250).await;
    let own = world
        .asked()
        .into_iter()
        .find(|asked| asked.range.0 == jumped);
    assert_eq!(own.expect("it has its own").at, before, "and at once");
    assert!(!world.present(0, [200]), "before its turn");
    world.until(|| world.present(0, 0..300)).await;
    let requests = world.asked().len();
    assert!(requests <= 20, "{requests}");
    // Nothing is fetched twice but small gaps.
    let whole: u64 = world.unit(0, 300).offset;
    assert!(
        world.bytes() < whole + whole / 20,
        "{} of {whole}",
        world.bytes()
    );
}

#[tokio::test(start_paused = true)]
async fn a_prefetch_gives_way_to_readers_and_still_gets_on() {
    let sample = small_files(600);
    // Far apart, so that none helps another.
    let reads = (330..600).step_by(14);
    let mut took = Vec::new();
    for plan in [0..0, 0..300] {
        let world = World::new(20, std::slice::from_ref(&sample));
        let order = world.order(0, plan);
        let _handle = world.layers[0].prefetch(Plan::Order(order));
        let started = Instant::now();
        for file in reads.clone() {
            world.read_file(0, file).await;
        }
        took.push(started.elapsed().as_secs_f64());
        let ahead = (0..300).filter(|&file| world.present(0, [file])).count();
        assert!(ahead < 200, "{ahead} files came while readers waited");
        world
            .until(|| world.present(0, 0..took.len() / 2 * 40))
            .await;
    }
    assert!(took[1] < took[0] * 1.15, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_does_not_fit_is_given_up_until_it_does() {
    let world = World::new(20, &[small_files(1200)]);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..600)));
    let ahead = || (0..600).filter(|&file| world.present(0, [file])).count();
    for file in (610..1200).step_by(14) {
        world.read_file(0, file).await;
        sleep(Duration::from_millis(2)).await;
    }
    sleep(Duration::from_secs(1)).await;
    let given_up = ahead();
    assert!(given_up < 300, "{given_up}");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(ahead(), given_up, "nothing is fetched for nobody");
    for file in 0..8 {
        world.read_file(0, file).await;
    }
    world.until(|| ahead() == 600).await;
}

#[tokio::test(start_paused = true)]
async fn regression_readers_do_not_wait_with_prefetches_that_may_not_ask() {
    let world = World::new(20, &[small_files(20)]);
    let admission = world.engine.admission();
    let mut held = Vec::new();
    while let Some(permit) = admission.admit(Priority::Prefetch, 1).now_or_never() {
        held.push(permit);
    }
    world.layers[0].fetch_again(&world.chunks(0, 7));
    sleep(Duration::from_secs(10)).await;
    assert!(
        world.asked().is_empty(),
        "prefetches hold all they may have"
    );
    let reading = world.read_file(0, 7);
    let read = tokio::time::timeout(Duration::from_secs(1), reading).await;
    assert!(read.is_ok() && world.asked().len() == 1);
}

#[tokio::test(start_paused = true)]
async fn regression_what_is_here_is_decoded_before_a_prefetch_gives_way() {
    let world = World::new(20, &[small_files(20)]);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..20)));
    world.until(|| !world.asked().is_empty()).await;
    let mut reader = world.engine.demand();
    reader.jump();
    world.layers[0].judge_plan(false);
    // The first two come together, and the reader is given way to before each.
    world.until(|| world.present(0, [0])).await;
    assert!(!world.present(0, [1]));
}

#[tokio::test(start_paused = true)]
async fn a_plan_in_doubt_is_followed_a_little_way() {
    let world = World::new(20, &[small_files(300), small_files(301)]);
    let [doubtful, fitting] = [0, 1].map(|layer| &world.layers[layer]);
    let come = |layer: &Arc<LazyLayer>| layer.dir().present().count() as u64 * CHUNK as u64;
    let _handle = doubtful.prefetch(Plan::Order(world.order(0, 0..300)));
    sleep(Duration::from_millis(300)).await;
    let before = come(doubtful);
    let link = doubtful.link();
    let (most, piece) = (link.doubtful(), link.piece_of_plan(true));
    assert!((most / 2..most + piece).contains(&before), "{before}");
    // It may be of something else, while another one is known not to be.
    doubtful.judge_plan(false);
    fitting.judge_plan(true);
    let _other = fitting.prefetch(Plan::Order(world.order(1, 0..300)));
    world.until(|| world.present(1, 0..300)).await;
    assert_eq!(come(doubtful), before);
    doubtful.judge_plan(true);
    world.until(|| world.present(0, 0..300)).await;
}

#[tokio::test(start_paused = true)]
async fn a_plan_goes_on_where_nothing_starts() {
    let world = World::new(20, &[small_files(300)]);
    // Nor does it wait for ever for a table of contents that does not come.
    let _table = world.layers[0].link().expect_table(1 << 30);
    let _handle = world.layers[0].prefetch(Plan::Order(world.order(0, 0..300)));
    sleep(Duration::from_millis(300)).await;
    assert!(world.asked().is_empty());
    world.until(|| world.present(0, 0..300)).await;
}

#[tokio::test(start_paused = true)]
async fn layers_come_in_the_order_of_need() {
    let samples = [small_files(200), small_files(201)];
    let world = World::new(20, &samples);
    // The second layer's files are needed first, and the first one's last.
    let timed = |layer, after: u64| -> Plan {
        let order = world.order(layer, 0..200);
        let at = |index| Duration::from_millis(after + index);
        Plan::Timed((0..).zip(order.iter()).map(|(i, &c)| (c, at(i))).collect())
    };
    for layer in &world.layers {
        layer.judge_plan(true);
    }
    let _late = world.layers[0].prefetch(timed(0, 1000));
    let _early = world.layers[1].prefetch(timed(1, 0));
    world.until(|| world.present(1, 0..200)).await;
    let late = (0..200).filter(|&file| world.present(0, [file])).count();
    // One was under way when the other came, and one keeps the link busy.
    let early = 2 * world.layers[0].link().piece() / CHUNK as u64;
    assert!(late as u64 <= early + 1, "{late} came too early");
    world.until(|| world.present(0, 0..200)).await;
}
