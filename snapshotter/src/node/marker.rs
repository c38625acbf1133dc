//! Whether the last process ended in order: a file that is there while one
//! runs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::StartError;
use super::start::failed;

/// The file below the root.
const RUNNING: &str = "running";
/// In it, beside the machine's boot: not everything was verified since the
/// machine went down.
const DOUBTED: &str = "doubted";
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// How the last process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// It made all durable, and said so.
    InOrder,
    /// It did not, but the machine has gone on: whatever was written is there.
    Killed,
    /// The machine went down, and nobody has looked at all of its disk since.
    PowerLoss,
}

/// Says that a process runs, until it is cleared.
#[derive(Debug)]
pub(super) struct Marker {
    path: PathBuf,
    boot: String,
}

impl Marker {
    /// Sets the marker below `root`, and tells what it was.
    pub(super) fn set(root: &Path) -> Result<(Self, Before), StartError> {
        let boot = fs::read_to_string(BOOT).map_err(failed(Path::new(BOOT)))?;
        Self::set_in(root, boot.trim())
    }

    fn set_in(root: &Path, boot: &str) -> Result<(Self, Before), StartError> {
        let path = root.join(RUNNING);
        let before = match fs::read_to_string(&path) {
            Ok(text) if text == format!("{boot}\n") => Before::Killed,
            Ok(_) => Before::PowerLoss,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Before::InOrder,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Before::PowerLoss,
            Err(error) => return Err(failed(&path)(error)),
        };
        let marker = Self {
            path,
            boot: boot.to_owned(),
        };
        // A full disk is no reason not to start; what cannot be written then
        // reads as a power loss the next time.
        if let Err(error) = marker.write(before == Before::PowerLoss) {
            tracing::warn!("cannot write {}: {error}", marker.path.display());
        }
        Ok((marker, before))
    }

    fn write(&self, doubted: bool) -> io::Result<()> {
        let mut file = File::create(&self.path)?;
        crash_point!("marker.opened");
        let doubted = if doubted { DOUBTED } else { "" };
        write!(file, "{}\n{doubted}", self.boot)?;
        crash_point!("marker.written");
        file.sync_all()?;
        self.sync_directory()?;
        crash_point!("marker.set");
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    }

    /// Everything was verified.
    pub(super) fn settle(&self) {
        if let Err(error) = self.write(false) {
            tracing::warn!("cannot write {}: {error}", self.path.display());
        }
    }

    /// The process ends, and all is durable.
    pub(super) fn clear(&self) {
        let cleared = fs::remove_file(&self.path).and_then(|()| self.sync_directory());
        crash_point!("marker.cleared");
        if let Err(error) = cleared
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_kill_from_a_power_loss() {
        let root = tempfile::tempdir().unwrap();
        let set = |boot| Marker::set_in(root.path(), boot).unwrap();
        let (marker, before) = set("a");
        assert_eq!(before, Before::InOrder);
        marker.clear();
        assert_eq!(set("a").1, Before::InOrder);
        assert_eq!(set("a").1, Before::Killed);
        // The machine goes down, and the doubt lasts until it is settled.
        assert_eq!(set("b").1, Before::PowerLoss);
        let (marker, before) = set("b");
        assert_eq!(before, Before::PowerLoss);
        marker.settle();
        assert_eq!(set("b").1, Before::Killed);
        // So does a marker that was cut short.
        fs::write(root.path().join(RUNNING), "").unwrap();
        assert_eq!(set("b").1, Before::PowerLoss);
    }
}
