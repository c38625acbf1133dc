//! The database file: opened, versioned, and opened again after a failure.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use redb::{ReadableDatabase, StorageBackend as _};

use super::journal::{Entry, Journal};
use super::tables::{CHILDREN, LAYERS, META, Read, SNAPSHOTS, Tables, VERSION, Write};
use super::{Error, ROOT_VERSION, StoreError};

/// redb refuses all work after an I/O error such as a full disk, until its
/// file is opened anew: this does so at the next call, and the daemon goes on
/// as soon as there is space. On a file system that has become read-only what
/// the file says is known, and cannot be changed.
#[derive(Debug)]
pub(super) struct Database {
    path: PathBuf,
    state: RwLock<State>,
    journal: Mutex<Journal>,
    rebuilt: bool,
}

#[derive(Debug)]
enum State {
    Open(redb::Database),
    /// In memory, for reading.
    ReadOnly(redb::Database),
    Failed,
    Closed,
}

impl State {
    fn database(&self) -> Result<&redb::Database, StoreError> {
        match self {
            Self::Open(database) | Self::ReadOnly(database) => Ok(database),
            Self::Failed | Self::Closed => Err(StoreError::Stopping),
        }
    }
}

impl Database {
    pub(super) fn open(path: PathBuf) -> Result<Self, StoreError> {
        let (state, rebuilt) = match open_checked(&path, open_file) {
            Ok(database) => (State::Open(database), false),
            Err(error) if error.is_damage() => (State::Open(rebuild(&path, &error)?), true),
            Err(error @ StoreError::ReadOnly { .. }) => {
                tracing::error!("{error}; nothing can be changed, what is mounted is served");
                (State::ReadOnly(open_checked(&path, open_in_memory)?), false)
            }
            Err(error) => return Err(error),
        };
        let database = Self {
            journal: Mutex::new(Journal::new(path.with_extension("journal"))),
            path,
            state: RwLock::new(state),
            rebuilt,
        };
        database.write_journal(Vec::new());
        Ok(database)
    }

    /// Whether it was damaged and had to be made anew from its copy, which may
    /// lack something.
    pub(super) fn was_rebuilt(&self) -> bool {
        self.rebuilt
    }

    fn write_journal(&self, changes: Vec<Entry>) {
        let mut journal = self.journal.lock();
        if !journal.is_stale() {
            return journal.append(&changes);
        }
        let records = self.read(|tables| {
            let mut records = Vec::new();
            tables.each(|key, record| {
                records.push(Entry {
                    key,
                    record: Some(record),
                });
            })?;
            Ok(records)
        });
        match records {
            Ok(records) => journal.rewrite(records),
            Err(error) => tracing::warn!(%error, "the database's copy is not up to date"),
        }
    }

