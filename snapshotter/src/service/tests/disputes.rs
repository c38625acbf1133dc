//! Layers by whose names images mean different things.

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use rustix::process::Pid;

use super::*;

const CALLER: Option<Pid> = Pid::from_raw(7);

/// containerd's images, how often it was asked for them, and its containers.
#[derive(Debug, Default)]
struct FakeMetadata {
    images: Mutex<Vec<NamedImage>>,
    asked: Mutex<Vec<String>>,
    broken: bool,
}

impl Metadata for FakeMetadata {
    fn images<'a>(
        &'a self,
        caller: Option<Pid>,
        namespace: &'a str,
    ) -> BoxFuture<'a, ImagesAnswer> {
        assert_eq!(caller, CALLER, "each is asked about its own");
        self.asked.lock().push(namespace.to_owned());
        let images = match self.broken {
            true => Err("it is not there".into()),
            false => Ok(Some(self.images.lock().clone())),
        };
        Box::pin(async { images })
    }

    fn program<'a>(
        &'a self,
        caller: Option<Pid>,
        namespace: &'a str,
        container: &'a str,
    ) -> BoxFuture<'a, Option<Program>> {
        assert_eq!(caller, CALLER, "each is asked about its own");
        let program = Program {
            words: vec![format!("{namespace} {container}")],
            ..Program::default()
        };
        Box::pin(async { Some(program) })
    }
}

/// Two lazily mounted layers, one over the other, and containerd's images.
struct Disputed {
    rig: Rig,
    images: Arc<FakeMetadata>,
    below: String,
    top: String,
}

impl Disputed {
    fn new(images: FakeMetadata) -> Self {
        let (below, top) = (layer(10), chain_id(layer(10), layer(20)));
        let (below, top) = (below.to_string(), top.to_string());
        let mut rig = Rig::new();
        rig.stop();
        let images = Arc::new(images);
        let snapshots = rig.start().unwrap().with_metadata(images.clone());
        rig.snapshots = Some(Arc::new(snapshots));
        let served = rig.prepare("x", "", lazy(&below, layer(1)));
        assert_kind(served, ErrorKind::AlreadyExists);
        let served = rig.prepare("x", &below, lazy(&top, layer(2)));
        assert_kind(served, ErrorKind::AlreadyExists);
        Self {
            rig,
            images,
            below,
            top,
        }
    }

    /// Another image that containerd has.
    fn image(&self, name: &str, blobs: [Digest; 2]) {
        let names = [&self.below, &self.top].map(|name| name.parse().unwrap());
        let named = NamedLayers {
            layers: std::iter::zip(names, blobs.map(Some)).collect(),
            cut: false,
        };
        self.images.images.lock().push(NamedImage {
            name: name.to_owned(),
            named: Arc::new(named),
        });
    }

    fn finds(&self, layer: Digest, diff_id: Digest, certain: bool) {
        let proof = Proof {
            diff_id: Some(diff_id),
            padded: None,
            tree_fits: true,
            certain,
        };
        self.rig.fake.state.lock().truths.insert(layer, Ok(proof));
    }

    fn settle(&self, name: &str, labels: &Labels) -> Result<(), Error> {
        let snapshots = self.rig.snapshots.as_ref().unwrap();
        let (name, parent) = (key(name), key(&self.top));
        let settled = snapshots.settle_disputes(CALLER, &name, Some(&parent), labels);
        self.rig.runtime.block_on(settled)
    }

    /// As for a container.
    fn start(&self) -> Result<Vec<Mount>, Error> {
        self.settle("k8s.io/7/c", &Labels::new())?;
        let number = self.rig.list().len();
        let name = format!("k8s.io/{number}/c");
        self.rig.prepare(&name, &self.top, Labels::new())
    }

    fn settling(&self) -> Vec<Digest> {
        std::mem::take(&mut self.rig.fake.state.lock().settling)
    }
}

#[test]
fn what_all_images_mean_the_same_by_is_started_at_once() {
    let disputed = Disputed::new(FakeMetadata::default());
    disputed.image("r.io/app:1", [layer(1), layer(2)]);
    disputed.image("r.io/app:same", [layer(1), layer(2)]);
    disputed.settle("k8s.io/7/c", &Labels::new()).unwrap();
    assert_eq!(disputed.settling(), []);
    assert_eq!(*disputed.images.asked.lock(), ["k8s.io"]);
    // Nobody asks for what containerd unpacks into, or who is not containerd.
    disputed.image("r.io/other:1", [layer(3), layer(2)]);
    let target = lazy("sha256:above", layer(3));
    disputed.settle("k8s.io/8/extract", &target).unwrap();
    disputed.settle("c", &Labels::new()).unwrap();
    assert_eq!(disputed.images.asked.lock().len(), 1);
}

