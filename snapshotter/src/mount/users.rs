//! Who uses a mount, in whichever mount namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, Mount, table};

/// An overlayfs mount that stands on directories below another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Where it is mounted.
    pub target: PathBuf,
    /// Those of its lower directories that are below.
    pub lower: Vec<PathBuf>,
    /// Its upper directory, if it can be written to.
    pub upper: Option<PathBuf>,
    /// Processes that see it, when it is in another mount namespace.
    pub processes: Vec<Process>,
}

/// A process, as a person knows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.pid, self.name)
    }
}

/// A process that works below a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Which.
    pub process: Process,
    /// How: `current directory`, `open file`, ...
    pub how: &'static str,
    /// With what.
    pub path: PathBuf,
}

/// The overlays that have lower directories below `root`, in every mount
/// namespace that some process is in.
pub fn overlays_on(root: &Path) -> Result<Vec<Overlay>, Error> {
    let mut found: BTreeMap<(String, PathBuf), Overlay> = BTreeMap::new();
    let own = namespace("self");
    let mut namespaces: BTreeMap<String, Vec<Process>> = BTreeMap::new();
    if let Some(own) = &own {
        namespaces.insert(own.clone(), Vec::new());
    }
    for process in processes() {
        let Some(namespace) = namespace(&process.pid.to_string()) else {
            continue;
        };
        let members = namespaces.entry(namespace.clone()).or_default();
        if own.as_ref() != Some(&namespace) {
            members.push(process);
        }
    }
    for (namespace, members) in namespaces {
        let who = members
            .first()
            .map_or_else(|| "self".to_owned(), |process| process.pid.to_string());
        // It may have ended meanwhile.
        let Ok(mounts) = table::mounts_of(&who) else {
            continue;
        };
        for mount in mounts {
            let lower = lower_below(&mount, root);
            if lower.is_empty() {
                continue;
            }
            let key = (namespace.clone(), mount.target.clone());
            found.insert(
                key,
                Overlay {
                    upper: upper(&mount),
                    target: mount.target,
                    lower,
                    processes: members.clone(),
                },
            );
        }
    }
    Ok(found.into_values().collect())
}

/// Each overlay once, in whichever namespaces it is: a service that has mounts
/// of its own begins with copies of all that there are.
pub fn once_each(mut overlays: Vec<Overlay>) -> Vec<Overlay> {
    // Where this process sees it as well, it says so.
    overlays.sort_by_key(|overlay| !overlay.processes.is_empty());
    let mut seen = BTreeSet::new();
    overlays.retain(|overlay| seen.insert((overlay.target.clone(), overlay.upper.clone())));
    overlays
}

/// Directories of the mount at `place` that overlays and bind mounts stand on,
/// as far as this process's mount namespace shows: containers' root file
/// systems are mounted in containerd's, which is the daemon's.
pub fn directories_in_use(place: &Path) -> Result<BTreeSet<PathBuf>, Error> {
    let mounts = table::mounts()?;
    let own = mounts.iter().find(|mount| mount.target == place);
    let device = own.map(|mount| mount.device.as_str());
    let mut used = BTreeSet::new();
    for mount in &mounts {
        used.extend(lower_below(mount, place));
        if Some(mount.device.as_str()) == device && mount.target != place {
            let inside = mount.root.strip_prefix("/").unwrap_or(&mount.root);
            used.insert(place.join(inside));
        }
    }
    Ok(used)
}

/// The processes that have files open, run or stand below `directory`.
pub fn holders_below(directory: &Path) -> Vec<Holder> {
    let mut holders = Vec::new();
    for process in processes() {
        let proc = PathBuf::from(format!("/proc/{}", process.pid));
        let mut links = vec![
            ("current directory", proc.join("cwd")),
            ("root directory", proc.join("root")),
            ("program", proc.join("exe")),
        ];
        for (how, directory) in [("open file", "fd"), ("mapped file", "map_files")] {
            let entries = fs::read_dir(proc.join(directory)).into_iter().flatten();
            links.extend(entries.flatten().map(|entry| (how, entry.path())));
        }
        let mut seen = BTreeSet::new();
        for (how, link) in links {
            // The link's text, without looking at what it names.
            let Ok(path) = fs::read_link(link) else {
                continue;
            };
            if path.starts_with(directory) && seen.insert(path.clone()) {
                holders.push(Holder {
                    process: process.clone(),
                    how,
                    path,
                });
            }
        }
    }
    holders
}

fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            Some(Process {
                pid,
                name: name.trim_end().to_owned(),
            })
        })
        .collect()
}

