//! Tar headers: ustar, GNU, star and PAX, as Go's `archive/tar` understands
//! them, because that is what unpacks layers everywhere else.

use std::collections::BTreeMap;

use super::WriteError;

/// Size of a tar block.
pub(super) const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// A PAX global header: kept in the tar, describes no file.
    Global,
}

/// A time with its fraction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Time {
    pub(super) secs: i64,
    pub(super) nanos: u32,
}

/// An entry's metadata after all extensions were merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) user: Vec<u8>,
    pub(super) group: Vec<u8>,
    /// Bytes of content as a reader of the file sees them.
    pub(super) size: u64,
    pub(super) mtime: Time,
    pub(super) atime: Option<Time>,
    pub(super) ctime: Option<Time>,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Records of a PAX extended header, in their order.
pub(super) type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// What precedes an entry's own header block.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) records: Records,
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
}

impl Extensions {
    /// The last value of a PAX record; an empty one says nothing.
    pub(super) fn record(&self, key: &str) -> Option<&[u8]> {
        let found = self.records.iter().rfind(|(k, _)| k == key.as_bytes());
        found
            .map(|(_, value)| value.as_slice())
            .filter(|v| !v.is_empty())
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, WriteError> {
        self.record(key)
            .map(|text| {
                std::str::from_utf8(text)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| WriteError::damaged(format!("PAX record '{key}' is no number")))
            })
            .transpose()
    }
}

/// One 512-byte header block, checksum verified.
pub(super) struct Block<'a>(&'a [u8; BLOCK]);

impl<'a> Block<'a> {
    /// `None` if the checksum does not match.
    pub(super) fn parse(raw: &'a [u8; BLOCK]) -> Option<Self> {
        let stated = octal(&raw[148..156])?;
        let outside = |i: usize| !(148..156).contains(&i);
        let byte = |(i, b): (usize, &u8)| if outside(i) { *b } else { b' ' };
        let unsigned: i64 = raw.iter().enumerate().map(|p| i64::from(byte(p))).sum();
        // Some old writers summed signed bytes.
        let signed: i64 = raw
            .iter()
            .enumerate()
            .map(|p| i64::from(byte(p).cast_signed()))
            .sum();
        (stated == unsigned || stated == signed).then_some(Self(raw))
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.0[156]
    }

    pub(super) fn size(&self) -> Result<u64, WriteError> {
        self.numeric(124..136, "size").and_then(|size| {
            u64::try_from(size).map_err(|_| WriteError::damaged("an entry has a negative size"))
        })
    }

    fn numeric(&self, range: std::ops::Range<usize>, what: &str) -> Result<i64, WriteError> {
        numeric(&self.0[range])
            .ok_or_else(|| WriteError::damaged(format!("a header's {what} is no number")))
    }

    fn is_gnu(&self) -> bool {
        &self.0[257..265] == b"ustar  \0"
    }

    fn is_ustar(&self) -> bool {
        &self.0[257..263] == b"ustar\0"
    }

    fn is_star(&self) -> bool {
        self.is_ustar() && &self.0[508..512] == b"tar\0"
    }

    /// The part of an old GNU sparse header that follows the common fields:
    /// four map entries, the flag for more, the real size.
    pub(super) fn gnu_sparse(&self) -> Option<(&'a [u8], bool, Option<i64>)> {
        self.is_gnu().then(|| {
            (
                &self.0[386..482],
                self.0[482] != 0,
                numeric(&self.0[483..495]),
            )
        })
    }

    /// Merges the block and what came before it.
    pub(super) fn header(&self, extensions: &Extensions) -> Result<Header, WriteError> {
        let raw = self.0;
        let flag = self.type_flag();
        let mut name = text(&raw[..100]);
        let (mut user, mut group) = (Vec::new(), Vec::new());
        let (mut dev_major, mut dev_minor) = (0, 0);
        let (mut atime, mut ctime) = (None, None);
        if self.is_ustar() || self.is_gnu() {
            user = text(&raw[265..297]);
            group = text(&raw[297..329]);
            dev_major = self.numeric(329..337, "device number")?;
            dev_minor = self.numeric(337..345, "device number")?;
            let mut prefix = Vec::new();
            let seconds = |field: &[u8]| numeric(field).map(|secs| Time { secs, nanos: 0 });
            if self.is_star() {
                prefix = text(&raw[345..476]);
                atime = seconds(&raw[476..488]);
                ctime = seconds(&raw[488..500]);
            } else if self.is_ustar() {
                prefix = text(&raw[345..500]);
            } else {
                let given = |field: &[u8]| (field[0] != 0).then(|| seconds(field)).flatten();
                atime = given(&raw[345..357]);
                ctime = given(&raw[357..369]);
            }
            if !prefix.is_empty() {
                prefix.push(b'/');
                prefix.append(&mut name);
                name = prefix;
            }
        }
        let mut header = Header {
            kind: Kind::Regular,
            link: text(&raw[157..257]),
            mode: self.numeric(100..108, "mode")?,
            uid: self.numeric(108..116, "owner")?,
            gid: self.numeric(116..124, "group")?,
            size: self.size()?,
            mtime: Time {
                secs: self.numeric(136..148, "time")?,
                nanos: 0,
            },
            name,
            user,
            group,
            atime,
            ctime,
            dev_major,
            dev_minor,
            xattrs: BTreeMap::new(),
        };
        header.extend(extensions)?;
        header.kind = match flag {
            b'\0' if header.name.ends_with(b"/") => Kind::Directory,
            b'0' | b'\0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'g' => Kind::Global,
            other => {
                return Err(WriteError::unsupported(format!(
                    "'{}' is a tar entry of type '{}', which no TOC can hold",
                    header.name.escape_ascii(),
                    other.escape_ascii()
                )));
            }
        };
        Ok(header)
    }
}

