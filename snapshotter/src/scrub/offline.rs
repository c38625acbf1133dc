//! The check while no daemon runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sluice_oci::Digest;

use super::Report;
use crate::layer_dir::{LayerDir, Verdict};

/// Why nothing was checked.
#[derive(Debug, thiserror::Error)]
#[error("cannot list {}: {source}", path.display())]
pub struct ListError {
    path: PathBuf,
    source: io::Error,
}

/// Checks all layers below `root`, which no daemon may be using, and calls
/// `each` with what was found. What describes a layer is only looked at: the
/// daemon mends it when it uses the layer next.
pub fn run(root: &Path, mut each: impl FnMut(Report)) -> Result<(), ListError> {
    let path = root.join("layers");
    let failed = |source| ListError {
        path: path.clone(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name());
    }
    names.sort_unstable();
    for name in names {
        let digest = format!("sha256:{}", name.to_string_lossy()).parse::<Digest>();
        if let Ok(digest) = digest {
            each(check(&path.join(&name), digest));
        }
    }
    Ok(())
}

fn check(path: &Path, layer: Digest) -> Report {
    let mut report = Report::new(layer);
    let opened = LayerDir::open(path, layer).and_then(|dir| {
        dir.check_meta()?;
        Ok(dir)
    });
    let dir = match opened {
        Ok(dir) => dir,
        Err(error) if error.is_damage() => {
            report.repaired = Some(format!("{error}; the daemon mends it when it is used next"));
            return report;
        }
        Err(error) => return Report::failed(layer, error.to_string()),
    };
    let chunks: Vec<_> = dir.present().iter().collect();
    for chunk in chunks {
        report.checked += 1;
        report.bytes += u64::from(dir.chunks().get(chunk).size);
        if !matches!(dir.verify(chunk, true), Verdict::Good) {
            report.wrong += 1;
        }
    }
    if report.wrong > 0
        && let Err(error) = dir.persist()
    {
        report.failed = Some(format!("what is wrong could not be noted: {error}"));
    }
    report
}
