use super::*;

fn sample() -> Header {
    Header {
        kind: Kind::Regular,
        name: b"dir/\xc3\xa9".repeat(40),
        link: Vec::new(),
        mode: 0o4755,
        uid: 3_000_000,
        gid: 1 << 40,
        user: b"user".to_vec(),
        group: "gr\u{fc}ppe".as_bytes().to_vec(),
        size: 1 << 34,
        mtime: Time {
            secs: -2,
            nanos: 750_000_000,
        },
        atime: Some(Time { secs: 5, nanos: 1 }),
        ctime: None,
        dev_major: 0,
        dev_minor: 0,
        xattrs: BTreeMap::from([(b"security.capability".to_vec(), b"\x01\n=\x00".to_vec())]),
    }
}

/// Reads back what `encode` wrote.
fn decode(raw: &[u8]) -> Header {
    let mut extensions = Extensions::default();
    let mut rest = raw;
    loop {
        let (block, after) = rest.split_first_chunk::<BLOCK>().unwrap();
        let block = Block::parse(block).unwrap();
        if block.type_flag() != b'x' {
            assert!(after.is_empty());
            return block.header(&extensions).unwrap();
        }
        let size = block.size().unwrap() as usize;
        extensions.records = pax_records(&after[..size]).unwrap();
        rest = &after[size.next_multiple_of(BLOCK)..];
    }
}

#[test]
fn what_ustar_cannot_hold_survives_in_pax() {
    assert_eq!(decode(&encode(&sample())), sample());
}

#[test]
fn numbers_in_base_256() {
    for (field, expected) in [
        (&[0x80, 0, 0, 0, 0, 0, 1, 0][..], Some(256)),
        (&[0xff; 8][..], Some(-1)),
        (&[0xff; 12][..], Some(-1)),
        (b"0000644\0", Some(0o644)),
        (b"   644 \0", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"99999999", None),
        (
            &[
                0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            ][..],
            None,
        ),
    ] {
        assert_eq!(numeric(field), expected, "{field:?}");
    }
}

#[test]
fn pax_times() {
    let time = |secs, nanos| Some(Time { secs, nanos });
    for (text, expected) in [
        ("1.5", time(1, 500_000_000)),
        ("-1.5", time(-2, 500_000_000)),
        ("-0.25", time(-1, 750_000_000)),
        ("12", time(12, 0)),
        ("1.1234567899", time(1, 123_456_789)),
        ("1.x", None),
        ("", None),
        (".5", None),
        ("-9223372036854775808.5", None),
    ] {
        assert_eq!(pax_time(text.as_bytes()), expected, "{text}");
        if let Some(time) = expected
            && !text.ends_with("99")
        {
            assert_eq!(pax_time_text(time), text);
        }
    }
}

#[test]
fn malformed_pax_records_are_refused() {
    for bad in [
        &b"5 a=b"[..],
        b"x a=b\n",
        b"99 a=b\n",
        b"0 a=b\n",
        b"6 =bc\n",
        b"6 abc\n",
        b"18446744073709551616 a=b\n",
    ] {
        assert!(pax_records(bad).is_err(), "{}", bad.escape_ascii());
    }
}
