//! The cold-start rig: real starts over a link of chosen bandwidth and
//! latency, against what the link and the processor allow.

pub mod chart;
pub mod front;
pub mod limit;
pub mod link;
pub mod node;
pub mod reads;
pub mod workloads;
