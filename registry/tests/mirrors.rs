//! Several hosts for one registry, as `hosts.toml` names them.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sluice_oci::{Digest, Reference};
use sluice_registry::{Blob, ByteRange, Client, Config, Error, ErrorKind};
use support::fault_server::{FaultServer, Reply, Request, hang_up, silence};
use tempfile::TempDir;

const SIZE: usize = 200_000;
const PART: ByteRange = ByteRange::From {
    offset: 1000,
    len: 50_000,
};
const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;

fn content() -> Bytes {
    (0..SIZE).map(|at| (at % 251) as u8).collect()
}

fn good(request: &Request) -> Reply {
    match request.target.contains("/manifests/") {
        true => Reply::new(200, MANIFEST),
        false => Reply::part(&content(), request),
    }
}

/// A registry, a mirror before it, and a client that knows of both. The
/// registry's name leads nowhere: all is in the file.
struct World {
    mirror: FaultServer,
    server: FaultServer,
    client: Client,
    directory: TempDir,
}

impl World {
    async fn new(mirror: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::with(mirror, |request, _| good(request), "").await
    }

    async fn with(
        mirror: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
        server: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
        more: &str,
    ) -> Self {
        let (mirror, server) = (
            FaultServer::start(mirror).await,
            FaultServer::start(server).await,
        );
        let directory = tempfile::tempdir().unwrap();
        let of_registry = directory.path().join("r.example");
        std::fs::create_dir(&of_registry).unwrap();
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n{more}\n",
            server.host, mirror.host
        );
        std::fs::write(of_registry.join("hosts.toml"), text).unwrap();
        let client = Client::new(Config {
            hosts_dirs: vec![directory.path().to_owned()],
            connect_timeout: Duration::from_secs(1),
            stall_timeout: Duration::from_secs(1),
            ..support::config()
        });
        Self {
            mirror,
            server,
            client: client.unwrap(),
            directory,
        }
    }

    fn image(&self) -> Reference {
        "r.example/team/app:v1".parse().unwrap()
    }

    fn blob(&self) -> Blob {
        self.client.blob(&self.image(), Digest::of(&content()))
    }

    fn counts(&self) -> (usize, usize) {
        (self.mirror.count(), self.server.count())
    }
}

async fn read(blob: &Blob) -> Result<(), Error> {
    let bytes = blob.range(PART).await?.collect(SIZE).await?;
    assert!(bytes == content()[1000..51_000]);
    Ok(())
}

#[tokio::test]
async fn the_mirror_is_asked_first_and_told_for_whom() {
    let world = World::new(|request, _| good(request)).await;
    world.client.manifest(&world.image()).await.unwrap();
    read(&world.blob()).await.unwrap();
    let digest = Digest::of(&content());
    assert_eq!(
        world.mirror.log(),
        [
            "GET /v2/team/app/manifests/v1?ns=r.example".to_owned(),
            format!("GET /v2/team/app/blobs/{digest}?ns=r.example"),
        ]
    );
    assert_eq!(world.server.count(), 0);
}

#[tokio::test]
async fn the_next_host_takes_over_at_once() {
    for fault in [
        Reply::new(500, ""),
        Reply::new(503, "").with("Retry-After", "30"),
        Reply::new(429, "").with("Retry-After", "30"),
        Reply::new(404, ""),
        Reply::new(401, ""),
        Reply::new(403, ""),
        Reply::new(200, content()),
        silence(),
        hang_up(),
    ] {
        let told = fault.clone();
        let world = World::new(move |_, _| told.clone()).await;
        let blob = world.blob().without_retries();
        for _ in 0..3 {
            read(&blob).await.unwrap();
        }
        assert_eq!(world.server.count(), 3, "{fault:?}");
    }
}

