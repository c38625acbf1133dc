//! An image that holds every odd thing, the same bytes every time.

use std::io::{self, Read};

use anyhow::Result;

use super::{Compression, Image, LayoutWriter, Meta, TAG, Tarball};

/// Small files of the synthetic image.
pub const MANY_FILES: u32 = 100_000;
/// Size of its sparse file.
pub const SPARSE_SIZE: u64 = 1 << 30;

/// Part of the cached name: change it with anything below.
const RECIPE: &str = "synthetic 3";

/// Everything: odd entries, 100,000 small files, a sparse file of 1 GiB, and
/// layers above that remove and replace.
pub fn synthetic() -> Result<Image> {
    Image::cached("synthetic", RECIPE, |dir| {
        let mut layout = LayoutWriter::new(dir)?;
        layout.layer(Compression::Gzip, |to| odd_entries(Tarball::new(to)))?;
        layout.layer(Compression::Gzip, |to| many_files(Tarball::new(to)))?;
        layout.layer(Compression::Gzip, |to| sparse_file(Tarball::new(to)))?;
        layout.layer(Compression::Zstd, |to| changes(Tarball::new(to)))?;
        layout.layer(Compression::None, |to| more_changes(Tarball::new(to)))?;
        layout.finish(TAG, &[])
    })
}

/// The same without the large parts, for tests that need oddness but no size.
pub fn odd() -> Result<Image> {
    Image::cached("odd", RECIPE, |dir| {
        let mut layout = LayoutWriter::new(dir)?;
        layout.layer(Compression::Gzip, |to| odd_entries(Tarball::new(to)))?;
        layout.layer(Compression::Gzip, |to| changes(Tarball::new(to)))?;
        layout.layer(Compression::Gzip, |to| more_changes(Tarball::new(to)))?;
        layout.finish(TAG, &[])
    })
}

/// One layer with the 100,000 small files alone.
pub fn many() -> Result<Image> {
    Image::cached("many", RECIPE, |dir| {
        let mut layout = LayoutWriter::new(dir)?;
        layout.layer(Compression::Gzip, |to| many_files(Tarball::new(to)))?;
        layout.finish(TAG, &[])
    })
}

fn odd_entries(mut tar: Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o644);
    let dir = Meta::mode(0o755);
    tar.dir(".", &dir)?;

    tar.dir("modes", &dir)?;
    for mode in [
        0, 0o400, 0o644, 0o755, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777,
    ] {
        let meta = Meta::mode(mode).owner(1000, 2000);
        tar.file(&format!("modes/file-{mode:o}"), &meta, b"mode\n")?;
        tar.dir(&format!("modes/dir-{mode:o}"), &Meta::mode(mode))?;
    }
    let large = plain.clone().owner(3_000_000, 4_000_000_000);
    tar.file("modes/large-ids", &large, b"ids\n")?;

    tar.dir("sizes", &dir)?;
    for size in [
        0_u64, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, 4_194_303, 4_194_304, 4_194_305,
        9_000_001,
    ] {
        let name = format!("sizes/{size}");
        tar.file_from(&name, &plain, size, &mut Noise(size + 1))?;
        let name = format!("sizes/{size}-zeros");
        tar.file_from(&name, &plain, size, &mut io::repeat(0))?;
    }

    tar.dir("times", &dir)?;
    for (name, seconds, nanoseconds) in [
        ("epoch", 0, 0),
        ("old", 1, 0),
        ("sub-second", 1_600_000_000, 123_456_789),
        ("last-nanosecond", 1_600_000_000, 999_999_999),
        ("after-2038", 4_102_444_800, 0),
    ] {
        let meta = plain.clone().at(seconds, nanoseconds);
        tar.file(&format!("times/{name}"), &meta, b"time\n")?;
        let meta = Meta::mode(0o755).at(seconds, nanoseconds);
        tar.dir(&format!("times/{name}-dir"), &meta)?;
        let meta = Meta::mode(0o777).at(seconds, nanoseconds);
        tar.symlink(&format!("times/{name}-link"), &meta, name)?;
    }

    special_files(&mut tar)?;
    links(&mut tar)?;
    names(&mut tar)?;
    extended_attributes(&mut tar)?;
    to_be_changed(&mut tar)?;
    tar.finish()
}

fn special_files(tar: &mut Tarball<'_>) -> Result<()> {
    tar.dir("special", &Meta::mode(0o755))?;
    let meta = Meta::mode(0o666);
    tar.char_device("special/null", &meta, (1, 3))?;
    tar.char_device("special/large-minor", &meta, (240, 70_000))?;
    tar.block_device("special/loop0", &Meta::mode(0o660).owner(0, 6), (7, 0))?;
    tar.fifo("special/fifo", &Meta::mode(0o600).owner(7, 7))?;
    tar.hardlink(
        "special/fifo-again",
        &Meta::mode(0o600).owner(7, 7),
        "special/fifo",
    )
}

