//! The `Content-Range` header (RFC 9110, section 14.4).

use http::HeaderMap;
use http::header::CONTENT_RANGE;

/// `bytes FIRST-LAST/TOTAL`, `bytes FIRST-LAST/*` or `bytes */TOTAL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// First byte and number of bytes; absent where the range was not
    /// satisfiable. Never empty.
    pub(crate) part: Option<(u64, u64)>,
    pub(crate) total: Option<u64>,
}

impl ContentRange {
    pub(crate) fn parse(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
        let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
        let total = match total {
            "*" => None,
            digits => Some(number(digits)?),
        };
        if range == "*" {
            return total.map(|total| Self {
                part: None,
                total: Some(total),
            });
        }
        let (first, last) = range.split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        let len = last.checked_sub(first)?.checked_add(1)?;
        // Where it ends has to be a number, too.
        first.checked_add(len)?;
        if total.is_some_and(|total| last >= total) {
            return None;
        }
        Some(Self {
            part: Some((first, len)),
            total,
        })
    }
}

fn number(digits: &str) -> Option<u64> {
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<ContentRange> {
        ContentRange::parse(&HeaderMap::from_iter([(
            CONTENT_RANGE,
            text.parse().unwrap(),
        )]))
    }

    #[test]
    fn the_three_forms() {
        let range = |part, total| Some(ContentRange { part, total });
        assert_eq!(parse("bytes 0-9/10"), range(Some((0, 10)), Some(10)));
        assert_eq!(parse("bytes 5-5/*"), range(Some((5, 1)), None));
        assert_eq!(parse("bytes */7"), range(None, Some(7)));
    }

    #[test]
    fn refuses_nonsense() {
        for bad in [
            "",
            "bytes",
            "items 0-1/2",
            "bytes 0-1",
            "bytes */*",
            "bytes 2-1/5",
            "bytes 0-5/5",
            "bytes +1-2/5",
            "bytes 0-18446744073709551615/*",
            "bytes 18446744073709551615-18446744073709551615/*",
            "bytes 0-99999999999999999999/*",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
