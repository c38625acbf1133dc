//! The chunk table: from an offset in `data` to the range of the blob that
//! holds it, and from a unit of the blob to its chunks.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::RangeInclusive;
use std::path::Path;

use memmap2::{Advice, Mmap};
use sluice_layer::{Format, TocTrust, Unit};
use sluice_oci::{Digest, Reference};

use super::Identity;
use super::error::{Error, Problem};
use super::whole::LastByte;

pub(super) const MAGIC: &[u8; 8] = b"SLCHUNKS";
pub(super) const VERSION: u32 = 1;
/// Bytes of the header, the reference's text included.
pub(super) const HEADER: usize = 4096;
/// Where the reference's text begins, and how long it can be.
const REFERENCE_AT: usize = 256;
pub(super) const REFERENCE_MAX: usize = HEADER - REFERENCE_AT - 4;
/// Bytes of one record.
pub(super) const RECORD: usize = 64;

const FLAG_PREFETCH: u32 = 1;
const FLAG_TRUST_COMPRESSED: u32 = 2;
const FLAG_META_SUMMED: u32 = 4;

/// How far the chunks of one file are searched in either direction.
const FILE_REACH: u32 = 16 << 10;

/// A record's flag: the chunk is its file's first.
const STARTS_FILE: u32 = 1;
/// Where a record's flags hold the file's [`Kin`].
const FAMILY_SHIFT: u32 = 1;
const NAME_SHIFT: u32 = 17;

/// A chunk's position in the table, in the order of `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub(super) u32);

impl ChunkId {
    /// The chunk at a position, which may be beyond the table's end.
    pub fn at(position: u32) -> Self {
        Self(position)
    }

    /// The position.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One chunk of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Where its first byte is in `data`.
    pub data_offset: u64,
    /// Its size, uncompressed.
    pub size: u32,
    /// The unit that it is decoded from.
    pub unit: Unit,
    /// Where it begins in the unit's uncompressed bytes.
    pub inner_offset: u32,
    /// Whether it is its file's first chunk.
    pub starts_file: bool,
    /// Of a file's first chunk, what the file has in common with others.
    pub kin: Kin,
    /// Digest of its uncompressed bytes.
    pub digest: Digest,
}

/// What tells that files are alike, in a few bits: files that have the same are
/// alike as a rule. 0 is like nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kin {
    /// The same directory and the same kind of name.
    pub family: u16,
    /// The same name, in whatever directory. 15 bits.
    pub name: u16,
}

impl Kin {
    /// Of a file in the directory with that number.
    pub(super) fn new(directory: u32, name: &[u8]) -> Self {
        let mut family = libdeflater::Crc::new();
        family.update(&directory.to_le_bytes());
        family.update(kind_of(name));
        let fold = |sum: u32, bits: u32| (((sum >> 16) ^ sum) & ((1 << bits) - 1)).max(1) as u16;
        Self {
            family: fold(family.sum(), 16),
            name: fold(libdeflater::crc32(name), 15),
        }
    }

    fn flags(self) -> u32 {
        u32::from(self.family) << FAMILY_SHIFT | u32::from(self.name) << NAME_SHIFT
    }

    fn of_flags(flags: u32) -> Self {
        Self {
            family: (flags >> FAMILY_SHIFT) as u16,
            name: (flags >> NAME_SHIFT) as u16,
        }
    }
}

/// What follows a name's last dot, but for the numbers of a library's version.
fn kind_of(name: &[u8]) -> &[u8] {
    let mut rest = name;
    while let Some(dot) = rest.iter().rposition(|&byte| byte == b'.') {
        let (before, after) = (&rest[..dot], &rest[dot + 1..]);
        if !after.iter().all(u8::is_ascii_digit) {
            return after;
        }
        rest = before;
    }
    b""
}

impl Record {
    pub(super) fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[0..8].copy_from_slice(&self.data_offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.unit.offset.to_le_bytes());
        // Creation refuses larger units.
        let unit_size = u32::try_from(self.unit.size).unwrap_or(u32::MAX);
        bytes[16..20].copy_from_slice(&unit_size.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.inner_offset.to_le_bytes());
        let flags = match self.starts_file {
            true => STARTS_FILE | self.kin.flags(),
            false => 0,
        };
        bytes[28..32].copy_from_slice(&flags.to_le_bytes());
        bytes[32..64].copy_from_slice(self.digest.as_raw());
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        Self {
            data_offset: u64_at(bytes, 0),
            unit: Unit {
                offset: u64_at(bytes, 8),
                size: u64::from(u32_at(bytes, 16)),
            },
            size: u32_at(bytes, 20),
            inner_offset: u32_at(bytes, 24),
            starts_file: u32_at(bytes, 28) & STARTS_FILE != 0,
            kin: Kin::of_flags(u32_at(bytes, 28)),
            digest: digest_at(bytes, 32),
        }
    }

    /// Where its last byte ends in `data`.
    pub fn data_end(&self) -> u64 {
        self.data_offset.saturating_add(u64::from(self.size))
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or([0; 4]))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or([0; 8]))
}

