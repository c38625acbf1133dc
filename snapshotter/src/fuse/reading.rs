//! Answering reads: at once when the bytes are present, later when not.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use fuser::{Errno, ReplyData};
use tokio::runtime::Handle;

use super::Content;

thread_local! {
    /// Reused by a FUSE thread from one read to the next.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Answers reads of layers' content.
#[derive(Debug, Clone)]
pub struct Reader {
    runtime: Handle,
}

impl Reader {
    /// Reads that have to wait do so on `runtime`.
    pub fn new(runtime: Handle) -> Self {
        Self { runtime }
    }

    /// Does work that has to wait.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Answers one read of `offset..offset + size` of the content, cut at
    /// `end`. What is present is answered on the calling thread.
    pub fn read<C: Content + ?Sized>(
        &self,
        content: Arc<C>,
        offset: u64,
        size: u32,
        end: u64,
        reply: ReplyData,
    ) {
        let end = end.min(content.size());
        let len = u64::from(size).min(end.saturating_sub(offset)) as usize;
        if len == 0 {
            return reply.data(&[]);
        }
        let reply = BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            match content.try_read(offset, &mut buffer[..len]) {
                Ok(true) => {
                    reply.data(&buffer[..len]);
                    None
                }
                Ok(false) => Some(reply),
                Err(error) => {
                    reply.error(errno(&error));
                    None
                }
            }
        });
        let Some(reply) = reply else { return };
        self.runtime.spawn(async move {
            match content.read_missing(offset, len).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }
}

/// What the reading process sees.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}
