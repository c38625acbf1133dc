//! Comparing two directory trees, down to the last attribute.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// How exactly times are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// To the second: all that eStargz keeps.
    Seconds,
    /// To the second, rounded as ctr-remote does.
    RoundedSeconds,
    /// To the nanosecond.
    Nanoseconds,
}

/// A difference that is none: given the path relative to the root and what
/// would be reported.
pub type Excuse = fn(&Path, &str) -> bool;

/// Excuses nothing but the root's own time, which no layer sets: containerd
/// makes the root anew for each unpack.
pub fn root_time(path: &Path, what: &str) -> bool {
    path.as_os_str().is_empty() && what == "modification time"
}

/// What was compared, so that a test can tell that it was not nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Entries of all types, the root included.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
    /// Names beyond the first of files with several.
    pub links: u64,
    /// Extended attributes.
    pub xattrs: u64,
}

/// More differences than this are only counted.
const SHOWN: usize = 30;

/// Compares names, types, modes, owners, times, link counts, which names are
/// links to one file, device numbers, link targets, extended attributes and
/// content. An error lists the first differences.
pub fn compare(expected: &Path, actual: &Path, times: Times) -> Result<Summary> {
    compare_but(expected, actual, times, root_time)
}

/// The same, but for what is excused.
pub fn compare_but(
    expected: &Path,
    actual: &Path,
    times: Times,
    excuse: Excuse,
) -> Result<Summary> {
    let mut comparison = Comparison {
        excuse,
        expected,
        actual,
        times,
        first_names: Default::default(),
        differences: Vec::new(),
        count: 0,
        summary: Summary::default(),
    };
    comparison.entry(Path::new(""))?;
    if comparison.count > 0 {
        bail!(
            "{} differences between {} (expected) and {} (actual):\n{}",
            comparison.count,
            expected.display(),
            actual.display(),
            comparison.differences.join("\n")
        );
    }
    Ok(comparison.summary)
}

struct Comparison<'a> {
    excuse: Excuse,
    expected: &'a Path,
    actual: &'a Path,
    times: Times,
    /// For each side, the first name met of a file with several.
    first_names: [HashMap<(u64, u64), PathBuf>; 2],
    differences: Vec<String>,
    count: usize,
    summary: Summary,
}

