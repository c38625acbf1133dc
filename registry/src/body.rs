//! The bytes of a blob as they arrive.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::Response;
use sluice_oci::{Digest, Hasher};

use crate::blob::{Blob, ByteRange};
use crate::document::check_digest;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, ErrorKind};
use crate::hosts::Senders;
use crate::http_client::broken_body;
use crate::retry::Attempts;

/// A part of a blob, or all of it, being received.
///
/// A body that breaks off or stalls is resumed where it stopped, by a further
/// range request and within the retry policy. Dropping a body ends its
/// request.
pub struct Body {
    /// Where in the blob the first byte lies.
    pub offset: u64,
    /// How many bytes there are in all. Less than asked for only where the
    /// blob ends.
    pub len: u64,
    /// The blob's size, where the registry told it.
    pub blob_size: Option<u64>,
    received: u64,
    /// Bytes still to come that were received before.
    repeated: u64,
    response: Option<Response>,
    check: Option<(Digest, Hasher)>,
    blob: Blob,
    /// Who sends.
    endpoint: Endpoint,
    senders: Senders,
    attempts: Attempts,
}

impl Body {
    pub(crate) fn new(
        opened: Opened,
        blob: Blob,
        check: Option<Digest>,
        attempts: Attempts,
    ) -> Self {
        let senders = Senders::new(blob.clone());
        senders.add(&opened.endpoint);
        Self {
            offset: opened.offset,
            len: opened.len,
            blob_size: opened.blob_size,
            received: 0,
            repeated: 0,
            response: opened.response,
            check: check.map(|digest| (digest, Hasher::new())),
            blob,
            endpoint: opened.endpoint,
            senders,
            attempts,
        }
    }

    /// The hosts that send the bytes, for the case that these turn out to be
    /// wrong.
    pub fn senders(&self) -> Senders {
        self.senders.clone()
    }

    /// The next bytes, or nothing after the last. The bytes of a whole blob
    /// are to be trusted only once `None` was returned: its digest is checked
    /// there.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.received == self.len {
                self.response = None;
                return self.finish().map(|()| None);
            }
            if self.response.is_none() {
                match self.reopen().await {
                    Ok(response) => self.response = Some(response),
                    Err(error) => {
                        self.attempts.pause(error).await?;
                        continue;
                    }
                }
            }
            match self.receive().await {
                Ok(bytes) => {
                    self.received += bytes.len() as u64;
                    if let Some((_, hasher)) = &mut self.check {
                        hasher.update(&bytes);
                    }
                    self.attempts.restart();
                    if self.received == self.len {
                        self.blob.delivered(&self.endpoint);
                    }
                    return Ok(Some(bytes));
                }
                Err(error) => {
                    self.response = None;
                    let another = self.blob.failed(&self.endpoint, error.clone());
                    if !(another && self.attempts.go_on()) {
                        self.attempts.pause(error).await?;
                    }
                }
            }
        }
    }

    /// All the bytes in one piece, if they are at most `limit`. A whole blob
    /// with wrong bytes is fetched once more if there is another host.
    pub async fn collect(self, limit: usize) -> Result<Bytes, Error> {
        self.collect_telling(limit, |_| {}).await
    }

    /// The same, telling `arrived` how many bytes came each time that some do.
    pub async fn collect_telling(
        mut self,
        limit: usize,
        mut arrived: impl FnMut(u64),
    ) -> Result<Bytes, Error> {
        match self.collect_once(limit, &mut arrived).await {
            Err(error) if error.kind() == ErrorKind::DigestMismatch && self.senders.distrust() => {
                let mut again = self.blob.whole().await?;
                again.collect_once(limit, &mut arrived).await
            }
            collected => collected,
        }
    }

    async fn collect_once(
        &mut self,
        limit: usize,
        arrived: &mut impl FnMut(u64),
    ) -> Result<Bytes, Error> {
        if self.len > limit as u64 {
            return Err(self.blob.context().error(
                ErrorKind::TooLarge,
                format!("{} bytes where at most {limit} are accepted", self.len),
            ));
        }
        let mut all = BytesMut::with_capacity(self.len as usize);
        while let Some(bytes) = self.next().await? {
            arrived(bytes.len() as u64);
            all.extend_from_slice(&bytes);
        }
        Ok(all.freeze())
    }

    async fn receive(&mut self) -> Result<Bytes, Error> {
        let left = self.len - self.received;
        let context = self.blob.context();
        let stall = self.blob.stall_timeout();
        loop {
            let Some(response) = &mut self.response else {
                return Err(context.protocol("the registry sent no body"));
            };
            let chunk = tokio::time::timeout(stall, response.chunk())
                .await
                .map_err(|_| stalled(context, stall))?
                .map_err(|error| broken_body(context, error))?;
            let Some(mut bytes) = chunk else {
                let missing = left + self.repeated;
                return Err(context.error(
                    ErrorKind::Truncated,
                    format!("the body ended {missing} bytes early"),
                ));
            };
            if self.repeated > 0 {
                let known = bytes
                    .len()
                    .min(usize::try_from(self.repeated).unwrap_or(usize::MAX));
                let _ = bytes.split_to(known);
                self.repeated -= known as u64;
            }
            if bytes.len() as u64 > left {
                return Err(context.protocol("the body is longer than announced"));
            }
            if !bytes.is_empty() {
                return Ok(bytes);
            }
        }
    }

    /// Asks for what is missing. For a whole blob, a registry that knows no
    /// ranges sends everything again.
    async fn reopen(&mut self) -> Result<Response, Error> {
        let left = self.len - self.received;
        let rest = ByteRange::From {
            offset: self.offset + self.received,
            len: left,
        };
        let (opened, repeated) = match self.blob.open(rest).await {
            Err(error) if error.kind() == ErrorKind::RangeIgnored && self.check.is_some() => {
                (self.blob.open_whole().await?, self.received)
            }
            opened => (opened?, 0),
        };
        let context = self.blob.context();
        if opened.len != left + repeated {
            return Err(context.protocol("the blob's size changed between two requests"));
        }
        self.repeated = repeated;
        self.senders.add(&opened.endpoint);
        self.endpoint = opened.endpoint;
        opened
            .response
            .ok_or_else(|| context.protocol("the registry sent no body"))
    }

    fn finish(&mut self) -> Result<(), Error> {
        let Some((expected, hasher)) = self.check.take() else {
            return Ok(());
        };
        let context = self.blob.context();
        check_digest(expected, hasher.finish(), "it was asked for by", context)
    }
}

/// What a registry granted of a blob.
pub(crate) struct Opened {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) blob_size: Option<u64>,
    /// Absent where there is nothing to receive.
    pub(crate) response: Option<Response>,
    /// Who granted it.
    pub(crate) endpoint: Endpoint,
}

pub(crate) fn stalled(context: &Context, after: Duration) -> Error {
    context.error(
        ErrorKind::Stalled,
        format!("nothing arrived for {} s", after.as_secs_f32()),
    )
}
