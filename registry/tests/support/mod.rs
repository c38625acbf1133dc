//! Shared by the tests: a real registry, and a server that misbehaves on
//! request.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod docker_registry;
pub mod fault_server;

use std::time::Duration;

use sluice_registry::{Client, Config, RetryPolicy};

/// Settings with short pauses, and time-outs that a loaded machine does not
/// reach.
pub fn config() -> Config {
    Config {
        retry: RetryPolicy {
            attempts: 4,
            base_delay: Duration::from_millis(5),
            max_delay: Duration::from_millis(20),
            deadline: Duration::from_secs(30),
        },
        connect_timeout: Duration::from_secs(20),
        stall_timeout: Duration::from_secs(20),
        ..Config::default()
    }
}

pub fn client() -> Client {
    Client::new(config()).unwrap()
}

/// One for servers that say nothing.
pub fn impatient_client() -> Client {
    Client::new(Config {
        connect_timeout: Duration::from_millis(500),
        stall_timeout: Duration::from_millis(500),
        ..config()
    })
    .unwrap()
}
