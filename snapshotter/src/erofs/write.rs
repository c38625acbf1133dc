//! Writing a `meta.erofs`, front to back in one pass after planning.

use std::io;

use sluice_layer::{NodeId, NodeKind, Toc};

use crate::layer_dir::placement::Placement;

use super::dirents::Dirents;
use super::format::{
    BLOCK, CHUNK_INDEX_SIZE, CHUNK_INDEXES, COMPAT_CHECKSUM, COMPAT_MTIME, DATA_BLOCKS_MAX,
    DATA_DEVICE, DEVICE_BLOCKS, DEVICE_SLOT_OFFSET, DEVICE_SLOT_SIZE, DIRENT_SIZE, FORMAT_EXTENDED,
    INCOMPAT_CHUNKED_FILE, INCOMPAT_DEVICE_TABLE, LAYOUT_CHUNKS, LAYOUT_INLINE, LAYOUT_PLAIN,
    MAGIC, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, SUPER_OFFSET, VOLUME_NAME,
    XATTR_ENTRY_SIZE, XATTR_VALUE_MAX, crc32c, encode_device, sb,
};
use super::plan::{Content, Cursor, Plan, Shape, Spot};
use super::xattr::{Stored, XattrNamespace};
use super::{Error, xattr};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Size of the image in bytes, a multiple of the block size.
    pub bytes: u64,
    /// Number of inodes.
    pub inodes: u64,
    /// Extended attributes left out because their names are in no namespace
    /// that a Linux file system stores; unpacking the layer ignores them too.
    pub dropped_xattrs: u64,
}

/// Writes the EROFS image of `toc`, in which each regular file's content is
/// on extra device 1 where `placement` says.
///
/// The bytes are a function of the arguments. Beyond them it needs about ten
/// bytes of memory for an inode, and more only for extended attributes.
pub fn write_image<W: io::Write>(
    toc: &Toc,
    placement: &Placement,
    ns: XattrNamespace,
    out: W,
) -> Result<Summary, Error> {
    let plan = Plan::new(toc, ns)?;
    let data_blocks = u32::try_from(placement.data_size() / BLOCK)
        .ok()
        .filter(|blocks| *blocks <= DATA_BLOCKS_MAX)
        .ok_or_else(|| plan.refuse(NodeId::ROOT, "this much data"))?;

    let mut out = Output::new(out);
    write_superblock(&mut out, &plan, data_blocks);
    let mut cursor = Cursor::default();
    for (number, id) in (1_u32..).zip(&plan.order) {
        let shape = plan.shape(*id);
        let spot = cursor.place(&shape);
        write_inode(&mut out, &plan, placement, *id, number, &shape, spot)?;
        out.drain()?;
    }
    out.pad_to(plan.shared_start);
    for xattr in &plan.shared.area {
        write_xattr(&mut out, xattr);
        out.drain()?;
    }
    out.pad_to(plan.first_block * BLOCK);
    let mut cursor = Cursor::default();
    for id in &plan.order {
        let shape = plan.shape(*id);
        let spot = cursor.place(&shape);
        match &shape.content {
            Content::Directory(dirents) => {
                let mut start = 0;
                for _ in 0..spot.blocks {
                    start += write_dirents(&mut out, &plan, dirents, start);
                    out.pad_to(out.position().next_multiple_of(BLOCK));
                    out.drain()?;
                }
            }
            Content::Symlink(target) if spot.blocks > 0 => {
                out.put(target);
                out.pad_to(out.position().next_multiple_of(BLOCK));
            }
            Content::Symlink(_) | Content::File(_) | Content::None => {}
        }
    }
    let bytes = out.finish()?;
    debug_assert_eq!(bytes, u64::from(plan.blocks) * BLOCK);
    Ok(Summary {
        bytes,
        inodes: plan.order.len() as u64,
        dropped_xattrs: plan
            .order
            .iter()
            .flat_map(|id| &toc.node(*id).xattrs)
            .filter(|xattr| xattr::split_name(&xattr.name).is_none())
            .count() as u64,
    })
}

