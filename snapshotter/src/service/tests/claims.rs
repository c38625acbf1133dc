//! Layers that are not, or not known to be, what they are named for.

use super::*;

#[test]
fn nothing_new_is_made_from_what_is_not_what_it_is_named_for() {
    let rig = Rig::new();
    let (below, top) = (layer(10), chain_id(layer(10), layer(20)));
    let (below, top) = (below.to_string(), top.to_string());
    assert_kind(
        rig.prepare("x", "", lazy(&below, layer(1))),
        ErrorKind::AlreadyExists,
    );
    assert_kind(
        rig.prepare("x", &below, lazy(&top, layer(2))),
        ErrorKind::AlreadyExists,
    );
    assert_eq!(rig.standing(&top), "unknown");
    rig.prepare("early", &top, Labels::new()).unwrap();

    rig.proves(layer(1), layer(10), false);
    assert_eq!(rig.standing(&below), "verified");
    assert_eq!(rig.standing(&top), "unknown");
    // What contradicts is looked at again before it is believed.
    rig.proves(layer(2), layer(66), false);
    assert_eq!(rig.standing(&top), "unknown");
    assert!(rig.fake.state.lock().settling.contains(&layer(2)));
    rig.prepare("still", &top, Labels::new()).unwrap();
    rig.proves(layer(2), layer(66), true);
    assert_eq!(rig.standing(&top), "contradicted");

    let refused = [
        rig.prepare("late", &top, Labels::new()),
        rig.view("look", &top),
        rig.prepare("y", &top, lazy("sha256:above", layer(3))),
        // Another namespace pulls the same image.
        rig.prepare("z", &below, lazy(&top, layer(2))),
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        let text = error.to_string();
        let named = [
            &top,
            &layer(2).to_string(),
            &layer(66).to_string(),
            "r.io/app:1",
        ];
        assert!(named.iter().all(|part| text.contains(*part)), "{text}");
    }
    // Who runs goes on, and the honest layer is not in the way of others.
    assert!(rig.mounts("early").is_ok());
    rig.prepare("below", &below, Labels::new()).unwrap();

    rig.proves(layer(2), layer(20), true);
    assert_eq!(rig.standing(&top), "verified");
    rig.prepare("late", &top, Labels::new()).unwrap();
}

#[test]
fn nobody_is_given_anothers_layer_before_it_is_known_to_be_theirs() {
    let rig = Rig::new();
    let name = layer(10).to_string();
    let why = "containerd.io/snapshot/sluice.not-lazy";
    assert_kind(
        rig.prepare("x", "", lazy(&name, layer(1))),
        ErrorKind::AlreadyExists,
    );
    let unpacked = |key: &str, labels: Labels| {
        rig.prepare(key, "", labels).unwrap();
        rig.stat(key).unwrap().labels[why].clone()
    };
    let told = unpacked("a", lazy(&name, layer(2)));
    assert!(told.contains(&layer(1).to_string()), "{told}");
    // The same layer with another table of contents is looked at.
    let mut other = lazy(&name, layer(1));
    other.insert(
        "containerd.io/snapshot/stargz/toc.digest".into(),
        "t".into(),
    );
    rig.fake.state.lock().not_lazy.insert(layer(1));
    assert_eq!(unpacked("b", other.clone()), "it has no table of contents");
    rig.fake.state.lock().not_lazy.clear();
    assert_kind(
        rig.prepare("c", "", other.clone()),
        ErrorKind::AlreadyExists,
    );

    rig.proves(layer(1), layer(66), true);
    let told = unpacked("d", lazy(&name, layer(2)));
    assert!(told.contains(&layer(1).to_string()), "{told}");
    rig.proves(layer(1), layer(10), false);
    for labels in [lazy(&name, layer(2)), other] {
        assert_kind(rig.prepare("e", "", labels), ErrorKind::AlreadyExists);
    }
}
