//! The names that a Python module uses outside of its functions, among them
//! those of the modules that it imports, in the order in which it does.

use std::ops::Range;
use std::rc::Rc;

/// Modules larger than this are not looked into. Bytes.
pub(super) const LARGEST: u64 = 1 << 20;
/// Names of one module.
const NAMES: usize = 4096;
/// How deeply the values of a compiled module may be nested.
const DEPTH: usize = 64;
/// Bytes before the code of a compiled module, since Python 3.7.
const HEADER: usize = 16;
/// A compiled module's first number from these versions of Python on: what code
/// begins with has changed in 3.8 and 3.11, how far a jump goes in 3.10 and 3.11,
/// and the numbers of instructions in 3.13.
const SINCE_3_8: u16 = 3400;
const SINCE_3_10: u16 = 3430;
const SINCE_3_11: u16 = 3450;
const SINCE_3_13: u16 = 3550;

/// What is true for whoever checks types, and false when the module runs.
const TYPE_CHECKING: &[u8] = b"TYPE_CHECKING";

/// Values that may be referred to. A module of a megabyte has half as many.
const SEEN: usize = 1 << 16;

/// Whether a file that begins like this may be a compiled module.
pub(super) fn may_be_module(head: &[u8]) -> bool {
    head.len() > HEADER && head[2..4] == *b"\r\n" && head[4..8].iter().all(|&byte| byte <= 3)
}

