use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use crate::layer_dir::placement::Placement;
use crate::mount;
use crate::testing::{Inode, Kind, Tree, assert_same, of_directory, of_image};

use super::*;

/// A tree's image and data in a directory of their own.
struct Made {
    directory: TempDir,
    summary: Summary,
}

impl Made {
    fn new(tree: &Tree, ns: XattrNamespace) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let toc = tree.toc();
        let placement = Placement::new(&toc);
        let image = File::create(directory.path().join("meta.erofs")).unwrap();
        let summary = write_image(&toc, &placement, ns, image).unwrap();
        let data = File::create(directory.path().join("data")).unwrap();
        tree.write_data(&toc, &placement, &data);
        Self { directory, summary }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn image(&self) -> Image {
        Image::open(&self.path("meta.erofs")).unwrap()
    }

    fn data(&self) -> File {
        File::open(self.path("data")).unwrap()
    }

    fn mount(&self) -> Mounted {
        self.mount_with(mount::erofs::Options::default())
    }

    fn mount_with(&self, options: mount::erofs::Options) -> Mounted {
        let target = self.path("mnt");
        std::fs::create_dir(&target).unwrap();
        mount::erofs::mount(
            &self.path("meta.erofs"),
            &self.path("data"),
            &target,
            options,
        )
        .unwrap();
        Mounted(target)
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        mount::unmount(&self.0).unwrap();
    }
}

fn bytes(tree: &Tree, ns: XattrNamespace) -> Vec<u8> {
    let toc = tree.toc();
    let mut bytes = Vec::new();
    write_image(&toc, &Placement::new(&toc), ns, &mut bytes).unwrap();
    bytes
}

/// Runs a program of erofs-utils, which must be installed.
fn run(program: &str, arguments: &[&OsStr]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} (package erofs-utils): {error}"));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{program}: {text}");
    text
}

fn probe_tree() -> Tree {
    let mut tree = Tree::new();
    tree.add(
        "probe",
        Inode::new(Kind::File { size: 19, seed: 0 }).mtime(0, 0),
    );
    tree.add(
        "",
        Inode::new(Kind::Directory { opaque: false }).mtime(0, 0),
    );
    tree
}

/// The bytes of a tiny image, committed because the probe mounts them. When
/// the format changes, so does the version in the volume's name.
#[test]
fn tiny_image_is_golden() {
    let golden = include_bytes!("../mount/probe.erofs");
    let made = bytes(&probe_tree(), XattrNamespace::Trusted);
    if made != golden {
        let path = std::env::temp_dir().join("probe.erofs");
        std::fs::write(&path, &made).unwrap();
        panic!(
            "the image differs from src/mount/probe.erofs; see {}",
            path.display()
        );
    }
}

#[test]
fn image_shows_the_tree() {
    for ns in [XattrNamespace::Trusted, XattrNamespace::User] {
        let tree = Tree::odd();
        let made = Made::new(&tree, ns);
        let image = made.image();
        assert_same(&tree.expected(ns), &of_image(&image, &made.data()));
        assert_eq!(image.inodes(), made.summary.inodes);
        assert_eq!(
            made.summary.inodes,
            (tree.inodes.len() + tree.whiteouts.len()) as u64
        );
        assert_eq!(
            made.summary.bytes,
            made.path("meta.erofs").metadata().unwrap().len()
        );
    }
}

#[test]
fn kernel_shows_the_tree() {
    let tree = Tree::odd();
    let made = Made::new(&tree, XattrNamespace::Trusted);
    let mounted = made.mount();
    assert_same(
        &tree.expected(XattrNamespace::Trusted),
        &of_directory(&mounted.0),
    );
    let below = mount::mounts_below(made.directory.path()).unwrap();
    assert_eq!(below.len(), 1);
    assert_eq!(below[0].kind, "erofs");
    assert_eq!(below[0].source, made.path("meta.erofs"));
    assert!(!below[0].options.contains("nosuid") && !below[0].options.contains("nodev"));
}

