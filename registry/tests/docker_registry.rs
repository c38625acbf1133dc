//! Against Debian's docker-registry: what real clients and registries do.

#![allow(clippy::unwrap_used)]

mod support;

use bytes::Bytes;
use sluice_oci::{Descriptor, Digest, Manifest, Reference, media_type};
use sluice_registry::{BlobSource, ByteRange, Client, Config, ErrorKind};
use support::docker_registry::{DockerRegistry, PASSWORD, USER};

fn noise(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

fn reference(host: &str, rest: &str) -> Reference {
    format!("{host}/{rest}").parse().unwrap()
}

async fn push(client: &Client, to: &Reference, bytes: &Bytes) -> bool {
    let source = BlobSource::bytes(bytes.clone());
    client
        .push_blob(to, Digest::of(bytes), bytes.len() as u64, source)
        .await
        .unwrap()
}

fn manifest_of(config: &Bytes, layer: &Bytes) -> Bytes {
    let descriptor = |media_type: &str, bytes: &Bytes| {
        Descriptor::new(media_type, Digest::of(bytes), bytes.len() as u64)
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.to_owned()),
        config: descriptor(media_type::OCI_CONFIG, config),
        layers: vec![descriptor(media_type::OCI_LAYER_GZIP, layer)],
        annotations: Default::default(),
        other: Default::default(),
    };
    serde_json::to_vec(&manifest).unwrap().into()
}

#[tokio::test]
async fn an_image_goes_up_and_comes_back() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let image = reference(&registry.host, "team/app:v1");
    let layer = noise(3_000_000);
    let config = Bytes::from_static(br#"{"architecture":"amd64","os":"linux"}"#);

    assert!(push(&client, &image, &layer).await);
    assert!(!push(&client, &image, &layer).await, "it is there already");
    assert!(push(&client, &image, &config).await);
    let bytes = manifest_of(&config, &layer);
    let digest = client
        .push_manifest(&image, media_type::OCI_MANIFEST, bytes.clone())
        .await
        .unwrap();
    assert_eq!(digest, Digest::of(&bytes));

    let resolved = client.resolve(&image).await.unwrap();
    assert_eq!(
        (resolved.digest, resolved.size, resolved.media_type.as_str()),
        (digest, bytes.len() as u64, media_type::OCI_MANIFEST)
    );
    for by in [image.clone(), image.with_digest(digest)] {
        let document = client.manifest(&by).await.unwrap();
        assert_eq!(document.bytes, bytes);
        assert!(!document.is_index());
        assert_eq!(document.manifest().unwrap().layers.len(), 1);
    }

    let blob = client.blob(&image, Digest::of(&layer));
    let whole = blob.whole().await.unwrap().collect(4 << 20).await.unwrap();
    assert!(whole == layer);
    let part = ByteRange::From {
        offset: 1_000_000,
        len: 1234,
    };
    let body = blob.range(part).await.unwrap();
    assert_eq!((body.offset, body.len), (1_000_000, 1234));
    assert_eq!(body.blob_size, Some(3_000_000));
    assert!(body.collect(1234).await.unwrap() == layer[1_000_000..1_001_234]);
    let body = blob.range(ByteRange::Suffix(1000)).await.unwrap();
    assert_eq!((body.offset, body.len), (2_999_000, 1000));
    assert!(body.collect(1000).await.unwrap() == layer[2_999_000..]);
}

#[tokio::test]
async fn ranges_at_and_past_the_end() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let image = reference(&registry.host, "app");
    let bytes = noise(1000);
    push(&client, &image, &bytes).await;
    let blob = client.blob(&image, Digest::of(&bytes));

    let body = blob.range(ByteRange::Suffix(5000)).await.unwrap();
    assert_eq!(
        (body.offset, body.len, body.blob_size),
        (0, 1000, Some(1000))
    );
    assert!(body.collect(1000).await.unwrap() == bytes);
    let across = ByteRange::From {
        offset: 900,
        len: 500,
    };
    let body = blob.range(across).await.unwrap();
    assert_eq!((body.offset, body.len), (900, 100));
    for beyond in [
        ByteRange::From {
            offset: 1000,
            len: 1,
        },
        ByteRange::From {
            offset: u64::MAX,
            len: 2,
        },
        ByteRange::From { offset: 0, len: 0 },
        ByteRange::Suffix(0),
    ] {
        let error = blob.range(beyond).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::RangeNotSatisfiable, "{error}");
    }
}

#[tokio::test]
async fn chunked_upload_of_unknown_size() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let image = reference(&registry.host, "app");
    // Two full chunks and a rest.
    let bytes = noise((16 << 20) + 12_345);
    let mut upload = client.upload(&image).await.unwrap();
    for piece in bytes.chunks(1_000_003) {
        upload.write(piece).await.unwrap();
    }
    let (digest, size) = upload.finish().await.unwrap();
    assert_eq!((digest, size), (Digest::of(&bytes), bytes.len() as u64));
    let body = client.blob(&image, digest).whole().await.unwrap();
    assert!(body.collect(32 << 20).await.unwrap() == bytes);

    let empty = client.upload(&image).await.unwrap();
    assert_eq!(empty.finish().await.unwrap(), (Digest::of(b""), 0));
    let mut dropped = client.upload(&image).await.unwrap();
    dropped.write(b"x").await.unwrap();
    dropped.cancel().await;
}

