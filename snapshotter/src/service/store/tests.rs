use std::fs;

use redb::{ReadableDatabase, TableDefinition};
use tempfile::tempdir;

use super::*;
use crate::service::{ErrorKind, Key};
use crate::testing::Tmpfs;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap()
}

fn new(store: &Store, key: &str) -> NewSnapshot {
    NewSnapshot {
        id: store.new_id(),
        key: Key::try_from(key).unwrap(),
        parent: None,
        labels: Labels::new(),
        now: SystemTime::now(),
    }
}

#[test]
fn a_newer_version_is_refused_and_left_alone() {
    let root = tempdir().unwrap();
    drop(Store::open(root.path()).unwrap());
    let path = root.path().join("state.redb");
    let set = |version: u64| {
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        {
            let mut meta = transaction.open_table(META).unwrap();
            meta.insert("version", version).unwrap();
        }
        transaction.commit().unwrap();
    };
    set(ROOT_VERSION + 1);
    let error = Store::open(root.path()).unwrap_err().to_string();
    for part in ["state.redb", "newer version", "version 2", "--root"] {
        assert!(error.contains(part), "{error}");
    }
    let database = redb::Database::open(&path).unwrap();
    let meta = database.begin_read().unwrap().open_table(META).unwrap();
    assert_eq!(
        meta.get("version").unwrap().unwrap().value(),
        ROOT_VERSION + 1
    );
}

#[test]
fn a_root_is_opened_once() {
    let root = tempdir().unwrap();
    let _store = Store::open(root.path()).unwrap();
    let error = Store::open(root.path()).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
}

#[test]
fn a_damaged_database_is_set_aside_and_made_anew_from_its_copy() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 5] = [
        |bytes| *bytes = b"not a database".repeat(400),
        Vec::clear,
        |bytes| bytes.truncate(5000),
        |bytes| bytes[100..4000].fill(0xa5),
        |bytes| {
            let end = bytes.len();
            bytes[4096..end].fill(0x5a);
        },
    ];
    let root = tempdir().unwrap();
    let path = root.path().join("state.redb");
    let runtime = runtime();
    let layer = Digest::of(b"layer");
    let all = |store: &Store| {
        let store = runtime.block_on(store.list(Vec::new())).unwrap();
        let all: Vec<_> = store
            .into_iter()
            .map(|info| (info.name, info.parent))
            .collect();
        all
    };
    let mut expected = Vec::new();
    for (number, damage) in damages.into_iter().enumerate() {
        let store = Store::open(root.path()).unwrap();
        runtime.block_on(async {
            for (n, name) in ["active", "gone", "lazy"].into_iter().enumerate() {
                let mut new = new(&store, &format!("{name}-{number}"));
                if n == 2 {
                    store.create_remote(new, layer).await.unwrap();
                } else {
                    new.labels.insert("a".into(), "b".into());
                    store.create(Kind::Active, new).await.unwrap();
                }
            }
            let gone = Key::try_from(format!("gone-{number}")).unwrap();
            store.remove(gone).await.unwrap();
            let mut child = new(&store, &format!("child-{number}"));
            child.parent = Some(Key::try_from(format!("lazy-{number}")).unwrap());
            store.create(Kind::View, child).await.unwrap();
        });
        let next = store.new_id();
        expected = all(&store);
        runtime.block_on(store.close());
        drop(store);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, &bytes).unwrap();

        let store = Store::open(root.path()).unwrap();
        assert!(store.was_rebuilt(), "{number}");
        assert_eq!(all(&store), expected, "{number}");
        assert!(store.new_id() >= next, "{number}");
        let aside = root.path().join(format!("state.redb.damaged-{number}"));
        assert_eq!(fs::read(aside).unwrap(), bytes);
        // Links are there as well: the layer is in use, the parent kept.
        runtime.block_on(async {
            assert!(store.layer_in_use(layer).await.unwrap());
            let parent = Key::try_from(format!("lazy-{number}")).unwrap();
            let error = store.remove(parent).await.unwrap_err();
            assert!(matches!(error, Error::HasChildren(_)), "{error}");
            store.close().await;
        });
    }
    assert_eq!(expected.len(), 15);
    let store = Store::open(root.path()).unwrap();
    assert!(!store.was_rebuilt());
    assert_eq!(all(&store), expected);
}

#[test]
fn the_copy_of_the_database_does_not_grow_for_ever_and_survives_damage() {
    let root = tempdir().unwrap();
    let runtime = runtime();
    let journal = root.path().join("state.journal");
    let store = Store::open(root.path()).unwrap();
    runtime.block_on(async {
        store
            .create(Kind::Active, new(&store, "stays"))
            .await
            .unwrap();
        for _ in 0..60 {
            let mut big = new(&store, "comes and goes");
            big.labels.insert("x".into(), "y".repeat(100_000));
            store.create(Kind::Active, big).await.unwrap();
            let key = Key::try_from("comes and goes").unwrap();
            store.remove(key).await.unwrap();
        }
    });
    assert!(fs::metadata(&journal).unwrap().len() < 5 << 20);
    runtime.block_on(store.close());
    drop(store);
    // A line that is cut short costs what it says, and nothing else.
    let mut bytes = fs::read(&journal).unwrap();
    bytes.extend_from_slice(b"0000");
    fs::write(&journal, bytes).unwrap();
    fs::write(root.path().join("state.redb"), "rubbish").unwrap();
    let store = Store::open(root.path()).unwrap();
    assert!(store.was_rebuilt());
    assert_eq!(runtime.block_on(store.list(Vec::new())).unwrap().len(), 1);
    runtime.block_on(store.close());
}

