//! Times reading a TOC: `read_toc ENTRIES` makes one of that many files, in
//! the indented form that stargz-snapshotter writes; the best of ten counts.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Instant;

use sluice_layer::{Format, Limits, TocLocation, TocTrust, read_toc, read_toc_json};
use sluice_oci::Digest;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let entries: usize = match std::env::args().nth(1) {
        Some(number) => number.parse()?,
        None => 100_000,
    };
    let json = json(entries)?;
    let mut header = vec![0; 512];
    header[..17].copy_from_slice(b"stargz.index.json");
    header[124..135].copy_from_slice(format!("{:011o}", json.len()).as_bytes());
    header[156] = b'0';
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&header)?;
    gzip.write_all(json.as_bytes())?;
    let gzip = gzip.finish()?;
    let zstd = zstd::bulk::compress(json.as_bytes(), 3)?;
    for (format, compressed) in [(Format::Estargz, gzip), (Format::ZstdChunked, zstd)] {
        let location = TocLocation {
            format,
            offset: 1 << 40,
            compressed_size: compressed.len() as u64,
            uncompressed_size: (format == Format::ZstdChunked).then_some(json.len() as u64),
        };
        let digest = Digest::of(json.as_bytes());
        let trust = TocTrust::Uncompressed(digest);
        let limits = Limits::default();
        let (mut whole, mut parsing, mut hashing) = (f64::MAX, f64::MAX, f64::MAX);
        let mut inodes = 0;
        for _ in 0..10 {
            let start = Instant::now();
            inodes = read_toc(&location, &compressed, &trust, &limits)?
                .nodes()
                .len();
            whole = whole.min(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            read_toc_json(format, 1 << 40, json.as_bytes(), &digest, &limits)?;
            parsing = parsing.min(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            std::hint::black_box(Digest::of(json.as_bytes()));
            hashing = hashing.min(start.elapsed().as_secs_f64() * 1e3);
        }
        println!(
            "{format}: {inodes} inodes from {} bytes ({} compressed): {whole:.0} ms, \
             of which hashing {hashing:.0} and parsing {:.0}",
            json.len(),
            compressed.len(),
            parsing - hashing,
        );
    }
    Ok(())
}

fn json(entries: usize) -> Result<String, std::fmt::Error> {
    let mut json = String::from("{\n\t\"version\": 1,\n\t\"entries\": [\n");
    for index in 0..entries {
        let digest = Digest::of(&index.to_le_bytes());
        write!(
            json,
            "\t\t{{\n\t\t\t\"name\": \"usr/lib/python3/dist-packages/package{}/module_{}.py\",\n\t\t\t\"type\": \"reg\",\n\t\t\t\"size\": 4096,\n\t\t\t\"modtime\": \"2024-03-01T12:00:00Z\",\n\t\t\t\"mode\": 420,\n\t\t\t\"offset\": {},\n\t\t\t\"digest\": \"{digest}\",\n\t\t\t\"chunkDigest\": \"{digest}\"\n\t\t}}",
            index / 100,
            index,
            index * 2048 + 512,
        )?;
        json.push_str(if index + 1 < entries { ",\n" } else { "\n" });
    }
    json.push_str("\t]\n}");
    Ok(json)
}
