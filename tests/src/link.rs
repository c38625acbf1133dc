//! A shaped network link to a namespace of its own.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::{attempt, run, text};
use crate::scratch::Scratch;

/// A pair of virtual interfaces: the near end here, the far end in a network
/// namespace. What comes from the far end is shaped, so that it is a download
/// link for whoever is here; the other direction is not.
pub struct Link {
    namespace: String,
    near: String,
    near_address: Ipv4Addr,
    far_address: Ipv4Addr,
}

/// How a link is shaped.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Megabits a second.
    pub rate_mbit: u32,
    /// One-way delay in milliseconds; needs the kernel's netem.
    pub delay_ms: u32,
}

impl Link {
    /// Makes the namespace and the link.
    pub fn new(scratch: &Scratch) -> Result<Self> {
        let used = text(Command::new("ip").args(["-4", "-o", "address"]))?;
        // 198.18.0.0/15 is set aside for benchmarks: no real network has it.
        let start = std::process::id();
        for attempt in 0..64 {
            let number = (start + attempt * 257) % 0x4000;
            let [high, low] = u16::try_from(number * 4)?.to_be_bytes();
            let near_address = Ipv4Addr::new(198, 18, high, low | 1);
            let far_address = Ipv4Addr::new(198, 18, high, low | 2);
            let link = Self {
                namespace: format!("sluice-{number}"),
                near: format!("sluice{number}"),
                near_address,
                far_address,
            };
            let taken = used.contains(&format!(" {near_address}/"))
                || !link.ip(&["netns", "add", &link.namespace])?;
            if !taken {
                scratch.own_namespace(&link.namespace);
                link.connect()?;
                return Ok(link);
            }
        }
        bail!("no free address for a link in 198.18.0.0/16; is `ip netns add` allowed here?")
    }

    fn connect(&self) -> Result<()> {
        let far = "eth0";
        let near_cidr = format!("{}/30", self.near_address);
        let far_cidr = format!("{}/30", self.far_address);
        let (ns, near) = (self.namespace.as_str(), self.near.as_str());
        for arguments in [
            &[
                "link", "add", near, "type", "veth", "peer", "name", far, "netns", ns,
            ][..],
            &["address", "add", &near_cidr, "dev", near],
            &["link", "set", near, "up"],
            &["-n", ns, "address", "add", &far_cidr, "dev", far],
            &["-n", ns, "link", "set", far, "up"],
            &["-n", ns, "link", "set", "lo", "up"],
        ] {
            run(Command::new("ip").args(arguments))?;
        }
        Ok(())
    }

    fn ip(&self, arguments: &[&str]) -> Result<bool> {
        Ok(attempt(Command::new("ip").args(arguments))?
            .status
            .success())
    }

    /// Shapes what comes from the far end; again to change it.
    pub fn shape(&self, shape: Shape) -> Result<()> {
        let rate = format!("{}mbit", shape.rate_mbit);
        let tc = |arguments: &[&str]| {
            run(Command::new("tc")
                .args(["-n", &self.namespace, "qdisc", "replace", "dev", "eth0"])
                .args(arguments))
            .context("cannot shape the link; does the kernel have the queueing discipline?")
        };
        // A burst of a quarter of a megabyte holds four of the largest
        // packets; 50 ms of queue is what a home router has.
        let tbf = ["tbf", "rate", &rate, "burst", "256kb", "latency", "50ms"];
        if shape.delay_ms == 0 {
            tc(&[&["root"], &tbf[..]].concat())?;
        } else {
            let delay = format!("{}ms", shape.delay_ms);
            let netem = ["netem", "delay", &delay, "limit", "20000"];
            tc(&[&["root", "handle", "1:"], &netem[..]].concat())?;
            tc(&[&["parent", "1:1"], &tbf[..]].concat())?;
        }
        Ok(())
    }

    /// A command that will run at the far end.
    pub fn far_command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    /// The far end's address.
    pub fn far_address(&self) -> Ipv4Addr {
        self.far_address
    }

    /// Bytes that came over the link so far, all protocol overhead included.
    pub fn received_bytes(&self) -> Result<u64> {
        let file = format!("/sys/class/net/{}/statistics/rx_bytes", self.near);
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
        Ok(text.trim().parse()?)
    }
}
