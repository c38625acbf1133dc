//! Trees and refusals, case by case. Random ones are in `tests/model.rs`.

use super::*;

const END: u64 = 1_000_000;

/// JSON with single quotes for double ones; `@x` is the digest of `x`.
fn json(entries: &[&str]) -> Vec<u8> {
    let mut json = format!("{{'version':1,'entries':[{}]}}", entries.join(",")).replace('\'', "\"");
    while let Some(at) = json.find('@') {
        let digest = Digest::of(&json.as_bytes()[at + 1..at + 2]);
        json.replace_range(at..at + 2, &digest.to_string());
    }
    json.into_bytes()
}

fn read_with(entries: &[&str], limits: &Limits) -> Result<Toc, TocError> {
    let json = json(entries);
    read_toc_json(Format::Estargz, END, &json, &Digest::of(&json), limits)
}

fn read(entries: &[&str]) -> Result<Toc, TocError> {
    read_with(entries, &Limits::default())
}

/// The reason for which the last entry of the list is refused.
fn refusal(entries: &[&str]) -> EntryError {
    match read(entries).unwrap_err() {
        TocError::Entry { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

/// `path kind mode uid:gid links` of everything, sorted by path.
fn tree(toc: &Toc) -> Vec<String> {
    fn walk(toc: &Toc, id: NodeId, path: &str, lines: &mut Vec<String>) {
        let node = toc.node(id);
        let kind = match &node.kind {
            NodeKind::Directory(directory) if directory.opaque => "dir!".to_owned(),
            NodeKind::Directory(_) => "dir".to_owned(),
            NodeKind::Regular(content) => format!("reg {}", content.size),
            NodeKind::Symlink(target) => format!("-> {}", String::from_utf8_lossy(target)),
            NodeKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
            NodeKind::BlockDevice { major, minor } => format!("block {major}:{minor}"),
            NodeKind::Fifo => "fifo".to_owned(),
        };
        let Node {
            mode,
            uid,
            gid,
            links,
            ..
        } = node;
        let path_shown = if path.is_empty() { "/" } else { path };
        lines.push(format!("{path_shown} {kind} {mode:o} {uid}:{gid} {links}"));
        if let NodeKind::Directory(directory) = &node.kind {
            for child in &directory.children {
                let path = format!("{path}/{}", String::from_utf8_lossy(&child.name));
                walk(toc, child.node, &path, lines);
            }
        }
    }
    let mut lines = Vec::new();
    walk(toc, NodeId::ROOT, "", &mut lines);
    lines
}

fn lookup<'a>(toc: &'a Toc, path: &str) -> &'a Node {
    let id = path.split('/').fold(NodeId::ROOT, |at, name| {
        let NodeKind::Directory(directory) = &toc.node(at).kind else {
            panic!("{path}")
        };
        let children = &directory.children;
        let found = children
            .binary_search_by(|child| (*child.name).cmp(name.as_bytes()))
            .unwrap_or_else(|_| panic!("no {path}"));
        children[found].node
    });
    toc.node(id)
}

fn chunks<'a>(toc: &'a Toc, path: &str) -> &'a [Chunk] {
    let NodeKind::Regular(content) = &lookup(toc, path).kind else {
        panic!("{path}")
    };
    &toc.chunks()[content.chunks.start as usize..content.chunks.end as usize]
}

fn unit(chunk: &Chunk) -> (u64, u64, u64) {
    match chunk.source {
        ChunkSource::Blob { unit, inner_offset } => (unit.offset, unit.size, inner_offset),
        ChunkSource::Zeros => panic!("zeros"),
    }
}

#[test]
fn an_empty_toc_is_an_empty_root() {
    let expected = ["/ dir 755 0:0 2"];
    assert_eq!(tree(&read(&[]).unwrap()), expected);
    let json = br#"{"entries":null,"version":1}"#;
    let toc = read_toc_json(
        Format::Estargz,
        END,
        json,
        &Digest::of(json),
        &Limits::default(),
    );
    assert_eq!(tree(&toc.unwrap()), expected);
}

