//! Tokens and redirects: who gets the credentials, and how often they are
//! asked for.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sluice_oci::{Digest, Reference};
use sluice_registry::{BlobSource, ByteRange, Client, Config, Connections, ErrorKind};
use support::fault_server::{FaultServer, Reply, Request};
use tempfile::TempDir;

const PART: ByteRange = ByteRange::From { offset: 5, len: 10 };

fn content() -> Bytes {
    (0..200_u8).collect()
}

fn reference(server: &FaultServer, repository: &str) -> Reference {
    format!("{}/{repository}:v1", server.host).parse().unwrap()
}

/// A client with one entry in its Docker configuration.
fn logged_in(server: &FaultServer, entry: &str) -> (Client, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("config.json");
    let json = format!(r#"{{"auths": {{"{}": {entry}}}}}"#, server.host);
    std::fs::write(&path, json).unwrap();
    let client = Client::new(Config {
        docker_configs: vec![path],
        ..support::config()
    });
    (client.unwrap(), directory)
}

/// me:s3cret
const PASSWORD: &str = r#"{"auth": "bWU6czNjcmV0"}"#;

fn challenge(host: &str, more: &str) -> Reply {
    let value = format!(r#"Bearer realm="http://{host}/token",service="test"{more}"#);
    Reply::new(401, "").with("WWW-Authenticate", value)
}

/// A registry with a token server. Tokens are `t0`, `t1`, …; those below
/// `oldest` have expired.
struct TokenRegistry {
    server: FaultServer,
    oldest: Arc<AtomicU64>,
}

impl TokenRegistry {
    async fn start(expires_in: u64) -> Self {
        let oldest = Arc::new(AtomicU64::new(0));
        let (minimum, issued) = (Arc::clone(&oldest), AtomicU64::new(0));
        let server = FaultServer::start_with_host(|host| {
            move |request: &Request, _| {
                if request.target.starts_with("/token") {
                    let number = issued.fetch_add(1, Ordering::SeqCst);
                    let json = format!(r#"{{"token":"t{number}","expires_in":{expires_in}}}"#);
                    return Reply::new(200, json);
                }
                let token = request
                    .header("authorization")
                    .and_then(|value| value.strip_prefix("Bearer t")?.parse::<u64>().ok());
                if token.is_none_or(|token| token < minimum.load(Ordering::SeqCst)) {
                    return challenge(&host, "");
                }
                match request.method.as_str() {
                    "POST" => Reply::new(202, "").with("Location", "/up"),
                    "PUT" => Reply::new(201, ""),
                    "HEAD" => Reply::new(404, ""),
                    _ => Reply::part(&content(), request),
                }
            }
        })
        .await;
        Self { server, oldest }
    }

    fn tokens(&self) -> Vec<Request> {
        let mut requests = self.server.requests();
        requests.retain(|request| request.target.starts_with("/token"));
        requests
    }
}

async fn read(client: &Client, image: &Reference) -> Result<Bytes, ErrorKind> {
    let blob = client.blob(image, Digest::of(&content()));
    let body = blob.range(PART).await.map_err(|error| error.kind())?;
    body.collect(100).await.map_err(|error| error.kind())
}

#[tokio::test]
async fn one_token_serves_a_repository() {
    let registry = TokenRegistry::start(300).await;
    let (client, _directory) = logged_in(&registry.server, PASSWORD);
    let image = reference(&registry.server, "team/app");
    for _ in 0..3 {
        assert!(read(&client, &image).await.unwrap() == content()[5..15]);
    }
    let tokens = registry.tokens();
    assert_eq!(tokens.len(), 1);
    assert_eq!(
        tokens[0].target,
        "/token?service=test&scope=repository%3Ateam%2Fapp%3Apull&account=me"
    );
    assert_eq!(
        tokens[0].header("authorization"),
        Some("Basic bWU6czNjcmV0")
    );
    // One refusal, one token, three answers.
    assert_eq!(registry.server.count(), 5);

    // Another repository, and another action, cost a token each, and no
    // refusal.
    read(&client, &reference(&registry.server, "other"))
        .await
        .unwrap();
    let source = BlobSource::bytes(Bytes::from_static(b"x"));
    client
        .push_blob(&image, Digest::of(b"x"), 1, source)
        .await
        .unwrap();
    let tokens = registry.tokens();
    assert_eq!(tokens.len(), 3);
    assert!(
        tokens[2]
            .target
            .contains("repository%3Ateam%2Fapp%3Apull%2Cpush")
    );
    assert_eq!(registry.server.count(), 11);
}

#[tokio::test]
async fn a_token_is_there_before_it_is_needed() {
    let registry = TokenRegistry::start(300).await;
    let (client, _directory) = logged_in(&registry.server, PASSWORD);
    let image = reference(&registry.server, "team/app");
    let connections = Connections {
        near: 6,
        far: 6,
        far_from: Duration::ZERO,
    };
    client.connect_ahead(&image, connections).await;
    let tokens = registry.tokens();
    assert_eq!(tokens.len(), 1);
    let scope = "scope=repository%3Ateam%2Fapp%3Apull";
    assert!(tokens[0].target.contains(scope), "{}", tokens[0].target);
    let others = registry.server.log();
    let others = others.iter().filter(|line| !line.contains("/token"));
    for line in others {
        assert_eq!(line, "GET /v2/");
    }
    // Neither a refusal nor another token.
    let before = registry.server.count();
    assert!(read(&client, &image).await.unwrap() == content()[5..15]);
    assert_eq!(registry.server.count(), before + 1);
}

#[tokio::test]
async fn anonymous_access_asks_for_a_token_without_a_password() {
    let registry = TokenRegistry::start(300).await;
    let image = reference(&registry.server, "app");
    read(&support::client(), &image).await.unwrap();
    let tokens = registry.tokens();
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0].header("authorization"), None);
}

#[tokio::test]
async fn many_readers_share_one_token() {
    let registry = TokenRegistry::start(300).await;
    let (client, _directory) = logged_in(&registry.server, PASSWORD);
    let image = reference(&registry.server, "app");
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, image) = (client.clone(), image.clone());
        readers.spawn(async move { read(&client, &image).await.unwrap() });
    }
    assert_eq!(readers.join_all().await.len(), 16);
    assert_eq!(registry.tokens().len(), 1);
}

