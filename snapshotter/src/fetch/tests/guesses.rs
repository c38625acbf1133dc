//! What is fetched beside what is asked for.

use std::time::Duration;

use tokio::time::sleep;

use super::simulated::World;
use crate::fetch::elf::tests::library;
use crate::sample::{Layout, Sample, SampleFile, noise};

const MODULE: usize = 5000;

fn file(name: String, size: usize) -> SampleFile {
    let content = noise(name.len() as u64 + size as u64, size);
    SampleFile { name, content }
}

/// Packages of modules, as an installer leaves them: sources, of which nobody
/// reads any, between what is read. Distinct sizes make distinct contents.
fn packages(count: usize) -> Sample {
    let mut files = Vec::new();
    for package in 0..count {
        for (kind, directory) in [("pyc", "__pycache__/"), ("py", "")] {
            files.extend((0..20).map(|module| {
                let number = package * 20 + module;
                let name = match module {
                    0 => "__init__".to_owned(),
                    _ => format!("module{number}"),
                };
                let size = MODULE + number * 2 + usize::from(kind == "py");
                file(
                    format!("lib/package{package}/{directory}{name}.{kind}"),
                    size,
                )
            }));
        }
    }
    Sample::new(files, &Layout::default())
}

#[tokio::test(start_paused = true)]
async fn files_of_a_kind_come_with_the_first_and_namesakes_with_theirs() {
    let count = 6;
    let sample = packages(count);
    let world = World::new(20, std::slice::from_ref(&sample));
    let compiled = |package: usize| package * 40..package * 40 + 20;
    let sources = |package: usize| package * 40 + 20..package * 40 + 40;
    world.read_file(0, 0).await;
    // What has been asked for on a guess arrives without a further read.
    sleep(Duration::from_secs(1)).await;
    assert!(world.present(0, compiled(0)), "its package");
    assert!(!world.present(0, [compiled(1).start]));
    world.read_file(0, compiled(1).start).await;
    sleep(Duration::from_secs(1)).await;
    assert!(
        world.present(0, (2..count).map(|package| compiled(package).start)),
        "the first module of every package, as it was of two"
    );
    assert!(!world.present(0, [compiled(2).start + 1]));
    for package in 0..count {
        for module in compiled(package) {
            world.read_file(0, module).await;
        }
    }
    let requests = world.asked().len();
    assert!(requests <= 3 * count, "{requests} requests");
    for package in 0..count {
        assert!(!sources(package).any(|source| world.present(0, [source])));
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_loader_reads_comes_with_the_beginning() {
    let (read, code, write) = (4, 5, 6);
    let mut content = library(&[
        (read, 0, 100_000),
        (code, 100_000, 5_000_000),
        (write, 5_100_000, 300_000),
    ]);
    content.extend(noise(3, 5_400_000 - content.len()));
    let large = SampleFile {
        name: "usr/lib/liblarge.so.1".to_owned(),
        content,
    };
    let world = World::new(20, &[Sample::new(vec![large], &Layout::default())]);
    world.read(0, 0, 4096).await;
    sleep(Duration::from_secs(1)).await;
    let dir = world.layers[0].dir();
    assert!(dir.has(0, 512 << 10), "tables and the first code");
    assert!(dir.has(5_100_000, 300_000), "data");
    assert!(!dir.has(2_000_000, 1));
    let before = world.asked().len();
    world.read(0, 5_100_000, 300_000).await;
    assert_eq!(world.asked().len(), before);
    assert!(world.bytes() < 1_500_000, "{}", world.bytes());
}
