//! Reading documents that a digest names.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_oci::Digest;

use crate::Error;
use crate::layout::MAX_DOCUMENT;

/// Checks a document against its digest.
pub(crate) fn check(what: &'static str, digest: Digest, bytes: &[u8]) -> Result<(), Error> {
    if bytes.len() as u64 > MAX_DOCUMENT {
        return Err(Error::Document {
            what,
            digest,
            why: format!("it is larger than {} MiB", MAX_DOCUMENT >> 20),
        });
    }
    let found = Digest::of(bytes);
    if found != digest {
        return Err(Error::Damaged {
            what,
            digest,
            why: format!("its bytes have the digest {found}"),
        });
    }
    Ok(())
}

/// Parses a document.
pub(crate) fn parse<T: DeserializeOwned>(
    what: &'static str,
    digest: Digest,
    bytes: &[u8],
) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|cause| Error::Document {
        what,
        digest,
        why: cause.to_string(),
    })
}

/// Writes a document that replaces the one with that digest.
pub(crate) fn to_bytes<T: Serialize>(
    what: &'static str,
    digest: Digest,
    document: &T,
) -> Result<Bytes, Error> {
    match serde_json::to_vec(document) {
        Ok(bytes) => Ok(bytes.into()),
        Err(cause) => Err(Error::Document {
            what,
            digest,
            why: format!("it cannot be written: {cause}"),
        }),
    }
}
