//! Decompressing a TOC: at once where that takes little memory, and otherwise
//! as a stream of which no more is held than the parser looks at.

use std::io::{self, Read};

use super::error::TocError;
use super::read::Limits;
use crate::decode::gunzip_at_once;
use crate::{Format, TocLocation};

/// Most that is decompressed at once: the TOC of some 130,000 files. A stream
/// takes three times as long.
const AT_ONCE: u64 = 40 << 20;
/// The part of [`Limits::max_memory`] that the JSON may take while a tree is
/// made of it: one that takes more is not decompressed at once.
pub(super) const AT_ONCE_SHARE: u64 = 3;

const TAR_BLOCK: usize = 512;
const TOC_TAR_NAME: &[u8] = b"stargz.index.json";

/// Frames that want a larger window are refused: 32 MiB is the most that an
/// encoder of layers takes.
pub(crate) const ZSTD_WINDOW_LOG: u32 = 25;

/// The JSON at once, if its size is stated and small.
pub(super) fn at_once(
    location: &TocLocation,
    compressed: &[u8],
    limits: &Limits,
) -> Result<Option<Json>, TocError> {
    let limit = AT_ONCE
        .min(limits.max_memory / AT_ONCE_SHARE)
        .min(with_tar(limits.max_toc_bytes));
    let bytes = match (location.format, location.uncompressed_size) {
        (Format::Estargz, _) => gunzip_at_once(compressed, limit),
        (Format::ZstdChunked, Some(size)) if size <= limit => {
            // Fits: it is below `AT_ONCE`.
            let output = zstd::bulk::decompress(compressed, size as usize)
                .map_err(|error| corrupt(location.format, &error))?;
            if output.len() as u64 != size {
                return Err(TocError::Size {
                    expected: size,
                    actual: output.len() as u64,
                });
            }
            Some(output)
        }
        (Format::ZstdChunked, _) => None,
    };
    bytes
        .map(|bytes| Json::within(bytes, location.format))
        .transpose()
}

/// A decompressed TOC.
pub(super) struct Json {
    bytes: Vec<u8>,
    start: usize,
    size: usize,
}

impl Json {
    fn within(bytes: Vec<u8>, format: Format) -> Result<Self, TocError> {
        let (start, size) = match format {
            Format::ZstdChunked => (0, bytes.len()),
            // eStargz wraps it in a tar.
            Format::Estargz => {
                let (header, content) = bytes
                    .split_first_chunk::<TAR_BLOCK>()
                    .ok_or_else(|| refuse("it is no tar"))?;
                let size = size_in_tar(header)?;
                if size > content.len() as u64 {
                    return Err(cut_short());
                }
                (TAR_BLOCK, size as usize)
            }
        };
        Ok(Self { bytes, start, size })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.size]
    }
}

/// The JSON as a stream. Its size, where it is stated, is within the limits;
/// whether it is true shows when it ends.
pub(super) struct Stream<'a> {
    reader: io::Take<Box<dyn Read + 'a>>,
    format: Format,
    /// What footer, annotation or tar header say.
    stated: Option<u64>,
    limit: u64,
}

impl<'a> Stream<'a> {
    pub(super) fn open(
        location: &TocLocation,
        compressed: &'a [u8],
        limits: &Limits,
    ) -> Result<Self, TocError> {
        let format = location.format;
        let failed = |error: io::Error| corrupt(format, &error);
        let limit = limits.max_toc_bytes;
        let (reader, stated): (Box<dyn Read + 'a>, _) = match format {
            Format::Estargz => {
                let mut reader = flate2::bufread::GzDecoder::new(compressed);
                let mut header = [0; TAR_BLOCK];
                match reader.read_exact(&mut header) {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Err(refuse("it is no tar"));
                    }
                    read => read.map_err(failed)?,
                }
                let size = size_in_tar(&header)?;
                if size > limit {
                    return Err(TocError::TooLarge { limit });
                }
                (Box::new(reader.take(size)), Some(size))
            }
            Format::ZstdChunked => {
                let mut reader =
                    zstd::stream::read::Decoder::with_buffer(compressed).map_err(failed)?;
                reader.window_log_max(ZSTD_WINDOW_LOG).map_err(failed)?;
                (Box::new(reader), location.uncompressed_size)
            }
        };
        Ok(Self {
            // One byte more tells that there is more.
            reader: reader.take(limit.saturating_add(1)),
            format,
            stated,
            limit,
        })
    }

    /// Passes the whole of it to `each`, piece by piece; its size.
    pub(super) fn for_each(mut self, mut each: impl FnMut(&[u8])) -> Result<u64, TocError> {
        let mut buffer = vec![0; 64 << 10];
        let mut size = 0;
        loop {
            match self.reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    each(&buffer[..count]);
                    size += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(corrupt(self.format, &error)),
            }
        }
        if size > self.limit {
            return Err(TocError::TooLarge { limit: self.limit });
        }
        match self.stated {
            Some(expected) if size != expected && self.format == Format::Estargz => {
                Err(cut_short())
            }
            Some(expected) if size != expected => Err(TocError::Size {
                expected,
                actual: size,
            }),
            _ => Ok(size),
        }
    }

    pub(super) fn reader(self) -> impl Read + use<'a> {
        self.reader
    }
}

/// Memory that streaming takes: the window, and buffers.
pub(super) fn stream_memory(format: Format, compressed: &[u8]) -> u64 {
    const BUFFERS: u64 = 1 << 20;
    const SINGLE_SEGMENT: u8 = 1 << 5;
    let window = match (format, compressed.get(4..6)) {
        // Byte 5 of a frame has the window's size, unless that is the
        // content's, which is then too large not to be refused.
        (Format::ZstdChunked, Some([flags, window])) if flags & SINGLE_SEGMENT == 0 => {
            let base = 1_u64 << (10 + (window >> 3));
            base + base / 8 * u64::from(window & 7)
        }
        _ => 0,
    };
    window.min(1 << ZSTD_WINDOW_LOG) + BUFFERS
}

fn with_tar(json: u64) -> u64 {
    // A header, padding and two blocks.
    json.saturating_add(4 * TAR_BLOCK as u64)
}

/// Size of the file that a tar header describes, which has to be the TOC.
pub(crate) fn size_in_tar(header: &[u8; TAR_BLOCK]) -> Result<u64, TocError> {
    let name = header[..100].split(|byte| *byte == 0).next();
    if name != Some(TOC_TAR_NAME) || !matches!(header[156], b'0' | 0) {
        return Err(refuse("its tar does not begin with stargz.index.json"));
    }
    header[124..136]
        .iter()
        .skip_while(|byte| **byte == b' ')
        .take_while(|byte| !matches!(byte, b' ' | 0))
        .try_fold(0u64, |size, digit| {
            matches!(digit, b'0'..=b'7').then(|| size << 3 | u64::from(digit - b'0'))
        })
        .ok_or_else(|| refuse("its tar header has no size"))
}

fn refuse(reason: &str) -> TocError {
    TocError::Compression {
        format: Format::Estargz,
        reason: reason.to_owned(),
    }
}

fn cut_short() -> TocError {
    refuse("its tar ends before stargz.index.json does")
}

fn corrupt(format: Format, error: &io::Error) -> TocError {
    TocError::Compression {
        format,
        reason: error.to_string(),
    }
}
