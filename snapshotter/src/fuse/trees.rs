//! What the mount of trees shows, apart from how the kernel asks for it: one
//! directory a layer, each with that layer's tree.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;

use super::Content;
use crate::erofs::{self, Attributes, Extent, FileType, Image, Ino};

/// A layer: its tree, and the content of its files.
pub struct Tree {
    image: Image,
    content: Arc<dyn Content>,
}

impl Tree {
    /// Puts together what belongs together.
    pub fn new(image: Image, content: Arc<dyn Content>) -> Self {
        Self { image, content }
    }
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

/// The layers whose trees the mount shows. Clones share them.
#[derive(Clone, Default)]
pub struct TreeTable {
    trees: Arc<RwLock<HashMap<u64, Arc<Tree>>>>,
    expected: Arc<RwLock<HashMap<u64, Expected>>>,
}

/// A layer that is not there yet.
#[derive(Clone)]
struct Expected {
    decided: watch::Receiver<()>,
    deadline: Duration,
}

/// While it lives, whoever asks for anything of its layer waits.
#[derive(Debug)]
pub struct Expectation {
    _decided: watch::Sender<()>,
}

#[cfg(test)]
impl Expectation {
    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        // The table has a receiver as well.
        self._decided.receiver_count() - 1
    }
}

impl TreeTable {
    /// A mount that shows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows a layer's tree under its number, until it is removed. The kernel
    /// remembers what it saw: no other layer may have that number while the
    /// mount lives. Numbers are below 2^23.
    pub fn insert(&self, number: u64, tree: Tree) {
        self.trees.write().insert(number, Arc::new(tree));
        self.expected.write().remove(&number);
    }

    /// A layer that the kernel knows under this number is not there, but may
    /// be soon: until the answer is dropped, and for `deadline` at most, those
    /// who ask for something of it wait.
    pub fn expect(&self, number: u64, deadline: Duration) -> Expectation {
        let (sender, decided) = watch::channel(());
        let expected = Expected { decided, deadline };
        self.expected.write().insert(number, expected);
        Expectation { _decided: sender }
    }

    /// What to wait for before asking for something of the layer that the
    /// mount's inode number belongs to.
    pub(super) fn awaited(&self, inode: u64) -> Option<impl Future<Output = ()> + Send + use<>> {
        let number = (inode >> NID_BITS).checked_sub(1)?;
        let mut expected = self.expected.read().get(&number)?.clone();
        Some(async move {
            let decided = expected.decided.changed();
            let _ = tokio::time::timeout(expected.deadline, decided).await;
        })
    }

    /// Hides it. Whoever has a file of it open gets an error from the next
    /// read of what the kernel does not have.
    pub fn remove(&self, number: u64) {
        self.trees.write().remove(&number);
        self.expected.write().remove(&number);
    }

    /// The directory's name in the mount.
    pub fn directory_name(number: u64) -> PathBuf {
        PathBuf::from(number.to_string())
    }

    /// The numbers of all layers, in order.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = self.trees.read().keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    /// What the mount's inode number stands for.
    pub(super) fn at(&self, inode: u64) -> Result<Place, Refusal> {
        if inode == ROOT {
            return Ok(Place::Root);
        }
        let number = (inode >> NID_BITS).checked_sub(1).ok_or(Refusal::Stale)?;
        Ok(Place::In(self.layer(number)?, Ino(inode & NID_MASK)))
    }

    /// The layer of this number.
    pub(super) fn layer(&self, number: u64) -> Result<Layer, Refusal> {
        match self.trees.read().get(&number) {
            Some(tree) => Ok(Layer {
                number,
                tree: Arc::clone(tree),
            }),
            None => Err(Refusal::Stale),
        }
    }

    /// The layer that has `name` in the mount's root.
    pub(super) fn by_name(&self, name: &OsStr) -> Result<Layer, Refusal> {
        let number = name
            .to_str()
            .filter(|text| !text.starts_with(['+', '0']) || *text == "0")
            .and_then(|text| text.parse().ok())
            .ok_or(Refusal::NotFound)?;
        self.layer(number).map_err(|_| Refusal::NotFound)
    }
}

impl std::fmt::Debug for TreeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.trees.read().keys()).finish()
    }
}

/// The mount's root.
pub(super) const ROOT: u64 = 1;

/// A layer's inodes are numbered by its number and one, and below that by
/// their numbers in its image: the same in every process.
pub(super) const NID_BITS: u32 = 40;
const NID_MASK: u64 = (1 << NID_BITS) - 1;

