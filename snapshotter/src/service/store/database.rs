//! The database file: opened, versioned, and opened again after a failure.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use redb::ReadableDatabase;

use super::tables::{CHILDREN, LAYERS, META, Read, SNAPSHOTS, Tables, VERSION, Write};
use super::{Error, ROOT_VERSION, StoreError};

/// redb refuses all work after an I/O error such as a full disk, until its
/// file is opened anew: this does so at the next call, and the daemon goes on
/// as soon as there is space.
#[derive(Debug)]
pub(super) struct Database {
    path: PathBuf,
    state: RwLock<State>,
}

#[derive(Debug)]
enum State {
    Open(redb::Database),
    Failed,
    Closed,
}

impl State {
    fn database(&self) -> Result<&redb::Database, StoreError> {
        match self {
            Self::Open(database) => Ok(database),
            Self::Failed | Self::Closed => Err(StoreError::Stopping),
        }
    }
}

impl Database {
    pub(super) fn open(path: PathBuf) -> Result<Self, StoreError> {
        let database = open_file(&path)?;
        Ok(Self {
            path,
            state: RwLock::new(State::Open(database)),
        })
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
        let guard = self.opened()?;
        let result = self.transaction(guard.database()?, write);
        drop(guard);
        if let Err(error) = &result {
            self.note(error);
        }
        result
    }

    fn transaction<T>(
        &self,
        database: &redb::Database,
        write: impl FnOnce(&mut Write<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let transaction = begin_write(database, &self.path)?;
        crash_point!("database.begun");
        let value = write(&mut write_tables(&transaction, &self.path)?)?;
        crash_point!("database.changed");
        transaction
            .commit()
            .map_err(|e| StoreError::new(&self.path, e))?;
        crash_point!("database.committed");
        Ok(value)
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
            *state = State::Open(open_file(&self.path)?);
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
    })
}

fn open_file(path: &Path) -> Result<redb::Database, StoreError> {
    let exists = path.try_exists();
    if !exists.map_err(|e| StoreError::new(path, redb::Error::Io(e)))? {
        create_file(path)?;
    }
    let database = builder().open(path).map_err(|e| StoreError::new(path, e))?;
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
