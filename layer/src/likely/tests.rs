use std::io::Read as _;

use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::*;
use crate::write::{Options, write_layer};
use crate::{Format, unpack};

/// A tar as the `tar` crate, GNU tar or Go write it, and as it is between the
/// contents of its files.
fn archive(gnu: bool) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    let mut add = |name: &str, kind: EntryType, link: &str, content: &[u8]| {
        let mut header = if gnu {
            Header::new_gnu()
        } else {
            Header::new_ustar()
        };
        header.set_entry_type(kind);
        header.set_path(name).unwrap();
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_mode(0o4755);
        header.set_uid(1000 + content.len() as u64);
        header.set_gid(7);
        header
            .set_username(if content.len().is_multiple_of(2) {
                "even"
            } else {
                ""
            })
            .unwrap();
        header.set_groupname("users").unwrap();
        header.set_size(content.len() as u64);
        header.set_mtime(1_700_000_000 + content.len() as u64);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        header.set_cksum();
        builder.append(&header, content).unwrap();
    };
    add("d/", EntryType::Directory, "", b"");
    for size in 1..40_usize {
        add(
            &format!("d/file{size}"),
            EntryType::Regular,
            "",
            &vec![b'x'; size * 37],
        );
        if size % 7 == 0 {
            add(&format!("d/empty{size}"), EntryType::Regular, "", b"");
            add(
                &format!("d/sym{size}"),
                EntryType::Symlink,
                "../target",
                b"",
            );
            add(&format!("d/hard{size}"), EntryType::Link, "d/file1", b"");
        }
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_tar_is_made_up_as_its_writer_wrote_it() {
    for gnu in [false, true] {
        let source = archive(gnu);
        let options = Options::new(Format::Estargz);
        let (blob, _) = write_layer(&source, &options, &[]).unwrap();
        let mut tar = Vec::new();
        let mut reader = unpack(Format::Estargz, &blob[..]).unwrap();
        reader.read_to_end(&mut tar).unwrap();
        // The header of the second file follows the content of the first.
        let at = source
            .windows(9)
            .position(|name| name == b"d/file2\0\0")
            .unwrap();
        let style = HeaderStyle::of(&source[at - 512 + 37..at + 512]).unwrap();
        let toc = tar
            .windows(18)
            .rposition(|name| name == b"stargz.index.json\0")
            .unwrap();
        let mut made_up = Vec::new();
        likely_tar(toc_in_tar(&tar[toc..]).unwrap(), &style, |part| {
            match part {
                TarPart::Bytes(bytes) => made_up.extend(bytes),
                TarPart::Content(size) => {
                    let content = &tar[made_up.len()..made_up.len() + size as usize];
                    made_up.extend_from_slice(content);
                }
                // But for the landmark.
                TarPart::Unknown => {
                    assert!(made_up.is_empty(), "all others are plain");
                    made_up.extend_from_slice(&tar[..1024]);
                }
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(made_up, tar[..toc], "gnu: {gnu}");
    }
}

#[test]
fn what_takes_more_than_a_block_is_not_made_up() {
    let source = archive(false);
    let at = source
        .windows(9)
        .position(|name| name == b"d/file2\0\0")
        .unwrap();
    let style = HeaderStyle::of(&source[at..at + 512]).unwrap();
    let parts = |entry: serde_json::Value| {
        let json = json!({"version": 1, "entries": [entry]}).to_string();
        let mut parts = Vec::new();
        likely_tar(json.as_bytes(), &style, |part| {
            parts.push(part);
            Ok(())
        })
        .unwrap();
        parts
    };
    let plain = json!({"name": "a", "type": "reg", "modtime": "2020-01-01T00:00:00Z"});
    assert!(matches!(&parts(plain.clone())[..], [TarPart::Bytes(_)]));
    let with = |key: &str, value: serde_json::Value| {
        let mut entry = plain.clone();
        entry[key] = value;
        entry
    };
    for (key, value) in [
        ("name", json!("a".repeat(101))),
        ("name", json!("ü")),
        ("linkName", json!("a".repeat(101))),
        ("userName", json!("a".repeat(33))),
        ("uid", json!(1_u64 << 40)),
        ("type", json!("char")),
        ("xattrs", json!({"user.a": ""})),
        ("modtime", json!("2020-01-01T00:00:00.5Z")),
        ("modtime", json!("1950-01-01T00:00:00Z")),
        ("modtime", json!("now")),
        ("accesstime", json!("2020-01-01T00:00:00Z")),
    ] {
        assert_eq!(parts(with(key, value))[..], [TarPart::Unknown], "{key}");
    }
    for broken in [&source[at..at + 511], &source[at - 1..at + 510], &[0; 512]] {
        assert!(HeaderStyle::of(broken).is_none());
    }
    let mut changed = source[at..at + 512].to_vec();
    changed[3] ^= 1;
    assert!(HeaderStyle::of(&changed).is_none());
}
