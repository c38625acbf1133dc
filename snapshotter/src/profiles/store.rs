//! The node's own profiles, on disk: `profiles/<64 hexadecimal digits>` below
//! the root, one file an image.
//!
//! The first line of a file says whose profile it is; each further line is
//! the document of one recording, the oldest first. A file is replaced as a
//! whole. What cannot be read is removed with a warning: it is a hint that the
//! next start records anew.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sluice_layer::Profile;
use sluice_oci::Digest;

/// Prefix of files that are being written.
const TEMPORARY: &str = ".tmp-";
/// Recordings of one image that are kept: enough for a median, few enough to
/// follow an image whose use changes.
const RECORDINGS: usize = 4;
const VERSION: u32 = 1;
/// A profile of up to so many reads, some megabytes in memory, is remembered
/// until another is asked for: each layer of an image that starts asks twice.
const REMEMBERED: usize = 1 << 14;

/// Whose profile it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageId {
    /// The image's reference, for people.
    pub reference: Option<String>,
    /// The digest of its manifest, where containerd told it.
    pub manifest: Option<Digest>,
    /// Its lazily mounted layers, lowest first.
    pub layers: Vec<Digest>,
}

/// A stored profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Whose it is.
    pub image: ImageId,
    /// How many recordings it is made of.
    pub recordings: usize,
    /// Whether all that was read was seen: nothing had been read of the image
    /// on this node before.
    pub whole: bool,
    /// When it was last recorded or used.
    pub used: SystemTime,
    name: String,
}

/// Why the node's profiles cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file or directory.
    #[error("the profile {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is damaged.
    #[error("the profile {}: {why}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    image: Option<String>,
    manifest: Option<Digest>,
    whole: bool,
}

/// The node's own profiles.
#[derive(Debug)]
pub struct Profiles {
    dir: PathBuf,
    most: usize,
    /// Those least recently used first.
    stored: Mutex<Vec<Stored>>,
    /// What was loaded last, and the name of its file. Locked only while that is.
    latest: Mutex<Option<(String, Arc<Profile>)>>,
}

impl Profiles {
    /// Those in the directory `dir`, which is made; of more than `most`, the
    /// ones least recently used are removed. What the disk does not give is
    /// told and done without: no start may depend on it.
    pub fn open(dir: PathBuf, most: usize) -> Self {
        let profiles = Self {
            most: most.max(1),
            stored: Mutex::default(),
            latest: Mutex::default(),
            dir,
        };
        let mut stored = profiles.stored.lock();
        if let Err(error) = profiles.look_around(&mut stored) {
            tracing::warn!("{error}; not all that was recorded is known");
        }
        stored.sort_by_key(|stored| stored.used);
        if let Err(error) = profiles.trim(&mut stored) {
            tracing::warn!("{error}; it stays");
        }
        drop(stored);
        profiles
    }

