//! What must hold for any bytes at all. The fuzz targets and the ordinary
//! tests (`tests/corpus.rs`) run these.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::time::Duration;

use sluice_layer::{
    ChunkSource, FOOTER_MAX, Format, HeaderStyle, LayerAnnotations, Limits, NodeId, NodeKind,
    Profile, TarPart, TarSplit, Toc, TocLocation, UntrustedToc, Wanted, decode_unit, likely_tar,
    locate_toc, read_toc_json, toc_in_tar,
};
use sluice_oci::Digest;

/// What is found from the end of a blob lies within it, and a longer tail
/// finds the same.
pub fn footer(data: &[u8]) {
    let size = data.len() as u64;
    let found = locate_toc(data, size);
    let tail = &data[data.len().saturating_sub(FOOTER_MAX)..];
    assert_eq!(found, locate_toc(tail, size));
    if let Ok(location) = found {
        check_location(&location, size);
        assert!(location.slice_of(data, size).is_some());
    }
    let larger = size.saturating_mul(1 << 20);
    if let Ok(location) = locate_toc(data, larger) {
        check_location(&location, larger);
    }
}

fn check_location(location: &TocLocation, blob_size: u64) {
    assert!(location.compressed_size > 0);
    assert!(
        location
            .offset
            .checked_add(location.compressed_size)
            .is_some()
    );
    assert!(location.range().end < blob_size);
    assert!(location.chunks_end() <= location.offset);
}

/// What a layer says of its tar is refused, or in parts that are something.
/// The first byte says which way it says so.
pub fn tar(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let check = |part: &TarPart| assert_ne!(*part, TarPart::Content(0));
    if kind % 2 == 0 {
        let Ok(mut split) = TarSplit::new(data, data.len() as u64) else {
            return;
        };
        let mut left = 1000;
        while let (1.., Ok(Some(part))) = (left, split.next_part()) {
            check(&part);
            left -= 1;
        }
    } else if let Some((header, toc)) = data.split_at_checked(512)
        && let Some(style) = HeaderStyle::of(header)
        && let Ok(json) = toc_in_tar(toc)
    {
        let _ = likely_tar(json, &style, |part| {
            check(&part);
            Ok(())
        });
    }
}

/// A TOC is refused, or is as [`Toc`] promises. The first byte says what the
/// rest is: JSON, or a compressed TOC of either format.
pub fn toc(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let limits = Limits {
        max_toc_bytes: 1 << 20,
        max_entries: 5_000,
        ..Limits::default()
    };
    let format = match kind % 3 {
        0 => {
            let digest = Digest::of(data);
            if let Ok(toc) = read_toc_json(Format::Estargz, 1 << 32, data, &digest, &limits) {
                check_toc(&toc, &limits);
            }
            return;
        }
        1 => Format::Estargz,
        _ => Format::ZstdChunked,
    };
    let location = TocLocation {
        format,
        offset: 1 << 32,
        compressed_size: data.len() as u64,
        uncompressed_size: None,
    };
    if let Ok(untrusted) = UntrustedToc::read(&location, data, &limits) {
        assert!(untrusted.json().len() as u64 <= limits.max_toc_bytes + 2048);
        if let Ok(toc) = untrusted.parse_without_trust(&limits) {
            check_toc(&toc, &limits);
        }
    }
}

/// A profile is refused, or is as [`Profile`] promises, and its document is
/// read as the same again. The first byte says whether it is compressed.
pub fn profile(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let parsed = match kind % 2 {
        0 => Profile::parse(data),
        _ => Profile::parse_compressed(data),
    };
    let profile = match parsed {
        Ok(profile) => profile,
        Err(error) => {
            assert!(error.to_string().chars().count() < 1000);
            return;
        }
    };
    let mut before = Duration::ZERO;
    let mut seen = HashSet::new();
    for read in profile.reads() {
        assert!(read.layer < profile.layers().len() && read.len > 0);
        assert!(
            read.offset
                .checked_add(read.len)
                .is_some_and(|end| end <= i64::MAX as u64)
        );
        assert!((1..=profile.starts()).contains(&read.starts) && read.at >= before);
        before = read.at;
        for name in read.path.split(|byte| *byte == b'/') {
            assert!(!matches!(name, b"" | b"." | b"..") && !name.contains(&0));
        }
        assert!(seen.insert((read.layer, &read.path, read.offset)));
    }
    let again = Profile::parse(profile.to_json().as_bytes());
    assert_eq!(again.as_ref(), Ok(&profile));
    let _ = Profile::merge(&[profile.clone(), profile]);
}

/// Annotations are refused, or give numbers that a blob can have. Each line
/// is `key=value`.
pub fn annotations(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let annotations: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    match LayerAnnotations::parse(&annotations) {
        Ok(known) => {
            if let Some(location) = known.toc_location() {
                assert!(location.compressed_size > 0);
                assert!(location.range().end >= location.compressed_size);
                assert!(location.chunks_end() < location.offset);
            }
            assert_eq!(
                known.trust().is_some(),
                known
                    .toc_digest()
                    .or(known.compressed_toc_digest())
                    .is_some()
            );
        }
        Err(error) => assert!(error.to_string().chars().count() < 400),
    }
}

