//! The trees of an image's layers, one above the other.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Arc, OnceLock, Weak};

use super::budget::Budget;
use crate::erofs::{FileType, Image, Ino};
use crate::fetch::{LazyFile, LazyLayer};

/// Symbolic links on one path.
const LINKS: usize = 8;
/// Data begins at multiples of this.
const BLOCK: u64 = 4096;

/// The layers' trees.
#[derive(Debug)]
pub(super) struct Trees {
    /// The highest first.
    layers: Vec<LayerTree>,
    budget: Budget,
}

struct LayerTree {
    layer: Weak<LazyLayer>,
    image: Image,
    directories: OnceLock<Directories>,
}

impl fmt::Debug for LayerTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.image.fmt(f)
    }
}

/// An inode of one of the layers, by the layer's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    layer: usize,
    ino: Ino,
}

/// In which directory each file of a layer is.
#[derive(Debug, Default)]
struct Directories {
    paths: Vec<Box<[u8]>>,
    /// The block of the data where a file begins, in order, and the position of
    /// its directory in `paths`.
    files: Vec<(u32, u32)>,
    /// Blocks where files begin whose names end with `.py`, in order.
    sources: Vec<u32>,
}

/// Where a path leads within one tree.
enum Walked {
    To(Ino, FileType),
    /// On, along this path.
    Link(Vec<u8>),
    Nowhere,
}

