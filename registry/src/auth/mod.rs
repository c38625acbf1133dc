//! Authentication: which `Authorization` a request to a registry carries.
//!
//! Nothing is sent until a registry asks for it by 401. From then on its
//! challenge is remembered, so that a new scope costs one request for a token
//! and no refusal.

mod challenge;
mod config;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod token;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use http::HeaderValue;
use tokio::time::Instant;

pub(crate) use self::challenge::Challenge;
use self::config::Credentials;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, ErrorKind};
use crate::http_client::HttpClient;

/// Tokens of more scopes than this are forgotten.
const CAPACITY: usize = 4096;

/// What a request needs to be allowed to do, in the words of the token
/// specification; several are separated by spaces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scope(String);

impl Scope {
    pub(crate) fn pull(repository: &str) -> Self {
        Self(format!("repository:{repository}:pull"))
    }

    pub(crate) fn push(repository: &str) -> Self {
        Self(format!("repository:{repository}:pull,push"))
    }

    pub(crate) fn mount(to: &str, from: &str) -> Self {
        Self(format!("repository:{to}:pull,push repository:{from}:pull"))
    }
}

/// An `Authorization` header's value, marked as a secret.
#[derive(Clone)]
struct Grant {
    header: HeaderValue,
    expires: Option<Instant>,
}

impl Grant {
    fn is_fresh(&self) -> bool {
        self.expires.is_none_or(|expires| Instant::now() < expires)
    }
}

/// One at a time fetches a token for a scope; the others wait for it.
type Slot = Arc<tokio::sync::Mutex<Option<Grant>>>;

pub(crate) struct Auth {
    docker_configs: Vec<PathBuf>,
    token_timeout: Duration,
    challenges: Mutex<HashMap<String, Challenge>>,
    slots: Mutex<HashMap<(String, Scope), Slot>>,
}

impl Auth {
    pub(crate) fn new(docker_configs: Vec<PathBuf>, token_timeout: Duration) -> Self {
        Self {
            docker_configs,
            token_timeout,
            challenges: Mutex::default(),
            slots: Mutex::default(),
        }
    }

    /// What to send with a first try: nothing unless the registry is known to
    /// ask for something.
    pub(crate) async fn current(
        &self,
        http: &HttpClient,
        endpoint: &Endpoint,
        scope: &Scope,
        context: &Context,
    ) -> Result<Option<HeaderValue>, Error> {
        let challenge = {
            let challenges = self
                .challenges
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            challenges.get(endpoint.origin()).cloned()
        };
        let Some(challenge) = challenge else {
            return Ok(None);
        };
        let slot = self.slot(endpoint, scope);
        let mut grant = slot.lock().await;
        if let Some(grant) = grant.as_ref().filter(|grant| grant.is_fresh()) {
            return Ok(Some(grant.header.clone()));
        }
        let fresh = self
            .obtain(http, endpoint, scope, &challenge, context)
            .await?;
        Ok(Some(grant.insert(fresh).header.clone()))
    }

    /// What to send after a refusal by 401 of a request that carried
    /// `refused`.
    pub(crate) async fn renew(
        &self,
        http: &HttpClient,
        endpoint: &Endpoint,
        scope: &Scope,
        challenge: Challenge,
        refused: Option<&HeaderValue>,
        context: &Context,
    ) -> Result<HeaderValue, Error> {
        {
            let mut challenges = self
                .challenges
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            challenges.insert(endpoint.origin().to_owned(), challenge.clone());
        }
        let slot = self.slot(endpoint, scope);
        let mut grant = slot.lock().await;
        if let Some(grant) = grant.as_ref().filter(|grant| grant.is_fresh())
            && Some(&grant.header) != refused
        {
            // Another request renewed it while this one was under way.
            return Ok(grant.header.clone());
        }
        *grant = None;
        let fresh = self
            .obtain(http, endpoint, scope, &challenge, context)
            .await?;
        Ok(grant.insert(fresh).header.clone())
    }

    fn slot(&self, endpoint: &Endpoint, scope: &Scope) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= CAPACITY {
            // Those in use stay alive through their own handles.
            slots.clear();
        }
        let key = (endpoint.origin().to_owned(), scope.clone());
        slots.entry(key).or_default().clone()
    }

    async fn obtain(
        &self,
        http: &HttpClient,
        endpoint: &Endpoint,
        scope: &Scope,
        challenge: &Challenge,
        context: &Context,
    ) -> Result<Grant, Error> {
        let credentials = config::find(&self.docker_configs, endpoint.name(), &endpoint.repository)
            .await
            .map_err(|why| {
                context.error(
                    ErrorKind::Credentials,
                    format!("no credentials for {} ({why})", endpoint.name()),
                )
            })?;
        match (challenge, credentials) {
            (_, Some(Credentials::Registry(token))) => Ok(Grant {
                header: secret(format!("Bearer {token}"), context)?,
                expires: None,
            }),
            (Challenge::Basic, Some(Credentials::Password { user, password })) => Ok(Grant {
                header: basic(&user, &password, context)?,
                expires: None,
            }),
            (Challenge::Basic, _) => Err(context
                .error(
                    ErrorKind::Unauthorized,
                    format!("{} asks for a user and a password", endpoint.name()),
                )
                .with_status(http::StatusCode::UNAUTHORIZED)
                .with_remedy(log_in(endpoint.name()))),
            (Challenge::Bearer(bearer), credentials) => {
                let request = token::TokenRequest {
                    endpoint,
                    bearer,
                    scope,
                    credentials: credentials.as_ref(),
                    timeout: self.token_timeout,
                    context,
                };
                let token = tokio::time::timeout(self.token_timeout, request.send(http))
                    .await
                    .map_err(|_| {
                        context.error(ErrorKind::Stalled, "the token server gives no answer")
                    })??;
                Ok(Grant {
                    header: secret(format!("Bearer {}", token.value), context)?,
                    expires: Some(token.expires),
                })
            }
        }
    }
}

/// The remedy for refused or missing credentials.
pub(crate) fn log_in(host: &str) -> String {
    format!("log in with 'docker login {host}', or check the credentials that are configured")
}

fn basic(user: &str, password: &str, context: &Context) -> Result<HeaderValue, Error> {
    let pair = format!("{user}:{password}");
    let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
    secret(format!("Basic {encoded}"), context)
}

fn secret(text: String, context: &Context) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::try_from(text).map_err(|_| {
        context.error(
            ErrorKind::Credentials,
            "the token holds characters that no header can carry",
        )
    })?;
    value.set_sensitive(true);
    Ok(value)
}
