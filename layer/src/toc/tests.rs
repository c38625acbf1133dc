//! Trees and refusals, case by case. Random ones are in `tests/model.rs`.

use super::*;

mod chunks;
mod links;
mod names;

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
