//! Which ranges to ask for.

use sluice_layer::Unit;

/// Neighbouring units that one request fetches. Units that are not wanted may
/// lie between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planned<T> {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) wanted: Vec<T>,
}

/// Groups what is wanted, sorted by offset, so that no request skips more than
/// `gap` bytes nor asks for more than `longest`, unless one unit does.
pub(super) fn group<T>(
    wanted: impl IntoIterator<Item = T>,
    unit_of: impl Fn(&T) -> Unit,
    gap: u64,
    longest: u64,
) -> Vec<Planned<T>> {
    let mut groups: Vec<Planned<T>> = Vec::new();
    for item in wanted {
        let unit = unit_of(&item);
        let end = unit.offset + unit.size;
        match groups.last_mut() {
            Some(last)
                if unit.offset.saturating_sub(last.end) <= gap && end - last.start <= longest =>
            {
                last.end = end;
                last.wanted.push(item);
            }
            _ => groups.push(Planned {
                start: unit.offset,
                end,
                wanted: vec![item],
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(units: &[(u64, u64)], gap: u64, longest: u64) -> Vec<(u64, u64)> {
        let units = units.iter().map(|&(offset, size)| Unit { offset, size });
        group(units, |unit| *unit, gap, longest)
            .iter()
            .map(|planned| (planned.start, planned.end))
            .collect()
    }

    #[test]
    fn merges_over_small_gaps_only() {
        assert_eq!(
            plan(&[(0, 10), (10, 10), (25, 5), (100, 10)], 5, 1000),
            [(0, 30), (100, 110)]
        );
        let capped = plan(&[(0, 10), (10, 10), (20, 10)], 5, 20);
        assert_eq!(capped, [(0, 20), (20, 30)]);
        assert_eq!(plan(&[(0, 100)], 5, 20), [(0, 100)]);
    }

    proptest! {
        #[test]
        fn every_unit_is_in_exactly_one_range(
            steps in prop::collection::vec((0u64..50, 1u64..50), 1..50),
            gap in 0u64..40,
            longest in 1u64..200,
        ) {
            let mut offset = 0;
            let mut units = Vec::new();
            for (space, size) in steps {
                offset += space;
                units.push(Unit { offset, size });
                offset += size;
            }
            let groups = group(units.clone(), |unit| *unit, gap, longest);
            let planned: Vec<Unit> = groups.iter().flat_map(|g| g.wanted.clone()).collect();
            prop_assert_eq!(planned, units);
            for group in &groups {
                prop_assert!(group.wanted.len() == 1 || group.end - group.start <= longest);
                for pair in group.wanted.windows(2) {
                    prop_assert!(pair[1].offset - (pair[0].offset + pair[0].size) <= gap);
                }
            }
        }
    }
}
