//! The daemon `sluice-snapshotter`.

fn main() {}
