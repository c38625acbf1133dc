//! What the files of an image load when they are used: the libraries that a
//! program or library was linked with, the interpreter of a script, the modules
//! that a Python module imports, the files that are named among a program's
//! constants. Read from the files themselves, as the loaders do, so that what a
//! program will need can be fetched before it asks.
//!
//! Everything here is a guess from bytes that an image brings along: wrong ones
//! cost some bytes that nobody reads, and nothing else.

mod budget;
mod command;
mod libraries;
mod modules;
mod python;
mod trees;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sluice_oci::Digest;
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use crate::fetch::{Dependencies, ELF_64_LITTLE, LazyFile, LazyLayer};
use crate::service::Program;
use budget::Budget;
pub use budget::Memory;
use command::Named;
use modules::Modules;
use trees::{Place, Trees};

/// What containers' users and groups are found by.
const USERS: [&[u8]; 2] = [b"etc/passwd", b"etc/group"];
/// Files up to this size are fetched because a program has their path among its
/// constants: it may read them, or only tell of them. Bytes.
const NAMED_BY_PATH: u64 = 256 << 10;

/// What is read of a file to find out what it is.
const HEAD: u64 = 4 << 10;

/// Says what the files of one image load.
#[derive(Debug)]
pub struct ImageDependencies {
    trees: Arc<Trees>,
    /// Whether it is known in which directories files are.
    indexed: OnceCell<()>,
    /// Whether Python runs, as far as is known. To look for its modules means to
    /// go through the trees, which other programs need not wait for.
    is_python: AtomicBool,
    modules: Arc<Modules>,
    /// What was found out, by the layer and where a file's content begins.
    known: Mutex<HashMap<Key, Arc<[Place]>>>,
}

/// A layer, and where in its data a file begins.
type Key = (Digest, u64);

impl ImageDependencies {
    /// Of the image with these layers, the lowest first, remembered in `memory`.
    /// Layers that cannot be read are passed over.
    pub fn new(layers: &[Arc<LazyLayer>], memory: &Memory) -> Self {
        Self {
            trees: Arc::new(Trees::open(layers, Budget::new(memory.clone()))),
            indexed: OnceCell::new(),
            is_python: AtomicBool::new(false),
            modules: Arc::default(),
            known: Mutex::default(),
        }
    }

    /// The files by which a container's user is found before it starts, and
    /// which hardly any program reads. Reads the trees.
    pub async fn of_any_user(&self) -> Vec<LazyFile> {
        let users = USERS.map(|path| Named::File(vec![path.to_vec()]));
        self.files_of(users.into(), Vec::new()).await
    }

    /// The files that load nearly any program. Reads the trees.
    pub async fn of_any_program(&self) -> Vec<LazyFile> {
        let loader = libraries::of_any_program().map(Named::File);
        self.files_of(loader.collect(), Vec::new()).await
    }

    /// The file that the first of a program's words names, if it names one:
    /// found without going through the trees.
    pub async fn first_of_program(&self, program: &Program) -> Option<LazyFile> {
        let first = command::named(program).into_iter().next();
        let files = self.files_of(Vec::from_iter(first), Vec::new()).await;
        files.into_iter().next()
    }

    /// The files that a program's words name, in the order in which they do.
    /// Reads the trees.
    pub async fn of_program(&self, program: Program) -> Vec<LazyFile> {
        let named = command::named(&program);
        if command::runs_python(&program) {
            self.note_python(true);
            self.index().await;
        }
        self.files_of(named, program.directory.into_bytes()).await
    }

    /// Of modules, those that are found from `directory`.
    async fn files_of(&self, named: Vec<Named>, directory: Vec<u8>) -> Vec<LazyFile> {
        let (trees, modules) = (Arc::clone(&self.trees), Arc::clone(&self.modules));
        let found = spawn_blocking(move || {
            let directory = directory.strip_prefix(b"/").unwrap_or(&directory);
            let places = named.iter().flat_map(|named| match named {
                Named::File(paths) => {
                    let place = paths.iter().find_map(|path| trees.locate(path));
                    place.into_iter().collect()
                }
                Named::Modules(names) => modules.places(&trees, directory, names),
            });
            places.filter_map(|place| trees.file(place)).collect()
        });
        found.await.unwrap_or_default()
    }