#[tokio::test]
async fn a_dead_host_is_tried_again() {
    let healed = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&healed);
    let world = World::new(move |request, _| match seen.load(Ordering::SeqCst) {
        true => good(request),
        false => Reply::new(503, ""),
    })
    .await;
    let blob = world.blob();
    read(&blob).await.unwrap();
    healed.store(true, Ordering::SeqCst);
    while world.mirror.count() == 1 {
        read(&blob).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = world.server.count();
    read(&blob).await.unwrap();
    assert_eq!(world.server.count(), before, "the mirror serves again");
}

#[tokio::test]
async fn a_body_that_breaks_off_goes_on_from_the_next_host() {
    for cut in [Reply::cut_to, Reply::stall_after] {
        let world = World::new(move |request, _| cut(good(request), 20_000)).await;
        read(&world.blob()).await.unwrap();
        assert_eq!(world.server.requests()[0].range(), Some((21_000, 30_000)));
        // Who waits itself is told.
        let world = World::new(move |request, _| cut(good(request), 20_000)).await;
        let blob = world.blob().without_retries();
        let error = read(&blob).await.unwrap_err();
        assert!(error.kind().is_transient(), "{error:?}");
        while read(&blob).await.is_err() {}
        assert_eq!(world.server.count(), 1);
    }
}

#[tokio::test]
async fn wrong_bytes_are_fetched_once_more_from_the_next_host() {
    let mut wrong = content().to_vec();
    wrong[77] ^= 1;
    let world = World::new(move |request, _| Reply::part(&wrong, request)).await;
    let blob = world.blob();
    let bytes = blob.whole().await.unwrap().collect(SIZE).await.unwrap();
    assert!(bytes == content());
    assert_eq!(world.counts(), (1, 1));
    // Of a part only the caller can tell.
    let body = blob.range(PART).await.unwrap();
    assert_eq!(world.counts(), (1, 2), "it is not asked for this blob now");
    assert!(!body.senders().distrust(), "nobody else is left");
    let world = World::new(|request, _| good(request)).await;
    let body = world.blob().range(PART).await.unwrap();
    assert!(body.senders().distrust(), "there is the registry itself");
    read(&world.blob()).await.unwrap();
    assert_eq!(world.counts(), (1, 1));

    let world = World::new(|_, _| Reply::new(200, "{\"schemaVersion\":2}")).await;
    let image = world.image().with_digest(Digest::of(MANIFEST.as_bytes()));
    world.client.manifest(&image).await.unwrap();
    assert_eq!(world.counts(), (1, 1));
}

#[tokio::test]
async fn what_may_pass_is_told_rather_than_what_stays() {
    let world = World::with(|_, _| Reply::new(503, ""), |_, _| Reply::new(404, ""), "").await;
    let blob = world.blob().without_retries();
    for _ in 0..3 {
        let error = read(&blob).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Server, "{error}");
        assert!(error.to_string().contains(&world.mirror.host), "{error}");
    }
    let world = World::with(|_, _| Reply::new(404, ""), |_, _| Reply::new(401, ""), "").await;
    let error = read(&world.blob()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    let remedy = format!("docker login {}", world.server.host);
    assert!(error.to_string().contains(&remedy), "{error}");
}

