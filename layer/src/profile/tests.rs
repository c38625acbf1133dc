use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use sluice_oci::Digest;

use super::*;

fn layer(n: u8) -> Digest {
    Digest::of(&[n])
}

fn read(layer: usize, path: &str, offset: u64, at: u64) -> Read {
    Read {
        layer,
        path: Arc::from(path.as_bytes()),
        offset,
        len: 100,
        at: Duration::from_millis(at),
        starts: 1,
        unit: None,
    }
}

fn profile(reads: Vec<Read>) -> Profile {
    Profile::new(1, vec![layer(0), layer(1)], reads).unwrap()
}

/// Paths in order.
fn order(profile: &Profile) -> Vec<String> {
    let text = |path: Arc<[u8]>| String::from_utf8_lossy(&path).into_owned();
    profile.files().into_iter().map(text).collect()
}

#[test]
fn the_document_is_compact_and_exact() {
    let profile = profile(vec![
        read(0, "/bin/./sh", 0, 5),
        read(1, "a\n\"", 4096, 7),
        read(0, "bin/sh", 100, 6),
    ]);
    let document = profile.to_json();
    assert_eq!(
        document,
        format!(
            "{{\"version\":1,\"starts\":1,\"layers\":[\"{}\",\"{}\"],\
             \"paths\":[\"bin/sh\",\"a\\n\\\"\"],\
             \"reads\":[[0,0,0,100,5,1],[0,0,100,100,6,1],[1,1,4096,100,7,1]]}}",
            layer(0),
            layer(1)
        )
    );
    assert_eq!(Profile::parse(document.as_bytes()), Ok(profile));
}

#[test]
fn a_name_that_is_no_text_survives() {
    let mut odd = read(0, "x", 0, 0);
    odd.path = Arc::from(&b"etc/\xff\xfe"[..]);
    let profile = profile(vec![odd]);
    let document = profile.to_json();
    assert!(document.contains("{\"base64\":\"ZXRjL//+\"}"), "{document}");
    assert_eq!(Profile::parse(document.as_bytes()), Ok(profile));
}

