//! The TOC's entries while a layer is written, and their JSON.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::{Serialize, Serializer};
use sluice_oci::Digest;

use super::header::{Header, Kind};
use super::time::rfc3339;
use super::{WriteError, clean_name};
use crate::{StartChunks, StartReads};

/// Where a chunk lies in its file. Its place in the blob and its digest come
/// with its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkPart {
    pub(super) file_offset: u64,
    pub(super) size: u64,
}

/// A chunk as it stands in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlacedChunk {
    pub(super) offset: u64,
    pub(super) digest: Digest,
}

/// Which chunks of the prioritized files a start reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReadAtStart {
    pub(super) chunks: StartChunks,
    /// The same by the numbers of their [`PlacedChunk`]s.
    pub(super) numbers: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Entry {
    header: EntryHeader,
    chunks: Range<usize>,
    /// Digest of a file of several chunks; a single chunk's own otherwise.
    digest: Option<Digest>,
    /// For a hard link, the entry that it finally names.
    target: Option<usize>,
}

/// The part of a [`Header`] that the TOC holds, checked to be UTF-8.
#[derive(Debug, Clone)]
struct EntryHeader {
    name: Box<str>,
    kind: Kind,
    size: u64,
    mtime: super::header::Time,
    atime: Option<super::header::Time>,
    ctime: Option<super::header::Time>,
    link: Box<str>,
    mode: i64,
    uid: i64,
    gid: i64,
    user: Box<str>,
    group: Box<str>,
    dev_major: i64,
    dev_minor: i64,
    xattrs: BTreeMap<Box<str>, Box<[u8]>>,
}

/// All entries of a layer, in the order of the tar.
#[derive(Debug, Default)]
pub(super) struct Entries {
    entries: Vec<Entry>,
    /// Entries by clean name, the last of each.
    live: HashMap<Box<str>, usize>,
    chunks: Vec<ChunkPart>,
}

impl Entries {
    /// Adds an entry. A later one of the same name takes the earlier one's
    /// place, as it does for whoever unpacks the tar.
    pub(super) fn add(&mut self, header: Header) -> Result<(), WriteError> {
        let mut header = EntryHeader::new(header)?;
        let name: Box<str> = clean_name(&header.name).into();
        let target = match header.kind {
            Kind::HardLink => {
                let target = self.live.get(clean_name(&header.link).as_str());
                let target = *target.ok_or_else(|| {
                    WriteError::unsupported(format!(
                        "'{}' is a hard link to '{}', which is not in the layer",
                        header.name, header.link
                    ))
                })?;
                Some(self.entries[target].target.unwrap_or(target))
            }
            _ => None,
        };
        let index = self.entries.len();
        if let Some(before) = self.live.insert(name.clone(), index) {
            let before = &self.entries[before].header;
            match (before.kind, header.kind) {
                // Unpacking goes on in the directory that is there.
                (Kind::Directory, Kind::Directory) => {
                    for (name, value) in &before.xattrs {
                        header
                            .xattrs
                            .entry(name.clone())
                            .or_insert_with(|| value.clone());
                    }
                }
                (Kind::Directory, _) => {
                    let inside = format!("{name}/");
                    self.live.retain(|name, _| !name.starts_with(&inside));
                }
                _ => {}
            }
        }
        let end = self.chunks.len();
        self.entries.push(Entry {
            header,
            chunks: end..end,
            digest: None,
            target,
        });
        Ok(())
    }

    /// Adds a chunk to the last entry.
    pub(super) fn chunk(&mut self, part: ChunkPart) {
        self.chunks.push(part);
        if let Some(entry) = self.entries.last_mut() {
            entry.chunks.end = self.chunks.len();
        }
    }

    /// Which of the chunks so far are read. Those of entries that later ones
    /// have replaced do not count: the TOC does not have them.
    pub(super) fn read_at_start(&self, reads: &StartReads) -> ReadAtStart {
        let mut live: Vec<(&str, usize)> = self.live.iter().map(|(n, &i)| (&**n, i)).collect();
        live.sort_unstable_by_key(|&(_, index)| index);
        let mut numbers = Vec::new();
        let chunks = live.iter().flat_map(|&(name, index)| {
            let chunks = self.entries[index].chunks.clone();
            chunks.map(move |chunk| (name, chunk))
        });
        let chunks = chunks.map(|(name, chunk)| {
            let part = self.chunks[chunk];
            let is_read = reads.reads(name, &(part.file_offset..part.file_offset + part.size));
            numbers.extend(is_read.then_some(chunk));
            is_read
        });
        let chunks = chunks.collect();
        ReadAtStart { chunks, numbers }
    }

