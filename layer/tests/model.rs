//! Random TOCs against a simple model: a map from path to inode, changed
//! entry by entry as an unpacking program would change a directory.

#![allow(clippy::unwrap_used, reason = "a test through and through")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use sluice_layer::{Format, Limits, NodeId, NodeKind, Toc, read_toc_json};
use sluice_oci::Digest;

#[path = "../fuzz/checks.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the fuzz targets")]
mod checks;

const CHUNKS_END: u64 = 1 << 40;

/// What an entry of a TOC says, as far as the model goes.
#[derive(Debug, Clone)]
enum Op {
    Directory { mode: u16 },
    File { mode: u16, chunks: Vec<u64> },
    Symlink { target: String },
    Device { minor: u32 },
    HardLink { target: Vec<String>, mode: u16 },
    Whiteout,
    Opaque,
}

#[derive(Debug, Clone)]
struct Named {
    path: Vec<String>,
    /// How the path is spelt in the TOC.
    spelling: u8,
    op: Op,
}

fn name() -> impl Strategy<Value = String> {
    // Few names, so that they meet often.
    prop_oneof![
        8 => prop::sample::select(vec!["a", "b", "c", "ü", "x y", "\"\\<"]).prop_map(str::to_owned),
        1 => "[a-z]{1,12}",
    ]
}

fn path() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(name(), 1..4)
}

fn op() -> impl Strategy<Value = Op> {
    let mode = 0..=0o7777u16;
    prop_oneof![
        4 => mode.clone().prop_map(|mode| Op::Directory { mode }),
        4 => (mode.clone(), prop::collection::vec(1..100_000u64, 0..5))
            .prop_map(|(mode, chunks)| Op::File { mode, chunks }),
        1 => name().prop_map(|target| Op::Symlink { target }),
        1 => (1..100u32).prop_map(|minor| Op::Device { minor }),
        1 => (path(), mode).prop_map(|(target, mode)| Op::HardLink { target, mode }),
        1 => Just(Op::Whiteout),
        1 => Just(Op::Opaque),
    ]
}

/// A list of entries. Most hard links lead to the path of a file or link,
/// and in most lists every entry can be unpacked (if every link can).
fn list(most: usize) -> impl Strategy<Value = Vec<Named>> {
    let link = prop::option::weighted(0.95, any::<prop::sample::Index>());
    let entries = prop::collection::vec((named(), link), 0..most);
    (entries, prop::bool::weighted(0.9)).prop_map(|(entries, sound)| {
        let paths: Vec<_> = entries
            .iter()
            .map(|(named, _)| named.path.clone())
            .collect();
        let mut model = Model::empty();
        let mut list = Vec::new();
        for (mut named, link) in entries {
            if let (Op::HardLink { target, .. }, Some(link)) = (&mut named.op, link) {
                *target = link.get(&paths).clone();
            }
            if model.apply(list.len(), &named).is_some() || !sound {
                list.push(named);
            }
        }
        list
    })
}

fn named() -> impl Strategy<Value = Named> {
    (path(), 0..5u8, op()).prop_map(|(path, spelling, op)| Named { path, spelling, op })
}

/// The TOC that says so.
fn to_json(list: &[Named]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut offset = 1000;
    for (index, Named { path, spelling, op }) in list.iter().enumerate() {
        let mut path = path.clone();
        match op {
            Op::Whiteout => {
                let base = path.pop().unwrap();
                path.push(format!(".wh.{base}"));
            }
            Op::Opaque => path.push(".wh..wh..opq".to_owned()),
            _ => {}
        }
        let joined = path.join("/");
        let name = match spelling {
            0 => joined,
            1 => format!("./{joined}"),
            2 => format!("/{joined}/"),
            3 => path.join("//./"),
            _ => format!("{joined}/."),
        };
        let digest = |at: usize| Digest::of(format!("{index} {at}").as_bytes()).to_string();
        match op {
            Op::Directory { mode } => {
                entries.push(json!({"name": name, "type": "dir", "mode": mode}));
            }
            Op::File { mode, chunks } => {
                let size: u64 = chunks.iter().sum();
                let mut entry = json!({"name": name, "type": "reg", "mode": mode, "size": size});
                let mut chunk_offset = 0;
                for (at, chunk) in chunks.iter().enumerate() {
                    entry["offset"] = json!(offset);
                    entry["chunkOffset"] = json!(chunk_offset);
                    entry["chunkSize"] = json!(chunk);
                    entry["chunkDigest"] = json!(digest(at));
                    entries.push(std::mem::replace(&mut entry, json!({"type": "chunk"})));
                    offset += chunk / 2 + 100;
                    chunk_offset += chunk;
                }
                if chunks.is_empty() {
                    entries.push(entry);
                }
            }
            Op::Symlink { target } => {
                entries.push(json!({"name": name, "type": "symlink", "linkName": target}));
            }
            Op::Device { minor } => {
                entries
                    .push(json!({"name": name, "type": "char", "devMajor": 7, "devMinor": minor}));
            }
            Op::HardLink { target, mode } => {
                let target = target.join("/");
                entries.push(
                    json!({"name": name, "type": "hardlink", "linkName": target, "mode": mode}),
                );
            }
            Op::Whiteout | Op::Opaque => entries.push(json!({"name": name, "type": "reg"})),
        }
    }
    serde_json::to_vec(&json!({"version": 1, "entries": entries})).unwrap()
}

