//! containerd's filter expressions, with which it lists snapshots.
//!
//! ```text
//! filter   := selector ("," selector)*          all of them must match
//! selector := path [ operator value ]           without a value: is it there?
//! path     := field ("." field)*
//! field    := quoted | [A-Za-z0-9_]+
//! operator := "==" | "!=" | "~="                ~= is a regular expression
//! value    := quoted | anything but "," and white space
//! quoted   := "…" with Go's escapes; a value of ~= also |…| or /…/
//! ```

use regex::Regex;

use super::snapshot::Info;

/// A parsed expression.
#[derive(Debug, Clone)]
pub struct Filter(Vec<Selector>);

/// Why a text is not a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter '{text}': {why} at byte {at}")]
pub struct FilterError {
    text: String,
    at: usize,
    why: &'static str,
}

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
    /// A regular expression that does not compile: containerd lets it match
    /// nothing.
    Never,
}

impl Filter {
    /// Parses one expression. The empty one matches everything.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let mut parser = Parser { text, at: 0 };
        let mut selectors = vec![parser.selector()?];
        while let Some(c) = parser.peek() {
            if c != ',' {
                return Err(parser.refuse("unexpected input"));
            }
            parser.next();
            selectors.push(parser.selector()?);
        }
        Ok(Self(selectors))
    }

    /// Whether it matches a snapshot.
    pub fn matches(&self, info: &Info) -> bool {
        self.0.iter().all(|selector| selector.matches(info))
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = field(info, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.as_deref() == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != *unwanted,
            Test::Matches(regex) => regex.is_match(&value.unwrap_or_default()),
            Test::Never => false,
        }
    }
}

fn field(info: &Info, path: &[String]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "kind" => Some(info.kind.as_str().to_owned()),
        "name" => Some(info.name.as_str().to_owned()),
        "parent" => Some(info.parent.as_ref().map_or("", |p| p.as_str()).to_owned()),
        "labels" => info.labels.get(&rest.join(".")).cloned(),
        _ => None,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn take_while(&mut self, belongs: impl Fn(char) -> bool) -> &str {
        let start = self.at;
        while self.peek().is_some_and(&belongs) {
            self.next();
        }
        &self.text[start..self.at]
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn refuse(&self, why: &'static str) -> FilterError {
        FilterError {
            text: self.text.chars().take(300).collect(),
            at: self.at,
            why,
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        let test = match self.peek() {
            None | Some(',') => Test::Present,
            Some(_) => self.test()?,
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') => Err(self.refuse("a field is quoted with '\"'")),
            Some(c) if is_field_char(c) => Ok(self.take_while(is_field_char).to_owned()),
            _ => Err(self.refuse("expected a field name or a quoted one")),
        }
    }

    fn test(&mut self) -> Result<Test, FilterError> {
        self.skip_space();
        let start = self.at;
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~')).to_owned();
        if !matches!(operator.as_str(), "==" | "!=" | "~=") {
            self.at = start;
            return Err(self.refuse("expected an operator (\"==\", \"!=\" or \"~=\")"));
        }
        let value = self.value(operator == "~=")?;
        Ok(match operator.as_str() {
            "==" => Test::Equal(value),
            "!=" => Test::NotEqual(value),
            _ => match Regex::new(&value) {
                Ok(regex) => Test::Matches(regex),
                Err(error) => {
                    tracing::warn!(%error, "a filter's regular expression does not compile and matches nothing");
                    Test::Never
                }
            },
        })
    }

    fn value(&mut self, other_quotes: bool) -> Result<String, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if other_quotes => self.quoted(),
            Some('/' | '|') => Err(self.refuse("a value is quoted with '\"'")),
            None | Some(',' | '.' | '=' | '!' | '~') => {
                Err(self.refuse("expected a value or a quoted one"))
            }
            Some(c) if !is_value_char(c) => Err(self.refuse("expected a value or a quoted one")),
            Some(_) => Ok(self.take_while(is_value_char).to_owned()),
        }
    }

    fn quoted(&mut self) -> Result<String, FilterError> {
        let start = self.at;
        let quote = self.next();
        let mut bytes = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => {
                    self.at = start;
                    return Err(self.refuse("a quoted text that does not end"));
                }
                c if c == quote => break,
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(c) => bytes.extend(c.encode_utf8(&mut [0; 4]).bytes()),
            }
        }
        String::from_utf8(bytes).map_err(|_| {
            self.at = start;
            self.refuse("a quoted text that is not UTF-8")
        })
    }

    fn escape(&mut self, quote: Option<char>, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let digits_at = self.at;
        let simple = match self.next() {
            Some('a') => 0x07,
            Some('b') => 0x08,
            Some('f') => 0x0c,
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('v') => 0x0b,
            Some('\\') => b'\\',
            Some(c @ ('"' | '/' | '|')) if Some(c) == quote => c as u8,
            Some('0'..='7') => {
                self.at = digits_at;
                let value = self.digits(3, 8)?;
                u8::try_from(value).map_err(|_| self.refuse("an octal escape above 255"))?
            }
            Some('x') => {
                u8::try_from(self.digits(2, 16)?).map_err(|_| self.refuse("an escape above 255"))?
            }
            Some(c @ ('u' | 'U')) => {
                let value = self.digits(if c == 'u' { 4 } else { 8 }, 16)?;
                let c = char::from_u32(value)
                    .ok_or_else(|| self.refuse("an escape that is no Unicode character"))?;
                bytes.extend(c.encode_utf8(&mut [0; 4]).bytes());
                return Ok(());
            }
            _ => return Err(self.refuse("an unknown escape")),
        };
        bytes.push(simple);
        Ok(())
    }

    fn digits(&mut self, count: usize, base: u32) -> Result<u32, FilterError> {
        let mut value = 0;
        for _ in 0..count {
            let digit = self
                .next()
                .and_then(|c| c.to_digit(base))
                .ok_or_else(|| self.refuse("an escape with too few digits"))?;
            value = value << base.ilog2() | digit;
        }
        Ok(value)
    }
}

