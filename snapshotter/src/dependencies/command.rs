//! What the words of a command name: programs, files, and the modules that a
//! Python interpreter is told to import.

use super::python;
use crate::service::Program;

/// Words of one command, those in a shell's text as well.
const WORDS: usize = 64;
/// Directories in which a command is looked up.
const LOOKED_UP_IN: usize = 16;
/// What every start of a Python interpreter imports, and has not in itself.
const PYTHON: [&[u8]; 3] = [b"encodings", b"encodings.utf_8", b"sitecustomize"];
/// The character classes that it loads where no locale is set.
const PYTHON_LOCALE: &[u8] = b"usr/lib/locale/C.utf8/LC_CTYPE";
const SHELLS: [&[u8]; 5] = [b"sh", b"ash", b"bash", b"dash", b"zsh"];
/// What a shell's text has before and behind words.
const BEFORE: [char; 6] = ['$', '(', '{', '`', '<', '>'];
const BEHIND: [char; 6] = [')', '}', '`', ';', '&', '|'];
/// Options of it that the next word belongs to.
const WITH_A_WORD: [&str; 2] = ["-W", "-X"];

/// Something that a command names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Named {
    /// A file, and where it may be, the first place first.
    File(Vec<Vec<u8>>),
    /// Python modules.
    Modules(Vec<Vec<u8>>),
}

/// What a program's words name, in the order in which they do.
pub(super) fn named(program: &Program) -> Vec<Named> {
    let words = spelled_out(&program.words);
    let mut named = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let candidates = candidates(program, word);
        if !candidates.is_empty() {
            named.push(Named::File(candidates));
        }
        if is_python(word.as_bytes()) {
            named.push(Named::File(vec![PYTHON_LOCALE.to_vec()]));
            named.push(Named::Modules(modules(&words[at + 1..])));
        }
    }
    named
}

/// Whether the program is Python, or runs it, as far as its words tell.
pub(super) fn runs_python(program: &Program) -> bool {
    let words = spelled_out(&program.words);
    let mut words = words.iter();
    words.any(|word| is_python(word.as_bytes()) || word.ends_with(".py"))
}

/// The words, and in the place of a shell's text those that are in it.
fn spelled_out(words: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    let mut is_shell = false;
    let mut is_text = false;
    for word in words {
        if std::mem::take(&mut is_text) {
            // What cannot be parsed names nothing.
            let within = shlex::split(word).unwrap_or_default();
            let within = within
                .iter()
                .map(|word| word.trim_start_matches(BEFORE).trim_end_matches(BEHIND));
            all.extend(within.map(str::to_owned));
            continue;
        }
        let is_option = is_shell && word.starts_with('-');
        is_text = is_option && word.ends_with('c');
        is_shell = is_option || SHELLS.contains(&base_name(word.as_bytes()));
        all.push(word.clone());
    }
    all.truncate(WORDS);
    all
}

/// The modules that an interpreter imports that is given these words.
fn modules(words: &[String]) -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = PYTHON.map(<[u8]>::to_vec).into();
    let mut words = words.iter();
    while let Some(word) = words.next().filter(|word| word.starts_with('-')) {
        if WITH_A_WORD.contains(&word.as_str()) {
            words.next();
        } else if word.ends_with('c') {
            let code = words.next().map(|code| code.replace(';', "\n"));
            names.extend(python::imports(code.unwrap_or_default().as_bytes()));
            break;
        } else if word.ends_with('m') {
            if let Some(module) = words.next() {
                names.push(module.clone().into_bytes());
                names.push(format!("{module}.__main__").into_bytes());
            }
            break;
        }
    }
    names
}

/// Where a word may be: looked up as a command, or a file where the command
/// runs. Of an option or variable, what it is set to, if that is a path.
fn candidates(program: &Program, word: &str) -> Vec<Vec<u8>> {
    let word = match word.split_once('=') {
        Some((_, value)) if value.starts_with('/') => value,
        _ => word,
    };
    if word.is_empty() || word.starts_with('-') {
        return Vec::new();
    }
    let within = |directory: &str| format!("{directory}/{word}").into_bytes();
    let mut paths = Vec::new();
    if word.starts_with('/') {
        paths.push(word.as_bytes().to_vec());
    } else {
        if !word.contains('/') {
            let directories = program.path.split(':').take(LOOKED_UP_IN);
            paths.extend(directories.map(within));
        }
        paths.push(within(&program.directory));
    }
    paths
}

