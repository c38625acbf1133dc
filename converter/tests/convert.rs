//! Conversion through OCI layouts, end to end.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use common::{Bench, gunzip, gzip, noise, tar, usual_tar};
use serde_json::json;
use sluice_converter::{LayerOutcome, Lazy, Platforms};
use sluice_layer::profile::{Profile, Read};
use sluice_layer::write::Chunking;
use sluice_layer::{Format, LayerAnnotations, StartReads};
use sluice_oci::{Digest, Platform, media_type};

const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

#[tokio::test]
async fn layers_become_seekable_and_everything_else_stays() {
    for format in FORMATS {
        let (bench, layer) = Bench::simple(&usual_tar());
        let source = bench.snapshot("in");
        let (report, _) = bench.convert(&bench.conversion(format)).await.unwrap();
        assert_eq!(bench.snapshot("in"), source);
        assert_eq!((report.converted, report.kept), (1, 0));

        let before = bench.manifest_of("in", report.source);
        let mut after = bench.manifest_of("out", report.digest);
        assert_eq!(after.annotations, before.annotations);
        assert_eq!(after.other, before.other);
        let new = after.layers.remove(0);
        assert_eq!(
            new.media_type,
            match format {
                Format::Estargz => media_type::OCI_LAYER_GZIP,
                Format::ZstdChunked => media_type::OCI_LAYER_ZSTD,
            }
        );
        assert!(
            new.annotations
                .contains_key("containerd.io/snapshot/stargz/toc.digest")
        );
        assert_ne!(new.digest, layer.digest);

        let mut old_config = bench.document("in", before.config.digest);
        let new_config = bench.document("out", after.config.digest);
        match format {
            // The tar is untouched, and so is all that depends on it.
            Format::ZstdChunked => assert_eq!(before.config, after.config),
            Format::Estargz => {
                let diff_id = Digest::of(&gunzip(&bench.blob_path("out", new.digest)));
                old_config["rootfs"]["diff_ids"][0] = json!(diff_id);
                assert_eq!(new_config, old_config);
            }
        }

        let verification = bench.verify("out").await;
        assert_eq!(verification.defects, Vec::<String>::new());
        assert_eq!((verification.layers, verification.seekable), (1, 1));
        // 50,000 and 40,000 bytes in pieces of 16 KiB, one small file, and
        // perhaps a landmark, which is no file of the tree.
        assert_eq!(verification.chunks, 4 + 3 + 1);
    }
}

#[tokio::test]
async fn the_number_of_workers_does_not_matter() {
    let files: Vec<(String, Vec<u8>)> = (0..60)
        .map(|i| (format!("f{i}"), noise(i, (i as usize * 977) % 40_000)))
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, c)| (n.as_str(), &**c)).collect();
    for format in FORMATS {
        let mut digests = Vec::new();
        for workers in [1, 2, 7] {
            let (bench, _) = Bench::simple(&tar(&files));
            let mut conversion = bench.conversion(format);
            conversion.options.chunking = Chunking::Content;
            conversion.options.chunk_size = 8 << 10;
            conversion.workers = NonZero::new(workers).unwrap();
            let (report, _) = bench.convert(&conversion).await.unwrap();
            digests.push(report.digest);
        }
        assert_eq!(digests[0], digests[1]);
        assert_eq!(digests[0], digests[2]);
    }
}

#[tokio::test]
async fn seekable_layers_are_kept_unless_forced() {
    for format in FORMATS {
        let (bench, _) = Bench::simple(&usual_tar());
        let conversion = bench.conversion(format);
        let (first, _) = bench.convert(&conversion).await.unwrap();
        let (again, log) = bench
            .convert_between("out", "again", &conversion)
            .await
            .unwrap();
        assert_eq!(again.digest, first.digest);
        assert_eq!(again.already_seekable, 1);
        assert_eq!(log.0.lock().unwrap()[0].1, LayerOutcome::AlreadySeekable);
        assert_eq!(bench.verify("again").await.defects, Vec::<String>::new());

        let mut forced = bench.conversion(format);
        forced.force = true;
        forced.options.chunk_size = 4096;
        let (report, _) = bench
            .convert_between("out", "forced", &forced)
            .await
            .unwrap();
        assert_eq!(report.converted, 1);
        assert_ne!(report.digest, first.digest);
        assert_eq!(bench.verify("forced").await.defects, Vec::<String>::new());
    }
}