fn links(tar: &mut Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o644);
    let any = Meta::mode(0o777);
    tar.dir("links", &Meta::mode(0o755))?;
    tar.dir("links/elsewhere", &Meta::mode(0o755))?;
    tar.file("links/original", &plain, b"three names\n")?;
    tar.hardlink("links/second", &plain, "links/original")?;
    tar.hardlink("links/elsewhere/third", &plain, "links/original")?;
    // A link to a link, and a large file with two names.
    tar.hardlink("links/fourth", &plain, "links/elsewhere/third")?;
    tar.file_from("links/elsewhere/large", &plain, 5_000_000, &mut Noise(77))?;
    tar.hardlink("links/large", &plain, "links/elsewhere/large")?;
    tar.file("links/empty", &plain, b"")?;
    tar.hardlink("links/empty-again", &plain, "links/empty")?;

    tar.symlink("links/relative", &any, "../links/original")?;
    tar.symlink("links/absolute", &any, "/links/original")?;
    tar.symlink("links/dangling", &any, "nowhere")?;
    tar.symlink("links/loop", &any, "loop")?;
    tar.symlink("links/long", &any, &"d/../".repeat(700))?;
    tar.symlink("links/non-ascii", &any, "naïve/目标/🦀")?;
    tar.symlink("links/of-someone", &any.owner(12, 34), "original")
}

fn names(tar: &mut Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o644);
    tar.dir("names", &Meta::mode(0o755))?;
    let longest = "n".repeat(255);
    for name in [
        longest.as_str(),
        "naïve",
        "目录",
        "🦀",
        "e\u{301}",
        "\u{e9}",
        "with space",
        "with\nline break",
        "with\ttab",
        "back\\slash",
        "quote\"quote'",
        "-dash",
        "...",
        "..three",
        "end.",
        ".hidden",
        "%2e%2e",
        "*?[]",
        ".wh",
        "wh.",
        "stargz.index.json.not",
    ] {
        tar.file(&format!("names/{name}"), &plain, name.as_bytes())?;
    }
    let mut path = "deep".to_owned();
    tar.dir(&path, &Meta::mode(0o755))?;
    for level in 0..80 {
        path += &format!("/level-{level:02}-{}", "x".repeat(20));
        tar.dir(&path, &Meta::mode(0o755))?;
        tar.file(&format!("{path}/file"), &plain, path.as_bytes())?;
    }
    Ok(())
}

fn extended_attributes(tar: &mut Tarball<'_>) -> Result<()> {
    // Revision 2, effective, permitted: CAP_NET_BIND_SERVICE and CAP_NET_RAW.
    let mut capability = vec![0; 20];
    capability[0] = 1;
    capability[3] = 2;
    capability[5] = 0x24;
    let plain = Meta::mode(0o755);
    tar.dir("xattrs", &plain)?;
    let meta = plain.clone().xattr("security.capability", capability);
    tar.file("xattrs/capability", &meta, b"\x7fELF")?;
    let meta = plain.clone().xattr("user.a", "value").xattr("user.b", "");
    tar.file("xattrs/user", &meta, b"user\n")?;
    let meta = plain.clone().xattr("user.binary", [0, 255, b'=', b'\n', 0]);
    tar.file("xattrs/binary", &meta, b"binary\n")?;
    let meta = plain.clone().xattr("user.large", vec![b'x'; 3000]);
    tar.file("xattrs/large", &meta, b"large\n")?;
    let meta = plain.clone().xattr("user.dir", "on a directory");
    tar.dir("xattrs/dir", &meta)?;
    let meta = plain.clone().xattr("trusted.note", "trusted");
    tar.file("xattrs/trusted", &meta, b"trusted\n")?;
    let meta = Meta::mode(0o777).xattr("trusted.on-a-link", "yes");
    tar.symlink("xattrs/link", &meta, "user")?;
    // Many files with the same attribute, which formats may share.
    for number in 0..50 {
        let meta = plain.clone().xattr("user.shared", "the same for all");
        tar.file(&format!("xattrs/shared-{number}"), &meta, b"s")?;
    }
    Ok(())
}

/// What the layers above remove and replace.
fn to_be_changed(tar: &mut Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o644);
    let dir = Meta::mode(0o755);
    tar.dir("changed", &dir)?;
    for name in ["removed", "replaced", "kept", "becomes-dir", "comes-back"] {
        tar.file(&format!("changed/{name}"), &plain, name.as_bytes())?;
    }
    for name in [
        "removed-dir",
        "opaque",
        "becomes-file",
        "becomes-link",
        "merged",
        "twice",
    ] {
        tar.dir(&format!("changed/{name}"), &dir)?;
        tar.dir(&format!("changed/{name}/inner"), &dir)?;
        tar.file(&format!("changed/{name}/inner/file"), &plain, b"inner\n")?;
        tar.file(&format!("changed/{name}/old"), &plain, b"old\n")?;
    }
    tar.symlink("changed/link-becomes-dir", &Meta::mode(0o777), "merged")?;
    tar.hardlink("changed/linked", &plain, "changed/kept")
}

