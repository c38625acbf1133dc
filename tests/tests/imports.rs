//! Imports point one way: between crates, and between the snapshotter's
//! modules.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What each crate may depend on within the workspace. `tests`, `interleavings`
/// and `benches` may use anything and nothing uses them, but that benches stand
/// on the harness.
const CRATES: &[(&str, &[&str])] = &[
    ("oci", &[]),
    ("proto", &[]),
    ("layer", &["oci"]),
    ("registry", &["oci"]),
    ("converter", &["oci", "layer", "registry"]),
    ("snapshotter", &["oci", "layer", "registry", "proto"]),
    (
        "cli",
        &[
            "oci",
            "layer",
            "registry",
            "converter",
            "snapshotter",
            "proto",
        ],
    ),
    (
        "tests",
        &[
            "oci",
            "layer",
            "registry",
            "converter",
            "snapshotter",
            "proto",
        ],
    ),
    // Compiles the fetch engine anew, with other locks.
    (
        "interleavings",
        &["oci", "layer", "registry", "snapshotter"],
    ),
    (
        "benches",
        &[
            "oci",
            "layer",
            "registry",
            "converter",
            "snapshotter",
            "proto",
            "tests",
        ],
    ),
];

/// What each of the snapshotter's modules may use of the others. The consumer
/// owns a trait and does not know who implements it: `node` sees `service` and
/// `fetch` sees `fuse`, never the reverse.
const MODULES: &[(&str, &[&str])] = &[
    ("layer_dir", &[]),
    ("erofs", &["layer_dir"]),
    ("chunk_index", &["layer_dir"]),
    ("mount", &[]),
    ("remote", &["layer_dir"]),
    ("fuse", &["erofs", "layer_dir"]),
    ("fetch", &["layer_dir", "remote", "fuse"]),
    ("dependencies", &["erofs", "fetch", "layer_dir", "service"]),
    (
        "node",
        &[
            "chunk_index",
            "dependencies",
            "mount",
            "fuse",
            "fetch",
            "layer_dir",
            "erofs",
            "remote",
            "service",
            "keeper",
            "profiles",
            "scrub",
            "descriptors",
        ],
    ),
    ("scrub", &["layer_dir"]),
    ("profiles", &["erofs", "layer_dir"]),
    ("control", &["node", "service", "fetch", "profiles"]),
    ("keeper", &["fuse"]),
    ("descriptors", &[]),
    ("service", &[]),
    ("containerd", &["service"]),
    ("socket", &[]),
    ("crash_points", &[]),
    (
        "config",
        &["mount", "fuse", "fetch", "node", "remote", "service"],
    ),
    (
        "daemon",
        &[
            "config",
            "containerd",
            "control",
            "descriptors",
            "keeper",
            "socket",
            "service",
            "node",
            "mount",
            "fuse",
            "fetch",
            "remote",
            "layer_dir",
            "scrub",
        ],
    ),
    // The other composition root: an image without containerd.
    ("standalone", &["mount", "node", "service", "socket"]),
    // For fuzzing alone: whatever reads foreign bytes.
    (
        "fuzzing",
        &[
            "dependencies",
            "erofs",
            "fetch",
            "fuse",
            "keeper",
            "layer_dir",
            "service",
        ],
    ),
    // The program: arguments in, exit status out.
    ("cleanup", &["mount", "socket"]),
    ("crashing", &[]),
    (
        "main",
        &["daemon", "config", "keeper", "cleanup", "scrub", "socket"],
    ),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace's directory")
        .to_owned()
}

#[test]
fn crates_import_one_way() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version=1", "--locked"])
        .current_dir(workspace())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{output:?}");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rules: BTreeMap<_, _> = CRATES.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let Some(allowed) = name
            .strip_prefix("sluice-")
            .and_then(|short| rules.get(short))
        else {
            wrong.push(format!("crate {name} has no rule in {}", file!()));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            // A dependency without a registry is one of the workspace.
            let within = dependency["source"].is_null();
            let used = dependency["name"].as_str().unwrap();
            let short = used.strip_prefix("sluice-").unwrap_or(used);
            if within && dependency["kind"].is_null() && !allowed.contains(&short) {
                wrong.push(format!("{name} must not depend on {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn snapshotter_modules_import_one_way() {
    let source = workspace().join("snapshotter/src");
    let rules: BTreeMap<_, _> = MODULES.iter().copied().collect();
    let lib = std::fs::read_to_string(source.join("lib.rs")).unwrap();
    let mut wrong = Vec::new();
    for file in rust_files(&source) {
        let path = module_path(file.strip_prefix(&source).unwrap());
        let Some(module) = path.first() else {
            continue; // lib.rs only names the modules
        };
        if lib.contains(&format!("#[cfg(test)]\nmod {module};")) {
            continue; // helps tests, and may know everything
        }
        let Some(allowed) = rules.get(module.as_str()) else {
            wrong.push(format!(
                "{}: module {module} has no rule in {}",
                file.display(),
                file!()
            ));
            continue;
        };
        let text = std::fs::read_to_string(&file).unwrap();
        for used in imported_modules(&text, &path) {
            let known = rules.contains_key(used.as_str());
            if known && used != *module && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{}: {module} must not use {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// All product source files below; tests in files of their own are exempt.
fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).expect("the directory reads") {
        let path = entry.expect("the directory reads").path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "tests") {
                files.extend(rust_files(&path));
            }
        } else if path.extension().is_some_and(|ext| ext == "rs")
            && path.file_name().is_none_or(|name| name != "tests.rs")
        {
            files.push(path);
        }
    }
    files
}

/// `fuse/session.rs` is `[fuse, session]`, `fuse/mod.rs` is `[fuse]`.
fn module_path(file: &Path) -> Vec<String> {
    let mut path: Vec<String> = file
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if path
        .last()
        .is_some_and(|last| last == "mod" || last == "lib")
    {
        path.pop();
    }
    path
}

/// The crate's top-level modules that a source text names by a path.
fn imported_modules(text: &str, at: &[String]) -> BTreeSet<String> {
    let product = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code: String = product
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join(" ");
    let up_to_root = "super::".repeat(at.len());
    let mut found = BTreeSet::new();
    for prefix in ["crate::", "sluice_snapshotter::", &up_to_root] {
        for (position, _) in code.match_indices(prefix) {
            let before = code[..position].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            found.extend(first_names(&code[position + prefix.len()..]));
        }
    }
    found
}

/// `fetch::Fetcher` names `fetch`; `{fetch::{A, B}, node}` both.
fn first_names(rest: &str) -> Vec<String> {
    let rest = rest.trim_start();
    let identifier = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let Some(group) = rest.strip_prefix('{') else {
        return vec![identifier(rest)];
    };
    let mut names = Vec::new();
    let mut depth = 0;
    let mut item = String::new();
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(identifier(item.trim()));
                item.clear();
                continue;
            }
            _ => {}
        }
        item.push(c);
    }
    names.push(identifier(item.trim()));
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn the_scan_sees_every_form_of_import() {
    let text = "use crate::fetch::X; use crate::{node::{A, B}, mount};\n\
                fn f() { super::super::erofs::g() } // crate::service\n\
                #[cfg(test)] mod tests { use crate::daemon; }";
    let at = ["fuse".to_owned(), "session".to_owned()];
    let found: Vec<_> = imported_modules(text, &at).into_iter().collect();
    assert_eq!(found, ["erofs", "fetch", "mount", "node"]);
}
