//! The profile's document.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use sluice_oci::Digest;

use crate::toc::Unit;

use super::{MAX_BYTES, MAX_LAYERS, MAX_READS, Profile, ProfileError, Read, clean};

const VERSION: u64 = 1;

/// What tells the version, whatever else there is.
#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u64,
    starts: u32,
    layers: Bounded<Digest, MAX_LAYERS>,
    paths: Bounded<Path, MAX_READS>,
    reads: Bounded<Row, MAX_READS>,
    /// One for each read, or none at all.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    units: Bounded<Place, MAX_READS>,
}

/// Layer, path, offset, length, milliseconds, starts.
type Row = (u32, u32, u64, u64, u32, u32);

/// Offset and size of a unit; of one that is not known, zeros.
type Place = (u64, u64);

/// A path in JSON, whose strings cannot hold every name that Linux takes.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path or {\"base64\": …}")]
enum Path {
    Text(String),
    Bytes(Encoded),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Encoded {
    base64: String,
}

/// A list that is refused before it takes more memory than it may.
#[derive(Serialize)]
#[serde(transparent)]
struct Bounded<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> Bounded<T, MAX> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T, const MAX: usize> Default for Bounded<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
                let mut all = Vec::new();
                while let Some(next) = list.next_element()? {
                    if all.len() == MAX {
                        return Err(A::Error::custom(format!("a list of more than {MAX}")));
                    }
                    all.push(next);
                }
                Ok(all)
            }
        }
        deserializer
            .deserialize_seq(List::<T, MAX>(PhantomData))
            .map(Self)
    }
}

pub(super) fn parse(document: &[u8]) -> Result<Profile, ProfileError> {
    let json = |error: serde_json::Error| ProfileError::Json(error.to_string());
    if document.len() > MAX_BYTES {
        return Err(ProfileError::TooLarge(document.len()));
    }
    // First, so that a later version is called one and not damaged.
    let Versioned { version } = serde_json::from_slice(document).map_err(json)?;
    if version != VERSION {
        return Err(ProfileError::Version(version));
    }
    let document: Document = serde_json::from_slice(document).map_err(json)?;
    let paths = document.paths.0.into_iter().map(|path| match path {
        Path::Text(text) => clean(text.as_bytes()),
        Path::Bytes(Encoded { base64 }) => match STANDARD.decode(&base64) {
            Ok(bytes) => clean(&bytes),
            Err(error) => Err(ProfileError::Path {
                path: base64.escape_debug().take(100).collect(),
                reason: format!("it is not base64: {error}"),
            }),
        },
    });
    let paths = paths.collect::<Result<Vec<_>, _>>()?;
    let units = document.units.0;
    if !units.is_empty() && units.len() != document.reads.0.len() {
        return Err(ProfileError::Json(
            "it has not as many units as reads".to_owned(),
        ));
    }
    let unit = |index: usize| {
        let &(offset, size) = units.get(index)?;
        (size > 0).then_some(Unit { offset, size })
    };
    let rows = document.reads.0.into_iter().enumerate();
    let reads = rows.map(|(index, (layer, path, offset, len, at, starts))| {
        let path = paths.get(path as usize).ok_or(ProfileError::Read {
            index,
            reason: "is of a path that it does not name",
        })?;
        Ok(Read {
            layer: layer as usize,
            path: Arc::clone(path),
            offset,
            len,
            at: Duration::from_millis(at.into()),
            starts,
            unit: unit(index),
        })
    });
    let reads = reads.collect::<Result<Vec<_>, _>>()?;
    Profile::new(document.starts, document.layers.0, reads)
}

pub(super) fn write(profile: &Profile) -> String {
    let mut numbers: HashMap<&[u8], u32> = HashMap::new();
    let mut paths = Vec::new();
    let rows = profile.reads.iter().map(|read| {
        let path = *numbers.entry(&read.path).or_insert_with(|| {
            paths.push(match std::str::from_utf8(&read.path) {
                Ok(text) => Path::Text(text.to_owned()),
                Err(_) => Path::Bytes(Encoded {
                    base64: STANDARD.encode(&read.path),
                }),
            });
            paths.len() as u32 - 1
        });
        let at = read.at.as_millis() as u32;
        let layer = read.layer as u32;
        (layer, path, read.offset, read.len, at, read.starts)
    });
    let rows = rows.collect();
    let place = |unit: Option<Unit>| unit.map_or((0, 0), |unit| (unit.offset, unit.size));
    let units = match profile.reads.iter().any(|read| read.unit.is_some()) {
        true => profile.reads.iter().map(|read| place(read.unit)).collect(),
        false => Vec::new(),
    };
    let document = Document {
        version: VERSION,
        starts: profile.starts,
        layers: Bounded(profile.layers.clone()),
        paths: Bounded(paths),
        reads: Bounded(rows),
        units: Bounded(units),
    };
    // Text, numbers and lists: there is nothing in it that JSON cannot hold.
    serde_json::to_string(&document).unwrap_or_default()
}
