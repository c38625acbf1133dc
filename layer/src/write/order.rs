//! Putting prioritized files first.

use std::collections::HashMap;
use std::ops::Range;

use super::header::Kind;
use super::scan::{Event, Scanner};
use super::{WriteError, clean_name};

/// Where each entry of a tar begins. Filled by a first pass over a tar whose
/// entries are to change places.
#[derive(Debug)]
pub struct TarIndex {
    scanner: Scanner,
    entries: Vec<Indexed>,
    end: Option<u64>,
}

#[derive(Debug)]
struct Indexed {
    name: String,
    /// For a hard link, what it names.
    target: Option<String>,
    start: u64,
}

/// The new order of a tar's entries, as ranges of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The prioritized entries, with their parent directories and the targets
    /// of hard links.
    pub prioritized: Vec<Range<u64>>,
    /// All other entries and the end of the archive.
    pub rest: Vec<Range<u64>>,
    /// Names that the tar does not hold.
    pub missing: Vec<String>,
}

impl Default for TarIndex {
    fn default() -> Self {
        Self::new()
    }
}

impl TarIndex {
    /// An index of nothing.
    pub fn new() -> Self {
        Self {
            scanner: Scanner::new(),
            entries: Vec::new(),
            end: None,
        }
    }

    /// Takes more of the tar.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let Self {
            scanner,
            entries,
            end,
        } = self;
        scanner.push(bytes, &mut |event| {
            match event {
                Event::Entry { header, start, .. } => {
                    let name = |bytes: &[u8]| clean_name(&String::from_utf8_lossy(bytes));
                    let linked = header.kind == Kind::HardLink;
                    entries.push(Indexed {
                        name: name(&header.name),
                        target: linked.then(|| name(&header.link)),
                        start,
                    });
                }
                Event::End { start, .. } => *end = end.or(Some(start)),
                Event::Content(_) | Event::Padding(_) => {}
            }
            Ok(())
        })
    }

    /// How many bytes of zeros complete the last entry. They have to be added
    /// to the tar, and pushed here, before anything can follow that entry.
    pub fn padding_left(&self) -> usize {
        self.scanner.padding_left()
    }

    /// Ends the tar and moves the named files, and what they need, first.
    pub fn order(self, prioritized: &[String]) -> Result<Order, WriteError> {
        self.scanner.finish()?;
        let total = self.scanner.position();
        let end = self.end.unwrap_or(total);
        let ends = self.entries.iter().skip(1).map(|entry| entry.start);
        let ranges: Vec<Range<u64>> = self
            .entries
            .iter()
            .zip(ends.chain([end]))
            .map(|(entry, end)| entry.start..end)
            .collect();
        let mut by_name: HashMap<&str, Vec<usize>> = HashMap::new();
        for (index, entry) in self.entries.iter().enumerate() {
            by_name.entry(&entry.name).or_default().push(index);
        }
        let mut mover = Mover {
            entries: &self.entries,
            by_name,
            moved: vec![false; self.entries.len()],
            order: Vec::new(),
        };
        let mut missing = Vec::new();
        for name in prioritized {
            let name = clean_name(name);
            if mover.by_name.contains_key(name.as_str()) {
                mover.take(&name);
            } else {
                missing.push(name);
            }
        }
        let first: Vec<_> = mover.order.iter().map(|i| ranges[*i].clone()).collect();
        let mut rest: Vec<Range<u64>> = Vec::new();
        let unmoved = ranges
            .iter()
            .zip(&mover.moved)
            .filter(|(_, moved)| !**moved);
        for range in unmoved
            .map(|(range, _)| range.clone())
            .chain(std::iter::once(end..total))
        {
            match rest.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => rest.push(range),
            }
        }
        Ok(Order {
            prioritized: first,
            rest,
            missing,
        })
    }
}

struct Mover<'a> {
    entries: &'a [Indexed],
    by_name: HashMap<&'a str, Vec<usize>>,
    moved: Vec<bool>,
    order: Vec<usize>,
}

impl Mover<'_> {
    /// Moves the parents of `name`, outermost first, and then all entries of
    /// that name, each after the target of its hard link.
    fn take(&mut self, name: &str) {
        let parents = name.match_indices('/').map(|(at, _)| &name[..at]);
        for step in [""].into_iter().chain(parents).chain([name]) {
            for index in self.by_name.get(step).cloned().unwrap_or_default() {
                if std::mem::replace(&mut self.moved[index], true) {
                    continue;
                }
                if let Some(target) = &self.entries[index].target {
                    self.take(target);
                }
                self.order.push(index);
            }
        }
    }
}
