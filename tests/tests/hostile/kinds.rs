//! Every kind of hostile layer, each with what is to become of it.

use anyhow::Result;
use serde_json::{Value, json};
use sluice_layer::Format;
use sluice_oci::Digest;

use crate::blobs::{Blob, compress, estargz_footer, skippable, zstd_footer};
use crate::layer::{Content, Layer, Outcome, SIZE, Seen, TOC_DIGEST};

use Outcome::{Any, Lazy, Unpacked};

/// Layers of both formats.
pub(crate) fn all() -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    // What is wrong with the tree is wrong in either format.
    for (number, kind) in names()?.into_iter().chain(chunks()?).enumerate() {
        let format = [Format::Estargz, Format::ZstdChunked][number % 2];
        let content = Content::new(format, kind.name)?;
        let (entries, outcome) = (kind.make)(&content);
        layers.push(content.with(&entries, outcome)?);
    }
    layers.extend(documents()?);
    layers.extend(blobs()?);
    Ok(layers)
}

type Make = dyn Fn(&Content) -> (Vec<Value>, Outcome);

struct Kind {
    name: &'static str,
    make: Box<Make>,
}

fn kind(name: &'static str, make: impl Fn(&Content) -> (Vec<Value>, Outcome) + 'static) -> Kind {
    Kind {
        name,
        make: Box::new(make),
    }
}

/// One entry beside the honest one, and the reason for which it is refused.
fn beside(
    name: &'static str,
    reason: &'static str,
    entry: impl Fn(&Content) -> Value + 'static,
) -> Kind {
    kind(name, move |content| {
        (vec![content.honest(), entry(content)], Unpacked(reason))
    })
}

/// The file described otherwise, and the reason for which it is refused.
fn instead(name: &'static str, reason: &'static str, fields: Value) -> Kind {
    kind(name, move |content| {
        let entry = content.entry(&content.path("inside"), fields.clone());
        (vec![entry], Unpacked(reason))
    })
}

fn named(name: impl Into<String>) -> Value {
    json!({"name": name.into(), "type": "dir", "mode": 0o755})
}

fn link(name: String, target: impl Into<String>) -> Value {
    json!({"name": name, "type": "hardlink", "linkName": target.into()})
}

