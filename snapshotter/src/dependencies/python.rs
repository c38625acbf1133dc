//! The names that a Python module uses outside of its functions, among them
//! those of the modules that it imports, in the order in which it does.

use std::rc::Rc;

/// Modules larger than this are not looked into. Bytes.
pub(super) const LARGEST: u64 = 1 << 20;
/// Names of one module.
const NAMES: usize = 4096;
/// How deeply the values of a compiled module may be nested.
const DEPTH: usize = 64;
/// Bytes before the code of a compiled module, since Python 3.7.
const HEADER: usize = 16;
/// A compiled module's first number from Python 3.11 on, and in 3.8: what code
/// begins with has changed in both.
const SINCE_3_11: u16 = 3450;
const SINCE_3_8: u16 = 3400;

/// Values that may be referred to. A module of a megabyte has half as many.
const SEEN: usize = 1 << 16;

/// Whether a file that begins like this may be a compiled module.
pub(super) fn may_be_module(head: &[u8]) -> bool {
    head.len() > HEADER && head[2..4] == *b"\r\n" && head[4..8].iter().all(|&byte| byte <= 3)
}

/// The names in a module, compiled or not: with dots where it imports from a
/// package, without those that stand for its own.
pub(super) fn imports(module: &[u8]) -> Vec<Vec<u8>> {
    match may_be_module(module) {
        true => Marshal::names_of(module),
        false => source_imports(module),
    }
}

/// What Python writes compiled code as (`marshal`), as far as it takes to find
/// the names in the outermost.
struct Marshal<'m> {
    bytes: &'m [u8],
    /// Numbers that begin each code.
    numbers: usize,
    /// Whether a table of exceptions ends it.
    has_exception_table: bool,
    /// What may be referred to later.
    seen: Vec<Value<'m>>,
}