    /// States the digest of the last entry, a file of several chunks or none.
    pub(super) fn digest(&mut self, digest: Digest) {
        if let Some(entry) = self.entries.last_mut() {
            entry.digest = Some(digest);
        }
    }

    /// Removes what later entries replaced. A file that lives on under the
    /// name of a hard link moves there.
    fn settle(&mut self) -> Vec<usize> {
        let mut kept: Vec<usize> = self.live.values().copied().collect();
        kept.sort_unstable();
        let alive: HashSet<usize> = kept.iter().copied().collect();
        let mut heirs: HashMap<usize, usize> = HashMap::new();
        for &index in &kept {
            let Some(target) = self.entries[index].target else {
                continue;
            };
            if alive.contains(&target) {
                let name = self.entries[target].header.name.clone();
                self.entries[index].header.link = name;
            } else if let Some(heir) = heirs.get(&target) {
                let name = self.entries[*heir].header.name.clone();
                self.entries[index].header.link = name;
            } else {
                heirs.insert(target, index);
                let mut heir = self.entries[target].clone();
                heir.header.inherit(&self.entries[index].header);
                self.entries[index] = heir;
            }
        }
        kept
    }

    /// The TOC's JSON.
    pub(super) fn json(
        mut self,
        placed: &[PlacedChunk],
        tar_split: Option<Digest>,
    ) -> Result<Vec<u8>, WriteError> {
        let kept = self.settle();
        let mut users = HashMap::new();
        let mut groups = HashMap::new();
        let mut list = Vec::with_capacity(kept.len());
        for index in kept {
            let Entry {
                header,
                chunks,
                digest,
                ..
            } = &self.entries[index];
            let several = chunks.len() > 1;
            let place = |chunk: usize| {
                let part = self.chunks[chunk];
                let placed = placed.get(chunk).ok_or_else(|| {
                    WriteError::Compression("a unit was never placed in the blob".to_owned())
                })?;
                Ok::<_, WriteError>((part, *placed))
            };
            let mut entry = JsonEntry::new(header, *digest);
            entry.user_name = first_of(&mut users, header.uid, &header.user);
            entry.group_name = first_of(&mut groups, header.gid, &header.group);
            if !chunks.is_empty() {
                let (part, placed) = place(chunks.start)?;
                entry.offset = placed.offset;
                entry.chunk_size = if several { part.size } else { 0 };
                entry.chunk_digest = Some(placed.digest);
                entry.digest = digest.or(Some(placed.digest));
            }
            list.push(entry);
            for chunk in chunks.clone().skip(1) {
                let (part, placed) = place(chunk)?;
                list.push(JsonEntry {
                    name: &header.name,
                    kind: "chunk",
                    offset: placed.offset,
                    chunk_offset: part.file_offset,
                    chunk_size: part.size,
                    chunk_digest: Some(placed.digest),
                    ..JsonEntry::default()
                });
            }
        }
        serde_json::to_vec(&Json {
            version: 1,
            entries: list,
            tar_split_digest: tar_split,
        })
        .map_err(|cause| WriteError::Compression(cause.to_string()))
    }
}

/// A name is written only where it first goes with its number.
fn first_of<'a>(seen: &mut HashMap<i64, &'a str>, id: i64, name: &'a str) -> &'a str {
    if name.is_empty() || seen.insert(id, name) == Some(name) {
        return "";
    }
    name
}

