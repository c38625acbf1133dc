//! Names, the directories that they make, and whiteouts.

use super::*;

#[test]
fn missing_parents_are_made_and_later_entries_describe_them() {
    let toc = read(&[
        "{'name':'a/b/c','type':'fifo','mode':420}",
        "{'name':'a/','type':'dir','mode':448,'uid':5,'xattrs':{'user.x':''}}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        [
            "/ dir 755 0:0 3",
            "/a dir 700 5:0 3",
            "/a/b dir 755 0:0 2",
            "/a/b/c fifo 644 0:0 1"
        ]
    );
    assert_eq!(lookup(&toc, "a").xattrs.len(), 1);
}

#[test]
fn directories_precede_their_subdirectories() {
    let toc = read(&[
        "{'name':'a/b/c/','type':'dir'}",
        "{'name':'z','type':'fifo'}",
        "{'name':'z/','type':'dir'}",
        "{'name':'z/y/','type':'dir'}",
        "{'name':'a/b/d/e','type':'fifo'}",
    ])
    .unwrap();
    for (index, node) in toc.nodes().iter().enumerate() {
        if let NodeKind::Directory(directory) = &node.kind {
            assert!(directory.parent.index() < index || index == 0);
            for child in &directory.children {
                if let NodeKind::Directory(below) = &toc.node(child.node).kind {
                    assert!(child.node.index() > index);
                    assert_eq!(below.parent.index(), index);
                }
            }
        }
    }
}

#[test]
fn of_equal_names_the_last_wins() {
    let toc = read(&[
        "{'name':'f','type':'reg','mode':420,'size':1,'offset':10,'digest':'@x'}",
        "{'name':'./f','type':'reg','mode':384,'size':1,'offset':20,'digest':'@y'}",
        "{'name':'d/below/far','type':'reg','size':1,'offset':30,'digest':'@z'}",
        "{'name':'d','type':'fifo','mode':1}",
        "{'name':'e','type':'fifo'}",
        "{'name':'e/','type':'dir','mode':1}",
        "{'name':'e/x','type':'fifo','mode':1}",
        "{'name':'g/x','type':'fifo','mode':1}",
        "{'name':'g','type':'dir','mode':2}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        [
            "/ dir 755 0:0 4",
            "/d fifo 1 0:0 1",
            "/e dir 1 0:0 2",
            "/e/x fifo 1 0:0 1",
            "/f reg 1 600 0:0 1",
            "/g dir 2 0:0 2",
            "/g/x fifo 1 0:0 1",
        ]
    );
    // What was replaced leaves neither inode nor chunk, but still bounds units.
    assert_eq!(toc.nodes().len(), 7);
    assert_eq!(toc.chunks().len(), 1);
    assert_eq!(chunks(&toc, "f")[0].digest, Digest::of(b"y"));
    assert_eq!(unit(&chunks(&toc, "f")[0]), (20, 10, 0));
}

