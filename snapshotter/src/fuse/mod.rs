//! The node's FUSE mounts: thin adapters between the kernel and layers'
//! content.

pub mod blobs;
mod handshake;
mod reading;
mod session;
pub mod tree;
mod trees;

use std::io;
use std::sync::Arc;

use futures_util::future::BoxFuture;

pub use handshake::{Agreement, HandshakeError};
pub use reading::Reader;
pub use session::{Kept, Session, SessionError};
pub use trees::{Tree, TreeTable};

/// What a FUSE mount needs of a layer's content.
pub trait Content: Send + Sync + 'static {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset` if all those bytes are present, and says
    /// whether they were. Never waits for the network. `offset` and the
    /// buffer's end lie within the size.
    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool>;

    /// The same bytes when they are not all present: waits for what is
    /// missing. The error is the one that the reader gets.
    fn read_missing(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>>;
}
