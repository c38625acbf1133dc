//! Connections that are there before they are needed.

use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http::{Method, Version};
use sluice_oci::Reference;
use tokio::time::timeout;

use crate::auth::Scope;
use crate::client::Client;
use crate::endpoint::Endpoint;
use crate::error::Context;
use crate::transport::{Call, Purpose};

/// How many connections are opened ahead to a host that does not speak HTTP/2.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    /// To one that is near.
    pub near: usize,
    /// To one that is far away.
    pub far: usize,
    /// The shortest round trip to a host that is far away.
    pub far_from: Duration,
}

/// What an answer told: the version of HTTP, and about how long a round trip
/// takes.
type Told = (Version, Duration);

impl Client {
    /// Opens connections to the first host of the image's registry, and has a
    /// token for its repository where one is asked for, so that what comes next
    /// need not wait for either. One is enough where the host speaks HTTP/2. A
    /// hint, which cannot fail. Returns about how long a round trip takes, if
    /// the host answered: rather too long than too short. Nobody waits for those
    /// that are opened because a host turned out to be far away.
    pub async fn connect_ahead(
        &self,
        reference: &Reference,
        connections: Connections,
    ) -> Option<Duration> {
        let context = about(reference);
        let endpoints = self
            .transport
            .endpoints(reference, Purpose::Pull, &context)
            .unwrap_or_default();
        let endpoint = endpoints.into_iter().next()?;
        let Connections {
            near,
            far,
            far_from,
        } = connections;
        let told = if endpoint.is_plain() {
            let mut first = pin!(self.touch(reference, &endpoint, near));
            match timeout(far_from * round_trips(&endpoint), &mut first).await {
                Ok(told) => told,
                Err(_) => {
                    let (client, of) = (self.clone(), reference.clone());
                    let (endpoint, more) = (endpoint.clone(), far.saturating_sub(near));
                    tokio::spawn(async move { client.touch(&of, &endpoint, more).await });
                    first.await
                }
            }
        } else {
            // The first tells how many more it takes.
            let mut told = self.touch(reference, &endpoint, 1).await;
            let &(version, round_trip) = told.first()?;
            let wanted = match round_trip < far_from {
                _ if version >= Version::HTTP_2 => 1,
                true => near,
                false => far,
            };
            let others = wanted.saturating_sub(1);
            told.extend(self.touch(reference, &endpoint, others).await);
            told
        };
        told.into_iter().map(|(_, round_trip)| round_trip).min()
    }

    /// Sends so many requests for nothing at once, each of which takes or opens
    /// a connection, and returns what those told that were answered.
    async fn touch(&self, reference: &Reference, endpoint: &Endpoint, times: usize) -> Vec<Told> {
        let context = &endpoint.context(&about(reference));
        let scope = Scope::pull(reference.repository());
        let call = &Call::new(Method::GET, endpoint, &scope, context);
        let touch = || async move {
            let sent = Instant::now();
            let touched = self.transport.touch(call).await;
            touched
                .map(|version| (version, sent.elapsed() / round_trips(endpoint)))
                .inspect_err(|error| tracing::debug!("not connected ahead: {error}"))
        };
        let touched = join_all((0..times).map(|_| touch())).await;
        touched.into_iter().flatten().collect()
    }
}

fn about(reference: &Reference) -> Context {
    let host = reference.host().to_owned();
    Context {
        action: "connect to",
        subject: host.clone(),
        host,
    }
}

/// To connect takes one, TLS another, and the answer the last.
fn round_trips(endpoint: &Endpoint) -> u32 {
    if endpoint.is_plain() { 2 } else { 3 }
}
