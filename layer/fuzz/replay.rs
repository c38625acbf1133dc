//! Runs a fuzz target's check over its corpus, and over what becomes of it by
//! some hundred fixed mutations. Shared by the crates that have fuzz targets.

use std::fs;
use std::path::Path;

/// Checks every input of `corpus`, and `mutations` of each.
pub(crate) fn replay(corpus: &Path, mutations: u32, check: fn(&[u8])) {
    let mut paths: Vec<_> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(paths.len() >= 5, "the corpus {} is gone", corpus.display());
    let inputs: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    let mut random = Random(0x5eed);
    check(b"");
    for (input, path) in inputs.iter().zip(&paths) {
        println!("{}", path.display());
        check(input);
        for _ in 0..mutations {
            let other = &inputs[random.below(inputs.len())];
            check(&mutate(input, other, &mut random));
        }
    }
}

fn mutate(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut output = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(output.len() + 1);
        match random.below(6) {
            0 => output.truncate(at),
            1 => output.insert(at, random.below(256) as u8),
            2 => {
                let from = random.below(other.len() + 1);
                let to = from + random.below(other.len() - from + 1);
                output.splice(at..at, other[from..to].iter().copied());
            }
            3 => {
                let end = (at + random.below(8)).min(output.len());
                output.drain(at..end);
            }
            _ if at < output.len() => match random.below(3) {
                0 => output[at] = random.below(256) as u8,
                1 => output[at] ^= 1 << random.below(8),
                // A digit for a digit: what JSON is full of.
                _ => output[at] = b'0' + random.below(10) as u8,
            },
            _ => {}
        }
    }
    output
}

/// A linear congruential generator: the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}
