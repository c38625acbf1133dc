//! What answers for the registry at the far end: for blobs a web server out of
//! the registry's own store, as registries leave them to object stores, and for
//! all else the registry. Debian's docker-registry reads 4 MiB for every range,
//! which takes 6 ms of a processor that is the node's here and nowhere else.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;
use sluice_tests::command::wait_for;
use sluice_tests::tls::Identity;
use sluice_tests::{Link, Process, Registry, Scratch};

/// What it speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// HTTP/1.1 without TLS: the link sees each request.
    Http,
    /// HTTP/1.1 over TLS.
    Https,
    /// HTTP/2 over TLS.
    Http2,
}

/// nginx in front of a registry.
pub struct Front {
    address: SocketAddr,
    identity: Option<Identity>,
    requests: PathBuf,
    _process: Process,
}

const PORT: u16 = 5001;

impl Front {
    /// At the far end of `link`, where the registry is.
    pub fn start(
        scratch: &Scratch,
        link: &Link,
        registry: &Registry,
        protocol: Protocol,
    ) -> Result<Self> {
        let dir = scratch.fresh_dir("front")?;
        let address = SocketAddr::from((link.far_address(), PORT));
        let (place, blobs) = (dir.display(), registry.blobs_dir());
        let (blobs, registry) = (blobs.display(), registry.host());
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("    {name}_temp_path {place}/{name};\n"))
            .concat();
        let identity = match protocol {
            Protocol::Http => None,
            _ => Some(Identity::make(&dir)?),
        };
        let listen = match protocol {
            Protocol::Http => "",
            Protocol::Https => " ssl",
            Protocol::Http2 => " ssl http2",
        };
        let requests = dir.join("requests.log");
        let shown = identity.iter().map(|identity| {
            format!(
                "        ssl_certificate {};\n        ssl_certificate_key {};\n\
                 \x20       ssl_protocols TLSv1.3;\n        access_log {};\n",
                identity.certificate.display(),
                identity.key.display(),
                requests.display()
            )
        });
        let tls: String = shown.collect();
        let config = format!(
            r#"daemon off;
master_process off;
user root;
pid {place}/pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
{paths}    access_log off;
    sendfile on;
    keepalive_requests 1000000;
    server {{
        listen {address}{listen};
{tls}        location ~ "^/v2/.+/blobs/sha256:(?<two>[0-9a-f]{{2}})(?<more>[0-9a-f]{{62}})$" {{
            default_type application/octet-stream;
            alias {blobs}/$two/$two$more/data;
        }}
        location / {{
            proxy_pass http://{registry};
            proxy_set_header Host $http_host;
        }}
    }}
}}
"#
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config)?;
        let mut command = link.far_command("nginx");
        command.args(["-e", "stderr", "-p"]).arg(&dir);
        command.arg("-c").arg(&file);
        let process = scratch.spawn("front", command)?;
        wait_for("nginx", || {
            if !process.is_running() {
                bail!("nginx ended: {}", process.log());
            }
            Ok(TcpStream::connect(address).ok())
        })?;
        Ok(Self {
            address,
            identity,
            requests,
            _process: process,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who has signed its certificate, for clients that reach it by 127.0.0.1.
    /// None without TLS.
    pub fn authority(&self) -> Option<&Path> {
        Some(&self.identity.as_ref()?.authority)
    }

    /// Counts requests anew.
    pub fn forget(&self) -> Result<()> {
        Ok(fs::write(&self.requests, "")?)
    }

    /// How many requests it has answered to the end. Counted with TLS alone:
    /// without it the link sees them.
    pub fn requests(&self) -> Result<usize> {
        let log = fs::read(&self.requests)?;
        Ok(log.iter().filter(|&&byte| byte == b'\n').count())
    }
}
