//! One thread writes. Changes that wait while it syncs to disk go together in
//! its next transaction, so that a hundred `Prepare`s at once cost a few
//! fsyncs and not a hundred.

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::database::Database;
use super::tables::Write;
use super::{Error, StoreError};

/// How many changes share a transaction at most.
const BATCH: usize = 256;

/// Tells the one who asked, once it is known whether the transaction lasts.
type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// A change of state that waits to be written.
trait Change: Send {
    /// The error is redb's own, which the transaction does not survive.
    fn run(self: Box<Self>, tables: &mut Write<'_>) -> (Answer, Option<StoreError>);
    fn refuse(self: Box<Self>, error: StoreError);
}

struct Waiting<F, T> {
    change: F,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<F, T> Change for Waiting<F, T>
where
    F: FnOnce(&mut Write<'_>) -> Result<T, Error> + Send,
    T: Send + 'static,
{
    fn run(self: Box<Self>, tables: &mut Write<'_>) -> (Answer, Option<StoreError>) {
        let Self { change, reply } = *self;
        let result = change(tables);
        let lost = match &result {
            Err(Error::Store(error)) if error.is_fatal() => Some(error.clone()),
            _ => None,
        };
        let answer: Answer = Box::new(move |lasting| {
            let result = match lasting {
                Ok(()) => result,
                Err(error) => Err(error.into()),
            };
            // Nobody waits any more when the call was cancelled.
            let _ = reply.send(result);
        });
        (answer, lost)
    }

    fn refuse(self: Box<Self>, error: StoreError) {
        let _ = self.reply.send(Err(error.into()));
    }
}

#[derive(Debug)]
pub(super) struct Writer {
    changes: Mutex<Option<mpsc::UnboundedSender<Box<dyn Change>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    pub(super) fn start(database: Arc<Database>) -> Result<Self, StoreError> {
        let (changes, waiting) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || run(&database, waiting))
            .map_err(|error| StoreError::Thread(Arc::new(error)))?;
        Ok(Self {
            changes: Mutex::new(Some(changes)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Runs `change` in a transaction, perhaps with others. A change that
    /// returns an error must not have written anything.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Write<'_>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let change = Box::new(Waiting { change, reply });
        let sent = match &*self.changes.lock() {
            Some(changes) => changes.send(change).is_ok(),
            None => false,
        };
        if !sent {
            return Err(StoreError::Stopping.into());
        }
        answer.await.unwrap_or(Err(Error::BrokeOff))
    }

    /// Writes what was asked for until now, then stops.
    pub(super) async fn close(&self) {
        self.changes.lock().take();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the thread that writes the database broke off");
            }
        }
    }
}

impl Drop for Writer {
    /// The database is closed when this returns, and can be opened again.
    fn drop(&mut self) {
        self.changes.get_mut().take();
        if let Some(thread) = self.thread.get_mut().take() {
            let _ = thread.join();
        }
    }
}

fn run(database: &Database, mut waiting: mpsc::UnboundedReceiver<Box<dyn Change>>) {
    while let Some(first) = waiting.blocking_recv() {
        let mut next = Some(first);
        let mut answers = Vec::new();
        let written = database.write(|tables| {
            while let Some(change) = next.take() {
                let (answer, lost) = change.run(tables);
                answers.push(answer);
                if let Some(error) = lost {
                    return Err(error);
                }
                if answers.len() < BATCH {
                    next = waiting.try_recv().ok();
                }
            }
            Ok(())
        });
        match written {
            Ok(()) => answers.into_iter().for_each(|answer| answer(Ok(()))),
            Err(error) => {
                tracing::error!(%error, "a change of state was not written");
                // The transaction may have failed before the first could run.
                if let Some(change) = next.take() {
                    change.refuse(error.clone());
                }
                for answer in answers {
                    answer(Err(error.clone()));
                }
            }
        }
    }
}
