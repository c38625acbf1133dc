//! Registries behind TLS, with an authority of their own.

#![allow(clippy::unwrap_used)]

mod support;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use sluice_oci::{Digest, Reference};
use sluice_registry::{Client, Config, Connections, ErrorKind};
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

/// Who signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
struct Identity {
    certificate: String,
    key: String,
    der: CertificateDer<'static>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn sign(&self, name: &str) -> Identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().clone(),
        }
    }
}

struct TlsServer {
    host: String,
    authority: PathBuf,
    versions: Arc<Mutex<Vec<Version>>>,
    /// The certificates that clients showed, one for each request.
    clients: Arc<Mutex<Vec<CertificateDer<'static>>>>,
    _directory: TempDir,
}

/// The digest of a blob of 5 MiB, as far as anybody knows.
fn large() -> Digest {
    Digest::of(b"large")
}

/// All blobs but the large one are elsewhere, without TLS.
fn answer(path: &str) -> Response<Full<Bytes>> {
    let response = Response::builder();
    if path.ends_with(&large().to_string()) {
        return response.body(Full::from(vec![0; 5 << 20])).unwrap();
    }
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
        Self::start_for(protocols, None).await
    }

    /// One that answers only to whom `clients` has signed.
    async fn start_for(protocols: &[&[u8]], clients: Option<&Authority>) -> Self {
        let Authority(authority) = Authority::new("servers");
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["0.0.0.0".to_owned()])
            .unwrap()
            .signed_by(&key, &authority)
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        std::fs::write(&file, authority.pem()).unwrap();

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = match clients {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(Authority(clients)) => {
                let mut roots = RootCertStore::empty();
                roots.add(clients.der().clone()).unwrap();
                let provider = Arc::clone(&provider);
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                    .build()
                    .unwrap()
            }
        };
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
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
        let clients = Arc::new(Mutex::new(Vec::new()));
        let shown = Arc::clone(&clients);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
                let shown = Arc::clone(&shown);
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let client = stream.get_ref().1.peer_certificates();
                    let client = client.map(|chain| chain[0].clone().into_owned());
                    let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
                        seen.lock().unwrap().push(request.version());
                        shown.lock().unwrap().extend(client.clone());
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
            clients,
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
async fn as_many_connections_are_made_ahead_as_the_first_one_calls_for() {
    let connections = |far_from| Connections {
        near: 4,
        far: 6,
        far_from,
    };
    let (near, far) = (Duration::from_secs(60), Duration::ZERO);
    for (protocols, far_from, expected) in [
        (&[&b"h2"[..], b"http/1.1"][..], near, vec![Version::HTTP_2]),
        (&[b"h2", b"http/1.1"], far, vec![Version::HTTP_2]),
        (&[b"http/1.1"], near, vec![Version::HTTP_11; 4]),
        (&[b"http/1.1"], far, vec![Version::HTTP_11; 6]),
    ] {
        let server = TlsServer::start(protocols).await;
        let (client, connections) = (server.client(), connections(far_from));
        let round_trip = client.connect_ahead(&server.image(), connections).await;
        assert!(round_trip.is_some());
        assert_eq!(*server.versions.lock().unwrap(), expected);
    }
    // Who is not trusted is not asked again.
    let server = TlsServer::start(&[]).await;
    let client = support::client();
    let refused = client
        .connect_ahead(&server.image(), connections(far))
        .await;
    assert_eq!(refused, None);
    assert!(server.versions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn regression_answers_that_nobody_reads_hold_up_no_other() {
    let server = TlsServer::start(&[b"h2"]).await;
    let client = server.client();
    let blob = client.blob(&server.image(), large());
    // With the one below, as many as the daemon has requests under way.
    let unread = join_all((0..31).map(|_| blob.whole())).await;
    assert!(unread.iter().all(Result::is_ok));
    // By then as much has come as may.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let image = server.image();
    let other = tokio::time::timeout(Duration::from_secs(5), client.manifest(&image));
    other.await.expect("it does not come").unwrap();
    assert!(
        server
            .versions
            .lock()
            .unwrap()
            .iter()
            .all(|&v| v == Version::HTTP_2)
    );
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

/// A client that finds what it knows of the registry in a directory.
struct Configured {
    client: Client,
    directory: TempDir,
}

impl Configured {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let client = Client::new(Config {
            hosts_dirs: vec![directory.path().to_owned()],
            ..support::config()
        });
        Self {
            client: client.unwrap(),
            directory,
        }
    }

    /// Files of the registry `server`, beside those that are there.
    fn write(&self, server: &TlsServer, files: &[(&str, &str)]) {
        let directory = self.directory.path().join(&server.host);
        std::fs::create_dir_all(&directory).unwrap();
        for (name, content) in files {
            // As programs that rotate certificates do it.
            let draft = directory.join("draft");
            std::fs::write(&draft, content).unwrap();
            std::fs::rename(&draft, directory.join(name)).unwrap();
        }
    }

    async fn ask(&self, server: &TlsServer) -> Result<(), ErrorKind> {
        let found = self.client.manifest(&server.image()).await;
        let digest = Digest::of(MANIFEST.as_bytes());
        found
            .map(|document| assert_eq!(document.digest, digest))
            .map_err(|error| error.kind())
    }
}

#[tokio::test]
async fn hosts_files_say_whom_to_trust() {
    let server = TlsServer::start(&[]).await;
    let right = std::fs::read_to_string(&server.authority).unwrap();
    let wrong = Authority::new("others").0.pem();
    for (files, expected) in [
        (vec![("hosts.toml", "ca = \"a.pem\"")], Ok(())),
        (vec![("hosts.toml", "ca = [\"b.pem\", \"a.pem\"]")], Ok(())),
        (vec![("hosts.toml", "ca = \"b.pem\"")], Err(ErrorKind::Tls)),
        (vec![("hosts.toml", "skip_verify = true")], Ok(())),
        (
            vec![("hosts.toml", "skip_verify = false")],
            Err(ErrorKind::Tls),
        ),
        // What is said of one host does not hold for another; the first one's
        // error is told.
        (
            vec![(
                "hosts.toml",
                "[host.\"https://mirror.invalid\"]\nskip_verify = true\nca = \"a.pem\"",
            )],
            Err(ErrorKind::Connect),
        ),
        (vec![("own.crt", &right)], Ok(())),
        (vec![("own.crt", &wrong)], Err(ErrorKind::Tls)),
    ] {
        let configured = Configured::new();
        configured.write(&server, &[("a.pem", &right), ("b.pem", &wrong)]);
        configured.write(&server, &files);
        assert_eq!(configured.ask(&server).await, expected, "{files:?}");
    }
    assert!(server.clients.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_registry_is_shown_the_certificate_that_it_asks_for() {
    let clients = Authority::new("clients");
    let server = TlsServer::start_for(&[b"h2"], Some(&clients)).await;
    let authority = std::fs::read_to_string(&server.authority).unwrap();
    let (right, wrong) = (clients.sign("me"), Authority::new("others").sign("me"));
    let both = format!("{}{}", right.certificate, right.key);
    for (client, accepted) in [
        ("", false),
        ("client = \"both.pem\"", true),
        ("client = [[\"a.cert\", \"a.key\"]]", true),
        ("client = [[\"b.cert\", \"b.key\"]]", false),
        // The one whose authority the server names, wherever it stands.
        (
            "client = [[\"b.cert\", \"b.key\"], [\"a.cert\", \"a.key\"]]",
            true,
        ),
        ("client = [[\"b.cert\", \"b.key\"], \"both.pem\"]", true),
    ] {
        let configured = Configured::new();
        let hosts = format!("ca = \"ca.pem\"\n{client}");
        configured.write(
            &server,
            &[
                ("ca.pem", &authority),
                ("both.pem", &both),
                ("a.cert", &right.certificate),
                ("a.key", &right.key),
                ("b.cert", &wrong.certificate),
                ("b.key", &wrong.key),
                ("hosts.toml", &hosts),
            ],
        );
        assert_eq!(configured.ask(&server).await.is_ok(), accepted, "{client}");
        let shown = std::mem::take(&mut *server.clients.lock().unwrap());
        let expected = accepted.then(|| right.der.clone());
        assert_eq!(shown, Vec::from_iter(expected), "{client}");
    }
}

#[tokio::test]
async fn a_rotated_certificate_is_shown_without_a_restart() {
    let clients = Authority::new("clients");
    let server = TlsServer::start_for(&[], Some(&clients)).await;
    let authority = std::fs::read_to_string(&server.authority).unwrap();
    let configured = Configured::new();
    // In the manner of Docker.
    configured.write(&server, &[("ca.crt", &authority)]);
    let mut wanted = Vec::new();
    for issuer in [&Authority::new("others"), &clients, &clients] {
        let identity = issuer.sign("me");
        let (certificate, key) = (&identity.certificate, &identity.key);
        configured.write(&server, &[("me.key", key), ("me.cert", certificate)]);
        let accepted = std::ptr::eq(issuer, &clients);
        assert_eq!(configured.ask(&server).await.is_ok(), accepted);
        wanted.extend(accepted.then_some(identity.der));
        assert_eq!(*server.clients.lock().unwrap(), wanted);
    }
}