    fn look_around(&self, stored: &mut Vec<Stored>) -> Result<(), ProfileError> {
        fs::create_dir_all(&self.dir).map_err(failed(&self.dir))?;
        for entry in fs::read_dir(&self.dir).map_err(failed(&self.dir))? {
            let path = entry.map_err(failed(&self.dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(TEMPORARY) {
                remove(&path);
                continue;
            }
            match look(&path, &name) {
                Ok(found) => stored.push(found),
                Err(error) => {
                    tracing::warn!("{error}; it is removed");
                    remove(&path);
                }
            }
        }
        Ok(())
    }

    /// All, those least recently used first.
    pub fn list(&self) -> Vec<Stored> {
        self.stored.lock().clone()
    }

    /// The profile of an image of which perhaps only the upper layers are
    /// known.
    pub fn find(&self, image: &ImageId) -> Option<Stored> {
        let stored = self.stored.lock();
        let by_layers =
            |s: &&Stored| !image.layers.is_empty() && s.image.layers.ends_with(&image.layers);
        same_manifest(&stored, image)
            .map(|at| &stored[at])
            .or_else(|| stored.iter().rev().find(by_layers))
            .cloned()
    }

    /// What a stored profile says, merged from its recordings. Counts as a
    /// use.
    pub fn load(&self, found: &Stored) -> Result<Arc<Profile>, ProfileError> {
        let mut stored = self.stored.lock();
        let path = self.dir.join(&found.name);
        let file = File::open(&path).map_err(failed(&path))?;
        let mut latest = self.latest.lock();
        let known = latest.as_ref().filter(|(name, _)| *name == found.name);
        let profile = match known {
            Some((_, profile)) => Arc::clone(profile),
            None => Arc::new(merged(&path, &read(&path)?.1)?),
        };
        let small = profile.reads().len() <= REMEMBERED;
        *latest = small.then(|| (found.name.clone(), Arc::clone(&profile)));
        let now = SystemTime::now();
        // Only for the order in which profiles are removed.
        if file.set_modified(now).is_ok()
            && let Some(at) = stored.iter().position(|s| s.name == found.name)
        {
            let mut used = stored.remove(at);
            used.used = now;
            stored.push(used);
        }
        Ok(profile)
    }

    /// What a file holds is changed.
    fn forget(&self, name: &str) {
        let mut latest = self.latest.lock();
        if latest.as_ref().is_some_and(|(known, _)| known == name) {
            *latest = None;
        }
    }

    /// Adds a recording to the image's profile. One that missed part of what
    /// was read (`whole` is false) is worth less than any that did not, and is
    /// dropped or replaced accordingly. Returns whether it was taken.
    pub fn record(
        &self,
        image: &ImageId,
        recording: Profile,
        whole: bool,
    ) -> Result<bool, ProfileError> {
        let mut stored = self.stored.lock();
        let mut recordings = Vec::new();
        if let Some(at) = position(&stored, image) {
            let known = &stored[at];
            if known.whole && !whole {
                return Ok(false);
            }
            if known.whole == whole && known.image.layers == recording.layers() {
                match read(&self.dir.join(&known.name)) {
                    Ok((_, known)) => recordings = known,
                    Err(error) => tracing::warn!("{error}; it is replaced"),
                }
            }
        }
        recordings.push(recording);
        let surplus = recordings.len().saturating_sub(RECORDINGS);
        recordings.drain(..surplus);
        self.write(&mut stored, image, &recordings, whole)?;
        Ok(true)
    }

    /// Makes `profile` the image's, whatever was recorded before.
    pub fn put(&self, image: &ImageId, profile: Profile) -> Result<(), ProfileError> {
        self.write(&mut self.stored.lock(), image, &[profile], true)
    }

    /// Removes a stored profile.
    pub fn remove(&self, found: &Stored) -> Result<(), ProfileError> {
        let mut stored = self.stored.lock();
        stored.retain(|stored| stored.name != found.name);
        self.delete(&found.name)
    }

    fn write(
        &self,
        stored: &mut Vec<Stored>,
        image: &ImageId,
        recordings: &[Profile],
        whole: bool,
    ) -> Result<(), ProfileError> {
        let header = Header {
            version: VERSION,
            image: image.reference.clone(),
            manifest: image.manifest,
            whole,
        };
        // Text, numbers and nothing else.
        let mut text = serde_json::to_string(&header).unwrap_or_default() + "\n";
        for recording in recordings {
            text += &recording.to_json();
            text.push('\n');
        }
        let name = name_of(image);
        self.forget(&name);
        let draft = self.dir.join(format!("{TEMPORARY}{name}"));
        let path = self.dir.join(&name);
        let save = || {
            let mut file = File::create(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        if let Err(source) = save() {
            let _ = fs::remove_file(&draft);
            return Err(failed(&path)(source));
        }
        if let Some(at) = position(stored, image) {
            let former = stored.remove(at);
            if former.name != name {
                self.delete(&former.name)?;
            }
        }
        stored.push(Stored {
            image: image.clone(),
            recordings: recordings.len(),
            whole,
            used: SystemTime::now(),
            name,
        });
        self.trim(stored)
    }

    fn trim(&self, stored: &mut Vec<Stored>) -> Result<(), ProfileError> {
        while stored.len() > self.most {
            self.delete(&stored.remove(0).name)?;
        }
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), ProfileError> {
        self.forget(name);
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&path)(error)),
            _ => Ok(()),
        }
    }
}

/// The image's own profile.
fn position(stored: &[Stored], image: &ImageId) -> Option<usize> {
    let same_layers = |s: &Stored| s.image.layers == image.layers;
    same_manifest(stored, image).or_else(|| stored.iter().position(same_layers))
}

fn same_manifest(stored: &[Stored], image: &ImageId) -> Option<usize> {
    let manifest = image.manifest?;
    stored
        .iter()
        .position(|s| s.image.manifest == Some(manifest))
}

/// The manifest's digest, or that of the list of layers.
fn name_of(image: &ImageId) -> String {
    let of_layers = || {
        let list: Vec<String> = image.layers.iter().map(Digest::to_string).collect();
        Digest::of(list.join(",").as_bytes())
    };
    image.manifest.unwrap_or_else(of_layers).hex()
}

fn merged(path: &Path, recordings: &[Profile]) -> Result<Profile, ProfileError> {
    Profile::merge(recordings).map_err(|error| damaged(path, error.to_string()))
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path).map_err(failed(path)) {
        tracing::warn!("{error}; it stays");
    }
}

