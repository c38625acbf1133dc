//! What a registry can do wrong, and how many requests it costs.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use sluice_oci::{Digest, Reference};
use sluice_registry::{
    Blob, BlobSource, ByteRange, Client, Config, Connections, Error, ErrorKind, RetryPolicy,
};
use support::fault_server::{FaultServer, Reply, Request, hang_up, silence};

const SIZE: usize = 200_000;

fn content() -> Bytes {
    (0..SIZE).map(|at| (at % 251) as u8).collect()
}

fn image(server: &FaultServer) -> Reference {
    format!("{}/app:v1", server.host).parse().unwrap()
}

fn blob(server: &FaultServer) -> Blob {
    support::client().blob(&image(server), Digest::of(&content()))
}

fn impatient_blob(server: &FaultServer) -> Blob {
    support::impatient_client().blob(&image(server), Digest::of(&content()))
}

const PART: ByteRange = ByteRange::From {
    offset: 1000,
    len: 50_000,
};

async fn read(blob: &Blob, range: ByteRange) -> Result<Bytes, Error> {
    blob.range(range).await?.collect(SIZE).await
}

async fn part_is_right(blob: &Blob) {
    assert!(read(blob, PART).await.unwrap() == content()[1000..51_000]);
}

fn kind<T>(result: Result<T, Error>) -> ErrorKind {
    result.err().unwrap().kind()
}

/// Answers the first requests with what is given, all others rightly.
async fn server(first: Vec<Reply>) -> FaultServer {
    FaultServer::start(move |request, before| match first.get(before) {
        Some(reply) => reply.clone(),
        None => Reply::part(&content(), request),
    })
    .await
}

#[tokio::test]
async fn transient_failures_are_tried_again() {
    for fault in [
        Reply::new(500, ""),
        Reply::new(502, "<html>bad gateway</html>"),
        Reply::new(503, ""),
        Reply::new(429, "").with("Retry-After", "0"),
        silence(),
        hang_up(),
    ] {
        let server = server(vec![fault.clone(), fault.clone()]).await;
        part_is_right(&impatient_blob(&server)).await;
        assert_eq!(server.count(), 3, "{fault:?}");
    }
}

#[tokio::test]
async fn tries_are_bounded() {
    for (fault, expected) in [
        (Reply::new(500, ""), ErrorKind::Server),
        (
            Reply::new(429, "").with("Retry-After", "0"),
            ErrorKind::Throttled,
        ),
        (silence(), ErrorKind::Stalled),
        (hang_up(), ErrorKind::Connect),
    ] {
        let server = FaultServer::start(move |_, _| fault.clone()).await;
        let error = read(&impatient_blob(&server), PART).await.unwrap_err();
        assert_eq!(error.kind(), expected);
        assert!(error.to_string().contains("(tried 4 times)"), "{error}");
        assert_eq!(server.count(), 4);
    }
}

#[tokio::test]
async fn final_refusals_are_not_tried_again() {
    for (status, expected) in [
        (400, ErrorKind::Refused),
        (401, ErrorKind::Unauthorized),
        (403, ErrorKind::Forbidden),
        (404, ErrorKind::NotFound),
        (410, ErrorKind::NotFound),
        (418, ErrorKind::Refused),
        (416, ErrorKind::RangeNotSatisfiable),
    ] {
        let server = FaultServer::start(move |_, _| Reply::new(status, "")).await;
        let error = read(&blob(&server), PART).await.unwrap_err();
        assert_eq!((error.kind(), error.status()), (expected, Some(status)));
        assert_eq!(server.count(), 1, "{status}");
    }
}

#[tokio::test]
async fn retry_after_beyond_the_deadline_is_not_waited_for() {
    let server = server(vec![Reply::new(429, "").with("Retry-After", "3600")]).await;
    let error = read(&blob(&server), PART).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Throttled);
    assert_eq!(error.retry_after(), Some(Duration::from_secs(3600)));
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    let server = server(vec![Reply::new(503, "").with("Retry-After", "1")]).await;
    let start = std::time::Instant::now();
    part_is_right(&blob(&server)).await;
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_refused_connection_names_the_host() {
    let server = server(Vec::new()).await;
    let blob = blob(&server);
    let host = server.host.clone();
    drop(server);
    tokio::task::yield_now().await;
    let error = read(&blob, PART).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(error.to_string().contains(&host), "{error}");
}

