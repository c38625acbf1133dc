//! What a start read when, and what it waited for.

use anyhow::Result;
use sluice_layer::{Profile, Unit};
use sluice_oci::Digest;

use super::limit::{Tables, layer_of};
use super::link::Transfer;

/// The first read of one chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Read {
    /// Seconds since the start of the pull.
    pub at: f64,
    /// The transfer that brought it, and when: none where the content came by
    /// another way than ranges of the layer.
    pub brought: Option<(usize, f64)>,
}

impl Read {
    /// Seconds that its bytes were missing for.
    pub fn waited(&self) -> f64 {
        let arrived = self.brought.map_or(self.at, |(_, arrived)| arrived);
        (arrived - self.at).max(0.0)
    }
}

/// The reads of a recording that began at `began`, each with the transfer that
/// brought its last byte.
pub fn reads(
    tables: &Tables,
    recording: &Profile,
    began: f64,
    transfers: &[Transfer],
) -> Result<Vec<Read>> {
    let mut reads = Vec::new();
    for read in recording.reads() {
        let layer = layer_of(recording, read)?;
        let units = tables.units(layer, read)?;
        let brought = units
            .iter()
            .filter_map(|unit| bringing(transfers, layer, *unit));
        reads.push(Read {
            at: began + read.at.as_secs_f64(),
            brought: brought.max_by(|a, b| a.1.total_cmp(&b.1)),
        });
    }
    Ok(reads)
}

/// The transfer that brought a unit first, and when.
fn bringing(transfers: &[Transfer], layer: Digest, unit: Unit) -> Option<(usize, f64)> {
    let name = layer.to_string();
    let arrival = |transfer: &Transfer| {
        let (start, end) = transfer.span()?;
        let last = unit.offset + unit.size;
        if !transfer.request.ends_with(&name) || unit.offset < start || last > end + 1 {
            return None;
        }
        transfer.arrival(last - start)
    };
    let arrivals = transfers.iter().enumerate();
    arrivals
        .filter_map(|(row, transfer)| Some((row, arrival(transfer)?)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
}

/// Seconds in which at least one reader's bytes were missing.
pub fn seconds_waited(reads: &[Read]) -> f64 {
    let mut spans: Vec<(f64, f64)> = reads.iter().map(|r| (r.at, r.at + r.waited())).collect();
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut sum, mut until) = (0.0, f64::MIN);
    for (from, to) in spans {
        sum += (to - from.max(until)).max(0.0);
        until = until.max(to);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(request: &str, range: &str, first: f64, last: f64, bytes: u64) -> Transfer {
        Transfer {
            connection: 0,
            request: request.to_owned(),
            range: Some(range.to_owned()),
            sent: 0.0,
            first: Some(first),
            last,
            bytes,
        }
    }

    #[test]
    fn a_unit_comes_with_the_first_transfer_that_brings_its_last_byte() {
        let layer = Digest::of(b"layer");
        let blob = format!("GET /v2/image/blobs/{layer}");
        let transfers = [
            transfer("GET /v2/image/blobs/other", "bytes=0-999", 0.0, 0.0, 1000),
            transfer(&blob, "bytes=0-999", 1.0, 2.0, 1000),
            transfer(&blob, "bytes=500-599", 5.0, 5.0, 100),
            // Half of it is still on its way.
            transfer(&blob, "bytes=2000-2999", 6.0, 7.0, 500),
        ];
        let unit = |offset, size| Unit { offset, size };
        let brought = |unit| bringing(&transfers, layer, unit);
        assert_eq!(brought(unit(400, 100)), Some((1, 1.5)));
        assert_eq!(brought(unit(500, 100)), Some((1, 1.6)));
        assert_eq!(brought(unit(2000, 250)), Some((3, 6.5)));
        assert_eq!(brought(unit(2400, 600)), None);
        assert_eq!(brought(unit(999, 2)), None);
    }

    #[test]
    fn waiting_at_once_counts_once() {
        let read = |at, arrived| Read {
            at,
            brought: Some((0, arrived)),
        };
        let there = Read {
            at: 9.0,
            brought: None,
        };
        let reads = [read(1.0, 3.0), read(2.0, 4.0), read(8.0, 7.0), there];
        assert_eq!(reads[2].waited(), 0.0);
        assert_eq!(seconds_waited(&reads), 3.0);
        assert_eq!(seconds_waited(&[]), 0.0);
    }
}
