//! What a tar likely has between the contents of its files, made up from a TOC
//! and one header of the tar. eStargz layers keep no record of it as
//! zstd:chunked layers do.
//!
//! It is a guess: whoever puts a tar together with it compares the digest of
//! the whole.

use std::collections::HashMap;
use std::io::{self, BufReader, Read};
use std::ops::Range;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::tar_split::TarPart;
use crate::toc::{TocError, for_each_entry, parse_time, size_in_tar};
use crate::write::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK};

const BLOCK: usize = 512;
const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const FLAG: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..262;
const USER: Range<usize> = 265..297;
const GROUP: Range<usize> = 297..329;
const PREFIX: Range<usize> = 345..BLOCK;

/// What the converter has added.
const LANDMARKS: [&str; 2] = [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK];

/// How the writer of a tar fills a header block, known from one of a file.
#[derive(Debug, Clone)]
pub struct HeaderStyle([u8; BLOCK]);

/// An entry of the TOC, as far as its header shows it.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Entry {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    size: u64,
    modtime: String,
    accesstime: Option<IgnoredAny>,
    changetime: Option<IgnoredAny>,
    link_name: String,
    mode: u64,
    uid: u64,
    gid: u64,
    user_name: String,
    group_name: String,
    xattrs: Option<IgnoredAny>,
}

impl HeaderStyle {
    /// From what a tar has after a file's content, if that holds the header of
    /// another file. That of a landmark is of another writer.
    pub fn of(rest: &[u8]) -> Option<Self> {
        let padding = rest.len() % BLOCK;
        let (blocks, _) = rest.get(padding..)?.as_chunks::<BLOCK>();
        let is_plain = |block: &&[u8; BLOCK]| {
            let mut same = **block;
            let name = block[NAME].split(|byte| *byte == 0).next();
            let of_source = !LANDMARKS.iter().any(|mark| name == Some(mark.as_bytes()));
            of_source
                && matches!(block[FLAG], b'0' | 0)
                && block[MAGIC] == *b"ustar"
                && block[PREFIX].iter().all(|byte| *byte == 0)
                && put_checksum(&mut same).is_some()
                && same == **block
        };
        blocks.iter().find(is_plain).copied().map(Self)
    }

    /// The header of an entry; none where it takes more than a plain block.
    fn header(&self, entry: &Entry, user: &str, group: &str) -> Option<[u8; BLOCK]> {
        if entry.xattrs.is_some() || entry.accesstime.is_some() || entry.changetime.is_some() {
            return None;
        }
        let seconds = match entry.modtime.as_str() {
            "" => 0,
            // One that is 0 then is not what it says.
            text => match parse_time(text.as_bytes())? {
                time if time.nanos == 0 && time.secs > 0 => time.secs.cast_unsigned(),
                _ => return None,
            },
        };
        let mut block = self.0;
        block[FLAG] = match entry.kind.as_str() {
            "reg" => block[FLAG],
            "hardlink" => b'1',
            "symlink" => b'2',
            "dir" => b'5',
            "fifo" => b'6',
            _ => return None,
        };
        put_text(&mut block[NAME], &entry.name)?;
        put_text(&mut block[LINK], &entry.link_name)?;
        put_text(&mut block[USER], user)?;
        put_text(&mut block[GROUP], group)?;
        put_number(&mut block[MODE], entry.mode)?;
        put_number(&mut block[UID], entry.uid)?;
        put_number(&mut block[GID], entry.gid)?;
        put_number(&mut block[SIZE], entry.size)?;
        put_number(&mut block[MTIME], seconds)?;
        put_checksum(&mut block)?;
        Some(block)
    }
}

/// The JSON in the tar that an eStargz layer has its TOC in.
pub fn toc_in_tar<R: Read>(mut tar: R) -> io::Result<io::Take<R>> {
    let mut header = [0; BLOCK];
    tar.read_exact(&mut header)?;
    let size = size_in_tar(&header).map_err(invalid)?;
    Ok(tar.take(size))
}

/// Calls `each` with the parts of the tar that the TOC of an eStargz layer
/// describes, in order, up to the TOC itself. Its digest has been compared, or
/// memory is not bounded.
pub fn likely_tar(
    json: impl Read,
    style: &HeaderStyle,
    mut each: impl FnMut(TarPart) -> io::Result<()>,
) -> io::Result<()> {
    let mut users = HashMap::new();
    let mut groups = HashMap::new();
    let mut stopped = None;
    let json = serde_json::de::IoRead::new(BufReader::new(json));
    let read = for_each_entry(json, &mut |entry: Entry| {
        if entry.kind == "chunk" {
            return Ok(());
        }
        let mut tell = |part| {
            each(part).map_err(|error| {
                let what = TocError::Json(error.to_string());
                stopped = Some(error);
                what
            })
        };
        // Its content is nobody's.
        if LANDMARKS.contains(&&*entry.name) {
            return tell(TarPart::Unknown);
        }
        let user = named(&mut users, entry.uid, &entry.user_name);
        let group = named(&mut groups, entry.gid, &entry.group_name);
        let header = style.header(&entry, user, group);
        let header = header.map_or(TarPart::Unknown, |header| TarPart::Bytes(header.to_vec()));
        let size = if entry.kind == "reg" { entry.size } else { 0 };
        tell(header)?;
        if size > 0 {
            tell(TarPart::Content(size))?;
            let padding = size.next_multiple_of(BLOCK as u64) - size;
            tell(TarPart::Bytes(vec![0; padding as usize]))?;
        }
        Ok(())
    });
    match (stopped, read) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(invalid(error)),
        (None, Ok(())) => Ok(()),
    }
}

fn invalid(error: TocError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The name that goes with a number: a TOC tells it where it first does.
fn named<'m>(known: &'m mut HashMap<u64, String>, id: u64, name: &str) -> &'m str {
    let known = known.entry(id).or_default();
    if !name.is_empty() {
        name.clone_into(known);
    }
    known
}

fn put_text(field: &mut [u8], text: &str) -> Option<()> {
    let text = text.as_bytes();
    if !text.is_ascii() || text.contains(&0) {
        return None;
    }
    field.fill(0);
    field.get_mut(..text.len())?.copy_from_slice(text);
    Some(())
}

/// In as many octal digits as are there, whatever follows them.
fn put_number(field: &mut [u8], number: u64) -> Option<()> {
    let digits = field
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let text = format!("{number:0digits$o}");
    if digits == 0 || text.len() != digits {
        return None;
    }
    field[..digits].copy_from_slice(text.as_bytes());
    Some(())
}

fn put_checksum(block: &mut [u8; BLOCK]) -> Option<()> {
    let outside = |(at, byte): (usize, &u8)| match CHECKSUM.contains(&at) {
        true => u64::from(b' '),
        false => u64::from(*byte),
    };
    let sum = block.iter().enumerate().map(outside).sum();
    put_number(&mut block[CHECKSUM], sum)
}

#[cfg(test)]
mod tests;
