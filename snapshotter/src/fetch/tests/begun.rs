//! What is asked for before the layer is open.

use sluice_layer::Unit;

use super::*;

impl Setup {
    /// Both chunks of each of these files, one after the other.
    fn wanted(&self, files: &[usize]) -> Vec<(Unit, Duration)> {
        let chunks = files.iter().flat_map(|&file| [(file, 0), (file, 1)]);
        let units = chunks.map(|(file, chunk)| self.unit(file, chunk));
        let units = units.map(|(start, end)| Unit {
            offset: start,
            size: end - start,
        });
        units.zip((0..).map(Duration::from_millis)).collect()
    }

    /// Where a file of two chunks lies.
    fn range(&self, file: usize) -> (u64, u64) {
        (self.unit(file, 0).0, self.unit(file, 1).1)
    }

    fn begin(&self, wanted: Vec<(Unit, Duration)>) -> Begun {
        let source = Arc::new(self.source.clone());
        self.engine.begin(self.layer.digest(), source, wanted)
    }

    fn asked(&self) -> usize {
        self.source.requests.lock().len()
    }
}

#[tokio::test]
async fn the_layer_takes_over_what_was_begun() {
    let s = setup();
    let files = [5, 2, 9];
    let begun = s.begin(s.wanted(&files));
    until(|| s.asked() == files.len()).await;
    assert_eq!(s.engine.requests().len(), 0, "they came at once");
    assert_eq!(s.layer.dir().present().count(), 0);
    s.layer.take_begun(begun);
    for file in files {
        s.read(file).await.unwrap();
    }
    let ranges = files.map(|file| s.range(file));
    assert_eq!(s.source.take_requests(), ranges, "in their order, and once");
    until(|| s.nothing_is_held()).await;
}

#[tokio::test]
async fn several_units_are_begun_as_one() {
    let s = setup();
    let span = |files: [usize; 2]| {
        let (offset, end) = (s.range(files[0]).0, s.range(files[1]).1);
        let size = end - offset;
        (Unit { offset, size }, Duration::ZERO)
    };
    let begun = s.begin(vec![span([2, 3]), span([7, 7])]);
    until(|| s.asked() == 2).await;
    s.layer.take_begun(begun);
    for file in [2, 3, 7] {
        s.read(file).await.unwrap();
    }
    let ranges = [(s.range(2).0, s.range(3).1), s.range(7)];
    assert_eq!(s.source.take_requests(), ranges);
    until(|| s.nothing_is_held()).await;
}

#[tokio::test]
async fn readers_wait_for_what_was_begun() {
    let s = setup();
    let (first, second) = (s.unit(2, 0), s.unit(2, 1));
    s.source.gate.send_replace(first.1);
    let begun = s.begin(s.wanted(&[2]));
    until(|| s.asked() == 1).await;
    s.layer.take_begun(begun);
    s.layer.fetch(s.starts[2], 40_000).await.unwrap();
    let whole = s.read(2);
    tokio::pin!(whole);
    assert!((&mut whole).now_or_never().is_none());
    s.source.gate.send_replace(u64::MAX);
    whole.await.unwrap();
    assert_eq!(s.source.take_requests(), [(first.0, second.1)]);
}

#[tokio::test]
async fn what_fails_or_is_wrong_is_fetched_as_ever() {
    let s = setup();
    let second = s.unit(2, 1).0;
    let tampered = s.range(9).0 + 100;
    s.source
        .fail([outage(), Fault::Cut(1000), Fault::Tamper(tampered)]);
    let files = [5, 2, 9];
    let begun = s.begin(s.wanted(&files));
    until(|| s.asked() == files.len()).await;
    s.layer.take_begun(begun);
    for file in files {
        s.read(file).await.unwrap();
    }
    let requests = s.source.take_requests();
    assert!(requests.len() > files.len() && requests.iter().any(|r| r.1 > second));
    until(|| s.nothing_is_held()).await;
}

/// Whoever wrote the profile may have meant another blob, or none.
#[tokio::test]
async fn what_is_no_unit_is_dropped() {
    let s = setup();
    let (start, end) = s.range(5);
    let lies = [
        (start + 100, 30_000),
        (s.range(2).0 + 100, s.range(3).1 - s.range(2).0 - 200),
        (0, u64::MAX >> 1),
        (end, 0),
    ];
    let lies = lies.map(|(offset, size)| (Unit { offset, size }, Duration::ZERO));
    let begun = s.begin(lies.to_vec());
    until(|| s.asked() == 2).await;
    s.layer.take_begun(begun);
    for file in [2, 3, 5] {
        s.read(file).await.unwrap();
    }
    until(|| s.nothing_is_held()).await;
}

#[tokio::test]
async fn nothing_goes_on_for_a_layer_that_does_not_open() {
    let s = setup();
    s.source.gate.send_replace(0);
    let begun = s.begin(s.wanted(&[5, 2]));
    until(|| s.asked() == 2).await;
    assert_eq!(s.engine.requests().len(), 2);
    drop(begun);
    until(|| s.nothing_is_held()).await;
    assert_eq!(s.engine.requests().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn one_that_opens_late_keeps_nothing_from_others() {
    let s = setup();
    let begun = s.begin(s.wanted(&[5, 2]));
    until(|| s.asked() == 2).await;
    assert_ne!(s.engine.admission().in_use(), (0, 0));
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert!(s.nothing_is_held());
    s.layer.take_begun(begun);
    s.read(5).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_table_of_contents_comes_first() {
    let s = setup();
    s.source.gate.send_replace(0);
    let apart = [0, 2, 4, 6, 8, 10];
    let link = s.engine.link("r.example");
    let mut toc = link.expect_table(1 << 20);
    let _begun = s.begin(s.wanted(&apart));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(s.asked(), 0);
    toc.arrived((1 << 20) - 1000);
    tokio::time::sleep(Duration::from_millis(10)).await;
    // As much as arrives in a round trip, and not all.
    assert!((2..apart.len()).contains(&s.asked()), "{}", s.asked());
}

#[tokio::test]
async fn regression_a_plan_does_not_ask_for_what_is_on_its_way() {
    let s = setup();
    s.source.gate.send_replace(0);
    let begun = s.begin(s.wanted(&[5]));
    until(|| s.asked() == 1).await;
    s.layer.take_begun(begun);
    let table = s.layer.dir().chunks();
    let around = [4, 5, 6].map(|file| table.overlapping(s.starts[file], 60_000));
    let order: Vec<_> = around.into_iter().flatten().collect();
    s.layer.judge_plan(true);
    let _handle = s.layer.prefetch(Plan::Order(order.into()));
    until(|| s.asked() == 3).await;
    s.source.gate.send_replace(u64::MAX);
    for file in [4, 5, 6] {
        s.read(file).await.unwrap();
    }
    let expected = [5, 4, 6].map(|file| s.range(file));
    assert_eq!(s.source.take_requests(), expected);
}