#[tokio::test]
async fn a_host_without_a_capability_is_not_asked_for_it() {
    let pull = "capabilities = [\"pull\"]";
    let world = World::with(|r, _| good(r), |r, _| good(r), pull).await;
    let document = world.client.manifest(&world.image()).await.unwrap();
    world.client.resolve(&world.image()).await.unwrap();
    assert_eq!(world.mirror.count(), 0, "a tag is resolved by the registry");
    let by_digest = world.image().with_digest(document.digest);
    world.client.manifest(&by_digest).await.unwrap();
    assert_eq!(world.mirror.count(), 1);
    // The first that takes it is pushed to, and no other.
    let image = world.image();
    let exists = world.client.blob_exists(&image, Digest::of(b"x")).await;
    assert!(exists.unwrap());
    assert_eq!(world.mirror.count(), 1);

    let file = world.directory.path().join("r.example/hosts.toml");
    std::fs::write(&file, "capabilities = ['pull']").unwrap();
    let error = world.client.manifest(&world.image()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(
        error.to_string().contains("capability 'resolve'"),
        "{error}"
    );
}

#[tokio::test]
async fn headers_and_credentials_are_one_hosts_alone() {
    let ask = |request: &Request| match request.header("authorization") {
        None => Reply::new(401, "").with("WWW-Authenticate", "Basic realm=\"x\""),
        Some(_) => good(request),
    };
    // The mirror wants a password, redirects, and does not have everything.
    let other = FaultServer::start(|request, _| good(request)).await;
    let target = format!("http://{}/elsewhere", other.host);
    let world = World::with(
        move |request, _| match ask(request) {
            reply if request.header("authorization").is_none() => reply,
            _ if request.target.contains("/manifests/") => Reply::new(404, ""),
            _ => Reply::new(307, "").with("Location", target.clone()),
        },
        |request, _| good(request),
        "",
    )
    .await;
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{1}\"]\n[host.\"http://{1}\".header]\nx-key = \"k\"",
        world.server.host, world.mirror.host
    );
    std::fs::write(world.directory.path().join("r.example/hosts.toml"), text).unwrap();
    let docker = world.directory.path().join("config.json");
    let auths = format!(
        r#"{{"auths": {{"{}": {{"auth": "YTpi"}}, "r.example": {{"auth": "Yzpk"}}}}}}"#,
        world.mirror.host
    );
    std::fs::write(&docker, auths).unwrap();
    let client = Client::new(Config {
        hosts_dirs: vec![world.directory.path().to_owned()],
        docker_configs: vec![docker],
        ..support::config()
    })
    .unwrap();
    client.manifest(&world.image()).await.unwrap();
    let blob = client.blob(&world.image(), Digest::of(&content()));
    read(&blob).await.unwrap();
    let sent = |server: &FaultServer, header: &str| -> Vec<Option<String>> {
        let requests = server.requests();
        let value = |request: &Request| request.header(header).map(str::to_owned);
        requests.iter().map(value).collect()
    };
    let mine = Some("Basic YTpi".to_owned());
    assert_eq!(
        sent(&world.mirror, "authorization"),
        [None, mine.clone(), mine]
    );
    let key = Some("k".to_owned());
    assert_eq!(
        sent(&world.mirror, "x-key"),
        [key.clone(), key.clone(), key]
    );
    for elsewhere in [&world.server, &other] {
        assert_eq!(sent(elsewhere, "authorization"), [None]);
        assert_eq!(sent(elsewhere, "x-key"), [None]);
    }
}

#[tokio::test]
async fn regression_a_host_that_is_named_twice_is_asked_once() {
    let world = World::with(
        |r, _| good(r),
        |request, _| match request.header("x-key") {
            Some(_) if request.target.contains("/manifests/") => Reply::new(404, ""),
            Some(_) => good(request),
            None => hang_up(),
        },
        "",
    )
    .await;
    let text = format!(
        "server = \"http://{0}\"\n[host.\"http://{0}\".header]\nx-key = \"k\"",
        world.server.host
    );
    std::fs::write(world.directory.path().join("r.example/hosts.toml"), text).unwrap();
    let error = world.client.manifest(&world.image()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    read(&world.blob().without_retries()).await.unwrap();
    assert_eq!(world.counts(), (0, 2));
}

#[tokio::test]
async fn a_bad_file_is_told_with_its_line() {
    let world = World::with(|r, _| good(r), |r, _| good(r), "capabilities = ['fetch']").await;
    let error = world.client.manifest(&world.image()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(
        error
            .to_string()
            .contains("hosts.toml:3: unknown capability"),
        "{error}"
    );
    assert_eq!(world.counts(), (0, 0));
}