#[tokio::test]
async fn a_token_that_the_registry_no_longer_takes_is_renewed_once() {
    let registry = TokenRegistry::start(300).await;
    let (client, _directory) = logged_in(&registry.server, PASSWORD);
    let image = reference(&registry.server, "app");
    read(&client, &image).await.unwrap();
    registry.oldest.store(1, Ordering::SeqCst);
    read(&client, &image).await.unwrap();
    // Refused, token, answer: twice.
    assert_eq!((registry.tokens().len(), registry.server.count()), (2, 6));
    // No token is good any more: refused, token, refused.
    registry.oldest.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(
        read(&client, &image).await.unwrap_err(),
        ErrorKind::Unauthorized
    );
    assert_eq!((registry.tokens().len(), registry.server.count()), (3, 9));
}

#[tokio::test]
async fn a_token_expires_in_the_middle_of_a_body() {
    let oldest = Arc::new(AtomicU64::new(0));
    let issued = AtomicU64::new(0);
    let minimum = Arc::clone(&oldest);
    let server = FaultServer::start_with_host(|host| {
        move |request: &Request, _| {
            if request.target.starts_with("/token") {
                let number = issued.fetch_add(1, Ordering::SeqCst);
                return Reply::new(200, format!(r#"{{"access_token":"t{number}"}}"#));
            }
            let minimum_now = minimum.load(Ordering::SeqCst);
            let wanted = format!("Bearer t{minimum_now}");
            if request.header("authorization") != Some(&wanted) {
                return challenge(&host, "");
            }
            let reply = Reply::part(&content(), request);
            if minimum_now == 0 {
                // The connection breaks, and the token with it.
                minimum.store(1, Ordering::SeqCst);
                return reply.cut_to(4);
            }
            reply
        }
    })
    .await;
    let image = reference(&server, "app");
    let bytes = read(&support::client(), &image).await.unwrap();
    assert!(bytes == content()[5..15]);
    // Refused, token, cut, refused, token, rest.
    assert_eq!(server.count(), 6);
    assert_eq!(server.requests()[5].range(), Some((9, 6)));
}

#[tokio::test]
async fn expired_tokens_are_not_tried() {
    let registry = TokenRegistry::start(1).await;
    let image = reference(&registry.server, "app");
    let client = support::client();
    read(&client, &image).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    read(&client, &image).await.unwrap();
    // Refused, token, answer; token, answer.
    assert_eq!((registry.tokens().len(), registry.server.count()), (2, 5));
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let registry = TokenRegistry::start(300).await;
    let (client, _directory) = logged_in(&registry.server, r#"{"identitytoken": "refr&esh"}"#);
    read(&client, &reference(&registry.server, "app"))
        .await
        .unwrap();
    let tokens = registry.tokens();
    assert_eq!((tokens.len(), tokens[0].method.as_str()), (1, "POST"));
    let form = String::from_utf8(tokens[0].body.clone()).unwrap();
    assert!(form.contains("grant_type=refresh_token"), "{form}");
    assert!(form.contains("refresh_token=refr%26esh"), "{form}");
    assert!(form.contains("scope=repository%3Aapp%3Apull"), "{form}");
    assert!(!tokens[0].target.contains("refr"), "not in the URL");
}

#[tokio::test]
async fn refused_credentials_name_the_registry_and_stay_secret() {
    let server = FaultServer::start_with_host(|host| {
        move |request: &Request, _| match request.target.starts_with("/token") {
            true => Reply::new(
                401,
                r#"{"errors":[{"code":"UNAUTHORIZED","message":"bad password"}]}"#,
            ),
            false => challenge(&host, ""),
        }
    })
    .await;
    let (client, _directory) = logged_in(&server, PASSWORD);
    let error = client
        .manifest(&reference(&server, "app"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    let text = format!("{error} {error:?}");
    for part in ["bad password", "docker login", &server.host] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("s3cret") && !text.contains("bWU6czNjcmV0"));
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn token_servers_that_misbehave() {
    for (answer, expected) in [
        (Reply::new(200, "not json"), ErrorKind::Protocol),
        (Reply::new(200, "{}"), ErrorKind::Protocol),
        (
            Reply::new(200, r#"{"token":"a\nb"}"#),
            ErrorKind::Credentials,
        ),
        (
            Reply::new(200, format!(r#"{{"token":"{}"}}"#, "x".repeat(70_000))),
            ErrorKind::TooLarge,
        ),
        (Reply::new(200, vec![b' '; 300 << 10]), ErrorKind::TooLarge),
        (
            Reply::new(307, "").with("Location", "http://127.0.0.1:1/"),
            ErrorKind::Protocol,
        ),
    ] {
        let server = FaultServer::start_with_host(|host| {
            move |request: &Request, _| match request.target.starts_with("/token") {
                true => answer.clone(),
                false => challenge(&host, ""),
            }
        })
        .await;
        let error = read(&support::client(), &reference(&server, "app")).await;
        assert_eq!(error.unwrap_err(), expected);
        assert_eq!(server.count(), 2);
    }
}

#[tokio::test]
async fn a_token_server_that_recovers() {
    let failures = AtomicUsize::new(0);
    let server = FaultServer::start_with_host(|host| {
        move |request: &Request, _| {
            if !request.target.starts_with("/token") {
                return match request.header("authorization") {
                    Some(_) => Reply::part(&content(), request),
                    None => challenge(&host, ""),
                };
            }
            match failures.fetch_add(1, Ordering::SeqCst) {
                0 => Reply::new(503, ""),
                _ => Reply::new(200, r#"{"token":"t"}"#),
            }
        }
    })
    .await;
    read(&support::client(), &reference(&server, "app"))
        .await
        .unwrap();
    // Refused, 503; token straight away, answer.
    assert_eq!(server.count(), 4);
}

/// A registry that redirects blobs to another host, which refuses requests
/// that carry an Authorization, as signed URLs do.
async fn redirecting(good: &'static str) -> (FaultServer, FaultServer) {
    let store = FaultServer::start(move |request, _| {
        match (request.target.as_str(), request.header("authorization")) {
            (_, Some(_)) => Reply::new(400, "both"),
            (target, None) if target == good => Reply::part(&content(), request),
            _ => Reply::new(403, "expired"),
        }
    })
    .await;
    let to = store.host.clone();
    let redirects = AtomicUsize::new(0);
    let registry = FaultServer::start_with_host(|host| {
        move |request: &Request, _| {
            if request.target.starts_with("/token") {
                return Reply::new(200, r#"{"token":"t"}"#);
            }
            if request.header("authorization").is_none() {
                return challenge(&host, "");
            }
            let number = redirects.fetch_add(1, Ordering::SeqCst);
            let url = format!("http://{to}/signed?n={number}");
            Reply::new(307, "moved").with("Location", url)
        }
    })
    .await;
    (registry, store)
}

#[tokio::test]
async fn redirects_are_remembered_and_get_no_credentials() {
    let (registry, store) = redirecting("/signed?n=0").await;
    let (client, _directory) = logged_in(&registry, PASSWORD);
    let image = reference(&registry, "app");
    for _ in 0..3 {
        assert!(read(&client, &image).await.unwrap() == content()[5..15]);
    }
    assert_eq!(store.log(), ["GET /signed?n=0"; 3]);
    // Refused, token, redirect; then nothing more.
    assert_eq!(registry.count(), 3);
    for request in store.requests() {
        assert_eq!(request.header("authorization"), None);
        assert_eq!(request.header("referer"), None);
    }
}

#[tokio::test]
async fn an_expired_redirect_is_asked_for_again() {
    for refusal in [400, 401, 403, 404, 410] {
        let store = FaultServer::start(move |request, _| match request.target.as_str() {
            "/signed?n=0" => match request.range() {
                Some((5, _)) => Reply::part(&content(), request),
                _ => Reply::new(refusal, "expired"),
            },
            _ => Reply::part(&content(), request),
        })
        .await;
        let to = store.host.clone();
        let registry = FaultServer::start(move |_, before| {
            Reply::new(307, "").with("Location", format!("http://{to}/signed?n={before}"))
        })
        .await;
        let blob = support::client().blob(&reference(&registry, "app"), Digest::of(b""));
        let get = async |offset| {
            let range = ByteRange::From { offset, len: 10 };
            blob.range(range).await.unwrap().collect(10).await.unwrap()
        };
        assert!(get(5).await == content()[5..15]);
        assert!(get(20).await == content()[20..30]);
        assert!(get(30).await == content()[30..40]);
        assert_eq!(registry.count(), 2, "{refusal}");
        assert_eq!(
            store.log(),
            [
                "GET /signed?n=0",
                "GET /signed?n=0",
                "GET /signed?n=1",
                "GET /signed?n=1"
            ]
        );
    }
}

#[tokio::test]
async fn a_redirect_is_forgotten_after_its_time() {
    let (registry, store) = redirecting("/signed?n=0").await;
    let client = Client::new(Config {
        redirect_ttl: Duration::ZERO,
        ..support::config()
    })
    .unwrap();
    let image = reference(&registry, "app");
    read(&client, &image).await.unwrap();
    // The store takes only the first URL.
    assert_eq!(
        read(&client, &image).await.unwrap_err(),
        ErrorKind::Forbidden
    );
    assert_eq!(store.log(), ["GET /signed?n=0", "GET /signed?n=1"]);
}

#[tokio::test]
async fn a_redirect_target_that_dies_sends_us_back_to_the_registry() {
    let store = FaultServer::start(|request, _| Reply::part(&content(), request)).await;
    let second = FaultServer::start(|request, _| Reply::part(&content(), request)).await;
    let (first_host, second_host) = (store.host.clone(), second.host.clone());
    let registry = FaultServer::start(move |_, before| {
        let host = if before == 0 {
            &first_host
        } else {
            &second_host
        };
        Reply::new(302, "").with("Location", format!("http://{host}/x"))
    })
    .await;
    let client = support::client();
    let image = reference(&registry, "app");
    read(&client, &image).await.unwrap();
    drop(store);
    tokio::task::yield_now().await;
    read(&client, &image).await.unwrap();
    assert_eq!((registry.count(), second.count()), (2, 1));
}

#[tokio::test]
async fn signatures_of_redirects_are_not_shown() {
    let store = FaultServer::start(|_, _| Reply::new(403, "no")).await;
    let to = store.host.clone();
    let registry = FaultServer::start(move |_, _| {
        Reply::new(307, "").with("Location", format!("http://{to}/x?Signature=hunter2"))
    })
    .await;
    let blob = support::client().blob(&reference(&registry, "app"), Digest::of(b""));
    let error = blob.whole().await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Forbidden);
    assert!(!format!("{error} {error:?}").contains("hunter2"));
}

#[tokio::test]
async fn redirects_end() {
    let registry =
        FaultServer::start(|_, _| Reply::new(307, "").with("Location", "/v2/again")).await;
    let error = read(&support::client(), &reference(&registry, "app")).await;
    assert_eq!(error.unwrap_err(), ErrorKind::Protocol);
    assert_eq!(registry.count(), 8);
    for bad in ["", "file:///etc/passwd", "http://", "ftp://127.0.0.1/x"] {
        let registry =
            FaultServer::start(move |_, _| Reply::new(307, "").with("Location", bad)).await;
        let error = read(&support::client(), &reference(&registry, "app")).await;
        assert_eq!(error.unwrap_err(), ErrorKind::Protocol, "{bad}");
    }
}
