//! What is fetched beside what is asked for.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::sleep;

use super::simulated::{CHUNK, World, one_file, scattered, small_files};
use crate::fetch::elf::tests::library;
use crate::fetch::{Dependencies, LazyFile, LazyLayer};
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

/// Whatever a library's constants name is this file.
#[derive(Debug)]
struct Names(LazyFile);

impl Dependencies for Names {
    fn of<'f>(&'f self, _: &'f LazyFile) -> BoxFuture<'f, Vec<LazyFile>> {
        async { Vec::new() }.boxed()
    }

    fn named_in<'f>(
        &'f self,
        _: &'f LazyFile,
        texts: Vec<Vec<u8>>,
    ) -> BoxFuture<'f, Vec<LazyFile>> {
        assert_eq!(texts, [b"/etc/data"]);
        async { vec![self.0.clone()] }.boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn what_came_as_a_guess_is_looked_into_once_it_is_known_to_be_needed() {
    let mut content = library(&[(4, 0, 1000)]);
    content.extend(b"\0/etc/data\0");
    content.resize(1000, b'.');
    let guessed = SampleFile {
        name: "usr/lib/libguessed.so".to_owned(),
        content,
    };
    let mut files = vec![file("usr/lib/libread.so".to_owned(), MODULE), guessed];
    files.extend((0..100).map(|number| file(format!("opt/{number}"), 20_000 + number)));
    files.push(file("etc/data".to_owned(), MODULE));
    let data = files.len() - 1;
    let world = World::new(20, &[Sample::new(files, &Layout::default())]);
    let layer = &world.layers[0];
    let begins = |number| layer.dir().chunks().get(world.chunks(0, number)[0]);
    let at = |number| LazyFile::at(layer, begins(number).data_offset).unwrap();
    layer.set_dependencies(Arc::new(Names(at(data))));
    world.read_file(0, 0).await;
    sleep(Duration::from_secs(1)).await;
    assert!(world.present(0, [1]), "as its neighbour");
    assert!(!world.present(0, [data]), "nobody needs it so far");
    LazyLayer::foresee_start(&[at(1)]);
    sleep(Duration::from_secs(1)).await;
    assert!(world.present(0, [data]));
    assert!(!world.present(0, [data / 2]));
}

#[tokio::test(start_paused = true)]
async fn neighbours_of_small_files_are_fetched_while_they_are_read() {
    let world = World::new(20, &[small_files(600)]);
    // A program's libraries: most of one directory, little of the next.
    let dense = (0..300).filter(|file| file % 4 != 1);
    for file in dense.clone() {
        world.read_file(0, file).await;
    }
    let requests = world.asked().len();
    assert!(requests <= dense.count() * 2 / 5, "{requests} requests");
    for file in (300..600).step_by(20) {
        world.read_file(0, file).await;
    }
    let read = (225 + 15) * CHUNK as u64;
    let limit = (read * 2 + (2 << 20)) * 11 / 10;
    assert!(world.bytes() <= limit, "{} > {limit}", world.bytes());
}

#[tokio::test(start_paused = true)]
async fn where_a_miss_is_dear_what_lies_behind_is_fetched() {
    let files = (0..600).map(|index| SampleFile {
        name: format!("{:02}/{index}", index / 10),
        content: noise(index as u64, CHUNK),
    });
    let layout = Layout {
        chunk: CHUNK,
        ..Layout::default()
    };
    let sample = Sample::new(files.collect(), &layout);
    // A program that reads one file in most of its directories.
    let start = async |round_trip| {
        let world = World::new(round_trip, std::slice::from_ref(&sample));
        for directory in (0..60).filter(|directory| directory % 4 != 1) {
            world.read_file(0, directory * 10).await;
        }
        assert!(world.bytes() <= world.all_bytes(0), "each byte once");
        (world.asked().len(), world.bytes())
    };
    let (near, few) = start(20).await;
    let (far, many) = start(100).await;
    let read = 45 * CHUNK as u64;
    assert!(few <= (read * 2 + (2 << 20)) * 11 / 10, "{few} bytes");
    assert!(far * 2 < near, "{far} requests, {near} at 20 ms");
    assert!(many > few, "{many} bytes, {few} at 20 ms");
}

#[tokio::test(start_paused = true)]
async fn a_file_read_here_and_there_is_fetched_in_growing_parts() {
    let chunk = 32 << 10;
    let sample = one_file(256 * chunk, chunk);
    let faults = async |count: usize| {
        let world = World::new(20, std::slice::from_ref(&sample));
        for index in scattered(256).take(count) {
            world.read(0, (index * chunk) as u64, 4096).await;
        }
        (world.asked().len(), world.bytes())
    };
    // All of it is read in the end.
    let (requests, _) = faults(256).await;
    assert!(requests < 100, "{requests} requests");
    // Little of it is.
    let (_, bytes) = faults(16).await;
    let read = 16 * chunk as u64;
    assert!(bytes < (read * 2 + (2 << 20)) * 11 / 10, "{bytes}");
}

#[tokio::test(start_paused = true)]
async fn regression_a_few_chunks_in_a_row_do_not_fetch_the_whole_file() {
    let chunk = 64 << 10;
    let world = World::new(20, &[one_file(500 * chunk, chunk)]);
    // As page faults of a mapped library: some pages here and there use up
    // what may be guessed, and then some in a row look like a sequence.
    for place in (25..500).step_by(25) {
        world.read(0, (place * chunk) as u64, 4096).await;
    }
    for place in (0..500).step_by(50) {
        for step in 5..9 {
            world.read(0, ((place + step) * chunk) as u64, 4096).await;
        }
    }
    // The common guesses, and as much again as was read in a row.
    let read = (19 + 40) * chunk as u64;
    let limit = (read * 3 + (2 << 20)) * 11 / 10;
    assert!(world.bytes() <= limit, "{} > {limit}", world.bytes());
}
