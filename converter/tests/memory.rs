//! A conversion's memory does not grow with the layer.
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Bench, noise};
use sluice_layer::Format;
use sluice_oci::{Descriptor, Digest, Hasher, media_type};

struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting does
// not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(used, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Stores an uncompressed layer of `files` files of 1 MiB without ever
/// holding it.
fn large_layer(bench: &Bench, files: u64) -> (Descriptor, Digest) {
    struct Hashing(BufWriter<File>, Hasher, u64);
    impl std::io::Write for Hashing {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let n = self.0.write(bytes)?;
            self.1.update(&bytes[..n]);
            self.2 += n as u64;
            Ok(n)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            self.0.flush()
        }
    }
    let path = bench.path("layer");
    let out = Hashing(
        BufWriter::new(File::create(&path).unwrap()),
        Hasher::new(),
        0,
    );
    let mut builder = tar::Builder::new(out);
    for seed in 0..files {
        let mut header = tar::Header::new_ustar();
        header.set_size(1 << 20);
        let content = noise(seed, 1 << 20);
        let name = format!("file-{seed}");
        builder
            .append_data(&mut header, name, content.as_slice())
            .unwrap();
    }
    let Hashing(mut file, hasher, size) = builder.into_inner().unwrap();
    file.flush().unwrap();
    let digest = hasher.finish();
    std::fs::rename(path, bench.blob_path("in", digest)).unwrap();
    (Descriptor::new(media_type::OCI_LAYER, digest, size), digest)
}

#[tokio::test]
async fn memory_does_not_grow_with_the_layer() {
    for format in [Format::Estargz, Format::ZstdChunked] {
        let mut peaks = Vec::new();
        for files in [40, 120] {
            let bench = Bench::new();
            let layer = large_layer(&bench, files);
            let manifest = bench.manifest(&[layer]);
            bench.name(&[("v1", &manifest)]);
            let mut conversion = bench.conversion(format);
            conversion.options.chunk_size = 1 << 20;
            conversion.options.level = 1;
            PEAK.store(USED.load(Ordering::Relaxed), Ordering::Relaxed);
            let before = USED.load(Ordering::Relaxed);
            bench.convert(&conversion).await.unwrap();
            peaks.push((PEAK.load(Ordering::Relaxed) - before) >> 20);
        }
        // 24 MiB are in flight between the stages, twice where a unit is raw
        // and compressed at once, besides the compressors' tables.
        assert!(peaks[0] < 64, "{format}: {peaks:?} MiB");
        assert!(peaks[1] < peaks[0] + 12, "{format}: {peaks:?} MiB");
    }
}