#[tokio::test]
async fn formats_convert_into_each_other() {
    let (bench, _) = Bench::simple(&usual_tar());
    bench
        .convert(&bench.conversion(Format::Estargz))
        .await
        .unwrap();
    let there = bench.conversion(Format::ZstdChunked);
    let (report, _) = bench.convert_between("out", "zstd", &there).await.unwrap();
    assert_eq!(report.converted, 1);
    let back = bench.conversion(Format::Estargz);
    let (report, _) = bench.convert_between("zstd", "back", &back).await.unwrap();
    let first = bench.manifest_of("back", report.digest);
    for layout in ["zstd", "back"] {
        assert_eq!(bench.verify(layout).await.defects, Vec::<String>::new());
    }
    // A layer forgets what it was: one TOC, one landmark, one format's
    // annotations.
    let keys: Vec<&String> = first.layers[0].annotations.keys().collect();
    assert_eq!(
        keys,
        [
            "containerd.io/snapshot/sluice.toc-position",
            "containerd.io/snapshot/stargz/toc.digest",
            "io.containers.estargz.uncompressed-size"
        ]
    );
    let names = gunzip(&bench.blob_path("back", first.layers[0].digest));
    let mut archive = tar::Archive::new(names.as_slice());
    let entries = archive.entries().unwrap().map(|e| e.unwrap());
    let tocs = entries.filter(|e| e.path().unwrap().to_str() == Some("stargz.index.json"));
    assert_eq!(tocs.count(), 1);
}

fn platform(os: &str, architecture: &str, variant: Option<&str>) -> Platform {
    Platform {
        architecture: architecture.to_owned(),
        os: os.to_owned(),
        variant: variant.map(str::to_owned),
        other: Default::default(),
    }
}

/// An index of two images, an attestation about each, and an unknown field.
fn indexed() -> Bench {
    let bench = Bench::new();
    let mut entries = Vec::new();
    for (seed, arch, variant) in [(1, "amd64", None), (2, "arm64", Some("v8"))] {
        let own = bench.layer(&tar(&[("bin/x", &noise(seed, 30_000))]));
        let shared = bench.layer(&usual_tar());
        let mut image = bench.manifest(&[shared, own]);
        image.platform = Some(platform("linux", arch, variant));
        let about = image.digest;
        entries.push(image);
        let statement = bench.blob("application/vnd.in-toto+json", b"{\"statement\":1}");
        let config = bench.blob(
            media_type::OCI_CONFIG,
            format!("{{\"n\":{seed}}}").as_bytes(),
        );
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": [statement]});
        let manifest = manifest.to_string();
        let mut attestation = bench.blob(media_type::OCI_MANIFEST, manifest.as_bytes());
        attestation.platform = Some(platform("unknown", "unknown", None));
        let link = ("vnd.docker.reference.digest".to_owned(), about.to_string());
        attestation.annotations.extend([link]);
        entries.push(attestation);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_INDEX,
        "manifests": entries,
        "annotations": {"i": "kept"},
        "x-unknown": 1,
    });
    let index = bench.blob(media_type::OCI_INDEX, index.to_string().as_bytes());
    bench.name(&[("v1", &index)]);
    bench
}

#[tokio::test]
async fn indexes_stay_indexes_and_attestations_follow_their_image() {
    let bench = indexed();
    let (report, log) = bench
        .convert(&bench.conversion(Format::Estargz))
        .await
        .unwrap();
    // The layer that both images share is converted once.
    assert_eq!(report.converted, 3);
    assert_eq!(log.0.lock().unwrap().len(), 3);
    let before = bench.document("in", report.source);
    let after = bench.document("out", report.digest);
    assert_eq!(after["annotations"], before["annotations"]);
    assert_eq!(after["x-unknown"], 1);
    for (image, statement) in [(0, 1), (2, 3)] {
        let entry = &after["manifests"][image];
        assert_eq!(entry["platform"], before["manifests"][image]["platform"]);
        assert_ne!(entry["digest"], before["manifests"][image]["digest"]);
        let attestation = &after["manifests"][statement];
        assert_eq!(
            attestation["digest"],
            before["manifests"][statement]["digest"]
        );
        assert_eq!(
            attestation["annotations"]["vnd.docker.reference.digest"],
            entry["digest"]
        );
    }
    assert_eq!(bench.verify("out").await.defects, Vec::<String>::new());
}

