//! The four files of a layer on a node.

pub mod placement;
