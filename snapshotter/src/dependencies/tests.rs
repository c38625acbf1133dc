//! What programs and modules load is fetched before they do.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::libraries::tests::{linked, with_interpreter};
use super::python::tests::compiled;
use super::{ImageDependencies, Memory};
use crate::fetch::tests::simulated::World;
use crate::fetch::{Dependencies, LazyLayer, Plan};
use crate::layer_dir::ChunkId;
use crate::sample::{Layout, Sample, SampleFile, noise};
use crate::service::Program;

/// So large that files are no neighbours, and guessed by nothing else.
const BETWEEN: usize = 3 << 20;

/// Files with noise between them, so that none comes along with another.
fn sample(files: &[(&str, Vec<u8>)]) -> Sample {
    let mut all = Vec::new();
    for (number, (name, content)) in files.iter().enumerate() {
        all.push(SampleFile {
            name: (*name).to_owned(),
            content: content.clone(),
        });
        all.push(SampleFile {
            name: format!("srv/{number}/data"),
            content: noise(number as u64 + 1, BETWEEN),
        });
    }
    Sample::new(all, &Layout::default())
}

/// A world in which it is known what files load.
fn world(samples: &[Sample]) -> World {
    let world = World::new(20, samples);
    let dependencies: Arc<dyn Dependencies> =
        Arc::new(ImageDependencies::new(&world.layers, &Memory::default()));
    for layer in &world.layers {
        layer.set_dependencies(Arc::clone(&dependencies));
    }
    world
}

fn module(names: &[&str]) -> Vec<u8> {
    compiled(3495, names)
}

const LIB: &str = "usr/lib/python3.11";
const SITE: &str = "usr/local/lib/python3.11/dist-packages";

fn in_lib(name: &str) -> String {
    format!("{LIB}/__pycache__/{name}.cpython-311.pyc")
}

fn in_site(package: &str, name: &str) -> String {
    format!("{SITE}/{package}/__pycache__/{name}.cpython-311.pyc")
}