fn digest_at(bytes: &[u8], at: usize) -> Digest {
    Digest::from_raw(bytes[at..at + 32].try_into().unwrap_or([0; 32]))
}

/// The table, read from its mapped file without parsing.
#[derive(Debug)]
pub struct ChunkTable {
    map: Mmap,
    last: LastByte,
    chunks: u32,
    crc: u32,
    meta: MetaSum,
}

/// What `meta.erofs` has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MetaSum {
    /// Its size in bytes.
    pub(super) size: u64,
    /// CRC-32 of it; directories that were made before it was kept have none.
    pub(super) crc: Option<u32>,
}

impl ChunkTable {
    /// Checks the file's version, size and checksums, and maps it.
    pub(super) fn open(path: &Path) -> Result<(Identity, Self), Error> {
        let failed = |e| Error::io("read", path, e);
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let len = file.metadata().map_err(failed)?.len();
        if len < HEADER as u64 {
            return Err(Error::damaged(path, "it is cut short"));
        }
        let mut header = [0; HEADER];
        (&file).read_exact(&mut header).map_err(failed)?;
        let identity = parse_header(path, &header)?;
        let chunks = u32_at(&header, 24);
        let size = HEADER as u64 + u64::from(chunks) * (RECORD as u64 + 4);
        if len != size {
            let what = format!("it has {len} bytes instead of {size}");
            return Err(Error::damaged(path, what));
        }
        // Read and not mapped for this, so that a disk's error is one, and
        // pages that no lookup needs take no memory.
        let crc = u32_at(&header, 28);
        if checksum(&file).map_err(failed)? != crc {
            return Err(Error::damaged(path, "its checksum does not match"));
        }
        // SAFETY: the file is written once, before its directory gets its
        // name, and never changed after; the daemon's directories are not
        // writable for anyone else.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
        if map.len() as u64 != size {
            return Err(Error::damaged(path, "it changes while it is opened"));
        }
        // Lookups jump about; reading around them would only take memory.
        let _ = map.advise(Advice::Random);
        let table = Self {
            last: LastByte::of(&map),
            map,
            chunks,
            crc,
            meta: MetaSum {
                size: u64_at(&header, 64),
                crc: (u32_at(&header, 20) & FLAG_META_SUMMED != 0).then(|| u32_at(&header, 180)),
            },
        };
        Ok((identity, table))
    }

    /// Whether nobody has cut the file short so far.
    pub(super) fn is_whole(&self) -> bool {
        self.last.is_in(&self.map)
    }

