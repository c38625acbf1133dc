//! `WWW-Authenticate` (RFC 9110, section 11; the token specification of the
//! distribution project).

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// How a registry wants to be authenticated to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer(Bearer),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bearer {
    pub(crate) realm: String,
    pub(crate) service: Option<String>,
    pub(crate) scope: Option<String>,
}

impl Challenge {
    /// The challenge to answer: Bearer before Basic, as the former sends the
    /// password to the registry less often.
    pub(crate) fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut basic = false;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(text) = value.to_str() else { continue };
            for (scheme, parameters) in challenges(text) {
                if scheme.eq_ignore_ascii_case("bearer") {
                    if let Some(bearer) = bearer(parameters) {
                        return Some(Self::Bearer(bearer));
                    }
                } else if scheme.eq_ignore_ascii_case("basic") {
                    basic = true;
                }
            }
        }
        basic.then_some(Self::Basic)
    }
}

type Parameters = Vec<(String, String)>;

fn bearer(parameters: Parameters) -> Option<Bearer> {
    let take = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.clone())
            .filter(|value| !value.is_empty())
    };
    Some(Bearer {
        realm: take("realm")?,
        service: take("service"),
        scope: take("scope"),
    })
}

/// Splits `Scheme key=value, key="value", Scheme …`. What does not fit the
/// grammar ends the list.
fn challenges(text: &str) -> Vec<(&str, Parameters)> {
    let mut found: Vec<(&str, Parameters)> = Vec::new();
    let mut rest = text.trim_start_matches([' ', '\t', ',']);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            break;
        }
        let after_space = after.trim_start_matches([' ', '\t']);
        rest = match (after_space.strip_prefix('='), found.last_mut()) {
            (Some(value), Some((_, parameters))) => {
                let Some((value, after)) = parameter(value.trim_start_matches([' ', '\t'])) else {
                    break;
                };
                parameters.push((word.to_owned(), value));
                after
            }
            (Some(_), None) => break,
            (None, _) => {
                found.push((word, Vec::new()));
                after
            }
        };
        rest = rest.trim_start_matches([' ', '\t', ',']);
    }
    found
}

/// A token or quoted string, and what follows it.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return Some((value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(values: &[&str]) -> Option<Challenge> {
        Challenge::from_headers(&HeaderMap::from_iter(
            values
                .iter()
                .map(|value| (WWW_AUTHENTICATE, value.parse().unwrap())),
        ))
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer(Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }))
    }

    #[test]
    fn what_registries_send() {
        assert_eq!(
            parse(&[
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#
            ]),
            bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:a/b:pull,push")
            )
        );
        assert_eq!(parse(&[r#"Basic realm="x""#]), Some(Challenge::Basic));
        assert_eq!(parse(&["basic"]), Some(Challenge::Basic));
    }

    #[test]
    fn bearer_wins_however_they_are_listed() {
        let expected = bearer("https://a/", None, None);
        assert_eq!(
            parse(&["Basic realm=\"r\"", "Bearer realm=\"https://a/\""]),
            expected
        );
        assert_eq!(
            parse(&["Basic realm=\"r, s\", Negotiate, bearer Realm = \"https://a/\""]),
            expected
        );
        assert_eq!(parse(&["Bearer realm=https://a/, Basic"]), expected);
    }

    #[test]
    fn hostile_headers_are_no_challenge() {
        for bad in [
            "",
            ",,,",
            "=",
            "realm=\"x\"",
            "Bearer",
            "Bearer realm=\"\"",
            "Bearer realm=\"unterminated",
            "Bearer realm=\"x\\",
            "Digest realm=\"x\"",
            "\"Basic\"",
        ] {
            assert_eq!(parse(&[bad]), None, "{bad}");
        }
    }
}