/// Whether the file at each of these positions of `sample` is there.
fn present(world: &World, layer: usize, files: &[usize]) -> Vec<bool> {
    // Between two of them is one of noise.
    files
        .iter()
        .map(|file| world.present(layer, [file * 2]))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn modules_come_with_the_one_that_imports_them() {
    let (names, init) = (["helper", "json", "Exception"], "__init__");
    let base = sample(&[
        (&in_lib("json"), module(&["re"])),
        (&in_lib("re"), module(&["enum"])),
        (&in_lib("enum"), module(&["far"])),
        (&in_lib("far"), module(&["beyond"])),
        (&in_lib("unused"), module(&[])),
        (
            &format!("{LIB}/lib-dynload/beyond.cpython-311-x86_64-linux-gnu.so"),
            noise(1, 5000),
        ),
    ]);
    let package = sample(&[
        (
            &in_site("tool", init),
            module(&["tool.part", "piece", "os"]),
        ),
        (&in_site("tool", "helper"), module(&[])),
        (&in_site("tool/part", init), module(&[])),
        (&in_site("tool/part", "piece"), module(&names)),
        (&in_site("other", "helper"), module(&[])),
        (&in_site("other", init), module(&[])),
    ]);
    let world = world(&[base, package]);
    world.read_file(1, 0).await;
    sleep(Duration::from_secs(2)).await;
    // The package's own part, a module of that, and what it names: one of the
    // package above, and one of the layer below, which names a third.
    assert_eq!(
        present(&world, 1, &[0, 1, 2, 3, 4, 5]),
        [true, true, true, true, false, false]
    );
    assert_eq!(
        present(&world, 0, &[0, 1, 2, 3, 4, 5]),
        [true, true, true, true, false, false]
    );
    // One of them is read indeed: it goes on from there.
    world.read_file(0, 0).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(
        present(&world, 0, &[0, 1, 2, 3, 4, 5]),
        [true, true, true, true, false, true]
    );
    let before = world.asked().len();
    for (layer, file) in [(1, 2), (1, 3), (1, 1), (0, 1), (0, 2), (0, 3)] {
        world.read_file(layer, file * 2).await;
    }
    let asked = world.asked()[before..].to_vec();
    assert!(asked.len() <= 1, "only what the last one names: {asked:?}");
}

/// But only once something tells that Python runs: any text may be one.
#[tokio::test(start_paused = true)]
async fn sources_count_where_nothing_is_compiled() {
    let text = |text: &str| text.as_bytes().to_vec();
    for (starter, is_python) in [
        (text("#!/usr/bin/env python3.12\n"), true),
        (linked(&["libpython3.12.so.1.0"], ""), true),
        (text("#!/bin/sh\n"), false),
        (linked(&["libc.so.6"], ""), false),
    ] {
        let world = world(&[sample(&[
            ("usr/bin/starter", starter),
            (
                "app/main.py",
                text("import part.one\ndef f():\n    import two\n"),
            ),
            ("app/part/__init__.py", text("'''nothing'''\n")),
            (
                "app/part/one.py",
                text("from . import (three,\n    four as five)\n"),
            ),
            ("app/part/three.py", text("\n")),
            ("app/part/four.py", text("\n")),
            ("app/two/__init__.py", text("\n")),
        ])]);
        world.read_file(0, 0).await;
        sleep(Duration::from_secs(1)).await;
        world.read_file(0, 2).await;
        sleep(Duration::from_secs(2)).await;
        let mut imported = [is_python; 5];
        imported[4] = false;
        assert_eq!(present(&world, 0, &[2, 3, 4, 5, 6]), imported);
    }
}

#[tokio::test(start_paused = true)]
async fn libraries_come_with_what_was_linked_with_them() {
    let linker = "lib64/ld-linux.so.2";
    let program = with_interpreter(&format!("/{linker}"), &["libone.so.1"], "");
    let arch = std::env::consts::ARCH;
    let world = world(&[
        sample(&[
            (
                &format!("usr/lib/{arch}-linux-gnu/libone.so.1"),
                linked(&["libtwo.so"], "$ORIGIN/../own"),
            ),
            ("usr/lib/own/libtwo.so", linked(&[], "")),
            ("usr/lib/libother.so", linked(&[], "")),
            (linker, linked(&[], "")),
            ("etc/ld.so.cache", noise(5, 3000)),
        ]),
        sample(&[
            ("opt/script", b"#!/usr/bin/env program -x\n".to_vec()),
            ("usr/bin/program", program),
        ]),
    ]);
    world.read_file(1, 0).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(present(&world, 1, &[1]), [true]);
    assert_eq!(
        present(&world, 0, &[0, 1, 2, 3, 4]),
        [true, true, false, true, true]
    );
}

/// A library linked with others, and these texts among its constants.
fn with_constants(libraries: &[&str], texts: &[&str]) -> Vec<u8> {
    let mut file = linked(libraries, "");
    file.push(0);
    for text in texts {
        file.extend([text.as_bytes(), b"\0"].concat());
    }
    file
}

/// A program tells in its constants what it opens: these come with it, and so
/// do the modules that an extension of Python's imports.
#[tokio::test(start_paused = true)]
async fn what_constants_name_comes_with_them() {
    let with_constants = |texts: &[&str]| with_constants(&["libcrypto.so.3"], texts);
    let program = with_constants(&[
        "/etc/tool.conf",
        "/etc/large.conf",
        "/etc/none",
        "pack.used",
    ]);
    let far = [program, vec![b'x'; 200 << 10]].concat();
    let extension = with_constants(&["pack.used", "a dotted. text", "/etc/localtime"]);
    let world = world(&[sample(&[
        ("usr/bin/tool", far),
        ("etc/tool.conf", b"a=1\n".to_vec()),
        ("etc/large.conf", noise(5, 300 << 10)),
        ("usr/lib/libcrypto.so.3", linked(&[], "")),
        ("usr/lib/ssl/openssl.cnf", b"b=2\n".to_vec()),
        (&format!("{SITE}/ext.cpython-311.so"), extension),
        (&in_site("pack", "__init__"), module(&[])),
        (&in_site("pack", "used"), module(&[])),
        ("etc/localtime", noise(6, 100)),
        (&in_lib("site"), module(&[])),
    ])]);
    world.read_file(0, 0).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(
        present(&world, 0, &[1, 2, 3, 4, 6, 7]),
        [true, false, true, true, false, false]
    );
    // A module tells that Python runs.
    world.read_file(0, 9 * 2).await;
    sleep(Duration::from_secs(1)).await;
    world.read_file(0, 5 * 2).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(present(&world, 0, &[6, 7, 8]), [true, true, true]);
}

/// What nearly every start reads is found by its usual places.
#[tokio::test(start_paused = true)]
async fn what_any_start_reads_is_known() {
    let arch = std::env::consts::ARCH;
    let linker = match arch {
        "x86_64" => "lib64/ld-linux-x86-64.so.2".to_owned(),
        arch => format!("lib/ld-linux-{arch}.so.1"),
    };
    let world = World::new(
        20,
        &[sample(&[
            ("etc/passwd", b"root\n".to_vec()),
            ("etc/group", b"root\n".to_vec()),
            (&linker, linked(&[], "")),
            ("etc/ld.so.cache", noise(5, 3000)),
            (
                &format!("usr/lib/{arch}-linux-gnu/libc.so.6"),
                with_constants(&["libother.so.1"], &["/etc/localtime"]),
            ),
            ("etc/shadow", b"root\n".to_vec()),
            ("usr/lib/libother.so.1", linked(&[], "")),
            ("etc/localtime", noise(6, 100)),
        ])],
    );
    let known = ImageDependencies::new(&world.layers, &Memory::default());
    LazyLayer::foresee_start(&known.of_any_user().await);
    LazyLayer::foresee_start(&known.of_any_program().await);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(
        present(&world, 0, &[0, 1, 2, 3, 4, 5, 6, 7]),
        [true, true, true, true, true, false, false, false]
    );
    // What has come before it is known what files load is looked into then.
    world.layers[0].set_dependencies(Arc::new(known));
    sleep(Duration::from_secs(2)).await;
    assert_eq!(present(&world, 0, &[5, 6, 7]), [false, true, true]);
}

/// What a command names is looked up as it would be.
#[tokio::test(start_paused = true)]
async fn what_a_container_runs_comes_before_it_runs() {
    let text = |text: &str| text.as_bytes().to_vec();
    let sample = sample(&[
        ("etc/passwd", text("root\n")),
        ("etc/group", text("root\n")),
        ("usr/bin/serve", text("second\n")),
        ("opt/bin/serve", text("#!/bin/sh\n")),
        ("bin/sh", linked(&[], "")),
        ("srv/app.conf", text("a=1\n")),
        ("srv/--all", text("d\n")),
        ("usr/bin/python3", linked(&[], "")),
        (&in_site("pack", "__init__"), module(&["inner"])),
        (&in_site("pack", "inner"), module(&[])),
        (&in_site("pack", "other"), module(&[])),
        ("srv/near.py", text("import pack.other\n")),
    ]);
    let world = World::new(20, &[sample]);
    let memory = Memory::default();
    let known = Arc::new(ImageDependencies::new(&world.layers, &memory));
    world.layers[0].set_dependencies(Arc::clone(&known) as Arc<dyn Dependencies>);
    let run = async |words: &[&str]| {
        let program = Program {
            words: words.iter().map(|&word| word.to_owned()).collect(),
            path: "/nowhere:/opt/bin:/usr/bin".to_owned(),
            directory: "/srv".to_owned(),
        };
        LazyLayer::foresee_start(&known.of_program(program).await);
        sleep(Duration::from_secs(2)).await;
    };
    let all: Vec<usize> = (0..12).collect();
    LazyLayer::foresee_start(&known.of_any_user().await);
    LazyLayer::foresee_start(&known.of_any_program().await);
    run(&["serve", "--all", "app.conf", "none"]).await;
    let there = |files: &[usize]| -> Vec<bool> {
        let there = |file| files.contains(file);
        all.iter().map(there).collect()
    };
    assert_eq!(present(&world, 0, &all), there(&[0, 1, 3, 4, 5]));
    run(&["sh", "-c", "exec python3 -c 'import pack'"]).await;
    assert_eq!(present(&world, 0, &all), there(&[0, 1, 3, 4, 5, 7, 8, 9]));
    // What is beside the program is found there.
    run(&["python3", "-m", "near"]).await;
    assert_eq!(
        present(&world, 0, &all),
        there(&[0, 1, 3, 4, 5, 7, 8, 9, 10, 11])
    );
}

/// A plan that does not name what runs was not made of it.
#[tokio::test(start_paused = true)]
async fn a_program_may_be_beside_the_plan() {
    let files = sample(&[
        ("etc/passwd", b"root\n".to_vec()),
        ("bin/serve", linked(&[], "")),
    ]);
    let world = World::new(20, &[files]);
    let layer = &world.layers[0];
    let known = ImageDependencies::new(&world.layers, &Memory::default());
    let program = Program {
        words: vec!["/bin/serve".to_owned()],
        path: String::new(),
        directory: "/".to_owned(),
    };
    let runs = known.first_of_program(&program).await.unwrap();
    let passwd = known.of_any_user().await.remove(0);
    assert!(!runs.is_beside_plan() && !passwd.is_beside_plan());
    let order: Vec<ChunkId> = layer.dir().chunks().overlapping(0, 1).collect();
    let _fetching = layer.prefetch(Plan::Order(order.into()));
    sleep(Duration::from_millis(1)).await;
    assert!(runs.is_beside_plan() && !passwd.is_beside_plan());
    layer.judge_plan(false);
    assert!(runs.is_beside_plan() && !passwd.is_beside_plan());
}

/// A program goes through what its last module imports before it goes on with
/// what an earlier one does.
#[tokio::test(start_paused = true)]
async fn what_the_last_one_names_comes_first() {
    let many: Vec<String> = (0..40).map(|number| format!("part{number}")).collect();
    let names: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut files = vec![(in_site("big", "__init__"), module(&names))];
    // Half a second of the link for all of them.
    for name in &many {
        let mut content = module(&[]);
        content.extend(noise(name.len() as u64 + content.len() as u64, 150_000));
        files.push((in_site("big", name), content));
    }
    files.push((in_site("small", "__init__"), module(&["urgent"])));
    files.push((in_site("small", "urgent"), module(&[])));
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, c)| (n.as_str(), c.clone())).collect();
    let world = world(&[sample(&files)]);
    world.read_file(0, 0).await;
    sleep(Duration::from_millis(50)).await;
    world.read_file(0, 41 * 2).await;
    sleep(Duration::from_millis(150)).await;
    assert_eq!(present(&world, 0, &[42]), [true]);
    let come = |world: &World| {
        (1..=40)
            .filter(|file| present(world, 0, &[*file])[0])
            .count()
    };
    let before = come(&world);
    assert!(before < 40, "{before}");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(come(&world), 40);
}

