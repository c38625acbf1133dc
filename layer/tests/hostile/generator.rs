//! Tables of contents by somebody who means harm: each field holds what it
//! should, or what hurts most.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// What the TOC is about.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    /// A directory for honest names.
    pub(crate) name: String,
    /// Of a unit that holds a file of this size and digest.
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) digest: String,
    /// Where the units end.
    pub(crate) end: u64,
}

/// The JSON of a TOC.
pub(crate) fn toc(blob: Blob) -> impl Strategy<Value = Vec<u8>> {
    let entries = prop::collection::vec(entry(blob), 0..8);
    (entries, prop::bool::weighted(0.1)).prop_map(|(entries, raw)| {
        let toc = json!({"version": 1, "entries": entries});
        let mut json = serde_json::to_vec(&toc).unwrap_or_default();
        // Names on Linux are bytes.
        if let Some(at) = json.iter().position(|byte| *byte == b'u').filter(|_| raw) {
            json[at] = 0xff;
        }
        json
    })
}

fn name(blob: &Blob) -> impl Strategy<Value = String> + use<> {
    let inside = blob.name.clone();
    prop_oneof![
        20 => prop::sample::select(vec!["a", "b", "a/b", "a/b/c", "inside", "u"])
            .prop_map(move |name| format!("{inside}/{name}")),
        4 => prop::sample::select(vec![
            "", ".", "..", "/", "../escape", "a/../../escape", "/../escape", "./..//escape",
            ".wh.a", ".wh..wh..opq", ".wh..wh.a", ".wh.", "a/.wh./b", ".wh.a/b",
            ".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json",
            "a\0b", "\u{202e}a", "a\nb", "a/", "//a//b//",
        ]).prop_map(str::to_owned),
        1 => Just("n".repeat(256)),
        1 => Just("d/".repeat(2000)),
        1 => Just("d/".repeat(2100)),
    ]
}

/// Numbers at the edges of what some integer holds, and near honest ones.
fn number(honest: u64) -> impl Strategy<Value = Value> {
    let edges: Vec<i128> = [0, 31, 32, 42, 43, 62, 63, 64]
        .into_iter()
        .flat_map(|bits| [-1, 0, 1].map(|by| (1_i128 << bits) + by))
        .flat_map(|edge| [edge, -edge])
        .collect();
    prop_oneof![
        20 => Just(json!(honest)),
        1 => (-2_i64..3).prop_map(move |by| json!(honest.saturating_add_signed(by))),
        1 => prop::sample::select(edges).prop_map(|edge| {
            // What 64 bits do not hold is written as a float.
            u64::try_from(edge).map(|n| json!(n))
                .or_else(|_| i64::try_from(edge).map(|n| json!(n)))
                .unwrap_or_else(|_| json!(edge as f64))
        }),
    ]
}

fn digest(blob: &Blob) -> impl Strategy<Value = String> + use<> {
    prop_oneof![
        16 => Just(blob.digest.clone()),
        1 => Just(format!("sha256:{}", "0".repeat(64))),
        1 => prop::sample::select(vec!["", "sha256:", "sha512:00", "sha256:../../../etc/passwd"])
            .prop_map(str::to_owned),
    ]
}

fn xattrs() -> impl Strategy<Value = Value> {
    let name = prop::sample::select(vec![
        "user.a",
        "user.",
        "user",
        "",
        "trusted.overlay.opaque",
        "user.overlay.redirect",
        "security.capability",
        "system.posix_acl_access",
        "user.a\0",
        "n.a",
    ]);
    let name = prop_oneof![9 => name.prop_map(str::to_owned), 1 => Just("user.".to_owned() + &"x".repeat(260))];
    let value = prop_oneof![
        4 => Just("AA==".to_owned()),
        1 => Just("no base64".to_owned()),
        1 => Just("AAAA".repeat(22_000)),
    ];
    prop::collection::vec((name, value), 0..4).prop_map(|list| {
        list.into_iter()
            .map(|(n, v)| (n, json!(v)))
            .collect::<Map<_, _>>()
            .into()
    })
}

fn entry(blob: Blob) -> impl Strategy<Value = Value> {
    let kind = prop::sample::select(vec![
        "reg", "reg", "reg", "dir", "dir", "hardlink", "hardlink", "symlink", "chunk", "char",
        "block", "fifo", "symlink", "reg", "dir", "socket",
    ]);
    let rarely = |field, strategy: BoxedStrategy<Value>| {
        prop::option::weighted(0.05, strategy).prop_map(move |value| (field, value))
    };
    let extra = (
        rarely("chunkOffset", number(0).boxed()),
        rarely("chunkSize", number(blob.size).boxed()),
        rarely("innerOffset", number(0).boxed()),
        rarely("endOffset", number(blob.end).boxed()),
        rarely("mode", number(0o644).boxed()),
        rarely("uid", number(0).boxed()),
        rarely("devMajor", number(1).boxed()),
        rarely("xattrs", xattrs().boxed()),
        rarely("chunkType", Just(json!("zeros")).boxed()),
        rarely("modtime", Just(json!("9999-99-99T99:99:99Z")).boxed()),
    );
    let place = (number(blob.offset), number(blob.size));
    let digests = (digest(&blob), digest(&blob));
    (kind, name(&blob), name(&blob), place, digests, extra).prop_map(
        |(kind, name, target, (offset, size), (whole, chunk), extra)| {
            let mut entry = json!({"name": name, "type": kind});
            match kind {
                "hardlink" | "symlink" => entry["linkName"] = json!(target),
                "reg" | "chunk" => {
                    entry["offset"] = offset;
                    entry["size"] = size;
                    entry["digest"] = json!(whole);
                    entry["chunkDigest"] = json!(chunk);
                }
                _ => {}
            }
            let (a, b, c, d, e, f, g, h, i, j) = extra;
            for (field, value) in [a, b, c, d, e, f, g, h, i, j] {
                if let Some(value) = value {
                    entry[field] = value;
                }
            }
            entry
        },
    )
}
