//! A client of the OCI distribution protocol: manifests, ranges of blobs,
//! uploads; authentication, redirects, mirrors and retries.
//!
//! One [`Client`] serves a whole process: it holds the connections, the tokens
//! and the redirects. Whatever a registry answers is treated as hostile: it is
//! bounded in size, checked against digests where there is one, and stripped
//! of control characters before it is shown.
//!
//! Where containerd's `hosts.toml` files name mirrors of a registry, they are
//! asked in their order. One that fails is left alone for a while that grows,
//! and the next is asked. Credentials, tokens and redirects are each host's
//! own.
//!
//! Credentials come from Docker configuration files named in [`Config`]; the
//! crate reads no environment variable of its own. (`HTTPS_PROXY` and
//! `SSL_CERT_FILE` are honoured by the libraries below, except that loopback
//! registries are never reached through a proxy.)

mod auth;
mod blob;
mod body;
mod client;
mod config;
mod connections;
mod content_range;
mod document;
mod endpoint;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod hosts;
mod http_client;
mod redirect;
mod referrers;
mod retry;
mod transport;
mod upload;

pub use blob::{Blob, ByteRange};
pub use body::Body;
pub use client::Client;
pub use config::{Config, RetryPolicy};
pub use connections::Connections;
pub use document::Document;
pub use error::{Error, ErrorKind};
pub use hosts::Senders;
pub use upload::{BlobSource, ChunkedUpload};