#[derive(Clone)]
enum Value<'m> {
    Text(&'m [u8]),
    Texts(Rc<[&'m [u8]]>),
    Other,
}

/// Only what is not understood, or the end.
enum Stop<'m> {
    Odd,
    Names(Rc<[&'m [u8]]>),
}

impl<'m> Marshal<'m> {
    fn names_of(module: &'m [u8]) -> Vec<Vec<u8>> {
        let version = u16::from_le_bytes([module[0], module[1]]);
        let mut marshal = Self {
            bytes: &module[HEADER..],
            numbers: match version {
                SINCE_3_8..SINCE_3_11 => 6,
                _ => 5,
            },
            has_exception_table: version >= SINCE_3_11,
            seen: Vec::new(),
        };
        match marshal.value(0) {
            Err(Stop::Names(names)) => {
                let names = names.iter().take(NAMES);
                names.map(|name| name.to_vec()).collect()
            }
            _ => Vec::new(),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'m [u8], Stop<'m>> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or(Stop::Odd)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<usize, Stop<'m>> {
        Ok(usize::from(self.take(1)?[0]))
    }

    fn number(&mut self) -> Result<i32, Stop<'m>> {
        let bytes = self.take(4)?;
        Ok(i32::from_le_bytes(bytes.try_into().map_err(|_| Stop::Odd)?))
    }

    fn length(&mut self) -> Result<usize, Stop<'m>> {
        usize::try_from(self.number()?).map_err(|_| Stop::Odd)
    }

    fn value(&mut self, depth: usize) -> Result<Value<'m>, Stop<'m>> {
        const REFERRED_TO: usize = 0x80;
        if depth > DEPTH || self.seen.len() > SEEN {
            return Err(Stop::Odd);
        }
        let kind = self.byte()?;
        let place = (kind & REFERRED_TO != 0).then(|| {
            self.seen.push(Value::Other);
            self.seen.len() - 1
        });
        let value = self.rest((kind & !REFERRED_TO) as u8, depth)?;
        if let Some(place) = place {
            self.seen[place] = value.clone();
        }
        Ok(value)
    }

    fn rest(&mut self, kind: u8, depth: usize) -> Result<Value<'m>, Stop<'m>> {
        let skipped = match kind {
            b'0' | b'N' | b'T' | b'F' | b'S' | b'.' => 0,
            b'i' => 4,
            b'I' | b'g' => 8,
            b'y' => 16,
            b'l' => self.number()?.unsigned_abs() as usize * 2,
            b'f' => self.byte()?,
            b'x' => {
                let real = self.byte()?;
                self.take(real)?;
                self.byte()?
            }
            b's' => self.length()?,
            b'u' | b't' | b'a' | b'A' => {
                let len = self.length()?;
                return Ok(Value::Text(self.take(len)?));
            }
            b'z' | b'Z' => {
                let len = self.byte()?;
                return Ok(Value::Text(self.take(len)?));
            }
            b'r' => {
                let place = self.length()?;
                return self.seen.get(place).cloned().ok_or(Stop::Odd);
            }
            b')' => {
                let count = self.byte()?;
                return self.values(count, depth);
            }
            b'(' | b'[' | b'<' | b'>' => {
                let count = self.length()?;
                return self.values(count, depth);
            }
            b'{' => {
                while self.bytes.first() != Some(&b'0') {
                    self.value(depth + 1)?;
                    self.value(depth + 1)?;
                }
                1
            }
            b':' => return self.values(3, depth),
            b'c' => return self.code(depth),
            _ => return Err(Stop::Odd),
        };
        self.take(skipped)?;
        Ok(Value::Other)
    }

    fn values(&mut self, count: usize, depth: usize) -> Result<Value<'m>, Stop<'m>> {
        // Each takes a byte at least.
        if count > self.bytes.len() {
            return Err(Stop::Odd);
        }
        let mut texts = Vec::new();
        for _ in 0..count {
            if let Value::Text(text) = self.value(depth + 1)? {
                texts.push(text);
            }
        }
        Ok(Value::Texts(texts.into()))
    }

    fn code(&mut self, depth: usize) -> Result<Value<'m>, Stop<'m>> {
        const NUMBER: usize = 4;
        self.take(self.numbers * NUMBER)?;
        // Instructions, then constants: the code of functions is among them.
        self.value(depth + 1)?;
        self.value(depth + 1)?;
        let names = self.value(depth + 1)?;
        if depth == 0 {
            return Err(match names {
                Value::Texts(names) => Stop::Names(names),
                _ => Stop::Odd,
            });
        }
        // Three of variables, the file, the name; what follows the first line
        // depends on the version.
        for _ in 0..5 {
            self.value(depth + 1)?;
        }
        self.take(NUMBER)?;
        self.value(depth + 1)?;
        if self.has_exception_table {
            self.value(depth + 1)?;
        }
        Ok(Value::Other)
    }
}

/// Of the statements `import` and `from` that are in no function or class.
fn source_imports(text: &[u8]) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    let mut inside = false;
    let mut open = false;
    for line in text.split(|&byte| byte == b'\n') {
        let code = line
            .split(|byte| matches!(byte, b'#' | b';'))
            .next()
            .unwrap_or(line);
        let code = code.trim_ascii();
        if names.len() >= NAMES {
            break;
        }
        if open {
            open = !code.contains(&b')');
            listed(code, &mut names);
            continue;
        }
        if line
            .first()
            .is_some_and(|byte| !byte.is_ascii_whitespace() && *byte != b'#')
        {
            inside = ["def ", "class ", "async "]
                .iter()
                .any(|k| code.starts_with(k.as_bytes()));
        }
        if inside {
            continue;
        }
        if let Some(modules) = code.strip_prefix(b"import ") {
            listed(modules, &mut names);
        } else if let Some(rest) = code.strip_prefix(b"from ") {
            let mut parts = rest.splitn(2, |byte| byte.is_ascii_whitespace());
            let module = parts.next().unwrap_or_default();
            names.extend(named(module));
            let rest = parts.next().unwrap_or_default().trim_ascii_start();
            if let Some(list) = rest.strip_prefix(b"import") {
                listed(list, &mut names);
                open = list.contains(&b'(') && !list.contains(&b')');
            }
        }
    }
    names
}

/// Names with commas between them, each perhaps followed by `as` and another.
fn listed(list: &[u8], names: &mut Vec<Vec<u8>>) {
    for item in list.split(|byte| matches!(byte, b',' | b'(' | b')' | b'\\')) {
        let item = item.trim_ascii();
        let name = item.split(u8::is_ascii_whitespace).next();
        names.extend(name.and_then(named));
    }
}

fn named(name: &[u8]) -> Option<Vec<u8>> {
    let name = name.trim_ascii();
    let start = name.iter().position(|&byte| byte != b'.')?;
    let name = &name[start..];
    let fits =
        |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.') || *byte >= 128;
    name.iter().all(fits).then(|| name.to_vec())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&[0xda, text.len() as u8], text.as_bytes()].concat()
    }

    fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
        [&[b')', items.len() as u8], &items.concat()[..]].concat()
    }

    fn code(version: u16, consts: &[Vec<u8>], names: &[&str]) -> Vec<u8> {
        let numbers = if (SINCE_3_8..SINCE_3_11).contains(&version) {
            6
        } else {
            5
        };
        let mut bytes = vec![0xe3];
        bytes.extend(vec![7; numbers * 4]);
        bytes.extend(b"s\x03\0\0\0xyz");
        bytes.extend(tuple(consts));
        bytes.extend(tuple(
            &names.iter().map(|name| text(name)).collect::<Vec<_>>(),
        ));
        for variables in 0..3 {
            bytes.extend(tuple(&vec![text("v"); variables]));
        }
        bytes.extend([text("/app/file.py"), text("<module>")].concat());
        bytes.extend(1i32.to_le_bytes());
        bytes.extend(b"s\0\0\0\0");
        if version >= SINCE_3_11 {
            bytes.extend(b"s\0\0\0\0");
        }
        bytes
    }

    /// A compiled module that uses these names.
    pub(in crate::dependencies) fn compiled(version: u16, names: &[&str]) -> Vec<u8> {
        let function = code(version, &[b"N".to_vec()], &["imported_later"]);
        let consts = [
            b"i\x2a\0\0\0".to_vec(),
            tuple(&[text("api")]),
            function,
            b"l\xfe\xff\xff\xff\x01\0\x02\0".to_vec(),
            b"g\0\0\0\0\0\0\0\0".to_vec(),
            b"T".to_vec(),
        ];
        let mut bytes = version.to_le_bytes().to_vec();
        bytes.extend(b"\r\n\0\0\0\0timesize");
        bytes.extend(code(version, &consts, names));
        bytes
    }

    #[test]
    fn names_of_the_module_and_not_of_its_functions() {
        for version in [3394, 3413, 3439, 3495, 3531, 3571] {
            let module = compiled(version, &["os", "a.b.c", "x"]);
            assert!(may_be_module(&module));
            assert_eq!(imports(&module), [&b"os"[..], b"a.b.c", b"x"], "{version}");
        }
        // A name that was there before is referred to.
        let mut module = compiled(3495, &[]);
        let start = HEADER + 1 + 5 * 4;
        module.truncate(start);
        module.extend(b"s\0\0\0\0)\x01\xda\x02os)\x01r\x01\0\0\0");
        assert_eq!(imports(&module), [b"os"]);
    }

    #[test]
    fn statements_outside_of_functions() {
        let source = b"\
import os, sys as system  # more
from .near import (one,
    two as three,  # four
)
try:
    import fast
except ImportError:
    fast = None
class A:
    import inner
    def f(self):
        from x import y
@decorated
def f():
    import later
from a.b import c; x = 1
import_this = 3
";
        let names = imports(source);
        let names: Vec<&str> = names
            .iter()
            .map(|n| std::str::from_utf8(n).unwrap())
            .collect();
        let expected = ["os", "sys", "near", "one", "two", "fast", "a.b", "c"];
        assert_eq!(names, expected);
    }

    proptest! {
        #[test]
        fn whatever_a_module_says(
            mut module in prop::collection::vec(any::<u8>(), 0..300),
            at in 0usize..300,
            byte: u8,
            version: u16,
        ) {
            imports(&module);
            module.splice(0..0, *b"\xa7\x0d\x0d\x0a\0\0\0\0timesize");
            imports(&module);
            let mut module = compiled(version, &["a", "b"]);
            let at = at % module.len();
            module[at] = byte;
            prop_assert!(imports(&module).len() <= NAMES);
            module.truncate(at);
            imports(&module);
        }
    }
}
