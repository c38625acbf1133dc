//! Times as in RFC 3339.

use super::Mtime;

/// Parses `2006-01-02T15:04:05[.999999999](Z|±hh:mm)`. As containerd does
/// when it unpacks, a time before 1970 or beyond what 64 bits of nanoseconds
/// hold becomes 1970-01-01.
pub(crate) fn parse(text: &[u8]) -> Option<Mtime> {
    let (date_time, rest) = text.split_at_checked(19)?;
    let field = |range: std::ops::Range<usize>| {
        date_time[range].iter().try_fold(0i64, |value, digit| {
            digit
                .is_ascii_digit()
                .then(|| value * 10 + i64::from(digit - b'0'))
        })
    };
    let separators = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')];
    if separators.iter().any(|(at, byte)| date_time[*at] != *byte)
        || !matches!(date_time[10], b'T' | b't')
    {
        return None;
    }
    let (year, month, day) = (field(0..4)?, field(5..7)?, field(8..10)?);
    let (hour, minute, second) = (field(11..13)?, field(14..16)?, field(17..19)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let (nanos, zone) = fraction(rest)?;
    let secs = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second
        - offset(zone)?;
    Some(bound(secs, nanos))
}

fn bound(secs: i64, nanos: u32) -> Mtime {
    const LAST: (i64, u32) = (i64::MAX / 1_000_000_000, (i64::MAX % 1_000_000_000) as u32);
    if secs < 0 || (secs, nanos) > LAST {
        return Mtime::default();
    }
    Mtime { secs, nanos }
}

/// Splits `.123Z` into nanoseconds and `Z`.
fn fraction(text: &[u8]) -> Option<(u32, &[u8])> {
    let Some(text) = text.strip_prefix(b".") else {
        return Some((0, text));
    };
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 {
        return None;
    }
    let nanos = (0..9).fold(0, |value, at| {
        let digit = if at < digits { text[at] - b'0' } else { 0 };
        value * 10 + u32::from(digit)
    });
    Some((nanos, &text[digits..]))
}

/// Seconds that local time is ahead of UTC.
fn offset(zone: &[u8]) -> Option<i64> {
    match *zone {
        [b'Z' | b'z'] => Some(0),
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2]
            if [h1, h2, m1, m2].iter().all(u8::is_ascii_digit) =>
        {
            let two = |a: u8, b: u8| i64::from(a - b'0') * 10 + i64::from(b - b'0');
            let seconds = two(h1, h2) * 3_600 + two(m1, m2) * 60;
            Some(if sign == b'-' { -seconds } else { seconds })
        }
        _ => None,
    }
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar; years begin in
/// March here, so that the leap day is a year's last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64, nanos: u32) -> Option<Mtime> {
        Some(Mtime { secs, nanos })
    }

    #[test]
    fn reads_utc_fractions_and_zones() {
        assert_eq!(parse(b"1970-01-01T00:00:00Z"), at(0, 0));
        assert_eq!(parse(b"2000-02-29T12:34:56Z"), at(951_827_696, 0));
        assert_eq!(
            parse(b"2022-12-31T23:59:59.5Z"),
            at(1_672_531_199, 500_000_000)
        );
        assert_eq!(
            parse(b"2022-12-31T23:59:59.123456789123Z"),
            at(1_672_531_199, 123_456_789)
        );
        assert_eq!(parse(b"2023-01-01T01:30:00+01:30"), at(1_672_531_200, 0));
        assert_eq!(parse(b"2022-12-31T22:00:00-02:00"), at(1_672_531_200, 0));
    }

    #[test]
    fn bounds_as_containerd_does() {
        assert_eq!(parse(b"0001-01-01T00:00:00Z"), at(0, 0));
        assert_eq!(parse(b"1969-12-31T23:59:59Z"), at(0, 0));
        assert_eq!(
            parse(b"2262-04-11T23:47:16.854775807Z"),
            at(9_223_372_036, 854_775_807)
        );
        assert_eq!(parse(b"2262-04-11T23:47:16.854775808Z"), at(0, 0));
        assert_eq!(parse(b"9999-12-31T23:59:59Z"), at(0, 0));
    }

    #[test]
    fn refuses_other_text() {
        for bad in [
            "",
            "now",
            "2022-12-31",
            "2022-12-31T23:59:59",
            "2022-12-31T23:59:59.Z",
            "2022-13-01T00:00:00Z",
            "2022-00-01T00:00:00Z",
            "2022-12-31T24:00:00Z",
            "2022-12-31 23:59:59Z",
            "2022-12-31T23:59:59+0100",
            "2022-12-31T23:59:59Zjunk",
            "+022-12-31T23:59:59Z",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
