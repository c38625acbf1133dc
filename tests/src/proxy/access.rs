//! Whom the proxy answers.

use super::http::Head;

/// How every token begins; a number follows.
pub const TOKEN: &str = "tokens-are-numbered-";

/// What a request has to carry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    #[default]
    Open,
    /// This user and password, as the base64 of `user:password`.
    Password(String),
    /// A token of the proxy's own token server, which gives one to everybody
    /// and says that it lasts for a day.
    Token,
}

/// Tokens that were given out are numbered; those below `oldest` are refused.
#[derive(Debug, Default)]
pub(super) struct Gate {
    pub(super) access: Access,
    issued: u64,
    oldest: u64,
}

impl Gate {
    /// Refuses every token given out so far.
    pub(super) fn expire(&mut self) {
        self.oldest = self.issued;
    }

    /// The body of a request for a token, if it is one.
    pub(super) fn token(&mut self, path: &str) -> Option<String> {
        if self.access != Access::Token || !path.starts_with("/token") {
            return None;
        }
        let number = self.issued;
        self.issued += 1;
        Some(format!(
            r#"{{"token":"{TOKEN}{number}","expires_in":86400}}"#
        ))
    }

    /// The challenge for a request that may not pass.
    pub(super) fn challenge(&self, request: &Head, host: &str) -> Option<String> {
        let given = request.get("authorization");
        match &self.access {
            Access::Open => None,
            Access::Password(pair) => {
                let wanted = format!("Basic {pair}");
                (given != Some(&wanted)).then(|| "Basic realm=\"test\"".to_owned())
            }
            Access::Token => {
                let number = given
                    .and_then(|given| given.strip_prefix("Bearer "))
                    .and_then(|token| token.strip_prefix(TOKEN))
                    .and_then(|number| number.parse::<u64>().ok());
                let good = number.is_some_and(|number| number >= self.oldest);
                (!good).then(|| format!("Bearer realm=\"http://{host}/token\",service=\"test\""))
            }
        }
    }
}
