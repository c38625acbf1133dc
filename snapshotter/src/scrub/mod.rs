//! `sluice-snapshotter scrub`: reads everything that is kept of all layers and
//! compares it with its digests. A running daemon does it itself, when it is
//! asked over its socket or its timer says so.

mod client;
mod grpc;
mod offline;

use std::fmt;

use sluice_oci::Digest;
use tokio::sync::mpsc;

pub use client::ask;
pub use grpc::server;
pub use offline::run;

/// What was found of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The layer.
    pub layer: Digest,
    /// Chunks that were read and compared.
    pub checked: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that were wrong or could not be read, and are fetched
    /// again when they are needed.
    pub wrong: u64,
    /// What was wrong with the files that describe the layer, and was done
    /// about it.
    pub repaired: Option<String>,
    /// Why something could not be checked.
    pub failed: Option<String>,
}

impl Report {
    /// Of a layer of which nothing was looked at yet.
    pub fn new(layer: Digest) -> Self {
        Self {
            layer,
            checked: 0,
            bytes: 0,
            wrong: 0,
            repaired: None,
            failed: None,
        }
    }

    /// Of a layer that could not be checked.
    pub fn failed(layer: Digest, why: impl Into<String>) -> Self {
        Self {
            failed: Some(why.into()),
            ..Self::new(layer)
        }
    }

    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.wrong == 0 && self.repaired.is_none() && self.failed.is_none()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.layer)?;
        if let Some(why) = &self.failed {
            return write!(f, "not checked: {why}");
        }
        if let Some(what) = &self.repaired {
            write!(f, "{what}; ")?;
        }
        write!(f, "{} chunks, {} bytes checked", self.checked, self.bytes)?;
        match self.wrong {
            0 => write!(f, ", all right"),
            wrong => write!(f, ", {wrong} wrong, to be fetched again"),
        }
    }
}

/// Whoever has the layers open.
pub trait Scrubber: Send + Sync + 'static {
    /// Checks all layers, one after the other, and tells of each when it is
    /// done. Ends early when nobody listens.
    fn scrub(&self, each: mpsc::Sender<Report>) -> impl Future<Output = ()> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_one_plain_line() {
        let layer = Digest::of(b"layer");
        let mut report = Report::new(layer);
        report.checked = 3;
        report.bytes = 700;
        assert!(report.is_clean());
        let line = report.to_string();
        assert_eq!(
            line,
            format!("{layer}: 3 chunks, 700 bytes checked, all right")
        );
        report.wrong = 1;
        report.repaired = Some("meta.erofs was damaged and is mended".to_owned());
        assert!(!report.is_clean());
        let line = report.to_string();
        assert!(
            line.ends_with("mended; 3 chunks, 700 bytes checked, 1 wrong, to be fetched again")
        );
        let line = Report::failed(layer, "no disk").to_string();
        assert_eq!(line, format!("{layer}: not checked: no disk"));
    }
}
