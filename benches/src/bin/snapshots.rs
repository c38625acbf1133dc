//! What `Prepare` costs on a node with many snapshots, against a node with
//! few.
//!
//! `cargo run --release -p sluice-benches --bin snapshots -- --help`; as root,
//! on a machine that does nothing else. A table goes to standard error, JSON to
//! standard output.

use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::json;
use sluice_tests::daemon::Options;
use sluice_tests::figures::Work;
use sluice_tests::{Daemon, Scratch, Snapshots};

/// `Prepare` among many snapshots.
#[derive(Parser)]
struct Arguments {
    /// Snapshots of the node that has few
    #[arg(long, default_value_t = 100)]
    few: usize,
    /// Snapshots of the node that has many
    #[arg(long, default_value_t = 10_000)]
    many: usize,
    /// Calls on each node, turn by turn; medians are told
    #[arg(long, default_value_t = 400)]
    calls: usize,
}

/// A daemon with snapshots, and what calls took there.
struct Node {
    daemon: Daemon,
    client: Snapshots,
    milliseconds: Vec<f64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(measure(&arguments))
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut nodes = Vec::new();
    for count in [arguments.few, arguments.many] {
        eprintln!("making {count} snapshots");
        nodes.push(filled(&scratch, count).await?);
    }
    let mut before = Vec::new();
    for node in &nodes {
        before.push(Work::of(node.daemon.process().pid())?);
    }
    for call in 0..arguments.calls {
        // In turns, so that both have the same weather.
        for node in &mut nodes {
            let clock = Instant::now();
            node.client
                .prepare(&format!("call-{call}"), "parent")
                .await?;
            node.milliseconds
                .push(clock.elapsed().as_secs_f64() * 1000.0);
        }
    }
    let mut report = Vec::new();
    for ((node, before), count) in nodes
        .iter_mut()
        .zip(before)
        .zip([arguments.few, arguments.many])
    {
        let work = Work::of(node.daemon.process().pid())?.since(before);
        node.milliseconds.sort_by(f64::total_cmp);
        let at = |part: f64| node.milliseconds[(node.milliseconds.len() as f64 * part) as usize];
        let calls = arguments.calls as u64;
        report.push(json!({
            "snapshots": count,
            "median_ms": at(0.5),
            "p95_ms": at(0.95),
            "system_calls": work.calls / calls,
            "bytes": work.bytes / calls,
        }));
    }
    let median = |index: usize| report[index]["median_ms"].as_f64().context("a number");
    let ratio = median(1)? / median(0)?;
    for line in &report {
        eprintln!("{line}");
    }
    eprintln!(
        "median with {} against {}: {ratio:.2}; at most 2 is the target",
        arguments.many, arguments.few
    );
    println!("{:#}", json!({"nodes": report, "ratio": ratio}));
    Ok(())
}

async fn filled(scratch: &Scratch, count: usize) -> Result<Node> {
    let daemon = Daemon::start(scratch, &Options::default())?;
    let client = Snapshots::connect(&daemon).await?;
    client.prepare("base", "").await?;
    client.commit("parent", "base").await?;
    client.prepare_many("parent", 0..count).await?;
    Ok(Node {
        daemon,
        client,
        milliseconds: Vec::new(),
    })
}
