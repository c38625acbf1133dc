//! Where everything goes: the order of the inodes and the place of each.

use sluice_layer::{Mtime, Node, NodeId, NodeKind, Toc};

use super::Error;
use super::dirents::Dirents;
use super::format::{
    BLOCK, CHUNK_INDEX_SIZE, COMPACT_SIZE, EXTENDED_SIZE, FIRST_INODE, NID_UNIT, XATTR_ENTRY_SIZE,
};
use super::xattr::{Body, Shared, XattrNamespace};

/// What is decided before the first byte is written.
pub(super) struct Plan<'t> {
    pub(super) toc: &'t Toc,
    pub(super) ns: XattrNamespace,
    /// Inodes in the order in which they are stored: those of a directory's
    /// entries together, directories depth first.
    pub(super) order: Vec<NodeId>,
    /// Inode numbers by position in [`Toc::nodes`].
    nids: Vec<u32>,
    pub(super) shared: Shared<'t>,
    /// The time that compact inodes have.
    pub(super) epoch: Mtime,
    /// Where the shared attributes begin. Bytes.
    pub(super) shared_start: u64,
    /// Where the blocks of directories and long symlinks begin.
    pub(super) first_block: u64,
    /// Size of the image.
    pub(super) blocks: u32,
}

impl<'t> Plan<'t> {
    pub(super) fn new(toc: &'t Toc, ns: XattrNamespace) -> Result<Self, Error> {
        let order = order(toc);
        let mut plan = Self {
            toc,
            ns,
            nids: vec![0; toc.nodes().len()],
            shared: Shared::new(toc, &order, ns),
            order,
            epoch: common_time(toc),
            shared_start: 0,
            first_block: 0,
            blocks: 0,
        };
        let mut cursor = Cursor::default();
        for index in 0..plan.order.len() {
            let id = plan.order[index];
            let spot = cursor.place(&plan.shape(id));
            plan.nids[id.index()] = u32::try_from(spot.position / NID_UNIT)
                .map_err(|_| plan.refuse(id, "a tree with this many inodes"))?;
        }
        plan.shared_start = cursor.position.next_multiple_of(XATTR_ENTRY_SIZE);
        plan.first_block = (plan.shared_start + plan.shared.size).div_ceil(BLOCK);
        plan.blocks = u32::try_from(plan.first_block + cursor.blocks)
            .map_err(|_| plan.refuse(NodeId::ROOT, "a tree of this size"))?;
        Ok(plan)
    }

    pub(super) fn nid(&self, id: NodeId) -> u32 {
        self.nids[id.index()]
    }

    /// What the inode of `id` needs.
    pub(super) fn shape(&self, id: NodeId) -> Shape<'t> {
        let node = self.toc.node(id);
        let content = match &node.kind {
            NodeKind::Directory(directory) => Content::Directory(Dirents::new(id, directory)),
            NodeKind::Symlink(target) => Content::Symlink(target),
            NodeKind::Regular(file) if file.size > 0 => Content::File(file.size),
            _ => Content::None,
        };
        let (blocks, tail) = match &content {
            Content::Directory(dirents) => dirents.size(),
            Content::Symlink(target) => (0, target.len() as u64),
            Content::File(_) | Content::None => (0, 0),
        };
        let size = match content {
            Content::File(size) => size,
            _ => blocks * BLOCK + tail,
        };
        Shape {
            node,
            compact: self.compact(node, size),
            xattrs: self.shared.body(node, self.ns),
            content,
            blocks,
            tail,
            size,
        }
    }

    fn compact(&self, node: &Node, size: u64) -> bool {
        node.mtime == self.epoch
            && node.uid <= u32::from(u16::MAX)
            && node.gid <= u32::from(u16::MAX)
            && node.links <= u32::from(u16::MAX)
            && size <= u64::from(u32::MAX)
    }

    /// The error that says that `what` of `id` cannot be stored.
    pub(super) fn refuse(&self, id: NodeId, what: &'static str) -> Error {
        Error::Unrepresentable {
            path: path(self.toc, id),
            what,
        }
    }
}

/// An inode and what follows it.
pub(super) struct Shape<'t> {
    pub(super) node: &'t Node,
    pub(super) compact: bool,
    pub(super) xattrs: Body<'t>,
    pub(super) content: Content<'t>,
    /// Full blocks of content.
    blocks: u64,
    /// Bytes of content after those.
    pub(super) tail: u64,
    /// `i_size`.
    pub(super) size: u64,
}