#[test]
fn direct_reads_give_the_same() {
    let tree = Tree::odd();
    let made = Made::new(&tree, XattrNamespace::Trusted);
    let mounted = made.mount_with(mount::erofs::Options {
        direct_io: true,
        ..Default::default()
    });
    assert_same(
        &tree.expected(XattrNamespace::Trusted),
        &of_directory(&mounted.0),
    );
}

#[test]
fn inode_numbers_are_those_of_the_image() {
    use std::os::unix::fs::MetadataExt as _;
    let made = Made::new(&Tree::odd(), XattrNamespace::Trusted);
    let mounted = made.mount();
    let image = made.image();
    for name in ["one", "deep", "link-4095", "xattr-large"] {
        let ino = image.lookup(image.root(), name.as_ref()).unwrap().unwrap();
        let seen = std::fs::symlink_metadata(mounted.0.join(name))
            .unwrap()
            .ino();
        assert_eq!(ino.0, seen, "{name}");
    }
}

#[test]
fn erofs_utils_find_no_fault() {
    for (tree, inodes) in [
        (Tree::new(), 1),
        (probe_tree(), 2),
        (Tree::wide(3000), 3003),
        (Tree::odd(), Tree::odd().inodes.len() + 3),
    ] {
        let made = Made::new(&tree, XattrNamespace::Trusted);
        let (meta, data) = (made.path("meta.erofs"), made.path("data"));
        let mut device = std::ffi::OsString::from("--device=");
        device.push(&data);
        // Level 3 has it say so when all is well.
        let said = run("fsck.erofs", &["-d3".as_ref(), &device, meta.as_ref()]);
        assert!(said.contains("No errors found"), "{said}");
        let said = run("dump.erofs", &["-s".as_ref(), &device, meta.as_ref()]);
        assert!(said.contains(&format!("{inodes}\n")), "{said}");
        assert!(
            said.contains("sluice-1") || !said.contains("volume name"),
            "{said}"
        );
    }
}

/// An independent reader extracts the same content.
#[test]
fn erofs_utils_extract_the_content() {
    let mut tree = Tree::new();
    tree.file("empty", 0).file("one", 1).dir("d");
    tree.file("d/large", 1_234_567).file("d/block", 4096);
    tree.add("link", Inode::new(Kind::Symlink("d/large".into())));
    tree.add(
        "owned",
        Inode::new(Kind::File { size: 9, seed: 9 })
            .mode(0o750)
            .owner(7, 8),
    );
    let made = Made::new(&tree, XattrNamespace::Trusted);
    let target = made.path("extracted");
    let mut device = std::ffi::OsString::from("--device=");
    device.push(made.path("data"));
    let mut extract = std::ffi::OsString::from("--extract=");
    extract.push(&target);
    run(
        "fsck.erofs",
        &[&device, &extract, made.path("meta.erofs").as_ref()],
    );
    let mut expected = tree.expected(XattrNamespace::Trusted);
    let mut actual = of_directory(&target);
    for seen in expected.values_mut().chain(actual.values_mut()) {
        // The tool does not set the time of links.
        if seen.kind == 'l' {
            seen.mtime = (0, 0);
        }
    }
    assert_same(&expected, &actual);
}