#[test]
fn every_kind_is_read() {
    let toc = read(&[
        "{'name':'d/','type':'dir','mode':17901,'uid':1,'gid':2,'modtime':'2024-01-01T00:00:00.25Z'}",
        "{'name':'d/f','type':'reg','mode':36333,'size':1,'offset':10,'digest':'@x'}",
        "{'name':'d/empty','type':'reg','mode':420}",
        "{'name':'d/s','type':'symlink','linkName':'../x','mode':420}",
        "{'name':'d/c','type':'char','devMajor':4095,'devMinor':1048575,'mode':438}",
        "{'name':'d/b','type':'block','devMajor':8,'devMinor':1,'mode':432}",
        "{'name':'d/p','type':'fifo','mode':384,'xattrs':{'user.a':'','security.b':'eA=='}}",
        "{'name':'d/e/','type':'dir','mode':448,'xattrs':{'user.b':'eA==','user.a':''}}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        [
            "/ dir 755 0:0 3",
            "/d dir 2755 1:2 3",
            "/d/b block 8:1 660 0:0 1",
            "/d/c char 4095:1048575 666 0:0 1",
            "/d/e dir 700 0:0 2",
            "/d/empty reg 0 644 0:0 1",
            "/d/f reg 1 6755 0:0 1",
            "/d/p fifo 600 0:0 1",
            "/d/s -> ../x 777 0:0 1",
        ]
    );
    let expected = Mtime {
        secs: 1_704_067_200,
        nanos: 250_000_000,
    };
    assert_eq!(lookup(&toc, "d").mtime, expected);
    assert_eq!(lookup(&toc, "d/f").mtime, Mtime::default());
    let names = |path| -> Vec<Box<[u8]>> {
        lookup(&toc, path)
            .xattrs
            .iter()
            .map(|xattr| xattr.name.clone())
            .collect()
    };
    assert_eq!(names("d/e"), [Box::from(*b"user.a"), Box::from(*b"user.b")]);
    assert_eq!(names("d/p"), [Box::from(*b"security.b")]);
}