impl Header {
    fn extend(&mut self, extensions: &Extensions) -> Result<(), WriteError> {
        for (key, value) in &extensions.records {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                self.xattrs.insert(name.to_vec(), value.clone());
                continue;
            }
            if value.is_empty() {
                continue;
            }
            let bad = || {
                let key = key.escape_ascii();
                WriteError::damaged(format!("PAX record '{key}' has no valid value"))
            };
            let number = || std::str::from_utf8(value).ok()?.parse().ok();
            match key.as_slice() {
                b"path" => self.name.clone_from(value),
                b"linkpath" => self.link.clone_from(value),
                b"uname" => self.user.clone_from(value),
                b"gname" => self.group.clone_from(value),
                b"uid" => self.uid = number().ok_or_else(bad)?,
                b"gid" => self.gid = number().ok_or_else(bad)?,
                b"size" => {
                    self.size = number()
                        .and_then(|n| u64::try_from(n).ok())
                        .ok_or_else(bad)?;
                }
                b"mtime" => self.mtime = pax_time(value).ok_or_else(bad)?,
                b"atime" => self.atime = Some(pax_time(value).ok_or_else(bad)?),
                b"ctime" => self.ctime = Some(pax_time(value).ok_or_else(bad)?),
                _ => {}
            }
        }
        if let Some(name) = &extensions.long_name {
            self.name.clone_from(name);
        }
        if let Some(link) = &extensions.long_link {
            self.link.clone_from(link);
        }
        Ok(())
    }
}

/// Up to the first NUL.
pub(super) fn text(field: &[u8]) -> Vec<u8> {
    field.split(|b| *b == 0).next().unwrap_or_default().to_vec()
}

fn octal(field: &[u8]) -> Option<i64> {
    let field = field.split(|b| *b == 0).next()?;
    let field = std::str::from_utf8(field).ok()?.trim_matches(' ');
    if field.is_empty() {
        return Some(0);
    }
    i64::from_str_radix(field, 8).ok()
}

/// Octal digits, or base 256 when the first bit is set (two's complement).
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        // Leading NULs stand for blanks in some writers' fields.
        let start = field.iter().position(|b| *b != 0).unwrap_or(field.len());
        return octal(&field[start..]);
    }
    let negative = first & 0x40 != 0;
    let start = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
    let value = rest.iter().try_fold(start, |value: i128, byte| {
        value.checked_mul(256)?.checked_add(i128::from(*byte))
    })?;
    i64::try_from(value).ok()
}

/// Decimal seconds with an optional fraction, possibly negative.
fn pax_time(value: &[u8]) -> Option<Time> {
    let value = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let secs: i64 = whole.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().ok()?;
    Some(if whole.starts_with('-') && nanos > 0 {
        Time {
            secs: secs.checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        }
    } else {
        Time { secs, nanos }
    })
}

/// Splits the payload of a PAX header: `<length> <key>=<value>\n`, the length
/// counting all of the record.
pub(super) fn pax_records(mut payload: &[u8]) -> Result<Records, WriteError> {
    let mut records = Vec::new();
    while !payload.is_empty() {
        let (record, rest) = next_record(payload)
            .ok_or_else(|| WriteError::damaged("a PAX header holds a malformed record"))?;
        records.push(record);
        payload = rest;
    }
    Ok(records)
}

type Record = (Vec<u8>, Vec<u8>);

