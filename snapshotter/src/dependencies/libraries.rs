//! What programs and libraries were linked with, and what runs a script.

use super::trees::{Place, Trees};
use crate::fetch::{LazyFile, Segment, segments};

// Types of segments and tags of the dynamic section, as `elf.h` has them.
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const NEEDED: u64 = 1;
const STRINGS: u64 = 5;
const RPATH: u64 = 15;
const RUNPATH: u64 = 29;

/// What is read of a dynamic section, of a name, and of a path.
const SECTION: u64 = 16 << 10;
const NAME: u64 = 256;
const PATH: u64 = 1024;
/// Libraries of one file, and directories that it has them looked for in.
const LIBRARIES: usize = 128;
const DIRECTORIES: usize = 16;
/// What the dynamic linker looks up libraries in.
const LINKER_CACHE: &[u8] = b"etc/ld.so.cache";
/// What a library reads as soon as it is used, whose constants have no path of
/// it in one piece: how its name begins, and where the file may be.
const CONFIGURED: [(&[u8], [&[u8]; 2]); 1] = [(
    b"libcrypto.so.",
    [b"usr/lib/ssl/openssl.cnf", b"etc/pki/tls/openssl.cnf"],
)];
/// The library that nearly every program is linked with.
const C_LIBRARY: &[u8] = b"libc.so.6";
/// How the name begins of the library that is a Python interpreter.
const PYTHON: &[u8] = b"libpython";
const ORIGIN: [&[u8]; 2] = [b"$ORIGIN", b"${ORIGIN}"];

/// What an ELF file names.
#[derive(Debug, Default)]
pub(super) struct Needed {
    interpreter: Option<Vec<u8>>,
    names: Vec<Vec<u8>>,
    /// Where to look first.
    directories: Vec<Vec<u8>>,
}

impl Needed {
    /// Whether a Python interpreter is among them.
    pub(super) fn have_python(&self) -> bool {
        let mut names = self.names.iter();
        names.any(|name| name.starts_with(PYTHON))
    }

    /// Whether something is looked for relative to the file itself.
    pub(super) fn are_beside(&self) -> bool {
        let mut directories = self.directories.iter();
        directories.any(|directory| ORIGIN.iter().any(|origin| directory.starts_with(origin)))
    }
}

/// The program that runs a script which begins with `head`.
pub(super) fn interpreter(head: &[u8]) -> Option<Vec<u8>> {
    let line = head
        .strip_prefix(b"#!")?
        .split(|&byte| byte == b'\n')
        .next()?;
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let program = words.next()?;
    match program.ends_with(b"/env") {
        true => words.next().map(|name| [b"usr/bin/", name].concat()),
        false => Some(program.to_vec()),
    }
}

/// What the ELF file that begins with `head` names.
pub(super) async fn of(file: &LazyFile, head: &[u8]) -> Option<Needed> {
    let segments = segments(head);
    let mut needed = Needed::default();
    if let Some(segment) = segments.iter().find(|s| s.kind == INTERPRETER) {
        let end = segment.offset.saturating_add(segment.size.min(PATH));
        needed.interpreter = text(&file.read(segment.offset..end).await?);
    }
    let Some(dynamic) = segments.iter().find(|s| s.kind == DYNAMIC) else {
        return Some(needed);
    };
    let end = dynamic.offset.saturating_add(dynamic.size.min(SECTION));
    let section = file.read(dynamic.offset..end).await?;
    let entries = section.chunks_exact(16).map(|entry| {
        let number = |at: usize| {
            entry[at..at + 8]
                .iter()
                .rev()
                .fold(0u64, |n, &b| n << 8 | u64::from(b))
        };
        (number(0), number(8))
    });
    let entries: Vec<(u64, u64)> = entries.take_while(|&(tag, _)| tag != 0).collect();
    let strings = entries.iter().find(|(tag, _)| *tag == STRINGS)?.1;
    let strings = in_file(&segments, strings)?;
    let of_tag = |wanted: &[u64]| {
        let found = entries.iter().filter(|(tag, _)| wanted.contains(tag));
        found
            .take(LIBRARIES)
            .map(|&(_, at)| strings.saturating_add(at))
            .collect::<Vec<_>>()
    };
    for at in of_tag(&[NEEDED]) {
        let name = file.read(at..at.saturating_add(NAME)).await?;
        needed.names.extend(text(&name));
    }
    for at in of_tag(&[RPATH, RUNPATH]).into_iter().take(1) {
        let path = text(&file.read(at..at.saturating_add(PATH)).await?)?;
        let directories = path.split(|&byte| byte == b':').take(DIRECTORIES);
        needed.directories = directories.map(<[u8]>::to_vec).collect();
    }
    Some(needed)
}

/// Where that is, in the order in which it is loaded.
pub(super) fn places(trees: &Trees, file: &LazyFile, needed: &Needed) -> Vec<Place> {
    let mut directories = Vec::new();
    for directory in &needed.directories {
        let after = ORIGIN
            .iter()
            .find_map(|origin| directory.strip_prefix(*origin));
        match after {
            Some(after) => {
                let own = trees.directory_of(file).unwrap_or_default();
                directories.push([&own, after].concat());
            }
            None => directories.push(directory.clone()),
        }
    }
    directories.extend(standard());
    let mut places = Vec::new();
    if let Some(interpreter) = &needed.interpreter {
        places.extend(trees.locate(interpreter));
        places.extend(trees.locate(LINKER_CACHE));
    }
    for name in &needed.names {
        let mut paths = directories
            .iter()
            .map(|directory| [directory, &b"/"[..], name].concat());
        places.extend(paths.find_map(|path| trees.locate(&path)));
        for (library, files) in CONFIGURED {
            if name.starts_with(library) {
                places.extend(files.iter().find_map(|path| trees.locate(path)));
            }
        }
    }
    places
}

