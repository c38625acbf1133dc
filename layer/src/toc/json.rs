//! The TOC's JSON, read entry by entry without copying its strings.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::error::TocError;

/// A string's bytes. Names on Linux are bytes; JSON that holds other than
/// UTF-8 is taken as it is.
#[derive(Debug, Default)]
pub(super) struct Bytes<'a>(pub(super) Cow<'a, [u8]>);

impl std::ops::Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Bytes<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl<'de> Visitor<'de> for BytesVisitor {
            type Value = Cow<'de, [u8]>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(bytes))
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                Ok(Cow::Owned(bytes.to_vec()))
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text.as_bytes()))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.as_bytes().to_vec()))
            }
        }
        deserializer.deserialize_bytes(BytesVisitor).map(Bytes)
    }
}

/// One entry as it stands in the JSON. Fields that only describe the tar
/// (`userName`, `accesstime` and the like) are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Entry<'a> {
    #[serde(borrow)]
    pub(super) name: Bytes<'a>,
    #[serde(borrow, rename = "type")]
    pub(super) kind: Bytes<'a>,
    pub(super) size: i64,
    #[serde(borrow, rename = "modtime")]
    pub(super) mod_time: Bytes<'a>,
    #[serde(borrow)]
    pub(super) link_name: Bytes<'a>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) offset: i64,
    pub(super) end_offset: i64,
    pub(super) inner_offset: i64,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
    #[serde(borrow)]
    pub(super) xattrs: Xattrs<'a>,
    #[serde(borrow)]
    pub(super) digest: Bytes<'a>,
    pub(super) chunk_offset: i64,
    pub(super) chunk_size: i64,
    #[serde(borrow)]
    pub(super) chunk_digest: Bytes<'a>,
    #[serde(borrow)]
    pub(super) chunk_type: Bytes<'a>,
}

impl Entry<'_> {
    /// Bytes that are not borrowed from the JSON.
    pub(super) fn own_size(&self) -> usize {
        let text = [&self.name, &self.kind, &self.mod_time, &self.link_name];
        let digests = [&self.digest, &self.chunk_digest, &self.chunk_type];
        let texts = text.into_iter().chain(digests).map(|text| &text.0);
        let pairs = self.xattrs.0.iter().flat_map(|(name, value)| [name, value]);
        let owned = texts.chain(pairs).map(|text| match text {
            Cow::Borrowed(_) => 0,
            Cow::Owned(text) => text.capacity(),
        });
        owned.sum::<usize>() + self.xattrs.0.len() * size_of::<EncodedXattr<'_>>()
    }
}

/// Names and base64 values, in the JSON's order. Most entries have none.
#[derive(Debug, Default)]
pub(super) struct Xattrs<'a>(pub(super) Vec<EncodedXattr<'a>>);

/// An extended attribute's name and its value in base64.
pub(super) type EncodedXattr<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for Xattrs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct XattrsVisitor;
        impl<'de> Visitor<'de> for XattrsVisitor {
            type Value = Vec<EncodedXattr<'de>>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of extended attributes")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Vec::new())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut xattrs = Vec::new();
                let mut total = 0;
                while let Some((name, value)) = map.next_entry::<Bytes<'de>, Bytes<'de>>()? {
                    total += name.len() + value.len();
                    if xattrs.len() >= MOST_XATTRS || total > MOST_XATTR_BYTES {
                        return Err(A::Error::custom("more extended attributes than are read"));
                    }
                    xattrs.push((name.0, value.0));
                }
                Ok(xattrs)
            }
        }
        deserializer.deserialize_any(XattrsVisitor).map(Xattrs)
    }
}

/// Extended attributes of one entry, and their bytes in base64: beyond what
/// Linux can list and hold, those counted that are passed over later.
const MOST_XATTRS: usize = 16 << 10;
const MOST_XATTR_BYTES: usize = 2 << 20;

/// Calls `each` with every entry, in order. An error of `each` ends it.
pub(crate) fn for_each_entry<'a, E: Deserialize<'a>>(
    json: impl serde_json::de::Read<'a>,
    each: &mut dyn FnMut(E) -> Result<(), TocError>,
) -> Result<(), TocError> {
    let mut stopped = None;
    let mut deserializer = serde_json::Deserializer::new(json);
    let document = Document {
        each,
        stopped: &mut stopped,
    };
    let parsed = document
        .deserialize(&mut deserializer)
        .and_then(|version| deserializer.end().map(|()| version));
    if let Some(reason) = stopped {
        return Err(reason);
    }
    match parsed.map_err(|error| TocError::Json(error.to_string()))? {
        1 => Ok(()),
        other => Err(TocError::Version(other)),
    }
}

/// The whole document; its value is the version.
struct Document<'f, E> {
    each: &'f mut dyn FnMut(E) -> Result<(), TocError>,
    stopped: &'f mut Option<TocError>,
}

impl<'a, E: Deserialize<'a>> DeserializeSeed<'a> for Document<'_, E> {
    type Value = i64;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<i64, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a, E: Deserialize<'a>> Visitor<'a> for Document<'_, E> {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents with version and entries")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<i64, A::Error> {
        let mut version = 0;
        let mut entries_seen = false;
        while let Some(key) = map.next_key::<Bytes<'a>>()? {
            match &*key {
                b"version" => version = map.next_value()?,
                b"entries" if entries_seen => return Err(A::Error::duplicate_field("entries")),
                b"entries" => {
                    entries_seen = true;
                    map.next_value_seed(Entries {
                        each: &mut *self.each,
                        stopped: &mut *self.stopped,
                    })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(version)
    }
}

struct Entries<'f, E> {
    each: &'f mut dyn FnMut(E) -> Result<(), TocError>,
    stopped: &'f mut Option<TocError>,
}

impl<'a, E: Deserialize<'a>> DeserializeSeed<'a> for Entries<'_, E> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        // Go writes an empty list that was never filled as null.
        deserializer.deserialize_any(self)
    }
}

impl<'a, E: Deserialize<'a>> Visitor<'a> for Entries<'_, E> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_unit<X>(self) -> Result<(), X> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(entry) = list.next_element()? {
            if let Err(reason) = (self.each)(entry) {
                *self.stopped = Some(reason);
                return Err(A::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}
