//! Fetching a Bearer token (the distribution project's token specification,
//! and its OAuth2 variant for identity tokens).

use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use reqwest::Url;
use serde::Deserialize;
use tokio::time::Instant;

use super::challenge::Bearer;
use super::config::Credentials;
use super::{Scope, basic, log_in};
use crate::endpoint::{Endpoint, shown};
use crate::error::{Context, Error, ErrorKind};
use crate::http_client::{HttpClient, no_answer};
use crate::transport::{body_up_to, refusal};

const MAX_ANSWER: usize = 256 << 10;
/// Larger tokens would not pass as a header anyway.
const MAX_TOKEN: usize = 64 << 10;
/// The specification's lifetime for tokens that do not tell theirs.
const DEFAULT_LIFETIME: u64 = 60;
const CLIENT_ID: &str = "sluice";

pub(super) struct Token {
    pub(super) value: String,
    pub(super) expires: Instant,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

pub(super) struct TokenRequest<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) bearer: &'a Bearer,
    pub(super) scope: &'a Scope,
    pub(super) credentials: Option<&'a Credentials>,
    pub(super) timeout: Duration,
    pub(super) context: &'a Context,
}

impl TokenRequest<'_> {
    pub(super) async fn send(&self, http: &HttpClient) -> Result<Token, Error> {
        let context = self.context;
        let realm = self.realm()?;
        let started = Instant::now();
        let request = match self.credentials {
            Some(Credentials::Identity(token)) => {
                let mut form = self.parameters(&realm);
                form.query_pairs_mut()
                    .clear()
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", CLIENT_ID)
                    .append_pair("refresh_token", token)
                    .append_pair(
                        "service",
                        self.bearer.service.as_deref().unwrap_or_default(),
                    )
                    .append_pair("scope", &self.scopes().join(" "));
                let headers = HeaderMap::from_iter([(
                    CONTENT_TYPE,
                    HeaderValue::from_static("application/x-www-form-urlencoded"),
                )]);
                http.request(Method::POST, realm.clone(), headers)
                    .body(form.query().unwrap_or_default().to_owned())
            }
            Some(Credentials::Password { user, password }) => {
                let headers =
                    HeaderMap::from_iter([(AUTHORIZATION, basic(user, password, context)?)]);
                http.request(Method::GET, self.parameters(&realm), headers)
            }
            Some(Credentials::Registry(_)) | None => {
                http.request(Method::GET, self.parameters(&realm), HeaderMap::new())
            }
        };
        let mut response = request
            .send()
            .await
            .map_err(|error| no_answer(context, &realm, error))?;
        let status = response.status();
        if !status.is_success() {
            let error = refusal(context, &mut response, self.timeout).await;
            let error = error.with_note(&format!(" (from the token server {})", shown(&realm)));
            return Err(if self.credentials.is_some() {
                error.with_remedy(log_in(self.endpoint.name()))
            } else {
                error
            });
        }
        let bytes = body_up_to(&mut response, MAX_ANSWER, self.timeout, context).await?;
        self.parse(&bytes, started)
    }

    /// The token server's address, unless going there would send a secret in
    /// the clear although the registry itself is behind TLS.
    fn realm(&self) -> Result<Url, Error> {
        let context = self.context;
        let realm = Url::parse(&self.bearer.realm)
            .map_err(|_| context.protocol("the registry names a token server that is no URL"))?;
        match realm.scheme() {
            "https" => Ok(realm),
            "http" if self.endpoint.is_plain() => Ok(realm),
            _ => Err(context.error(
                ErrorKind::Protocol,
                format!(
                    "the registry names the token server {}, which is not behind TLS",
                    shown(&realm)
                ),
            )),
        }
    }

    fn parameters(&self, realm: &Url) -> Url {
        let mut url = realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.bearer.service {
                query.append_pair("service", service);
            }
            for scope in self.scopes() {
                query.append_pair("scope", scope);
            }
            if let Some(Credentials::Password { user, .. }) = self.credentials {
                query.append_pair("account", user);
            }
        }
        url
    }

    /// What is needed, and what the registry says is needed.
    fn scopes(&self) -> Vec<&str> {
        let mut scopes: Vec<&str> = self.scope.0.split(' ').collect();
        let asked = self.bearer.scope.as_deref().unwrap_or_default();
        for scope in asked.split(' ').filter(|scope| !scope.is_empty()) {
            // A remembered challenge may be about another repository.
            let ours = format!("repository:{}:", self.endpoint.repository);
            let foreign = scope.starts_with("repository:") && !scope.starts_with(&ours);
            let covered = scopes.iter().any(|have| covers(have, scope));
            if !foreign && !covered {
                scopes.push(scope);
            }
        }
        scopes
    }

    fn parse(&self, bytes: &[u8], started: Instant) -> Result<Token, Error> {
        let context = self.context;
        // Without the parser's message: it could quote the token.
        let answer: Answer = serde_json::from_slice(bytes)
            .map_err(|_| context.protocol("the token server's answer is not JSON"))?;
        let value = answer
            .token
            .or(answer.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| context.protocol("the token server's answer holds no token"))?;
        if value.len() > MAX_TOKEN {
            return Err(context.error(
                ErrorKind::TooLarge,
                format!("the token is longer than {MAX_TOKEN} bytes"),
            ));
        }
        // Some servers say 0 for "short"; the specification's least is 60 s.
        let lifetime = match answer.expires_in {
            None | Some(0) => DEFAULT_LIFETIME,
            Some(seconds) => seconds.min(24 * 3600),
        };
        // Used up a little early, for the time a request is under way.
        let margin = (lifetime / 10).min(10);
        Ok(Token {
            value,
            expires: started + Duration::from_secs(lifetime - margin),
        })
    }
}

/// Whether `have` allows at least what `wanted` does.
fn covers(have: &str, wanted: &str) -> bool {
    if have == wanted {
        return true;
    }
    let (Some((have_name, have_actions)), Some((name, actions))) =
        (have.rsplit_once(':'), wanted.rsplit_once(':'))
    else {
        return false;
    };
    have_name == name
        && actions
            .split(',')
            .all(|action| have_actions.split(',').any(|one| one == action))
}
