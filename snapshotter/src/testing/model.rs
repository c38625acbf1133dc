//! The description of a tree.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sluice_layer::{Format, Limits, NodeId, NodeKind, Toc, read_toc_json};
use sluice_oci::Digest;

use super::seen::{Seen, SeenTree};
use crate::erofs::XattrNamespace;
use crate::layer_dir::placement::Placement;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Directory {
        opaque: bool,
    },
    /// Size and what its content is made from.
    File {
        size: u64,
        seed: u64,
    },
    /// A file with this content.
    Bytes(Vec<u8>),
    /// A file of zeros that the blob does not hold.
    Zeros {
        size: u64,
    },
    Symlink(String),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inode {
    pub(crate) kind: Kind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
}

impl Inode {
    pub(crate) fn new(kind: Kind) -> Self {
        let mode = match kind {
            Kind::Directory { .. } => 0o755,
            Kind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        Self {
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: (1_600_000_000, 0),
            xattrs: BTreeMap::new(),
        }
    }

    pub(crate) fn mode(mut self, mode: u16) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u32, gid: u32) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn mtime(mut self, secs: i64, nanos: u32) -> Self {
        self.mtime = (secs, nanos);
        self
    }

    pub(crate) fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.insert(name.into(), value.into());
        self
    }
}

/// A layer's tree. Paths are relative, without `.`; the root is ``.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) inodes: BTreeMap<String, Inode>,
    /// Hard links: new name, path of the inode.
    pub(crate) links: BTreeMap<String, String>,
    /// Names that this layer deletes.
    pub(crate) whiteouts: Vec<String>,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = Inode::new(Kind::Directory { opaque: false });
        Self {
            inodes: BTreeMap::from([(String::new(), root)]),
            links: BTreeMap::new(),
            whiteouts: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, path: impl Into<String>, inode: Inode) -> &mut Self {
        self.inodes.insert(path.into(), inode);
        self
    }

    pub(crate) fn dir(&mut self, path: impl Into<String>) -> &mut Self {
        self.add(path, Inode::new(Kind::Directory { opaque: false }))
    }

    pub(crate) fn file(&mut self, path: impl Into<String>, size: u64) -> &mut Self {
        let path = path.into();
        let seed = path.bytes().map(u64::from).sum::<u64>() + size;
        self.add(path, Inode::new(Kind::File { size, seed }))
    }

    pub(crate) fn link(&mut self, path: impl Into<String>, target: &str) -> &mut Self {
        self.links.insert(path.into(), target.into());
        self
    }

    pub(crate) fn whiteout(&mut self, path: impl Into<String>) -> &mut Self {
        self.whiteouts.push(path.into());
        self
    }

    /// The TOC, as if the blob were the files' content uncompressed.
    pub(crate) fn toc(&self) -> Toc {
        let mut entries = Vec::new();
        let mut offset = 0;
        for (path, inode) in &self.inodes {
            let mut entry = json!({
                "name": path,
                "mode": inode.mode,
                "uid": inode.uid,
                "gid": inode.gid,
                "modtime": rfc3339(inode.mtime),
            });
            let mut set = |key: &str, value: Value| entry[key] = value;
            match &inode.kind {
                Kind::Directory { .. } => {
                    set("type", "dir".into());
                    set("name", format!("{path}/").into());
                }
                Kind::File { .. } | Kind::Bytes(_) => {
                    set("type", "reg".into());
                    let content = inode.kind.content().unwrap_or_default();
                    let size = content.len() as u64;
                    if size > 0 {
                        let digest = Digest::of(&content).to_string();
                        set("size", size.into());
                        set("offset", offset.into());
                        set("chunkDigest", digest.clone().into());
                        set("digest", digest.into());
                        offset += size;
                    }
                }
                Kind::Zeros { size } => {
                    set("type", "reg".into());
                    set("size", (*size).into());
                    set("offset", offset.into());
                    set("chunkType", "zeros".into());
                    set("digest", Digest::of(b"unknown").to_string().into());
                }
                Kind::Symlink(target) => {
                    set("type", "symlink".into());
                    set("linkName", target.clone().into());
                }
                Kind::Char(major, minor) | Kind::Block(major, minor) => {
                    let kind = if matches!(inode.kind, Kind::Char(..)) {
                        "char"
                    } else {
                        "block"
                    };
                    set("type", kind.into());
                    set("devMajor", (*major).into());
                    set("devMinor", (*minor).into());
                }
                Kind::Fifo => set("type", "fifo".into()),
            }
            if !inode.xattrs.is_empty() {
                let xattrs: serde_json::Map<_, _> = inode
                    .xattrs
                    .iter()
                    .map(|(name, value)| (name.clone(), STANDARD.encode(value).into()))
                    .collect();
                set("xattrs", xattrs.into());
            }
            entries.push(entry);
            if inode.kind == (Kind::Directory { opaque: true }) {
                entries.push(json!({"name": format!("{path}/.wh..wh..opq"), "type": "reg"}));
            }
        }
        // As in a tar, a link's entry repeats the inode's attributes.
        for (path, target) in &self.links {
            let inode = &self.inodes[target];
            entries.push(json!({
                "name": path,
                "type": "hardlink",
                "linkName": target,
                "mode": inode.mode,
                "uid": inode.uid,
                "gid": inode.gid,
                "modtime": rfc3339(inode.mtime),
            }));
        }
        for path in &self.whiteouts {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let parent = if parent.is_empty() {
                String::new()
            } else {
                format!("{parent}/")
            };
            entries.push(json!({"name": format!("{parent}.wh.{name}"), "type": "reg"}));
        }
        let json = serde_json::to_vec(&json!({"version": 1, "entries": entries})).unwrap();
        read_toc_json(
            Format::ZstdChunked,
            offset,
            &json,
            &Digest::of(&json),
            &Limits::default(),
        )
        .unwrap()
    }

    /// Writes the content of all files where `placement` says.
    pub(crate) fn write_data(&self, toc: &Toc, placement: &Placement, data: &File) {
        data.set_len(placement.data_size()).unwrap();
        let ids = ids(toc);
        for (path, inode) in &self.inodes {
            if let Some(content) = inode.kind.content() {
                let start = placement.start(ids[path.as_str()]);
                data.write_all_at(&content, start).unwrap();
            }
        }
    }

    /// What a mount must show.
    pub(crate) fn expected(&self, ns: XattrNamespace) -> SeenTree {
        let mut seen = SeenTree::new();
        for (path, inode) in &self.inodes {
            let links = match inode.kind {
                Kind::Directory { .. } => 2 + self.subdirectories(path),
                _ => 1 + self.links.values().filter(|target| *target == path).count() as u64,
            };
            let mut xattrs = inode.xattrs.clone();
            if inode.kind == (Kind::Directory { opaque: true }) {
                let name = String::from_utf8(ns.opaque_name().to_vec()).unwrap();
                xattrs.insert(name, b"y".to_vec());
            }
            seen.insert(
                path.clone(),
                Seen {
                    kind: inode.kind.letter(),
                    mode: inode.mode,
                    uid: inode.uid,
                    gid: inode.gid,
                    links,
                    mtime: bounded(inode.mtime),
                    device: match inode.kind {
                        Kind::Char(major, minor) | Kind::Block(major, minor) => (major, minor),
                        _ => (0, 0),
                    },
                    xattrs,
                    content: match &inode.kind {
                        Kind::Symlink(target) => Some(Digest::of(target.as_bytes())),
                        kind => kind.content().map(|content| Digest::of(&content)),
                    },
                    size: match &inode.kind {
                        Kind::File { size, .. } | Kind::Zeros { size } => *size,
                        Kind::Bytes(bytes) => bytes.len() as u64,
                        Kind::Symlink(target) => target.len() as u64,
                        _ => 0,
                    },
                    same_as: None,
                },
            );
        }
        for path in &self.whiteouts {
            seen.insert(path.clone(), Seen::whiteout());
        }
        for (path, target) in &self.links {
            let inode = seen[target].clone();
            seen.insert(path.clone(), inode);
        }
        // Of an inode's names the least stands for it.
        for (path, target) in &self.links {
            let first = self
                .links
                .iter()
                .filter(|(_, other)| *other == target)
                .map(|(name, _)| name)
                .chain([target])
                .min()
                .unwrap();
            for name in [path, target] {
                seen.get_mut(name).unwrap().same_as = Some(first.clone());
            }
        }
        seen
    }

    fn subdirectories(&self, path: &str) -> u64 {
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}/")
        };
        self.inodes
            .range(prefix.clone()..)
            .take_while(|(name, _)| name.starts_with(&prefix))
            .filter(|(name, inode)| {
                !name.is_empty()
                    && !name[prefix.len()..].contains('/')
                    && matches!(inode.kind, Kind::Directory { .. })
            })
            .count() as u64
    }
}