/// Where that is which loads nearly every program, each with all places where
/// it may be: the dynamic linker, its cache, and the C library.
pub(super) fn of_any_program() -> impl Iterator<Item = Vec<Vec<u8>>> {
    let arch = std::env::consts::ARCH;
    let linker = [
        format!("lib64/ld-linux-{}.so.2", arch.replace('_', "-")),
        format!("lib/ld-linux-{arch}.so.1"),
        format!("lib/ld-musl-{arch}.so.1"),
    ];
    let c_library = standard().map(|directory| [&directory, &b"/"[..], C_LIBRARY].concat());
    [
        linker.map(String::into_bytes).to_vec(),
        vec![LINKER_CACHE.to_vec()],
        c_library.collect(),
    ]
    .into_iter()
}

/// Where the dynamic linkers of common distributions look.
fn standard() -> impl Iterator<Item = Vec<u8>> {
    let multiarch = format!("{}-linux-gnu", std::env::consts::ARCH);
    let within = ["usr/lib", "lib"].map(|lib| format!("{lib}/{multiarch}"));
    let others = ["usr/lib64", "lib64", "usr/lib", "lib", "usr/local/lib"];
    let all = within.into_iter().chain(others.map(str::to_owned));
    all.map(String::into_bytes)
}

/// Where in the file the byte is that is at an address in memory.
fn in_file(segments: &[Segment], address: u64) -> Option<u64> {
    segments
        .iter()
        .filter(|s| s.kind == Segment::LOAD)
        .find_map(|segment| {
            let within = address.checked_sub(segment.address)?;
            (within < segment.size).then(|| segment.offset.checked_add(within))?
        })
}

/// Up to the first NUL.
fn text(bytes: &[u8]) -> Option<Vec<u8>> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    (end > 0).then(|| bytes[..end].to_vec())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::fetch::ELF_64_LITTLE;

    /// A library that was linked with others, which are looked for in `path`.
    pub(in crate::dependencies) fn linked(needed: &[&str], path: &str) -> Vec<u8> {
        with_interpreter("", needed, path)
    }

    /// The same with an interpreter.
    pub(in crate::dependencies) fn with_interpreter(
        interpreter: &str,
        needed: &[&str],
        path: &str,
    ) -> Vec<u8> {
        const ADDRESS: u64 = 0x40_0000;
        const TABLE: usize = 64;
        const HEADER: usize = 56;
        let end = TABLE + 3 * HEADER;
        let mut strings = vec![0];
        let mut add = |text: &str| {
            let at = strings.len() as u64;
            strings.extend([text.as_bytes(), b"\0"].concat());
            at
        };
        let program = add(interpreter);
        let mut dynamic: Vec<(u64, u64)> = needed.iter().map(|name| (NEEDED, add(name))).collect();
        if !path.is_empty() {
            dynamic.push((RUNPATH, add(path)));
        }
        dynamic.push((STRINGS, ADDRESS + end as u64));
        dynamic.push((0, 0));
        let section = end + strings.len();
        let size = section + dynamic.len() * 16;
        let mut file = vec![0; TABLE];
        file[..6].copy_from_slice(ELF_64_LITTLE);
        file[32..40].copy_from_slice(&(TABLE as u64).to_le_bytes());
        file[54..56].copy_from_slice(&(HEADER as u16).to_le_bytes());
        file[56..58].copy_from_slice(&3u16.to_le_bytes());
        let mut segment = |kind: u32, offset: u64, size: u64| {
            let mut header = [0; HEADER];
            header[0..4].copy_from_slice(&kind.to_le_bytes());
            header[4..8].copy_from_slice(&4u32.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[16..24].copy_from_slice(&(ADDRESS + offset).to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            file.extend(header);
        };
        segment(Segment::LOAD, 0, size as u64);
        segment(DYNAMIC, section as u64, dynamic.len() as u64 * 16);
        let kind = if interpreter.is_empty() {
            Segment::LOAD
        } else {
            INTERPRETER
        };
        segment(kind, end as u64 + program, interpreter.len() as u64 + 1);
        file.extend(strings);
        for (tag, value) in dynamic {
            file.extend([tag.to_le_bytes(), value.to_le_bytes()].concat());
        }
        file
    }

    #[test]
    fn scripts_name_what_runs_them() {
        let runs = |script: &[u8]| interpreter(script).map(|p| String::from_utf8(p).unwrap());
        assert_eq!(runs(b"#!/bin/sh\necho").as_deref(), Some("/bin/sh"));
        assert_eq!(runs(b"#! /bin/bash -e\n").as_deref(), Some("/bin/bash"));
        assert_eq!(
            runs(b"#!/usr/bin/env python3\n").as_deref(),
            Some("usr/bin/python3")
        );
        assert_eq!(runs(b"#!\n"), None);
        assert_eq!(runs(b"#!/usr/bin/env\n"), None);
        assert_eq!(runs(b"echo"), None);
    }
}