    /// Whether `other` describes the same chunks.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.chunks, self.crc, self.meta) == (other.chunks, other.crc, other.meta)
    }

    /// How many chunks there are. Chunks of zeros are not among them: they are
    /// holes in `data`.
    pub fn len(&self) -> u32 {
        self.chunks
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks == 0
    }

    pub(super) fn meta(&self) -> MetaSum {
        self.meta
    }

    /// One chunk.
    pub fn get(&self, chunk: ChunkId) -> Record {
        let at = HEADER + chunk.index() * RECORD;
        Record::decode(&self.map[at..at + RECORD])
    }

    fn data_offset(&self, index: u32) -> u64 {
        u64_at(&self.map, HEADER + index as usize * RECORD)
    }

    fn by_unit(&self, position: u32) -> ChunkId {
        let at = HEADER + self.chunks as usize * RECORD + position as usize * 4;
        ChunkId(u32_at(&self.map, at).min(self.chunks.saturating_sub(1)))
    }

    /// The chunks that overlap `offset..offset + len` of `data`, in order.
    pub fn overlapping(&self, offset: u64, len: u64) -> impl Iterator<Item = ChunkId> + use<'_> {
        let end = offset.saturating_add(len);
        let after = partition(self.chunks, |index| self.data_offset(index) <= offset);
        let first = match after.checked_sub(1) {
            Some(before) if self.get(ChunkId(before)).data_end() > offset => before,
            _ => after,
        };
        (first..self.chunks)
            .take_while(move |&index| self.data_offset(index) < end)
            .map(ChunkId)
    }

    /// Of a file's first chunk, what the file has in common with others. Cheaper
    /// than the whole record.
    pub fn kin(&self, chunk: ChunkId) -> Option<Kin> {
        let flags = u32_at(&self.map, HEADER + chunk.index() * RECORD + 28);
        (flags & STARTS_FILE != 0).then(|| Kin::of_flags(flags))
    }

    /// The chunks of the file that `chunk` belongs to; of a very large file,
    /// only those near it.
    pub fn file_of(&self, chunk: ChunkId) -> RangeInclusive<ChunkId> {
        let starts = |index: u32| self.kin(ChunkId(index)).is_some();
        let lowest = chunk.0.saturating_sub(FILE_REACH);
        let highest = chunk.0.saturating_add(FILE_REACH).min(self.chunks - 1);
        let mut first = chunk.0;
        while first > lowest && !starts(first) {
            first -= 1;
        }
        let mut last = chunk.0;
        while last < highest && !starts(last + 1) {
            last += 1;
        }
        ChunkId(first)..=ChunkId(last)
    }

    /// The chunks after this one, in the order of `data`, which is that of
    /// files in the blob.
    pub fn after(&self, chunk: ChunkId) -> impl Iterator<Item = ChunkId> + use<> {
        (chunk.0 + 1..self.chunks).map(ChunkId)
    }

    /// The chunks before this one, the nearest first.
    pub fn before(&self, chunk: ChunkId) -> impl Iterator<Item = ChunkId> + use<> {
        (0..chunk.0).rev().map(ChunkId)
    }

    /// The chunks of the unit that begins at `unit_offset` of the blob, by
    /// their offset in it.
    pub fn of_unit(&self, unit_offset: u64) -> impl Iterator<Item = ChunkId> + use<'_> {
        let first = partition(self.chunks, |position| {
            self.get(self.by_unit(position)).unit.offset < unit_offset
        });
        (first..self.chunks)
            .map(|position| self.by_unit(position))
            .take_while(move |&chunk| self.get(chunk).unit.offset == unit_offset)
    }

    /// The units of the blob that begin at or after `blob_offset`, in order.
    pub fn units_from(&self, blob_offset: u64) -> impl Iterator<Item = Unit> + use<'_> {
        let first = partition(self.chunks, |position| {
            self.get(self.by_unit(position)).unit.offset < blob_offset
        });
        let mut last = None;
        (first..self.chunks)
            .map(|position| self.get(self.by_unit(position)).unit)
            .filter(move |unit| last.replace(unit.offset) != Some(unit.offset))
    }
}

/// Reads the digests of all chunks, in the order of the table. Read and not
/// mapped, for the same reason as the checksum.
pub(super) fn digests(path: &Path, mut each: impl FnMut(ChunkId, Digest)) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut header = [0; HEADER];
    file.read_exact(&mut header)?;
    let mut file = BufReader::with_capacity(64 << 10, file);
    let mut record = [0; RECORD];
    for chunk in 0..u32_at(&header, 24) {
        file.read_exact(&mut record)?;
        each(ChunkId(chunk), digest_at(&record, 32));
    }
    Ok(())
}

/// CRC-32 of the rest of the file.
pub(super) fn checksum(mut file: &File) -> io::Result<u32> {
    let mut crc = libdeflater::Crc::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(crc.sum()),
            len => crc.update(&buffer[..len]),
        }
    }
}

/// The first of `0..len` for which `before` is false.
fn partition(len: u32, before: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// Reads the header alone.
pub(super) fn identify(path: &Path) -> Result<Identity, Error> {
    parse_header(path, &header(path)?)
}

/// The header's bytes, unchecked.
pub(super) fn header(path: &Path) -> Result<[u8; HEADER], Error> {
    let mut header = [0; HEADER];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut header))
        .map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::damaged(path, "it is cut short"),
            _ => Error::io("read", path, e),
        })?;
    Ok(header)
}

pub(super) struct HeaderFields<'a> {
    pub(super) identity: &'a Identity,
    pub(super) chunks: u32,
    pub(super) body_crc: u32,
    pub(super) meta_size: u64,
    pub(super) meta_crc: u32,
}

