//! Files whose every byte is known.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::Advice;

use crate::image::Noise;

/// Bytes that differ everywhere and by seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // It never fails and always fills.
    let _ = Noise(seed.wrapping_mul(0x1234_5678_9abc_def1)).read_exact(&mut bytes);
    bytes
}

/// Reads a file below `root` from where it comes from, not from memory, and
/// compares every byte.
pub fn check(root: &Path, (name, content): &(String, Vec<u8>)) -> Result<()> {
    let path = root.join(name);
    let failed = || format!("reading {}", path.display());
    let mut file = File::open(&path).with_context(failed)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    let mut read = Vec::with_capacity(content.len());
    file.read_to_end(&mut read).with_context(failed)?;
    ensure!(read == *content, "{} is wrong", path.display());
    Ok(())
}
