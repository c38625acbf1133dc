//! Everything at once, for two minutes or as long as `make soak MINUTES=…`
//! says.

use std::time::Duration;

use anyhow::{Context as _, Result};
use sluice_tests::soak::Soak;

const MINUTES: f64 = 2.0;

#[test]
fn nothing_breaks_and_nothing_leaks() -> Result<()> {
    let minutes = match std::env::var("SLUICE_SOAK_MINUTES") {
        Ok(minutes) => minutes
            .parse()
            .with_context(|| format!("SLUICE_SOAK_MINUTES is '{minutes}', which is no number"))?,
        Err(_) => MINUTES,
    };
    Soak::start()?.run(Duration::from_secs_f64(minutes * 60.0))
}
