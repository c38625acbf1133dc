//! Against a registry that lists referrers itself, and ones that answer oddly.

#![allow(clippy::unwrap_used)]

mod support;

use serde_json::json;
use sluice_oci::{Digest, Manifest, Reference, media_type};
use sluice_registry::ErrorKind;
use support::fault_server::{FaultServer, Reply};

const KIND: &str = "a/profile";

fn subject() -> Digest {
    Digest::of(b"an image")
}

fn index(kinds: &[&str]) -> Vec<u8> {
    let manifests: Vec<_> = kinds
        .iter()
        .map(|kind| {
            json!({
                "mediaType": media_type::OCI_MANIFEST,
                "digest": Digest::of(kind.as_bytes()),
                "size": 10,
                "artifactType": kind,
            })
        })
        .collect();
    serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_INDEX,
        "manifests": manifests,
    }))
    .unwrap()
}

fn reference(server: &FaultServer) -> Reference {
    format!("{}/app:v1", server.host).parse().unwrap()
}

async fn found(listed: Reply, tagged: Reply) -> (Result<usize, ErrorKind>, Vec<String>) {
    let server = FaultServer::start(move |request, _| {
        match request.target.starts_with("/v2/app/referrers/") {
            true => listed.clone(),
            false => tagged.clone(),
        }
    })
    .await;
    let client = support::client();
    let found = client.referrers(&reference(&server), subject(), KIND).await;
    let found = found.map(|found| found.len()).map_err(|error| error.kind());
    let mut log = server.log();
    log.sort();
    (found, log)
}

#[tokio::test]
async fn what_the_registry_lists_counts() {
    let index_of =
        |kinds: &[&str]| Reply::new(200, index(kinds)).with("Content-Type", media_type::OCI_INDEX);
    let missing = || Reply::new(404, "");
    // A registry may ignore the type that was asked for.
    let (listed, log) = found(index_of(&[KIND, "other"]), missing()).await;
    assert_eq!(listed, Ok(1));
    let hex = subject().hex();
    assert_eq!(
        log,
        [
            format!("GET /v2/app/manifests/sha256-{hex}"),
            format!("GET /v2/app/referrers/sha256:{hex}?artifactType=a%2Fprofile"),
        ],
        "both at once, each once"
    );
    // It is the registry's word, whatever an old tag says.
    let (listed, _) = found(index_of(&[]), index_of(&[KIND])).await;
    assert_eq!(listed, Ok(0));
    // Without lists, the tag's.
    for no_lists in [missing(), Reply::new(405, ""), Reply::new(200, "<html>")] {
        let (tagged, _) = found(no_lists.clone(), index_of(&[KIND])).await;
        assert_eq!(tagged, Ok(1));
        let (nothing, log) = found(no_lists, missing()).await;
        assert_eq!(nothing, Ok(0));
        assert_eq!(log.len(), 2, "{log:?}");
    }
}

#[tokio::test]
async fn trouble_is_told_and_not_tried_again() {
    let (result, log) = found(Reply::new(503, ""), Reply::new(404, "")).await;
    assert_eq!(result, Err(ErrorKind::Server));
    assert_eq!(log.len(), 2, "{log:?}");
    let rubbish = Reply::new(200, "[]").with("Content-Type", media_type::OCI_INDEX);
    let (result, _) = found(rubbish, Reply::new(404, "")).await;
    assert_eq!(result, Err(ErrorKind::Protocol));
}

#[tokio::test]
async fn a_registry_that_lists_needs_no_tag() {
    let server =
        FaultServer::start(|_, _| Reply::new(201, "").with("OCI-Subject", subject().to_string()))
            .await;
    let artifact: Manifest = serde_json::from_value(json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_MANIFEST,
        "artifactType": KIND,
        "config": {"mediaType": "a/config", "digest": Digest::of(b"{}"), "size": 2},
        "layers": [],
        "subject": {"mediaType": media_type::OCI_MANIFEST, "digest": subject(), "size": 1},
    }))
    .unwrap();
    let client = support::client();
    let digest = client.push_referrer(&reference(&server), &artifact).await;
    let expected = format!("PUT /v2/app/manifests/{}", digest.unwrap());
    assert_eq!(server.log(), [expected]);
}