#[test]
fn names_are_bytes_and_escapes_are_undone() {
    let mut json = json(&[
        r"{'name':'\u00fc\ud83d\ude00 \u003cx\u003e','type':'fifo'}",
        r"{'name':'RAW','type':'symlink','linkName':'a\\b\u0001'}",
    ]);
    let at = json.windows(3).position(|bytes| bytes == b"RAW").unwrap();
    json[at..at + 3].copy_from_slice(b"\xff\xfe\x80");
    let toc = read_toc_json(
        Format::Estargz,
        END,
        &json,
        &Digest::of(&json),
        &Limits::default(),
    );
    let toc = toc.unwrap();
    let NodeKind::Directory(root) = &toc.nodes()[0].kind else {
        panic!()
    };
    let names: Vec<&[u8]> = root.children.iter().map(|child| &*child.name).collect();
    assert_eq!(names, ["ü😀 <x>".as_bytes(), b"\xff\xfe\x80"]);
    let target = NodeKind::Symlink(Box::from(*b"a\\b\x01"));
    assert_eq!(toc.node(root.children[1].node).kind, target);
}

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
fn unknown_types_are_refused() {
    for kind in ["sock", "socket", "", "REG", "whiteout", r"a\nb"] {
        let reason = refusal(&[&format!("{{'name':'x','type':'{kind}'}}")]);
        assert!(matches!(&reason, EntryError::UnknownType(_)), "{kind}");
        assert!(!reason.to_string().contains('\n'));
    }
    assert_eq!(
        refusal(&["{'name':'x'}"]),
        EntryError::UnknownType(String::new())
    );
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

#[test]
fn hard_links_share_an_inode() {
    let toc = read(&[
        "{'name':'b/late','type':'hardlink','linkName':'c/second'}",
        "{'name':'a/file','type':'reg','mode':420,'size':1,'offset':10,'digest':'@x'}",
        "{'name':'b/first','type':'hardlink','linkName':'./a/file','mode':384,'uid':9}",
        "{'name':'c/second','type':'hardlink','linkName':'/b/first','mode':384,'uid':9}",
        "{'name':'s','type':'symlink','linkName':'t'}",
        "{'name':'s2','type':'hardlink','linkName':'s','mode':1}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        [
            "/ dir 755 0:0 5",
            "/a dir 755 0:0 2",
            "/a/file reg 1 600 9:0 4",
            "/b dir 755 0:0 2",
            "/b/first reg 1 600 9:0 4",
            "/b/late reg 1 600 9:0 4",
            "/c dir 755 0:0 2",
            "/c/second reg 1 600 9:0 4",
            "/s -> t 777 0:0 2",
            "/s2 -> t 777 0:0 2",
        ]
    );
    assert_eq!(toc.nodes().len(), 6);
}

#[test]
fn a_hard_link_outlives_the_name_it_was_made_from() {
    let toc = read(&[
        "{'name':'a/file','type':'reg','mode':1,'size':1,'offset':10,'digest':'@x'}",
        "{'name':'kept','type':'hardlink','linkName':'a/file','mode':1}",
        "{'name':'a','type':'fifo','mode':1}",
    ])
    .unwrap();
    assert_eq!(
        tree(&toc),
        ["/ dir 755 0:0 2", "/a fifo 1 0:0 1", "/kept reg 1 1 0:0 1"]
    );
    assert_eq!(chunks(&toc, "kept").len(), 1);
}

#[test]
fn hard_links_that_lead_nowhere_are_refused() {
    let link = |name: &str, target: &str| {
        format!("{{'name':'{name}','type':'hardlink','linkName':'{target}'}}")
    };
    for target in ["nothing", "d/nothing", "", "d"] {
        let reason = refusal(&["{'name':'d','type':'dir'}", &link("x", target)]);
        let expected = match target {
            "d" | "" => EntryError::HardLinkToDirectory(target.to_owned()),
            _ => EntryError::HardLinkMissing(target.to_owned()),
        };
        assert_eq!(reason, expected, "{target}");
    }
    let reason = refusal(&[&link("x", "d"), "{'name':'d/y','type':'fifo'}"]);
    assert_eq!(reason, EntryError::HardLinkToDirectory("d".to_owned()));
}

#[test]
fn circles_of_hard_links_are_refused() {
    let link = |name: usize, target: usize| {
        format!("{{'name':'{name}','type':'hardlink','linkName':'{target}'}}")
    };
    for length in [1, 2, 3, 100] {
        let entries: Vec<_> = (0..length)
            .map(|name| link(name, (name + 1) % length))
            .collect();
        let entries: Vec<_> = entries.iter().map(String::as_str).collect();
        assert!(
            matches!(refusal(&entries), EntryError::HardLinkCycle(_)),
            "{length}"
        );
    }
    // A long chain of links to later names, with an end, is no circle.
    let mut entries: Vec<_> = (0..2000).map(|name| link(name, name + 1)).collect();
    entries.push("{'name':'2000','type':'fifo','mode':1}".to_owned());
    let entries: Vec<_> = entries.iter().map(String::as_str).collect();
    let toc = read(&entries).unwrap();
    assert_eq!(toc.nodes().len(), 2);
    assert_eq!(toc.nodes()[1].links, 2001);
}

#[test]
fn chunks_of_all_dialects_are_read() {
    let toc = read(&[
        // stargz-snapshotter: the last chunk has no size.
        "{'name':'a','type':'reg','size':25,'offset':100,'digest':'@w','chunkSize':10,'chunkDigest':'@a'}",
        "{'name':'a','type':'chunk','offset':200,'chunkOffset':10,'chunkSize':10,'chunkDigest':'@b'}",
        "{'name':'a','type':'chunk','offset':300,'chunkOffset':20,'chunkDigest':'@c'}",
        // containers/storage: no chunk digest for a single chunk, an end, holes.
        "{'name':'b','type':'reg','size':5,'offset':400,'endOffset':450,'digest':'@d'}",
        "{'name':'c','type':'reg','size':30,'offset':500,'endOffset':570,'digest':'@w','chunkSize':10,'chunkDigest':'@e'}",
        "{'name':'c','type':'chunk','offset':540,'chunkOffset':10,'chunkSize':15,'chunkType':'zeros','chunkDigest':'@f'}",
        "{'name':'c','type':'chunk','offset':550,'chunkOffset':25,'chunkSize':5,'chunkDigest':'@g'}",
        // Several files in one unit, the first with the offset left out.
        "{'name':'d','type':'reg','size':4,'innerOffset':512,'digest':'@h'}",
        "{'name':'e','type':'reg','size':4,'innerOffset':1024,'digest':'@i'}",
        "{'name':'f','type':'reg','size':4,'offset':999000,'digest':'@j'}",
    ])
    .unwrap();
    let units = |path| chunks(&toc, path).iter().map(unit).collect::<Vec<_>>();
    assert_eq!(units("a"), [(100, 100, 0), (200, 100, 0), (300, 100, 0)]);
    assert_eq!(units("b"), [(400, 50, 0)]);
    assert_eq!(unit(&chunks(&toc, "c")[0]), (500, 40, 0));
    assert_eq!(chunks(&toc, "c")[1].source, ChunkSource::Zeros);
    assert_eq!(unit(&chunks(&toc, "c")[2]), (550, 20, 0));
    assert_eq!(
        (units("d"), units("e")),
        (vec![(0, 100, 512)], vec![(0, 100, 1024)])
    );
    assert_eq!(units("f"), [(999_000, 1000, 0)]);
    let described: Vec<_> = chunks(&toc, "a")
        .iter()
        .map(|chunk| (chunk.file_offset, chunk.size, chunk.digest))
        .collect();
    let digest = |text: &[u8]| Digest::of(text);
    assert_eq!(
        described,
        [
            (0, 10, digest(b"a")),
            (10, 10, digest(b"b")),
            (20, 5, digest(b"c"))
        ]
    );
    assert_eq!(chunks(&toc, "b")[0].digest, digest(b"d"));
}

#[test]
fn a_unit_is_no_larger_than_its_chunks_can_need() {
    let toc = read(&["{'name':'a','type':'reg','size':1000,'offset':100,'digest':'@a'}"]).unwrap();
    let (offset, size, _) = unit(&chunks(&toc, "a")[0]);
    assert_eq!((offset, size), (100, 1000 + 250 + 131_072));
}

#[test]
fn chunks_that_do_not_make_up_the_file_are_refused() {
    let file = |rest: &str| {
        format!("{{'name':'a','type':'reg','digest':'@w','offset':10,'chunkDigest':'@a',{rest}}}")
    };
    let chunk =
        |rest: &str| format!("{{'name':'a','type':'chunk','offset':20,'chunkDigest':'@b',{rest}}}");
    let sized = |offset, size| EntryError::ChunkSize { offset, size };
    let cases = [
        (
            file("'size':10,'chunkOffset':1"),
            None,
            EntryError::ChunkGap {
                expected: 0,
                actual: 1,
            },
        ),
        (file("'size':10,'chunkSize':11"), None, sized(0, 10)),
        (
            file("'size':10,'chunkSize':9"),
            None,
            EntryError::ChunksShort { end: 9, size: 10 },
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':4"),
            EntryError::ChunkGap {
                expected: 5,
                actual: 4,
            },
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':6"),
            EntryError::ChunkGap {
                expected: 5,
                actual: 6,
            },
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':5,'chunkSize':6"),
            sized(5, 10),
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':5,'chunkSize':4"),
            EntryError::ChunksShort { end: 9, size: 10 },
        ),
        (file("'size':10"), Some("'chunkOffset':10"), sized(10, 10)),
        (file("'size':0"), Some("'chunkOffset':0"), sized(0, 0)),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':5,'chunkType':'other'"),
            EntryError::ChunkType("other".into()),
        ),
    ];
    for (first, second, expected) in cases {
        let mut entries = vec![first];
        entries.extend(second.map(chunk));
        let entries: Vec<_> = entries.iter().map(String::as_str).collect();
        assert_eq!(refusal(&entries), expected, "{entries:?}");
    }
    let lone = chunk("'chunkOffset':0");
    assert_eq!(refusal(&[&lone]), EntryError::ChunkWithoutFile);
    let after = ["{'name':'a','type':'fifo'}", &lone];
    assert_eq!(refusal(&after), EntryError::ChunkWithoutFile);
}