fn write_superblock<W: io::Write>(out: &mut Output<W>, plan: &Plan<'_>, data_blocks: u32) {
    let mut head = [0; DEVICE_SLOT_OFFSET + DEVICE_SLOT_SIZE];
    let mut put = |at: usize, bytes: &[u8]| {
        head[SUPER_OFFSET + at..][..bytes.len()].copy_from_slice(bytes);
    };
    put(sb::MAGIC, &MAGIC.to_le_bytes());
    put(sb::COMPAT, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(sb::BLOCK_BITS, &[BLOCK.ilog2() as u8]);
    // The root is the first inode, in the first block or the second.
    put(sb::ROOT_NID, &(plan.nid(NodeId::ROOT) as u16).to_le_bytes());
    put(sb::INODES, &(plan.order.len() as u64).to_le_bytes());
    put(sb::EPOCH, &plan.epoch.secs.to_le_bytes());
    put(sb::EPOCH_NANOS, &plan.epoch.nanos.to_le_bytes());
    put(sb::BLOCKS, &plan.blocks.to_le_bytes());
    put(sb::META_BLOCK, &0_u32.to_le_bytes());
    put(sb::XATTR_BLOCK, &xattr_block(plan).to_le_bytes());
    put(sb::VOLUME_NAME, &VOLUME_NAME);
    put(
        sb::INCOMPAT,
        &(INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE).to_le_bytes(),
    );
    put(sb::EXTRA_DEVICES, &1_u16.to_le_bytes());
    put(
        sb::DEVICE_SLOT,
        &((DEVICE_SLOT_OFFSET / DEVICE_SLOT_SIZE) as u16).to_le_bytes(),
    );
    head[DEVICE_SLOT_OFFSET + DEVICE_BLOCKS..][..4].copy_from_slice(&data_blocks.to_le_bytes());
    out.put(&head);
}

/// The block in which the shared attributes begin; they are numbered in units
/// of four bytes from its start.
fn xattr_block(plan: &Plan<'_>) -> u32 {
    // Below `Plan::blocks`, which fits.
    (plan.shared_start / BLOCK) as u32
}

fn write_inode<W: io::Write>(
    out: &mut Output<W>,
    plan: &Plan<'_>,
    placement: &Placement,
    id: NodeId,
    number: u32,
    shape: &Shape<'_>,
    spot: Spot,
) -> Result<(), Error> {
    let node = shape.node;
    let layout = match shape.content {
        Content::File(_) => LAYOUT_CHUNKS,
        _ if spot.inline => LAYOUT_INLINE,
        _ => LAYOUT_PLAIN,
    };
    let format = (layout << 1) | if shape.compact { 0 } else { FORMAT_EXTENDED };
    let kind = match &node.kind {
        NodeKind::Directory(_) => S_IFDIR,
        NodeKind::Regular(_) => S_IFREG,
        NodeKind::Symlink(_) => S_IFLNK,
        NodeKind::CharDevice { .. } => S_IFCHR,
        NodeKind::BlockDevice { .. } => S_IFBLK,
        NodeKind::Fifo => S_IFIFO,
    };
    // What i_u holds depends on the kind.
    let union = match (&node.kind, &shape.content) {
        (_, Content::File(size)) => u32::from(CHUNK_INDEXES | chunk_bits(*size)),
        (NodeKind::CharDevice { major, minor } | NodeKind::BlockDevice { major, minor }, _) => {
            encode_device(*major, *minor)
                .ok_or_else(|| plan.refuse(id, "a device number above 4095:1048575"))?
        }
        _ if spot.blocks > 0 => (plan.first_block + spot.block) as u32,
        _ => 0,
    };
    let xattr_count = shape
        .xattrs
        .count()
        .ok_or_else(|| plan.refuse(id, "more than 256 KiB of extended attributes"))?;
    if node
        .xattrs
        .iter()
        .any(|xattr| xattr.value.len() > XATTR_VALUE_MAX)
    {
        return Err(plan.refuse(id, "an extended attribute above 65535 bytes"));
    }

    out.pad_to(spot.position);
    out.put(&format.to_le_bytes());
    out.put(&xattr_count.to_le_bytes());
    out.put(&(kind | (node.mode & 0o7777)).to_le_bytes());
    if shape.compact {
        out.put(&(node.links as u16).to_le_bytes());
        out.put(&(shape.size as u32).to_le_bytes());
        out.put(&[0; 4]);
        out.put(&union.to_le_bytes());
        out.put(&number.to_le_bytes());
        out.put(&(node.uid as u16).to_le_bytes());
        out.put(&(node.gid as u16).to_le_bytes());
        out.put(&[0; 4]);
    } else {
        out.put(&[0; 2]);
        out.put(&shape.size.to_le_bytes());
        out.put(&union.to_le_bytes());
        out.put(&number.to_le_bytes());
        out.put(&node.uid.to_le_bytes());
        out.put(&node.gid.to_le_bytes());
        out.put(&node.mtime.secs.to_le_bytes());
        out.put(&node.mtime.nanos.to_le_bytes());
        out.put(&node.links.to_le_bytes());
        out.put(&[0; 16]);
    }

    if xattr_count > 0 {
        out.put(&[0; 4]);
        // At most 255: `Shared::body` sees to it.
        out.put(&[shape.xattrs.shared.len() as u8]);
        out.put(&[0; 7]);
        let base = plan.shared_start % BLOCK;
        for offset in &shape.xattrs.shared {
            let number = u32::try_from((base + offset) / XATTR_ENTRY_SIZE)
                .map_err(|_| plan.refuse(id, "this much of extended attributes"))?;
            out.put(&number.to_le_bytes());
        }
        for xattr in &shape.xattrs.own {
            write_xattr(out, xattr);
        }
    }

    match &shape.content {
        Content::File(_) => {
            out.pad_to(out.position().next_multiple_of(CHUNK_INDEX_SIZE));
            out.put(&[0; 2]);
            out.put(&DATA_DEVICE.to_le_bytes());
            // Below the data's number of blocks, which fits.
            out.put(&((placement.start(id) / BLOCK) as u32).to_le_bytes());
        }
        Content::Directory(dirents) if spot.inline => {
            let mut start = 0;
            for _ in 0..spot.blocks {
                start += dirents.block(start).0;
            }
            write_dirents(out, plan, dirents, start);
        }
        Content::Symlink(target) if spot.inline => out.put(target),
        Content::Directory(_) | Content::Symlink(_) | Content::None => {}
    }
    Ok(())
}

/// One chunk covers the file: log2 of its size in blocks.
fn chunk_bits(size: u64) -> u16 {
    // At most 31 for a file that fits in the data.
    size.div_ceil(BLOCK).next_power_of_two().ilog2() as u16
}

fn write_xattr<W: io::Write>(out: &mut Output<W>, xattr: &Stored<'_>) {
    // Names have at most 255 bytes, and values were measured.
    out.put(&[xattr.name.len() as u8, xattr.prefix]);
    out.put(&(xattr.value.len() as u16).to_le_bytes());
    out.put(xattr.name);
    out.put(xattr.value);
    out.pad_to(out.position().next_multiple_of(XATTR_ENTRY_SIZE));
}

/// Writes one block's entries from `start` on; returns how many.
fn write_dirents<W: io::Write>(
    out: &mut Output<W>,
    plan: &Plan<'_>,
    dirents: &Dirents<'_>,
    start: usize,
) -> usize {
    let (count, _) = dirents.block(start);
    let mut name_offset = count * DIRENT_SIZE;
    for index in start..start + count {
        let (name, id) = dirents.get(index);
        let kind = match plan.toc.node(id).kind {
            NodeKind::Regular(_) => 1,
            NodeKind::Directory(_) => 2,
            NodeKind::CharDevice { .. } => 3,
            NodeKind::BlockDevice { .. } => 4,
            NodeKind::Fifo => 5,
            NodeKind::Symlink(_) => 7,
        };
        out.put(&u64::from(plan.nid(id)).to_le_bytes());
        // A block's worth at most.
        out.put(&(name_offset as u16).to_le_bytes());
        out.put(&[kind, 0]);
        name_offset += name.len();
    }
    for index in start..start + count {
        out.put(dirents.get(index).0);
    }
    count
}

/// Gathers small writes, and completes the superblock's checksum when the
/// first block is whole.
struct Output<W> {
    out: W,
    buffer: Vec<u8>,
    written: u64,
}

impl<W: io::Write> Output<W> {
    const BUFFER: usize = 256 * 1024;

    fn new(out: W) -> Self {
        Self {
            out,
            buffer: Vec::with_capacity(Self::BUFFER),
            written: 0,
        }
    }

    fn position(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    fn put(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Zeros up to `position`, which is at most a block away.
    fn pad_to(&mut self, position: u64) {
        let missing = position.saturating_sub(self.position()) as usize;
        self.buffer.resize(self.buffer.len() + missing, 0);
    }

    /// Passes the gathered bytes on when they are many.
    fn drain(&mut self) -> Result<(), Error> {
        if self.buffer.len() >= Self::BUFFER / 2 {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.written == 0 {
            let sum = crc32c(&self.buffer[SUPER_OFFSET..BLOCK as usize]);
            self.buffer[SUPER_OFFSET + sb::CHECKSUM..][..4].copy_from_slice(&sum.to_le_bytes());
        }
        self.out.write_all(&self.buffer).map_err(Error::Write)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<u64, Error> {
        self.flush()?;
        self.out.flush().map_err(Error::Write)?;
        Ok(self.written)
    }
}
