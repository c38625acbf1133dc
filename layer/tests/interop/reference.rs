//! Runs the Go program over stargz-snapshotter's library.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use base64::Engine as _;
use serde_json::Value;
use sluice_layer::Format;

use crate::listing::{Listing, Seen, word};

/// The distribution's Go, which can build the distribution's libraries.
const GO: &str = "/usr/bin/go";
const GOPATH: &str = "/usr/share/gocode";

/// The program, compiled once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("reference");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference");
        let built = Command::new(GO)
            .args(["build", "-o"])
            .arg(&program)
            .arg(".")
            .current_dir(source)
            .env("GO111MODULE", "off")
            .env("GOPATH", GOPATH)
            .env("GOFLAGS", "")
            .env("GOTOOLCHAIN", "local")
            .output()
            .unwrap_or_else(|error| {
                panic!("{GO}: {error}: install golang-go, golang-github-containerd-stargz-snapshotter-dev and golang-github-containerd-containerd-dev")
            });
        assert!(
            built.status.success(),
            "the reference program does not build; are golang-github-containerd-stargz-snapshotter-dev and golang-github-containerd-containerd-dev installed? {}",
            String::from_utf8_lossy(&built.stderr)
        );
        program
    })
}

fn run(args: &[&str], input: &[u8]) -> String {
    let mut child = Command::new(program())
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "reference {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a layer of a tar; 0 is the default chunk size.
pub(crate) fn build(
    tar: &[u8],
    format: Format,
    chunk_size: u64,
    prioritized: &[&str],
) -> (Vec<u8>, BTreeMap<String, String>) {
    let blob = tempfile::NamedTempFile::new().unwrap();
    let path = blob.path().to_str().unwrap();
    let chunk_size = chunk_size.to_string();
    let mut args = vec!["build", word(format), &chunk_size, path];
    args.extend(prioritized);
    let annotations = run(&args, tar);
    let bytes = std::fs::read(path).unwrap();
    (bytes, serde_json::from_str(&annotations).unwrap())
}

/// Reads a layer, verifying all of it. Whiteouts, opaque directories and
/// landmarks, which the library shows as files, become what its file system
/// makes of them.
pub(crate) fn dump(blob: &[u8], annotations: &BTreeMap<String, String>) -> Listing {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), blob).unwrap();
    let digest = &annotations["containerd.io/snapshot/stargz/toc.digest"];
    let lines = run(&["dump", file.path().to_str().unwrap(), digest], b"");
    let mut listing = Listing::default();
    let mut opaque = Vec::new();
    for line in lines.lines() {
        let entry: Value = serde_json::from_str(line).unwrap();
        let path = entry["path"].as_str().unwrap().to_owned();
        let (directory, base) = path.rsplit_once('/').unwrap_or(("", &path));
        match path.as_str() {
            ".prefetch.landmark" => {
                listing.landmark = true;
                continue;
            }
            ".no.prefetch.landmark" => continue,
            _ if base == ".wh..wh..opq" => {
                opaque.push(directory.to_owned());
                continue;
            }
            _ => {}
        }
        let mut seen = seen(&entry);
        if path.is_empty() {
            // The library does not count the name `.` of a root that the TOC
            // describes.
            seen.links += 1;
        }
        let mut name = path.clone();
        if let Some(hidden) = base.strip_prefix(".wh.") {
            name = if directory.is_empty() {
                hidden.to_owned()
            } else {
                format!("{directory}/{hidden}")
            };
            seen.kind = "char 0:0".to_owned();
            seen.mode = 0;
            seen.content = None;
        }
        listing.seen.insert(name, seen);
    }
    for directory in opaque {
        listing.seen.get_mut(&directory).unwrap().kind = "opaque dir".to_owned();
    }
    listing
}

/// Unpacks a tar as containerd does for its overlay snapshotter.
pub(crate) fn unpack(tar: &[u8], directory: &Path) {
    run(&["unpack", directory.to_str().unwrap()], tar);
}

fn seen(entry: &Value) -> Seen {
    let number = |field: &str| entry[field].as_i64().unwrap();
    let text = |field: &str| entry[field].as_str().unwrap().to_owned();
    let kind = text("type");
    Seen {
        kind: match kind.as_str() {
            "reg" => format!("reg {}", number("size")),
            "symlink" => format!("symlink {}", text("linkName")),
            "char" | "block" => format!("{kind} {}:{}", number("devMajor"), number("devMinor")),
            _ => kind.clone(),
        },
        mode: number("mode") as u32,
        owner: (number("uid") as u32, number("gid") as u32),
        mtime: number("mtime"),
        links: number("links") as u32,
        xattrs: entry["xattrs"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| {
                let value =
                    base64::engine::general_purpose::STANDARD.decode(value.as_str().unwrap());
                (name.clone(), value.unwrap())
            })
            .collect(),
        content: (kind == "reg").then(|| text("content")),
        chunks: number("chunks") as usize,
    }
}