fn look(path: &Path, name: &str) -> Result<Stored, ProfileError> {
    let (header, recordings) = read(path)?;
    let profile = merged(path, &recordings)?;
    let image = ImageId {
        reference: header.image,
        manifest: header.manifest,
        layers: profile.layers().to_vec(),
    };
    if name_of(&image) != name {
        return Err(damaged(path, "it is another image's".to_owned()));
    }
    let found = fs::metadata(path).map_err(failed(path))?;
    Ok(Stored {
        image,
        recordings: recordings.len(),
        whole: header.whole,
        used: found.modified().map_err(failed(path))?,
        name: name.to_owned(),
    })
}

fn read(path: &Path) -> Result<(Header, Vec<Profile>), ProfileError> {
    let size = fs::metadata(path).map_err(failed(path))?.len();
    let most = (RECORDINGS + 1) * sluice_layer::profile::MAX_BYTES;
    if size > most as u64 {
        return Err(damaged(path, format!("it has {size} bytes")));
    }
    let text = fs::read_to_string(path).map_err(failed(path))?;
    let mut lines = text.lines();
    let header: Header = serde_json::from_str(lines.next().unwrap_or_default())
        .map_err(|error| damaged(path, error.to_string()))?;
    if header.version != VERSION {
        return Err(damaged(path, format!("version {}", header.version)));
    }
    let recordings = lines
        .take(RECORDINGS)
        .map(|line| Profile::parse(line.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|error| damaged(path, error.to_string()))?;
    Ok((header, recordings))
}

fn damaged(path: &Path, why: String) -> ProfileError {
    ProfileError::Damaged {
        path: path.to_owned(),
        why,
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ProfileError {
    |source| ProfileError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sluice_layer::profile::Read;

    use super::*;

    fn image(n: u8) -> ImageId {
        ImageId {
            reference: Some(format!("r.io/app:{n}")),
            manifest: Some(Digest::of(&[n])),
            layers: vec![Digest::of(&[n, 0]), Digest::of(&[n, 1])],
        }
    }

    fn recording(image: &ImageId, paths: &[&str]) -> Profile {
        let reads = paths.iter().enumerate().map(|(at, path)| Read {
            layer: 0,
            path: Arc::from(path.as_bytes()),
            offset: 0,
            len: 1,
            at: Duration::from_millis(at as u64),
            starts: 1,
            unit: None,
        });
        Profile::new(1, image.layers.clone(), reads.collect()).unwrap()
    }

    fn files(profiles: &Profiles, image: &ImageId) -> Vec<String> {
        let found = profiles.find(image).expect("a profile");
        let loaded = profiles.load(&found).unwrap();
        let text = |path: Arc<[u8]>| String::from_utf8_lossy(&path).into_owned();
        loaded.files().into_iter().map(text).collect()
    }

    #[test]
    fn recordings_add_up_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Profiles::open(dir.path().join("profiles"), 2);
        let profiles = open();
        let one = image(1);
        for paths in [&["old"][..], &["a", "b"], &["a"], &["a", "c"], &["a", "b"]] {
            assert!(profiles.record(&one, recording(&one, paths), true).unwrap());
        }
        // Of the last four.
        assert_eq!(files(&profiles, &one), ["a", "b"]);
        let again = open();
        assert_eq!(again.find(&one).unwrap().recordings, 4);
        assert_eq!(files(&again, &one), ["a", "b"]);
    }

    #[test]
    fn what_was_loaded_last_is_remembered_as_long_as_it_is_true() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path().to_owned(), 2);
        let (one, two) = (image(1), image(2));
        profiles.put(&one, recording(&one, &["a"])).unwrap();
        profiles.put(&two, recording(&two, &["b"])).unwrap();
        let load = |image: &ImageId| profiles.load(&profiles.find(image).unwrap());
        let first = load(&one).unwrap();
        assert!(Arc::ptr_eq(&first, &load(&one).unwrap()));
        assert_eq!(files(&profiles, &two), ["b"]);
        let again = load(&one).unwrap();
        assert!(!Arc::ptr_eq(&first, &again));
        // Loading it counts as a use, remembered or not.
        load(&one).unwrap();
        assert_eq!(profiles.list().last().unwrap().image, one);
        profiles.put(&one, recording(&one, &["c"])).unwrap();
        assert_eq!(files(&profiles, &one), ["c"]);
        let found = profiles.find(&one).unwrap();
        profiles.remove(&found).unwrap();
        assert!(profiles.load(&found).is_err());
    }

    #[test]
    fn a_profile_too_large_to_remember_is_read_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path().to_owned(), 2);
        let one = image(1);
        let paths: Vec<String> = (0..=REMEMBERED).map(|at| at.to_string()).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        profiles.put(&one, recording(&one, &paths)).unwrap();
        let load = || profiles.load(&profiles.find(&one).unwrap()).unwrap();
        assert!(!Arc::ptr_eq(&load(), &load()));
    }

    #[test]
    fn what_saw_everything_wins() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path().to_owned(), 2);
        let one = image(1);
        let record = |paths, whole| profiles.record(&one, recording(&one, paths), whole);
        assert!(record(&["part"], false).unwrap());
        assert!(record(&["all"], true).unwrap());
        assert_eq!(files(&profiles, &one), ["all"]);
        assert!(!record(&["part"], false).unwrap());
        assert_eq!(files(&profiles, &one), ["all"]);
        profiles.put(&one, recording(&one, &["put"])).unwrap();
        assert_eq!(files(&profiles, &one), ["put"]);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path().to_owned(), 2);
        for n in [1, 2] {
            let image = image(n);
            profiles
                .record(&image, recording(&image, &["a"]), true)
                .unwrap();
        }
        files(&profiles, &image(1));
        let third = image(3);
        profiles
            .record(&third, recording(&third, &["a"]), true)
            .unwrap();
        assert!(profiles.find(&image(2)).is_none());
        let known = |profiles: &Profiles| {
            profiles
                .list()
                .iter()
                .map(|s| s.image.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(known(&profiles), [image(1), image(3)]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        profiles.remove(&profiles.find(&image(1)).unwrap()).unwrap();
        assert_eq!(known(&profiles), [image(3)]);
    }

    #[test]
    fn an_image_is_known_by_its_manifest_or_its_upper_layers() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path().to_owned(), 2);
        let one = image(1);
        profiles.put(&one, recording(&one, &["a"])).unwrap();
        let id = |manifest, layers: &[Digest]| ImageId {
            reference: None,
            manifest,
            layers: layers.to_vec(),
        };
        assert!(profiles.find(&id(one.manifest, &[])).is_some());
        assert!(profiles.find(&id(None, &one.layers)).is_some());
        assert!(profiles.find(&id(None, &one.layers[1..])).is_some());
        assert!(profiles.find(&id(None, &one.layers[..1])).is_none());
        assert!(profiles.find(&id(image(2).manifest, &[])).is_none());
        assert!(profiles.find(&id(None, &[])).is_none());
    }

    #[test]
    fn damage_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = Profiles::open(dir.path().to_owned(), 9);
        let names: Vec<PathBuf> = [1, 2, 3]
            .map(|n| {
                let image = image(n);
                profiles.put(&image, recording(&image, &["a"])).unwrap();
                dir.path().join(name_of(&image))
            })
            .into();
        fs::write(&names[0], "{").unwrap();
        let text = fs::read_to_string(&names[1]).unwrap();
        fs::write(&names[1], &text[..text.len() - 5]).unwrap();
        fs::write(dir.path().join(".tmp-x"), "half").unwrap();
        fs::rename(&names[2], dir.path().join("0")).unwrap();
        let again = Profiles::open(dir.path().to_owned(), 9);
        assert!(again.list().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