fn is_field_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn is_value_char(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::super::snapshot::{Key, Kind};
    use super::*;

    fn info(name: &str, parent: &str, labels: &[(&str, &str)]) -> Info {
        Info {
            name: Key::try_from(name).unwrap(),
            parent: Key::try_from(parent).ok(),
            kind: Kind::Committed,
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn matches_as_containerd_does() {
        let subject = info(
            "k8s.io/7/sha256:ab",
            "p q",
            &[
                ("containerd.io/snapshot.ref", "sha256:ab"),
                ("foo", "omg_asdf.asdf-qwer"),
                ("a\\b\".post", "x, y"),
            ],
        );
        for (text, expected) in [
            ("", true),
            ("name", true),
            ("size", false),
            ("kind==committed", true),
            ("kind!=committed", false),
            ("kind==active", false),
            ("kind==committed,kind==active", false),
            ("parent==\"p q\"", true),
            ("parent==\"\"", false),
            ("name==k8s.io/7/sha256:ab", true),
            (
                "labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"p q\"",
                true,
            ),
            ("labels.containerd.io", false),
            ("labels.foo", true),
            ("labels.foo==omg_asdf.asdf-qwer", true),
            ("labels.bar", false),
            ("labels.bar!=x", true),
            ("labels.bar!=\"\"", false),
            ("labels.\"a\\\\b\\\".post\"", true),
            ("labels.\"a\\\\b\\\"\".post==\"x, y\"", true),
            ("labels.foo~=^omg", true),
            ("labels.foo~=/^omg.{3,6}/", true),
            ("labels.foo~=|qwer$|,name", true),
            ("labels.foo~=[", false),
            ("labels.foo~=\"\\x6f\\155\\u0067\"", true),
        ] {
            let filter = Filter::parse(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(filter.matches(&subject), expected, "{text}");
        }
        assert!(
            Filter::parse("parent==\"\"")
                .unwrap()
                .matches(&info("a", "", &[]))
        );
    }

    #[test]
    fn refuses_what_is_no_filter() {
        for (text, at) in [
            ("labels.|foo|==x", 7),
            ("labels.?\"x\"", 7),
            ("name==foo,", 10),
            ("labels.", 7),
            ("image~=,id?=?fbaq", 7),
            ("labels.ns/key==value", 9),
            ("labels.key==/value", 12),
            ("name==\"x", 6),
            ("name=x", 4),
            ("name===x", 4),
            ("name==x y", 7),
            ("name==\"\\q\"", 9),
            ("name==\"\\xff\"", 6),
            ("name==\"\\x1", 10),
        ] {
            let error = Filter::parse(text).unwrap_err();
            assert_eq!(error.at, at, "{error}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,40}|[a-z.,=!~\"/|\\\\ 0-9x]{0,40}") {
            let _ = Filter::parse(&text);
        }

        #[test]
        fn a_quoted_value_is_taken_literally(value in "[^\\pC\"\\\\]{0,30}") {
            let filter = Filter::parse(&format!("labels.x==\"{value}\"")).unwrap();
            let matches = filter.matches(&info("n", "", &[("x", &value)]));
            prop_assert!(matches);
        }
    }
}
