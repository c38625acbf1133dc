//! A second copy of all records, for the day on which the database cannot be
//! read: `state.journal`, one line a change. It is written after the change is
//! durable in the database, and not synced, so it costs a `write` a
//! transaction; what a power loss takes of it is written anew at the next
//! start, from the database.
//!
//! A line is the CRC-32 of the rest in eight hexadecimal digits, a space, and
//! `{"key":…,"record":…}`, without a record when it was removed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tables::Record;
use crate::service::snapshot::Key;

/// The file may grow by so much before it is written anew, beyond doubling.
const SLACK: u64 = 4 << 20;

/// One record, or its removal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) key: Key,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) record: Option<Record>,
}

/// The file that is appended to.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// None when it could not be written, and has to be written anew.
    file: Option<File>,
    size: u64,
    /// Its size when it was written anew.
    base: u64,
    told: bool,
}

impl Journal {
    /// One that has to be written anew first.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            size: 0,
            base: 0,
            told: false,
        }
    }

    /// Whether [`Self::rewrite`] is due.
    pub(super) fn is_stale(&self) -> bool {
        self.file.is_none() || self.size > 2 * self.base + SLACK
    }

    /// Adds changes to it.
    pub(super) fn append(&mut self, changes: &[Entry]) {
        let Some(file) = &mut self.file else { return };
        let mut text = Vec::new();
        for entry in changes {
            encode(entry, &mut text);
        }
        let written = file.write_all(&text);
        self.size += text.len() as u64;
        self.note(written);
    }

    /// Replaces it by these records.
    pub(super) fn rewrite(&mut self, records: impl IntoIterator<Item = Entry>) {
        let written = self.replace(records);
        self.note(written);
    }

    fn replace(&mut self, records: impl IntoIterator<Item = Entry>) -> io::Result<()> {
        self.file = None;
        let new = self.path.with_extension("journal.new");
        let mut out = BufWriter::new(File::create(&new)?);
        let mut line = Vec::new();
        self.size = 0;
        for entry in records {
            line.clear();
            encode(&entry, &mut line);
            self.size += line.len() as u64;
            out.write_all(&line)?;
        }
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_data()?;
        fs::rename(&new, &self.path)?;
        self.base = self.size;
        self.file = Some(file);
        Ok(())
    }

    /// A copy that fails is no reason to fail the change: it is made again
    /// from the database with the next one.
    fn note(&mut self, written: io::Result<()>) {
        match written {
            Ok(()) => self.told = false,
            Err(error) => {
                self.file = None;
                if !std::mem::replace(&mut self.told, true) {
                    tracing::warn!(
                        "cannot write {}, the copy of the database: {error}",
                        self.path.display()
                    );
                }
            }
        }
    }

    /// The records of the file at `path`, and how many of its lines cannot be
    /// read.
    pub(super) fn read(path: &Path) -> io::Result<(BTreeMap<Key, Record>, usize)> {
        let mut records = BTreeMap::new();
        let mut unreadable = 0;
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((records, 0)),
            Err(error) => return Err(error),
        };
        for line in BufReader::new(file).split(b'\n') {
            match decode(&line?) {
                Some(Entry {
                    key,
                    record: Some(record),
                }) => {
                    records.insert(key, record);
                }
                Some(Entry { key, record: None }) => {
                    records.remove(&key);
                }
                None => unreadable += 1,
            }
        }
        Ok((records, unreadable))
    }
}

fn encode(entry: &Entry, to: &mut Vec<u8>) {
    // Strings and numbers: this cannot fail.
    let text = serde_json::to_vec(entry).unwrap_or_default();
    to.extend_from_slice(format!("{:08x} ", libdeflater::crc32(&text)).as_bytes());
    to.extend_from_slice(&text);
    to.push(b'\n');
}

fn decode(line: &[u8]) -> Option<Entry> {
    let (crc, text) = line.split_at_checked(9)?;
    let crc = std::str::from_utf8(crc.strip_suffix(b" ")?).ok()?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    (crc == libdeflater::crc32(text)).then_some(())?;
    serde_json::from_slice(text).ok()
}
