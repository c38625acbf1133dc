//! As much of HTTP/1.1 as the proxy needs.

use std::io::{BufRead as _, BufReader, Read};

use anyhow::{Context as _, Result, bail};

/// First line and headers of a message.
pub(super) struct Head {
    pub(super) first: String,
    pub(super) headers: Vec<(String, String)>,
}

impl Head {
    pub(super) fn read(from: &mut BufReader<impl Read>) -> Result<Option<Self>> {
        let Some(first) = line(from)? else {
            return Ok(None);
        };
        let mut headers = Vec::new();
        loop {
            match line(from)?.as_deref() {
                None => bail!("the head is cut short"),
                Some("") => return Ok(Some(Self { first, headers })),
                Some(line) => {
                    let (name, value) = line.split_once(':').context("a header has no colon")?;
                    headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
            }
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(header, _)| header == name)
            .map(|(_, value)| value.as_str())
    }
}

fn line(from: &mut BufReader<impl Read>) -> Result<Option<String>> {
    let mut line = String::new();
    if from.by_ref().take(64 << 10).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
}
