//! Images to test with, as OCI layouts that are kept between runs.

mod debian;
mod host;
mod layout;
mod packages;
mod synthetic;
mod tarball;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::command::run;
use crate::programs::{cache_dir, sluice_command};
use crate::scratch::Scratch;

pub use debian::{base, scientific};
pub use host::add_programs;
pub use layout::{Compression, LayoutWriter, append_layer, read_manifest};
pub use packages::{model, with_packages};
pub use synthetic::{MANY_FILES, Noise, SPARSE_SIZE, many, odd, synthetic};
pub use tarball::{Meta, Tarball};

/// The one tag of every image made here.
pub const TAG: &str = "latest";

/// An image in an OCI layout, under [`TAG`].
#[derive(Debug, Clone)]
pub struct Image {
    layout: PathBuf,
}

impl Image {
    /// The layout's directory.
    pub fn layout(&self) -> &Path {
        &self.layout
    }

    /// As `sluice` takes it.
    pub fn source(&self) -> String {
        format!("oci:{}:{TAG}", self.layout.display())
    }

    /// Bytes of all its layers, compressed as they are.
    pub fn layer_bytes(&self) -> Result<u64> {
        let manifest = read_manifest(&self.layout)?;
        Ok(manifest.layers.iter().map(|layer| layer.size).sum())
    }

    /// An image of the cache, built by `build` if it is not there. The name
    /// changes whenever the recipe does.
    fn cached(name: &str, recipe: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let recipe = sluice_oci::Digest::of(recipe.as_bytes()).hex();
        let layout = cache_dir()?.join(format!("{name}-{}", &recipe[..12]));
        once(&layout, build).with_context(|| format!("cannot make the image '{name}'"))?;
        Ok(Self { layout })
    }
}

/// Converts the image in a layout to a lazy one in a registry, with these
/// arguments of `sluice convert`.
pub fn convert(layout: &Path, to: &str, more: &[&str]) -> Result<()> {
    run(sluice_command()?
        .args(["convert", "--plain-http"])
        .args(more)
        .arg(format!("oci:{}:{TAG}", layout.display()))
        .arg(to))?;
    Ok(())
}

/// Makes a file or directory once: `build` is given a draft's path, which is
/// renamed when it is complete. Others who want the same thing wait.
pub fn once(path: &Path, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let lock = File::create(path.with_extension("lock"))?;
    lock.lock()?;
    if path.exists() {
        return Ok(());
    }
    let parent = path.parent().context("no directory to build in")?;
    let scratch = Scratch::new_in(parent)?;
    let draft = scratch.path().join("draft");
    build(&draft)?;
    fs::rename(&draft, path)?;
    Ok(())
}
