//! `make bench-cold-start`: how long programs of different kinds take from
//! the start of the pull until they are ready.

fn main() {}
