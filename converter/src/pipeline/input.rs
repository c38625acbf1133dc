//! The blob that comes in: counted, digested, decompressed.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc;

use sluice_oci::{Digest, Hasher};

use crate::Error;
use crate::layout::Spool;
use crate::source::BlobReader;

/// Size of the pieces that the decompressor hands on.
const PIECE: usize = 256 << 10;

/// A reader that digests and counts what passes.
pub(crate) struct Counted<R, F> {
    inner: R,
    read: F,
    hasher: Hasher,
    size: u64,
}

/// What a whole blob turned out to be.
#[derive(Debug)]
pub(crate) struct BlobEnd {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl<R: Read, F: Fn(u64)> Counted<R, F> {
    pub(crate) fn new(inner: R, read: F) -> Self {
        Self {
            inner,
            read,
            hasher: Hasher::new(),
            size: 0,
        }
    }

    /// Reads what the decompressor left and says what passed in all.
    pub(crate) fn end(mut self) -> io::Result<BlobEnd> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(BlobEnd {
            digest: self.hasher.finish(),
            size: self.size,
        })
    }
}

impl<R: Read, F: Fn(u64)> Read for Counted<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        self.size += n as u64;
        (self.read)(n as u64);
        Ok(n)
    }
}

/// Puts a blob into a file in `directory`, whatever is in it.
pub(crate) fn spooled(
    blob: BlobReader,
    digest: Digest,
    directory: &Path,
) -> Result<(Spool, BlobEnd), Error> {
    let spool = Spool::new(directory)?;
    let mut blob = Counted::new(blob, |_| ());
    let mut buffer = vec![0; 256 << 10];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => spool.write_all(&buffer[..n])?,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(read_error(digest, cause)),
        }
    }
    let end = blob.end().map_err(|cause| read_error(digest, cause))?;
    Ok((spool, end))
}

impl BlobEnd {
    /// Compares with what the descriptor promised.
    pub(crate) fn check(&self, what: &'static str, digest: Digest, size: u64) -> Result<(), Error> {
        let why = if self.size != size {
            format!("it has {} bytes instead of {size}", self.size)
        } else if self.digest != digest {
            format!("its bytes have the digest {}", self.digest)
        } else {
            return Ok(());
        };
        Err(Error::Damaged { what, digest, why })
    }
}

/// A blob's tar, whichever way it is compressed.
pub(crate) enum Decompressed<R: BufRead> {
    Gzip(Box<flate2::bufread::MultiGzDecoder<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
    Plain(R),
}

/// Tells the compression by the first bytes: media types are not always
/// right about it.
pub(crate) fn decompressed<R: Read>(blob: R) -> io::Result<Decompressed<BufReader<R>>> {
    let mut blob = BufReader::with_capacity(PIECE, blob);
    let start = blob.fill_buf()?;
    let zstd = start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || (start.len() > 4 && start[0] & 0xf0 == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18]);
    Ok(if start.starts_with(&[0x1f, 0x8b]) {
        Decompressed::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(blob)))
    } else if zstd {
        Decompressed::Zstd(zstd::stream::read::Decoder::with_buffer(blob)?)
    } else {
        Decompressed::Plain(blob)
    })
}

impl<R: BufRead> Decompressed<R> {
    /// The compressed blob.
    pub(crate) fn into_inner(self) -> R {
        match self {
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
            Self::Plain(blob) => blob,
        }
    }
}

impl<R: BufRead> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
            Self::Plain(blob) => blob.read(buffer),
        }
    }
}

/// Sends a blob's tar in pieces. `None` when nobody wants more of them.
pub(crate) fn pieces<R: Read, F: Fn(u64)>(
    blob: Counted<R, F>,
    layer: Digest,
    to: &mpsc::SyncSender<Vec<u8>>,
) -> Result<Option<BlobEnd>, Error> {
    let failed = |cause: io::Error| read_error(layer, cause);
    let mut tar = decompressed(blob).map_err(failed)?;
    loop {
        let mut piece = vec![0; PIECE];
        let mut filled = 0;
        while filled < PIECE {
            match tar.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(failed(cause)),
            }
        }
        piece.truncate(filled);
        if filled == 0 {
            let blob = tar.into_inner().into_inner();
            return blob.end().map(Some).map_err(failed);
        }
        if to.send(piece).is_err() {
            return Ok(None);
        }
    }
}

/// An error of the decompressor means a damaged blob, unless it carries one
/// of the source.
fn read_error(layer: Digest, cause: io::Error) -> Error {
    match cause.downcast::<Error>() {
        Ok(error) => error,
        Err(cause) => Error::Damaged {
            what: "layer",
            digest: layer,
            why: match cause.kind() {
                io::ErrorKind::UnexpectedEof => "its compressed data ends too soon".to_owned(),
                _ => format!("it cannot be decompressed: {cause}"),
            },
        },
    }
}