pub(super) enum Content<'t> {
    None,
    Directory(Dirents<'t>),
    Symlink(&'t [u8]),
    File(u64),
}

impl Shape<'_> {
    fn inode_size(&self) -> u64 {
        if self.compact {
            COMPACT_SIZE
        } else {
            EXTENDED_SIZE
        }
    }
}

/// Where an inode went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    /// Offset of the inode in the image.
    pub(super) position: u64,
    /// Whether its tail follows it; otherwise it has a block of its own.
    pub(super) inline: bool,
    /// Its first block, counted from [`Plan::first_block`].
    pub(super) block: u64,
    /// Its number of blocks.
    pub(super) blocks: u64,
}

/// Hands out places. Going over the inodes twice gives the same ones, so none
/// need be remembered.
pub(super) struct Cursor {
    /// End of the last inode with what follows it.
    pub(super) position: u64,
    /// Blocks handed out.
    pub(super) blocks: u64,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            position: FIRST_INODE,
            blocks: 0,
        }
    }
}

impl Cursor {
    pub(super) fn place(&mut self, shape: &Shape<'_>) -> Spot {
        let inode = shape.inode_size();
        let header = inode + shape.xattrs.size();
        let mut position = self.position.next_multiple_of(NID_UNIT);
        // The kernel copes with an inode across two blocks, but slowly.
        if crosses(position, inode) {
            position = position.next_multiple_of(BLOCK);
        }
        let whole = header + shape.tail;
        let mut inline = false;
        if shape.tail > 0 {
            // What is with its inode comes with it, from the page cache; a
            // block of its own is another read.
            inline = whole <= BLOCK;
            if inline && crosses(position, whole) {
                position = position.next_multiple_of(BLOCK);
            }
        }
        let mut end = position + header;
        if inline {
            end += shape.tail;
        }
        if matches!(shape.content, Content::File(_)) {
            end = end.next_multiple_of(CHUNK_INDEX_SIZE) + CHUNK_INDEX_SIZE;
        }
        let spot = Spot {
            position,
            inline,
            block: self.blocks,
            blocks: shape.blocks + u64::from(shape.tail > 0 && !inline),
        };
        self.position = end;
        self.blocks += spot.blocks;
        spot
    }
}

fn crosses(position: u64, size: u64) -> bool {
    position / BLOCK != (position + size - 1) / BLOCK
}

/// Every inode once, so that a walk that reads a directory, looks at all its
/// entries and then descends reads forward.
fn order(toc: &Toc) -> Vec<NodeId> {
    let mut order = Vec::with_capacity(toc.nodes().len());
    let mut seen = vec![false; toc.nodes().len()];
    let mut pending = vec![NodeId::ROOT];
    order.push(NodeId::ROOT);
    seen[NodeId::ROOT.index()] = true;
    while let Some(id) = pending.pop() {
        let NodeKind::Directory(directory) = &toc.node(id).kind else {
            continue;
        };
        let first = pending.len();
        for child in &directory.children {
            if std::mem::replace(&mut seen[child.node.index()], true) {
                continue;
            }
            order.push(child.node);
            if matches!(toc.node(child.node).kind, NodeKind::Directory(_)) {
                pending.push(child.node);
            }
        }
        pending[first..].reverse();
    }
    order
}

/// The time that more than half of the inodes have, if there is one: images
/// built reproducibly have one for most of their files. Any time will do
/// otherwise. The kernel takes it as unsigned in places, so none before 1970.
fn common_time(toc: &Toc) -> Mtime {
    let mut candidate = Mtime::default();
    let mut votes = 0_u32;
    for node in toc.nodes() {
        if node.mtime == candidate {
            votes += 1;
        } else if votes == 0 {
            candidate = node.mtime;
            votes = 1;
        } else {
            votes -= 1;
        }
    }
    if candidate.secs < 0 {
        Mtime::default()
    } else {
        candidate
    }
}

/// One of the paths of `id`, for messages.
fn path(toc: &Toc, id: NodeId) -> String {
    let mut pending = vec![(NodeId::ROOT, String::new())];
    while let Some((at, path)) = pending.pop() {
        if at == id {
            return if path.is_empty() { "/".into() } else { path };
        }
        if let NodeKind::Directory(directory) = &toc.node(at).kind {
            pending.extend(directory.children.iter().map(|child| {
                let name = String::from_utf8_lossy(&child.name);
                (child.node, format!("{path}/{name}"))
            }));
        }
    }
    "/".into()
}
