//! Asking one host after the other.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use sluice_oci::Digest;

use super::health::{Health, Readiness};
use crate::blob::Blob;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, ErrorKind};
use crate::redirect::Key;

/// One try of an operation, at every host that may succeed.
pub(crate) struct Round<'a> {
    health: &'a Health,
    /// The blob that it is about, if it is about one.
    blob: Option<Digest>,
    several: bool,
    waiting: VecDeque<Endpoint>,
    resting: Vec<Rester>,
    /// Of this round, and why the others rest.
    errors: Vec<Error>,
    asked: bool,
}

struct Rester {
    endpoint: Endpoint,
    until: Instant,
    down: bool,
}

impl<'a> Round<'a> {
    pub(crate) fn new(health: &'a Health, endpoints: Vec<Endpoint>, blob: Option<Digest>) -> Self {
        Self {
            several: endpoints.len() > 1,
            health,
            blob,
            waiting: endpoints.into(),
            resting: Vec::new(),
            errors: Vec::new(),
            asked: false,
        }
    }

    /// The next host to ask.
    pub(crate) fn next(&mut self) -> Option<Endpoint> {
        while let Some(endpoint) = self.waiting.pop_front() {
            if !self.several {
                return Some(endpoint);
            }
            let key = self.key(&endpoint);
            match self.health.ask(&endpoint, key.as_ref(), Instant::now()) {
                Readiness::Ready => {
                    self.asked = true;
                    return Some(endpoint);
                }
                Readiness::Resting { until, error, down } => {
                    self.errors.push(error);
                    self.resting.push(Rester {
                        endpoint,
                        until,
                        down,
                    });
                }
            }
        }
        self.next_resting()
    }

    /// Nobody who was ready has delivered. Where that will not change by
    /// waiting, those that lacked the blob may have it by now. Otherwise only
    /// the host that will be ready first is tried, and only if nobody else
    /// was: a dead one may cost half a minute.
    fn next_resting(&mut self) -> Option<Endpoint> {
        let hope = self.errors.iter().any(|error| error.kind().is_transient());
        self.resting.retain(|rester| rester.down == hope);
        if hope && std::mem::replace(&mut self.asked, true) {
            return None;
        }
        let soonest = (0..self.resting.len()).min_by_key(|&at| self.resting[at].until)?;
        let Rester { endpoint, .. } = self.resting.swap_remove(soonest);
        self.health.tries(&endpoint, Instant::now());
        Some(endpoint)
    }

    /// Whether a host is there to be asked that has not failed of late.
    pub(crate) fn is_ready(&self) -> bool {
        self.several
            && self.waiting.iter().any(|endpoint| {
                let key = self.key(endpoint);
                let readiness = (self.health).readiness(endpoint, key.as_ref(), Instant::now());
                matches!(readiness, Readiness::Ready)
            })
    }

    pub(crate) fn failed(&mut self, endpoint: &Endpoint, error: Error) {
        if self.several {
            let key = self.key(endpoint);
            (self.health).failed(endpoint, key.as_ref(), &error, Instant::now());
        }
        self.errors.push(error);
    }

    pub(crate) fn delivered(&self, endpoint: &Endpoint) {
        if self.several {
            self.health.delivered(endpoint, self.key(endpoint).as_ref());
        }
    }

    /// Why nobody delivered: the failure that may pass, if there is one, for
    /// then it is worth to try again; of the others the last, which is the
    /// registry's own.
    pub(crate) fn error(self, context: &Context) -> Error {
        let worth = |error: &Error| match error.kind() {
            kind if kind.is_transient() => 2,
            ErrorKind::Unauthorized
            | ErrorKind::Forbidden
            | ErrorKind::Credentials
            | ErrorKind::Tls => 1,
            _ => 0,
        };
        let told = self.errors.into_iter().max_by_key(worth);
        told.unwrap_or_else(|| context.error(ErrorKind::Config, "there is no host to ask"))
    }

    fn key(&self, endpoint: &Endpoint) -> Option<Key> {
        self.blob.map(|digest| endpoint.key(digest))
    }
}

/// The hosts that sent what a body held.
#[derive(Clone)]
pub struct Senders {
    blob: Blob,
    hosts: Arc<Mutex<Vec<Endpoint>>>,
}

impl Senders {
    pub(crate) fn new(blob: Blob) -> Self {
        Self {
            blob,
            hosts: Arc::default(),
        }
    }

    pub(crate) fn add(&self, endpoint: &Endpoint) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if !hosts
            .iter()
            .any(|known| known.origin() == endpoint.origin())
        {
            hosts.push(endpoint.clone());
        }
    }

    /// Tells that what they sent is not the blob: they are not asked for it
    /// for a while. Whether there is another host to ask.
    pub fn distrust(&self) -> bool {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        self.blob.distrust(&hosts)
    }
}

impl fmt::Debug for Senders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let names = hosts.iter().map(Endpoint::name);
        f.debug_list().entries(names).finish()
    }
}