#[test]
fn where_a_read_lies_in_the_blob_is_told_where_it_is_known() {
    let placed = |unit| Read {
        unit,
        ..read(0, "bin/sh", 0, 5)
    };
    let unit = Unit {
        offset: 7,
        size: 90,
    };
    let known = Read {
        unit: Some(unit),
        ..read(1, "lib", 0, 6)
    };
    let without = profile(vec![placed(None)]);
    assert!(!without.to_json().contains("units"));
    let with = profile(vec![placed(None), known.clone()]);
    let document = with.to_json();
    assert!(
        document.ends_with(",\"units\":[[0,0],[7,90]]}"),
        "{document}"
    );
    assert_eq!(Profile::parse(document.as_bytes()), Ok(with.clone()));
    for (wrong, why) in [
        ("[[7,90]]", "units"),
        ("[[0,0],[9223372036854775807,1]]", "blob"),
    ] {
        let bad = document.replace("[[0,0],[7,90]]", wrong);
        let error = Profile::parse(bad.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let merged = Profile::merge(&[profile(vec![read(1, "lib", 0, 6)]), profile(vec![known])]);
    assert_eq!(merged.unwrap().reads()[0].unit, Some(unit));
}

#[test]
fn refuses_what_is_no_profile() {
    let good = profile(vec![read(0, "bin/sh", 0, 5)]).to_json();
    for (from, to, named) in [
        ("\"version\":1", "\"version\":2", "version 2"),
        ("\"version\":1,", "", "version"),
        ("\"starts\":1", "\"starts\":0", "0 starts"),
        ("\"starts\":1", "\"starts\":1,\"more\":1", "more"),
        ("bin/sh", "../sh", "../sh"),
        ("bin/sh", ".", "no file"),
        ("\"bin/sh\"", "{\"base64\":\"*\"}", "base64"),
        ("\"bin/sh\"", "{\"base64\":\"Lg==\"}", "no file"),
        ("\"bin/sh\"", "7", "path"),
        ("[0,0,0,100,5,1]", "[2,0,0,100,5,1]", "layer"),
        ("[0,0,0,100,5,1]", "[0,1,0,100,5,1]", "path"),
        ("[0,0,0,100,5,1]", "[0,0,0,0,5,1]", "range"),
        (
            "[0,0,0,100,5,1]",
            "[0,0,18446744073709551615,1,5,1]",
            "range",
        ),
        (
            "[0,0,0,100,5,1]",
            "[0,0,9223372036854775807,1,5,1]",
            "range",
        ),
        ("[0,0,0,100,5,1]", "[0,0,0,100,5,0]", "start"),
        ("[0,0,0,100,5,1]", "[0,0,0,100,5,2]", "start"),
        (
            "[0,0,0,100,5,1]",
            "[0,0,0,100,4294967296,1]",
            "invalid value",
        ),
        ("[0,0,0,100,5,1]", "[0,0,0,100,5]", "length"),
        ("[0,0,0,100,5,1]", "[0,0,0,100,5,1,0]", "JSON"),
        ("[0,0,0,100,5,1]", "[0,0,-1,100,5,1]", "-1"),
        (&layer(1).to_string(), &layer(0).to_string(), "twice"),
        (&layer(1).to_string(), "sha256:0", "sha256:0"),
    ] {
        let bad = good.replacen(from, to, 1);
        let error = Profile::parse(bad.as_bytes()).unwrap_err().to_string();
        let found = error.contains(named) || named == "JSON";
        assert!(bad != good && found, "{bad}: {error}");
    }
    for bad in [
        "",
        "[]",
        "null",
        "{\"version\":\"1\"}",
        &good[..good.len() - 1],
    ] {
        assert!(Profile::parse(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn bounds_hold_before_memory_is_taken() {
    let long = vec![b' '; MAX_BYTES + 1];
    assert_eq!(
        Profile::parse(&long),
        Err(ProfileError::TooLarge(MAX_BYTES + 1))
    );
    let good = profile(vec![read(0, "a", 0, 5)]).to_json();
    let row = "[0,0,0,100,5,1]";
    let rows = vec![row; MAX_READS + 1].join(",");
    let error = Profile::parse(good.replace(row, &rows).as_bytes()).unwrap_err();
    assert!(error.to_string().contains("more than 131072"), "{error}");
}

#[test]
fn merging_keeps_what_is_usual_in_the_order_of_its_median() {
    let early = read(0, "early", 0, 1);
    let runs = [
        vec![early.clone(), read(0, "b", 0, 10), read(1, "c", 0, 20)],
        vec![early.clone(), read(0, "b", 0, 90), read(1, "c", 0, 21)],
        vec![early.clone(), read(0, "b", 0, 95), read(1, "c", 0, 22)],
        vec![early, read(0, "chance", 0, 2), read(1, "c", 0, 23)],
    ];
    let merged = Profile::merge(&runs.map(profile)).unwrap();
    assert_eq!(merged.starts(), 4);
    assert_eq!(order(&merged), ["early", "c", "b"]);
    let of = |path: &str| {
        let mut reads = merged.reads().iter();
        reads.find(|read| *read.path == *path.as_bytes()).unwrap()
    };
    assert_eq!((of("early").starts, of("b").starts), (4, 3));
    assert_eq!(of("b").at, Duration::from_millis(90));
    assert_eq!(of("c").at, Duration::from_millis(21));
}

#[test]
fn a_profile_of_many_starts_counts_as_many() {
    let mut usual = read(0, "usual", 0, 5);
    usual.starts = 9;
    let many = Profile::new(10, vec![layer(0), layer(1)], vec![usual]).unwrap();
    let one = profile(vec![read(0, "odd", 0, 1), read(0, "usual", 0, 50)]);
    let merged = Profile::merge(&[one, many]).unwrap();
    assert_eq!(
        (merged.starts(), order(&merged)),
        (11, vec!["usual".to_owned()])
    );
    assert_eq!(merged.reads()[0].at, Duration::from_millis(5));
}

#[test]
fn only_recordings_of_one_image_are_merged() {
    let here = profile(vec![]);
    let other = Profile::new(1, vec![layer(0)], vec![]).unwrap();
    assert_eq!(
        Profile::merge(&[here, other]),
        Err(ProfileError::OtherImage(2))
    );
    assert_eq!(Profile::merge(&[]), Err(ProfileError::Nothing));
}

fn reads() -> impl Strategy<Value = Vec<Read>> {
    let path = prop_oneof![
        prop::sample::select(vec![&b"a"[..], b"b/c", b"\xff", b"\"\\"]).prop_map(<[u8]>::to_vec),
        prop::collection::vec(1..=255u8, 1..20)
            .prop_filter("a file's name", |name| clean(name).is_ok()),
    ];
    let unit = prop::option::of((0..9u64, 1..9u64));
    let one = (0..2usize, path, 0..4u64, 1..3u64, 0..5u64, unit);
    let one = one.prop_map(|(layer, path, offset, len, at, unit)| Read {
        layer,
        path: clean(&path).unwrap(),
        offset: offset << 12,
        len,
        at: Duration::from_millis(at),
        starts: 1,
        unit: unit.map(|(offset, size)| Unit { offset, size }),
    });
    prop::collection::vec(one, 0..30)
}

proptest! {
    #[test]
    fn documents_round_trip(reads in reads()) {
        let profile = profile(reads);
        prop_assert_eq!(Profile::parse(profile.to_json().as_bytes()), Ok(profile));
    }

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Profile::parse(&bytes);
    }

    /// What is taken of a damaged document is a profile like any other.
    #[test]
    fn damage_is_refused_or_harmless(
        reads in reads(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut document = profile(reads).to_json().into_bytes();
        for (at, byte) in changes {
            let at = at.index(document.len());
            document[at] = match byte {
                // Digits and punctuation are what JSON is full of.
                0..=127 => b"0123456789,[]{}\":\\."[usize::from(byte) % 19],
                _ => byte,
            };
        }
        if let Ok(profile) = Profile::parse(&document) {
            prop_assert_eq!(Profile::parse(profile.to_json().as_bytes()), Ok(profile));
        }
    }

    /// Whoever comes first, and however often a recording says the same.
    #[test]
    fn merging_is_fair(a in reads(), b in reads()) {
        let (a, b) = (profile(a), profile(b));
        prop_assert_eq!(Profile::merge(std::slice::from_ref(&a)), Ok(a.clone()));
        let twice = Profile::merge(&[a.clone(), a.clone()]).unwrap();
        prop_assert_eq!(twice.starts(), 2);
        let ranges = |p: &Profile| p.reads().iter().map(|r| (r.path.clone(), r.offset)).collect::<Vec<_>>();
        prop_assert_eq!(ranges(&twice), ranges(&a));
        let merged = Profile::merge(&[a.clone(), b.clone()]).unwrap();
        prop_assert_eq!(&merged, &Profile::merge(&[b.clone(), a.clone()]).unwrap());
        // Of two, each read is in at least a half.
        for read in a.reads().iter().chain(b.reads()) {
            prop_assert!(merged.reads().iter().any(|m| m.layer == read.layer
                && m.path == read.path && m.offset == read.offset));
        }
        prop_assert!(merged.reads().is_sorted_by_key(|read| read.at));
    }
}
