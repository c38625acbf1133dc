//! Random tars.

use proptest::prelude::*;

use super::*;

/// Every way to cut files.
fn ways() -> impl Iterator<Item = Options> {
    FORMATS.into_iter().flat_map(|format| {
        let content = Options {
            chunking: Chunking::Content,
            ..options(format, 512)
        };
        [options(format, 4096), content]
    })
}

fn arbitrary_tar() -> impl Strategy<Value = Vec<u8>> {
    let content = prop_oneof![
        Just(0usize),
        1..600usize,
        Just(4096usize),
        4000..20_000usize
    ];
    let entry = (0..6u8, "[a-z\u{e9}]{1,6}(/[a-z]{1,120}){0,2}", content);
    proptest::collection::vec(entry, 0..20).prop_map(|entries| {
        let mut names: Vec<String> = Vec::new();
        let mut raw = Vec::new();
        for (kind, name, size) in entries {
            raw.push(match kind {
                0 => directory(&format!("{name}/")),
                1 => link(&name, Kind::Symlink, "somewhere/else"),
                2 if !names.is_empty() => link(&name, Kind::HardLink, &names[size % names.len()]),
                _ => {
                    names.push(name.clone());
                    file(&name, &noise(size))
                }
            });
        }
        archive(&raw)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_do_not_change_the_blob(tar in arbitrary_tar(), cuts in proptest::collection::vec(1..3000usize, 1..8)) {
        for options in ways() {
            let Ok((_, whole)) = write_layer(&tar, &options, &[]) else { return Ok(()) };
            let mut raw = Vec::new();
            let mut push = |unit| raw.push(unit);
            let units: &mut Units<'_> = &mut push;
            let mut splitter = Splitter::new(&options, false, units).unwrap();
            let (mut rest, mut sizes) = (tar.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
                splitter.push(now, units).unwrap();
                rest = later;
            }
            let split = splitter.finish(units).unwrap();
            let mut compressor = UnitCompressor::new(&options).unwrap();
            let mut assembler = Assembler::new();
            for unit in &raw {
                assembler.place(&compressor.compress(unit).unwrap());
            }
            prop_assert_eq!(finish(split, assembler).unwrap(), whole);
        }
    }

    #[test]
    fn any_tar_keeps_its_files(tar in arbitrary_tar()) {
        for options in ways() {
            let format = options.format;
            let Ok((blob, tail)) = write_layer(&tar, &options, &[]) else { return Ok(()) };
            let unpacked = unpack(format, &blob);
            prop_assert_eq!(Digest::of(&unpacked), tail.diff_id);
            if format == Format::ZstdChunked {
                prop_assert_eq!(&unpacked, &tar);
            }
            files(format, &blob, &toc(format, &blob, &tail));
        }
    }

    #[test]
    fn no_input_panics(mut tar in arbitrary_tar(), flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20)) {
        for (at, value) in flips {
            let at = at.index(tar.len());
            tar[at] = value;
        }
        let _ = write_layer(&tar, &options(Format::Estargz, 4096), &[]);
    }
}
