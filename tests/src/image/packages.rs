//! Images of programs that differ in kind, each one layer on the base image.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::debian::{Source, base, pack_with, tar_of};
use super::{Compression, Image, LayoutWriter, Meta, Noise, TAG, Tarball, read_manifest};
use crate::command::run;
use crate::scratch::Scratch;

/// Size of the model's one file, in bytes.
const MODEL_SIZE: u64 = 1 << 30;

/// The base image with Debian packages on top. `prepare` is run by the image's
/// own shell before the layer is packed.
pub fn with_packages(name: &str, packages: &[&str], prepare: &str) -> Result<Image> {
    let source = Source::of_this_machine()?;
    let recipe = format!("{name} 1 {} {packages:?} {prepare}", source.codename);
    let base = base()?;
    Image::cached(name, &recipe, |dir| {
        let scratch = Scratch::new()?;
        let root = scratch.path().join("root");
        source.bootstrap(&root, packages)?;
        // A JVM finds its libraries by /proc. In a namespace of its own, nothing
        // is left mounted.
        run(Command::new("unshare")
            .args(["--mount", "--pid", "--fork"])
            .arg(format!("--mount-proc={}", root.join("proc").display()))
            .arg("chroot")
            .arg(&root)
            .args(["sh", "-ec", prepare]))?;
        let list = scratch.path().join("list");
        write_list(&root, &below(&base)?, &list)?;
        let mut layout = LayoutWriter::on(&base, dir)?;
        layout.layer(Compression::Gzip, |to| {
            let mut tar = tar_of(&root);
            tar.args(["--no-recursion", "--null", "--verbatim-files-from"])
                .arg("--files-from")
                .arg(&list);
            pack_with(tar, &root, to)
        })?;
        layout.finish(TAG, &["/bin/sh"])
    })
}

/// The base image with one large file, as machine learning carries along.
pub fn model() -> Result<Image> {
    let base = base()?;
    Image::cached("model", &format!("model 1 {MODEL_SIZE}"), |dir| {
        let mut layout = LayoutWriter::on(&base, dir)?;
        layout.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            tar.file_from(
                "model",
                &Meta::mode(0o644),
                MODEL_SIZE,
                &mut Noise(7).take(MODEL_SIZE),
            )?;
            tar.finish()
        })?;
        layout.finish(TAG, &["/bin/sh"])
    })
}

/// Size and time of everything in an image of one layer, by path.
type Listing = HashMap<Vec<u8>, (u64, i64)>;

fn below(base: &Image) -> Result<Listing> {
    let layer = read_manifest(base.layout())?.layers;
    let layer = layer.first().context("the base image has no layer")?;
    let blob = base.layout().join("blobs/sha256").join(layer.digest.hex());
    let mut tar = tar::Archive::new(flate2::read::MultiGzDecoder::new(File::open(blob)?));
    let mut listing = Listing::new();
    for entry in tar.entries()? {
        let entry = entry?;
        let path: PathBuf = Path::new(OsStr::from_bytes(&entry.path_bytes()))
            .components()
            .filter(|part| matches!(part, std::path::Component::Normal(_)))
            .collect();
        let time = i64::try_from(entry.header().mtime()?)?;
        listing.insert(path.as_os_str().as_bytes().to_vec(), (entry.size(), time));
    }
    Ok(listing)
}

/// Writes down, for tar, everything below the root that the base has not.
fn write_list(root: &Path, below: &Listing, list: &Path) -> Result<()> {
    let mut list = std::io::BufWriter::new(File::create(list)?);
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            let name = path.strip_prefix(root)?.as_os_str().as_bytes();
            let size = if meta.is_file() { meta.len() } else { 0 };
            // A second link has no size in a tar; packing it again is harmless.
            if below.get(name) != Some(&(size, meta.mtime())) {
                list.write_all(name)?;
                list.write_all(&[0])?;
            }
            if meta.is_dir() {
                open.push(path);
            }
        }
    }
    list.flush()?;
    Ok(())
}