#[tokio::test]
async fn blobs_are_mounted_across_repositories() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let (from, to) = (
        reference(&registry.host, "a"),
        reference(&registry.host, "b"),
    );
    let bytes = noise(5000);
    let digest = Digest::of(&bytes);
    assert!(!client.mount_blob(&to, digest, &from).await.unwrap());
    push(&client, &from, &bytes).await;
    assert!(!client.blob_exists(&to, digest).await.unwrap());
    assert!(client.mount_blob(&to, digest, &from).await.unwrap());
    assert!(client.blob_exists(&to, digest).await.unwrap());
    let elsewhere: Reference = "registry.example/a".parse().unwrap();
    assert!(!client.mount_blob(&to, digest, &elsewhere).await.unwrap());
}

#[tokio::test]
async fn what_does_not_exist_is_named() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let image = reference(&registry.host, "no/such:tag");
    let error = client.manifest(&image).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.status()),
        (ErrorKind::NotFound, Some(404))
    );
    let text = error.to_string();
    assert!(text.contains(&format!("manifest {image}")), "{text}");
    assert!(text.contains("MANIFEST_UNKNOWN"), "{text}");
    assert!(!text.contains('\n'), "{text}");
    let error = client.resolve(&image).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let digest = Digest::of(b"nowhere");
    let error = client.blob(&image, digest).whole().await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains(&digest.to_string()), "{error}");
}

#[tokio::test]
async fn wrong_bytes_are_not_accepted_by_either_side() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let image = reference(&registry.host, "app:v1");
    let source = BlobSource::bytes(Bytes::from_static(b"these"));
    let error = client
        .push_blob(&image, Digest::of(b"those"), 5, source)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    let error = client
        .push_manifest(
            &image.with_digest(Digest::of(b"other")),
            media_type::OCI_MANIFEST,
            Bytes::from_static(b"{}"),
        )
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DigestMismatch);

    // Bits that rot in the registry's store.
    let layer = noise(10_000);
    push(&client, &image, &layer).await;
    let digest = Digest::of(&layer);
    let file = registry.storage().join(format!(
        "data/docker/registry/v2/blobs/sha256/{}/{}/data",
        &digest.hex()[..2],
        digest.hex()
    ));
    let mut rotten = layer.to_vec();
    rotten[5000] ^= 1;
    std::fs::write(file, rotten).unwrap();
    let body = client.blob(&image, digest).whole().await.unwrap();
    let error = body.collect(10_000).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DigestMismatch);
}

#[tokio::test]
async fn basic_authentication_from_the_docker_configuration() {
    use base64::Engine as _;

    let registry = DockerRegistry::with_password();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let client = Client::new(Config {
        docker_configs: vec![path.clone()],
        ..support::config()
    })
    .unwrap();
    let image = reference(&registry.host, "app:v1");
    let log_in = |password: &str| {
        let pair = format!("{USER}:{password}");
        let auth = base64::engine::general_purpose::STANDARD.encode(pair);
        let json = format!(
            r#"{{"auths": {{"{}": {{"auth": "{auth}"}}}}}}"#,
            registry.host
        );
        std::fs::write(&path, json).unwrap();
    };

    let error = client.manifest(&image).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    let remedy = format!("docker login {}", registry.host);
    assert!(error.to_string().contains(&remedy), "{error}");

    log_in("hunter2");
    let error = client.manifest(&image).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(!format!("{error} {error:?}").contains("hunter2"));

    // Corrected credentials are seen without a new client.
    log_in(PASSWORD);
    let bytes = noise(70_000);
    push(&client, &image, &bytes).await;
    let body = client
        .blob(&image, Digest::of(&bytes))
        .whole()
        .await
        .unwrap();
    assert!(body.collect(70_000).await.unwrap() == bytes);
    let error = client.manifest(&image).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

fn artifact_for(image: &Descriptor, kind: &str, content: &Bytes) -> Manifest {
    let empty = Bytes::from_static(b"{}");
    let mut artifact: Manifest = serde_json::from_slice(&manifest_of(&empty, content)).unwrap();
    artifact.annotations = [("note".to_owned(), kind.to_owned())].into();
    let other = &mut artifact.other;
    other.insert("artifactType".to_owned(), kind.into());
    other.insert("subject".to_owned(), serde_json::to_value(image).unwrap());
    artifact
}

/// Debian's registry lists no referrers: the tag has to do.
#[tokio::test]
async fn an_artifact_is_found_with_the_image_it_refers_to() {
    let registry = DockerRegistry::start();
    let client = support::client();
    let tag = reference(&registry.host, "team/app:v1");
    let config = Bytes::from_static(b"{}");
    let content = noise(100);
    push(&client, &tag, &config).await;
    push(&client, &tag, &content).await;
    let bytes = manifest_of(&config, &content);
    let image = Descriptor::new(
        media_type::OCI_MANIFEST,
        Digest::of(&bytes),
        bytes.len() as u64,
    );
    let put = client.push_manifest(&tag, media_type::OCI_MANIFEST, bytes);
    put.await.unwrap();
    let referrers = async |kind| client.referrers(&tag, image.digest, kind).await.unwrap();
    assert!(referrers("a/profile").await.is_empty());

    let mut pushed = Vec::new();
    for kind in ["a/profile", "a/signature", "a/profile"] {
        let artifact = artifact_for(&image, kind, &noise(100 + pushed.len()));
        push(&client, &tag, &noise(100 + pushed.len())).await;
        pushed.push(client.push_referrer(&tag, &artifact).await.unwrap());
    }
    let found = referrers("a/profile").await;
    assert_eq!(found.len(), 1, "the second takes the place of the first");
    assert_eq!(found[0].digest, pushed[2]);
    assert_eq!(found[0].annotations["note"], "a/profile");
    assert_eq!(referrers("a/signature").await[0].digest, pushed[1]);
    assert!(referrers("a/sbom").await.is_empty());
    // The image is what it was.
    assert_eq!(client.manifest(&tag).await.unwrap().digest, image.digest);
}
