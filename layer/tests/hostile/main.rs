//! Whatever a TOC says, it is refused with a reason, or what comes of it is as
//! the model promises, in any of the ways in which a TOC is read.

#![allow(clippy::unwrap_used, reason = "a test through and through")]

use proptest::prelude::*;
use sluice_layer::{Format, Limits, Toc, TocError, TocLocation, TocTrust, read_toc};
use sluice_oci::Digest;

#[path = "../blobs/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod blobs;
#[path = "../../fuzz/checks.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the fuzz targets")]
mod checks;
mod generator;

const UNITS_END: u64 = 9000;

fn blob() -> generator::Blob {
    generator::Blob {
        name: "honest".to_owned(),
        offset: 1000,
        size: 5000,
        digest: Digest::of(b"content").to_string(),
        end: UNITS_END,
    }
}

/// Reads a TOC of zstd:chunked within `max_memory`.
fn read(json: &[u8], max_memory: u64) -> Result<Toc, TocError> {
    let compressed = blobs::compress(Format::ZstdChunked, json);
    let location = TocLocation {
        format: Format::ZstdChunked,
        offset: UNITS_END + 8,
        compressed_size: compressed.len() as u64,
        uncompressed_size: Some(json.len() as u64),
    };
    let trust = TocTrust::Uncompressed(Digest::of(json));
    let limits = Limits {
        max_memory,
        ..Limits::default()
    };
    read_toc(&location, &compressed, &trust, &limits)
}

/// Little memory.
const LITTLE: u64 = 12 << 20;

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn hostile_tocs_are_refused_or_sound(json in generator::toc(blob())) {
        match read(&json, 1 << 30) {
            Ok(toc) => checks::check_toc(&toc, &Limits::default()),
            Err(error) => prop_assert!(error.to_string().len() > 10, "{error}"),
        }
    }
}

fn entries(count: usize, entry: impl Fn(usize) -> String) -> Vec<u8> {
    let list: Vec<_> = (0..count).map(entry).collect();
    format!(r#"{{"version":1,"entries":[{}]}}"#, list.join(",")).into_bytes()
}

/// A TOC that is streamed gives what one that is read as a whole gives.
#[test]
fn streamed_or_whole_is_the_same() {
    let digest = Digest::of(b"content");
    let many = entries(20_000, |n| {
        format!(
            r#"{{"name":"d{}/\u00fc{n}","type":"reg","size":10,"offset":{},"modtime":"2020-01-02T03:04:05Z","digest":"{digest}","chunkDigest":"{digest}","xattrs":{{"user.n":"AA=="}},"userName":"{}"}}"#,
            n % 100,
            n % 9000,
            "x".repeat(300),
        )
    });
    let whole = read(&many, 1 << 30).unwrap();
    // Not enough for the JSON and the tree.
    let streamed = read(&many, many.len() as u64 * 3 - 3).unwrap();
    assert!(whole == streamed);
    checks::check_toc(&whole, &Limits::default());
}

/// Neither a million entries, nor few that make much of themselves, take more
/// memory than there is.
#[test]
fn a_tree_takes_no_more_memory_than_it_may() {
    let path = |n: usize| format!("{n}/{}", "a/".repeat(2000));
    for json in [
        entries(150_000, |n| format!(r#"{{"name":"{n}","type":"dir"}}"#)),
        entries(100, |n| format!(r#"{{"name":"{}","type":"dir"}}"#, path(n))),
        entries(300, |n| {
            let value = "AAAA".repeat(20_000);
            format!(r#"{{"name":"{n}","type":"dir","xattrs":{{"user.a":"{value}"}}}}"#)
        }),
        entries(60_000, |n| {
            format!(r#"{{"name":"{n}","type":"hardlink","linkName":"l{n}"}}"#)
        }),
    ] {
        let refused = read(&json, LITTLE).unwrap_err();
        assert!(refused.needs_more_memory(), "{refused}");
    }
}

/// What the parser would hold as a whole is bounded where the JSON is not.
#[test]
fn a_streamed_document_is_bounded_in_each_part() {
    let filler = " ".repeat(14 << 20);
    for (part, reason) in [
        ("[".repeat(200), "nested"),
        (format!("[\"{}\"]", "x".repeat(2 << 20)), "mebibyte"),
    ] {
        let json = format!(r#"{{"version":1,{filler}"other":{part}"#);
        let refused = read(json.as_bytes(), LITTLE).unwrap_err();
        assert!(refused.to_string().contains(reason), "{refused}");
    }
    let xattrs: Vec<_> = (0..20_000).map(|n| format!(r#""t{n}":"""#)).collect();
    let json = entries(1, |_| {
        format!(
            r#"{{"name":"a","type":"dir","xattrs":{{{}}}}}"#,
            xattrs.join(",")
        )
    });
    let refused = read(&json, 1 << 30).unwrap_err();
    assert!(
        refused.to_string().contains("more extended attributes"),
        "{refused}"
    );
}