#[test]
fn a_hundred_thousand_names_in_one_directory() {
    let tree = Tree::wide(100_000);
    let made = Made::new(&tree, XattrNamespace::Trusted);
    // 32 bytes an inode, as they share one time, and their names.
    assert!(made.summary.bytes < 8 << 20, "{:?}", made.summary);
    let image = made.image();
    let wide = image
        .lookup(image.root(), "wide".as_ref())
        .unwrap()
        .unwrap();
    let all: Vec<_> = image
        .entries(wide, 0)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(all.len(), 100_002);
    assert!(all.is_sorted_by(|a, b| a.name < b.name && a.next < b.next));
    // From any cookie the listing goes on with the next entry.
    for index in (0..all.len() - 1).step_by(997) {
        let next = image.entries(wide, all[index].next).unwrap().next();
        assert_eq!(next.unwrap().unwrap(), all[index + 1]);
    }
    for name in ["file-0", "file-99999", "file-54321"] {
        assert!(image.lookup(wide, name.as_ref()).unwrap().is_some());
    }
    for name in ["", "file-100000", "a", "z", "file-", "\u{1}"] {
        assert_eq!(image.lookup(wide, name.as_ref()).unwrap(), None, "{name}");
    }

    let mounted = made.mount();
    assert_eq!(
        std::fs::read_dir(mounted.0.join("wide")).unwrap().count(),
        100_000
    );
    assert!(mounted.0.join("wide/file-77777").exists());
    assert!(!mounted.0.join("wide/file-100000").exists());
}

#[test]
fn files_up_to_eight_tebibytes() {
    let mut tree = Tree::new();
    let largest = (1 << 43) - 5 * 4096;
    tree.file("a", 5);
    tree.add("huge", Inode::new(Kind::Zeros { size: largest }));
    tree.add("odd", Inode::new(Kind::Zeros { size: 4097 }));
    let toc = tree.toc();
    let mut bytes = Vec::new();
    write_image(
        &toc,
        &Placement::new(&toc),
        XattrNamespace::Trusted,
        &mut bytes,
    )
    .unwrap();
    let image = Image::new(bytes).unwrap();
    let ino = |name: &str| image.lookup(image.root(), name.as_ref()).unwrap().unwrap();
    let extent = image.data_extent(ino("huge")).unwrap().unwrap();
    assert_eq!(extent.size, largest);
    assert_eq!(image.data_size(), Placement::new(&toc).data_size());
}

#[test]
fn kernel_reads_beyond_four_gibibytes() {
    use std::os::unix::fs::FileExt as _;
    let mut tree = Tree::new();
    tree.add("sparse", Inode::new(Kind::Zeros { size: 5 << 30 }));
    tree.file("after", 100);
    let made = Made::new(&tree, XattrNamespace::Trusted);
    let image = made.image();
    let sparse = image
        .lookup(image.root(), "sparse".as_ref())
        .unwrap()
        .unwrap();
    let start = image.data_extent(sparse).unwrap().unwrap().offset;
    let at = (4 << 30) + 12_345;
    File::options()
        .write(true)
        .open(made.path("data"))
        .unwrap()
        .write_all_at(b"far", start + at)
        .unwrap();
    let mounted = made.mount();
    let mut read = [0; 3];
    File::open(mounted.0.join("sparse"))
        .unwrap()
        .read_exact_at(&mut read, at)
        .unwrap();
    assert_eq!(&read, b"far");
}

#[test]
fn overlayfs_hides_what_the_layer_deletes() {
    let scratch = tempfile::tempdir().unwrap();
    let lower = scratch.path().join("lower");
    for path in ["gone", "opaque", "types"] {
        std::fs::create_dir_all(lower.join(path)).unwrap();
    }
    for path in [
        "gone/file",
        "gone/stays",
        "gone-dir",
        "opaque/old",
        "types/gone",
        "under",
    ] {
        std::fs::write(lower.join(path), "lower").unwrap();
    }
    for (ns, option) in [
        (XattrNamespace::Trusted, ""),
        (XattrNamespace::User, ",userxattr"),
    ] {
        let made = Made::new(&Tree::odd(), ns);
        let layer = made.mount();
        let merged = tempfile::tempdir().unwrap();
        let options = format!("lowerdir={}:{}{option}", layer.0.display(), lower.display());
        rustix::mount::mount(
            "overlay",
            merged.path(),
            "overlay",
            rustix::mount::MountFlags::RDONLY,
            &*std::ffi::CString::new(options).unwrap(),
        )
        .unwrap();
        let _unmount = Mounted(merged.path().into());
        let names = |path: &str| -> Vec<String> {
            let mut names: Vec<_> = std::fs::read_dir(merged.path().join(path))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names("gone"), ["stays"]);
        assert_eq!(names("opaque"), ["new"]);
        assert!(!names("types").contains(&"gone".into()));
        assert!(!names("").contains(&"gone-dir".into()));
        assert!(names("").contains(&"under".into()));
        assert!(!merged.path().join("gone/file").exists());
        assert!(!merged.path().join("opaque/old").exists());
        let one = std::fs::read(merged.path().join("one")).unwrap();
        assert_eq!(one, std::fs::read(layer.0.join("one")).unwrap());
    }
}

