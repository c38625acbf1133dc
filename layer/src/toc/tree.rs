//! The tree while it grows entry by entry.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};

use super::error::{EntryError, printable};
use super::memory::{Meter, block};
use super::names::WHITEOUT;
use super::{Child, Chunk, Directory, FileContent, Mtime, Node, NodeId, NodeKind, Xattr, xattrs};

/// What numbering takes for a node.
const PER_NODE: usize = 8;
/// What the index takes for a name while it grows, and the name's place in
/// the finished directory.
const PER_EDGE: usize = 40 + size_of::<Child>();
/// What a hard link to a later name takes in tables, before and after it is
/// resolved.
const PER_FORWARD: usize = 200;

const NONE: u32 = u32::MAX;
const ROOT: u32 = 0;

/// A name in a directory. Edges whose names hash alike form a list.
struct Edge {
    parent: u32,
    node: u32,
    next: u32,
    name: Box<[u8]>,
}

/// Where a name is looked for, and what is there.
struct Spot {
    hash: u64,
    edge: Option<u32>,
}

/// A hard link to a name that comes later, or never. Its node is a
/// placeholder.
struct Forward {
    target: Box<[u8]>,
    entry: EntryAt,
}

/// An entry's position and name, to say which is at fault.
#[derive(Clone)]
pub(super) struct EntryAt {
    pub(super) index: usize,
    pub(super) name: Box<[u8]>,
}

/// What a hard link's entry says about the inode that it names.
pub(super) struct Attributes {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Mtime,
    pub(super) xattrs: Box<[Xattr]>,
}

pub(super) struct Tree {
    nodes: Vec<Node>,
    edges: Vec<Edge>,
    /// From the hash of directory and name to the first edge.
    index: HashMap<u64, u32, BuildHasherDefault<AlreadyHashed>>,
    hasher: RandomState,
    forwards: HashMap<u32, Forward>,
    max_nodes: usize,
    pub(super) memory: Meter,
    /// Extended attributes that went through merging so far.
    merged: usize,
    /// The directory of the entry before, which is mostly that of the next.
    last_directory: (Vec<u8>, u32),
}

impl Tree {
    pub(super) fn new(max_nodes: usize, memory: Meter) -> Self {
        Self {
            nodes: vec![missing_directory(ROOT)],
            edges: Vec::new(),
            index: HashMap::default(),
            hasher: RandomState::new(),
            forwards: HashMap::new(),
            max_nodes,
            memory,
            merged: 0,
            last_directory: (Vec::new(), ROOT),
        }
    }

    pub(super) fn root_mut(&mut self) -> &mut Node {
        &mut self.nodes[ROOT as usize]
    }

    pub(super) fn node_mut(&mut self, node: u32) -> &mut Node {
        &mut self.nodes[node as usize]
    }