/// Nothing that a file says leads astray: loops end, and so do links.
#[tokio::test(start_paused = true)]
async fn circles_end() {
    let world = world(&[sample(&[
        (&in_lib("one"), module(&["two", "one", "..", "", "two"])),
        (&in_lib("two"), module(&["one"])),
        (
            "usr/lib/libself.so",
            linked(
                &["libself.so", "../../../etc/passwd", "/"],
                "$ORIGIN:/../..",
            ),
        ),
        ("etc/passwd", b"root\n".to_vec()),
    ])]);
    world.read_file(0, 0).await;
    world.read_file(0, 4).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(present(&world, 0, &[0, 1, 2]), [true, true, true]);
    assert!(world.asked().len() < 10);
}

/// Who names more than a program can need is believed up to a point.
#[tokio::test(start_paused = true)]
async fn what_a_file_names_is_bounded() {
    const MODULES: u64 = 40;
    let names: Vec<String> = (0..MODULES).map(|number| format!("m{number}")).collect();
    let named: Vec<&str> = names.iter().map(String::as_str).collect();
    let file = |name: String, content: Vec<u8>| SampleFile { name, content };
    let mut files = vec![file(in_site("big", "__init__"), module(&named))];
    for (number, name) in names.iter().enumerate() {
        let content = noise(number as u64 + 1, 1 << 20);
        files.push(file(in_site("big", name), content));
    }
    let world = world(&[Sample::new(files, &Layout::default())]);
    world.read_file(0, 0).await;
    sleep(Duration::from_secs(20)).await;
    let (least, most) = (30 << 20, 34 << 20);
    assert!((least..most).contains(&world.bytes()), "{}", world.bytes());
}