#[derive(Debug, Clone)]
struct Inode {
    kind: Kind,
    mode: u16,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Directory {
        opaque: bool,
    },
    File {
        chunks: Vec<(u64, Digest)>,
    },
    Symlink(String),
    Device(u32, u32),
    /// A hard link to what is not there yet.
    Later(Vec<String>),
}

/// Every path and the inode that it names. None: there is no such tree.
#[derive(Default)]
struct Model {
    names: BTreeMap<Vec<String>, usize>,
    inodes: Vec<Inode>,
}

impl Model {
    fn of(list: &[Named]) -> Option<Self> {
        let mut model = Self::empty();
        for (index, named) in list.iter().enumerate() {
            model.apply(index, named)?;
        }
        model.resolve()?;
        Some(model)
    }

    fn empty() -> Self {
        let mut model = Self::default();
        model.name(Vec::new(), Kind::Directory { opaque: false }, 0o755);
        model
    }

    fn name(&mut self, path: Vec<String>, kind: Kind, mode: u16) {
        self.inodes.push(Inode { kind, mode });
        self.names.insert(path, self.inodes.len() - 1);
    }

    fn kind(&self, path: &[String]) -> Option<&Kind> {
        Some(&self.inodes[*self.names.get(path)?].kind)
    }

    fn parents(&mut self, path: &[String]) -> Option<()> {
        for length in 1..path.len() {
            match self.kind(&path[..length]) {
                Some(Kind::Directory { .. }) => {}
                None | Some(Kind::Device(0, 0)) => {
                    let made = Kind::Directory { opaque: false };
                    self.name(path[..length].to_vec(), made, 0o755);
                }
                Some(_) => return None,
            }
        }
        Some(())
    }

    fn clear(&mut self, path: &[String]) {
        self.names.retain(|name, _| !name.starts_with(path));
    }

    fn apply(&mut self, index: usize, Named { path, op, .. }: &Named) -> Option<()> {
        match op {
            Op::Opaque => {
                let below: Vec<String> = [path.as_slice(), &["x".to_owned()]].concat();
                self.parents(&below)?;
                self.inodes[self.names[path]].kind = Kind::Directory { opaque: true };
                return Some(());
            }
            _ => self.parents(path)?,
        }
        let (kind, mode) = match op {
            Op::Directory { mode } => {
                if let Some(Kind::Directory { .. }) = self.kind(path) {
                    let inode = self.names[path];
                    self.inodes[inode].mode = *mode;
                    return Some(());
                }
                (Kind::Directory { opaque: false }, *mode)
            }
            Op::File { mode, chunks } => {
                let digest = |at: usize| Digest::of(format!("{index} {at}").as_bytes());
                let chunks = chunks
                    .iter()
                    .enumerate()
                    .map(|(at, size)| (*size, digest(at)));
                (
                    Kind::File {
                        chunks: chunks.collect(),
                    },
                    *mode,
                )
            }
            Op::Symlink { target } => (Kind::Symlink(target.clone()), 0o777),
            Op::Device { minor } => (Kind::Device(7, *minor), 0),
            Op::HardLink { target, mode } => match self.names.get(target).copied() {
                Some(inode) => {
                    match self.inodes[inode].kind {
                        Kind::Directory { .. } => return None,
                        Kind::Symlink(_) | Kind::Later(_) => {}
                        _ => self.inodes[inode].mode = *mode,
                    }
                    self.clear(path);
                    self.names.insert(path.clone(), inode);
                    return Some(());
                }
                None => (Kind::Later(target.clone()), *mode),
            },
            Op::Whiteout if self.names.contains_key(path) => return Some(()),
            Op::Whiteout => (Kind::Device(0, 0), 0),
            Op::Opaque => return None,
        };
        self.clear(path);
        self.name(path.clone(), kind, mode);
        Some(())
    }