fn names() -> Result<Vec<Kind>> {
    Ok(vec![
        kind("honest", |c| (vec![c.honest()], shown(c, "inside"))),
        beside("traversal", "'..'", |_| named("../escape")),
        beside("traversal-within", "'..'", |c| {
            named(c.path("../../escape"))
        }),
        kind("absolute", |c| {
            let entry = c.entry(&format!("//{}", c.path("./inside")), json!({}));
            (vec![entry], shown(c, "inside"))
        }),
        kind("duplicate-names", |c| {
            let path = c.path("inside");
            let fifo = json!({"name": path, "type": "fifo"});
            let entries = vec![
                fifo,
                named(path.clone()),
                named(path + "/below"),
                c.honest(),
            ];
            (entries, shown(c, "inside"))
        }),
        beside("through-a-link", "is not a directory", |c| {
            // The honest entry is where a link is to lead through.
            named(c.path("inside/below"))
        }),
        kind("through-a-symbolic-link", |c| {
            let link = json!({"name": c.path("l"), "type": "symlink", "linkName": "../honest"});
            let through = c.entry(&c.path("l/inside"), json!({}));
            (vec![link, through], Unpacked("is not a directory"))
        }),
        kind("circle-of-links", |c| {
            let entries = vec![
                c.honest(),
                link(c.path("a"), c.path("b")),
                link(c.path("b"), c.path("c")),
                link(c.path("c"), c.path("a")),
            ];
            (entries, Unpacked("circle"))
        }),
        beside("link-to-itself", "circle", |c| {
            link(c.path("a"), c.path("a"))
        }),
        beside("link-to-nothing", "not in the layer", |c| {
            link(c.path("a"), "honest/inside")
        }),
        beside("link-to-a-directory", "is a directory", |c| {
            link(c.path("a"), c.name.clone())
        }),
        beside("link-outwards", "'..'", |c| {
            link(c.path("a"), "../../../../etc/passwd")
        }),
        beside("name-with-nul", "NUL", |c| named(c.path("a\0b"))),
        beside("long-name", "longer than 255", |c| {
            named(c.path(&"n".repeat(300)))
        }),
        beside("long-path", "longer than 4,095", |c| {
            named(c.path(&"d/".repeat(2048)))
        }),
        kind("deep-tree", |c| {
            let path = c.path(&"d/".repeat(1900));
            let outcome = Lazy(vec![
                (c.path("inside"), Seen::Content(c.file.clone())),
                (c.path(&"d/".repeat(500)), Seen::Exists),
            ]);
            (vec![c.honest(), named(path)], outcome)
        }),
        beside(
            "unknown-type",
            "unknown type",
            |c| json!({"name": c.path("s"), "type": "socket"}),
        ),
        beside("whiteout-of-nothing", "whiteout", |c| named(c.path(".wh."))),
        beside(
            "large-device",
            "devMajor",
            |c| json!({"name": c.path("d"), "type": "char", "devMajor": 1_i64 << 33, "devMinor": 0}),
        ),
        beside(
            "negative-owner",
            "uid",
            |c| json!({"name": c.path("d"), "type": "dir", "uid": -1}),
        ),
        beside(
            "bad-time",
            "RFC 3339",
            |c| json!({"name": c.path("d"), "type": "dir", "modtime": "yesterday"}),
        ),
        beside("large-attribute", "too large", |c| {
            let value = "AAAA".repeat(30_000);
            json!({"name": c.path("d"), "type": "dir", "xattrs": {"user.a": value}})
        }),
        beside(
            "attribute-without-a-name",
            "no file system takes",
            |c| json!({"name": c.path("d"), "type": "dir", "xattrs": {"user.": "AA=="}}),
        ),
        beside(
            "attribute-with-nul",
            "no file system takes",
            |c| json!({"name": c.path("d"), "type": "dir", "xattrs": {"user.a\0b": "AA=="}}),
        ),
        beside(
            "attribute-without-base64",
            "not base64",
            |c| json!({"name": c.path("d"), "type": "dir", "xattrs": {"user.a": "%"}}),
        ),
        beside("many-attributes", "more extended attributes", |c| {
            let many: Vec<_> = (0..20_000).map(|n| (format!("t{n}"), json!(""))).collect();
            let many: serde_json::Map<_, _> = many.into_iter().collect();
            json!({"name": c.path("d"), "type": "dir", "xattrs": many})
        }),
        kind("attributes-of-overlay", |c| {
            let overlay = json!({"xattrs": {
                "trusted.overlay.redirect": "L2hvbmVzdA==", "user.overlay.opaque": "eQ==",
            }});
            (
                vec![c.entry(&c.path("inside"), overlay)],
                shown(c, "inside"),
            )
        }),
    ])
}

fn chunks() -> Result<Vec<Kind>> {
    const LARGEST: i64 = i64::MAX;
    Ok(vec![
        instead(
            "size-near-the-end",
            "bytes together",
            json!({"size": LARGEST}),
        ),
        instead("negative-size", "size is -1", json!({"size": -1})),
        kind("sum-of-sizes", |c| {
            let zeros = |number: u64| {
                let more = json!({"size": 1_u64 << 42, "chunkSize": 0, "chunkType": "zeros"});
                c.entry(&c.path(&format!("z{number}")), more)
            };
            let entries = (0..3).map(zeros).chain([c.honest()]).collect();
            (entries, Unpacked("bytes together"))
        }),
        instead(
            "offset-near-the-end",
            "not before the table",
            json!({"offset": LARGEST}),
        ),
        instead(
            "offset-beyond",
            "not before the table",
            json!({"offset": 1_000_000}),
        ),
        instead("negative-offset", "offset is -1", json!({"offset": -1})),
        instead(
            "inner-offset",
            "decoded at once",
            json!({"innerOffset": LARGEST}),
        ),
        instead(
            "chunk-beyond-the-file",
            "reaches beyond",
            json!({"chunkSize": SIZE + 1}),
        ),
        instead("chunk-gap", "was due", json!({"chunkOffset": 7})),
        instead(
            "chunks-too-short",
            "its chunks end",
            json!({"chunkSize": 7}),
        ),
        instead(
            "no-digest",
            "has a digest",
            json!({"digest": "", "chunkDigest": ""}),
        ),
        instead(
            "not-a-digest",
            "no",
            json!({"chunkDigest": "sha256:../../x"}),
        ),
        beside("chunk-of-nothing", "without a regular file", |c| {
            // After a directory, no file is open.
            let _ = c;
            json!({"name": "x", "type": "chunk", "chunkSize": 1})
        })
        .after_a_directory(),
        kind("overlap", |c| {
            let part = |name: &str, inner: u64, size: usize| {
                let digest = Digest::of(&c.file[..size]);
                let more = json!({
                    "size": size, "innerOffset": inner, "digest": digest, "chunkDigest": digest,
                });
                c.entry(&c.path(name), more)
            };
            (
                vec![part("a", 0, 100), part("b", 50, 100)],
                Unpacked("overlap"),
            )
        }),
        kind("wrong-chunk-digest", |c| {
            let other = Digest::of(b"something else");
            let entry = c.entry(
                &c.path("inside"),
                json!({"digest": other, "chunkDigest": other}),
            );
            (vec![entry], Lazy(vec![(c.path("inside"), Seen::Broken)]))
        }),
        kind("wrong-file-digest", |c| {
            // Each chunk's own digest is what counts.
            let other = Digest::of(b"something else");
            let entry = c.entry(&c.path("inside"), json!({"digest": other}));
            (vec![entry], shown(c, "inside"))
        }),
        kind("content-of-another-layer", |c| {
            // As if the layer held what the good image's first file holds.
            let other = Digest::of(&crate::good_content(0));
            let more = json!({
                "size": crate::GOOD_SIZE, "digest": other, "chunkDigest": other,
            });
            let entry = c.entry(&c.path("inside"), more);
            (vec![entry], Lazy(vec![(c.path("inside"), Seen::Broken)]))
        }),
        kind("offset-within-a-unit", |c| {
            // Not where a compressed unit begins.
            let entry = c.entry(&c.path("inside"), json!({"offset": c.offset + 1}));
            (vec![entry], Lazy(vec![(c.path("inside"), Seen::Broken)]))
        }),
    ])
}

