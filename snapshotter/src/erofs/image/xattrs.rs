//! Going over an inode's extended attributes.

use std::fmt;
use std::ops::Range;

use memmap2::Mmap;

use super::{Error, Image, Ino, PREFIXES, XATTR_ENTRY_SIZE, corrupt, le16, le32};

/// One extended attribute. Its name is `prefix` followed by `suffix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrRef<'a> {
    /// The namespace, or the whole of an ACL's name.
    pub prefix: &'static [u8],
    /// The rest of the name.
    pub suffix: &'a [u8],
    /// The value.
    pub value: &'a [u8],
}

/// Iterator over an inode's [`XattrRef`]s. Ends after an error.
pub struct Xattrs<'a, B = Mmap> {
    image: &'a Image<B>,
    ino: Ino,
    /// Numbers of shared ones, four bytes each.
    shared: &'a [u8],
    /// Where the others are in the image.
    own: Range<u64>,
    failed: bool,
}

impl<B> fmt::Debug for Xattrs<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Xattrs")
            .field("ino", &self.ino)
            .finish_non_exhaustive()
    }
}

impl<'a, B: AsRef<[u8]>> Xattrs<'a, B> {
    pub(super) fn new(image: &'a Image<B>, ino: Ino, shared: &'a [u8], own: Range<u64>) -> Self {
        Self {
            image,
            ino,
            shared,
            own,
            failed: false,
        }
    }

    fn xattr(&mut self) -> Result<Option<XattrRef<'a>>, Error> {
        if let Some((id, rest)) = self.shared.split_at_checked(4) {
            self.shared = rest;
            let at = self.image.xattr_start + u64::from(le32(id)) * XATTR_ENTRY_SIZE;
            return Ok(Some(self.at(at)?.0));
        }
        if self.own.is_empty() {
            return Ok(None);
        }
        let (xattr, end) = self.at(self.own.start)?;
        if end > self.own.end {
            return Err(corrupt(self.ino, "an attribute beyond its inode"));
        }
        self.own.start = end;
        Ok(Some(xattr))
    }

    /// The attribute at an offset of the image, and where the next begins.
    fn at(&self, start: u64) -> Result<(XattrRef<'a>, u64), Error> {
        let header = self.image.slice(self.ino, start, XATTR_ENTRY_SIZE)?;
        let prefix = PREFIXES
            .iter()
            .find(|(number, _)| *number == header[1])
            .ok_or(corrupt(self.ino, "an attribute of an unknown namespace"))?
            .1;
        let (name, value) = (u64::from(header[0]), u64::from(le16(&header[2..])));
        let start = start + XATTR_ENTRY_SIZE;
        let xattr = XattrRef {
            prefix,
            suffix: self.image.slice(self.ino, start, name)?,
            value: self.image.slice(self.ino, start + name, value)?,
        };
        let end = (start + name + value).next_multiple_of(XATTR_ENTRY_SIZE);
        Ok((xattr, end))
    }
}

impl<'a, B: AsRef<[u8]>> Iterator for Xattrs<'a, B> {
    type Item = Result<XattrRef<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let xattr = self.xattr().transpose();
        self.failed = matches!(xattr, Some(Err(_)));
        xattr
    }
}