/// The names in a module, compiled or not: with dots where it imports from a
/// package, without those that stand for its own, and without what it imports
/// only for whoever checks types.
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
    /// Or bytes, as instructions are.
    Text(&'m [u8]),
    Texts(Rc<[&'m [u8]]>),
    Other,
}

/// Only what is not understood, or the end.
enum Stop<'m> {
    Odd,
    Names(&'m [u8], Rc<[&'m [u8]]>),
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
            Err(Stop::Names(instructions, names)) => {
                let names = &names[..names.len().min(NAMES)];
                let unused = only_for_types(version, instructions, names);
                let used = names.iter().zip(unused).filter(|(_, unused)| !unused);
                used.map(|(name, _)| name.to_vec()).collect()
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
            b's' | b'u' | b't' | b'a' | b'A' => {
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
        let instructions = self.value(depth + 1)?;
        self.value(depth + 1)?;
        let names = self.value(depth + 1)?;
        if depth == 0 {
            return Err(match (instructions, names) {
                (Value::Text(instructions), Value::Texts(names)) => {
                    Stop::Names(instructions, names)
                }
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

/// Numbers of instructions in Python 3.7 to 3.12.
mod instruction {
    pub(super) const CACHE: u8 = 0;
    pub(super) const LOAD_NAME: u8 = 101;
    pub(super) const LOAD_ATTR: u8 = 106;
    pub(super) const IMPORT_NAME: u8 = 108;
    pub(super) const IMPORT_FROM: u8 = 109;
    pub(super) const POP_JUMP_IF_FALSE: u8 = 114;
    pub(super) const EXTENDED_ARG: u8 = 144;
}

/// Which of a module's names it imports only in `if TYPE_CHECKING:`. None where
/// the version's instructions are not known.
fn only_for_types(version: u16, code: &[u8], names: &[&[u8]]) -> Vec<bool> {
    let (mut for_types, mut to_run) = (vec![false; names.len()], vec![false; names.len()]);
    if version >= SINCE_3_13 || !names.contains(&TYPE_CHECKING) {
        return for_types;
    }
    let is_name = |argument: usize| names.get(argument) == Some(&TYPE_CHECKING);
    let mut passed_over = 0..0;
    // Whether that was loaded last.
    let mut loaded = false;
    for (next, number, argument) in instructions(code) {
        match number {
            instruction::CACHE => continue,
            instruction::POP_JUMP_IF_FALSE if loaded => {
                passed_over = jumped_over(version, next, argument);
            }
            instruction::IMPORT_NAME | instruction::IMPORT_FROM => {
                let imported = match passed_over.contains(&next) {
                    true => &mut for_types,
                    false => &mut to_run,
                };
                if let Some(imported) = imported.get_mut(argument) {
                    *imported = true;
                }
            }
            _ => {}
        }
        loaded = match number {
            instruction::LOAD_NAME => is_name(argument),
            // Since 3.12 the lowest bit says whether it is called.
            instruction::LOAD_ATTR => is_name(argument) || is_name(argument >> 1),
            _ => false,
        };
    }
    let both = for_types.into_iter().zip(to_run);
    both.map(|(for_types, to_run)| for_types && !to_run)
        .collect()
}

/// Where the next one begins, the number, and the argument of each instruction.
fn instructions(code: &[u8]) -> impl Iterator<Item = (usize, u8, usize)> + '_ {
    let mut high = 0;
    let each = code.chunks_exact(2).enumerate();
    each.filter_map(move |(at, instruction)| {
        let argument = high << 8 | usize::from(instruction[1]);
        if instruction[0] == instruction::EXTENDED_ARG {
            high = argument & 0x00ff_ffff;
            return None;
        }
        high = 0;
        Some(((at + 1) * 2, instruction[0], argument))
    })
}

/// The instructions between one that jumps, with `next` behind it, and where it
/// jumps to: by where the next one begins after each.
fn jumped_over(version: u16, next: usize, argument: usize) -> Range<usize> {
    let to = match version {
        ..SINCE_3_10 => argument,
        SINCE_3_10..SINCE_3_11 => argument * 2,
        _ => next + argument * 2,
    };
    next + 1..to + 1
}

/// Of the statements `import` and `from` that are in no function or class, nor
/// for whoever checks types.
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
            const PASSED_OVER: [&str; 5] = [
                "def ",
                "class ",
                "async ",
                "if TYPE_CHECKING:",
                "if typing.TYPE_CHECKING:",
            ];
            inside = PASSED_OVER.iter().any(|k| code.starts_with(k.as_bytes()));
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

    fn code(version: u16, code: &[u8], consts: &[Vec<u8>], names: &[&str]) -> Vec<u8> {
        let numbers = if (SINCE_3_8..SINCE_3_11).contains(&version) {
            6
        } else {
            5
        };
        let mut bytes = vec![0xe3];
        bytes.extend(vec![7; numbers * 4]);
        bytes.push(b's');
        bytes.extend((code.len() as u32).to_le_bytes());
        bytes.extend(code);
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
        compiled_of(version, b"xyz", names)
    }

    /// The same of these instructions.
    fn compiled_of(version: u16, instructions: &[u8], names: &[&str]) -> Vec<u8> {
        let function = code(version, b"xyz", &[b"N".to_vec()], &["imported_later"]);
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
        bytes.extend(code(version, instructions, &consts, names));
        bytes
    }

    /// `if <load>TYPE_CHECKING: import a; import b` and then `import b, c`, where
    /// the jump has this argument.
    fn for_types(version: u16, load: &[u8], argument: u8) -> Vec<Vec<u8>> {
        let names = ["typing", "TYPE_CHECKING", "a", "b", "c"];
        let import = |name| [100, 0, 100, 1, 108, name, 90, name];
        let jump = [114, argument];
        let block = [import(2), import(3)].concat();
        let rest = [import(3), import(4)].concat();
        let code = [&import(0)[..], load, &jump, &block, &rest].concat();
        imports(&compiled_of(version, &code, &names))
    }

    #[test]
    fn what_only_those_who_check_types_import_is_left_out() {
        let name = [101, 1];
        let attribute = [101, 0, 106, 1];
        // In 3.11 with caches, in 3.12 with a bit more in its argument.
        let cached = [101, 0, 106, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        let shifted = [101, 0, 106, 2, 0, 0];
        let cases: [(u16, &[u8], u8); 8] = [
            (3394, &name, 12 + 16),
            (3413, &attribute, 14 + 16),
            (3425, &name, 12 + 16),
            (3439, &name, (12 + 16) / 2),
            (3495, &name, 8),
            (3495, &cached, 8),
            (3531, &name, 8),
            (3531, &shifted, 8),
        ];
        for (version, load, argument) in cases {
            let names = for_types(version, load, argument);
            let expected = ["typing", "TYPE_CHECKING", "b", "c"].map(|n| n.as_bytes().to_vec());
            assert_eq!(names, expected, "{version} {load:?}");
        }
        // Whatever the instructions mean there; another condition; a jump that
        // goes nowhere.
        assert_eq!(for_types(3571, &name, 8).len(), 5);
        assert_eq!(for_types(3495, &[101, 0], 8).len(), 5);
        assert_eq!(for_types(3425, &name, 0).len(), 5);
        let far = [101, 1, 144, 200, 144, 200, 144, 200];
        assert_eq!(for_types(3495, &far, 8).len(), 2);
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
if TYPE_CHECKING:
    from types import only
else:
    import instead
if typing.TYPE_CHECKING:
    import only
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
        let expected = [
            "os", "sys", "near", "one", "two", "instead", "fast", "a.b", "c",
        ];
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
            let code = [101, 0, 114, byte, 144, byte, 108, 1];
            let mut module = compiled_of(version, &code, &["TYPE_CHECKING", "b"]);
            let at = at % module.len();
            module[at] = byte;
            prop_assert!(imports(&module).len() <= NAMES);
            module.truncate(at);
            imports(&module);
        }
    }
}
