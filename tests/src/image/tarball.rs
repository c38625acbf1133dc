//! Writing tars with everything that layers may hold.

use std::io::{self, Read, Write};

use anyhow::Result;
use tar::{EntryType, Header};

/// What an entry carries beside its name and content.
#[derive(Debug, Clone)]
pub struct Meta {
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes.
    pub xattrs: Vec<(&'static str, Vec<u8>)>,
}

impl Meta {
    /// Of root, at a fixed time.
    pub fn mode(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: (1_600_000_000, 0),
            xattrs: Vec::new(),
        }
    }

    /// The same with an owner.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// The same at another time.
    pub fn at(mut self, seconds: i64, nanoseconds: u32) -> Self {
        self.mtime = (seconds, nanoseconds);
        self
    }

    /// The same with one extended attribute more.
    pub fn xattr(mut self, name: &'static str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name, value.into()));
        self
    }
}

/// A tar while it is written. Names are given as they shall stand in it;
/// directories end in a slash.
pub struct Tarball<'a> {
    to: &'a mut dyn Write,
}

impl<'a> Tarball<'a> {
    /// An empty one.
    pub fn new(to: &'a mut dyn Write) -> Self {
        Self { to }
    }

    /// A directory.
    pub fn dir(&mut self, name: &str, meta: &Meta) -> Result<()> {
        let name = format!("{name}/");
        self.entry(EntryType::Directory, &name, meta, 0, "", (0, 0))
    }

    /// A regular file.
    pub fn file(&mut self, name: &str, meta: &Meta, content: &[u8]) -> Result<()> {
        self.file_from(name, meta, content.len() as u64, &mut &content[..])
    }

    /// A regular file of a given size.
    pub fn file_from(
        &mut self,
        name: &str,
        meta: &Meta,
        size: u64,
        content: &mut dyn Read,
    ) -> Result<()> {
        self.entry(EntryType::Regular, name, meta, size, "", (0, 0))?;
        io::copy(&mut content.take(size), self.to)?;
        self.pad(size)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, name: &str, meta: &Meta, target: &str) -> Result<()> {
        self.entry(EntryType::Symlink, name, meta, 0, target, (0, 0))
    }

    /// A hard link to an entry that came before.
    pub fn hardlink(&mut self, name: &str, meta: &Meta, target: &str) -> Result<()> {
        self.entry(EntryType::Link, name, meta, 0, target, (0, 0))
    }

    /// A character device.
    pub fn char_device(&mut self, name: &str, meta: &Meta, number: (u32, u32)) -> Result<()> {
        self.entry(EntryType::Char, name, meta, 0, "", number)
    }

    /// A block device.
    pub fn block_device(&mut self, name: &str, meta: &Meta, number: (u32, u32)) -> Result<()> {
        self.entry(EntryType::Block, name, meta, 0, "", number)
    }

    /// A named pipe.
    pub fn fifo(&mut self, name: &str, meta: &Meta) -> Result<()> {
        self.entry(EntryType::Fifo, name, meta, 0, "", (0, 0))
    }

    /// The marker that removes `name` of the layers below.
    pub fn whiteout(&mut self, dir: &str, name: &str) -> Result<()> {
        self.file(&format!("{dir}/.wh.{name}"), &Meta::mode(0o644), b"")
    }

    /// The marker that hides everything the layers below have in `dir`.
    pub fn opaque(&mut self, dir: &str) -> Result<()> {
        self.file(&format!("{dir}/.wh..wh..opq"), &Meta::mode(0o644), b"")
    }

    /// The two blocks of zeros at the end.
    pub fn finish(self) -> Result<()> {
        self.to.write_all(&[0; 1024])?;
        Ok(())
    }

    fn entry(
        &mut self,
        kind: EntryType,
        name: &str,
        meta: &Meta,
        size: u64,
        target: &str,
        (major, minor): (u32, u32),
    ) -> Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(meta.mode);
        header.set_size(size);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(major)?;
            header.set_device_minor(minor)?;
        }
        let mut pax = Vec::new();
        // What the old header cannot hold goes into the extended one.
        if name.is_ascii() && name.len() <= 100 {
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        } else {
            record(&mut pax, "path", name.as_bytes());
            header.as_mut_bytes()[..4].copy_from_slice(b"long");
        }
        if target.is_ascii() && target.len() <= 100 {
            header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
        } else {
            record(&mut pax, "linkpath", target.as_bytes());
        }
        for (id, key) in [(meta.uid, "uid"), (meta.gid, "gid")] {
            if id > 0o7_777_777 {
                record(&mut pax, key, id.to_string().as_bytes());
            }
        }
        header.set_uid(meta.uid & 0o7_777_777);
        header.set_gid(meta.gid & 0o7_777_777);
        let (seconds, nanoseconds) = meta.mtime;
        if nanoseconds != 0 || !(0..1 << 33).contains(&seconds) {
            // 1.25 before the epoch is -1.25: the fraction counts away from it.
            let text = if seconds < 0 && nanoseconds != 0 {
                format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
            } else {
                format!("{seconds}.{nanoseconds:09}")
            };
            record(&mut pax, "mtime", text.as_bytes());
        }
        header.set_mtime(u64::try_from(seconds).unwrap_or(0) & ((1 << 33) - 1));
        for (key, value) in &meta.xattrs {
            record(&mut pax, &format!("SCHILY.xattr.{key}"), value);
        }
        if !pax.is_empty() {
            let mut extended = Header::new_ustar();
            extended.set_entry_type(EntryType::XHeader);
            extended.as_mut_bytes()[..3].copy_from_slice(b"pax");
            extended.set_mode(0o644);
            extended.set_uid(0);
            extended.set_gid(0);
            extended.set_mtime(0);
            extended.set_size(pax.len() as u64);
            extended.set_cksum();
            self.to.write_all(extended.as_bytes())?;
            self.to.write_all(&pax)?;
            self.pad(pax.len() as u64)?;
        }
        header.set_cksum();
        self.to.write_all(header.as_bytes())?;
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let padding = (512 - size % 512) % 512;
        io::copy(&mut io::repeat(0).take(padding), self.to)?;
        Ok(())
    }
}

/// Appends `"<length> <key>=<value>\n"`; the length counts its own digits.
fn record(pax: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length += 1;
    }
    pax.extend_from_slice(format!("{length} {key}=").as_bytes());
    pax.extend_from_slice(value);
    pax.push(b'\n');
}
