//! `/proc/self/mountinfo`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use super::Error;

/// One mount of this process's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number.
    pub id: u64,
    /// The file system's device number, `<major>:<minor>`: the same for all
    /// mounts of one file system.
    pub device: String,
    /// Which directory of the file system is mounted: `/`, but for bind mounts.
    pub root: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
    /// The file system's type, `erofs` or `fuse.sluice` for example.
    pub kind: String,
    /// What is mounted: for a layer its `meta.erofs`.
    pub source: OsString,
    /// Options of the mount itself, comma-separated.
    pub options: String,
    /// Options of the file system, comma-separated.
    pub super_options: String,
}

/// All mounts in the order in which they were made visible.
pub fn mounts() -> Result<Vec<Mount>, Error> {
    mounts_of("self")
}

/// All mounts that a process sees.
pub(super) fn mounts_of(process: &str) -> Result<Vec<Mount>, Error> {
    let table = std::fs::read(format!("/proc/{process}/mountinfo")).map_err(Error::Table)?;
    Ok(parse(&table))
}

/// The mounts on `directory` and below it, the latest first: the order in
/// which they can be unmounted.
pub fn mounts_below(directory: &Path) -> Result<Vec<Mount>, Error> {
    let mut mounts = mounts()?;
    mounts.retain(|mount| mount.target.starts_with(directory));
    mounts.reverse();
    Ok(mounts)
}

fn parse(table: &[u8]) -> Vec<Mount> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

/// `id parent major:minor root target options [tags...] - kind source
/// super_options`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = text(fields.nth(1)?);
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let options = text(fields.next()?);
    fields.find(|field| *field == b"-")?;
    let kind = text(fields.next()?);
    let source = unescape(fields.next()?);
    Some(Mount {
        id,
        device,
        root: root.into(),
        target: target.into(),
        kind,
        source,
        options,
        super_options: text(fields.next().unwrap_or_default()),
    })
}

/// Space, tab, newline and backslash are written as `\` and three octal
/// digits.
fn unescape(field: &[u8]) -> OsString {
    let Some(first) = field.iter().position(|byte| *byte == b'\\') else {
        return OsStr::from_bytes(field).to_owned();
    };
    let mut plain = field[..first].to_vec();
    let mut rest = &field[first..];
    while let Some((byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(octal.unwrap_or(*byte));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let table = b"36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 shared:2 - erofs /x/meta.erofs ro,user_xattr\n\
            37 35 0:52 / /c rw - fuse.sluice none\\134x rw\n\
            garbage\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].id, 36);
        assert_eq!(mounts[0].device, "98:0");
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[0].target, Path::new("/a b"));
        assert_eq!(mounts[0].kind, "erofs");
        assert_eq!(mounts[0].source, "/x/meta.erofs");
        assert_eq!(mounts[0].options, "rw,noatime");
        assert_eq!(mounts[0].super_options, "ro,user_xattr");
        assert_eq!(mounts[1].source, "none\\x");
    }

    #[test]
    fn lists_this_machine() {
        let mounts = mounts().unwrap();
        assert!(mounts.iter().any(|m| m.target == Path::new("/proc")));
    }
}
