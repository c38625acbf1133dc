//! Registries behind TLS, with an authority of their own.

#![allow(clippy::unwrap_used)]

mod support;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sluice_oci::{Digest, Reference};
use sluice_registry::{Client, Config, ErrorKind};
use support::fault_server::{FaultServer, Reply};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;

/// Linux connects to this machine by the unspecified address, which no rule
/// for loopback hosts covers.
fn not_loopback(host: &str) -> String {
    host.replace("127.0.0.1", "0.0.0.0")
}

struct TlsServer {
    host: String,
    authority: PathBuf,
    versions: Arc<Mutex<Vec<Version>>>,
    _directory: TempDir,
}

/// Blobs are elsewhere, without TLS.
fn answer(path: &str) -> Response<Full<Bytes>> {
    let response = Response::builder();
    let response = match path.contains("/blobs/") {
        true => response
            .status(307)
            .header("Location", "http://cdn.example/x"),
        false => response,
    };
    response.body(Full::from(MANIFEST)).unwrap()
}

impl TlsServer {
    async fn start(protocols: &[&[u8]]) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["0.0.0.0".to_owned()])
            .unwrap()
            .signed_by(&key, &authority)
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        std::fs::write(&file, authority.pem()).unwrap();

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        tls.alpn_protocols = protocols.iter().map(|&name| name.to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let versions = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&versions);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
                        seen.lock().unwrap().push(request.version());
                        std::future::ready(Ok::<_, Infallible>(answer(request.uri().path())))
                    });
                    let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        Self {
            host: not_loopback(&host),
            authority: file,
            versions,
            _directory: directory,
        }
    }

    fn image(&self) -> Reference {
        format!("{}/app:v1", self.host).parse().unwrap()
    }

    fn client(&self) -> Client {
        Client::new(Config {
            ca_certificates: vec![self.authority.clone()],
            ..support::config()
        })
        .unwrap()
    }
}

#[tokio::test]
async fn http_2_is_used_where_it_is_offered() {
    for (protocols, version) in [
        (&[&b"h2"[..], b"http/1.1"][..], Version::HTTP_2),
        (&[b"http/1.1"], Version::HTTP_11),
        (&[], Version::HTTP_11),
    ] {
        let server = TlsServer::start(protocols).await;
        let document = server.client().manifest(&server.image()).await.unwrap();
        assert_eq!(document.digest, Digest::of(MANIFEST.as_bytes()));
        assert_eq!(*server.versions.lock().unwrap(), [version]);
    }
}

#[tokio::test]
async fn an_unknown_authority_is_refused_with_the_remedy() {
    let server = TlsServer::start(&[]).await;
    let error = support::client()
        .manifest(&server.image())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Tls, "{error}");
    assert!(
        error.to_string().contains("system's certificates"),
        "{error}"
    );
    assert!(server.versions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn plain_http_behind_a_name_that_wants_tls() {
    let server = FaultServer::start(|_, _| Reply::new(200, MANIFEST)).await;
    let host = not_loopback(&server.host);
    let image: Reference = format!("{host}/app:v1").parse().unwrap();
    let error = support::client().manifest(&image).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Tls, "{error}");
    assert!(error.to_string().contains("--plain-http"), "{error}");

    let client = Client::new(Config {
        plain_http: vec![host],
        ..support::config()
    })
    .unwrap();
    client.manifest(&image).await.unwrap();
}

#[tokio::test]
async fn a_redirect_from_tls_to_plain_http_is_refused() {
    let server = TlsServer::start(&[]).await;
    let blob = server.client().blob(&server.image(), Digest::of(b""));
    let error = blob.whole().await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(
        error.to_string().contains("http://cdn.example/x"),
        "{error}"
    );
}

#[test]
fn authorities_that_are_none_are_named() {
    for content in ["", "no certificate"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        std::fs::write(&path, content).unwrap();
        let made = Client::new(Config {
            ca_certificates: vec![path],
            ..support::config()
        });
        let error = made.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("ca.pem"), "{error}");
    }
}