#[test]
fn a_file_left_open_is_blamed_by_its_own_name() {
    let refused = read(&[
        "{'name':'first','type':'reg','size':10,'offset':1,'chunkSize':5,'chunkDigest':'@a'}",
        "{'name':'second','type':'fifo'}",
    ])
    .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "entry 0 of the table of contents, 'first': its chunks end at 5, but the file has 10 bytes"
    );
}

#[test]
fn files_without_a_usable_digest_are_refused() {
    let file = |rest: &str| {
        refusal(&[&format!(
            "{{'name':'a','type':'reg','size':9,'offset':1{rest}}}"
        )])
    };
    assert_eq!(file(""), EntryError::DigestMissing);
    assert_eq!(
        file(",'digest':'@a','chunkSize':4"),
        EntryError::DigestMissing
    );
    for bad in ["md5:00", "sha256:00", "sha512:00", "x"] {
        assert_eq!(
            file(&format!(",'digest':'{bad}'")),
            EntryError::Digest(bad.to_owned())
        );
        assert_eq!(
            file(&format!(",'chunkDigest':'{bad}'")),
            EntryError::Digest(bad.to_owned())
        );
    }
}

#[test]
fn overlapping_chunks_are_refused() {
    let file = |name: &str, inner: u64, size: u64, digest: &str| {
        format!(
            "{{'name':'{name}','type':'reg','size':{size},'offset':5,'innerOffset':{inner},'digest':'@{digest}'}}"
        )
    };
    let read_two = |a: &str, b: &str| read(&[a, b]);
    let base = file("a", 10, 10, "x");
    for (inner, size, digest) in [
        (10, 10, "y"),
        (10, 11, "x"),
        (15, 10, "x"),
        (0, 11, "x"),
        (12, 2, "x"),
    ] {
        let refused = read_two(&base, &file("b", inner, size, digest));
        assert!(
            matches!(refused, Err(TocError::OverlappingChunks { offset: 5 })),
            "{inner} {size}"
        );
    }
    for (inner, size, digest) in [(10, 10, "x"), (20, 5, "y"), (0, 10, "y")] {
        assert!(
            read_two(&base, &file("b", inner, size, digest)).is_ok(),
            "{inner} {size}"
        );
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let file = |rest: &str| format!("{{'name':'a','type':'reg','digest':'@a',{rest}}}");
    for field in [
        "size",
        "offset",
        "innerOffset",
        "endOffset",
        "chunkOffset",
        "chunkSize",
        "mode",
        "uid",
        "gid",
    ] {
        for value in [-1, i64::MIN] {
            let size = if field == "size" { "" } else { "'size':1," };
            let reason = refusal(&[&file(&format!("{size}'{field}':{value}"))]);
            assert!(
                matches!(reason, EntryError::OutOfRange { .. }),
                "{field} {reason}"
            );
        }
    }
    for field in ["uid", "gid"] {
        let reason = refusal(&[&file(&format!("'{field}':4294967295"))]);
        assert!(matches!(reason, EntryError::OutOfRange { .. }));
        assert!(read(&[&file(&format!("'{field}':4294967294"))]).is_ok());
    }
    for (field, value) in [
        ("devMajor", 4096),
        ("devMinor", 1_048_576),
        ("devMajor", -1),
    ] {
        let reason = refusal(&[&format!("{{'name':'c','type':'char','{field}':{value}}}")]);
        assert_eq!(reason, EntryError::OutOfRange { field, value });
    }
    for number in ["9223372036854775808", "1.5", "1e3", "'1'", "null", "true"] {
        let refused = read(&[&file(&format!("'size':{number}"))]);
        assert!(matches!(refused, Err(TocError::Json(_))), "{number}");
    }
}

#[test]
fn sizes_near_the_end_of_numbers_are_refused() {
    let huge = i64::MAX;
    let file = |name: &str, size: i64, rest: &str| {
        format!("{{'name':'{name}','type':'reg','digest':'@a','offset':5,'size':{size}{rest}}}")
    };
    let too_large = EntryError::LayerTooLarge { limit: 1 << 43 };
    assert_eq!(refusal(&[&file("a", huge, "")]), too_large);
    let half = file("a", 1 << 42, ",'chunkType':'zeros'");
    assert!(read(&[&half]).is_ok());
    assert!(read(&[&half, &half]).is_ok());
    assert_eq!(refusal(&[&half, &half, &file("b", 1, "")]), too_large);
    let unit = refusal(&[&file("a", 1, &format!(",'innerOffset':{huge}"))]);
    assert!(matches!(unit, EntryError::UnitTooLarge { .. }));
    let unit = refusal(&[&file("a", (64 << 20) + 1, "")]);
    assert!(matches!(unit, EntryError::UnitTooLarge { .. }));
    assert!(read(&[&file("a", 64 << 20, "")]).is_ok());
    for offset in [END, huge as u64] {
        let entry = format!("{{'name':'a','type':'reg','digest':'@a','offset':{offset},'size':1}}");
        assert_eq!(
            refusal(&[&entry]),
            EntryError::OutsideBlob { offset, end: END }
        );
    }
    // A bound beyond the TOC is no bound, and one before the chunk no harm.
    for end in [huge, 1] {
        let toc = read(&[&file("a", 9, &format!(",'endOffset':{end}"))]).unwrap();
        let (offset, size, _) = unit_of_a(&toc);
        assert!(offset == 5 && offset + size <= END);
    }
}

fn unit_of_a(toc: &Toc) -> (u64, u64, u64) {
    unit(&chunks(toc, "a")[0])
}

#[test]
fn landmarks_are_hidden_and_bound_the_prefetch() {
    let landmark = "{'name':'.prefetch.landmark','type':'reg','size':1,'offset':50,'digest':'@l'}";
    let file = |name: &str, offset: u64| {
        format!("{{'name':'{name}','type':'reg','size':1,'offset':{offset},'digest':'@a'}}")
    };
    let toc = read(&[&file("a", 20), landmark, &file("b", 60)]).unwrap();
    assert_eq!(toc.prefetch_end(), Some(50));
    assert_eq!((toc.nodes().len(), toc.chunks().len()), (3, 2));
    assert_eq!(unit(&chunks(&toc, "a")[0]), (20, 30, 0));
    assert_eq!(
        read(&[landmark, &file("b", 60)]).unwrap().prefetch_end(),
        None
    );
    let none = "{'name':'.no.prefetch.landmark','type':'reg','size':1,'offset':50,'digest':'@l'}";
    let toc = read(&[&file("a", 20), none]).unwrap();
    assert_eq!((toc.prefetch_end(), toc.nodes().len()), (None, 2));
    let elsewhere = landmark.replace(".prefetch", "d/.prefetch");
    assert_eq!(
        tree(&read(&[&elsewhere]).unwrap())[2],
        "/d/.prefetch.landmark reg 1 0 0:0 1"
    );
}

#[test]
fn symlinks_have_targets() {
    let link = |target: &str| format!("{{'name':'s','type':'symlink','linkName':'{target}'}}");
    assert_eq!(refusal(&[&link("")]), EntryError::SymlinkEmpty);
    assert_eq!(
        refusal(&[&link(&"x".repeat(4096))]),
        EntryError::SymlinkTarget
    );
    assert_eq!(refusal(&[&link(r"a\u0000")]), EntryError::SymlinkTarget);
    assert!(read(&[&link(&"x".repeat(4095))]).is_ok());
}

#[test]
fn times_that_are_none_are_refused() {
    let reason = refusal(&["{'name':'a','type':'fifo','modtime':'yesterday'}"]);
    assert_eq!(reason, EntryError::Time("yesterday".to_owned()));
}

#[test]
fn what_is_not_a_toc_is_refused() {
    for json in [
        "",
        "null",
        "[]",
        "{",
        "{}",
        r#"{"version":2,"entries":[]}"#,
        r#"{"version":1,"entries":{}}"#,
        r#"{"version":1,"entries":[]} x"#,
        r#"{"version":1,"entries":[[]]}"#,
        r#"{"version":1,"entries":[],"entries":[]}"#,
        r#"{"version":1,"entries":[{"name":"a","name":"b","type":"fifo"}]}"#,
    ] {
        let digest = Digest::of(json.as_bytes());
        let refused = read_toc_json(
            Format::Estargz,
            END,
            json.as_bytes(),
            &digest,
            &Limits::default(),
        );
        assert!(refused.is_err(), "{json}");
    }
    let nested = format!(
        r#"{{"version":1,"x":{}{},"entries":[]}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let digest = Digest::of(nested.as_bytes());
    // Deep nesting in what is passed over must not exhaust the stack.
    let _ = read_toc_json(
        Format::Estargz,
        END,
        nested.as_bytes(),
        &digest,
        &Limits::default(),
    );
}

#[test]
fn limits_hold() {
    let limits = Limits {
        max_entries: 5,
        max_toc_bytes: 1000,
        ..Limits::default()
    };
    let fifos: Vec<_> = (0..6)
        .map(|name| format!("{{'name':'{name}','type':'fifo'}}"))
        .collect();
    let fifos: Vec<_> = fifos.iter().map(String::as_str).collect();
    assert!(read_with(&fifos[..4], &limits).is_ok());
    let refused = read_with(&fifos, &limits).unwrap_err();
    assert!(
        refused.to_string().contains("more than 5 inodes"),
        "{refused}"
    );
    let same = ["{'name':'d','type':'dir'}"; 6];
    assert!(matches!(
        read_with(&same, &limits),
        Err(TocError::TooManyEntries { limit: 5 })
    ));
    // Parents that an entry only implies count too.
    assert!(read_with(&["{'name':'1/2/3/4','type':'fifo'}"], &limits).is_ok());
    assert!(read_with(&["{'name':'1/2/3/4/5','type':'fifo'}"], &limits).is_err());
    let long = format!("{{'name':'{}','type':'fifo'}}", "x".repeat(1000));
    assert!(matches!(
        read_with(&[&long], &limits),
        Err(TocError::TooLarge { limit: 1000 })
    ));
}

/// What `docs/reliability.md` says of very large layers comes from this.
#[test]
fn a_file_takes_some_hundreds_of_bytes() {
    const FILES: usize = 2000;
    let digest = Digest::of(b"content");
    let entries: Vec<_> = (0..FILES)
        .map(|file| {
            format!(
                "{{'name':'usr/lib/python3/package{}/a_module_{file}.py','type':'reg','size':100,\
                 'modtime':'2024-01-01T00:00:00Z','mode':33188,'offset':{},'digest':'{digest}',\
                 'chunkDigest':'{digest}'}}",
                file / 50,
                file * 100
            )
        })
        .collect();
    let entries: Vec<_> = entries.iter().map(String::as_str).collect();
    let size = json(&entries).len();
    let fits = |memory: usize| {
        let limits = Limits {
            max_memory: memory as u64,
            ..Limits::default()
        };
        read_with(&entries, &limits).is_ok()
    };
    let (mut low, mut high) = (0, 1000 * FILES);
    while high - low > FILES {
        let middle = (low + high) / 2;
        match fits(size + middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    let (tree, text) = (high / FILES, size / FILES);
    println!("{tree} bytes a file, and {text} of JSON");
    assert!((300..400).contains(&tree), "{tree}");
    assert!((300..400).contains(&text), "{text}");
}
