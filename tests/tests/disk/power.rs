//! The power goes at any moment of a layer's life.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use sluice_layer::write::{Options as WriteOptions, write_layer};
use sluice_layer::{Format, TocTrust, Wanted, decode_unit, locate_toc, read_toc};
use sluice_oci::Digest;
use sluice_snapshotter::erofs::{XattrNamespace, write_image};
use sluice_snapshotter::layer_dir::{self, ChunkId, LayerDir, NewLayer, Problem, Verdict};
use sluice_tests::Scratch;
use sluice_tests::content::noise;
use sluice_tests::disk::{Cut, Disk, Faults};

/// A layer's blob with its TOC, and a node's directory for it.
struct Layer {
    blob: Vec<u8>,
    trust: TocTrust,
}

impl Layer {
    fn new() -> Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        for file in 0..6 {
            let content = noise(30_000, 100 + file);
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append_data(&mut header, format!("f{file}"), &content[..])?;
        }
        let options = WriteOptions {
            chunk_size: 16 << 10,
            ..WriteOptions::new(Format::Estargz)
        };
        let (blob, tail) = write_layer(&tar.into_inner()?, &options, &[])?;
        Ok(Self {
            blob,
            trust: TocTrust::Uncompressed(tail.toc_digest),
        })
    }

    fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    fn make(&self, parent: &Path) -> Result<LayerDir> {
        let size = self.blob.len() as u64;
        let location = locate_toc(&self.blob, size)?;
        let compressed = location.slice_of(&self.blob, size).context("no TOC")?;
        let toc = read_toc(&location, compressed, &self.trust, &Default::default())?;
        let new = NewLayer {
            toc: &toc,
            digest: self.digest(),
            blob_size: size,
            trust: self.trust,
            compressed_toc: Digest::of(compressed),
            reference: &"r.example/app:v1".parse()?,
            number: 3,
        };
        layer_dir::create(parent, &new, |toc, placement, out| {
            write_image(toc, placement, XattrNamespace::Trusted, out)
                .map(drop)
                .map_err(|error| Problem::Erofs(Box::new(error)))
        })?;
        Ok(LayerDir::open(
            &parent.join(self.digest().hex()),
            self.digest(),
        )?)
    }

    /// Stores the chunks of so many more units.
    fn fill(&self, dir: &LayerDir, from: usize, units: usize) -> Result<()> {
        for unit in dir.chunks().units_from(0).skip(from).take(units) {
            let chunks: Vec<ChunkId> = dir.chunks().of_unit(unit.offset).collect();
            let wanted: Vec<Wanted> = chunks
                .iter()
                .map(|&chunk| {
                    let record = dir.chunks().get(chunk);
                    Wanted {
                        inner_offset: u64::from(record.inner_offset),
                        size: u64::from(record.size),
                        digest: record.digest,
                    }
                })
                .collect();
            let bytes = &self.blob[unit.offset as usize..(unit.offset + unit.size) as usize];
            let mut stored = Ok(());
            decode_unit(Format::Estargz, bytes, &wanted, |index, chunk| {
                if stored.is_ok() {
                    stored = dir.store(chunks[index], &chunk);
                }
            })?;
            stored?;
        }
        Ok(())
    }
}

#[test]
fn after_a_power_cut_at_any_moment_no_bit_stands_for_bytes_that_are_not_there() -> Result<()> {
    let scratch = Scratch::new()?;
    let mount = scratch.dir("disk")?;
    let disk = Disk::mount(&mount)?;
    let layer = Layer::new()?;
    disk.record();
    let dir = layer.make(&mount)?;
    layer.fill(&dir, 0, 3)?;
    dir.persist()?;
    layer.fill(&dir, 3, 4)?;
    // The disk fails to write once: what it lost is not present any more.
    disk.fail(Faults {
        sync_once: true,
        ..Faults::default()
    });
    let before = dir.present().count();
    ensure!(dir.persist().is_err());
    ensure!(dir.present().count() < before && dir.present().count() > 0);
    dir.persist()?;
    layer.fill(&dir, 0, usize::MAX)?;
    dir.persist()?;
    ensure!(dir.is_complete());
    dir.evict()?;
    drop(dir);
    let again = LayerDir::open(&mount.join(layer.digest().hex()), layer.digest())?;
    assert_eq!(again.present().count(), 0);
    layer.fill(&again, 2, 3)?;
    again.persist()?;

    let moments = disk.moments();
    ensure!(moments > 40, "{moments}");
    let mut most = 0;
    for moment in 0..=moments {
        for cut in Cut::ALL {
            let after = scratch.fresh_dir("after")?;
            disk.after_power_cut(Some(moment), cut, &after)?;
            let path = after.join(layer.digest().hex());
            if !path.exists() {
                continue;
            }
            let failed = || format!("moment {moment} of {moments}, {cut:?}");
            let left = LayerDir::open(&path, layer.digest()).with_context(failed)?;
            left.check_meta().with_context(failed)?;
            most = most.max(left.present().count());
            for chunk in left.present().iter().collect::<Vec<_>>() {
                let verdict = left.verify(chunk, false);
                ensure!(
                    matches!(verdict, Verdict::Good),
                    "{}: {verdict:?}",
                    failed()
                );
            }
            fs::remove_dir_all(&after)?;
        }
    }
    assert_eq!(most, again.chunks().len(), "at one moment all was durable");
    Ok(())
}