impl Trees {
    pub(super) fn open(layers: &[Arc<LazyLayer>], budget: Budget) -> Self {
        let tree = |layer: &Arc<LazyLayer>| {
            let image = Image::open(&layer.dir().meta_path());
            let failed = |error: &_| tracing::debug!(layer = %layer.digest(), "{error}");
            Some(LayerTree {
                layer: Arc::downgrade(layer),
                image: image.inspect_err(failed).ok()?,
                directories: OnceLock::new(),
            })
        };
        Self {
            layers: layers.iter().rev().filter_map(tree).collect(),
            budget,
        }
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The content of a regular file that has any.
    pub(super) fn file(&self, place: Place) -> Option<LazyFile> {
        let tree = self.layers.get(place.layer)?;
        let extent = tree.image.data_extent(place.ino).ok()??;
        LazyFile::at(&tree.layer.upgrade()?, extent.offset)
    }

    /// The regular file to which a path from the root leads.
    pub(super) fn locate(&self, path: &[u8]) -> Option<Place> {
        let mut path = path.to_vec();
        for _ in 0..LINKS {
            let mut link = None;
            for (layer, tree) in self.layers.iter().enumerate() {
                if !self.budget.look_up() {
                    return None;
                }
                match tree.walk(&path) {
                    Walked::To(ino, FileType::Regular) => return Some(Place { layer, ino }),
                    Walked::To(..) => return None,
                    Walked::Link(on) => {
                        link = Some(on);
                        break;
                    }
                    Walked::Nowhere => {}
                }
            }
            path = link?;
        }
        None
    }

    /// Calls `visit` with the names in a directory and what they name, of lower
    /// layers first. Links on the path are not followed.
    pub(super) fn list(&self, path: &[u8], mut visit: impl FnMut(&[u8], FileType, Place)) {
        for (layer, tree) in self.layers.iter().enumerate().rev() {
            if !self.budget.look_up() {
                return;
            }
            let Walked::To(ino, FileType::Directory) = tree.walk(path) else {
                continue;
            };
            for entry in tree.image.entries(ino, 0).into_iter().flatten().flatten() {
                let place = Place {
                    layer,
                    ino: entry.ino,
                };
                visit(entry.name, entry.kind, place);
            }
        }
    }

    /// Finds out in which directories the files are. Blocks.
    pub(super) fn index(&self) {
        for tree in &self.layers {
            tree.directories
                .get_or_init(|| tree.read_directories(&self.budget));
        }
    }

    /// The path of the directory that a file is in, without slashes at its
    /// ends.
    pub(super) fn directory_of(&self, file: &LazyFile) -> Option<Box<[u8]>> {
        let directories = self.tree_of(file)?.directories.get()?;
        let block = u32::try_from(file.offset() / BLOCK).ok()?;
        let at = directories
            .files
            .binary_search_by_key(&block, |f| f.0)
            .ok()?;
        let path = directories.paths.get(directories.files[at].1 as usize)?;
        Some(path.clone())
    }

    /// Whether a file's name is that of a Python module's source.
    pub(super) fn is_source(&self, file: &LazyFile) -> bool {
        let block = u32::try_from(file.offset() / BLOCK);
        let directories = self.tree_of(file).and_then(|tree| tree.directories.get());
        let (Some(directories), Ok(block)) = (directories, block) else {
            return false;
        };
        directories.sources.binary_search(&block).is_ok()
    }

    /// The directories that have files, and those above them.
    pub(super) fn directories(&self) -> BTreeSet<&[u8]> {
        let paths = self
            .layers
            .iter()
            .filter_map(|tree| tree.directories.get())
            .flat_map(|directories| &directories.paths);
        let mut all = BTreeSet::new();
        for path in paths {
            let mut path = &path[..];
            while all.insert(path) {
                match path.iter().rposition(|&byte| byte == b'/') {
                    Some(slash) => path = &path[..slash],
                    None => break,
                }
            }
        }
        all
    }

    fn tree_of(&self, file: &LazyFile) -> Option<&LayerTree> {
        let layer = Arc::as_ptr(file.layer());
        self.layers.iter().find(|tree| tree.layer.as_ptr() == layer)
    }
}

impl LayerTree {
    fn walk(&self, path: &[u8]) -> Walked {
        let mut at = self.image.root();
        let mut kind = FileType::Directory;
        let mut above: Vec<&[u8]> = Vec::new();
        let mut names = path.split(|&byte| byte == b'/');
        while let Some(name) = names.next() {
            if matches!(name, b"" | b".") {
                continue;
            }
            if kind != FileType::Directory {
                return Walked::Nowhere;
            }
            // Links have been resolved, so that the last directory is its
            // parent.
            if name == b".." {
                above.pop();
                return Walked::Link(joined(&above, names));
            }
            let found = self.image.lookup(at, OsStr::from_bytes(name));
            let Ok(Some(ino)) = found else {
                return Walked::Nowhere;
            };
            let Ok(attributes) = self.image.attributes(ino) else {
                return Walked::Nowhere;
            };
            if attributes.kind == FileType::Symlink {
                let Ok(target) = self.image.symlink_target(ino) else {
                    return Walked::Nowhere;
                };
                if target.starts_with(b"/") {
                    above.clear();
                }
                above.push(target);
                return Walked::Link(joined(&above, names));
            }
            above.push(name);
            (at, kind) = (ino, attributes.kind);
        }
        Walked::To(at, kind)
    }

    fn read_directories(&self, budget: &Budget) -> Directories {
        let mut directories = Directories::default();
        let mut last: Option<(Vec<u8>, u32)> = None;
        let visited = self.image.files(|path, extent| {
            let slash = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
            let (directory, name) = path.split_at(slash);
            let mut room = budget.take(size_of::<(u32, u32, u32)>());
            let known = last.as_ref().filter(|(path, _)| path == directory);
            let number = match known {
                Some(&(_, number)) => number,
                None => {
                    let number = directories.paths.len() as u32;
                    room &= budget.take(size_of::<Box<[u8]>>() + directory.len());
                    directories.paths.push(directory.into());
                    last = Some((directory.to_vec(), number));
                    number
                }
            };
            if let Ok(block) = u32::try_from(extent.offset / BLOCK) {
                directories.files.push((block, number));
                if name.ends_with(b".py") {
                    directories.sources.push(block);
                }
            }
            match room {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        if let Err(error) = visited {
            tracing::debug!("a layer's tree cannot be read: {error}");
        }
        directories.files.sort_unstable();
        directories.sources.sort_unstable();
        directories
    }
}

fn joined<'n>(above: &[&[u8]], rest: impl Iterator<Item = &'n [u8]>) -> Vec<u8> {
    let mut path = above.join(&b'/');
    for name in rest {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    path
}