#[test]
fn changes_that_come_together_are_all_answered() {
    let root = tempdir().unwrap();
    let store = Arc::new(Store::open(root.path()).unwrap());
    runtime().block_on(async {
        let tasks = (0..600).map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                // Every third name is taken: one that refuses must not take
                // the others of its transaction along.
                let new = new(&store, &format!("s{}", n / 3 * 3));
                store.create(Kind::Active, new).await
            })
        });
        let mut made = 0;
        for task in tasks.collect::<Vec<_>>() {
            match task.await.unwrap() {
                Ok(()) => made += 1,
                Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists),
            }
        }
        assert_eq!(made, 200);
        assert_eq!(store.list(Vec::new()).await.unwrap().len(), 200);
        store.close().await;
        assert!(matches!(
            store.create(Kind::Active, new(&store, "late")).await,
            Err(Error::Store(StoreError::Stopping))
        ));
    });
}

#[test]
fn after_a_full_disk_it_goes_on() {
    let disk = Tmpfs::new("8m");
    let root = disk.path();
    let store = Store::open(root).unwrap();
    runtime().block_on(async {
        store
            .create(Kind::Active, new(&store, "before"))
            .await
            .unwrap();
        let ballast = root.join("ballast");
        let full = fs::write(&ballast, vec![1; 16 << 20]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        let mut made = Vec::new();
        let error = loop {
            let mut big = new(&store, &format!("big-{}", made.len()));
            big.labels.insert("x".into(), "y".repeat(100_000));
            let key = big.key.clone();
            match store.create(Kind::Active, big).await {
                Ok(()) => made.push(key),
                Err(error) => break error,
            }
            assert!(made.len() < 1000, "the disk is never full");
        };
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
        assert!(error.to_string().contains("free space"), "{error}");
        fs::remove_file(ballast).unwrap();
        store
            .create(Kind::Active, new(&store, "after"))
            .await
            .unwrap();
        // What was answered with success is there, the rest is not.
        let all = store.list(Vec::new()).await.unwrap();
        assert_eq!(all.len(), made.len() + 2);
        store.close().await;
    });
}

#[test]
fn on_a_read_only_file_system_it_tells_what_it_knows() {
    let disk = Tmpfs::new("8m");
    let open = || Store::open(disk.path()).unwrap();
    let create = async |store: &Store, key| store.create(Kind::Active, new(store, key)).await;
    let names = async |store: &Store| {
        let all = store.list(Vec::new()).await.unwrap();
        let all = all.into_iter().map(|info| info.name.as_str().to_owned());
        all.collect::<Vec<_>>()
    };
    runtime().block_on(async {
        let store = open();
        create(&store, "a").await.unwrap();
        store.close().await;
        drop(store);
        disk.set_read_only(true);
        let store = open();
        let error = create(&store, "b").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(
            error.to_string().contains("has become read-only"),
            "{error}"
        );
        assert_eq!(names(&store).await, ["a"]);
        // What was repaired is used at once.
        disk.set_read_only(false);
        create(&store, "b").await.unwrap();
        store.close().await;
        drop(store);
        assert_eq!(names(&open()).await, ["a", "b"]);
    });
}

#[test]
fn regression_a_commit_whose_answer_was_lost_succeeds_again() {
    let root = tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let key = |text: &str| Key::try_from(text).unwrap();
    let commit = |name: &str| {
        let (name, active) = (key(name), key("ns/1/active"));
        store.commit(
            active,
            name,
            Labels::new(),
            Usage::default(),
            SystemTime::now(),
        )
    };
    runtime().block_on(async {
        let active = new(&store, "ns/1/active");
        let id = active.id;
        store.create(Kind::Active, active).await.unwrap();
        commit("ns/2/name").await.unwrap();
        commit("ns/2/name").await.unwrap();
        // containerd counts on between its attempts, and does not know of the
        // first.
        let would = store.would_commit(key("ns/1/active"), key("ns/5/name"));
        assert_eq!(would.await.unwrap(), id);
        commit("ns/5/name").await.unwrap();
        let names: Vec<_> = store.list(Vec::new()).await.unwrap();
        let names: Vec<_> = names.iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["ns/5/name"]);

        // What is another's, or is in use, is left alone.
        for name in ["ns/6/other", "other/5/name"] {
            let refused = commit(name).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::NotFound, "{name}");
        }
        let child = NewSnapshot {
            parent: Some(key("ns/5/name")),
            ..new(&store, "ns/7/child")
        };
        store.create(Kind::View, child).await.unwrap();
        let refused = commit("ns/8/name").await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotFound);
    });
}
