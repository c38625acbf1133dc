use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use futures_util::future::BoxFuture;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::*;
use crate::erofs::{Image, XattrNamespace, write_image};
use crate::fuse::{Content, Session, Tree};
use crate::layer_dir::placement::Placement;
use crate::testing::{self, Inode, Kind, assert_same, of_directory};

/// A layer's content in a file, all there once `read_missing` was called.
struct Lazy {
    data: File,
    present: AtomicBool,
    made: AtomicU32,
}

impl Content for Lazy {
    fn size(&self) -> u64 {
        self.data.metadata().unwrap().len()
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        if self.present.load(Ordering::SeqCst) {
            self.data.read_exact_at(buffer, offset)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn read_missing(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        Box::pin(async move {
            self.made.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(5)).await;
            self.present.store(true, Ordering::SeqCst);
            let mut bytes = vec![0; len];
            self.data.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
    }
}

struct Node {
    directory: TempDir,
    table: TreeTable,
    // Dropped before the runtime that its reads run on.
    session: Option<Session>,
    _runtime: Runtime,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let table = TreeTable::new();
        let trees = Trees::new(table.clone(), Reader::new(runtime.handle().clone()));
        let target = directory.path().join("trees");
        std::fs::create_dir(&target).unwrap();
        let session = Session::mount(trees, &target, "sluice-trees").unwrap();
        Self {
            directory,
            table,
            session: Some(session),
            _runtime: runtime,
        }
    }

    fn add(
        &self,
        number: u64,
        tree: &testing::Tree,
        ns: XattrNamespace,
        present: bool,
    ) -> Arc<Lazy> {
        let toc = tree.toc();
        let placement = Placement::new(&toc);
        let meta = self.directory.path().join(format!("meta-{number}"));
        write_image(&toc, &placement, ns, File::create(&meta).unwrap()).unwrap();
        let data = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.directory.path().join(format!("data-{number}")))
            .unwrap();
        tree.write_data(&toc, &placement, &data);
        let content = Arc::new(Lazy {
            data,
            present: present.into(),
            made: AtomicU32::new(0),
        });
        let image = Image::open(&meta).unwrap();
        self.table.insert(number, Tree::new(image, content.clone()));
        content
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory
            .path()
            .join("trees")
            .join(TreeTable::directory_name(number))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.session.take();
    }
}

#[test]
fn mount_shows_the_trees() {
    let node = Node::new();
    let odd = testing::Tree::odd();
    let mut small = testing::Tree::new();
    small.file("only", 5);
    node.add(0, &odd, XattrNamespace::Trusted, true);
    node.add(7, &small, XattrNamespace::User, true);
    for _ in 0..2 {
        assert_same(
            &odd.expected(XattrNamespace::Trusted),
            &of_directory(&node.path(0)),
        );
        assert_same(
            &small.expected(XattrNamespace::User),
            &of_directory(&node.path(7)),
        );
    }
    let mut layers: Vec<_> = std::fs::read_dir(node.directory.path().join("trees"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    layers.sort();
    assert_eq!(layers, ["0", "7"]);
    assert!(!node.path(1).exists());
    assert!(!node.path(0).join("nothing").exists());
    assert!(!node.path(0).join("nothing").exists());
}

#[test]
fn inode_numbers_do_not_change_with_the_process() {
    let number = |node: &Node| {
        node.add(3, &testing::Tree::odd(), XattrNamespace::Trusted, true);
        std::fs::metadata(node.path(3).join("large")).unwrap().ino()
    };
    let first = number(&Node::new());
    let node = Node::new();
    node.add(1, &testing::Tree::odd(), XattrNamespace::Trusted, true);
    assert_eq!(number(&node), first);
    assert_ne!(
        std::fs::metadata(node.path(1).join("large")).unwrap().ino(),
        first
    );
}

#[test]
fn readers_wait_for_what_is_not_there() {
    let node = Node::new();
    let mut tree = testing::Tree::new();
    tree.file("file", 100_000).file("other", 10);
    let content = node.add(0, &tree, XattrNamespace::Trusted, false);
    // Names and attributes need no content.
    assert_eq!(
        std::fs::metadata(node.path(0).join("file")).unwrap().len(),
        100_000
    );
    assert_eq!(content.made.load(Ordering::SeqCst), 0);
    assert_same(
        &tree.expected(XattrNamespace::Trusted),
        &of_directory(&node.path(0)),
    );
    assert!(content.made.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_removed_layer_is_gone_and_others_stay() {
    let node = Node::new();
    let mut tree = testing::Tree::new();
    tree.file("file", 10);
    node.add(0, &tree, XattrNamespace::Trusted, true);
    node.add(1, &tree, XattrNamespace::Trusted, true);
    assert!(node.path(0).join("file").exists());
    node.table.remove(0);
    assert!(!node.path(0).exists());
    assert!(std::fs::read(node.path(1).join("file")).is_ok());
}

#[test]
fn who_asks_for_a_layer_that_is_being_mended_waits() {
    use rustix::fs::{OFlags, openat};
    let node = Node::new();
    let mut tree = testing::Tree::new();
    tree.file("one", 10).file("other", 10);
    node.add(0, &tree, XattrNamespace::Trusted, true);
    let root = File::open(node.path(0)).unwrap();
    let open = |name: &str| openat(&root, name, OFlags::RDONLY, rustix::fs::Mode::empty());
    for (name, mended) in [("one", true), ("other", false)] {
        node.table.remove(0);
        let expected = node.table.expect(0, Duration::from_secs(600));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| open(name));
            while expected.waiting() == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(!reader.is_finished());
            if mended {
                node.add(0, &tree, XattrNamespace::Trusted, true);
            }
            drop(expected);
            let opened = reader.join().unwrap();
            assert_eq!(opened.err(), (!mended).then_some(rustix::io::Errno::STALE));
        });
    }
    // Nor does anybody wait for ever.
    let _never = node.table.expect(0, Duration::from_millis(10));
    assert_eq!(open("other").unwrap_err(), rustix::io::Errno::STALE);
}

#[test]
fn overlayfs_hides_what_the_layer_deletes() {
    let node = Node::new();
    for (number, ns, option) in [
        (0, XattrNamespace::Trusted, ""),
        (1, XattrNamespace::User, ",userxattr"),
    ] {
        let mut upper = testing::Tree::new();
        upper
            .whiteout("gone")
            .add("opaque", Inode::new(Kind::Directory { opaque: true }))
            .file("opaque/new", 3);
        let mut lower = testing::Tree::new();
        lower
            .file("gone", 1)
            .file("stays", 1)
            .dir("opaque")
            .file("opaque/old", 1);
        node.add(10 + number, &upper, ns, true);
        node.add(20 + number, &lower, ns, true);
        let merged = node.directory.path().join(format!("merged-{number}"));
        std::fs::create_dir(&merged).unwrap();
        let options = format!(
            "lowerdir={}:{}{option}",
            node.path(10 + number).display(),
            node.path(20 + number).display()
        );
        rustix::mount::mount(
            "overlay",
            &merged,
            "overlay",
            rustix::mount::MountFlags::RDONLY,
            &*std::ffi::CString::new(options).unwrap(),
        )
        .unwrap();
        let mut seen: Vec<_> = of_directory(&merged).into_keys().collect();
        crate::mount::unmount(&merged).unwrap();
        seen.retain(|path| !path.is_empty());
        assert_eq!(seen, ["opaque", "opaque/new", "stays"]);
    }
}

#[test]
fn wide_directories_are_listed_whole() {
    let node = Node::new();
    node.add(
        0,
        &testing::Tree::wide(20_000),
        XattrNamespace::Trusted,
        true,
    );
    for _ in 0..2 {
        let names: std::collections::HashSet<_> = std::fs::read_dir(node.path(0).join("wide"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 20_000);
    }
}

#[test]
fn a_damaged_image_gives_errors_and_the_mount_lives() {
    let node = Node::new();
    let wide = testing::Tree::wide(3000);
    let content = node.add(0, &wide, XattrNamespace::Trusted, true);
    node.add(1, &wide, XattrNamespace::Trusted, true);
    let mut bytes = std::fs::read(node.directory.path().join("meta-0")).unwrap();
    bytes[4096..].fill(0xff);
    let damaged = node.directory.path().join("damaged");
    std::fs::write(&damaged, bytes).unwrap();
    node.table
        .insert(0, Tree::new(Image::open(&damaged).unwrap(), content));
    let failed = std::fs::read_dir(node.path(0).join("wide"))
        .and_then(|mut entries| entries.next().unwrap().map(|_| ()));
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(
        std::fs::read_dir(node.path(1).join("wide"))
            .unwrap()
            .count(),
        3000
    );
}

#[test]
fn writing_is_refused() {
    let node = Node::new();
    let mut tree = testing::Tree::new();
    tree.file("file", 10);
    node.add(0, &tree, XattrNamespace::Trusted, true);
    let refused = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
    };
    refused(std::fs::write(node.path(0).join("file"), "x"));
    refused(std::fs::write(node.path(0).join("new"), "x"));
    refused(std::fs::remove_file(node.path(0).join("file")));
}

/// Runs a program as nobody; its output, or `None` when it failed.
fn as_nobody(program: &std::path::Path, arguments: &[&std::path::Path]) -> Option<String> {
    use std::os::unix::process::CommandExt as _;
    let output = std::process::Command::new(program)
        .args(arguments)
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    output.status.success().then_some(text)
}

#[test]
fn set_user_id_capabilities_and_devices_work_as_unpacked() {
    use std::os::unix::fs::PermissionsExt;
    let node = Node::new();
    let program = |name: &str| {
        let bytes = std::fs::read(format!("/usr/bin/{name}")).unwrap();
        Inode::new(Kind::Bytes(bytes)).mode(0o755)
    };
    // cap_dac_read_search+ep.
    let mut capability = testing::CAPABILITY;
    capability[4..8].copy_from_slice(&[4, 0, 0, 0]);
    // user::rw-, user:65534:r--, group::---, mask::r--, other::---.
    let acl = [
        &[
            2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 254, 255, 0, 0,
        ][..],
        &[
            4, 0, 0, 0, 255, 255, 255, 255, 16, 0, 4, 0, 255, 255, 255, 255,
        ],
        &[32, 0, 0, 0, 255, 255, 255, 255],
    ]
    .concat();
    let listed = Inode::new(Kind::Bytes(b"listed".into())).mode(0o640);
    let mut tree = testing::Tree::new();
    tree.add("listed", listed.xattr("system.posix_acl_access", acl));
    tree.add("null", Inode::new(Kind::Char(1, 3)).mode(0o666))
        .add(
            "secret",
            Inode::new(Kind::Bytes(b"secret".into())).mode(0o600),
        )
        .add("cat", program("cat"))
        .add(
            "able-cat",
            program("cat").xattr("security.capability", capability),
        )
        .add("id", program("id"))
        .add("setuid-id", program("id").mode(0o4755));
    node.add(0, &tree, XattrNamespace::Trusted, true);
    let mounts = crate::mount::mounts_below(node.directory.path()).unwrap();
    assert_eq!(mounts.len(), 1);
    assert!(!mounts[0].options.contains("nosuid") && !mounts[0].options.contains("nodev"));

    std::fs::set_permissions(node.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(node.path(0).join("null"), "nothing").unwrap();
    let path = |name: &str| node.path(0).join(name);
    let user = std::path::Path::new("-u");
    assert_eq!(as_nobody(&path("id"), &[user]).unwrap(), "65534\n");
    assert_eq!(as_nobody(&path("setuid-id"), &[user]).unwrap(), "0\n");
    assert_eq!(as_nobody(&path("cat"), &[&path("secret")]), None);
    assert_eq!(
        as_nobody(&path("cat"), &[&path("listed")]).unwrap(),
        "listed"
    );
    assert_eq!(
        as_nobody(&path("able-cat"), &[&path("secret")]).unwrap(),
        "secret"
    );
}