#[tokio::test]
async fn broken_bodies_are_resumed_where_they_stopped() {
    for cut in [Reply::cut_to, Reply::stall_after] {
        let server = FaultServer::start(move |request, before| {
            let reply = Reply::part(&content(), request);
            if before < 2 {
                cut(reply, 20_000)
            } else {
                reply
            }
        })
        .await;
        part_is_right(&impatient_blob(&server)).await;
        let ranges: Vec<_> = server
            .requests()
            .iter()
            .filter_map(Request::range)
            .collect();
        assert_eq!(ranges, [(1000, 50_000), (21_000, 30_000), (41_000, 10_000)]);
    }
}

#[tokio::test]
async fn a_whole_blob_is_resumed_and_its_digest_still_checked() {
    let server = FaultServer::start(|request, before| {
        let reply = Reply::part(&content(), request);
        if before == 0 {
            reply.cut_to(150_000)
        } else {
            reply
        }
    })
    .await;
    let body = blob(&server).whole().await.unwrap();
    assert!(body.collect(SIZE).await.unwrap() == content());
    assert_eq!(server.requests()[1].range(), Some((150_000, 50_000)));

    let server = FaultServer::start(|request, before| {
        let other = [content(), Bytes::from_static(b"!")].concat();
        if before == 0 {
            Reply::part(&content(), request).cut_to(150_000)
        } else {
            Reply::part(&other[1..], request)
        }
    })
    .await;
    let body = blob(&server).whole().await.unwrap();
    assert_eq!(kind(body.collect(SIZE).await), ErrorKind::DigestMismatch);
}

#[tokio::test]
async fn a_whole_blob_comes_from_a_registry_without_ranges() {
    let server = FaultServer::start(|_, before| {
        let reply = Reply::new(200, content());
        match before {
            0 => reply.cut_to(150_000),
            // The range that is ignored, then the whole, broken again.
            2 => reply.cut_to(100_000),
            _ => reply,
        }
    })
    .await;
    let body = blob(&server).whole().await.unwrap();
    assert!(body.collect(SIZE).await.unwrap() == content());
    let ranged: Vec<_> = server
        .requests()
        .iter()
        .map(|request| request.range().is_some())
        .collect();
    assert_eq!(ranged, [false, true, false, true, false]);
}

#[tokio::test]
async fn bodies_that_never_progress_are_given_up() {
    let cut = |request: &Request, _| Reply::part(&content(), request).cut_to(0);
    let server = FaultServer::start(cut).await;
    assert_eq!(kind(read(&blob(&server), PART).await), ErrorKind::Truncated);
    assert_eq!(server.count(), 4);

    let stall = |request: &Request, _| Reply::part(&content(), request).stall_after(0);
    let server = FaultServer::start(stall).await;
    assert_eq!(
        kind(read(&impatient_blob(&server), PART).await),
        ErrorKind::Stalled
    );
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn an_ignored_range_fails_unless_the_whole_was_wanted() {
    let server = FaultServer::start(|_, _| Reply::new(200, content())).await;
    let blob = blob(&server);
    let error = read(&blob, PART).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RangeIgnored);
    assert!(error.to_string().contains("HTTP ranges"), "{error}");
    assert_eq!(server.count(), 1);
    // A suffix is tried once more by its position.
    let suffix = read(&blob, ByteRange::Suffix(1000)).await;
    assert_eq!(kind(suffix), ErrorKind::RangeIgnored);
    assert_eq!(server.count(), 3);
    for all in [
        ByteRange::Suffix(SIZE as u64 + 1),
        ByteRange::Suffix(SIZE as u64),
        ByteRange::From {
            offset: 0,
            len: SIZE as u64,
        },
    ] {
        assert!(read(&blob, all).await.unwrap() == content());
    }
    assert_eq!(server.count(), 6);
}

