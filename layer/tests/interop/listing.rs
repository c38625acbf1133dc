//! What a reader sees of a layer, in a form that two readers' views compare in.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

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

    /// What is in a directory that containerd unpacked a layer to.
    pub(crate) fn of_directory(root: &Path) -> Self {
        let mut listing = Self::default();
        let mut open = vec![String::new()];
        while let Some(path) = open.pop() {
            let full = root.join(&path);
            let metadata = full.symlink_metadata().unwrap();
            let mut xattrs = xattrs(&full);
            let opaque = xattrs.remove("trusted.overlay.opaque").is_some();
            if metadata.is_dir() {
                for entry in fs::read_dir(&full).unwrap() {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    open.push(if path.is_empty() {
                        name
                    } else {
                        format!("{path}/{name}")
                    });
                }
            }
            let device = || {
                let number = metadata.rdev();
                (rustix::fs::major(number), rustix::fs::minor(number))
            };
            let kind = metadata.file_type();
            let seen = Seen {
                kind: if kind.is_dir() {
                    if opaque { "opaque dir" } else { "dir" }.to_owned()
                } else if kind.is_file() {
                    format!("reg {}", metadata.len())
                } else if kind.is_symlink() {
                    format!("symlink {}", fs::read_link(&full).unwrap().display())
                } else if kind.is_char_device() {
                    format!("char {}:{}", device().0, device().1)
                } else if kind.is_block_device() {
                    format!("block {}:{}", device().0, device().1)
                } else {
                    "fifo".to_owned()
                },
                mode: metadata.mode() & 0o7777,
                owner: (metadata.uid(), metadata.gid()),
                mtime: metadata.mtime(),
                links: metadata.nlink() as u32,
                xattrs,
                content: kind
                    .is_file()
                    .then(|| Digest::of(&fs::read(&full).unwrap()).to_string()),
                chunks: 0,
            };
            listing.seen.insert(path, seen);
        }
        listing
    }

    /// Without what unpacking to a directory leaves to chance: the file
    /// system's count of a directory's links, and the times of whiteouts, the
    /// root and directories that the layer only implies.
    pub(crate) fn with_certain_parts(mut self, implied: &[&str]) -> Self {
        for (path, seen) in &mut self.seen {
            if seen.kind.ends_with("dir") {
                seen.links = 0;
            }
            let timeless = seen.kind == "char 0:0" || path.is_empty();
            if timeless
                || implied
                    .iter()
                    .any(|start| path.starts_with(start) && seen.kind.ends_with("dir"))
            {
                seen.mtime = 0;
            }
        }
        self.without_chunks()
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

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let size = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names[..size]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = String::from_utf8(name.to_vec()).unwrap();
            let mut value = vec![0; 1 << 16];
            let size = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..]).unwrap();
            value.truncate(size);
            (name, value)
        })
        .collect()
}

/// The word that command lines have for a format.
pub(crate) fn word(format: Format) -> &'static str {
    match format {
        Format::Estargz => "estargz",
        Format::ZstdChunked => "zstd-chunked",
    }
}