    /// Refuses everything from now on.
    pub(super) fn close(&self) {
        *self.state.write() = State::Closed;
    }

    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&Read<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let guard = self.opened()?;
        let result = read_tables(guard.database()?, &self.path).and_then(|tables| read(&tables));
        drop(guard);
        if let Err(Error::Store(error)) = &result {
            self.note(error);
        }
        result
    }

    /// Runs `write` in one transaction, durable when this returns `Ok`.
    pub(super) fn write<T>(
        &self,
        write: impl FnOnce(&mut Write<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if matches!(*self.state.read(), State::ReadOnly(_)) {
            // It may have been repaired.
            *self.state.write() = State::Failed;
        }
        let guard = self.opened()?;
        if let State::ReadOnly(_) = &*guard {
            let path = self.path.clone();
            return Err(StoreError::ReadOnly { path });
        }
        let result = self.transaction(guard.database()?, write);
        drop(guard);
        match result {
            Ok((value, changes)) => {
                self.write_journal(changes);
                Ok(value)
            }
            Err(error) => {
                self.note(&error);
                Err(error)
            }
        }
    }

    fn transaction<T>(
        &self,
        database: &redb::Database,
        write: impl FnOnce(&mut Write<'_>) -> Result<T, StoreError>,
    ) -> Result<(T, Vec<Entry>), StoreError> {
        let transaction = begin_write(database, &self.path)?;
        crash_point!("database.begun");
        let mut tables = write_tables(&transaction, &self.path)?;
        let value = write(&mut tables)?;
        let changes = std::mem::take(&mut tables.changes);
        drop(tables);
        crash_point!("database.changed");
        transaction
            .commit()
            .map_err(|e| StoreError::new(&self.path, e))?;
        crash_point!("database.committed");
        Ok((value, changes))
    }

    fn note(&self, error: &StoreError) {
        let mut state = self.state.write();
        if error.is_fatal() && matches!(*state, State::Open(_)) {
            *state = State::Failed;
        }
    }

    fn opened(&self) -> Result<RwLockReadGuard<'_, State>, StoreError> {
        let guard = self.state.read();
        if !matches!(*guard, State::Failed) {
            return Ok(guard);
        }
        drop(guard);
        let mut state = self.state.write();
        if matches!(*state, State::Failed) {
            *state = match open_file(&self.path) {
                Err(StoreError::ReadOnly { .. }) => State::ReadOnly(open_in_memory(&self.path)?),
                opened => State::Open(opened?),
            };
        }
        Ok(RwLockWriteGuard::downgrade(state))
    }
}

fn begin_write(
    database: &redb::Database,
    path: &Path,
) -> Result<redb::WriteTransaction, StoreError> {
    // The default durability: synced to disk at the commit.
    database.begin_write().map_err(|e| StoreError::new(path, e))
}

fn read_tables<'p>(database: &redb::Database, path: &'p Path) -> Result<Read<'p>, Error> {
    let fail = |error| StoreError::new(path, error);
    let transaction = database
        .begin_read()
        .map_err(|e| StoreError::new(path, e))?;
    Ok(Tables {
        path,
        meta: transaction.open_table(META).map_err(fail)?,
        snapshots: transaction.open_table(SNAPSHOTS).map_err(fail)?,
        children: transaction.open_table(CHILDREN).map_err(fail)?,
        layers: transaction.open_table(LAYERS).map_err(fail)?,
        changes: Vec::new(),
    })
}

fn write_tables<'t>(
    transaction: &'t redb::WriteTransaction,
    path: &'t Path,
) -> Result<Write<'t>, StoreError> {
    let fail = |error| StoreError::new(path, error);
    Ok(Tables {
        path,
        meta: transaction.open_table(META).map_err(fail)?,
        snapshots: transaction.open_table(SNAPSHOTS).map_err(fail)?,
        children: transaction.open_table(CHILDREN).map_err(fail)?,
        layers: transaction.open_table(LAYERS).map_err(fail)?,
        changes: Vec::new(),
    })
}

type Open = fn(&Path) -> Result<redb::Database, StoreError>;

/// Opens the file, and checks all of it.
fn open_checked(path: &Path, open: Open) -> Result<redb::Database, StoreError> {
    let damaged = |what: &str| StoreError::new(path, redb::Error::Corrupted(what.to_owned()));
    // redb is not made for bytes that are none of its own, and may panic.
    let opened = std::panic::catch_unwind(|| {
        let mut database = open(path)?;
        match database.check_integrity() {
            Ok(true) => Ok(database),
            Ok(false) => Err(damaged("its checksums do not match")),
            Err(error) => Err(StoreError::new(path, error)),
        }
    });
    opened.unwrap_or_else(|_| Err(damaged("it is no database")))
}

