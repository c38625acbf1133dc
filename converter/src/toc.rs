//! Finding and reading a layer's TOC, wherever the layer is.

use sluice_layer::annotations::{
    START_CHUNKS, START_RANGES, TOC_DIGEST, TOC_POSITION, UNCOMPRESSED_SIZE, ZSTD_CHUNKED_PREFIXES,
};
use sluice_layer::{
    FOOTER_MAX, FooterError, Format, LayerAnnotations, Limits, TocLocation, TocTrust, UntrustedToc,
    locate_toc,
};
use sluice_oci::Descriptor;

use crate::Error;
use crate::source::Source;

/// A TOC that was found in a blob.
pub(crate) struct FoundToc {
    pub(crate) location: TocLocation,
    pub(crate) toc: UntrustedToc,
    /// What the annotations vouch for.
    pub(crate) trust: Option<TocTrust>,
    /// Whether the hint for nodes says that it is elsewhere.
    pub(crate) misplaced: bool,
}

/// Why a layer has no usable TOC.
pub(crate) enum NoToc {
    /// It is an ordinary layer.
    Ordinary,
    /// It should have one, but something is wrong.
    Broken(String),
}

/// Whether the annotation belongs to a layer's TOC.
pub(crate) fn is_toc_annotation(key: &str) -> bool {
    [
        TOC_DIGEST,
        TOC_POSITION,
        UNCOMPRESSED_SIZE,
        START_CHUNKS,
        START_RANGES,
    ]
    .contains(&key)
        || ZSTD_CHUNKED_PREFIXES
            .iter()
            .any(|prefix| key.starts_with(prefix))
}

/// Whether the layer is in that format and its TOC is what its annotation
/// says.
pub(crate) async fn is_seekable(
    source: &Source,
    layer: &Descriptor,
    format: Format,
) -> Result<bool, Error> {
    let vouched = match LayerAnnotations::parse(&layer.annotations) {
        Ok(annotations) => annotations.trust().is_some(),
        Err(_) => false,
    };
    if !vouched {
        return Ok(false);
    }
    Ok(match find(source, layer).await? {
        Ok(found) => {
            found.location.format == format
                && found.trust.is_some_and(|trust| found.toc.matches(&trust))
                && found.toc.parse_without_trust(&Limits::default()).is_ok()
        }
        Err(_) => false,
    })
}

/// Reads the TOC by the annotated position, or by the footer.
pub(crate) async fn find(
    source: &Source,
    layer: &Descriptor,
) -> Result<Result<FoundToc, NoToc>, Error> {
    let annotations = match LayerAnnotations::parse(&layer.annotations) {
        Ok(annotations) => annotations,
        Err(cause) => return Ok(Err(NoToc::Broken(cause.to_string()))),
    };
    let trust = annotations.trust();
    let location = match annotations.toc_location() {
        Some(location) => location,
        None => {
            let size = layer.size.min(FOOTER_MAX as u64);
            let tail = source.range(layer.digest, layer.size - size, size).await?;
            match locate_toc(&tail, layer.size) {
                Ok(location) => location,
                Err(FooterError::NotSeekable) if trust.is_none() => {
                    return Ok(Err(NoToc::Ordinary));
                }
                Err(cause) => return Ok(Err(NoToc::Broken(cause.to_string()))),
            }
        }
    };
    let limits = Limits::default();
    if let Err(cause) = location.check(&limits) {
        return Ok(Err(NoToc::Broken(cause.to_string())));
    }
    let misplaced = annotations
        .toc_hint()
        .is_some_and(|hint| hint.format != location.format || hint.range() != location.range());
    let range = location.range();
    let compressed = source
        .range(layer.digest, range.start, range.end - range.start)
        .await?;
    Ok(match UntrustedToc::read(&location, &compressed, &limits) {
        Ok(toc) => Ok(FoundToc {
            location,
            toc,
            trust,
            misplaced,
        }),
        Err(cause) => Err(NoToc::Broken(cause.to_string())),
    })
}
