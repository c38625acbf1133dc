//! Tar streams, in the PAX form that container tools write.

/// A tar stream that grows.
pub(crate) struct Archive {
    tar: tar::Builder<Vec<u8>>,
    /// PAX records of the next entry.
    records: Vec<(String, Vec<u8>)>,
    owner: (u64, u64),
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
            records: Vec::new(),
            owner: (0, 0),
        }
    }

    /// Extended attributes of the next entry.
    pub(crate) fn xattrs(&mut self, xattrs: &[(&str, &[u8])]) {
        let records = xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.to_vec()));
        self.records.extend(records);
    }

    /// Time of the next entry, as PAX has it.
    pub(crate) fn time(&mut self, seconds: &str) {
        self.records
            .push(("mtime".to_owned(), seconds.as_bytes().to_vec()));
    }

    /// Owner of the next entry.
    pub(crate) fn owner(&mut self, uid: u64, gid: u64) {
        self.owner = (uid, gid);
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.append(name, tar::EntryType::Regular, mode, "", content);
    }

    pub(crate) fn directory(&mut self, name: &str, mode: u32) {
        self.append(name, tar::EntryType::Directory, mode, "", b"");
    }

    pub(crate) fn symlink(&mut self, name: &str, target: &str) {
        self.append(name, tar::EntryType::Symlink, 0o777, target, b"");
    }

    pub(crate) fn hard_link(&mut self, name: &str, target: &str, mode: u32) {
        self.append(name, tar::EntryType::Link, mode, target, b"");
    }

    pub(crate) fn device(&mut self, name: &str, kind: tar::EntryType, major: u32, minor: u32) {
        let mut header = self.header(kind, 0o660, 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        self.tar.append_data(&mut header, name, &b""[..]).unwrap();
    }

    fn header(&mut self, kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_mtime(1_700_000_000);
        let (uid, gid) = std::mem::take(&mut self.owner);
        header.set_uid(uid);
        header.set_gid(gid);
        header
    }

    fn append(
        &mut self,
        name: &str,
        kind: tar::EntryType,
        mode: u32,
        target: &str,
        content: &[u8],
    ) {
        let mut records: Vec<(String, Vec<u8>)> = std::mem::take(&mut self.records);
        let mut header = self.header(kind, mode, content.len());
        // What does not fit the old header's fields goes into PAX records.
        let mut put = |header: &mut tar::Header, key: &str, at: usize, text: &str| {
            let old = if text.len() > 100 || !text.is_ascii() {
                records.push((key.to_owned(), text.as_bytes().to_vec()));
                "elsewhere"
            } else {
                text
            };
            header.as_mut_bytes()[at..at + old.len()].copy_from_slice(old.as_bytes());
        };
        put(&mut header, "path", 0, name);
        put(&mut header, "linkpath", 157, target);
        if !records.is_empty() {
            let records: Vec<_> = records
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_slice()))
                .collect();
            self.tar.append_pax_extensions(records).unwrap();
        }
        header.set_cksum();
        self.tar.append(&header, content).unwrap();
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.tar.into_inner().unwrap()
    }
}

/// Bytes that do not compress, the same every time.
pub(crate) fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ size as u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(size)
    .collect()
}