pub(super) fn encode_header(fields: &HeaderFields<'_>, reference: &str) -> Vec<u8> {
    let identity = fields.identity;
    let (trust_flag, trust) = match identity.trust {
        TocTrust::Uncompressed(digest) => (0, digest),
        TocTrust::Compressed(digest) => (FLAG_TRUST_COMPRESSED, digest),
    };
    let prefetch_flag = identity.prefetch_end.map_or(0, |_| FLAG_PREFETCH);
    let format: u32 = match identity.format {
        Format::Estargz => 1,
        Format::ZstdChunked => 2,
    };
    let mut header = vec![0; HEADER];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(12, &(HEADER as u32).to_le_bytes());
    put(16, &format.to_le_bytes());
    let flags = prefetch_flag | trust_flag | FLAG_META_SUMMED;
    put(20, &flags.to_le_bytes());
    put(24, &fields.chunks.to_le_bytes());
    put(28, &fields.body_crc.to_le_bytes());
    put(32, &identity.number.to_le_bytes());
    put(40, &identity.blob_size.to_le_bytes());
    put(48, &identity.data_size.to_le_bytes());
    put(56, &identity.toc_offset.to_le_bytes());
    put(64, &fields.meta_size.to_le_bytes());
    put(72, &identity.prefetch_end.unwrap_or(0).to_le_bytes());
    put(80, identity.digest.as_raw());
    put(112, trust.as_raw());
    put(144, identity.compressed_toc.as_raw());
    put(176, &(reference.len() as u32).to_le_bytes());
    put(180, &fields.meta_crc.to_le_bytes());
    put(REFERENCE_AT, reference.as_bytes());
    let crc = libdeflater::crc32(&header[..HEADER - 4]);
    header[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
    header
}

fn parse_header(path: &Path, header: &[u8]) -> Result<Identity, Error> {
    let damaged = |what: &str| Error::damaged(path, what);
    if header[..8] != MAGIC[..] {
        return Err(damaged("it does not begin as a chunk table does"));
    }
    let version = u32_at(header, 8);
    if version > VERSION {
        return Err(Error::new(path, Problem::Newer(version)));
    }
    if version != VERSION || libdeflater::crc32(&header[..HEADER - 4]) != u32_at(header, HEADER - 4)
    {
        return Err(damaged("its header's checksum does not match"));
    }
    let flags = u32_at(header, 20);
    let trusted = digest_at(header, 112);
    let length = (u32_at(header, 176) as usize).min(REFERENCE_MAX);
    let reference = std::str::from_utf8(&header[REFERENCE_AT..REFERENCE_AT + length])
        .ok()
        .and_then(|text| text.parse::<Reference>().ok())
        .ok_or_else(|| damaged("its image reference is none"))?;
    Ok(Identity {
        digest: digest_at(header, 80),
        blob_size: u64_at(header, 40),
        format: match u32_at(header, 16) {
            1 => Format::Estargz,
            2 => Format::ZstdChunked,
            _ => return Err(damaged("its layer format is unknown")),
        },
        trust: if flags & FLAG_TRUST_COMPRESSED == 0 {
            TocTrust::Uncompressed(trusted)
        } else {
            TocTrust::Compressed(trusted)
        },
        compressed_toc: digest_at(header, 144),
        reference,
        number: u64_at(header, 32),
        toc_offset: u64_at(header, 56),
        prefetch_end: (flags & FLAG_PREFETCH != 0).then(|| u64_at(header, 72)),
        data_size: u64_at(header, 48),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alike_is_of_the_same_kin() {
        let kin = |directory, name: &str| Kin::new(directory, name.as_bytes());
        let family = |directory, name| kin(directory, name).family;
        assert_eq!(family(7, "a.pyc"), family(7, "__init__.cpython-311.pyc"));
        assert_ne!(family(7, "a.pyc"), family(8, "a.pyc"));
        assert_ne!(family(7, "a.pyc"), family(7, "a.py"));
        assert_eq!(family(7, "libc.so.6"), family(7, "libz.so.1.2.13"));
        assert_eq!(family(7, "README"), family(7, "1.2"));
        assert_eq!(kin(7, "package.json").name, kin(9, "package.json").name);
        assert_ne!(kin(7, "package.json").name, kin(7, "index.js").name);
        for number in 0..2000 {
            let kin = kin(number, &number.to_string());
            assert!(kin.family > 0 && (1..1 << 15).contains(&kin.name));
            assert_eq!(Kin::of_flags(STARTS_FILE | kin.flags()), kin);
        }
    }
}
