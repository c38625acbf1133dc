//! Programs of this machine as the content of a layer: the smallest image that
//! runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Meta, Tarball};
use crate::command::text;

/// Adds programs by name, below `/usr/bin`, with the libraries that they need.
pub fn add_programs(tar: &mut Tarball<'_>, names: &[&str]) -> Result<()> {
    let meta = Meta::mode(0o755);
    let mut files = BTreeSet::new();
    for name in names {
        let program = ["/usr/bin", "/bin"]
            .iter()
            .map(|dir| Path::new(dir).join(name));
        let program = program
            .filter(|path| path.exists())
            .find_map(|path| fs::canonicalize(path).ok())
            .with_context(|| format!("this machine has no {name}"))?;
        tar.file(&format!("usr/bin/{name}"), &meta, &fs::read(&program)?)?;
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f...)"
        let needed = text(Command::new("ldd").arg(&program))?;
        let paths = needed
            .split_whitespace()
            .filter(|word| word.starts_with('/'));
        files.extend(paths.map(PathBuf::from));
    }
    for file in files {
        let name = file.strip_prefix("/")?.to_string_lossy().into_owned();
        tar.file(&name, &meta, &fs::read(&file)?)?;
    }
    Ok(())
}
