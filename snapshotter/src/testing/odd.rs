//! A tree with every odd thing.

use super::model::{Inode, Kind, Tree};

/// A `security.capability` value: cap_net_raw+ep, revision 2.
pub(crate) const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// A valid `system.posix_acl_access` value: user::rw-, user:1000:r--,
/// group::r--, mask::r--, other::r--.
const ACL: [u8; 44] = [
    2, 0, 0, 0, // version
    1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff, //
    2, 0, 4, 0, 0xe8, 3, 0, 0, //
    4, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, //
    0x10, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, //
    0x20, 0, 4, 0, 0xff, 0xff, 0xff, 0xff,
];

impl Tree {
    pub(crate) fn odd() -> Self {
        let mut tree = Self::new();
        let new = Inode::new;
        let file = |size, seed| new(Kind::File { size, seed });
        tree.add("", new(Kind::Directory { opaque: false }).mtime(5, 6));
        tree.file("empty", 0)
            .file("one", 1)
            .file("block", 4096)
            .file("block+1", 4097)
            .file("large", 1_234_567);
        tree.add("suid", file(10, 1).mode(0o6755).owner(1000, 100_000))
            .add("sub-second", file(10, 2).mtime(1_700_000_000, 123_456_789))
            .add(
                "before-1970",
                file(10, 3).mtime(-86_400 * 365 * 3, 500_000_000),
            )
            .add("far-future", file(10, 4).mtime(10_000_000_000, 999_999_999))
            .add("big-owner", file(10, 5).owner(4_000_000_000, 3_999_999_999))
            .add(
                "capable",
                file(10, 6)
                    .mode(0o755)
                    .xattr("security.capability", CAPABILITY),
            )
            .add("acl", file(10, 7).xattr("system.posix_acl_access", ACL));
        let mut many = file(10, 8);
        for index in 0..40 {
            many = many.xattr(
                &format!("user.name-{index:03}"),
                vec![index; index as usize],
            );
        }
        tree.add("xattrs", many)
            .add(
                "xattr-large",
                file(10, 9).xattr("user.large", vec![0xa5; 60_000]),
            )
            .add("xattr-empty", file(10, 10).xattr("user.empty", ""))
            .add(
                "xattr-long-name",
                file(0, 11).xattr(&format!("user.{}", "n".repeat(250)), "v"),
            );
        tree.dir("labelled");
        for index in 0..50 {
            let label = file(5, index).xattr("security.selinux", "system_u:object_r:bin_t:s0");
            tree.add(format!("labelled/{index}"), label);
        }
        tree.dir("types")
            .add("types/char", new(Kind::Char(1, 3)).mode(0o666))
            .add(
                "types/char-large",
                new(Kind::Char(4095, 1_048_575)).mode(0o600),
            )
            .add(
                "types/block",
                new(Kind::Block(8, 300)).mode(0o660).owner(0, 6),
            )
            .add("types/fifo", new(Kind::Fifo).mode(0o620))
            .add(
                "types/sticky",
                new(Kind::Directory { opaque: false }).mode(0o1777),
            );
        tree.add("link", new(Kind::Symlink("one".into())))
            .add(
                "link-absolute",
                new(Kind::Symlink("/etc/../one".into())).owner(5, 6),
            )
            .add(
                "link-dangling",
                new(Kind::Symlink("nowhere".into())).mtime(-5, 1),
            );
        for length in [
            255, 1000, 3000, 4000, 4031, 4032, 4033, 4063, 4064, 4065, 4095,
        ] {
            let target = "t/".repeat(length / 2) + &"x".repeat(length % 2);
            tree.add(format!("link-{length}"), new(Kind::Symlink(target)));
        }
        tree.dir("hard").dir("hard/other");
        tree.link("hard/b", "one")
            .link("hard/other/c", "one")
            .link("a-hard", "suid");
        tree.link("types/fifo-2", "types/fifo");
        let mut deep = String::from("deep");
        tree.dir(&deep);
        for _ in 0..300 {
            deep += "/d";
            tree.dir(&deep);
        }
        tree.file(format!("{deep}/bottom"), 100);
        tree.dir("names");
        for name in [
            "!before-dot",
            "-",
            " ",
            "\u{1}",
            "...",
            "..a",
            ".a",
            "a b\tc\nd",
            "\\040",
            "ünïcødé-名前-🦀",
            "comma,",
            "semi;colon:",
            "\u{10ffff}",
        ] {
            tree.file(format!("names/{name}"), 3);
        }
        tree.file(format!("names/{}", "n".repeat(255)), 3);
        tree.dir("long-names");
        for index in 0..100 {
            tree.file(format!("long-names/{index:0255}"), 2);
        }
        // Directories whose entries just fill a block and just do not.
        for count in 100..140 {
            tree.dir(format!("fill-{count}"));
            for index in 0..count {
                tree.file(format!("fill-{count}/{index:019}"), 0);
            }
        }
        tree.dir("gone")
            .whiteout("gone/file")
            .whiteout("gone-dir")
            .whiteout("types/gone");
        tree.add("opaque", new(Kind::Directory { opaque: true }))
            .file("opaque/new", 7)
            .add(
                "opaque-labelled",
                new(Kind::Directory { opaque: true }).xattr("user.a", "b"),
            );
        tree
    }

    /// One directory of `count` empty files besides one with content.
    pub(crate) fn wide(count: usize) -> Self {
        let mut tree = Self::new();
        tree.dir("wide");
        for index in 0..count {
            tree.file(format!("wide/file-{index}"), 0);
        }
        tree.file("last", 10);
        tree
    }
}