fn namespace(process: &str) -> Option<String> {
    let link = fs::read_link(format!("/proc/{process}/ns/mnt")).ok()?;
    Some(link.to_string_lossy().into_owned())
}

/// `lowerdir=/a:/b,...`, or one `lowerdir+=/a` for each.
fn lower_below(mount: &Mount, root: &Path) -> Vec<PathBuf> {
    if mount.kind != "overlay" {
        return Vec::new();
    }
    let options = mount.super_options.split(',');
    let lower = options.filter_map(|option| {
        let (name, value) = option.split_once('=')?;
        matches!(name, "lowerdir" | "lowerdir+" | "datadir+").then_some(value)
    });
    lower
        .flat_map(|value| value.split(':'))
        .map(PathBuf::from)
        .filter(|path| path.starts_with(root))
        .collect()
}

fn upper(mount: &Mount) -> Option<PathBuf> {
    let mut options = mount.super_options.split(',');
    options.find_map(|option| Some(option.strip_prefix("upperdir=")?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &str) -> Mount {
        Mount {
            id: 1,
            device: "0:1".into(),
            root: "/".into(),
            target: "/merged".into(),
            kind: "overlay".into(),
            source: "overlay".into(),
            options: "ro".into(),
            super_options: options.into(),
        }
    }

    #[test]
    fn lower_directories_are_read_in_both_spellings() {
        for options in [
            "ro,lowerdir=/r/m/1:/elsewhere:/r/m/22,upperdir=/r/u",
            "rw,lowerdir+=/r/m/1,lowerdir+=/rest,lowerdir+=/r/m/22,workdir=/r/w",
        ] {
            let found = lower_below(&overlay(options), Path::new("/r"));
            assert_eq!(found, [Path::new("/r/m/1"), Path::new("/r/m/22")]);
        }
        let none = lower_below(&overlay("lowerdir=/rest/m"), Path::new("/r"));
        assert!(none.is_empty());
        let writable = overlay("ro,lowerdir=/r/m/1,upperdir=/r/u");
        assert_eq!(upper(&writable), Some("/r/u".into()));
        assert_eq!(upper(&overlay("ro,lowerdir=/r/m/1:/r/m/2")), None);
    }

    #[test]
    fn copies_in_other_namespaces_are_one_overlay() {
        let overlay = |target: &str, upper: Option<&str>, elsewhere: bool| Overlay {
            target: target.into(),
            lower: vec!["/r/m/1".into()],
            upper: upper.map(PathBuf::from),
            processes: elsewhere
                .then(|| Process {
                    pid: 7,
                    name: "other".to_owned(),
                })
                .into_iter()
                .collect(),
        };
        let here = overlay("/run/a", Some("/s/1"), false);
        let copy = overlay("/run/a", Some("/s/1"), true);
        let other = overlay("/run/a", Some("/s/2"), true);
        let found = once_each(vec![copy.clone(), other.clone(), here.clone(), copy]);
        assert_eq!(found, [here, other]);
    }

    #[test]
    fn overlays_and_open_files_are_found() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        for name in ["a", "b", "merged"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        fs::write(root.join("a/file"), "content").unwrap();
        let open = fs::File::open(root.join("a/file")).unwrap();
        let holders = holders_below(root);
        let mine = |holder: &&Holder| holder.process.pid == std::process::id();
        let held: Vec<_> = holders.iter().filter(mine).collect();
        assert_eq!(held.len(), 1, "{held:?}");
        assert_eq!(held[0].how, "open file");
        assert_eq!(held[0].path, root.join("a/file"));
        drop(open);

        let options = format!(
            "lowerdir={}:{}",
            root.join("a").display(),
            root.join("b").display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let merged = root.join("merged");
        rustix::mount::mount(
            "overlay",
            &merged,
            "overlay",
            rustix::mount::MountFlags::RDONLY,
            &*options,
        )
        .unwrap();
        let found = overlays_on(root).unwrap();
        let used = directories_in_use(root).unwrap();
        assert!(
            used.iter().eq(&[root.join("a"), root.join("b")]),
            "{used:?}"
        );
        super::super::unmount(&merged).unwrap();
        assert!(directories_in_use(root).unwrap().is_empty());
        assert!(overlays_on(root).unwrap().is_empty());
        let own: Vec<_> = found.iter().filter(|o| o.processes.is_empty()).collect();
        assert_eq!(own.len(), 1, "{found:?}");
        assert_eq!(own[0].target, merged);
        assert_eq!(own[0].lower, [root.join("a"), root.join("b")]);
    }
}
