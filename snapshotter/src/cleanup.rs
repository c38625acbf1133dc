//! `sluice-snapshotter cleanup`: unmounts what the daemon left mounted, and
//! says what still uses the rest.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::mount::users::{self, Holder, Overlay};
use crate::mount::{self, Mount};
use crate::socket::{self, Root};

/// Why there was no clean-up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such root directory.
    #[error("cannot find the root directory {}: {source}", root.display())]
    NoRoot {
        /// The directory.
        root: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A daemon works there.
    #[error(transparent)]
    Place(#[from] socket::Error),
    /// Mounts cannot be listed.
    #[error(transparent)]
    Mount(#[from] mount::Error),
}

/// What was done and what was not.
#[derive(Debug, Default)]
pub struct Report {
    /// What is not mounted any more.
    pub unmounted: Vec<PathBuf>,
    /// What still is, because of whom.
    pub left: Vec<Left>,
}

/// A mount that is still there.
#[derive(Debug)]
pub struct Left {
    /// Where.
    pub target: PathBuf,
    /// Overlays that stand on it.
    pub overlays: Vec<Overlay>,
    /// Processes that work in it.
    pub holders: Vec<Holder>,
    /// What the system said, when nobody was found.
    pub error: Option<String>,
}

/// Unmounts everything below `root`, which no daemon may be using, except what
/// is in use. With `force` that is detached too, and whoever uses it gets
/// errors.
pub fn run(root: &Path, force: bool) -> Result<Report, Error> {
    let root = fs::canonicalize(root).map_err(|source| Error::NoRoot {
        root: root.to_owned(),
        source,
    })?;
    let _taken = Root::take(&root)?;
    let overlays = users::overlays_on(&root)?;
    let mut report = Report::default();
    for mount in mount::mounts_below(&root)? {
        let left = users_of(&mount, &overlays);
        let in_use = !left.overlays.is_empty() || !left.holders.is_empty();
        let unmounted = match (in_use, force) {
            (_, true) => mount::detach(&mount.target),
            (true, false) => {
                report.left.push(left);
                continue;
            }
            (false, false) => mount::unmount(&mount.target),
        };
        match unmounted {
            Ok(()) => report.unmounted.push(mount.target),
            Err(error) => report.left.push(Left {
                error: Some(error.to_string()),
                ..left
            }),
        }
    }
    Ok(report)
}

fn users_of(mount: &Mount, overlays: &[Overlay]) -> Left {
    let stands_on = |overlay: &&Overlay| {
        let mut lower = overlay.lower.iter();
        lower.any(|lower| lower.starts_with(&mount.target))
    };
    Left {
        target: mount.target.clone(),
        overlays: overlays.iter().filter(stands_on).cloned().collect(),
        holders: users::holders_below(&mount.target),
        error: None,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for target in &self.unmounted {
            writeln!(f, "unmounted {}", target.display())?;
        }
        for left in &self.left {
            writeln!(f, "still mounted: {}", left.target.display())?;
            for overlay in &left.overlays {
                write!(f, "  used by the overlay at {}", overlay.target.display())?;
                for (separator, process) in std::iter::once(" of process ")
                    .chain(std::iter::repeat(", "))
                    .zip(&overlay.processes)
                {
                    write!(f, "{separator}{process}")?;
                }
                writeln!(f)?;
            }
            for holder in &left.holders {
                writeln!(
                    f,
                    "  used by process {}: {} {}",
                    holder.process,
                    holder.how,
                    holder.path.display()
                )?;
            }
            if let Some(error) = &left.error {
                writeln!(f, "  {error}")?;
            }
        }
        if self.unmounted.is_empty() && self.left.is_empty() {
            writeln!(f, "nothing is mounted")?;
        }
        Ok(())
    }
}