/// Sets the damaged file aside, and makes another from the journal.
fn rebuild(path: &Path, error: &StoreError) -> Result<redb::Database, StoreError> {
    let fail = |error: io::Error| StoreError::new(path, redb::Error::Io(error));
    let aside = (0u32..)
        .map(|number| path.with_extension(format!("redb.damaged-{number}")))
        .find(|aside| !aside.exists())
        .unwrap_or_else(|| path.with_extension("redb.damaged"));
    let journal = path.with_extension("journal");
    let (records, unreadable) = Journal::read(&journal).map_err(fail)?;
    fs::rename(path, &aside).map_err(fail)?;
    tracing::error!(
        "{error}; it is kept as {}, and made anew from {}: {} snapshots, {unreadable} lines \
         unreadable",
        aside.display(),
        journal.display(),
        records.len()
    );
    let directories = path.with_file_name("snapshots");
    let used = fs::read_dir(directories).into_iter().flatten().flatten();
    let used = used.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    let recorded = records.values().map(|record| record.id.0);
    let next_id = used.chain(recorded).max().map_or(1, |id| id + 1);
    let database = open_file(path)?;
    let transaction = begin_write(&database, path)?;
    let restored = write_tables(&transaction, path)?.restore(&records, next_id);
    match restored {
        Ok(()) => {}
        Err(Error::Store(error)) => return Err(error),
        Err(error) => {
            return Err(StoreError::new(
                path,
                redb::Error::Corrupted(error.to_string()),
            ));
        }
    }
    transaction.commit().map_err(|e| StoreError::new(path, e))?;
    Ok(database)
}

fn open_file(path: &Path) -> Result<redb::Database, StoreError> {
    let exists = path.try_exists();
    if !exists.map_err(|e| StoreError::new(path, redb::Error::Io(e)))? {
        create_file(path)?;
    }
    let database = builder().open(path).map_err(|e| StoreError::new(path, e))?;
    of_our_version(database, path)
}

/// Opens a copy of the file. A megabyte holds a thousand snapshots.
fn open_in_memory(path: &Path) -> Result<redb::Database, StoreError> {
    let copied = || {
        let bytes = fs::read(path)?;
        let memory = redb::backends::InMemoryBackend::new();
        memory.set_len(bytes.len() as u64)?;
        memory.write(0, &bytes)?;
        Ok(memory)
    };
    let memory = copied().map_err(|e| StoreError::new(path, redb::Error::Io(e)))?;
    let database = builder().create_with_backend(memory);
    of_our_version(database.map_err(|e| StoreError::new(path, e))?, path)
}

fn of_our_version(database: redb::Database, path: &Path) -> Result<redb::Database, StoreError> {
    match version(&database).map_err(|e| StoreError::new(path, e))? {
        ROOT_VERSION => Ok(database),
        found => Err(StoreError::Newer {
            path: path.to_owned(),
            found,
        }),
    }
}

fn builder() -> redb::Builder {
    let mut builder = redb::Database::builder();
    // A thousand snapshots are a megabyte.
    builder.set_cache_size(4 << 20);
    builder
}

/// Makes an empty database under another name first: one that a full disk
/// cuts short must not stand in the way later.
fn create_file(path: &Path) -> Result<(), StoreError> {
    let fail = |error: io::Error| StoreError::new(path, redb::Error::Io(error));
    let draft = path.with_extension("new");
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let made = builder()
        .create(&draft)
        .map_err(|e| StoreError::new(path, e))
        .and_then(|database| {
            crash_point!("database.drafted");
            initialise(&database, path)
        })
        .and_then(|()| {
            crash_point!("database.initialised");
            fs::rename(&draft, path).map_err(fail)
        });
    if made.is_err() {
        let _ = fs::remove_file(&draft);
        return made;
    }
    crash_point!("database.named");
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(fail)
}

fn version(database: &redb::Database) -> Result<u64, redb::Error> {
    let meta = database.begin_read()?.open_table(META)?;
    let version = meta.get(VERSION)?.map(|value| value.value());
    version.ok_or_else(|| redb::Error::Corrupted("it names no version".to_owned()))
}

fn initialise(database: &redb::Database, path: &Path) -> Result<(), StoreError> {
    let transaction = begin_write(database, path)?;
    {
        let mut tables = write_tables(&transaction, path)?;
        tables
            .meta
            .insert(VERSION, ROOT_VERSION)
            .map_err(|e| StoreError::new(path, e))?;
    }
    transaction.commit().map_err(|e| StoreError::new(path, e))
}
