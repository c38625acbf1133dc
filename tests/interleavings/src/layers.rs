//! Whole reads of a layer: from missing bytes to their chunks, and its end in
//! the middle of them.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::fetch::{
    ChunkFinder, Config, Engine, FetchError, Found, LazyLayer, RangeBody, RangeSource, SourceError,
};
use crate::fuse::Content as _;
use crate::layer_dir::{LayerDir, NewLayer, Problem, create};
use crate::sample::{Layout, Sample, files};
use sluice_snapshotter::erofs::{XattrNamespace, write_image};

/// A layer's blob and its directory, empty. The directory is copied for every
/// run.
pub struct Origin {
    sample: Sample,
    made: TempDir,
}

impl Default for Origin {
    /// Three files of two chunks each.
    fn default() -> Self {
        let layout = Layout {
            chunk: 2_000,
            ..Layout::default()
        };
        let sample = Sample::new(files(3, 4_000), &layout);
        let made = tempfile::tempdir().expect("a directory");
        let new = NewLayer {
            toc: &sample.toc(),
            digest: sample.digest(),
            blob_size: sample.blob.len() as u64,
            trust: sample.trust(),
            compressed_toc: sluice_oci::Digest::of(b"toc"),
            reference: &"r.example/app:v1".parse().expect("a reference"),
            number: 7,
        };
        create(made.path(), &new, |toc, placement, out| {
            write_image(toc, placement, XattrNamespace::Trusted, out)
                .map(|_| ())
                .map_err(|error| Problem::Erofs(Box::new(error)))
        })
        .expect("a layer directory");
        Self { sample, made }
    }
}

/// Answers every request, piece by piece, but for the first few.
struct Source {
    blob: Arc<Vec<u8>>,
    sent: Arc<Mutex<Vec<(u64, u64)>>>,
    refusals: Mutex<u32>,
}

struct Body {
    pieces: Vec<Bytes>,
}

impl RangeSource for Source {
    fn range(
        &self,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'_, Result<Box<dyn RangeBody>, SourceError>> {
        async move {
            tokio::task::yield_now().await;
            let mut refusals = self.refusals.lock();
            if *refusals > 0 {
                *refusals -= 1;
                return Err(SourceError {
                    message: "r.example: 503".to_owned(),
                    transient: true,
                    retry_after: None,
                });
            }
            self.sent.lock().push((offset, offset + len));
            let bytes = &self.blob[offset as usize..(offset + len) as usize];
            let pieces = bytes.rchunks(1_500).map(Bytes::copy_from_slice).collect();
            Ok(Box::new(Body { pieces }) as Box<dyn RangeBody>)
        }
        .boxed()
    }

    fn host(&self) -> &str {
        "r.example"
    }
}

impl RangeBody for Body {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        async move {
            tokio::task::yield_now().await;
            Ok(self.pieces.pop())
        }
        .boxed()
    }
}

/// Knows what the layers of a run have, by looking through them.
#[derive(Debug, Default)]
struct Others(Mutex<Vec<Weak<LazyLayer>>>);

impl ChunkFinder for Others {
    fn find(
        &self,
        digest: sluice_oci::Digest,
        size: u32,
        _by: &sluice_oci::Reference,
    ) -> Option<Found> {
        let layers: Vec<Arc<LazyLayer>> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        let mut found = None;
        for layer in layers {
            for chunk in layer.dir().chunks().overlapping(0, u64::MAX) {
                if layer.dir().claims(chunk, digest, size) {
                    return Some(Found::There(layer.shared_dir(), chunk));
                }
                if layer.dir().describes(chunk, digest, size) && layer.is_coming(chunk) {
                    found = Some(Found::Coming(Arc::clone(&layer), chunk));
                }
            }
        }
        found
    }
}

