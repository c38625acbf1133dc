//! Layers that are opened before they are asked for.

use super::*;

fn expected(n: u8, image_layers: &[Digest]) -> LayerRequest {
    LayerRequest {
        reference: "r.io/app:1".parse().unwrap(),
        digest: layer(n),
        manifest_digest: None,
        annotations: Default::default(),
        image_layers: image_layers.to_vec(),
    }
}

/// The labels of a layer with those above it, which the data plane opens with
/// it.
fn with_others(target: &str, layers: &[Digest]) -> Labels {
    let mut labels = lazy(target, layers[0]);
    let names: Vec<String> = layers.iter().map(ToString::to_string).collect();
    let label = "containerd.io/snapshot/cri.image-layers";
    labels.insert(label.to_owned(), names.join(","));
    labels
}

impl Rig {
    fn release_unclaimed(&self, patience: Duration) {
        self.run(async |s| s.release_unclaimed(patience).await);
    }
}

#[test]
fn what_was_expected_is_there_and_stays_as_long_as_something_refers_to_it() {
    let rig = Rig::new();
    let request = expected(1, &[layer(1), layer(2)]);
    rig.run(async |s| s.expect(request.clone()).await);
    assert_eq!(rig.fake.on_disk(), [layer(1)].into());
    assert_eq!(rig.fake.state.lock().requests, [request]);
    // It is not a snapshot's yet: nothing is listed.
    assert!(rig.list().is_empty());

    assert_kind(
        rig.prepare("x", "", lazy("chain-1", layer(1))),
        ErrorKind::AlreadyExists,
    );
    rig.release_unclaimed(Duration::ZERO);
    assert_eq!(rig.fake.on_disk(), [layer(1)].into());
    rig.prepare("c", "chain-1", Labels::new()).unwrap();
    rig.remove("c").unwrap();
    rig.remove("chain-1").unwrap();
    assert!(rig.fake.on_disk().is_empty());
}

#[test]
fn what_nobody_asked_for_goes_after_a_while() {
    let rig = Rig::new();
    rig.run(async |s| s.expect(expected(1, &[layer(1)])).await);
    rig.release_unclaimed(Duration::from_secs(3600));
    assert_eq!(rig.fake.on_disk(), [layer(1)].into());
    rig.release_unclaimed(Duration::ZERO);
    assert!(rig.fake.on_disk().is_empty());
    // It is looked at once: what comes later is not touched.
    rig.fake.state.lock().on_disk.insert(layer(1));
    rig.release_unclaimed(Duration::ZERO);
    assert_eq!(rig.fake.on_disk(), [layer(1)].into());
}

#[test]
fn what_was_opened_with_the_layer_below_goes_too() {
    let rig = Rig::new();
    let labels = with_others("chain-1", &[layer(1), layer(2), layer(3)]);
    assert_kind(rig.prepare("x", "", labels), ErrorKind::AlreadyExists);
    // As the data plane does.
    let opened = [layer(2), layer(3)];
    rig.fake.state.lock().on_disk.extend(opened);
    // The client asks for the second and breaks off.
    assert_kind(
        rig.prepare("x", "chain-1", lazy("chain-2", layer(2))),
        ErrorKind::AlreadyExists,
    );
    rig.release_unclaimed(Duration::ZERO);
    assert_eq!(rig.fake.on_disk(), [layer(1), layer(2)].into());
}

#[test]
fn an_expected_layer_that_cannot_be_lazy_or_removed_harms_nobody() {
    let rig = Rig::new();
    rig.fake.state.lock().not_lazy.insert(layer(1));
    rig.run(async |s| s.expect(expected(1, &[layer(1)])).await);
    let mounts = rig.prepare("x", "", lazy("chain-1", layer(1))).unwrap();
    assert_eq!(mounts[0].fs_type, "bind");

    rig.run(async |s| s.expect(expected(2, &[layer(2)])).await);
    rig.fake.state.lock().broken.insert(layer(2));
    rig.release_unclaimed(Duration::ZERO);
    assert_eq!(rig.fake.on_disk(), [layer(2)].into());
    rig.fake.state.lock().broken.clear();
    rig.run(async |s| s.cleanup().await).unwrap();
    assert!(rig.fake.on_disk().is_empty());
}
