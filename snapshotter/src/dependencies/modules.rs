//! From the names that a Python module uses to the files of the modules that
//! they are, as the interpreter would find them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::trees::{Place, Trees};
use crate::erofs::FileType;

/// How many directories above its own a module's names are looked up in.
const ABOVE: usize = 2;
/// Places where Python looks for modules, of one image.
const ROOTS: usize = 16;
/// Where compiled modules are.
const COMPILED: &[u8] = b"__pycache__";
const INIT: &[u8] = b"__init__";
/// About what a name takes beside its bytes.
const ENTRY: usize = 64;

/// What was found out about an image's modules.
#[derive(Debug, Default)]
pub(super) struct Modules {
    roots: OnceLock<Vec<Vec<u8>>>,
    packages: Mutex<HashMap<Vec<u8>, Arc<Package>>>,
}

/// What can be imported from a directory.
#[derive(Debug, Default)]
struct Package {
    modules: HashMap<Box<[u8]>, (Kind, Place)>,
    packages: HashSet<Box<[u8]>>,
}

/// Of several that a name can mean, the last is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Source,
    Compiled,
    Library,
}

impl Modules {
    fn roots(&self, trees: &Trees) -> &[Vec<u8>] {
        self.roots.get_or_init(|| roots(trees))
    }

    /// Whether modules of packages are in `directory`, or can be.
    pub(super) fn is_import_path(&self, trees: &Trees, directory: &[u8]) -> bool {
        let mut roots = self.roots(trees).iter();
        roots.any(|root| directory.starts_with(root))
    }

    /// The modules that these names are, used by one in `directory`, each once
    /// and in their order.
    pub(super) fn places(&self, trees: &Trees, directory: &[u8], names: &[Vec<u8>]) -> Vec<Place> {
        let roots = self.roots(trees);
        let own = parent_if(directory, COMPILED);
        let mut near = Vec::new();
        let mut at = own;
        while near.len() <= ABOVE && !roots.iter().any(|root| root == at) {
            near.push(at.to_vec());
            match at.iter().rposition(|&byte| byte == b'/') {
                Some(slash) => at = &at[..slash],
                None => break,
            }
        }
        let mut found = Vec::new();
        let mut known = HashSet::new();
        // What follows a package's name is often a module of it.
        let mut last: Option<Vec<u8>> = None;
        for name in names {
            let path: Vec<&[u8]> = name
                .split(|&b| b == b'.')
                .filter(|n| !n.is_empty())
                .collect();
            let bases = last.iter().chain(&near).chain(roots);
            let hit = bases
                .enumerate()
                .find_map(|(at, base)| Some((at, self.module(trees, base, &path)?)));
            let Some((at, (places, package))) = hit else {
                continue;
            };
            found.extend(places.into_iter().filter(|&place| known.insert(place)));
            let of_last = at == 0 && last.is_some();
            if package.is_some() || !of_last {
                last = package;
            }
        }
        found
    }

    /// The module of that path below a directory, after the packages that it is
    /// in; if it is a package, also where that is.
    fn module(
        &self,
        trees: &Trees,
        base: &[u8],
        path: &[&[u8]],
    ) -> Option<(Vec<Place>, Option<Vec<u8>>)> {
        let (&name, packages) = path.split_last()?;
        let mut directory = base.to_vec();
        let mut places = Vec::new();
        for &package in packages {
            if !self.package(trees, &directory).packages.contains(package) {
                return None;
            }
            enter(&mut directory, package);
            let init = self.package(trees, &directory).modules.get(INIT).copied();
            places.extend(init.map(|(_, place)| place));
        }
        let within = self.package(trees, &directory);
        if within.packages.contains(name) {
            enter(&mut directory, name);
            let init = self.package(trees, &directory).modules.get(INIT).copied();
            // Any directory is a package, but one without this is rarely meant.
            if let Some((_, place)) = init {
                places.push(place);
                return Some((places, Some(directory)));
            }
        }
        places.push(within.modules.get(name)?.1);
        Some((places, None))
    }

    fn package(&self, trees: &Trees, directory: &[u8]) -> Arc<Package> {
        let mut packages = self.packages.lock();
        if let Some(package) = packages.get(directory) {
            return Arc::clone(package);
        }
        // What cannot be remembered would be gone through again and again.
        if !trees.budget().take(ENTRY + directory.len()) {
            return Arc::default();
        }
        let package = Arc::new(Package::list(trees, directory));
        packages.insert(directory.to_vec(), Arc::clone(&package));
        package
    }
}

impl Package {
    fn list(trees: &Trees, directory: &[u8]) -> Self {
        let mut package = Self::default();
        let room = |name: &[u8]| trees.budget().take(ENTRY + name.len());
        trees.list(directory, |name, kind, place| match kind {
            _ if !room(name) => {}
            FileType::Directory if !matches!(name, b"." | b"..") => {
                package.packages.insert(name.into());
            }
            FileType::Regular => {
                let stem = name.split(|&byte| byte == b'.').next().unwrap_or(name);
                if name.ends_with(b".so") {
                    package.add(stem, Kind::Library, place);
                } else if name.ends_with(b".py") {
                    package.add(stem, Kind::Source, place);
                }
            }
            _ => {}
        });
        if package.packages.contains(COMPILED) {
            trees.list(
                &[directory, b"/", COMPILED].concat(),
                |name, kind, place| {
                    // Name, version, ending: those that were optimized have more.
                    let parts: Vec<&[u8]> = name.split(|&byte| byte == b'.').collect();
                    if let (FileType::Regular, [stem, _, b"pyc"]) = (kind, &parts[..])
                        && room(name)
                    {
                        package.add(stem, Kind::Compiled, place);
                    }
                },
            );
        }
        package
    }

    /// Of one kind, what comes last counts: it is of a higher layer.
    fn add(&mut self, name: &[u8], kind: Kind, place: Place) {
        let known = self.modules.get(name);
        if known.is_none_or(|&(other, _)| other <= kind) {
            self.modules.insert(name.into(), (kind, place));
        }
    }
}

/// The directories in which Python looks for modules.
fn roots(trees: &Trees) -> Vec<Vec<u8>> {
    let is_root = |path: &[u8]| {
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
        let version = name.strip_prefix(b"python3.");
        matches!(name, b"site-packages" | b"dist-packages" | b"lib-dynload")
            || version.is_some_and(|v| !v.is_empty() && v.iter().all(u8::is_ascii_digit))
    };
    let paths = trees.directories();
    let roots = paths.into_iter().filter(|path| is_root(path));
    roots.take(ROOTS).map(<[u8]>::to_vec).collect()
}

/// The directory above, if the path ends with that name.
fn parent_if<'p>(path: &'p [u8], name: &[u8]) -> &'p [u8] {
    match path.strip_suffix(name) {
        Some(above) if above.is_empty() => above,
        Some(above) => above.strip_suffix(b"/").unwrap_or(path),
        None => path,
    }
}

fn enter(directory: &mut Vec<u8>, name: &[u8]) {
    if !directory.is_empty() {
        directory.push(b'/');
    }
    directory.extend_from_slice(name);
}