#[test]
fn kernel_tells_file_capabilities() {
    let made = Made::new(&Tree::odd(), XattrNamespace::Trusted);
    let mounted = made.mount();
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(
        mounted.0.join("capable"),
        "security.capability",
        &mut value[..],
    )
    .unwrap();
    assert_eq!(value[..length], crate::testing::CAPABILITY);
}

#[test]
fn device_numbers_are_the_kernels() {
    for (device, encoded) in [
        ((1, 3), 0x103),
        ((8, 300), 0x10_082c),
        ((4095, 1_048_575), !0),
    ] {
        assert_eq!(format::encode_device(device.0, device.1), Some(encoded));
        assert_eq!(format::decode_device(encoded), device);
    }
    assert_eq!(format::encode_device(4096, 0), None);
    assert_eq!(format::encode_device(0, 1 << 20), None);
}

#[test]
fn a_failing_output_is_an_error() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(28))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let toc = Tree::odd().toc();
    let result = write_image(&toc, &Placement::new(&toc), XattrNamespace::Trusted, Full);
    assert!(matches!(result, Err(Error::Write(_))));
}

#[test]
fn another_file_is_no_image() {
    let message = |bytes: &[u8]| Image::new(bytes).unwrap_err().to_string();
    assert!(message(b"").contains("shorter"));
    assert!(message(&[0; 8192]).contains("no superblock"));
    let mut image = bytes(&Tree::odd(), XattrNamespace::Trusted);
    assert!(message(&image[..8192]).contains("truncated"));
    image[1024 + 66] ^= 1;
    assert!(message(&image).contains("checksum"));
    let missing = Image::open(Path::new("/nonexistent/meta.erofs")).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/meta.erofs"));
}

/// Reads all there is, whatever errors come.
fn exhaust<B: AsRef<[u8]>>(image: &Image<B>, last: u64) {
    let mut read = 0_usize;
    for nid in 0..last {
        let ino = Ino(nid);
        let _ = image.attributes(ino);
        let _ = image.data_extent(ino);
        read += image.symlink_target(ino).map_or(0, <[u8]>::len);
        let _ = image.lookup(ino, "one".as_ref());
        if let Ok(entries) = image.entries(ino, 0) {
            read += entries.take(1000).filter_map(Result::ok).count();
        }
        let _ = image.entries(ino, u64::MAX).map(Iterator::count);
        if let Ok(xattrs) = image.xattrs(ino) {
            read += xattrs.filter_map(Result::ok).count();
        }
    }
    for nid in [u64::MAX, u64::MAX / 32, u64::MAX / 32 - 1, 1 << 40] {
        assert!(image.attributes(Ino(nid)).is_err());
    }
    std::hint::black_box(read);
}

