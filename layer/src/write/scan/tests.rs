use super::super::header::{Kind, encode};
use super::*;

/// Runs a tar through the scanner, in pieces of `step` bytes.
fn scan(tar: &[u8], step: usize) -> Result<Vec<(Header, Vec<u8>, bool)>, WriteError> {
    let mut scanner = Scanner::new();
    let mut found: Vec<(Header, Vec<u8>, bool)> = Vec::new();
    for piece in tar.chunks(step) {
        scanner.push(piece, &mut |event| {
            match event {
                Event::Entry {
                    header, rewrote, ..
                } => found.push((*header, Vec::new(), rewrote)),
                Event::Content(bytes) => found.last_mut().unwrap().1.extend(bytes),
                Event::Padding(_) | Event::End { .. } => {}
            }
            Ok(())
        })?;
    }
    scanner.finish()?;
    Ok(found)
}

fn block(fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut raw = vec![0; BLOCK];
    for (at, bytes) in fields {
        raw[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    raw[148..156].fill(b' ');
    let sum: u32 = raw.iter().map(|b| u32::from(*b)).sum();
    raw[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    raw
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn sparse_content() -> Vec<u8> {
    let mut content = vec![0; 3000];
    content[1000..1010].copy_from_slice(b"0123456789");
    content[2500..2503].copy_from_slice(b"abc");
    content
}

fn check_sparse(tar: &[u8], name: &str) {
    for step in [1, 100, 512, 513, tar.len()] {
        let found = scan(tar, step).unwrap();
        let (header, content, rewrote) = &found[0];
        assert_eq!(header.name, name.as_bytes());
        assert_eq!(header.size, 3000);
        assert!(rewrote);
        assert_eq!(*content, sparse_content(), "step {step}");
        assert_eq!(found[1].0.name, b"next");
        assert_eq!(found.len(), 2);
    }
}

fn next() -> Vec<u8> {
    block(&[
        (0, b"next"),
        (124, b"00000000000\0"),
        (156, b"0"),
        (257, b"ustar\x0000"),
    ])
}

#[test]
fn old_gnu_sparse_files_are_expanded() {
    let first = block(&[
        (0, b"sparse"),
        (124, b"00000000015\0"),
        (156, b"S"),
        (257, b"ustar  \0"),
        (386, b"00000001750\0"),
        (398, b"00000000012\0"),
        (482, b"\x01"),
        (483, b"00000005670\0"),
    ]);
    let mut more = vec![0; BLOCK];
    more[..12].copy_from_slice(b"00000004704\0");
    more[12..24].copy_from_slice(b"00000000003\0");
    let stored = padded(b"0123456789abc".to_vec());
    check_sparse(&[first, more, stored, next()].concat(), "sparse");
}

fn pax_sparse(records: &[(&str, &str)], stored: &[u8]) -> Vec<u8> {
    let payload: String = records
        .iter()
        .map(|(key, value)| {
            let body = key.len() + value.len() + 3;
            let length = body + if body + 2 < 100 { 2 } else { 3 };
            format!("{length} {key}={value}\n")
        })
        .collect();
    let size = format!("{:011o}\0", payload.len());
    let pax = block(&[
        (0, b"pax"),
        (124, size.as_bytes()),
        (156, b"x"),
        (257, b"ustar\x0000"),
    ]);
    let size = format!("{:011o}\0", stored.len());
    let entry = block(&[
        (0, b"GNUSparseFile.0/sparse"),
        (124, size.as_bytes()),
        (156, b"0"),
        (257, b"ustar\x0000"),
    ]);
    [
        pax,
        padded(payload.into_bytes()),
        entry,
        padded(stored.to_vec()),
        next(),
    ]
    .concat()
}

#[test]
fn pax_sparse_files_are_expanded() {
    let stored = b"0123456789abc";
    let by_pairs = [
        ("GNU.sparse.size", "3000"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.offset", "1000"),
        ("GNU.sparse.numbytes", "10"),
        ("GNU.sparse.offset", "2500"),
        ("GNU.sparse.numbytes", "3"),
    ];
    check_sparse(&pax_sparse(&by_pairs, stored), "GNUSparseFile.0/sparse");
    let by_list = [
        ("GNU.sparse.size", "3000"),
        ("GNU.sparse.name", "real"),
        ("GNU.sparse.map", "1000,10,2500,3"),
    ];
    check_sparse(&pax_sparse(&by_list, stored), "real");
    let in_content = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "real"),
        ("GNU.sparse.realsize", "3000"),
    ];
    let mut with_map = padded(b"2\n1000\n10\n2500\n3\n".to_vec());
    with_map.extend(stored);
    check_sparse(&pax_sparse(&in_content, &with_map), "real");
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for map in [
        "1000,10",
        "1000,13,900,0",
        "2999,13",
        "18446744073709551615,13",
        "1,2,3",
    ] {
        let records = [("GNU.sparse.size", "3000"), ("GNU.sparse.map", map)];
        let refused = scan(&pax_sparse(&records, b"0123456789abc"), 512);
        assert!(matches!(refused, Err(WriteError::Damaged(_))), "{map}");
    }
    let records = [
        ("GNU.sparse.size", "999999999999999"),
        ("GNU.sparse.map", "0,13"),
    ];
    let refused = scan(&pax_sparse(&records, b"0123456789abc"), 512);
    assert!(matches!(refused, Err(WriteError::Unsupported(_))));
}

#[test]
fn gnu_long_names_and_links() {
    let long = "n".repeat(300);
    let target = "t".repeat(200);
    let extension = |flag: &[u8], text: &str| {
        let size = format!("{:011o}\0", text.len() + 1);
        let header = block(&[
            (0, b"././@LongLink"),
            (124, size.as_bytes()),
            (156, flag),
            (257, b"ustar  \0"),
        ]);
        let mut text = text.as_bytes().to_vec();
        text.push(0);
        [header, padded(text)].concat()
    };
    let entry = block(&[(0, b"nnn"), (156, b"2"), (157, b"ttt"), (257, b"ustar  \0")]);
    let tar = [
        extension(b"L", &long),
        extension(b"K", &target),
        entry,
        next(),
    ]
    .concat();
    for step in [1, 300, tar.len()] {
        let found = scan(&tar, step).unwrap();
        assert_eq!(found[0].0.name, long.as_bytes());
        assert_eq!(found[0].0.link, target.as_bytes());
        assert_eq!(found[0].0.kind, Kind::Symlink);
        assert_eq!(found[1].0.name, b"next");
    }
}

#[test]
fn a_link_that_states_a_size_has_no_content() {
    let entry = block(&[
        (0, b"l"),
        (124, b"00000000777\0"),
        (156, b"1"),
        (157, b"next"),
        (257, b"ustar\x0000"),
    ]);
    let found = scan(&[entry, next()].concat(), 512).unwrap();
    assert_eq!(found.len(), 2);
}

#[test]
fn huge_extension_headers_are_refused() {
    let entry = block(&[
        (0, b"x"),
        (124, b"77777777777\0"),
        (156, b"x"),
        (257, b"ustar\x0000"),
    ]);
    assert!(matches!(scan(&entry, 512), Err(WriteError::Damaged(_))));
}

#[test]
fn encoded_headers_pass_the_scanner() {
    let tar = [next(), encode(&scan(&next(), 512).unwrap()[0].0)].concat();
    assert_eq!(scan(&tar, 512).unwrap().len(), 2);
}