impl EntryHeader {
    fn new(header: Header) -> Result<Self, WriteError> {
        let shown = header.name.escape_ascii().to_string();
        let text = |bytes: Vec<u8>, what: &str| match String::from_utf8(bytes) {
            Ok(text) => Ok(text.into_boxed_str()),
            Err(_) => Err(WriteError::unsupported(format!(
                "the {what} of '{shown}' is not UTF-8, which a TOC cannot hold"
            ))),
        };
        let xattrs = header
            .xattrs
            .into_iter()
            .map(|(name, value)| Ok((text(name, "attribute name")?, value.into_boxed_slice())))
            .collect::<Result<_, WriteError>>()?;
        Ok(Self {
            name: text(header.name, "name")?,
            kind: header.kind,
            size: match header.kind {
                Kind::Regular => header.size,
                _ => 0,
            },
            mtime: header.mtime,
            atime: header.atime,
            ctime: header.ctime,
            link: match header.kind {
                Kind::HardLink | Kind::Symlink => text(header.link, "target")?,
                _ => Box::default(),
            },
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            user: text(header.user, "user")?,
            group: text(header.group, "group")?,
            dev_major: header.dev_major,
            dev_minor: header.dev_minor,
            xattrs,
        })
    }
}

impl EntryHeader {
    /// As unpacking an entry over a directory leaves the attributes alone
    /// that it does not set.
    fn keep_xattrs_of(&mut self, before: &Self) {
        for (name, value) in &before.xattrs {
            self.xattrs
                .entry(name.clone())
                .or_insert_with(|| value.clone());
        }
    }

    /// Takes the name of a hard link to it, and what unpacking the link makes
    /// of the inode.
    fn inherit(&mut self, link: &Self) {
        let before = std::mem::replace(self, link.clone());
        self.kind = before.kind;
        self.size = before.size;
        if before.kind == Kind::Symlink {
            self.mode = before.mode;
        }
        self.dev_major = before.dev_major;
        self.dev_minor = before.dev_minor;
        self.keep_xattrs_of(&before);
        self.link = before.link;
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Json<'a> {
    version: u32,
    entries: Vec<JsonEntry<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tar_split_digest: Option<Digest>,
}

/// The fields in the order in which the format documents them.
#[derive(Serialize, Default)]
#[serde(rename_all = "camelCase")]
struct JsonEntry<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(rename = "modtime", skip_serializing_if = "Option::is_none")]
    mod_time: Option<String>,
    #[serde(rename = "accesstime", skip_serializing_if = "Option::is_none")]
    access_time: Option<String>,
    #[serde(rename = "changetime", skip_serializing_if = "Option::is_none")]
    change_time: Option<String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    link_name: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    mode: i64,
    #[serde(skip_serializing_if = "is_zero")]
    uid: i64,
    #[serde(skip_serializing_if = "is_zero")]
    gid: i64,
    #[serde(skip_serializing_if = "str::is_empty")]
    user_name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    group_name: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_major: i64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_minor: i64,
    #[serde(skip_serializing_if = "Xattrs::is_none")]
    xattrs: Xattrs<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_digest: Option<Digest>,
}

impl<'a> JsonEntry<'a> {
    fn new(header: &'a EntryHeader, digest: Option<Digest>) -> Self {
        let device = matches!(header.kind, Kind::CharDevice | Kind::BlockDevice);
        Self {
            name: &header.name,
            kind: match header.kind {
                Kind::Regular => "reg",
                Kind::HardLink => "hardlink",
                Kind::Symlink => "symlink",
                Kind::CharDevice => "char",
                Kind::BlockDevice => "block",
                Kind::Directory | Kind::Global => "dir",
                Kind::Fifo => "fifo",
            },
            size: header.size,
            mod_time: rfc3339(header.mtime),
            access_time: header.atime.and_then(rfc3339),
            change_time: header.ctime.and_then(rfc3339),
            link_name: &header.link,
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            dev_major: if device { header.dev_major } else { 0 },
            dev_minor: if device { header.dev_minor } else { 0 },
            xattrs: Xattrs(Some(&header.xattrs).filter(|x| !x.is_empty())),
            digest,
            ..Self::default()
        }
    }
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Attributes, their values in base64.
#[derive(Default)]
struct Xattrs<'a>(Option<&'a BTreeMap<Box<str>, Box<[u8]>>>);

impl Xattrs<'_> {
    fn is_none(&self) -> bool {
        self.0.is_none()
    }
}

impl Serialize for Xattrs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pairs = self.0.into_iter().flatten();
        serializer.collect_map(pairs.map(|(name, value)| (name, BASE64_STANDARD.encode(value))))
    }
}
