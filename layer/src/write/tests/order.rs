//! What comes first, and what stands for another.

use super::*;

#[test]
fn prioritized_files_come_first_with_what_they_need() {
    let tar = archive(&[
        file("z", b"z"),
        directory("a/"),
        directory("a/b/"),
        file("a/b/target", b"t"),
        file("other", b"o"),
        link("a/link", Kind::HardLink, "a/b/target"),
    ]);
    let wanted = ["/a/link".to_owned(), "nowhere".to_owned()];
    for format in FORMATS {
        let (blob, tail) = write_layer(&tar, &Options::new(format), &wanted).unwrap();
        let unpacked = unpack(format, &blob);
        assert_eq!(Digest::of(&unpacked), tail.diff_id);
        let names: Vec<String> = tar::Archive::new(unpacked.as_slice())
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .filter(|name| name != TOC_NAME)
            .collect();
        assert_eq!(
            names,
            [
                "a/",
                "a/b/",
                "a/b/target",
                "a/link",
                PREFETCH_LANDMARK,
                "z",
                "other"
            ],
            "{format}"
        );
    }
    let mut index = TarIndex::new();
    index.push(&tar).unwrap();
    assert_eq!(index.order(&wanted).unwrap().missing, ["nowhere"]);
}

#[test]
fn converting_twice_leaves_one_toc_and_one_landmark() {
    let tar = archive(&[file("a", b"1"), file("b", b"2")]);
    let prioritized = ["b".to_owned()];
    let (first, _) = write_layer(&tar, &Options::new(Format::Estargz), &prioritized).unwrap();
    let again = unpack(Format::Estargz, &first);
    for format in FORMATS {
        let (blob, tail) = write_layer(&again, &Options::new(format), &[]).unwrap();
        let toc = toc(format, &blob, &tail);
        let names: Vec<&str> = toc["entries"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["name"].as_str().unwrap())
            .filter(|n| *n != NO_PREFETCH_LANDMARK)
            .collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(Digest::of(&unpack(format, &blob)), tail.diff_id);
    }
}

#[test]
fn the_last_of_a_name_wins_and_a_linked_file_lives_on() {
    let tar = archive(&[
        file("a", b"old"),
        link("b", Kind::HardLink, "a"),
        link("c", Kind::HardLink, "b"),
        file("./a", b"new"),
        directory("d/"),
        file("d/inside", b"gone"),
        link("d", Kind::Symlink, "a"),
    ]);
    let (blob, tail) = write_layer(&tar, &Options::new(Format::ZstdChunked), &[]).unwrap();
    let toc = toc(Format::ZstdChunked, &blob, &tail);
    let seen: Vec<_> = toc["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                e["name"].as_str().unwrap(),
                e["type"].as_str().unwrap(),
                e["linkName"].as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("b", "reg", None),
            ("c", "hardlink", Some("b")),
            ("./a", "reg", None),
            ("d", "symlink", Some("a")),
        ]
    );
    assert_eq!(
        files(Format::ZstdChunked, &blob, &toc),
        [
            ("b".to_owned(), b"old".to_vec()),
            ("./a".to_owned(), b"new".to_vec())
        ]
    );
    // A tar-split with one name twice is refused by those who read it.
    let key = "io.github.containers.zstd-chunked.tarsplit-position";
    assert!(!tail.annotations.contains_key(key));
    assert!(toc.get("tarSplitDigest").is_none());
}

#[test]
fn a_directory_twice_keeps_the_attributes_of_both() {
    let with = |name: &str, value: &str| {
        let mut directory = header("d", Kind::Directory, 0);
        directory.xattrs.insert(name.into(), value.into());
        encode(&directory)
    };
    let tar = archive(&[with("user.a", "1"), with("user.b", "2")]);
    let (blob, tail) = write_layer(&tar, &Options::new(Format::ZstdChunked), &[]).unwrap();
    let toc = toc(Format::ZstdChunked, &blob, &tail);
    assert_eq!(toc["entries"].as_array().unwrap().len(), 1);
    let xattrs = toc["entries"][0]["xattrs"].as_object().unwrap();
    let names: Vec<&str> = xattrs.keys().map(String::as_str).collect();
    assert_eq!(names, ["user.a", "user.b"]);
}
