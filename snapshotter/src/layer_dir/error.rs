//! What can be wrong with a layer directory.

use std::io;
use std::path::{Path, PathBuf};

/// A layer directory that cannot be made, opened or written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct Error {
    path: PathBuf,
    problem: Problem,
}

/// What is wrong with one of its files.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The operating system refused.
    #[error("cannot {action} it: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("it is damaged ({0}); remove the layer's directory and pull the image again")]
    Damaged(String),
    /// A later Sluice wrote it.
    #[error(
        "it was written by a newer version of Sluice (format {0}); run that version, or remove \
         the layer's directory"
    )]
    Newer(u32),
    /// The layer is outside what can be stored.
    #[error("{0}")]
    Unsupported(String),
    /// The EROFS image could not be written.
    #[error("cannot write the EROFS image: {0}")]
    Erofs(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::new(path, Problem::Io { action, source })
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::new(path, Problem::Damaged(what.into()))
    }

    pub(crate) fn new(path: &Path, problem: Problem) -> Self {
        Self {
            path: path.to_owned(),
            problem,
        }
    }

    /// What is wrong.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Whether the file is simply not there.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(&self.problem, Problem::Io { source, .. }
            if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether removing the directory and making it again can help.
    pub fn is_damage(&self) -> bool {
        match &self.problem {
            Problem::Damaged(_) => true,
            // A sector that went bad: another one will do.
            Problem::Io { source, .. } if source.raw_os_error() == Some(libc::EIO) => true,
            _ => self.is_missing(),
        }
    }
}