/// Whether a program of that name or path is a Python interpreter.
pub(super) fn is_python(program: &[u8]) -> bool {
    base_name(program).starts_with(b"python")
}

fn base_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&byte| byte == b'/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(words: &[&str]) -> Program {
        Program {
            words: words.iter().map(|&word| word.to_owned()).collect(),
            path: "/sbin:/bin".to_owned(),
            directory: "/srv".to_owned(),
        }
    }

    fn shown(words: &[&str]) -> Vec<String> {
        let text = |bytes: &Vec<u8>| String::from_utf8(bytes.clone()).unwrap();
        let all = named(&program(words)).into_iter();
        all.map(|named| match named {
            Named::File(paths) => text(paths.last().unwrap()),
            Named::Modules(names) => names.iter().map(text).collect::<Vec<_>>().join(" "),
        })
        .collect()
    }

    #[test]
    fn words_are_commands_or_files() {
        let found = named(&program(&[
            "serve",
            "--all",
            "sub/more",
            "/opt/absolute",
            "--config=/etc/app.conf",
            "LEVEL=2",
            "",
        ]));
        let expected = [
            vec!["/sbin/serve", "/bin/serve", "/srv/serve"],
            vec!["/srv/sub/more"],
            vec!["/opt/absolute"],
            vec!["/etc/app.conf"],
            vec!["/sbin/LEVEL=2", "/bin/LEVEL=2", "/srv/LEVEL=2"],
        ];
        let files = |paths: &Vec<&str>| {
            Named::File(paths.iter().map(|path| path.as_bytes().to_vec()).collect())
        };
        assert_eq!(found, expected.iter().map(files).collect::<Vec<_>>());
    }

    #[test]
    fn a_shell_is_told_in_one_word_what_to_run() {
        let found = shown(&[
            "/bin/sh",
            "-ec",
            "cd '/a b' && exec serve one; (two $(three '(') </four >/five &)",
            "-x",
            "rest",
        ]);
        let expected = [
            "/bin/sh",
            "/srv/cd",
            "/a b",
            "/srv/exec",
            "/srv/serve",
            "/srv/one",
            "/srv/two",
            "/srv/three",
            "/four",
            "/five",
            "/srv/rest",
        ];
        assert_eq!(found, expected);
        assert_eq!(
            shown(&["sh", "script", "-c", "a b"]).last().unwrap(),
            "/srv/a b"
        );
        assert_eq!(shown(&["bash", "-c", "not 'closed"]), ["/srv/bash"]);
        let long = "word ".repeat(WORDS * 2);
        assert_eq!(shown(&["sh", "-c", &long]).len(), WORDS - 1);
    }

    #[test]
    fn an_interpreter_is_told_what_to_import() {
        let of = |words: &[&str]| shown(words)[2].clone();
        let always = "encodings encodings.utf_8 sitecustomize";
        let code = "import a, b.c; from d import e\ndef f():\n  import g";
        assert_eq!(
            of(&["/usr/bin/python3.11", "-c", code]),
            format!("{always} a b.c d e")
        );
        assert_eq!(
            of(&["python3", "-u", "-W", "error", "-Bm", "http.server"]),
            format!("{always} http.server http.server.__main__")
        );
        assert_eq!(of(&["python", "file.py", "-c", "import a"]), always);
        assert_eq!(of(&["python", "-c"]), always);
        for words in [&["sh", "-c", "exec python3 x"][..], &["/app/main.py"]] {
            assert!(runs_python(&program(words)), "{words:?}");
        }
        assert!(!runs_python(&program(&[
            "node",
            "/app/main.pyx",
            "a/python/b"
        ])));
        // Told by a shell, after others.
        let nested = shown(&["sh", "-c", "env A=1 python3 -c 'import a' && b"]);
        assert!(nested.contains(&format!("{always} a")), "{nested:?}");
    }
}
