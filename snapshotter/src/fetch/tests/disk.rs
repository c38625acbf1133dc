//! The engine on a disk that is full, loses bytes or gives back others.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use super::*;
use crate::testing::Tmpfs;

impl Setup {
    /// As a reader of the mount does.
    async fn read_through(&self, file: usize) {
        let content = &self.sample.files[file].content;
        let mut found = vec![0; content.len()];
        if !self.layer.try_read(self.starts[file], &mut found).unwrap() {
            let layer = Arc::clone(&self.layer);
            let read = layer.read_missing(self.starts[file], content.len());
            found = read.await.unwrap();
        }
        assert!(found == *content, "wrong bytes");
    }

    fn data(&self) -> File {
        let path = self.layer.dir().data_path();
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn count(&self) -> u32 {
        self.layer.dir().present().count()
    }
}

#[tokio::test]
async fn a_full_disk_fails_no_read_and_is_used_again_when_there_is_space() {
    let disk = Tmpfs::new("8m");
    let sample = sample();
    let path = make(disk.path(), &sample).unwrap();
    let dir = LayerDir::open(&path, sample.digest()).unwrap();
    let s = setup_of(dir, sample, config());
    s.read_through(0).await;
    let stored = s.count();
    assert!(stored > 0);
    let ballast = disk.fill();
    s.source.take_requests();
    join_all((0..20).map(|_| s.read_through(3))).await;
    assert_eq!(s.source.take_requests().len(), 1, "one fetch for all");
    s.read_through(0).await;
    s.read_through(3).await;
    assert_eq!(s.source.take_requests(), [], "it is kept for a moment");
    assert_eq!(s.count(), stored);
    // Nothing is fetched ahead in vain, and reads go on meanwhile.
    let _download = s.layer.download(Duration::ZERO, async {});
    s.read_through(5).await;
    assert_eq!(s.count(), stored);
    std::fs::remove_file(ballast).unwrap();
    s.read_through(4).await;
    assert!(s.count() > stored, "stored again");
    until(|| s.layer.dir().is_complete()).await;
    for file in 0..13 {
        s.read_through(file).await;
    }
}

#[tokio::test]
async fn content_that_is_cut_off_under_the_daemon_is_fetched_again() {
    let s = setup();
    for file in 0..13 {
        s.read_through(file).await;
    }
    assert!(s.layer.dir().is_complete());
    s.data().set_len(s.starts[5] + 10_000).unwrap();
    s.source.take_requests();
    for file in 0..13 {
        s.read_through(file).await;
    }
    let requests = s.source.take_requests();
    assert!(
        requests.iter().all(|r| r.0 >= s.unit(5, 0).0),
        "{requests:?}"
    );
    s.source.take_requests();
    s.read_through(12).await;
    assert_eq!(s.source.take_requests(), []);
}

#[tokio::test]
async fn what_is_doubted_is_verified_before_it_is_read() {
    let s = setup();
    for file in 0..13 {
        s.read_through(file).await;
    }
    s.layer.dir().persist().unwrap();
    // The machine goes down, and its disk has lost a write.
    s.data()
        .write_all_at(&[0; 4096], s.starts[7] + 45_000)
        .unwrap();
    let dir = LayerDir::open(s.layer.dir().path(), s.sample.digest()).unwrap();
    let again = setup_of(dir.doubted(), super::sample(), config());
    assert_eq!(again.count(), 0);
    // Background work neither fetches nor passes what is doubted.
    let _download = again.layer.download(Duration::ZERO, async {});
    for file in 0..13 {
        again.read_through(file).await;
    }
    assert_eq!(again.source.take_requests(), [again.unit(7, 1)]);
    assert_eq!(again.layer.dir().claimed().count(), 0);
    assert!(again.layer.dir().is_complete());
}

#[tokio::test]
async fn a_chunk_that_the_disk_never_gives_back_is_read_past_it() {
    let s = setup();
    s.read_through(2).await;
    let error = || std::io::Error::from_raw_os_error(libc::EIO);
    let present = s.count();
    for _ in 0..2 {
        s.layer.unreadable(s.starts[2], 60_000, &error());
        assert_eq!(s.count(), present - 2);
        s.source.take_requests();
        let stored = s.layer.unreadable.lock().values().all(|&n| n < 2);
        s.read_through(2).await;
        assert_eq!(s.source.take_requests().len(), 1);
        // Once more, for the sector may be another then; after that no more.
        assert_eq!(s.count(), if stored { present } else { present - 2 });
    }
    s.read_through(3).await;
}
