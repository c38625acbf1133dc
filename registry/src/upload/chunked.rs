//! Uploading what is still being made.

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use reqwest::{Response, Url};
use sluice_oci::{Digest, Hasher};

use super::{BlobSource, Destination, octets};
use crate::error::{Error, ErrorKind};
use crate::transport::{Payload, location};

/// Large enough that a round trip a chunk does not matter, small enough to
/// keep for a second try.
const CHUNK: usize = 8 << 20;
/// The most that a registry may ask for.
const LARGEST_CHUNK: usize = 64 << 20;
const MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// A blob on its way to a registry, chunk by chunk. One chunk is kept in
/// memory until the registry has it; what breaks off goes on after the last
/// byte that arrived.
///
/// An upload that is dropped leaves a session behind that the registry lets
/// expire; [`cancel`](Self::cancel) ends it at once.
pub struct ChunkedUpload {
    to: Destination,
    session: Url,
    buffer: BytesMut,
    chunk: usize,
    /// What the registry has.
    sent: u64,
    hasher: Hasher,
}

impl ChunkedUpload {
    pub(super) async fn begin(to: Destination) -> Result<Self, Error> {
        let mut attempts = to.transport.attempts();
        let response = loop {
            match to.begin().await {
                Ok(response) => break response,
                Err(error) => attempts.pause(error).await?,
            }
        };
        let least: Option<usize> = response
            .headers()
            .get(MIN_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Self {
            session: location(&response, &to.context)?,
            to,
            buffer: BytesMut::new(),
            chunk: least.unwrap_or(CHUNK).clamp(CHUNK, LARGEST_CHUNK),
            sent: 0,
            hasher: Hasher::new(),
        })
    }

    /// Adds bytes to the blob.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.chunk - self.buffer.len();
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.buffer.extend_from_slice(now);
            rest = later;
            if self.buffer.len() == self.chunk {
                self.send_chunk().await?;
            }
        }
        Ok(())
    }

    /// Ends the blob; returns its digest and size.
    pub async fn finish(mut self) -> Result<(Digest, u64), Error> {
        if !self.buffer.is_empty() {
            self.send_chunk().await?;
        }
        let digest = self.hasher.clone().finish();
        let mut attempts = self.to.transport.attempts();
        loop {
            let done = self.to.commit(&self.session, digest, Payload::None).await;
            let Err(error) = done else {
                return Ok((digest, self.sent));
            };
            // The answer may have been lost, not the request.
            if error.kind().is_transient() && self.to.exists(digest).await.unwrap_or(false) {
                return Ok((digest, self.sent));
            }
            attempts.pause(error).await?;
        }
    }

    /// Gives the upload up.
    pub async fn cancel(self) {
        self.to.cancel(&self.session).await;
    }

    async fn send_chunk(&mut self) -> Result<(), Error> {
        let chunk = self.buffer.split().freeze();
        let end = self.sent + chunk.len() as u64;
        let mut attempts = self.to.transport.attempts();
        while self.sent < end {
            let missing = chunk.slice(chunk.len() - (end - self.sent) as usize..);
            match self.patch(missing).await {
                Ok(()) => self.sent = end,
                Err(error) => {
                    attempts.pause(error).await?;
                    self.sent = loop {
                        match self.arrived(end).await {
                            Ok(arrived) => break arrived,
                            Err(error) => attempts.pause(error).await?,
                        }
                    };
                }
            }
        }
        Ok(())
    }

    async fn patch(&mut self, bytes: Bytes) -> Result<(), Error> {
        let mut headers = octets();
        let last = self.sent + bytes.len() as u64 - 1;
        let range = format!("{}-{last}", self.sent);
        if let Ok(range) = HeaderValue::try_from(range) {
            headers.insert(CONTENT_RANGE, range);
        }
        headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
        let payload = Payload::Source {
            size: bytes.len() as u64,
            source: BlobSource::bytes(bytes),
        };
        let response = self
            .to
            .send(Method::PATCH, &self.session, payload, headers)
            .await?;
        let response = self.to.expect(response, &[202, 204]).await?;
        self.session = location(&response, &self.to.context)?;
        Ok(())
    }

    /// Asks how much arrived of what broke off.
    async fn arrived(&mut self, end: u64) -> Result<u64, Error> {
        let response = self
            .to
            .send(Method::GET, &self.session, Payload::None, HeaderMap::new())
            .await?;
        let response = self.to.expect(response, &[204]).await?;
        let arrived = arrived(&response);
        if let Ok(session) = location(&response, &self.to.context) {
            self.session = session;
        }
        // Bytes before the chunk are gone from memory.
        if arrived < self.sent || arrived > end {
            return Err(self.to.context.error(
                ErrorKind::Protocol,
                format!(
                    "the registry has {arrived} bytes of an upload of which {} were sent",
                    self.sent
                ),
            ));
        }
        Ok(arrived)
    }
}

/// How many bytes the registry has: `Range: 0-LAST`. Nothing yet is told as
/// `0-0` by some, so one byte alone is taken for none.
fn arrived(response: &Response) -> u64 {
    response
        .headers()
        .get(RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.trim_start_matches("bytes=").split_once('-'))
        .and_then(|(_, last)| last.parse::<u64>().ok())
        .filter(|&last| last > 0)
        .map_or(0, |last| last.saturating_add(1))
}