    /// The directory at a clean path, made with its parents where missing.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<u32, EntryError> {
        if self.last_directory.0 == path {
            return Ok(self.last_directory.1);
        }
        let mut directory = ROOT;
        let mut end = 0;
        for component in components(path) {
            end += component.len() + 1;
            if component.starts_with(WHITEOUT) {
                return Err(EntryError::WhiteoutName);
            }
            let spot = self.spot(directory, component);
            let found = spot.edge.map(|edge| self.edges[edge as usize].node);
            directory = match found.map(|node| (node, &self.nodes[node as usize].kind)) {
                Some((node, NodeKind::Directory(_))) => node,
                Some((_, kind)) if !is_whiteout(kind) => {
                    return Err(EntryError::NotADirectory(printable(&path[..end - 1])));
                }
                _ => {
                    let made = self.push(missing_directory(directory))?;
                    self.link(spot, directory, component, made)?;
                    made
                }
            };
        }
        self.last_directory.0.clear();
        self.last_directory.0.extend_from_slice(path);
        self.last_directory.1 = directory;
        Ok(directory)
    }

    /// Enters `node` under a name and says which node then has that name.
    pub(super) fn insert(
        &mut self,
        parent: u32,
        name: &[u8],
        mut node: Node,
    ) -> Result<u32, EntryError> {
        let spot = self.spot(parent, name);
        if let NodeKind::Directory(directory) = &mut node.kind {
            directory.parent = NodeId(parent);
            if let Some(old) = spot.edge.map(|edge| self.edges[edge as usize].node)
                && let NodeKind::Directory(_) = self.nodes[old as usize].kind
            {
                // As when unpacked: attributes of the later, and of the
                // extended ones those of both.
                self.merge_xattrs(old, std::mem::take(&mut node.xattrs))?;
                let old_node = self.node_mut(old);
                std::mem::swap(&mut node.kind, &mut old_node.kind);
                std::mem::swap(&mut node.xattrs, &mut old_node.xattrs);
                *old_node = node;
                return Ok(old);
            }
        }
        let node = self.push(node)?;
        self.link(spot, parent, name, node)?;
        Ok(node)
    }

    /// Enters a whiteout, which hides what lower layers have under the name.
    /// What this layer has under it stays.
    pub(super) fn insert_whiteout(
        &mut self,
        parent: u32,
        name: &[u8],
        node: Node,
    ) -> Result<(), EntryError> {
        let spot = self.spot(parent, name);
        if spot.edge.is_none() {
            let node = self.push(node)?;
            self.link(spot, parent, name, node)?;
        }
        Ok(())
    }

    pub(super) fn set_opaque(&mut self, directory: u32) {
        if let NodeKind::Directory(directory) = &mut self.node_mut(directory).kind {
            directory.opaque = true;
        }
    }

    /// Enters a second name for what is at the clean path `target`. As when
    /// unpacked, the attributes of the link's entry become the inode's.
    pub(super) fn insert_link(
        &mut self,
        parent: u32,
        name: &[u8],
        target: &[u8],
        attributes: Attributes,
        entry: EntryAt,
    ) -> Result<(), EntryError> {
        let spot = self.spot(parent, name);
        let node = match self.find(target) {
            Some(node) => {
                let old = &self.nodes[node as usize];
                if matches!(old.kind, NodeKind::Directory(_)) {
                    return Err(EntryError::HardLinkToDirectory(printable(target)));
                }
                if !self.forwards.contains_key(&node) {
                    if let NodeKind::Regular(_) = old.kind {
                        self.merge_xattrs(node, attributes.xattrs)?;
                    }
                    let inode = self.node_mut(node);
                    if !matches!(inode.kind, NodeKind::Symlink(_)) {
                        inode.mode = attributes.mode;
                    }
                    inode.uid = attributes.uid;
                    inode.gid = attributes.gid;
                    inode.mtime = attributes.mtime;
                }
                node
            }
            None => {
                let node = self.push(missing_directory(parent))?;
                self.node_mut(node).kind = NodeKind::Fifo;
                self.memory
                    .take(PER_FORWARD + block(target.len()) + block(entry.name.len()))?;
                self.forwards.insert(
                    node,
                    Forward {
                        target: target.into(),
                        entry,
                    },
                );
                node
            }
        };
        self.link(spot, parent, name, node)
    }

    /// Adds extended attributes to a node's. A million entries for one
    /// directory with thousands of attributes are no honest layer.
    fn merge_xattrs(&mut self, node: u32, new: Box<[Xattr]>) -> Result<(), EntryError> {
        const MOST_MERGED: usize = 1 << 20;
        if new.is_empty() {
            return Ok(());
        }
        let old = &self.nodes[node as usize].xattrs;
        self.merged += old.len() + new.len();
        self.memory.take(xattrs_size(&new))?;
        if self.merged > MOST_MERGED {
            return Err(EntryError::XattrMerges);
        }
        let merged = xattrs::merge(old, &new)?;
        self.node_mut(node).xattrs = merged;
        Ok(())
    }

    /// The finished nodes, with `chunks` reduced to those of their files. An
    /// error comes with the position of the entry at fault.
    pub(super) fn finish(
        mut self,
        chunks: &mut Vec<Chunk>,
    ) -> Result<Vec<Node>, (EntryAt, EntryError)> {
        let targets = self.resolve_forwards()?;
        let mut edges = std::mem::take(&mut self.edges);
        self.index = HashMap::default();
        for edge in &mut edges {
            if let Some(target) = targets.get(&edge.node) {
                edge.node = *target;
            }
        }
        let mut nodes = self.nodes;
        let mut sizes = vec![0u32; nodes.len()];
        for edge in &edges {
            sizes[edge.parent as usize] += 1;
        }
        for (node, size) in nodes.iter_mut().zip(&sizes) {
            if let NodeKind::Directory(directory) = &mut node.kind {
                directory.children.reserve_exact(*size as usize);
            }
        }
        for edge in edges {
            if let NodeKind::Directory(directory) = &mut nodes[edge.parent as usize].kind {
                directory.children.push(Child {
                    name: edge.name,
                    node: NodeId(edge.node),
                });
            }
        }
        count_links(&mut nodes);
        Ok(compact(nodes, chunks))
    }

    /// From each placeholder to the node that it stands for.
    fn resolve_forwards(&self) -> Result<HashMap<u32, u32>, (EntryAt, EntryError)> {
        let mut resolved: HashMap<u32, u32> = HashMap::new();
        let mut order: Vec<u32> = self.forwards.keys().copied().collect();
        order.sort_unstable();
        for start in order {
            let mut passed = Vec::new();
            let mut node = start;
            let end = loop {
                if let Some(end) = resolved.get(&node) {
                    break *end;
                }
                let Some(forward) = self.forwards.get(&node) else {
                    break node;
                };
                let fail = |reason: fn(String) -> EntryError| {
                    (forward.entry.clone(), reason(printable(&forward.target)))
                };
                // Within one walk every placeholder but a cycle's is new.
                if passed.len() > self.forwards.len() {
                    return Err(fail(EntryError::HardLinkCycle));
                }
                passed.push(node);
                node = self
                    .find(&forward.target)
                    .ok_or_else(|| fail(EntryError::HardLinkMissing))?;
                if matches!(self.nodes[node as usize].kind, NodeKind::Directory(_)) {
                    return Err(fail(EntryError::HardLinkToDirectory));
                }
            };
            resolved.extend(passed.into_iter().map(|node| (node, end)));
        }
        Ok(resolved)
    }

    fn find(&self, path: &[u8]) -> Option<u32> {
        components(path).try_fold(ROOT, |directory, component| {
            let edge = self.spot(directory, component).edge?;
            Some(self.edges[edge as usize].node)
        })
    }

    fn spot(&self, parent: u32, name: &[u8]) -> Spot {
        let hash = self.hasher.hash_one((parent, name));
        let mut edge = self.index.get(&hash).copied();
        while let Some(at) = edge {
            let found = &self.edges[at as usize];
            if found.parent == parent && *found.name == *name {
                break;
            }
            edge = Some(found.next).filter(|next| *next != NONE);
        }
        Spot { hash, edge }
    }

    /// Makes `name` stand for `node`; `spot` is what [`Self::spot`] found.
    fn link(&mut self, spot: Spot, parent: u32, name: &[u8], node: u32) -> Result<(), EntryError> {
        if let Some(edge) = spot.edge {
            self.edges[edge as usize].node = node;
            // A directory may have gone, with all that is below.
            self.last_directory = (Vec::new(), ROOT);
            return Ok(());
        }
        self.memory
            .take(size_of::<Edge>() + PER_EDGE + block(name.len()))?;
        let new = self.edges.len() as u32;
        let next = self.index.insert(spot.hash, new).unwrap_or(NONE);
        self.edges.push(Edge {
            parent,
            node,
            next,
            name: name.into(),
        });
        Ok(())
    }

    fn push(&mut self, node: Node) -> Result<u32, EntryError> {
        if self.nodes.len() >= self.max_nodes {
            return Err(EntryError::TooManyInodes {
                limit: self.max_nodes,
            });
        }
        let target = match &node.kind {
            NodeKind::Symlink(target) => block(target.len()),
            _ => 0,
        };
        self.memory
            .take(size_of::<Node>() + PER_NODE + target + xattrs_size(&node.xattrs))?;
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as u32)
    }
}

