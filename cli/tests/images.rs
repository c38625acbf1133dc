//! `sluice convert`, `inspect` and `verify` as a person types them.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use sluice_oci::{Digest, media_type};
use tempfile::TempDir;

struct Run {
    code: i32,
    out: String,
    err: String,
}

fn sluice(directory: &Path, args: &[&str]) -> Run {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap();
    Run {
        code: status.code().unwrap(),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = Digest::of(bytes);
    fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}

/// A directory with a layout `in` that holds the image `v1` of one layer.
fn workplace() -> TempDir {
    let directory = TempDir::new().unwrap();
    let layout = directory.path().join("in");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    for (name, size) in [("bin/sh", 9000), ("etc/passwd", 100), ("var/empty", 0)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o755);
        let content = vec![b'x'; size as usize];
        builder
            .append_data(&mut header, name, content.as_slice())
            .unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let layer = blob(&layout, media_type::OCI_LAYER, &tar);
    let config = json!({
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = blob(
        &layout,
        media_type::OCI_CONFIG,
        config.to_string().as_bytes(),
    );
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let mut manifest = blob(
        &layout,
        media_type::OCI_MANIFEST,
        manifest.to_string().as_bytes(),
    );
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "v1"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    directory
}

#[test]
fn convert_inspect_and_verify() {
    let place = workplace();
    let run = |args: &[&str]| sluice(place.path(), args);
    fs::write(
        place.path().join("first.txt"),
        "# start\n/etc/passwd\n\nno/such\n",
    )
    .unwrap();
    for format in ["estargz", "zstd-chunked"] {
        let to = format!("oci:out:{format}");
        let arguments = [
            "convert",
            "--format",
            format,
            "--chunk-size",
            "4K",
            "--prioritize",
            "first.txt",
            "oci:in:v1",
            &to,
        ];
        let Run { code, out, err } = run(&arguments);
        assert_eq!(code, 0, "{err}");
        let digest = out.trim().to_owned();
        assert!(digest.parse::<Digest>().is_ok(), "{out}");
        let lines: Vec<&str> = err.lines().collect();
        assert_eq!(lines.len(), 4, "{err}");
        assert_eq!(lines[0], "1 layer");
        assert!(lines[1].contains(" converted to "), "{err}");
        assert_eq!(
            lines[2],
            "warning: no layer holds the prioritized file /no/such; give its path without symbolic \
             links"
        );
        assert!(
            lines[3].starts_with(&format!("{to}: 1 of 1 layers converted; ")),
            "{err}"
        );

        let Run { code, out, .. } = run(&["inspect", "--json", &to]);
        assert_eq!(code, 0);
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json["digest"], digest);
        assert_eq!(json["images"][0]["platform"], "linux/amd64");
        let layer = &json["images"][0]["layers"][0];
        assert_eq!(layer["lazy"], "yes");
        assert_eq!(layer["format"], format);
        assert_eq!(layer["files"], 3);
        assert_eq!(layer["chunks"], 4);
        assert_eq!(layer["prioritized"], json!(["/etc/passwd"]));

        let Run { code, out, .. } = run(&["inspect", &to]);
        assert_eq!(code, 0);
        assert!(
            out.contains("6 entries, 3 files of 8.89 KiB, 4 chunks, 1 prioritized"),
            "{out}"
        );

        let Run { code, out, .. } = run(&["verify", &to]);
        assert_eq!(code, 0);
        assert_eq!(
            out,
            format!(
                "{to}: 1 layer, 1 of them lazily loadable, 4 chunks: all as their digests say\n"
            )
        );
    }
    let Run { out, .. } = run(&["inspect", "oci:in"]);
    assert!(out.contains("not lazily loadable"), "{out}");
}

#[test]
fn verify_prints_a_line_for_each_defect() {
    let place = workplace();
    assert_eq!(
        sluice(place.path(), &["convert", "oci:in:v1", "oci:out:v1"]).code,
        0
    );
    let blobs = fs::read_dir(place.path().join("out/blobs/sha256")).unwrap();
    let layer = blobs
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read(path).unwrap().starts_with(&[0x1f, 0x8b]))
        .unwrap();
    let mut bytes = fs::read(&layer).unwrap();
    bytes.push(0);
    fs::write(&layer, bytes).unwrap();
    let Run { code, out, err } = sluice(place.path(), &["verify", "oci:out:v1"]);
    assert_eq!(code, 1);
    assert!(out.lines().count() >= 2, "{out}");
    assert!(
        out.lines().all(|line| line.starts_with("layer sha256:")),
        "{out}"
    );
    assert!(err.starts_with("sluice: oci:out:v1 has "), "{err}");
}

#[test]
fn failures_are_one_line_and_exit_with_1() {
    let place = workplace();
    fs::create_dir(place.path().join("empty")).unwrap();
    for (args, expected) in [
        (
            &["inspect", "oci:nowhere"][..],
            "sluice: nowhere is no OCI layout: there is no such directory; ",
        ),
        (
            &["verify", "oci:empty"],
            "sluice: empty is no OCI layout: it has no file oci-layout; ",
        ),
        (
            &["convert", "oci:in:v2", "oci:out"],
            "sluice: in holds no image named 'v2'; it has: v1",
        ),
        (
            &[
                "convert",
                "--platform",
                "linux/s390x",
                "oci:in:v1",
                "oci:out",
            ],
            "sluice: the image has nothing for linux/s390x; it is for linux/amd64",
        ),
        (
            &[
                "convert",
                "--prioritize",
                "none.txt",
                "oci:in:v1",
                "oci:out",
            ],
            "sluice: cannot read the list of prioritized files none.txt: ",
        ),
        (&["inspect", "127.0.0.1:1/no/registry"], "sluice: cannot "),
    ] {
        let Run { code, out, err } = sluice(place.path(), args);
        assert_eq!(code, 1, "{args:?}");
        assert_eq!(out, "");
        assert!(err.starts_with(expected), "{args:?}: {err}");
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(!place.path().join("out").exists());
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    let place = workplace();
    for (args, expected) in [
        (&[][..], "Usage: sluice <COMMAND>"),
        (&["convert", "oci:in:v1"], "<DST>"),
        (&["convert", "oci:", "oci:out"], "names no directory"),
        (&["inspect", "r.io/UPPER"], "is not an image reference"),
        (
            &["convert", "--chunk-size", "1", "oci:in", "oci:out"],
            "a chunk has 4K to 32M bytes",
        ),
        (
            &["convert", "--level", "13", "oci:in", "oci:out"],
            "--level is 1 to 12 for eStargz",
        ),
        (
            &["convert", "--platform", "linux", "oci:in", "oci:out"],
            "'linux' is no platform",
        ),
        (
            &["convert", "--format", "zip", "oci:in", "oci:out"],
            "zstd-chunked",
        ),
    ] {
        let Run { code, err, .. } = sluice(place.path(), args);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(err.contains(expected), "{args:?}: {err}");
    }
}

#[test]
fn help_has_examples() {
    let place = workplace();
    for command in ["convert", "inspect", "verify"] {
        let Run { code, out, .. } = sluice(place.path(), &[command, "--help"]);
        assert_eq!(code, 0);
        assert!(
            out.contains(&format!("Examples:\n  sluice {command} ")),
            "{out}"
        );
    }
}