/// Everything that the model's documentation says.
pub fn check_toc(toc: &Toc, limits: &Limits) {
    assert!(toc.nodes().len() <= limits.max_entries);
    let mut names: HashMap<usize, u32> = HashMap::new();
    let mut next_chunk = 0;
    for (index, node) in toc.nodes().iter().enumerate() {
        assert!(node.mode <= 0o7777 && node.links > 0);
        assert!(node.mtime.secs >= 0 && node.mtime.nanos < 1_000_000_000);
        assert!(
            node.xattrs
                .windows(2)
                .all(|pair| pair[0].name < pair[1].name)
        );
        for xattr in &node.xattrs {
            assert!((1..=255).contains(&xattr.name.len()) && xattr.value.len() <= 65_535);
            assert!(!xattr.name.starts_with(b"trusted."));
            assert!(!xattr.name.starts_with(b"user.overlay."));
        }
        match &node.kind {
            NodeKind::Directory(directory) => {
                let mut subdirectories = 0;
                assert!(
                    directory
                        .children
                        .windows(2)
                        .all(|pair| pair[0].name < pair[1].name)
                );
                for child in &directory.children {
                    let name = &*child.name;
                    assert!((1..=255).contains(&name.len()));
                    assert!(!name.contains(&b'/') && !name.contains(&0));
                    assert!(name != b"." && name != b"..");
                    *names.entry(child.node.index()).or_default() += 1;
                    if let NodeKind::Directory(below) = &toc.node(child.node).kind {
                        subdirectories += 1;
                        assert!(child.node.index() > index);
                        assert_eq!(below.parent.index(), index);
                    }
                }
                assert_eq!(node.links, 2 + subdirectories);
            }
            NodeKind::Regular(content) => {
                assert_eq!(content.chunks.start, next_chunk);
                next_chunk = content.chunks.end;
                let mut end = 0;
                for at in content.chunks.clone() {
                    let chunk = &toc.chunks()[at as usize];
                    assert!(chunk.size > 0);
                    assert_eq!(chunk.file_offset, end);
                    end += chunk.size;
                }
                assert_eq!(end, content.size);
            }
            NodeKind::Symlink(target) => {
                assert!((1..=4095).contains(&target.len()) && !target.contains(&0));
            }
            NodeKind::CharDevice { major, minor } | NodeKind::BlockDevice { major, minor } => {
                assert!(*major < 1 << 12 && *minor < 1 << 20);
            }
            NodeKind::Fifo => {}
        }
    }
    assert_eq!(next_chunk as usize, toc.chunks().len());
    for (index, node) in toc.nodes().iter().enumerate() {
        let named = names.get(&index).copied().unwrap_or_default();
        match node.kind {
            NodeKind::Directory(_) if index == NodeId::ROOT.index() => assert_eq!(named, 0),
            NodeKind::Directory(_) => assert_eq!(named, 1),
            _ => assert_eq!(named, node.links),
        }
    }
    let mut units = HashSet::new();
    for chunk in toc.chunks() {
        if let ChunkSource::Blob { unit, inner_offset } = chunk.source {
            assert!(inner_offset + chunk.size <= limits.max_unit_bytes);
            units.insert((unit.offset, unit.size));
        }
    }
    let mut units: Vec<_> = units.into_iter().collect();
    units.sort_unstable();
    let mut end = 0;
    for (offset, size) in units {
        assert!(size > 0 && offset >= end);
        end = offset.checked_add(size).expect("within the blob");
    }
    assert!(end <= toc.toc_offset());
    assert!(toc.prefetch_end().is_none_or(|end| end <= toc.toc_offset()));
}

/// Decoding gives exactly the bytes that a plain decompressor gives, or an
/// error, and never more than was asked for. The first bytes say the format
/// and where to cut, the rest is compressed.
pub fn decoder(data: &[u8]) {
    let Some((head, data)) = data.split_first_chunk::<4>() else {
        return;
    };
    let format = match head[0] % 2 {
        0 => Format::Estargz,
        _ => Format::ZstdChunked,
    };
    let plain = decompress(format, data);
    let size = plain.len() as u64;
    let mut cuts = [
        size * u64::from(head[1]) / 256,
        size * u64::from(head[2]) / 256,
        size * u64::from(head[3]) / 256,
    ];
    cuts.sort_unstable();
    let slice = |from: u64, to: u64| &plain[from as usize..to as usize];
    let wanted: Vec<Wanted> = [(cuts[0], cuts[1]), (cuts[2], size)]
        .iter()
        .map(|(from, to)| Wanted {
            inner_offset: *from,
            size: to - from,
            digest: Digest::of(slice(*from, *to)),
        })
        .collect();
    let mut seen = 0;
    let decoded = decode_unit(format, data, &wanted, |index, chunk| {
        assert_eq!(index, seen);
        let Wanted {
            inner_offset, size, ..
        } = wanted[index];
        assert_eq!(chunk.bytes(), slice(inner_offset, inner_offset + size));
        seen += 1;
    });
    assert_eq!(decoded.is_ok(), seen == wanted.len());
    assert!(decoded.is_ok(), "a plain decompressor could: {decoded:?}");
    let mut lie = wanted[1];
    lie.digest = Digest::of(b"something else");
    assert!(decode_unit(format, data, &[lie], |_, _| panic!("unverified")).is_err());
    lie.size = u64::MAX;
    assert!(decode_unit(format, data, &[lie], |_, _| panic!("unverified")).is_err());
}

/// The first bytes of what the data decompresses to, as far as it does.
fn decompress(format: Format, data: &[u8]) -> Vec<u8> {
    let mut reader: Box<dyn Read + '_> = match format {
        Format::Estargz => Box::new(flate2::bufread::MultiGzDecoder::new(data)),
        Format::ZstdChunked => match zstd::stream::read::Decoder::with_buffer(data) {
            // Frames with larger windows are refused.
            Ok(mut decoder) => match decoder.window_log_max(25) {
                Ok(()) => Box::new(decoder),
                Err(_) => return Vec::new(),
            },
            Err(_) => return Vec::new(),
        },
    };
    let mut plain = Vec::new();
    let mut piece = [0; 4096];
    while plain.len() < 1 << 18 {
        match reader.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(read) => plain.extend_from_slice(&piece[..read]),
        }
    }
    plain
}
