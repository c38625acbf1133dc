//! Benchmarks and the demonstration.
