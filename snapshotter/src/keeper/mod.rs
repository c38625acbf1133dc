//! Keeping the node's FUSE mounts alive from one process of the daemon to the
//! next.
//!
//! A FUSE mount lives as long as somebody holds its device open. The daemon
//! gives the devices to whoever starts it: systemd's descriptor store, or
//! [`supervise`], which speaks the same protocol. Whatever then happens to the
//! daemon, readers only wait, and the next process gets the devices back.

pub mod fdstore;
pub mod supervise;

use std::os::fd::AsFd;

use parking_lot::Mutex;

use crate::fuse::Kept;
use fdstore::{Error, Inherited, Manager, Name};

/// A FUSE mount that is kept: the names of its device and of the file that
/// says what was agreed on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountName {
    device: Name,
    terms: Name,
}

/// The mount with one file a layer.
pub const BLOBS: MountName = MountName {
    device: Name::new("sluice-blobs"),
    terms: Name::new("sluice-blobs-terms"),
};
/// The mount with one directory a layer.
pub const TREES: MountName = MountName {
    device: Name::new("sluice-trees"),
    terms: Name::new("sluice-trees-terms"),
};

/// Whoever started this process, and what it kept.
#[derive(Debug, Default)]
pub struct Keeper {
    manager: Option<Manager>,
    keeps: bool,
    inherited: Mutex<Inherited>,
}

impl Keeper {
    /// No service manager: what this process mounts ends with it.
    pub fn none() -> Self {
        Self::default()
    }

    /// The service manager of the environment, and the descriptors that it
    /// started this process with. To be called once, before anything else
    /// opens or starts anything.
    pub fn from_environment() -> Result<Self, Error> {
        let variable = |name| std::env::var_os(name);
        let inherited = Inherited::take(
            std::process::id(),
            variable(fdstore::LISTEN_PID),
            variable(fdstore::LISTEN_FDS),
            variable(fdstore::LISTEN_FDNAMES),
        )?;
        let manager = variable(fdstore::NOTIFY_SOCKET)
            .filter(|address| !address.is_empty())
            .map(|address| Manager::connect(&address))
            .transpose()?;
        let most = variable(fdstore::FDSTORE)
            .and_then(|most| most.to_str()?.parse::<u32>().ok())
            .unwrap_or_default();
        Ok(Self {
            keeps: manager.is_some() && most > 0,
            manager,
            inherited: Mutex::new(inherited),
        })
    }

    /// Whether descriptors are kept for the next process.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// Tells the service manager, when there is one, that the start is over.
    pub fn ready(&self) {
        self.tell(Manager::ready);
    }

    /// Tells it that the end has begun.
    pub fn stopping(&self) {
        self.tell(Manager::stopping);
    }

    fn tell(&self, message: impl FnOnce(&Manager) -> Result<(), Error>) {
        if let Some(Err(error)) = self.manager.as_ref().map(message) {
            tracing::warn!("{error}");
        }
    }

    /// What was kept of a mount that still exists.
    pub fn take(&self, name: MountName) -> Option<Kept> {
        let mut inherited = self.inherited.lock();
        let devices = inherited.remove(name.device);
        let mut terms = inherited.remove(name.terms);
        drop(inherited);
        if devices.is_empty() {
            return None;
        }
        let count = devices.len();
        let kept = devices
            .into_iter()
            .zip(terms.drain(..))
            .filter_map(|(device, terms)| match Kept::new(device, terms) {
                Ok(kept) => Some(kept),
                Err(error) => {
                    tracing::error!("{} was kept, but {error}", name.device.as_str());
                    None
                }
            })
            .find(Kept::is_connected);
        if kept.is_none() {
            tracing::warn!(
                "none of {count} kept devices {} belongs to a living mount",
                name.device.as_str()
            );
        }
        kept
    }

    /// Has the manager keep a mount in place of what it keeps under the name.
    /// When this returns true, it has it.
    pub fn keep(&self, name: MountName, kept: &Kept) -> Result<bool, Error> {
        let Some(manager) = self.manager.as_ref().filter(|_| self.keeps) else {
            return Ok(false);
        };
        let terms = kept.terms().map_err(|source| Error::Untold {
            what: format!("what was agreed on {}", name.device.as_str()),
            source,
        })?;
        manager.forget(name.device)?;
        manager.forget(name.terms)?;
        crash_point!("keep.forgotten");
        manager.store(name.terms, terms.as_fd())?;
        crash_point!("keep.terms-stored");
        manager.store(name.device, kept.device.as_fd())?;
        manager.barrier()?;
        crash_point!("keep.device-stored");
        Ok(true)
    }

    /// Has it keep the mount no more.
    pub fn forget(&self, name: MountName) {
        let Some(manager) = self.manager.as_ref().filter(|_| self.keeps) else {
            return;
        };
        for name in [name.device, name.terms] {
            if let Err(error) = manager.forget(name) {
                tracing::warn!("{error}");
            }
        }
    }
}