#[tokio::test]
async fn only_wanted_platforms_are_kept() {
    let bench = indexed();
    let mut conversion = bench.conversion(Format::ZstdChunked);
    conversion.platforms = Platforms::Only(vec!["linux/arm64".parse().unwrap()]);
    let (report, _) = bench.convert(&conversion).await.unwrap();
    let after = bench.document("out", report.digest);
    let entries = after["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0]["platform"]["architecture"], "arm64");
    assert_eq!(entries[1]["platform"]["os"], "unknown");
    assert_eq!(bench.verify("out").await.defects, Vec::<String>::new());

    conversion.platforms = Platforms::Only(vec!["windows/amd64".parse().unwrap()]);
    let error = bench
        .convert_between("in", "none", &conversion)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the image has nothing for windows/amd64; it is for linux/amd64, linux/arm64/v8"
    );
    assert!(!bench.path("none").exists());
}

#[tokio::test]
async fn docker_types_become_oci_types() {
    let bench = Bench::new();
    let usual = usual_tar();
    let layer = bench.blob(media_type::DOCKER_LAYER_GZIP, &gzip(&usual));
    let plain = bench.blob(media_type::DOCKER_LAYER, &tar(&[("a", b"b")]));
    let ids = [Digest::of(&usual), Digest::of(&tar(&[("a", b"b")]))];
    let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": ids}});
    let config = bench.blob(media_type::DOCKER_CONFIG, config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type::DOCKER_MANIFEST,
        "config": config,
        "layers": [layer, plain],
    });
    let mut manifest = bench.blob(media_type::DOCKER_MANIFEST, manifest.to_string().as_bytes());
    manifest.platform = Some(platform("linux", "amd64", None));
    let index = json!({
        "schemaVersion": 2,
        "mediaType": media_type::DOCKER_INDEX,
        "manifests": [manifest],
    });
    let index = bench.blob(media_type::DOCKER_INDEX, index.to_string().as_bytes());
    bench.name(&[("v1", &index)]);
    for (format, layout) in [(Format::Estargz, "gzip"), (Format::ZstdChunked, "zstd")] {
        let conversion = bench.conversion(format);
        let (report, _) = bench
            .convert_between("in", layout, &conversion)
            .await
            .unwrap();
        let index = bench.document(layout, report.digest);
        assert_eq!(index["mediaType"], media_type::OCI_INDEX);
        assert_eq!(index["manifests"][0]["mediaType"], media_type::OCI_MANIFEST);
        let digest = index["manifests"][0]["digest"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        let manifest = bench.manifest_of(layout, digest);
        assert_eq!(
            manifest.media_type.as_deref(),
            Some(media_type::OCI_MANIFEST)
        );
        assert_eq!(manifest.config.media_type, media_type::OCI_CONFIG);
        let expected = match format {
            Format::Estargz => media_type::OCI_LAYER_GZIP,
            Format::ZstdChunked => media_type::OCI_LAYER_ZSTD,
        };
        assert!(manifest.layers.iter().all(|l| l.media_type == expected));
        assert_eq!(bench.verify(layout).await.defects, Vec::<String>::new());
    }
}

