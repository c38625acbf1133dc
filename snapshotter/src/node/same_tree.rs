//! Whether a layer's tree is the one that its tar unpacks to.

use sluice_layer::write::Unpacked;
use sluice_layer::{Mtime, Node, NodeId, NodeKind};

use crate::erofs::{Attributes, FileType, Image, Ino, XattrNamespace, image_xattrs};
use crate::layer_dir::LayerDir;

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Compares, name by name; what the first difference is, if there is one.
pub(super) fn difference(
    unpacked: &Unpacked,
    image: &Image,
    dir: &LayerDir,
) -> Result<Option<String>, Failed> {
    let comparing = Comparing {
        unpacked,
        image,
        dir,
    };
    // By node, so that names of one file are names of one file.
    let mut found: Vec<Option<Ino>> = vec![None; unpacked.tree().nodes().len()];
    let mut open = vec![(Vec::new(), NodeId::ROOT, image.root())];
    while let Some((path, id, ino)) = open.pop() {
        let known = found[id.index()].replace(ino);
        let node = unpacked.tree().node(id);
        let same = match known {
            Some(known) => known == ino,
            None => comparing.node(id == NodeId::ROOT, node, ino)?,
        };
        let names = match (same, &node.kind) {
            (false, _) => None,
            (true, NodeKind::Directory(directory)) => {
                let below = comparing.children(ino)?;
                let same = below.len() == directory.children.len()
                    && (below.iter().zip(&directory.children)).all(|(a, b)| *a.0 == *b.name);
                same.then(|| {
                    let pairs = below.into_iter().zip(&directory.children);
                    let below = |name: &[u8]| [&path[..], b"/", name].concat();
                    let pair = |((name, ino), child): (_, &sluice_layer::Child)| {
                        (below(name), child.node, ino)
                    };
                    pairs.map(pair).collect()
                })
            }
            (true, _) => Some(Vec::new()),
        };
        let Some(names) = names else {
            let path = match path.is_empty() {
                true => "/".into(),
                false => String::from_utf8_lossy(&path),
            };
            return Ok(Some(format!("{path} is another in the tar")));
        };
        open.extend(names);
    }
    Ok(None)
}

struct Comparing<'a> {
    unpacked: &'a Unpacked,
    image: &'a Image,
    dir: &'a LayerDir,
}

impl Comparing<'_> {
    fn children(&self, directory: Ino) -> Result<Vec<(&[u8], Ino)>, Failed> {
        let mut children = Vec::new();
        for entry in self.image.entries(directory, 0)? {
            let entry = entry?;
            if !matches!(entry.name, b"." | b"..") {
                children.push((entry.name, entry.ino));
            }
        }
        Ok(children)
    }

    fn node(&self, root: bool, node: &Node, ino: Ino) -> Result<bool, Failed> {
        let found = self.image.attributes(ino)?;
        let expected = (node.mode, node.uid, node.gid, node.links);
        let same = (found.mode, found.uid, found.gid, found.links) == expected
            && (root || same_time(found.mtime, node.mtime))
            && self.kind(node, ino, &found)?;
        Ok(same && self.xattrs(node, ino)?)
    }

    fn kind(&self, node: &Node, ino: Ino, found: &Attributes) -> Result<bool, Failed> {
        Ok(match (&node.kind, found.kind) {
            (NodeKind::Directory(_), FileType::Directory) | (NodeKind::Fifo, FileType::Fifo) => {
                true
            }
            (NodeKind::Symlink(target), FileType::Symlink) => {
                self.image.symlink_target(ino)? == &**target
            }
            (NodeKind::CharDevice { major, minor }, FileType::CharDevice)
            | (NodeKind::BlockDevice { major, minor }, FileType::BlockDevice) => {
                found.device == (*major, *minor)
            }
            (NodeKind::Regular(content), FileType::Regular) => {
                content.size == found.size && self.content(node, ino)?
            }
            _ => false,
        })
    }

    /// Whether all of a file's bytes in the tar came from its place in `data`.
    /// Zeros there are either a chunk's or of no chunk at all.
    fn content(&self, node: &Node, ino: Ino) -> Result<bool, Failed> {
        let Some(extent) = self.image.data_extent(ino)? else {
            return Ok(true);
        };
        let Some(origin) = self.unpacked.origin(node) else {
            return Ok(false);
        };
        let chunks = self.dir.chunks().overlapping(extent.offset, extent.size);
        let size = |chunk| u64::from(self.dir.chunks().get(chunk).size);
        let stored: u64 = chunks.map(size).sum();
        let place = (stored > 0).then_some(extent.offset);
        Ok(origin.from_chunks == stored && origin.base == place)
    }

    /// Without those of users, which the kernel gives no meaning: skopeo 1.9
    /// does not tell all of them.
    fn xattrs(&self, node: &Node, ino: Ino) -> Result<bool, Failed> {
        let of_users = |name: &[u8]| name.starts_with(b"user.");
        let mut expected = image_xattrs(node, XattrNamespace::Trusted);
        expected.retain(|name, _| !of_users(name));
        for xattr in self.image.xattrs(ino)? {
            let xattr = xattr?;
            let name = [xattr.prefix, xattr.suffix].concat();
            if of_users(&name) {
                continue;
            }
            if expected.remove(&name) != Some(xattr.value) {
                return Ok(false);
            }
        }
        Ok(expected.is_empty())
    }
}

/// Some writers give a TOC whole seconds.
fn same_time(found: Mtime, expected: Mtime) -> bool {
    found.secs == expected.secs && (found.nanos == 0 || found.nanos == expected.nanos)
}
