//! What is seen of a tree, in an image or through a mount.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use sluice_oci::Digest;

use crate::erofs::{FileType, Image};

/// Files above this are compared by size alone.
const CONTENT_MAX: u64 = 64 << 20;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) kind: char,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u64,
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    /// Digest of a file's content or of a symbolic link's target.
    pub(crate) content: Option<Digest>,
    /// Of a file or a symbolic link.
    pub(crate) size: u64,
    /// The least of its names, when it has several.
    pub(crate) same_as: Option<String>,
}

impl Seen {
    pub(crate) fn whiteout() -> Self {
        Self {
            kind: 'c',
            mode: 0,
            uid: 0,
            gid: 0,
            links: 1,
            mtime: (0, 0),
            device: (0, 0),
            xattrs: BTreeMap::new(),
            content: None,
            size: 0,
            same_as: None,
        }
    }

    fn is_whiteout(&self) -> bool {
        self.kind == 'c' && self.device == (0, 0)
    }
}

pub(crate) type SeenTree = BTreeMap<String, Seen>;

/// Fails with the first differences. Of whiteouts only that they are there
/// counts, and no content above a bound.
pub(crate) fn assert_same(expected: &SeenTree, actual: &SeenTree) {
    let mut differences = Vec::new();
    for path in expected.keys().chain(actual.keys()) {
        let same = match (expected.get(path), actual.get(path)) {
            (Some(a), Some(b)) if a.is_whiteout() && b.is_whiteout() => true,
            (Some(a), Some(b)) => {
                let mut b = b.clone();
                if b.content.is_none() && b.size > CONTENT_MAX {
                    b.content = a.content;
                }
                *a == b
                    || (a.content.is_none() && {
                        b.content = None;
                        *a == b
                    })
            }
            _ => false,
        };
        if !same {
            differences.push(path);
        }
    }
    differences.dedup();
    if let Some(first) = differences.first() {
        panic!(
            "{} paths differ, first {first:?}:\nexpected {:?}\nactual   {:?}",
            differences.len(),
            expected.get(*first),
            actual.get(*first)
        );
    }
}

/// Walks an image, with its `data`.
pub(crate) fn of_image<B: AsRef<[u8]>>(image: &Image<B>, data: &File) -> SeenTree {
    let mut seen = SeenTree::new();
    let mut names: HashMap<u64, Vec<String>> = HashMap::new();
    let mut pending = vec![(String::new(), image.root())];
    while let Some((path, ino)) = pending.pop() {
        let attributes = image.attributes(ino).unwrap();
        let mut content = None;
        let mut size = 0;
        match attributes.kind {
            FileType::Regular => {
                size = attributes.size;
                let extent = image.data_extent(ino).unwrap();
                assert_eq!(extent.map_or(0, |extent| extent.size), size);
                if size <= CONTENT_MAX {
                    let mut bytes = vec![0; size as usize];
                    if let Some(extent) = extent {
                        data.read_exact_at(&mut bytes, extent.offset).unwrap();
                    }
                    content = Some(Digest::of(&bytes));
                }
            }
            FileType::Symlink => {
                let target = image.symlink_target(ino).unwrap();
                size = attributes.size;
                assert_eq!(target.len() as u64, size);
                content = Some(Digest::of(target));
            }
            FileType::Directory => {
                for entry in image.entries(ino, 0).unwrap() {
                    let entry = entry.unwrap();
                    let name = OsStr::from_bytes(entry.name);
                    assert_eq!(image.lookup(ino, name).unwrap(), Some(entry.ino));
                    assert_eq!(image.attributes(entry.ino).unwrap().kind, entry.kind);
                    if entry.name != b"." && entry.name != b".." {
                        pending.push((join(&path, name), entry.ino));
                    }
                }
            }
            _ => {}
        }
        let xattrs: BTreeMap<String, Vec<u8>> = image
            .xattrs(ino)
            .unwrap()
            .map(|xattr| {
                let xattr = xattr.unwrap();
                let name = [xattr.prefix, xattr.suffix].concat();
                let found = image.xattr(ino, OsStr::from_bytes(&name)).unwrap();
                assert_eq!(found, Some(xattr.value));
                (String::from_utf8(name).unwrap(), xattr.value.to_vec())
            })
            .collect();
        names.entry(ino.0).or_default().push(path.clone());
        seen.insert(
            path,
            Seen {
                kind: match attributes.kind {
                    FileType::Regular => '-',
                    FileType::Directory => 'd',
                    FileType::CharDevice => 'c',
                    FileType::BlockDevice => 'b',
                    FileType::Fifo => 'p',
                    FileType::Symlink => 'l',
                },
                mode: attributes.mode,
                uid: attributes.uid,
                gid: attributes.gid,
                links: attributes.links.into(),
                mtime: (attributes.mtime.secs, attributes.mtime.nanos),
                device: attributes.device,
                xattrs,
                content,
                size,
                same_as: None,
            },
        );
    }
    tie(&mut seen, names);
    seen
}

/// Walks a mounted tree.
pub(crate) fn of_directory(root: &Path) -> SeenTree {
    let mut seen = SeenTree::new();
    let mut names: HashMap<u64, Vec<String>> = HashMap::new();
    let mut pending = vec![String::new()];
    while let Some(relative) = pending.pop() {
        let path = root.join(&relative);
        let stat = std::fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let mut content = None;
        if kind.is_file() && stat.len() <= CONTENT_MAX {
            content = Some(Digest::of(&std::fs::read(&path).unwrap()));
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&path).unwrap();
            content = Some(Digest::of(target.as_os_str().as_bytes()));
        } else if kind.is_dir() {
            for entry in std::fs::read_dir(&path).unwrap() {
                let entry = entry.unwrap();
                let listed = entry.file_type().unwrap();
                let name = join(&relative, &entry.file_name());
                let stat = std::fs::symlink_metadata(root.join(&name)).unwrap();
                assert_eq!(listed, stat.file_type(), "{name}");
                pending.push(name);
            }
        }
        if !kind.is_dir() {
            names.entry(stat.ino()).or_default().push(relative.clone());
        }
        let device = stat.rdev();
        seen.insert(
            relative,
            Seen {
                kind: match () {
                    () if kind.is_dir() => 'd',
                    () if kind.is_symlink() => 'l',
                    () if kind.is_char_device() => 'c',
                    () if kind.is_block_device() => 'b',
                    () if kind.is_fifo() => 'p',
                    () => '-',
                },
                mode: (stat.mode() & 0o7777) as u16,
                uid: stat.uid(),
                gid: stat.gid(),
                links: stat.nlink(),
                mtime: (stat.mtime(), stat.mtime_nsec() as u32),
                device: (rustix::fs::major(device), rustix::fs::minor(device)),
                xattrs: xattrs(&path),
                content,
                size: if kind.is_file() || kind.is_symlink() {
                    stat.len()
                } else {
                    0
                },
                same_as: None,
            },
        );
    }
    tie(&mut seen, names);
    seen
}

fn tie(seen: &mut SeenTree, names: HashMap<u64, Vec<String>>) {
    for mut names in names.into_values().filter(|names| names.len() > 1) {
        names.sort();
        for name in &names {
            seen.get_mut(name).unwrap().same_as = Some(names[0].clone());
        }
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut list = vec![0; 128 << 10];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    list[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 128 << 10];
            let length =
                rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
            value.truncate(length);
            (String::from_utf8(name.to_vec()).unwrap(), value)
        })
        .collect()
}

fn join(path: &str, name: &OsStr) -> String {
    let name = name.to_str().unwrap();
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}/{name}")
    }
}