#[tokio::test]
async fn layers_that_cannot_be_seekable_stay() {
    let bench = Bench::new();
    let mut foreign = bench.blob(
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        b"elsewhere",
    );
    fs::remove_file(bench.blob_path("in", foreign.digest)).unwrap();
    foreign
        .other
        .insert("urls".to_owned(), json!(["https://example.com/x"]));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    builder
        .append_link(&mut header, "link", "in/a/lower/layer")
        .unwrap();
    let dangling = builder.into_inner().unwrap();
    let layers = [
        (foreign.clone(), Digest::of(b"foreign")),
        bench.layer(&dangling),
        bench.layer(&usual_tar()),
    ];
    let manifest = bench.manifest(&layers);
    bench.name(&[("v1", &manifest)]);
    let (report, log) = bench
        .convert(&bench.conversion(Format::Estargz))
        .await
        .unwrap();
    assert_eq!((report.converted, report.kept), (1, 2));
    let after = bench.manifest_of("out", report.digest);
    assert_eq!(after.layers[0].digest, foreign.digest);
    assert_eq!(after.layers[0].other, foreign.other);
    assert_eq!(after.layers[1], layers[1].0);
    let why = |at: usize| match &log.0.lock().unwrap()[at].1 {
        LayerOutcome::Kept { why } => why.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(why(0), "it may not be distributed");
    assert_eq!(
        why(1),
        "'link' is a hard link to 'in/a/lower/layer', which is not in the layer"
    );
    assert_eq!(bench.verify("out").await.defects, Vec::<String>::new());
}

#[tokio::test]
async fn prioritized_files_are_reported_and_found() {
    for format in FORMATS {
        let bench = Bench::new();
        let (lower, upper) = (
            usual_tar(),
            tar(&[("app/main", &noise(5, 20_000)), ("app/rest", b"r")]),
        );
        let manifest = bench.manifest(&[bench.layer(&lower), bench.layer(&upper)]);
        bench.name(&[("v1", &manifest)]);
        let mut conversion = bench.conversion(format);
        conversion.prioritized = ["/usr/bin/tool", "app/main", "/no/such"]
            .map(str::to_owned)
            .to_vec();
        let (_, log) = bench.convert(&conversion).await.unwrap();
        assert_eq!(*log.1.lock().unwrap(), ["no/such"]);
        let inspection = sluice_converter::inspect(&common::client(), &bench.location("out"))
            .await
            .unwrap();
        let prioritized: Vec<_> = inspection.images[0]
            .layers
            .iter()
            .map(|layer| match &layer.lazy {
                Lazy::Yes(toc) => toc.prioritized.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(prioritized, [["/usr/bin/tool"], ["/app/main"]]);
        assert_eq!(bench.verify("out").await.defects, Vec::<String>::new());
        assert!(
            fs::read_dir(bench.path("scratch"))
                .unwrap()
                .next()
                .is_none()
        );
    }
}

#[tokio::test]
async fn an_image_says_which_chunks_its_start_reads() {
    for format in FORMATS {
        let bench = Bench::new();
        let main = noise(5, 20_000);
        let layer = tar(&[("app/rest", b"r"), ("app/main", &main), ("app/all", b"a")]);
        let manifest = bench.manifest(&[bench.layer(&layer)]);
        bench.name(&[("v1", &manifest)]);
        let mut conversion = bench.conversion(format);
        conversion.options.chunk_size = 4096;
        conversion.prioritized = ["app/main", "app/all"].map(str::to_owned).to_vec();
        let read = |offset, len| Read {
            layer: 0,
            path: b"app/main".as_slice().into(),
            offset,
            len,
            at: Duration::ZERO,
            starts: 1,
            unit: None,
        };
        let reads = vec![read(4096, 1), read(12_287, 2)];
        let profile = Profile::new(1, vec![manifest.digest], reads).unwrap();
        conversion.start_reads = Some(Arc::new(StartReads::of(&profile)));
        let (report, _) = bench.convert(&conversion).await.unwrap();
        let manifest = bench.manifest_of("out", report.digest);
        let annotations = LayerAnnotations::parse(&manifest.layers[0].annotations).unwrap();
        let chunks = annotations.start_chunks().unwrap();
        let read: Vec<usize> = (0..16).filter(|&at| chunks.contains(at)).collect();
        // Of a file that the profile does not name, all.
        assert_eq!(read, [1, 2, 3, 5], "{format}");
        assert_eq!(bench.verify("out").await.defects, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_layout_keeps_its_other_images() {
    let (bench, _) = Bench::simple(&usual_tar());
    let conversion = bench.conversion(Format::Estargz);
    bench.convert(&conversion).await.unwrap();
    let other = format!("oci:{}:other", bench.path("out").display())
        .parse()
        .unwrap();
    let zstd = bench.conversion(Format::ZstdChunked);
    let log = std::sync::Arc::new(common::Log::default());
    sluice_converter::convert(&common::client(), &bench.location("in"), &other, &zstd, log)
        .await
        .unwrap();
    // The same name again replaces its entry.
    bench.convert(&conversion).await.unwrap();
    let index = fs::read_to_string(bench.path("out/index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let mut names: Vec<&str> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| {
            m["annotations"]["org.opencontainers.image.ref.name"]
                .as_str()
                .unwrap()
        })
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["other", "v1"]);
}
