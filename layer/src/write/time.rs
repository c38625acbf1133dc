//! RFC 3339, as Go prints it.

use super::header::Time;

/// `None` for 1970-01-01T00:00:00Z, which readers assume where there is no
/// time, and outside of the years 1 to 9999, which RFC 3339 cannot express.
pub(super) fn rfc3339(time: Time) -> Option<String> {
    if time == Time::default() {
        return None;
    }
    let days = time.secs.div_euclid(86_400);
    let second = time.secs.rem_euclid(86_400);
    let (year, month, day) = date(days)?;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if time.nanos > 0 {
        let fraction = format!(".{:09}", time.nanos);
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    Some(text)
}

/// The Gregorian date of a day counted from 1970-01-01. Counts in 400-year
/// eras of years that begin in March, so that the leap day comes last.
fn date(days: i64) -> Option<(i64, i64, i64)> {
    let shifted = days.checked_add(719_468)?;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era.checked_mul(400)? + i64::from(month <= 2);
    (1..=9999).contains(&year).then_some((year, month, day))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(secs: i64, nanos: u32) -> Option<String> {
        rfc3339(Time { secs, nanos })
    }

    #[test]
    fn known_times() {
        for (secs, nanos, expected) in [
            (1_000_000_000, 0, "2001-09-09T01:46:40Z"),
            (951_782_400, 500_000_000, "2000-02-29T00:00:00.5Z"),
            (-1, 0, "1969-12-31T23:59:59Z"),
            (0, 1, "1970-01-01T00:00:00.000000001Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(text(secs, nanos).as_deref(), Some(expected));
        }
    }

    #[test]
    fn times_that_have_no_text() {
        for secs in [0, 253_402_300_800, i64::MAX, i64::MIN, -62_135_596_801] {
            assert_eq!(text(secs, 0), None, "{secs}");
        }
    }
}