/// One run's layer.
struct Run {
    _root: TempDir,
    layer: Arc<LazyLayer>,
    engine: Engine,
    sent: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Origin {
    fn open(&self, refusals: u32) -> Run {
        let engine = Engine::new(config(), Handle::current());
        self.open_on(engine, refusals)
    }

    fn open_on(&self, engine: Engine, refusals: u32) -> Run {
        let root = tempfile::tempdir().expect("a directory");
        let digest = self.sample.digest();
        let path = root.path().join(digest.hex());
        std::fs::create_dir(&path).expect("a directory");
        let made = std::fs::read_dir(self.made.path().join(digest.hex()));
        for entry in made.expect("it was made").flatten() {
            std::fs::copy(entry.path(), path.join(entry.file_name())).expect("a copy");
        }
        let dir = LayerDir::open(&path, digest).expect("a whole directory");
        let sent = Arc::default();
        let source = Source {
            blob: Arc::new(self.sample.blob.clone()),
            sent: Arc::clone(&sent),
            refusals: Mutex::new(refusals),
        };
        let layer = LazyLayer::new(dir, Box::new(source), &engine, Box::new(|_| None));
        Run {
            _root: root,
            layer,
            engine,
            sent,
        }
    }

    fn check(&self, layer: &LazyLayer, file: usize) {
        let content = &self.sample.files[file].content;
        let mut found = vec![0; content.len()];
        let present = layer
            .try_read(start_of(file), &mut found)
            .expect("the disk works");
        assert!(present && found == *content, "file {file} is wrong");
    }

    /// Readers of the same files and of one between others, with a registry
    /// that fails at first: all read what they wanted, no byte was sent twice,
    /// and nothing is held afterwards.
    pub async fn readers_fetch_each_byte_once(&self) {
        let run = self.open(2);
        let readers = [(0, 3), (1, 1), (0, 1)].map(|(file, count)| {
            let layer = Arc::clone(&run.layer);
            let (start, end) = (start_of(file), start_of(file + count - 1) + 4_000);
            tokio::spawn(async move { layer.fetch(start, end - start).await })
        });
        for reader in readers {
            reader
                .await
                .expect("no reader panics")
                .expect("it is fetched");
        }
        for file in 0..3 {
            self.check(&run.layer, file);
        }
        let mut sent = run.sent.lock().clone();
        sent.sort_unstable();
        for pair in sent.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{sent:?}");
        }
        run.nothing_is_held().await;
    }

    /// Two layers have the same files, are read at once, and may wait for each
    /// other's fetches: all read what they wanted, though the registry fails at
    /// first, and nothing is held afterwards.
    pub async fn layers_that_share_wait_in_no_circle(&self) {
        let others = Arc::new(Others::default());
        let finder = Arc::clone(&others) as Arc<dyn ChunkFinder>;
        let engine = Engine::with_finder(config(), Handle::current(), finder);
        let runs = [1, 0].map(|refusals| self.open_on(engine.clone(), refusals));
        let layers = runs.iter().map(|run| Arc::downgrade(&run.layer));
        others.0.lock().extend(layers);
        let reads = [(0, 0, 2), (1, 0, 2), (0, 2, 1), (1, 1, 2)];
        let readers = reads.map(|(run, file, count)| {
            let layer = Arc::clone(&runs[run].layer);
            let (start, end) = (start_of(file), start_of(file + count - 1) + 4_000);
            tokio::spawn(async move { layer.fetch(start, end - start).await })
        });
        for (reader, (run, file, count)) in readers.into_iter().zip(reads) {
            let read = reader.await.expect("no reader panics");
            read.expect("it is fetched");
            (file..file + count).for_each(|file| self.check(&runs[run].layer, file));
        }
        for run in runs {
            run.nothing_is_held().await;
        }
    }

    /// The layer is closed while it is read: whoever waits gets its bytes or
    /// hears of the end, and nothing is held afterwards.
    pub async fn a_close_ends_every_wait(&self) {
        let run = self.open(1);
        let readers = [0, 1, 0].map(|file| {
            let layer = Arc::clone(&run.layer);
            let read = tokio::spawn(async move { layer.fetch(start_of(file), 4_000).await });
            (file, read)
        });
        let closer = {
            let layer = Arc::clone(&run.layer);
            tokio::spawn(async move { layer.close() })
        };
        for (file, reader) in readers {
            match reader.await.expect("no reader panics") {
                Ok(_) => self.check(&run.layer, file),
                Err(FetchError::Closed) => {}
                Err(error) => panic!("{error}"),
            }
        }
        closer.await.expect("closing works");
        let late = run.layer.fetch(start_of(2), 4_000).await;
        assert!(matches!(late, Err(FetchError::Closed)), "{late:?}");
        run.nothing_is_held().await;
    }
}

impl Run {
    /// Tasks give back what they hold a moment after the readers have gone on.
    async fn nothing_is_held(&self) {
        while self.engine.admission().in_use() != (0, 0) {
            tokio::task::yield_now().await;
        }
    }
}

fn config() -> Config {
    Config {
        retry: Duration::ZERO,
        retry_limit: Duration::ZERO,
        decoders: 2,
        read_ahead: 0,
        ..Config::default()
    }
}

/// Files lie in `data` in the order of the blob.
fn start_of(file: usize) -> u64 {
    file as u64 * 4_096
}
