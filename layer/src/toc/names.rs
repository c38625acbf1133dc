//! Names as they stand in a TOC, and what they mean.

use std::borrow::Cow;

use super::error::EntryError;

pub(super) const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const PREFETCH_LANDMARK: &[u8] = b".prefetch.landmark";
const NO_PREFETCH_LANDMARK: &[u8] = b".no.prefetch.landmark";

const MAX_COMPONENT: usize = 255;
/// Longest path or link target that Linux takes, without the final NUL.
pub(super) const MAX_PATH: usize = 4095;

/// What a name stands for. Directories are clean paths from the root.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place<'a> {
    Root,
    Name { directory: &'a [u8], base: &'a [u8] },
    Whiteout { directory: &'a [u8], base: &'a [u8] },
    Opaque { directory: &'a [u8] },
    PrefetchLandmark,
    NoPrefetchLandmark,
}

/// Makes a name relative to the root: without leading or trailing slashes,
/// empty components and `.`. Empty for the root itself.
pub(crate) fn clean(raw: &[u8]) -> Result<Cow<'_, [u8]>, EntryError> {
    if raw.contains(&0) {
        return Err(EntryError::NameNul);
    }
    let name = raw.strip_prefix(b"./").unwrap_or(raw);
    let name = name.strip_suffix(b"/").unwrap_or(name);
    let mut clean = true;
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => clean = false,
            b".." => return Err(EntryError::ParentTraversal),
            _ if component.len() > MAX_COMPONENT => return Err(EntryError::NameTooLong),
            _ => {}
        }
    }
    let name = if clean {
        Cow::Borrowed(name)
    } else {
        let kept: Vec<&[u8]> = name
            .split(|byte| *byte == b'/')
            .filter(|component| !matches!(*component, b"" | b"."))
            .collect();
        Cow::Owned(kept.join(&b'/'))
    };
    if name.len() > MAX_PATH {
        return Err(EntryError::PathTooLong);
    }
    Ok(name)
}

/// Reads a clean name.
pub(super) fn place(name: &[u8]) -> Result<Place<'_>, EntryError> {
    let (directory, base) = match name.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&name[..slash], &name[slash + 1..]),
        None => (&b""[..], name),
    };
    if base.is_empty() {
        return Ok(Place::Root);
    }
    if base == OPAQUE {
        return Ok(Place::Opaque { directory });
    }
    if let Some(base) = base.strip_prefix(WHITEOUT) {
        // containerd takes these for a broken archive.
        if matches!(base, b"" | b"." | b"..") {
            return Err(EntryError::WhiteoutName);
        }
        return Ok(Place::Whiteout { directory, base });
    }
    Ok(match name {
        PREFETCH_LANDMARK => Place::PrefetchLandmark,
        NO_PREFETCH_LANDMARK => Place::NoPrefetchLandmark,
        _ => Place::Name { directory, base },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleans_as_the_reference_reader_does() {
        for (raw, expected) in [
            ("", ""),
            ("/", ""),
            ("./", ""),
            (".", ""),
            ("//./", ""),
            ("a", "a"),
            ("./a", "a"),
            ("/a", "a"),
            ("a/", "a"),
            ("a//b/./c//", "a/b/c"),
            ("../a", "!"),
            ("a/../b", "!"),
            ("a/..", "!"),
            ("..", "!"),
            ("...", "..."),
            ("..a/b..", "..a/b.."),
            (".a", ".a"),
        ] {
            let cleaned = clean(raw.as_bytes());
            match expected {
                "!" => assert_eq!(cleaned, Err(EntryError::ParentTraversal), "{raw}"),
                _ => assert_eq!(cleaned.unwrap().as_ref(), expected.as_bytes(), "{raw}"),
            }
        }
    }

    #[test]
    fn bounds_names() {
        let component = "x".repeat(255);
        assert!(clean(component.as_bytes()).is_ok());
        assert_eq!(
            clean(format!("{component}x").as_bytes()),
            Err(EntryError::NameTooLong)
        );
        let path = [&*component; 16].join("/");
        assert_eq!(path.len(), MAX_PATH);
        assert!(clean(path.as_bytes()).is_ok());
        assert_eq!(
            clean(format!("{path}/x").as_bytes()),
            Err(EntryError::PathTooLong)
        );
        assert_eq!(clean(b"a\0b"), Err(EntryError::NameNul));
    }

    #[test]
    fn tells_whiteouts_and_landmarks() {
        let name = |directory: &'static str, base: &'static str| Place::Name {
            directory: directory.as_bytes(),
            base: base.as_bytes(),
        };
        assert_eq!(place(b""), Ok(Place::Root));
        assert_eq!(place(b"a/b/c"), Ok(name("a/b", "c")));
        assert_eq!(
            place(b"a/.wh.b"),
            Ok(Place::Whiteout {
                directory: b"a",
                base: b"b"
            })
        );
        assert_eq!(
            place(b"a/.wh..wh..opq"),
            Ok(Place::Opaque { directory: b"a" })
        );
        assert_eq!(
            place(b".wh..wh.plnk"),
            Ok(Place::Whiteout {
                directory: b"",
                base: b".wh.plnk"
            })
        );
        for bad in [".wh.", "a/.wh..", ".wh..."] {
            assert_eq!(
                place(bad.as_bytes()),
                Err(EntryError::WhiteoutName),
                "{bad}"
            );
        }
        assert_eq!(place(b".prefetch.landmark"), Ok(Place::PrefetchLandmark));
        assert_eq!(
            place(b".no.prefetch.landmark"),
            Ok(Place::NoPrefetchLandmark)
        );
        assert_eq!(
            place(b"a/.prefetch.landmark"),
            Ok(name("a", ".prefetch.landmark"))
        );
    }
}