#[test]
fn a_directory_that_came_back_is_empty() {
    let toc = read(&[
        "{'name':'d/old','type':'fifo'}",
        "{'name':'d','type':'symlink','linkName':'x'}",
        "{'name':'d/','type':'dir'}",
        "{'name':'d/new','type':'fifo','mode':1}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        ["/ dir 755 0:0 3", "/d dir 0 0:0 2", "/d/new fifo 1 0:0 1"]
    );
}

#[test]
fn directories_merge_their_xattrs() {
    let toc = read(&[
        "{'name':'d','type':'dir','xattrs':{'user.a':'MQ==','user.b':'MQ=='}}",
        "{'name':'d','type':'dir','xattrs':{'user.b':'Mg==','user.c':'Mg=='}}",
    ])
    .unwrap();
    let values: Vec<_> = lookup(&toc, "d")
        .xattrs
        .iter()
        .map(|xattr| xattr.value[0])
        .collect();
    assert_eq!(values, *b"122");
}

#[test]
fn endless_merging_of_xattrs_is_refused() {
    let many: Vec<_> = (0..4000).map(|name| format!("'user.{name}':''")).collect();
    let first = format!(
        "{{'name':'d','type':'dir','xattrs':{{{}}}}}",
        many.join(",")
    );
    let again = "{'name':'d','type':'dir','xattrs':{'user.0':''}}";
    let plain = "{'name':'d','type':'dir'}";
    let times = |entry, times| [&[&*first][..], &vec![entry; times]].concat();
    assert!(read(&times(again, 200)).is_ok());
    assert_eq!(refusal(&times(again, 300)), EntryError::XattrMerges);
    let toc = read(&times(plain, 1000)).unwrap();
    assert_eq!(lookup(&toc, "d").xattrs.len(), 4000);
}

#[test]
fn the_root_keeps_what_unpacking_gives_it() {
    let toc = read(&[
        "{'name':'./','type':'dir','mode':448,'uid':7,'modtime':'2024-01-01T00:00:00Z'}",
        "{'name':'a','type':'fifo'}",
    ])
    .unwrap();
    assert_eq!(tree(&toc)[0], "/ dir 755 0:0 2");
    assert_eq!(toc.nodes()[0].mtime.secs, 1_704_067_200);
    for kind in ["reg", "symlink", "hardlink", "char"] {
        let entry = format!("{{'name':'/','type':'{kind}','linkName':'a'}}");
        assert_eq!(refusal(&[&entry]), EntryError::RootNotADirectory);
    }
}

#[test]
fn paths_never_leave_the_layer() {
    for name in ["../etc/passwd", "a/../../b", "a/..", "..", "/../a"] {
        let entry = format!("{{'name':'{name}','type':'fifo'}}");
        assert_eq!(refusal(&[&entry]), EntryError::ParentTraversal, "{name}");
        let link = format!("{{'name':'x','type':'hardlink','linkName':'{name}'}}");
        assert_eq!(refusal(&[&link]), EntryError::ParentTraversal, "{name}");
    }
    let toc = read(&["{'name':'/etc//./passwd','type':'fifo','mode':1}"]).unwrap();
    assert_eq!(tree(&toc)[2], "/etc/passwd fifo 1 0:0 1");
}

#[test]
fn paths_through_anything_but_directories_are_refused() {
    for entry in [
        "{'name':'lib','type':'symlink','linkName':'usr/lib'}",
        "{'name':'lib','type':'reg'}",
        "{'name':'lib','type':'char','devMajor':1}",
        "{'name':'lib','type':'hardlink','linkName':'later'}",
    ] {
        let reason = refusal(&[entry, "{'name':'lib/x/y','type':'fifo'}"]);
        assert_eq!(reason, EntryError::NotADirectory("lib".to_owned()));
    }
    let reason = refusal(&[
        "{'name':'a/b','type':'fifo'}",
        "{'name':'a/b/c/d','type':'fifo'}",
    ]);
    assert_eq!(reason, EntryError::NotADirectory("a/b".to_owned()));
}

#[test]
fn names_that_no_file_system_takes_are_refused() {
    let long = "x".repeat(256);
    let deep = "x/".repeat(2100);
    for (name, expected) in [
        (&*long, EntryError::NameTooLong),
        (&*deep, EntryError::PathTooLong),
        (r"a\u0000b", EntryError::NameNul),
    ] {
        let entry = format!("{{'name':'{name}','type':'fifo'}}");
        assert_eq!(refusal(&[&entry]), expected);
    }
}

#[test]
fn whiteouts_and_opaque_directories_are_translated() {
    let toc = read(&[
        "{'name':'a/.wh.gone','type':'reg','uid':3}",
        "{'name':'a/.wh.gone','type':'reg'}",
        "{'name':'b/','type':'dir','mode':448}",
        "{'name':'b/.wh..wh..opq','type':'reg'}",
        "{'name':'b/.wh..wh.plnk','type':'reg'}",
        "{'name':'c/.wh..wh..opq','type':'reg'}",
        "{'name':'c','type':'dir','mode':448}",
        "{'name':'.wh..wh..opq','type':'reg','size':1,'offset':5,'digest':'@x'}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        [
            "/ dir! 755 0:0 5",
            "/a dir 755 0:0 2",
            "/a/gone char 0:0 0 3:0 1",
            "/b dir! 700 0:0 2",
            "/b/.wh.plnk char 0:0 0 0:0 1",
            "/c dir! 700 0:0 2",
        ]
    );
    assert_eq!(toc.chunks(), []);
}

#[test]
fn a_whiteout_hides_only_what_is_below() {
    for entries in [
        [
            "{'name':'.wh.x','type':'reg'}",
            "{'name':'x','type':'fifo','mode':1}",
        ],
        [
            "{'name':'x','type':'fifo','mode':1}",
            "{'name':'.wh.x','type':'reg'}",
        ],
    ] {
        assert_eq!(
            tree(&read(&entries).unwrap()),
            ["/ dir 755 0:0 2", "/x fifo 1 0:0 1"]
        );
    }
    let toc = read(&[
        "{'name':'.wh.x','type':'reg'}",
        "{'name':'x/y','type':'fifo','mode':1}",
    ]);
    assert_eq!(tree(&toc.unwrap())[1], "/x dir 755 0:0 2");
}

#[test]
fn whiteouts_of_nothing_are_refused() {
    for name in [".wh.", "a/.wh..", "a/.wh...", ".wh.d/x", ".wh..wh..opq/x"] {
        let entry = format!("{{'name':'{name}','type':'reg'}}");
        assert_eq!(refusal(&[&entry]), EntryError::WhiteoutName, "{name}");
    }
}