fn xattrs_size(xattrs: &[Xattr]) -> usize {
    let size =
        |xattr: &Xattr| size_of::<Xattr>() + block(xattr.name.len()) + block(xattr.value.len());
    xattrs.iter().map(size).sum()
}

/// A directory that the layer names only in passing.
fn missing_directory(parent: u32) -> Node {
    Node {
        kind: NodeKind::Directory(Directory {
            parent: NodeId(parent),
            children: Vec::new(),
            opaque: false,
        }),
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Mtime::default(),
        links: 0,
        xattrs: Box::default(),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|component| !component.is_empty())
}

fn is_whiteout(kind: &NodeKind) -> bool {
    matches!(kind, NodeKind::CharDevice { major: 0, minor: 0 })
}

/// Counts the names of what can be reached from the root; what was replaced
/// keeps 0. Sorts children on the way.
fn count_links(nodes: &mut [Node]) {
    let mut open = vec![ROOT];
    nodes[ROOT as usize].links = 2;
    while let Some(directory) = open.pop() {
        let NodeKind::Directory(content) = &mut nodes[directory as usize].kind else {
            continue;
        };
        let mut children = std::mem::take(&mut content.children);
        children.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        for child in &children {
            let node = &mut nodes[child.node.index()];
            if let NodeKind::Directory(_) = node.kind {
                node.links = 2;
                nodes[directory as usize].links += 1;
                open.push(child.node.0);
            } else {
                node.links += 1;
            }
        }
        if let NodeKind::Directory(content) = &mut nodes[directory as usize].kind {
            content.children = children;
        }
    }
}

/// Drops the nodes without links, and chunks of no file.
fn compact(mut nodes: Vec<Node>, chunks: &mut Vec<Chunk>) -> Vec<Node> {
    let mut used = 0u32;
    let numbers: Vec<NodeId> = nodes
        .iter()
        .map(|node| {
            let number = NodeId(used);
            used += u32::from(node.links > 0);
            number
        })
        .collect();
    let mut filled = 0u32;
    for node in nodes.iter_mut().filter(|node| node.links > 0) {
        match &mut node.kind {
            NodeKind::Directory(directory) => {
                directory.parent = numbers[directory.parent.index()];
                for child in &mut directory.children {
                    child.node = numbers[child.node.index()];
                }
            }
            NodeKind::Regular(FileContent { chunks: range, .. }) => {
                let start = filled;
                for chunk in range.clone() {
                    chunks.swap(filled as usize, chunk as usize);
                    filled += 1;
                }
                *range = start..filled;
            }
            _ => {}
        }
    }
    chunks.truncate(filled as usize);
    nodes.retain(|node| node.links > 0);
    nodes.shrink_to_fit();
    nodes
}

/// For keys that are hashes.
#[derive(Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only whole hashes are keys");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