fn next_record(payload: &[u8]) -> Option<(Record, &[u8])> {
    let space = payload.iter().position(|b| *b == b' ')?;
    let length: usize = std::str::from_utf8(&payload[..space]).ok()?.parse().ok()?;
    if length <= space + 1 || length > payload.len() {
        return None;
    }
    let (record, rest) = payload.split_at(length);
    let record = record[space + 1..].strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    if key.is_empty() {
        return None;
    }
    Some(((key.to_vec(), value.to_vec()), rest))
}

/// Header blocks for `header` as a plain entry, in PAX where ustar's fields
/// are too small.
pub(super) fn encode(header: &Header) -> Vec<u8> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| records.push((key.to_vec(), value.to_vec()));
    if header.name.len() > 100 || !header.name.is_ascii() {
        record(b"path", &header.name);
    }
    if header.link.len() > 100 || !header.link.is_ascii() {
        record(b"linkpath", &header.link);
    }
    if header.user.len() > 31 || !header.user.is_ascii() {
        record(b"uname", &header.user);
    }
    if header.group.len() > 31 || !header.group.is_ascii() {
        record(b"gname", &header.group);
    }
    let small = |value: i64| (0..0o10_000_000).contains(&value);
    if !small(header.uid) {
        record(b"uid", header.uid.to_string().as_bytes());
    }
    if !small(header.gid) {
        record(b"gid", header.gid.to_string().as_bytes());
    }
    if header.size >= 0o100_000_000_000 {
        record(b"size", header.size.to_string().as_bytes());
    }
    let plain_time = |t: Time| t.nanos == 0 && (0..0o100_000_000_000).contains(&t.secs);
    if !plain_time(header.mtime) {
        record(b"mtime", pax_time_text(header.mtime).as_bytes());
    }
    for (key, time) in [(b"atime", header.atime), (b"ctime", header.ctime)] {
        if let Some(time) = time {
            record(key, pax_time_text(time).as_bytes());
        }
    }
    for (name, value) in &header.xattrs {
        record(&[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    let mut out = Vec::new();
    if !records.is_empty() {
        let payload: Vec<u8> = records.iter().flat_map(|(k, v)| pax_record(k, v)).collect();
        out.extend(block(
            b'x',
            b"PaxHeaders.0/entry",
            header,
            payload.len() as u64,
            true,
        ));
        out.extend(&payload);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    let flag = match header.kind {
        Kind::Regular => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::CharDevice => b'3',
        Kind::BlockDevice => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
        Kind::Global => b'g',
    };
    out.extend(block(flag, &header.name, header, header.size, false));
    out
}

fn block(flag: u8, name: &[u8], header: &Header, size: u64, extension: bool) -> [u8; BLOCK] {
    let mut raw = [0; BLOCK];
    let mut put = |at: usize, room: usize, bytes: &[u8]| {
        let n = bytes.len().min(room);
        raw[at..at + n].copy_from_slice(&bytes[..n]);
    };
    // What does not fit is in a PAX record, and then the field does not count.
    let digits = |value: i64, width: usize| {
        let limit = 1i64 << (3 * (width - 1));
        let value = if (0..limit).contains(&value) {
            value
        } else {
            0
        };
        format!("{value:0digits$o}", digits = width - 1).into_bytes()
    };
    put(0, 100, name);
    let mode = if extension {
        0o644
    } else {
        header.mode & 0o7777
    };
    put(100, 8, &digits(mode, 8));
    let (uid, gid) = if extension {
        (0, 0)
    } else {
        (header.uid, header.gid)
    };
    put(108, 8, &digits(uid, 8));
    put(116, 8, &digits(gid, 8));
    put(124, 12, &digits(size.cast_signed(), 12));
    let mtime = if extension { 0 } else { header.mtime.secs };
    put(136, 12, &digits(mtime, 12));
    put(156, 1, &[flag]);
    put(257, 8, b"ustar\x0000");
    if !extension {
        put(157, 100, &header.link);
        put(265, 31, &header.user);
        put(297, 31, &header.group);
        put(329, 8, &digits(header.dev_major, 8));
        put(337, 8, &digits(header.dev_minor, 8));
    }
    raw[148..156].fill(b' ');
    let sum: u32 = raw.iter().map(|b| u32::from(*b)).sum();
    raw[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    raw
}

fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    // " ", "=" and "\n", and the length's own digits.
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn pax_time_text(time: Time) -> String {
    let Time { secs, nanos } = time;
    if nanos == 0 {
        return secs.to_string();
    }
    let text = if secs < 0 {
        // secs + nanos counts up from below; the text counts down from zero.
        let whole = -(secs + 1);
        format!("-{whole}.{:09}", 1_000_000_000 - nanos)
    } else {
        format!("{secs}.{nanos:09}")
    };
    text.trim_end_matches('0').to_owned()
}

#[cfg(test)]
mod tests;