impl Kind {
    /// With a directory between the file and the entry.
    fn after_a_directory(self) -> Self {
        let make = self.make;
        kind(self.name, move |content| {
            let (mut entries, outcome) = make(content);
            entries.insert(1, named(content.path("d")));
            (entries, outcome)
        })
    }
}

/// The file is seen as it is.
fn shown(content: &Content, below: &str) -> Outcome {
    Lazy(vec![(
        content.path(below),
        Seen::Content(content.file.clone()),
    )])
}

/// What is no TOC, whatever its entries.
fn documents() -> Result<Vec<Layer>> {
    let (gzip, zstd) = (Format::Estargz, Format::ZstdChunked);
    let mut layers = Vec::new();
    for (name, format, json, reason) in [
        ("no-json", gzip, &b"no JSON"[..], "not the JSON"),
        ("empty", zstd, b"", ""),
        (
            "half",
            gzip,
            br#"{"version":1,"entries":[{"name":"#,
            "not the JSON",
        ),
        ("nested", zstd, &[b'['; 100_000], "not the JSON"),
        (
            "version",
            gzip,
            br#"{"version":2,"entries":[]}"#,
            "version 2",
        ),
        (
            "version-huge",
            zstd,
            br#"{"version":1e99,"entries":[]}"#,
            "not the JSON",
        ),
        (
            "entries-twice",
            gzip,
            br#"{"version":1,"entries":[],"entries":[]}"#,
            "duplicate",
        ),
    ] {
        let content = Content::new(format, name)?;
        layers.push(content.with_json(json, Unpacked(reason))?);
    }

    // Bytes that are no UTF-8 are a name like any other on Linux.
    let content = Content::new(gzip, "not-utf8")?;
    let mut json = serde_json::to_vec(&json!({"version": 1, "entries": [content.honest()]}))?;
    let at = json.windows(6).position(|part| part == b"inside");
    json[at.unwrap_or_default()] = 0xff;
    layers.push(content.with_json(&json, Lazy(Vec::new()))?);

    // A mebibyte more than is read, of nothing.
    for (name, format) in [("toc-bomb", gzip), ("toc-bomb-zstd", zstd)] {
        let content = Content::new(format, name)?;
        let mut json = serde_json::to_vec(&json!({"version": 1, "entries": [content.honest()]}))?;
        json.resize(257 << 20, b' ');
        layers.push(content.with_json(&json, Unpacked("larger than"))?);
    }
    Ok(layers)
}

