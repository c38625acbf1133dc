//! The service against a model of it, call by call.

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;
use sluice_oci::Digest;

use super::{Rig, key, layer, lazy};
use crate::service::*;

/// A call, over few names so that they meet.
#[derive(Debug, Clone)]
enum Op {
    Prepare(u8, u8),
    Lazy(u8, u8, u8),
    View(u8, u8),
    Commit(u8, u8),
    Remove(u8),
    Label(u8, u8),
    Cleanup,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0..6u8;
    prop_oneof![
        4 => (name.clone(), name.clone()).prop_map(|(a, b)| Op::Prepare(a, b)),
        4 => (name.clone(), name.clone(), 0..3u8).prop_map(|(a, b, c)| Op::Lazy(a, b, c)),
        2 => (name.clone(), name.clone()).prop_map(|(a, b)| Op::View(a, b)),
        4 => (name.clone(), name.clone()).prop_map(|(a, b)| Op::Commit(a, b)),
        3 => name.clone().prop_map(Op::Remove),
        1 => (name, 0..2u8).prop_map(|(a, b)| Op::Label(a, b)),
        1 => Just(Op::Cleanup),
        1 => Just(Op::Restart),
    ]
}

#[derive(Debug, Clone, PartialEq)]
struct Model {
    kind: Kind,
    parent: Option<String>,
    layer: Option<u8>,
    labelled: bool,
    /// The key that it was committed from.
    was: Option<String>,
}

type World = BTreeMap<String, Model>;

/// What the interface says must happen, in as few words as possible.
fn expect(world: &mut World, op: &Op) -> Option<ErrorKind> {
    use ErrorKind::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound};
    let parent_of = |world: &World, n: u8| -> Result<Option<String>, ErrorKind> {
        let Some(parent) = parent_name(n) else {
            return Ok(None);
        };
        match world.get(&parent) {
            None => Err(NotFound),
            Some(model) if model.kind != Kind::Committed => Err(InvalidArgument),
            Some(_) => Ok(Some(parent)),
        }
    };
    let name = |n: u8| format!("n{n}");
    let result = match *op {
        Op::Prepare(a, b) | Op::View(a, b) => parent_of(world, b).and_then(|parent| {
            if world.contains_key(&name(a)) {
                return Err(AlreadyExists);
            }
            let kind = match op {
                Op::View(..) => Kind::View,
                _ => Kind::Active,
            };
            let model = Model {
                kind,
                parent,
                layer: None,
                labelled: false,
                was: None,
            };
            world.insert(name(a), model);
            Ok(())
        }),
        Op::Lazy(a, b, layer) => parent_of(world, b).and_then(|parent| {
            let serves = |m: &&Model| m.kind == Kind::Committed && m.parent == parent;
            let others = format!("{}@", name(a));
            let others = || world.iter().filter(|(n, _)| n.starts_with(&others));
            let named = world.get(&name(a)).filter(serves);
            let serving = named.or_else(|| others().map(|(_, m)| m).find(serves));
            let serving = serving.map(|m| m.layer);
            if let Some(Some(other)) = serving
                && other != layer
            {
                // Nobody knows which is right: each gets its own.
                let own = Model {
                    kind: Kind::Active,
                    parent,
                    layer: None,
                    labelled: false,
                    was: None,
                };
                return match world.contains_key("extract") {
                    true => Err(AlreadyExists),
                    false => {
                        world.insert("extract".to_owned(), own);
                        Ok(())
                    }
                };
            }
            if serving.is_none() {
                // Only its beginning is fixed when the name itself is taken.
                let mut at = name(a);
                if world.contains_key(&at) {
                    let free = |at: &String| !world.contains_key(at);
                    at = (0..).map(|n| format!("{at}@{n}")).find(free).unwrap();
                }
                let model = Model {
                    kind: Kind::Committed,
                    parent,
                    layer: Some(layer),
                    labelled: false,
                    was: None,
                };
                world.insert(at, model);
            }
            Err(AlreadyExists)
        }),
        Op::Commit(a, b) => match world.get(&name(b)) {
            // The same again: the first answer may have been lost.
            None => match world.get_mut(&name(a)) {
                Some(model) if model.was == Some(name(b)) => {
                    model.labelled = false;
                    Ok(())
                }
                _ => Err(NotFound),
            },
            Some(_) if world.contains_key(&name(a)) => Err(AlreadyExists),
            Some(model) if model.kind != Kind::Active => Err(FailedPrecondition),
            Some(_) => {
                let mut model = world.remove(&name(b)).unwrap();
                model.kind = Kind::Committed;
                model.labelled = false;
                model.was = Some(name(b));
                world.insert(name(a), model);
                Ok(())
            }
        },
        Op::Remove(a) => match world.get(&name(a)) {
            None => Err(NotFound),
            Some(_) if world.values().any(|m| m.parent == Some(name(a))) => Err(FailedPrecondition),
            Some(_) => {
                world.remove(&name(a));
                Ok(())
            }
        },
        Op::Label(a, on) => match world.get_mut(&name(a)) {
            None => Err(NotFound),
            Some(model) => {
                model.labelled = on == 1;
                Ok(())
            }
        },
        Op::Cleanup | Op::Restart => Ok(()),
    };
    result.err()
}

