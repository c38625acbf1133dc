//! When to try again.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::RETRY_AFTER;
use tokio::time::Instant;

use crate::{Error, RetryPolicy};

/// The tries of one operation.
pub(crate) struct Attempts {
    policy: RetryPolicy,
    started: Instant,
    failed: u32,
}

impl Attempts {
    pub(crate) fn new(policy: &RetryPolicy) -> Self {
        Self {
            policy: policy.clone(),
            started: Instant::now(),
            failed: 0,
        }
    }

    /// Progress was made: what failed before does not count any more.
    pub(crate) fn restart(&mut self) {
        self.started = Instant::now();
        self.failed = 0;
    }

    /// Whether there will be another try after a failure.
    pub(crate) fn go_on(&self) -> bool {
        self.policy.attempts > 1
    }

    /// Waits until the next try is due, or gives the error back when there
    /// will be none.
    pub(crate) async fn pause(&mut self, error: Error) -> Result<(), Error> {
        self.failed += 1;
        if !error.kind().is_transient() {
            return Err(error);
        }
        if self.failed >= self.policy.attempts {
            return Err(self.give_up(error));
        }
        let delay = error
            .retry_after()
            .unwrap_or_else(|| backoff(&self.policy, self.failed, random()));
        if self.started.elapsed() + delay > self.policy.deadline {
            return Err(self.give_up(error));
        }
        tracing::debug!(%error, ?delay, attempt = self.failed, "trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }

    fn give_up(&self, error: Error) -> Error {
        match self.failed {
            1 => error,
            tries => error.with_note(&format!(" (tried {tries} times)")),
        }
    }
}

/// Half fixed, half random, so that clients that failed together do not come
/// back together.
fn backoff(policy: &RetryPolicy, failed: u32, random: u64) -> Duration {
    let full = policy
        .base_delay
        .saturating_mul(1 << (failed - 1).min(20))
        .min(policy.max_delay);
    let fraction = (random % 1024) as f64 / 1024.0;
    full / 2 + (full / 2).mul_f64(fraction)
}

/// The standard library seeds its hash maps from the system's random source.
fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// `Retry-After` in either of its forms.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let policy = RetryPolicy {
            base_delay: Duration::from_millis(100),
            max_delay: Duration::from_millis(350),
            ..RetryPolicy::default()
        };
        let longest = |failed| backoff(&policy, failed, 1023).as_millis();
        let shortest = |failed| backoff(&policy, failed, 0).as_millis();
        assert_eq!([1, 2, 3, 99].map(shortest), [50, 100, 175, 175]);
        assert_eq!([1, 2, 3, 99].map(longest), [99, 199, 349, 349]);
    }

    #[test]
    fn retry_after_in_seconds_and_as_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let parse = |text: &str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
            retry_after(&headers, now)
        };
        assert_eq!(parse("7"), Some(Duration::from_secs(7)));
        assert_eq!(
            parse("Sun, 06 Nov 1994 08:49:47 GMT"),
            Some(Duration::from_secs(10))
        );
        assert_eq!(parse("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(parse("-1"), None);
        assert_eq!(parse("soon"), None);
    }
}