impl Kind {
    /// What a file holds, unless it is only zeros.
    fn content(&self) -> Option<Vec<u8>> {
        match self {
            Self::File { size, seed } => Some(content(*size, *seed)),
            Self::Bytes(bytes) => Some(bytes.clone()),
            _ => None,
        }
    }

    fn letter(&self) -> char {
        match self {
            Self::Directory { .. } => 'd',
            Self::File { .. } | Self::Bytes(_) | Self::Zeros { .. } => '-',
            Self::Symlink(_) => 'l',
            Self::Char(..) => 'c',
            Self::Block(..) => 'b',
            Self::Fifo => 'p',
        }
    }
}

/// The nodes by path.
fn ids(toc: &Toc) -> HashMap<String, NodeId> {
    let mut ids = HashMap::new();
    let mut pending = vec![(String::new(), NodeId::ROOT)];
    while let Some((path, id)) = pending.pop() {
        if let NodeKind::Directory(directory) = &toc.node(id).kind {
            for child in &directory.children {
                let name = std::str::from_utf8(&child.name).unwrap();
                let path = if path.is_empty() {
                    name.to_owned()
                } else {
                    format!("{path}/{name}")
                };
                pending.push((path, child.node));
            }
        }
        ids.insert(path, id);
    }
    ids
}

/// Bytes that differ from block to block and from file to file.
fn content(size: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size as usize + 8);
    while (bytes.len() as u64) < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size as usize);
    bytes
}

/// As unpacking does, a TOC takes a time that 64 bits of nanoseconds since
/// 1970 cannot hold for 1970.
fn bounded(time: (i64, u32)) -> (i64, u32) {
    let nanos = i128::from(time.0) * 1_000_000_000 + i128::from(time.1);
    if (0..=i128::from(i64::MAX)).contains(&nanos) {
        time
    } else {
        (0, 0)
    }
}

fn rfc3339((secs, nanos): (i64, u32)) -> String {
    let (days, second) = (secs.div_euclid(86_400), secs.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let fraction = if nanos == 0 {
        String::new()
    } else {
        format!(".{nanos:09}")
    };
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}{fraction}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}
