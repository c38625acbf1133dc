//! What goes wrong, where and when.

use std::collections::BTreeMap;
use std::time::Duration;

/// What goes wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// An error status instead of the answer, with extra header lines.
    Status(u16, &'static str),
    /// The whole blob with status 200, whatever range was asked for.
    IgnoreRange,
    /// The right head, then only so many bytes of the body.
    Truncate(u64),
    /// The right head, so many bytes, then silence until the client leaves.
    Stall(u64),
    /// The connection closed without an answer.
    Close,
    /// The connection reset after so many bytes of the body.
    Reset(u64),
    /// The byte at this offset of the blob inverted. Answers without that
    /// byte do not count.
    Tamper(u64),
    /// The whole body replaced, with its length in the head.
    Replace(Vec<u8>),
    /// A redirect to the same path at another host, with a query that tells
    /// one redirect from another as a signature would.
    Redirect {
        /// Host and port.
        to: String,
        /// `name=value`.
        query: String,
    },
    /// The answer held back for so long. Comes on top of other faults.
    Delay(Duration),
    /// The body in pieces of 4 KiB, with this pause after each. Comes on top
    /// of other faults.
    Slow(Duration),
}

impl Fault {
    /// Its name, for counts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Status(..) => "status",
            Self::IgnoreRange => "ignored range",
            Self::Truncate(_) => "cut body",
            Self::Stall(_) => "stall",
            Self::Close => "closed connection",
            Self::Reset(_) => "reset connection",
            Self::Tamper(_) => "tampered byte",
            Self::Replace(_) => "replaced body",
            Self::Redirect { .. } => "redirect",
            Self::Delay(_) => "delay",
            Self::Slow(_) => "slow body",
        }
    }
}

/// A fault with its schedule: which requests it is for, and which of those it
/// strikes. As it is made, all of them.
#[derive(Debug, Clone)]
pub struct Rule {
    fault: Fault,
    part_of_path: String,
    ranged_only: bool,
    after: u64,
    every: u64,
    times: u64,
    /// Requests that it was for.
    met: u64,
}

impl Rule {
    /// Strikes every request, for ever.
    pub fn new(fault: Fault) -> Self {
        Self {
            fault,
            part_of_path: String::new(),
            ranged_only: false,
            after: 0,
            every: 1,
            times: u64::MAX,
            met: 0,
        }
    }

    /// Is for requests only whose path (with its query) holds the text.
    #[must_use]
    pub fn on(mut self, part_of_path: &str) -> Self {
        part_of_path.clone_into(&mut self.part_of_path);
        self
    }

    /// Is for requests with a range only.
    #[must_use]
    pub fn ranged(mut self) -> Self {
        self.ranged_only = true;
        self
    }

    /// Leaves the first `count` of its requests alone.
    #[must_use]
    pub fn after(mut self, count: u64) -> Self {
        self.after = count;
        self
    }

    /// Strikes every `count`th of its requests only, the first of them
    /// included.
    #[must_use]
    pub fn every(mut self, count: u64) -> Self {
        self.every = count.max(1);
        self
    }

    /// Strikes so often, and then no more.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.times = count;
        self
    }

    /// Meets a request; whether it is to be struck.
    fn meets(&mut self, path: &str, ranged: bool) -> bool {
        if !path.contains(&self.part_of_path) || (self.ranged_only && !ranged) {
            return false;
        }
        let number = self.met;
        self.met += 1;
        let since = number.checked_sub(self.after);
        self.times > 0 && since.is_some_and(|since| since.is_multiple_of(self.every))
    }
}

/// All rules, in the order in which they were added.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    rules: Vec<(u64, Rule)>,
    added: u64,
    struck: BTreeMap<&'static str, u64>,
}

/// What happens to one answer.
#[derive(Debug, Default)]
pub(super) struct Strike {
    pub(super) delay: Duration,
    pub(super) pause: Duration,
    pub(super) fault: Option<Fault>,
    rule: u64,
}

impl Schedule {
    pub(super) fn add(&mut self, rule: Rule) {
        self.rules.push((self.added, rule));
        self.added += 1;
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// Faults so far that had an effect, by name.
    pub(super) fn struck(&self) -> BTreeMap<&'static str, u64> {
        self.struck.clone()
    }

    /// What the rules say about a request: the first fault that is due, and
    /// all delays.
    pub(super) fn strike(&mut self, path: &str, ranged: bool) -> Strike {
        let mut strike = Strike::default();
        for (number, rule) in &mut self.rules {
            if !rule.meets(path, ranged) {
                continue;
            }
            match &rule.fault {
                Fault::Delay(delay) => strike.delay += *delay,
                Fault::Slow(pause) => strike.pause += *pause,
                _ if strike.fault.is_some() => continue,
                fault => {
                    strike.fault = Some(fault.clone());
                    strike.rule = *number;
                }
            }
            rule.times -= 1;
            *self.struck.entry(rule.fault.name()).or_default() += 1;
        }
        strike
    }

    /// Takes a fault back that had no effect.
    pub(super) fn missed(&mut self, strike: &Strike) {
        let rule = self.rules.iter_mut().find(|(at, _)| *at == strike.rule);
        if let (Some((_, rule)), Some(fault)) = (rule, &strike.fault) {
            rule.times += 1;
            *self.struck.entry(fault.name()).or_default() -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strikes(schedule: &mut Schedule, path: &str, count: usize) -> Vec<bool> {
        (0..count)
            .map(|_| schedule.strike(path, true).fault.is_some())
            .collect()
    }

    #[test]
    fn rules_count_requests() {
        let mut schedule = Schedule::default();
        let rule = Rule::new(Fault::Close).on("/blobs/").ranged();
        schedule.add(rule.after(2).every(3).times(2));
        assert!(schedule.strike("/manifests/x", true).fault.is_none());
        assert!(schedule.strike("/blobs/x", false).fault.is_none());
        let expected = [2, 5].map(|at| at as usize);
        let found = strikes(&mut schedule, "/blobs/x", 12);
        let at: Vec<_> = (0..12).filter(|&at| found[at]).collect();
        assert_eq!(at, expected);
        assert_eq!(
            schedule.struck(),
            BTreeMap::from([("closed connection", 2)])
        );
    }

    #[test]
    fn rules_follow_each_other_and_delays_come_on_top() {
        let mut schedule = Schedule::default();
        schedule.add(Rule::new(Fault::Delay(Duration::from_millis(2))).times(2));
        schedule.add(Rule::new(Fault::Close).times(1));
        schedule.add(Rule::new(Fault::Truncate(1)).times(1));
        let faults: Vec<_> = (0..3).map(|_| schedule.strike("/", false)).collect();
        assert_eq!(faults[0].fault, Some(Fault::Close));
        assert_eq!(faults[1].fault, Some(Fault::Truncate(1)));
        assert_eq!(faults[2].fault, None);
        let delays: Vec<_> = faults
            .iter()
            .map(|strike| strike.delay.as_millis())
            .collect();
        assert_eq!(delays, [2, 2, 0]);
        schedule.missed(&faults[1]);
        assert_eq!(schedule.strike("/", false).fault, Some(Fault::Truncate(1)));
    }
}