/// Name 0 as a parent means none.
fn parent_name(n: u8) -> Option<String> {
    (n > 0).then(|| format!("n{n}"))
}

fn apply(rig: &mut Rig, op: &Op) -> Option<ErrorKind> {
    let name = |n: u8| format!("n{n}");
    let parent = |n: u8| parent_name(n).unwrap_or_default();
    let result = match *op {
        Op::Prepare(a, b) => rig.prepare(&name(a), &parent(b), Labels::new()).map(drop),
        Op::View(a, b) => rig.view(&name(a), &parent(b)).map(drop),
        Op::Lazy(a, b, n) => rig
            .prepare("extract", &parent(b), lazy(&name(a), layer(n)))
            .map(drop),
        Op::Commit(a, b) => rig.commit(&name(a), &name(b)),
        Op::Remove(a) => rig.remove(&name(a)),
        Op::Label(a, on) => rig.run(async |s| {
            let value = if on == 1 { "yes" } else { "" };
            let labels = Labels::from([("x".to_owned(), value.to_owned())]);
            s.update(key(&name(a)), labels, &["labels.x".to_owned()])
                .await
                .map(drop)
        }),
        Op::Cleanup => rig.run(async |s| s.cleanup().await),
        Op::Restart => {
            rig.restart();
            Ok(())
        }
    };
    result.err().map(|error| error.kind())
}

/// A snapshot's name without the number that a second one of a target has.
fn plain(name: &str) -> String {
    name.split('@').next().unwrap_or_default().to_owned()
}

type Seen = (String, Kind, Option<String>, bool);

fn seen(world: &World) -> Vec<Seen> {
    let mut all: Vec<Seen> = world
        .iter()
        .map(|(n, m)| (plain(n), m.kind, m.parent.clone(), m.labelled))
        .collect();
    all.sort_by_key(|s| format!("{s:?}"));
    all
}

/// Does the same to the service and to the model, and compares them.
fn agree(ops: &[Op]) -> Result<(), TestCaseError> {
    let mut rig = Rig::new();
    let mut world = World::new();
    for op in ops {
        let expected = expect(&mut world, op);
        prop_assert_eq!(apply(&mut rig, op), expected, "{:?}", op);
    }
    let list = rig.list();
    let mut found: Vec<Seen> = list
        .iter()
        .map(|i| {
            let parent = i.parent.as_ref().map(|p| p.to_string());
            (
                plain(i.name.as_str()),
                i.kind,
                parent,
                i.labels.contains_key("x"),
            )
        })
        .collect();
    found.sort_by_key(|s| format!("{s:?}"));
    prop_assert_eq!(found, seen(&world));
    // Nothing more on disk than the records need, and nothing less.
    let layers: HashSet<Digest> = world.values().filter_map(|m| m.layer).map(layer).collect();
    prop_assert_eq!(rig.fake.on_disk(), layers);
    let directories = world.values().filter(|m| m.layer.is_none()).count();
    prop_assert_eq!(rig.directories(), directories);
    let by_name: HashMap<_, _> = list.iter().map(|i| (i.name.clone(), i)).collect();
    for info in &list {
        let mounts = rig.mounts(info.name.as_str());
        if info.kind == Kind::Committed {
            prop_assert_eq!(mounts.unwrap_err().kind(), ErrorKind::FailedPrecondition);
            continue;
        }
        let mut depth = 0;
        let mut next = info.parent.as_ref();
        while let Some(parent) = next {
            depth += 1;
            next = by_name[parent].parent.as_ref();
        }
        let mount = mounts.unwrap().remove(0);
        let lower = mount.options.last().unwrap();
        match (info.kind, depth) {
            (_, 0) | (Kind::View, 1) => prop_assert_eq!(mount.fs_type, "bind"),
            _ => prop_assert_eq!(lower.split(':').count(), depth),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_the_model(ops in prop::collection::vec(op(), 1..40)) {
        agree(&ops)?;
    }
}

#[test]
fn regression_what_serves_under_another_name_is_not_made_twice() {
    let again = [
        Op::Prepare(5, 0),
        Op::Lazy(5, 0, 0),
        Op::Remove(5),
        Op::Lazy(5, 0, 0),
    ];
    agree(&again).unwrap();
}
