//! Links.

use super::*;

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
