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

    /// Returns when the bytes are present, after which `try_read` finds them,
    /// or with the error that the reader gets.
    fn make_present(self: Arc<Self>, offset: u64, len: u64) -> BoxFuture<'static, io::Result<()>>;
}
