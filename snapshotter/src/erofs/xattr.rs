//! Extended attributes: names in the format's short form, and which ones are
//! stored once and shared.

use std::collections::{BTreeMap, HashMap};

use sluice_layer::{Node, NodeId, NodeKind, Toc};

use super::format::{XATTR_ENTRY_SIZE, XATTR_HEADER_SIZE};

/// Where overlayfs looks for its marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrNamespace {
    /// `trusted.overlay.*`: overlayfs mounted without `userxattr`.
    Trusted,
    /// `user.overlay.*`: overlayfs mounted with `userxattr`.
    User,
}

impl XattrNamespace {
    /// The attribute that marks an opaque directory.
    pub fn opaque_name(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.opaque",
            Self::User => b"user.overlay.opaque",
        }
    }
}

/// The name prefixes that the format knows, with their numbers. The two ACL
/// names are whole.
pub(super) const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
];

/// The prefix number and the rest of `name`; `None` for a name outside the
/// namespaces that Linux file systems store.
pub(super) fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        (rest.is_empty() != prefix.ends_with(b".")).then_some((*index, rest))
    })
}

/// An attribute as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stored<'t> {
    pub(super) prefix: u8,
    pub(super) name: &'t [u8],
    pub(super) value: &'t [u8],
}

impl Stored<'_> {
    /// Bytes on disk, padding included.
    pub(super) fn size(&self) -> u64 {
        let bytes = XATTR_ENTRY_SIZE + (self.name.len() + self.value.len()) as u64;
        bytes.next_multiple_of(XATTR_ENTRY_SIZE)
    }
}

/// The attributes that are stored for `node`.
pub(super) fn stored(node: &Node, ns: XattrNamespace) -> impl Iterator<Item = Stored<'_>> {
    let opaque = match &node.kind {
        NodeKind::Directory(directory) if directory.opaque => Some((ns.opaque_name(), &b"y"[..])),
        _ => None,
    };
    node.xattrs
        .iter()
        .map(|xattr| (&*xattr.name, &*xattr.value))
        .chain(opaque)
        .filter_map(|(name, value)| {
            let (prefix, name) = split_name(name)?;
            Some(Stored {
                prefix,
                name,
                value,
            })
        })
}

/// The extended attributes that an image has for `node`, by name, in order.
pub fn image_xattrs(node: &Node, ns: XattrNamespace) -> BTreeMap<Vec<u8>, &[u8]> {
    let prefix = |number: u8| {
        PREFIXES
            .iter()
            .find(|(n, _)| *n == number)
            .map_or(&b""[..], |p| p.1)
    };
    let all = stored(node, ns);
    all.map(|xattr| ([prefix(xattr.prefix), xattr.name].concat(), xattr.value))
        .collect()
}

/// Values longer than this are kept away from the inodes, so that a walk does
/// not have to step over them.
const INLINE_VALUE_MAX: usize = 256;

/// An inode can refer to no more shared attributes.
pub(super) const SHARED_PER_INODE: usize = u8::MAX as usize;

/// The attributes stored once for all inodes that have them.
#[derive(Default)]
pub(super) struct Shared<'t> {
    /// Offset of each within the shared area, in bytes.
    offsets: HashMap<Stored<'t>, u64>,
    /// In the order of the area.
    pub(super) area: Vec<Stored<'t>>,
    /// Size of the area in bytes.
    pub(super) size: u64,
}

impl<'t> Shared<'t> {
    pub(super) fn new(toc: &'t Toc, order: &[NodeId], ns: XattrNamespace) -> Self {
        let mut uses: HashMap<Stored<'t>, u32> = HashMap::new();
        let all = || order.iter().flat_map(|id| stored(toc.node(*id), ns));
        for xattr in all() {
            *uses.entry(xattr).or_default() += 1;
        }
        let mut shared = Self::default();
        for xattr in all() {
            let pays = uses[&xattr] > 1 || xattr.value.len() > INLINE_VALUE_MAX;
            if pays && !shared.offsets.contains_key(&xattr) {
                shared.offsets.insert(xattr, shared.size);
                shared.area.push(xattr);
                shared.size += xattr.size();
            }
        }
        shared
    }

    /// How the attributes of `node` are stored.
    pub(super) fn body(&self, node: &'t Node, ns: XattrNamespace) -> Body<'t> {
        let mut body = Body::default();
        for xattr in stored(node, ns) {
            match self.offsets.get(&xattr) {
                Some(offset) if body.shared.len() < SHARED_PER_INODE => body.shared.push(*offset),
                _ => body.own.push(xattr),
            }
        }
        body
    }
}

/// The attributes of one inode.
#[derive(Default)]
pub(super) struct Body<'t> {
    /// Offsets in the shared area.
    pub(super) shared: Vec<u64>,
    /// Stored with the inode.
    pub(super) own: Vec<Stored<'t>>,
}

impl Body<'_> {
    /// Bytes that follow the inode.
    pub(super) fn size(&self) -> u64 {
        if self.shared.is_empty() && self.own.is_empty() {
            return 0;
        }
        XATTR_HEADER_SIZE
            + self.shared.len() as u64 * XATTR_ENTRY_SIZE
            + self.own.iter().map(Stored::size).sum::<u64>()
    }

    /// `i_xattr_icount`; `None` when there are too many.
    pub(super) fn count(&self) -> Option<u16> {
        match self.size() {
            0 => Some(0),
            size => u16::try_from((size - XATTR_HEADER_SIZE) / XATTR_ENTRY_SIZE + 1).ok(),
        }
    }
}