impl Comparison<'_> {
    fn differ(&mut self, path: &Path, what: &str, expected: &str, actual: &str) {
        if (self.excuse)(path, what) {
            return;
        }
        self.count += 1;
        if self.differences.len() < SHOWN {
            self.differences.push(format!(
                "/{}: {what}: expected {expected}, is {actual}",
                path.display()
            ));
        }
    }

    fn check<T: PartialEq + std::fmt::Debug>(
        &mut self,
        path: &Path,
        what: &str,
        expected: &T,
        actual: &T,
    ) {
        if expected != actual {
            self.differ(path, what, &format!("{expected:?}"), &format!("{actual:?}"));
        }
    }

    fn entry(&mut self, path: &Path) -> Result<()> {
        self.summary.entries += 1;
        let paths = [self.expected.join(path), self.actual.join(path)];
        let [a, b] = &paths;
        let (left, right) = (metadata(a)?, metadata(b)?);
        if kind(&left) != kind(&right) {
            self.differ(path, "type", kind(&left), kind(&right));
            return Ok(());
        }
        let octal = |meta: &Metadata| format!("{:o}", meta.mode() & 0o7777);
        self.check(path, "mode", &octal(&left), &octal(&right));
        self.check(path, "owner", &left.uid(), &right.uid());
        self.check(path, "group", &left.gid(), &right.gid());
        self.check(path, "links", &left.nlink(), &right.nlink());
        let late = (right.mtime(), right.mtime_nsec());
        let (early, late) = match self.times {
            Times::Seconds => ((left.mtime(), 0), (late.0, 0)),
            Times::RoundedSeconds => {
                let up = i64::from(left.mtime_nsec() >= 500_000_000);
                ((left.mtime() + up, 0), late)
            }
            Times::Nanoseconds => ((left.mtime(), left.mtime_nsec()), late),
        };
        self.check(path, "modification time", &early, &late);
        let (left_xattrs, right_xattrs) = (xattrs(a)?, xattrs(b)?);
        self.summary.xattrs += left_xattrs.len() as u64;
        self.check(path, "extended attributes", &left_xattrs, &right_xattrs);

        let file_type = left.file_type();
        if file_type.is_dir() {
            return self.directory(path, &paths);
        }
        self.same_file(path, &left, &right);
        if file_type.is_symlink() {
            self.check(path, "target", &fs::read_link(a)?, &fs::read_link(b)?);
        } else if file_type.is_file() {
            self.check(path, "size", &left.size(), &right.size());
            self.content(path, &paths)?;
        } else {
            self.check(path, "device", &left.rdev(), &right.rdev());
        }
        Ok(())
    }

    fn directory(&mut self, path: &Path, [a, b]: &[PathBuf; 2]) -> Result<()> {
        let (left, right) = (names(a)?, names(b)?);
        for name in left.difference(&right) {
            self.differ(&path.join(name), "name", "it", "missing");
        }
        for name in right.difference(&left) {
            self.differ(&path.join(name), "name", "nothing", "there");
        }
        for name in left.intersection(&right) {
            self.entry(&path.join(name))?;
        }
        Ok(())
    }

    /// Names of one file on one side must be names of one file on the other.
    fn same_file(&mut self, path: &Path, left: &Metadata, right: &Metadata) {
        let firsts: Vec<PathBuf> = [left, right]
            .into_iter()
            .zip(&mut self.first_names)
            .map(|(meta, firsts)| {
                if meta.nlink() < 2 {
                    return path.to_owned();
                }
                firsts
                    .entry((meta.dev(), meta.ino()))
                    .or_insert_with(|| path.to_owned())
                    .clone()
            })
            .collect();
        if firsts[0] != path {
            self.summary.links += 1;
        }
        self.check(path, "is the same file as", &firsts[0], &firsts[1]);
    }

    fn content(&mut self, path: &Path, [a, b]: &[PathBuf; 2]) -> Result<()> {
        let mut left = File::open(a).with_context(|| format!("cannot open {}", a.display()))?;
        let mut right = File::open(b).with_context(|| format!("cannot open {}", b.display()))?;
        let mut offset = 0;
        let (mut x, mut y) = (Vec::new(), Vec::new());
        loop {
            for (file, buffer, name) in [(&mut left, &mut x, a), (&mut right, &mut y, b)] {
                buffer.clear();
                file.take(1 << 20)
                    .read_to_end(buffer)
                    .with_context(|| format!("cannot read {}", name.display()))?;
            }
            if x != y {
                let place = x.iter().zip(&y).take_while(|(p, q)| p == q).count();
                let at = offset + place as u64;
                let byte = |bytes: &[u8]| match bytes.get(place) {
                    Some(byte) => format!("{byte:#04x} at {at}"),
                    None => format!("the end at {at}"),
                };
                self.differ(path, "content", &byte(&x), &byte(&y));
                return Ok(());
            }
            if x.is_empty() {
                self.summary.bytes += offset;
                return Ok(());
            }
            offset += x.len() as u64;
        }
    }
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::symlink_metadata(path).with_context(|| format!("cannot stat {}", path.display()))
}

fn kind(meta: &Metadata) -> &'static str {
    let file_type = meta.file_type();
    match () {
        () if file_type.is_dir() => "directory",
        () if file_type.is_file() => "regular file",
        () if file_type.is_symlink() => "symbolic link",
        () if file_type.is_char_device() => "character device",
        () if file_type.is_block_device() => "block device",
        () if file_type.is_fifo() => "fifo",
        () => "socket",
    }
}

fn names(dir: &Path) -> Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let name = entry
            .with_context(|| format!("cannot list {}", dir.display()))?
            .file_name();
        if !names.insert(name.clone()) {
            bail!("{} lists {} twice", dir.display(), name.display());
        }
    }
    Ok(names)
}

/// Extended attributes, values as text where they are.
fn xattrs(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut list = vec![0; 64 << 10];
    let size = rustix::fs::llistxattr(path, &mut list[..])
        .with_context(|| format!("cannot list the extended attributes of {}", path.display()))?;
    let mut found = BTreeMap::new();
    for name in list[..size].split(|byte| *byte == 0) {
        if name.is_empty() {
            continue;
        }
        let name = String::from_utf8_lossy(name).into_owned();
        let mut value = vec![0; 64 << 10];
        let size = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..])
            .with_context(|| format!("cannot read {name} of {}", path.display()))?;
        found.insert(name, value[..size].escape_ascii().to_string());
    }
    Ok(found)
}