fn arbitrary_tree() -> impl Strategy<Value = Tree> {
    let inode = (
        0..8_u32,
        0..0o10000_u16,
        prop_oneof![0..3_u32, any::<u32>()],
        prop_oneof![
            Just((1_600_000_000, 0)),
            (-2_000_000_000..9_000_000_000_i64, 0..1_000_000_000_u32)
        ],
        prop::collection::btree_map(
            "user\\.[a-z]{1,9}",
            prop::collection::vec(any::<u8>(), 0..400),
            0..3,
        ),
        0..20_000_u64,
    );
    let name = prop_oneof!["[a-c]", "[ -.0-~]{1,12}", "[a-z]{200,255}"];
    prop::collection::vec((any::<prop::sample::Index>(), name, inode), 0..150).prop_map(|parts| {
        let mut tree = Tree::new();
        let mut directories = vec![String::new()];
        let mut files = Vec::new();
        for (parent, name, (kind, mode, id, mtime, xattrs, size)) in parts {
            if name == "." || name == ".." || name.starts_with(".wh.") {
                continue;
            }
            let parent = &directories[parent.index(directories.len())];
            let path = if parent.is_empty() {
                name
            } else {
                format!("{parent}/{name}")
            };
            if tree.inodes.contains_key(&path) || tree.links.contains_key(&path) {
                continue;
            }
            let device = (id % 4096, size as u32);
            let kind = match kind {
                0 | 1 => Kind::Directory {
                    opaque: size % 5 == 0,
                },
                2 => Kind::Symlink("s".repeat(size as usize % 4095 + 1)),
                3 => Kind::Char(device.0 | 1, device.1),
                4 => Kind::Block(device.0, device.1),
                5 if !files.is_empty() => {
                    let target: &String = &files[size as usize % files.len()];
                    tree.link(path, target);
                    continue;
                }
                6 => Kind::File { size: 0, seed: 0 },
                _ => Kind::File {
                    size,
                    seed: id.into(),
                },
            };
            // Links have no mode of their own.
            let mode = match kind {
                Kind::Symlink(_) => 0o777,
                _ => mode,
            };
            let plain = !matches!(kind, Kind::Directory { .. } | Kind::File { .. });
            match kind {
                Kind::Directory { .. } => directories.push(path.clone()),
                _ => files.push(path.clone()),
            }
            tree.add(
                path,
                Inode {
                    kind,
                    mode,
                    uid: id,
                    gid: id / 2,
                    mtime,
                    // `user.*` is for files and directories.
                    xattrs: if plain { Default::default() } else { xattrs },
                },
            );
        }
        tree
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tree_is_read_as_it_was_written(tree in arbitrary_tree()) {
        let made = Made::new(&tree, XattrNamespace::Trusted);
        assert_same(
            &tree.expected(XattrNamespace::Trusted),
            &of_image(&made.image(), &made.data()),
        );
        let again = bytes(&tree, XattrNamespace::Trusted);
        prop_assert!(again == std::fs::read(made.path("meta.erofs")).unwrap());
    }

    #[test]
    fn a_damaged_image_never_panics(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..400),
    ) {
        let mut image = bytes(&small_odd(), XattrNamespace::Trusted);
        // Beyond the first block no checksum would notice.
        for (at, byte) in damage {
            let at = 1280 + at.index(image.len() - 1280);
            image[at] = byte;
        }
        let sum = format::crc32c(&{
            let mut head = image[1024..4096].to_vec();
            head[4..8].fill(0);
            head
        });
        image[1028..1032].copy_from_slice(&sum.to_le_bytes());
        let last = image.len() as u64 / 32;
        if let Ok(image) = Image::new(image) {
            exhaust(&image, last);
        }
    }
}

fn small_odd() -> Tree {
    let mut tree = Tree::new();
    tree.file("one", 1).dir("d").dir("d/e").file("d/e/f", 5000);
    tree.add("l", Inode::new(Kind::Symlink("x".repeat(3000))));
    tree.add("l2", Inode::new(Kind::Symlink("x".repeat(4095))));
    for name in ["x", "y"] {
        let inode = Inode::new(Kind::File { size: 1, seed: 1 });
        tree.add(name, inode.xattr("user.a", "b").xattr("user.c", name));
    }
    tree.add("z", Inode::new(Kind::Char(1, 3)).owner(1 << 20, 1 << 20));
    for index in 0..300 {
        tree.file(format!("d/file-{index}"), 0);
    }
    tree
}
