//! The on-disk constants of EROFS that this program uses, and its checksum.
//! All integers are little-endian.

/// The only block size written and read.
pub(super) const BLOCK: u64 = crate::layer_dir::placement::BLOCK_SIZE;

/// Where the superblock is.
pub(super) const SUPER_OFFSET: usize = 1024;
pub(super) const SUPER_SIZE: usize = 128;
pub(super) const MAGIC: u32 = 0xE0F5_E1E2;

/// Offsets within the superblock.
pub(super) mod sb {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const CHECKSUM: usize = 4;
    pub(in super::super) const COMPAT: usize = 8;
    pub(in super::super) const BLOCK_BITS: usize = 12;
    pub(in super::super) const ROOT_NID: usize = 14;
    pub(in super::super) const INODES: usize = 16;
    pub(in super::super) const EPOCH: usize = 24;
    pub(in super::super) const EPOCH_NANOS: usize = 32;
    pub(in super::super) const BLOCKS: usize = 36;
    pub(in super::super) const META_BLOCK: usize = 40;
    pub(in super::super) const XATTR_BLOCK: usize = 44;
    pub(in super::super) const VOLUME_NAME: usize = 64;
    pub(in super::super) const INCOMPAT: usize = 80;
    pub(in super::super) const EXTRA_DEVICES: usize = 86;
    pub(in super::super) const DEVICE_SLOT: usize = 88;
}

/// Names the program and the version of what it writes, so that images of
/// another version are made again rather than misread.
pub(super) const VOLUME_NAME: [u8; 16] = *b"sluice-1\0\0\0\0\0\0\0\0";

pub(super) const COMPAT_CHECKSUM: u32 = 0x1;
pub(super) const COMPAT_MTIME: u32 = 0x2;
pub(super) const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
pub(super) const INCOMPAT_DEVICE_TABLE: u32 = 0x8;

/// The one device slot follows the superblock.
pub(super) const DEVICE_SLOT_SIZE: usize = 128;
pub(super) const DEVICE_SLOT_OFFSET: usize = SUPER_OFFSET + SUPER_SIZE;
/// Offset of the block count within the slot.
pub(super) const DEVICE_BLOCKS: usize = 64;
/// Extra device 1 is the layer's `data`.
pub(super) const DATA_DEVICE: u16 = 1;

/// One chunk of 2^31 blocks, 8 TiB, is the largest there is.
pub(super) const DATA_BLOCKS_MAX: u32 = 1 << 31;

/// An inode's number is its offset over this.
pub(super) const NID_UNIT: u64 = 32;
/// The first inode, the root, follows the device slot.
pub(super) const FIRST_INODE: u64 = (DEVICE_SLOT_OFFSET + DEVICE_SLOT_SIZE) as u64;

pub(super) const COMPACT_SIZE: u64 = 32;
pub(super) const EXTENDED_SIZE: u64 = 64;

/// Bit 0 of `i_format`.
pub(super) const FORMAT_EXTENDED: u16 = 1;
/// Data layouts, in bits 1 to 3 of `i_format`.
pub(super) const LAYOUT_PLAIN: u16 = 0;
pub(super) const LAYOUT_INLINE: u16 = 2;
pub(super) const LAYOUT_CHUNKS: u16 = 4;

/// Chunk format: 8-byte indexes; the low five bits are log2(chunk / block).
pub(super) const CHUNK_INDEXES: u16 = 0x20;
pub(super) const CHUNK_BITS_MASK: u16 = 0x1f;
pub(super) const CHUNK_INDEX_SIZE: u64 = 8;

pub(super) const XATTR_HEADER_SIZE: u64 = 12;
pub(super) const XATTR_ENTRY_SIZE: u64 = 4;

pub(super) const XATTR_VALUE_MAX: usize = u16::MAX as usize;

pub(super) const DIRENT_SIZE: usize = 12;
pub(super) const NAME_MAX: usize = 255;

pub(super) const S_IFMT: u16 = 0o170_000;
pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;

const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (if crc & 1 == 1 { 0x82f6_3b78 } else { 0 });
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// CRC-32C seeded with all ones and, as EROFS has it, not inverted at the
/// end.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (crc >> 8) ^ CRC32C[((crc ^ u32::from(*byte)) & 0xff) as usize]
    })
}

/// The kernel's 32-bit device number: 12 bits of major, 20 of minor.
pub(super) fn encode_device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// The reverse of [`encode_device`]: (major, minor).
pub(super) fn decode_device(device: u32) -> (u32, u32) {
    (
        (device & 0xf_ff00) >> 8,
        (device & 0xff) | ((device >> 12) & 0xf_ff00),
    )
}