/// A body of many gigabytes that is never sent: only its beginning could be
/// received before the client lets go.
#[tokio::test]
async fn an_ignored_range_does_not_receive_the_whole() {
    let server = FaultServer::start(|_, _| Reply::new(200, content()).stall_after(1000)).await;
    assert_eq!(
        kind(read(&blob(&server), PART).await),
        ErrorKind::RangeIgnored
    );
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn stores_without_suffix_ranges_are_asked_by_position() {
    let size = format!("bytes */{SIZE}");
    for odd in [
        Reply::new(200, content()),
        Reply::new(416, "").with("Content-Range", size),
    ] {
        let server = server(vec![odd]).await;
        let body = blob(&server).range(ByteRange::Suffix(1000)).await.unwrap();
        assert_eq!(
            (body.offset, body.len, body.blob_size),
            (199_000, 1000, Some(SIZE as u64))
        );
        assert!(body.collect(SIZE).await.unwrap() == content()[199_000..]);
        assert_eq!(server.requests()[1].range(), Some((199_000, 1000)));
        assert_eq!(server.count(), 2);
    }
    // A refusal that does not tell the size costs one more.
    let server = FaultServer::start(|request, before| match before {
        0 => Reply::new(416, ""),
        _ => Reply::part(&content(), request),
    })
    .await;
    let all = read(&blob(&server), ByteRange::Suffix(1 << 30)).await;
    assert!(all.unwrap() == content());
    let methods: Vec<_> = server.requests().into_iter().map(|r| r.method).collect();
    assert_eq!(methods, ["GET", "HEAD", "GET"]);
}

#[tokio::test]
async fn wrong_ranges_are_refused() {
    for wrong in [
        "bytes 999-50998/200000",
        "bytes 1000-50998/200000",
        "bytes 1000-51000/200000",
        "bytes 0-49999/200000",
        "bytes */200000",
        "bytes 1000-50999/10",
        "lines 1000-50999/200000",
    ] {
        let server = FaultServer::start(move |_, _| {
            Reply::new(206, &content()[1000..51_000]).with("Content-Range", wrong)
        })
        .await;
        let error = kind(read(&blob(&server), PART).await);
        assert_eq!(error, ErrorKind::Protocol, "{wrong}");
        assert_eq!(server.count(), 1);
    }
    let server = FaultServer::start(|_, _| Reply::new(206, "no Content-Range")).await;
    assert_eq!(kind(read(&blob(&server), PART).await), ErrorKind::Protocol);
    let server = FaultServer::start(|_, _| {
        Reply::new(206, vec![0; 10]).with("Content-Range", "bytes 1000-50999/200000")
    })
    .await;
    assert_eq!(kind(read(&blob(&server), PART).await), ErrorKind::Protocol);
}

#[tokio::test]
async fn manifests_are_bounded_and_checked() {
    let manifest = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
    let server = FaultServer::start(move |_, before| match before {
        0 => Reply::new(200, vec![b' '; (4 << 20) + 1]),
        1 => Reply::new(200, manifest).with(
            "Docker-Content-Digest",
            Digest::of(b"something else").to_string(),
        ),
        2 => Reply::new(200, "{\"schemaVersion\":2}"),
        3 => Reply::new(200, manifest).cut_to(10),
        _ => Reply::new(200, manifest),
    })
    .await;
    let client = support::client();
    let image = image(&server);
    assert_eq!(kind(client.manifest(&image).await), ErrorKind::TooLarge);
    assert_eq!(
        kind(client.manifest(&image).await),
        ErrorKind::DigestMismatch
    );
    assert_eq!(kind(client.manifest(&image).await), ErrorKind::Protocol);
    assert_eq!(server.count(), 3);
    // The cut one is tried again.
    let document = client.manifest(&image).await.unwrap();
    assert_eq!(document.digest, Digest::of(manifest.as_bytes()));
    assert_eq!(server.count(), 5);
    let other = image.with_digest(Digest::of(b"other"));
    assert_eq!(
        kind(client.manifest(&other).await),
        ErrorKind::DigestMismatch
    );
}

#[tokio::test]
async fn resolve_falls_back_to_the_manifest_itself() {
    let manifest = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
    let server = FaultServer::start(move |_, _| Reply::new(200, manifest)).await;
    let found = support::client().resolve(&image(&server)).await.unwrap();
    assert_eq!(found.digest, Digest::of(manifest.as_bytes()));
    assert_eq!(
        server.log(),
        ["HEAD /v2/app/manifests/v1", "GET /v2/app/manifests/v1"]
    );
}

#[tokio::test]
async fn what_the_registry_says_is_shown_bounded_and_on_one_line() {
    let message = format!("line\\none\\u001b[31m {}", "x".repeat(5000));
    let body = format!(r#"{{"errors":[{{"code":"DENIED","message":"{message}"}}]}}"#);
    let server = FaultServer::start(move |_, _| Reply::new(403, body.clone())).await;
    let text = read(&blob(&server), PART).await.unwrap_err().to_string();
    assert!(text.contains("DENIED: line one"), "{text}");
    assert!(text.len() < 800, "{}", text.len());
    assert!(!text.contains(char::is_control));
}

#[tokio::test]
async fn uploads_start_again_after_a_failure() {
    let server = FaultServer::start_with_host(|host| {
        move |request: &Request, before| match (request.method.as_str(), before) {
            ("HEAD", _) => Reply::new(404, ""),
            // One Location is absolute, the other relative.
            ("POST", 1) => Reply::new(202, "").with("Location", format!("http://{host}/up/a?s=1")),
            ("POST", _) => Reply::new(202, "").with("Location", "/up/b?s=2"),
            ("PUT", 2) => Reply::new(500, ""),
            ("PUT", _) => Reply::new(201, ""),
            _ => Reply::new(204, ""),
        }
    })
    .await;
    let bytes = content();
    let digest = Digest::of(&bytes);
    let source = BlobSource::bytes(bytes.clone());
    let client = support::client();
    let sent = client
        .push_blob(&image(&server), digest, SIZE as u64, source)
        .await;
    assert!(sent.unwrap());
    let escaped = digest.to_string().replace(':', "%3A");
    assert_eq!(
        server.log(),
        [
            format!("HEAD /v2/app/blobs/{digest}"),
            "POST /v2/app/blobs/uploads/".to_owned(),
            format!("PUT /up/a?s=1&digest={escaped}"),
            "DELETE /up/a?s=1".to_owned(),
            "POST /v2/app/blobs/uploads/".to_owned(),
            format!("PUT /up/b?s=2&digest={escaped}"),
        ]
    );
    assert!(server.requests()[5].body == bytes);
}

#[tokio::test]
async fn a_source_that_fails_is_told_apart_from_the_registry() {
    let server = FaultServer::start(|request, _| match request.method.as_str() {
        "HEAD" => Reply::new(404, ""),
        "POST" => Reply::new(202, "").with("Location", "/up"),
        _ => Reply::new(201, ""),
    })
    .await;
    let client = support::client();
    let push = async |source, size| {
        let digest = Digest::of(b"x");
        client
            .push_blob(&image(&server), digest, size, source)
            .await
    };
    let missing = push(BlobSource::file("/nonexistent/blob".into()), 5).await;
    let error = missing.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(error.to_string().contains("/nonexistent/blob"), "{error}");
    for size in [4, 6] {
        let short = push(BlobSource::bytes(Bytes::from_static(b"12345")), size).await;
        let error = short.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source, "{error}");
        assert!(error.to_string().contains("5 bytes"), "{error}");
    }
}

#[tokio::test]
async fn a_chunk_that_broke_off_goes_on_where_it_stopped() {
    const CHUNK: usize = 8 << 20;
    let server = FaultServer::start(|request, _| {
        let location = |reply: Reply| reply.with("Location", "/up");
        match (request.method.as_str(), request.header("content-range")) {
            ("POST", _) => location(Reply::new(202, "")),
            ("PATCH", Some("0-8388607")) => Reply::new(500, ""),
            ("PATCH", _) => location(Reply::new(202, "")),
            ("GET", _) => location(Reply::new(204, "").with("Range", "0-999")),
            _ => Reply::new(201, ""),
        }
    })
    .await;
    let client = support::client();
    let mut upload = client.upload(&image(&server)).await.unwrap();
    let bytes = vec![7; CHUNK + 10];
    upload.write(&bytes).await.unwrap();
    assert_eq!(
        upload.finish().await.unwrap(),
        (Digest::of(&bytes), bytes.len() as u64)
    );
    let ranges: Vec<_> = server
        .requests()
        .iter()
        .filter_map(|request| request.header("content-range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, ["0-8388607", "1000-8388607", "8388608-8388617"]);
}

#[tokio::test]
async fn attempts_and_deadline_are_settings() {
    let server = FaultServer::start(|_, _| Reply::new(500, "")).await;
    let client = Client::new(Config {
        retry: RetryPolicy {
            attempts: 1,
            ..RetryPolicy::default()
        },
        ..support::config()
    })
    .unwrap();
    assert_eq!(
        kind(client.manifest(&image(&server)).await),
        ErrorKind::Server
    );
    assert_eq!(server.count(), 1);
    let client = Client::new(Config {
        retry: RetryPolicy {
            attempts: 100,
            base_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(1),
            deadline: Duration::ZERO,
        },
        ..support::config()
    })
    .unwrap();
    assert_eq!(
        kind(client.manifest(&image(&server)).await),
        ErrorKind::Server
    );
    assert_eq!(server.count(), 2);
}

/// Answers nothing to any of the first `count` requests before all have come,
/// and so for the next `count`: so many are on connections of their own.
async fn crowd(count: usize) -> FaultServer {
    FaultServer::start(move |request, before| {
        let reply = match request.target.as_str() {
            "/v2/" => Reply::new(200, "{}"),
            _ => Reply::part(&content(), request),
        };
        reply.after_requests((before / count + 1) * count)
    })
    .await
}

/// So many connections to a host that never counts as far away.
fn near(count: usize) -> Connections {
    Connections {
        near: count,
        far: 100,
        far_from: Duration::from_secs(60),
    }
}

#[tokio::test]
async fn connections_are_there_before_they_are_needed() {
    const COUNT: usize = 6;
    let server = crowd(COUNT).await;
    let client = support::client();
    let round_trip = client.connect_ahead(&image(&server), near(COUNT)).await;
    assert!(round_trip.is_some());
    assert_eq!(server.log(), vec!["GET /v2/"; COUNT]);
    assert_eq!(server.connections(), COUNT);
    // Connections go back to where they are taken from by tasks of their own.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let blob = client.blob(&image(&server), Digest::of(&content()));
    join_all((0..COUNT).map(|_| part_is_right(&blob))).await;
    assert_eq!((server.count(), server.connections()), (2 * COUNT, COUNT));
}

#[tokio::test]
async fn more_connections_are_opened_to_a_host_that_is_far_away() {
    // None is answered before all have come.
    let server = crowd(7).await;
    let connections = Connections {
        near: 3,
        far: 7,
        far_from: Duration::from_millis(1),
    };
    let client = support::client();
    let round_trip = client.connect_ahead(&image(&server), connections).await;
    assert!(round_trip.is_some());
    assert_eq!((server.count(), server.connections()), (7, 7));
}

#[tokio::test]
async fn connecting_ahead_tries_once_and_never_fails() {
    const COUNT: usize = 3;
    for answer in [
        Reply::new(401, ""),
        Reply::new(404, "no API"),
        Reply::new(503, "").with("Retry-After", "3600"),
        Reply::new(307, "").with("Location", "http://127.0.0.1:1/"),
        Reply::new(200, vec![b' '; 300 << 10]),
        silence(),
        hang_up(),
    ] {
        let server = server(vec![answer.clone(); COUNT]).await;
        let client = support::impatient_client();
        client.connect_ahead(&image(&server), near(COUNT)).await;
        assert_eq!(server.count(), COUNT, "{answer:?}");
        // What came of it is not held against the registry.
        let blob = client.blob(&image(&server), Digest::of(&content()));
        part_is_right(&blob).await;
        assert_eq!(server.count(), COUNT + 1, "{answer:?}");
    }
    // One at whose address nobody listens.
    let gone = server(Vec::new()).await.host.clone();
    let gone = format!("{gone}/app:v1").parse().unwrap();
    let round_trip = support::client().connect_ahead(&gone, near(COUNT)).await;
    assert_eq!(round_trip, None);
}
