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
fn a_file_that_is_no_database_is_an_error() {
    let root = tempdir().unwrap();
    fs::write(root.path().join("state.redb"), "not a database".repeat(400)).unwrap();
    let error = Store::open(root.path()).unwrap_err().to_string();
    assert!(error.contains("state.redb"), "{error}");
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