    /// Follows links to later names. One that a later entry replaced counts
    /// too: it could not have been made.
    fn resolve(&mut self) -> Option<()> {
        let target_of = |model: &Self, mut inode: usize| {
            for _ in 0..=model.inodes.len() {
                match &model.inodes[inode].kind {
                    Kind::Later(target) => inode = *model.names.get(target)?,
                    Kind::Directory { .. } => return None,
                    _ => return Some(inode),
                }
            }
            None
        };
        for inode in 0..self.inodes.len() {
            if let Kind::Later(_) = self.inodes[inode].kind {
                let target = target_of(self, inode)?;
                self.names
                    .values_mut()
                    .filter(|named| **named == inode)
                    .for_each(|named| *named = target);
            }
        }
        Some(())
    }

    fn lines(&self) -> Vec<String> {
        let line = |(path, inode): (&Vec<String>, &usize)| {
            let subdirectories = self.names.iter().filter(|(below, inode)| {
                below.len() == path.len() + 1
                    && below.starts_with(path)
                    && matches!(self.inodes[**inode].kind, Kind::Directory { .. })
            });
            let Inode { kind, mode } = &self.inodes[*inode];
            let links = match kind {
                Kind::Directory { .. } => 2 + subdirectories.count(),
                _ => self.names.values().filter(|named| *named == inode).count(),
            };
            format!("/{} {kind:?} {mode:o} {links}", path.join("/"))
        };
        let mut lines: Vec<String> = self.names.iter().map(line).collect();
        lines.sort();
        lines
    }
}

/// The same lines of a tree that was read.
fn lines(toc: &Toc) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = vec![(String::new(), NodeId::ROOT)];
    while let Some((path, id)) = open.pop() {
        let node = toc.node(id);
        let kind = match &node.kind {
            NodeKind::Directory(directory) => {
                for child in &directory.children {
                    let name = std::str::from_utf8(&child.name).unwrap();
                    open.push((format!("{path}/{name}"), child.node));
                }
                Kind::Directory {
                    opaque: directory.opaque,
                }
            }
            NodeKind::Regular(content) => {
                let range = content.chunks.start as usize..content.chunks.end as usize;
                let chunks = toc.chunks()[range].iter();
                Kind::File {
                    chunks: chunks.map(|chunk| (chunk.size, chunk.digest)).collect(),
                }
            }
            NodeKind::Symlink(target) => Kind::Symlink(String::from_utf8(target.to_vec()).unwrap()),
            NodeKind::CharDevice { major, minor } => Kind::Device(*major, *minor),
            other => panic!("{other:?}"),
        };
        let path = if path.is_empty() { "/" } else { &path };
        lines.push(format!("{path} {kind:?} {:o} {}", node.mode, node.links));
    }
    lines.sort();
    lines
}

fn read(json: &[u8]) -> Result<Toc, sluice_layer::TocError> {
    read_toc_json(
        Format::ZstdChunked,
        CHUNKS_END,
        json,
        &Digest::of(json),
        &Limits::default(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn what_is_read_is_what_unpacking_gives(list in list(30)) {
        let toc = read(&to_json(&list));
        match Model::of(&list) {
            Some(model) => {
                let toc = toc.unwrap();
                checks::check_toc(&toc, &Limits::default());
                prop_assert_eq!(lines(&toc), model.lines());
            }
            None => prop_assert!(toc.is_err()),
        }
    }

    #[test]
    fn damaged_tocs_are_refused_or_sound(
        list in list(12),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
    ) {
        let mut json = to_json(&list);
        for (at, byte, kind) in edits {
            let at = at.index(json.len());
            match kind {
                0 => json[at] = byte,
                1 => json[at] = b'0' + byte % 10,
                2 => json.insert(at, byte),
                _ => { json.remove(at); }
            }
            if json.is_empty() {
                break;
            }
        }
        if let Ok(toc) = read(&json) {
            checks::check_toc(&toc, &Limits::default());
        }
    }

    #[test]
    fn any_bytes_at_all_do_no_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
        checks::footer(&data);
        checks::toc(&data);
        checks::decoder(&data);
    }
}
