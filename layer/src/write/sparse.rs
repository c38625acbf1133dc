//! Sparse files in tar: old GNU headers, and PAX 0.0, 0.1 and 1.0. They are
//! expanded, since a TOC's chunks are plain content.

use super::WriteError;
use super::header::Extensions;

/// The most that one sparse file may expand to. A tar of a few bytes can
/// claim any size.
const MAX_EXPANDED: u64 = 256 << 30;

/// A stretch of a sparse file that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    offset: u64,
    size: u64,
}

/// A hole and the stored bytes after it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) hole: u64,
    pub(super) stored: u64,
}

/// What PAX records say of a sparse file.
#[derive(Debug)]
pub(super) struct PaxSparse {
    pub(super) real_size: u64,
    pub(super) name: Option<Vec<u8>>,
    pub(super) map: Option<Vec<Segment>>,
    pub(super) map_in_content: bool,
}

/// The entries of an old GNU sparse map: pairs of 12-byte numbers, the first
/// empty one ends it.
pub(super) fn map_entries(raw: &[u8], map: &mut Vec<Segment>) -> Result<(), WriteError> {
    for pair in raw.chunks_exact(24) {
        if pair[0] == 0 {
            return Ok(());
        }
        let number = |field: &[u8]| {
            super::header::numeric(field)
                .and_then(|n| u64::try_from(n).ok())
                .ok_or_else(|| WriteError::damaged("a sparse file's map holds no number"))
        };
        map.push(Segment {
            offset: number(&pair[..12])?,
            size: number(&pair[12..])?,
        });
        if map.len() > 1 << 20 {
            return Err(WriteError::damaged(
                "a sparse file has more than a million pieces",
            ));
        }
    }
    Ok(())
}

/// The sparse file that PAX records describe, if they do.
pub(super) fn pax(extensions: &Extensions) -> Result<Option<PaxSparse>, WriteError> {
    let number = |key: &str| extensions.number(key);
    let name = extensions.record("GNU.sparse.name").map(<[u8]>::to_vec);
    if number("GNU.sparse.major")? == Some(1) && number("GNU.sparse.minor")? == Some(0) {
        let real_size = number("GNU.sparse.realsize")?
            .ok_or_else(|| WriteError::damaged("a sparse entry states no real size"))?;
        return Ok(Some(PaxSparse {
            real_size,
            name,
            map: None,
            map_in_content: true,
        }));
    }
    let Some(real_size) = number("GNU.sparse.size")? else {
        return Ok(None);
    };
    let mut numbers = Vec::new();
    let mut push = |text: &[u8]| {
        let number = std::str::from_utf8(text).ok().and_then(|t| t.parse().ok());
        numbers.push(
            number.ok_or_else(|| WriteError::damaged("a sparse file's map holds no number"))?,
        );
        Ok::<_, WriteError>(())
    };
    if let Some(map) = extensions.record("GNU.sparse.map") {
        for text in map.split(|b| *b == b',') {
            push(text)?;
        }
    } else {
        for (key, value) in &extensions.records {
            if matches!(
                key.as_slice(),
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes"
            ) {
                push(value)?;
            }
        }
    }
    Ok(Some(PaxSparse {
        real_size,
        name,
        map: Some(segments(&numbers)?),
        map_in_content: false,
    }))
}

/// The map at the start of a PAX 1.0 sparse file: decimal numbers, a line
/// each, the count of pairs first, filled up to a block. `None` as long as
/// it is incomplete.
pub(super) fn text_map(bytes: &[u8]) -> Result<Option<Vec<Segment>>, WriteError> {
    let mut lines = bytes.split_inclusive(|b| *b == b'\n');
    let mut next = || -> Result<Option<u64>, WriteError> {
        let Some(line) = lines.next().and_then(|line| line.strip_suffix(b"\n")) else {
            return Ok(None);
        };
        let number = std::str::from_utf8(line).ok().and_then(|t| t.parse().ok());
        number
            .map(Some)
            .ok_or_else(|| WriteError::damaged("a sparse file's map holds no number"))
    };
    let Some(count) = next()? else {
        return Ok(None);
    };
    let mut numbers = Vec::new();
    for _ in 0..count.saturating_mul(2) {
        match next()? {
            Some(number) => numbers.push(number),
            None => return Ok(None),
        }
    }
    segments(&numbers).map(Some)
}

fn segments(numbers: &[u64]) -> Result<Vec<Segment>, WriteError> {
    if !numbers.len().is_multiple_of(2) {
        return Err(WriteError::damaged("a sparse file's map holds half a pair"));
    }
    let pair = |pair: &[u64]| Segment {
        offset: pair[0],
        size: pair[1],
    };
    Ok(numbers.chunks_exact(2).map(pair).collect())
}

/// Turns a map into holes and stored stretches that cover `size` bytes and
/// use all of `stored`.
pub(super) fn plan(map: &[Segment], size: u64, stored: u64) -> Result<Vec<Piece>, WriteError> {
    if size > MAX_EXPANDED {
        return Err(WriteError::unsupported(format!(
            "a sparse file of {size} bytes is larger than {} GiB",
            MAX_EXPANDED >> 30
        )));
    }
    let bad = || WriteError::damaged("a sparse file's map does not fit the file");
    let mut pieces = Vec::with_capacity(map.len() + 1);
    let (mut position, mut used) = (0u64, 0u64);
    for segment in map {
        let hole = segment.offset.checked_sub(position).ok_or_else(bad)?;
        pieces.push(Piece {
            hole,
            stored: segment.size,
        });
        position = segment.offset.checked_add(segment.size).ok_or_else(bad)?;
        used = used.checked_add(segment.size).ok_or_else(bad)?;
    }
    if used != stored {
        return Err(bad());
    }
    let hole = size.checked_sub(position).ok_or_else(bad)?;
    pieces.push(Piece { hole, stored: 0 });
    Ok(pieces)
}