/// What is wrong with the blob.
fn blobs() -> Result<Vec<Layer>> {
    let (gzip, zstd) = (Format::Estargz, Format::ZstdChunked);
    let honest = |format: Format, name: &str, outcome: Outcome| -> Result<Layer> {
        let content = Content::new(format, name)?;
        let entry = content.honest();
        content.with(&[entry], outcome)
    };
    let mut layers =
        vec![
            honest(gzip, "wrong-toc-digest", Unpacked("has digest"))?
                .annotate(TOC_DIGEST, Digest::of(b"another")),
            honest(zstd, "wrong-toc-digest-zstd", Unpacked("has digest"))?
                .annotate(TOC_DIGEST, Digest::of(b"another")),
            honest(zstd, "no-digest-of-the-toc", Unpacked("SHA-256"))?
                .annotate(TOC_DIGEST, "sha512:0"),
            honest(gzip, "footer-beyond", Unpacked("outside of the blob"))?
                .with_end(&estargz_footer(u64::MAX))?,
            honest(gzip, "footer-of-the-start", Unpacked(""))?.with_end(&estargz_footer(0))?,
            honest(zstd, "footer-overflow", Unpacked("outside of the blob"))?
                .with_end(&zstd_footer(u64::MAX, u64::MAX, 1))?,
            honest(zstd, "footer-size", Unpacked("outside of the blob"))?
                .with_end(&zstd_footer(8, 1 << 40, 100))?,
            honest(zstd, "footer-bomb", Unpacked("larger than"))?.with_end(&zstd_footer(
                8,
                20,
                u64::MAX,
            ))?,
            honest(zstd, "position-annotation", Unpacked(""))?.annotate(
                "io.containers.zstd-chunked.manifest-position",
                format!("{}:18446744073709551615:1:1", u64::MAX),
            ),
        ];

    // A position is a hint: where it leads nowhere, the footer is asked.
    let content = Content::new(zstd, "position-of-content")?;
    let (entry, seen) = (content.honest(), shown(&content, "inside"));
    let hint = "containerd.io/snapshot/io.containers.zstd-chunked.manifest-position";
    let layer = content.with(&[entry], seen)?;
    layers.push(layer.annotate(hint, "8:20:100:1"));

    // No footer at all.
    let content = Content::new(gzip, "no-footer")?;
    let mut blob = content.bytes.clone();
    blob.extend(compress(gzip, &[0; 1024]));
    let reason = Unpacked("no known footer");
    layers.push(Layer::new(
        "no-footer",
        gzip,
        blob,
        Digest::of(b""),
        reason,
    )?);

    // A TOC of many empty gzip members.
    let content = Content::new(gzip, "empty-members")?;
    let mut blob = content.bytes.clone();
    blob.extend(compress(gzip, &[0; 1024]));
    let toc = blob.len() as u64;
    let empty = compress(gzip, b"");
    for _ in 0..50_000 {
        blob.extend(&empty);
    }
    blob.extend(estargz_footer(toc));
    let reason = Unpacked("not valid eStargz data");
    layers.push(Layer::new(
        "empty-members",
        gzip,
        blob,
        Digest::of(b""),
        reason,
    )?);

    // A frame that asks for 2 GiB of memory to decode 100,000 bytes.
    let mut content = Content::new(zstd, "huge-window")?;
    let at = content.bytes.len() as u64;
    content.bytes.extend(huge_window());
    let digest = Digest::of(&[b'A'; 100_000]);
    let more = json!({"size": 100_000, "offset": at, "digest": digest, "chunkDigest": digest});
    let entries = [content.honest(), content.entry(&content.path("wide"), more)];
    let seen = vec![
        (content.path("inside"), Seen::Content(content.file.clone())),
        (content.path("wide"), Seen::Broken),
    ];
    let toc = serde_json::to_vec(&json!({"version": 1, "entries": entries}))?;
    let name = content.name.clone();
    let blob = Blob::with_toc(zstd, content.bytes, toc.clone()).bytes;
    layers.push(Layer {
        // Nothing decodes it to tell its digest.
        diff_id: Digest::of(b"unknown"),
        annotations: [(TOC_DIGEST.to_owned(), Digest::of(&toc).to_string())].into(),
        outcome: Lazy(seen),
        format: zstd,
        name,
        blob,
    });

    // A TOC frame within a frame of the units, and the other way round.
    let content = Content::new(zstd, "frames")?;
    let mut blob = content.bytes.clone();
    skippable(&mut blob, &compress(zstd, b"{}"));
    let end = blob.len() as u64;
    skippable(&mut blob, &zstd_footer(end - 4, 4, 100));
    layers.push(Layer::new("frames", zstd, blob, Digest::of(b"{}"), Any)?);
    Ok(layers)
}

/// A frame without its size, with a window of 2 GiB and one block of a
/// repeated byte.
fn huge_window() -> Vec<u8> {
    const WINDOW_LOG: u8 = 31;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (WINDOW_LOG - 10) << 3];
    let (last, repeated) = (1, 1 << 1);
    let block: u32 = 100_000 << 3 | repeated | last;
    frame.extend(&block.to_le_bytes()[..3]);
    frame.push(b'A');
    frame
}