#[test]
fn the_data_plane_is_told_what_a_container_runs() {
    let disputed = Disputed::new(FakeMetadata::default());
    let rig = &disputed.rig;
    rig.prepare("k8s.io/7/c", &disputed.top, Labels::new())
        .unwrap();
    rig.prepare("k8s.io/8/bare", "", Labels::new()).unwrap();
    let snapshots = rig.snapshots.as_ref().unwrap();
    rig.runtime.block_on(async {
        snapshots
            .view(key("k8s.io/9/v"), Some(key(&disputed.top)), Labels::new())
            .await
            .unwrap();
        for name in ["k8s.io/7/c", "k8s.io/8/bare", "k8s.io/9/v"] {
            snapshots.tell_program(CALLER, &key(name)).await.unwrap();
        }
        assert!(
            snapshots
                .tell_program(CALLER, &key("k8s.io/6/none"))
                .await
                .is_err()
        );
    });
    let told = rig.fake.state.lock().runs.clone();
    let program = Program {
        words: vec!["k8s.io c".to_owned()],
        ..Program::default()
    };
    assert_eq!(told, [(vec![layer(1), layer(2)], Some(program))]);
}

#[test]
fn what_another_image_means_something_else_by_is_found_out_first() {
    let disputed = Disputed::new(FakeMetadata::default());
    disputed.image("r.io/app:1", [layer(1), layer(2)]);
    disputed.image("r.io/other:1", [layer(3), layer(2)]);
    // The upper layer is in nobody's way.
    disputed.finds(layer(1), layer(10), true);
    disputed.start().unwrap();
    assert_eq!(disputed.settling(), [layer(1)]);
    disputed.start().unwrap();
    assert_eq!(disputed.settling(), [], "it is known");
    // And once all is known, nobody is asked any more.
    let asked = disputed.images.asked.lock().len();
    disputed.rig.proves(layer(2), layer(20), true);
    disputed.start().unwrap();
    assert_eq!(disputed.images.asked.lock().len(), asked);
}

#[test]
fn a_layer_that_is_anothers_is_refused_as_soon_as_somebody_means_the_other() {
    let disputed = Disputed::new(FakeMetadata::default());
    disputed.image("r.io/other:1", [layer(1), layer(3)]);
    // What contradicts at first is looked at again.
    disputed.finds(layer(2), layer(66), true);
    disputed.rig.proves(layer(2), layer(66), false);
    let error = disputed.start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(
        error.to_string().contains(&layer(66).to_string()),
        "{error}"
    );
    assert!(disputed.settling().contains(&layer(2)));
}

#[test]
fn who_cannot_know_in_time_is_told_what_to_do() {
    let disputed = Disputed::new(FakeMetadata::default());
    disputed.image("r.io/other:1", [layer(3), layer(2)]);
    let told = |why: &str| {
        let error = disputed.start().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let text = error.to_string();
        let named = [&layer(1).to_string(), "r.io/app:1", "r.io/other:1", why];
        assert!(named.iter().all(|part| text.contains(part)), "{text}");
        assert!(
            text.contains("try again") && text.contains("remove"),
            "{text}"
        );
    };
    told("it takes too long");
    let mut state = disputed.rig.fake.state.lock();
    state.truths.insert(layer(1), Err("the registry is gone"));
    drop(state);
    told("the registry is gone");
    // What was found out is of no use.
    let proof = Proof {
        diff_id: Some(layer(66)),
        padded: None,
        tree_fits: true,
        certain: false,
    };
    let mut state = disputed.rig.fake.state.lock();
    state.truths.insert(layer(1), Ok(proof));
    drop(state);
    told("does not tell");
}

#[test]
fn without_an_answer_nothing_unknown_is_started() {
    let disputed = Disputed::new(FakeMetadata {
        broken: true,
        ..FakeMetadata::default()
    });
    let error = disputed.start().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.contains(&disputed.top) && text.contains("it is not there"),
        "{text}"
    );
    disputed.rig.proves(layer(1), layer(10), false);
    disputed.rig.proves(layer(2), layer(20), false);
    disputed.start().unwrap();
    // A parent that is not there is for the call itself to tell.
    let snapshots = disputed.rig.snapshots.as_ref().unwrap();
    let (c, gone, none) = (key("k8s.io/9/c"), key("gone"), Labels::new());
    let settled = snapshots.settle_disputes(CALLER, &c, Some(&gone), &none);
    assert!(disputed.rig.runtime.block_on(settled).is_ok());
}
