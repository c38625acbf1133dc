//! What containers run, in the words of their runtime specifications.

use serde::Deserialize;

use crate::service::Program;

/// What is kept of a command: programs are among its first words, and some are
/// told in one of them what to do.
const MOST_WORDS: usize = 16;
const LONGEST_WORD: usize = 8 << 10;
const LONGEST_PATH: usize = 1024;
/// Where commands are looked up as a rule.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Deserialize)]
struct Specification {
    process: Process,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Process {
    args: Vec<String>,
    env: Vec<String>,
    cwd: String,
}

/// What a container runs that has this specification; none if it does not say.
pub(super) fn program(specification: &[u8]) -> Option<Program> {
    let Specification { process } = serde_json::from_slice(specification).ok()?;
    let short = |word: &String| word.len() <= LONGEST_WORD;
    let words = process.args.into_iter().take(MOST_WORDS).filter(short);
    let words: Vec<String> = words.collect();
    let mut variables = process.env.into_iter().rev();
    let path = variables.find_map(|pair| Some(pair.strip_prefix("PATH=")?.to_owned()));
    let program = Program {
        words,
        path: path
            .filter(|path| path.len() <= LONGEST_PATH)
            .unwrap_or_else(|| PATH.to_owned()),
        directory: Some(process.cwd)
            .filter(|directory| directory.len() <= LONGEST_PATH)
            .unwrap_or_default(),
    };
    (!program.words.is_empty()).then_some(program)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(process: &serde_json::Value) -> Option<Program> {
        program(json!({ "process": process }).to_string().as_bytes())
    }

    #[test]
    fn the_command_is_that_of_the_process() {
        let all = json!({
            "args": ["/entry", "serve", "-x"], "cwd": "/srv", "terminal": false,
            "env": ["PATH=/old", "A=PATH=/b", "PATH=/new:/bin"],
        });
        let found = of(&all).unwrap();
        assert_eq!(found.words, ["/entry", "serve", "-x"]);
        assert_eq!((&*found.path, &*found.directory), ("/new:/bin", "/srv"));
        let found = of(&json!({"args": ["serve"]})).unwrap();
        assert_eq!((&*found.path, &*found.directory), (PATH, ""));
        for nothing in [
            json!(null),
            json!({}),
            json!({"args": []}),
            json!({"args": 7}),
        ] {
            assert_eq!(of(&nothing), None);
        }
        for rubbish in ["", "[]", "{}", "\"text\""] {
            assert_eq!(program(rubbish.as_bytes()), None);
        }
    }

    #[test]
    fn no_command_is_kept_beyond_bounds() {
        let long = "x".repeat(LONGEST_WORD + 1);
        let path = format!("PATH={long}");
        let args = vec!["word"; MOST_WORDS + 5];
        let found = of(&json!({"args": args, "env": [path], "cwd": long})).unwrap();
        assert_eq!(found.words.len(), MOST_WORDS);
        assert_eq!((&*found.path, &*found.directory), (PATH, ""));
        assert_eq!(of(&json!({"args": [long]})), None);
    }
}