fn changes(mut tar: Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o640).owner(5, 5);
    let dir = Meta::mode(0o750).owner(6, 6).at(1_700_000_000, 0);
    tar.dir(".", &Meta::mode(0o755))?;
    tar.dir("changed", &dir)?;
    tar.whiteout("changed", "removed")?;
    tar.whiteout("changed", "removed-dir")?;
    tar.whiteout("changed", "comes-back")?;
    tar.whiteout("changed", "was-never-there")?;
    tar.file(
        "changed/replaced",
        &plain,
        b"replaced by the second layer\n",
    )?;
    tar.dir("changed/opaque", &dir)?;
    tar.opaque("changed/opaque")?;
    tar.file("changed/opaque/new", &plain, b"new\n")?;
    tar.dir("changed/opaque/inner", &dir)?;
    tar.file("changed/becomes-file", &plain, b"was a directory\n")?;
    tar.symlink("changed/becomes-link", &Meta::mode(0o777), "merged")?;
    tar.dir("changed/becomes-dir", &dir)?;
    tar.file("changed/becomes-dir/file", &plain, b"was a file\n")?;
    tar.dir("changed/link-becomes-dir", &dir)?;
    tar.file("changed/link-becomes-dir/file", &plain, b"was a link\n")?;
    tar.dir("changed/merged", &dir)?;
    tar.file("changed/merged/new", &plain, b"beside the old\n")?;
    tar.whiteout("changed/merged", "old")?;
    tar.dir("changed/twice", &dir)?;
    tar.opaque("changed/twice")?;
    tar.file("changed/twice/second", &plain, b"of the second layer\n")?;
    tar.finish()
}

fn more_changes(mut tar: Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o604).owner(8, 9);
    let dir = Meta::mode(0o711)
        .owner(0, 42)
        .at(1_750_000_000, 500_000_000);
    tar.dir(".", &Meta::mode(0o755))?;
    tar.dir("changed", &dir)?;
    tar.file("changed/comes-back", &plain, b"back again\n")?;
    tar.hardlink("changed/comes-back-too", &plain, "changed/comes-back")?;
    tar.dir("changed/twice", &dir)?;
    tar.opaque("changed/twice")?;
    tar.dir("changed/empty-opaque", &dir)?;
    tar.opaque("changed/empty-opaque")?;
    tar.dir("changed/merged", &dir)?;
    tar.dir("changed/merged/inner", &dir)?;
    tar.whiteout("changed/merged/inner", "file")?;
    tar.finish()
}

fn many_files(mut tar: Tarball<'_>) -> Result<()> {
    let plain = Meta::mode(0o644);
    tar.dir(".", &Meta::mode(0o755))?;
    tar.dir("many", &Meta::mode(0o755))?;
    // One directory with a fifth of them, the others with a thousand each.
    let mut dir = String::new();
    for number in 0..MANY_FILES {
        let one_huge = number < MANY_FILES / 5;
        if number == 0 {
            dir = "many/huge".to_owned();
            tar.dir(&dir, &Meta::mode(0o755))?;
        } else if !one_huge && number % 1000 == 0 {
            dir = format!("many/dir-{:03}", number / 1000);
            tar.dir(&dir, &Meta::mode(0o755))?;
        }
        let content = format!("content of file {number}\n").repeat(1 + (number % 7) as usize);
        tar.file(&format!("{dir}/file-{number}"), &plain, content.as_bytes())?;
    }
    tar.finish()
}

fn sparse_file(mut tar: Tarball<'_>) -> Result<()> {
    tar.dir(".", &Meta::mode(0o755))?;
    tar.dir("sparse", &Meta::mode(0o755))?;
    // Data at the start, across a chunk's border in the middle, at the end.
    let island = 100_000;
    let middle = SPARSE_SIZE / 2 - island / 2;
    let end = SPARSE_SIZE - island;
    let mut content = Noise(1)
        .take(island)
        .chain(io::repeat(0).take(middle - island))
        .chain(Noise(2).take(island))
        .chain(io::repeat(0).take(end - middle - island))
        .chain(Noise(3).take(island));
    tar.file_from("sparse/file", &Meta::mode(0o600), SPARSE_SIZE, &mut content)?;
    tar.finish()
}

/// Bytes that do not compress, the same for the same seed.
#[derive(Debug, Clone)]
pub struct Noise(pub u64);

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for bytes in buffer.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        }
        Ok(buffer.len())
    }
}