    async fn known_places(&self, file: &LazyFile) -> Option<Arc<[Place]>> {
        let key = (file.layer().digest(), file.offset());
        let known = self.known.lock().get(&key).cloned();
        if known.is_some() {
            return known;
        }
        let places: Arc<[Place]> = self.places(file).await?.into();
        let size = size_of::<(Key, Arc<[Place]>)>() + size_of_val(&*places);
        if self.trees.budget().take(size) {
            self.known.lock().insert(key, Arc::clone(&places));
        }
        Some(places)
    }

    /// Goes through the trees, which takes some tens of milliseconds.
    async fn index(&self) {
        let trees = Arc::clone(&self.trees);
        let index = || async {
            let _ = spawn_blocking(move || trees.index()).await;
        };
        self.indexed.get_or_init(index).await;
    }

    /// Notes whether there is a sign that Python runs.
    fn note_python(&self, is_sign: bool) {
        self.is_python.fetch_or(is_sign, Ordering::Relaxed);
    }

    async fn places(&self, file: &LazyFile) -> Option<Vec<Place>> {
        let head = file.read(0..HEAD).await?;
        if let Some(interpreter) = libraries::interpreter(&head) {
            self.note_python(command::is_python(&interpreter));
            return Some(self.trees.locate(&interpreter).into_iter().collect());
        }
        if head.starts_with(ELF_64_LITTLE) {
            let libraries = libraries::of(file, &head).await?;
            self.note_python(libraries.have_python());
            if libraries.are_beside() {
                self.index().await;
            }
            return Some(libraries::places(&self.trees, file, &libraries));
        }
        let is_compiled = python::may_be_module(&head);
        self.note_python(is_compiled);
        if !self.is_python.load(Ordering::Relaxed) {
            return None;
        }
        self.index().await;
        if !is_compiled && !self.trees.is_source(file) {
            return None;
        }
        let names = python::imports(&file.read(0..python::LARGEST).await?);
        let directory = self.trees.directory_of(file)?;
        Some(self.modules.places(&self.trees, &directory, &names))
    }

    /// What a program or library means by texts among its constants: files by
    /// their paths, and Python modules if it is one itself.
    async fn places_in(&self, file: &LazyFile, texts: Vec<Vec<u8>>) -> Vec<Place> {
        let (paths, names): (Vec<_>, Vec<_>) =
            texts.into_iter().partition(|text| text.starts_with(b"/"));
        let paths = paths.iter().filter_map(|path| self.trees.locate(path));
        let mut places: Vec<Place> = paths
            .filter(|&place| {
                let file = self.trees.file(place);
                file.is_some_and(|file| file.size() <= NAMED_BY_PATH)
            })
            .collect();
        if !names.is_empty() && self.is_python.load(Ordering::Relaxed) {
            self.index().await;
            let directory = self.trees.directory_of(file).unwrap_or_default();
            if self.modules.is_import_path(&self.trees, &directory) {
                places.extend(self.modules.places(&self.trees, &directory, &names));
            }
        }
        places
    }
}

/// The names in a Python module.
#[cfg(any(test, fuzzing))]
pub(crate) fn names_in(module: &[u8]) -> Vec<Vec<u8>> {
    python::imports(module)
}

impl Dependencies for ImageDependencies {
    fn of<'f>(&'f self, file: &'f LazyFile) -> BoxFuture<'f, Vec<LazyFile>> {
        Box::pin(async move {
            let places = self.known_places(file).await.unwrap_or_default();
            let files = places.iter().filter_map(|&place| self.trees.file(place));
            files.collect()
        })
    }

    fn named_in<'f>(
        &'f self,
        file: &'f LazyFile,
        texts: Vec<Vec<u8>>,
    ) -> BoxFuture<'f, Vec<LazyFile>> {
        Box::pin(async move {
            let places = self.places_in(file, texts).await.into_iter();
            places.filter_map(|place| self.trees.file(place)).collect()
        })
    }
}

#[cfg(test)]
mod tests;