/// What an inode number stands for.
pub(super) enum Place {
    /// The directory of layers.
    Root,
    /// Something in a layer.
    In(Layer, Ino),
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("no such file or directory")]
    NotFound,
    #[error("the layer is no longer mounted")]
    Stale,
    #[error("not a directory")]
    NotADirectory,
    #[error("a directory")]
    IsADirectory,
    #[error("not a symbolic link")]
    NotALink,
    #[error("no such attribute")]
    NoAttribute,
    #[error(transparent)]
    Image(#[from] erofs::Error),
}

/// A layer, held for the time of a request.
#[derive(Clone)]
pub(super) struct Layer {
    number: u64,
    tree: Arc<Tree>,
}

/// A listed name.
pub(super) struct Listed<'a> {
    pub(super) name: &'a OsStr,
    pub(super) inode: u64,
    pub(super) ino: Ino,
    pub(super) kind: FileType,
    /// Where the listing goes on.
    pub(super) next: u64,
}

impl Layer {
    /// The layer's root directory.
    pub(super) fn root(&self) -> Ino {
        self.tree.image.root()
    }

    /// The mount's number for an inode of the layer.
    pub(super) fn inode(&self, ino: Ino) -> Result<u64, Refusal> {
        if ino.0 > NID_MASK {
            return Err(Refusal::Image(erofs::Error::Corrupt {
                what: "an inode number out of range",
                nid: ino.0,
            }));
        }
        Ok(((self.number + 1) << NID_BITS) | ino.0)
    }

    pub(super) fn attributes(&self, ino: Ino) -> Result<Attributes, Refusal> {
        Ok(self.tree.image.attributes(ino)?)
    }

    /// The inode that `name` names in `dir`, if any.
    pub(super) fn lookup(&self, dir: Ino, name: &OsStr) -> Result<Option<Ino>, Refusal> {
        self.require(dir, FileType::Directory, Refusal::NotADirectory)?;
        Ok(self.tree.image.lookup(dir, name)?)
    }

    /// Calls `each` with the names in `dir` from `from` on, until it says
    /// that it has enough.
    pub(super) fn list(
        &self,
        dir: Ino,
        from: u64,
        mut each: impl FnMut(Listed<'_>) -> Result<bool, Refusal>,
    ) -> Result<(), Refusal> {
        use std::os::unix::ffi::OsStrExt as _;
        self.require(dir, FileType::Directory, Refusal::NotADirectory)?;
        for entry in self.tree.image.entries(dir, from)? {
            let entry = entry?;
            let enough = each(Listed {
                name: OsStr::from_bytes(entry.name),
                inode: self.inode(entry.ino)?,
                ino: entry.ino,
                kind: entry.kind,
                next: entry.next,
            })?;
            if enough {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn target(&self, ino: Ino) -> Result<&[u8], Refusal> {
        self.require(ino, FileType::Symlink, Refusal::NotALink)?;
        Ok(self.tree.image.symlink_target(ino)?)
    }

    pub(super) fn xattr(&self, ino: Ino, name: &OsStr) -> Result<&[u8], Refusal> {
        self.tree
            .image
            .xattr(ino, name)?
            .ok_or(Refusal::NoAttribute)
    }

    /// The names of the extended attributes, each followed by a NUL.
    pub(super) fn xattr_names(&self, ino: Ino) -> Result<Vec<u8>, Refusal> {
        let mut names = Vec::new();
        for xattr in self.tree.image.xattrs(ino)? {
            let xattr = xattr?;
            names.extend_from_slice(xattr.prefix);
            names.extend_from_slice(xattr.suffix);
            names.push(0);
        }
        Ok(names)
    }

    /// Where a file's content is; `None` when it is empty.
    pub(super) fn extent(&self, ino: Ino) -> Result<Option<Extent>, Refusal> {
        self.require(ino, FileType::Regular, Refusal::IsADirectory)?;
        Ok(self.tree.image.data_extent(ino)?)
    }

    pub(super) fn content(&self) -> Arc<dyn Content> {
        Arc::clone(&self.tree.content)
    }

    fn require(&self, ino: Ino, kind: FileType, refusal: Refusal) -> Result<(), Refusal> {
        if self.attributes(ino)?.kind == kind {
            Ok(())
        } else {
            Err(refusal)
        }
    }
}
