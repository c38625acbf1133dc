//! What a reader sees of a layer, in a form that two readers' views compare in.

use std::collections::BTreeMap;

use sluice_layer::{ChunkSource, Format, Node, NodeId, NodeKind, Toc, Wanted, decode_unit};
use sluice_oci::Digest;

/// One name of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) kind: String,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: i64,
    pub(crate) links: u32,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    /// Digest of a regular file's content, read through its chunks.
    pub(crate) content: Option<String>,
    pub(crate) chunks: usize,
}

/// All names of a layer.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) seen: BTreeMap<String, Seen>,
    /// Whether there is a prefetch landmark, where a reader shows it.
    pub(crate) landmark: bool,
    pub(crate) prefetch_end: Option<u64>,
    /// Where each file's first unit is.
    pub(crate) offsets: BTreeMap<String, u64>,
}

impl Listing {
    /// What we see.
    pub(crate) fn of_toc(toc: &Toc, blob: &[u8]) -> Self {
        let mut listing = Self {
            prefetch_end: toc.prefetch_end(),
            ..Self::default()
        };
        listing.walk(toc, blob, NodeId::ROOT, String::new());
        listing
    }

    fn walk(&mut self, toc: &Toc, blob: &[u8], id: NodeId, path: String) {
        let node = toc.node(id);
        let (content, chunks) = match &node.kind {
            NodeKind::Regular(_) => {
                let (content, chunks) = self.content(toc, blob, node, &path);
                (Some(content), chunks)
            }
            _ => (None, 0),
        };
        if let NodeKind::Directory(directory) = &node.kind {
            for child in &directory.children {
                let name = std::str::from_utf8(&child.name).unwrap();
                let below = if path.is_empty() {
                    name.to_owned()
                } else {
                    format!("{path}/{name}")
                };
                self.walk(toc, blob, child.node, below);
            }
        }
        let seen = Seen {
            kind: match &node.kind {
                NodeKind::Directory(directory) if directory.opaque => "opaque dir".to_owned(),
                NodeKind::Directory(_) => "dir".to_owned(),
                NodeKind::Regular(content) => format!("reg {}", content.size),
                NodeKind::Symlink(target) => format!("symlink {}", String::from_utf8_lossy(target)),
                NodeKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
                NodeKind::BlockDevice { major, minor } => format!("block {major}:{minor}"),
                NodeKind::Fifo => "fifo".to_owned(),
            },
            mode: u32::from(node.mode),
            owner: (node.uid, node.gid),
            mtime: node.mtime.secs,
            links: node.links,
            xattrs: node
                .xattrs
                .iter()
                .map(|xattr| {
                    (
                        String::from_utf8(xattr.name.to_vec()).unwrap(),
                        xattr.value.to_vec(),
                    )
                })
                .collect(),
            content,
            chunks,
        };
        self.seen.insert(path, seen);
    }

    fn content(&mut self, toc: &Toc, blob: &[u8], node: &Node, path: &str) -> (String, usize) {
        let NodeKind::Regular(content) = &node.kind else {
            panic!("{path}")
        };
        let mut bytes = Vec::new();
        let chunks = &toc.chunks()[content.chunks.start as usize..content.chunks.end as usize];
        for chunk in chunks {
            match chunk.source {
                ChunkSource::Zeros => bytes.resize(bytes.len() + chunk.size as usize, 0),
                ChunkSource::Blob { unit, inner_offset } => {
                    self.offsets.entry(path.to_owned()).or_insert(unit.offset);
                    let wanted = Wanted {
                        inner_offset,
                        size: chunk.size,
                        digest: chunk.digest,
                    };
                    let range = unit.offset as usize..(unit.offset + unit.size) as usize;
                    decode_unit(toc.format(), &blob[range], &[wanted], |_, verified| {
                        bytes.extend_from_slice(verified.bytes());
                    })
                    .unwrap();
                }
            }
        }
        assert_eq!(bytes.len() as u64, content.size, "{path}");
        (Digest::of(&bytes).to_string(), chunks.len())
    }

    /// How a file is cut is the writer's choice.
    pub(crate) fn without_chunks(mut self) -> Self {
        for seen in self.seen.values_mut() {
            seen.chunks = 0;
        }
        self
    }

    /// Compares name by name, for a message that can be read.
    pub(crate) fn assert_equals(&self, other: &Self, what: &str) {
        let names = |listing: &Self| listing.seen.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other), "{what}");
        for (path, seen) in &self.seen {
            assert_eq!(seen, &other.seen[path], "{what}: {path}");
        }
    }
}

/// The word that command lines have for a format.
pub(crate) fn word(format: Format) -> &'static str {
    match format {
        Format::Estargz => "estargz",
        Format::ZstdChunked => "zstd-chunked",
    }
}
