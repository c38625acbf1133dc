//! What answers for the registry at the far end: for blobs a web server out of
//! the registry's own store, as registries leave them to object stores, and for
//! all else the registry. Debian's docker-registry reads 4 MiB for every range,
//! which takes 6 ms of a processor that is the node's here and nowhere else.

use std::fs;
use std::net::{SocketAddr, TcpStream};

use anyhow::{Result, bail};
use sluice_tests::command::wait_for;
use sluice_tests::{Link, Process, Registry, Scratch};

/// nginx in front of a registry.
pub struct Front {
    address: SocketAddr,
    _process: Process,
}

const PORT: u16 = 5001;

impl Front {
    /// At the far end of `link`, where the registry is.
    pub fn start(scratch: &Scratch, link: &Link, registry: &Registry) -> Result<Self> {
        let dir = scratch.fresh_dir("front")?;
        let address = SocketAddr::from((link.far_address(), PORT));
        let (place, blobs) = (dir.display(), registry.blobs_dir());
        let (blobs, registry) = (blobs.display(), registry.host());
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("    {name}_temp_path {place}/{name};\n"))
            .concat();
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
        listen {address};
        location ~ "^/v2/.+/blobs/sha256:(?<two>[0-9a-f]{{2}})(?<more>[0-9a-f]{{62}})$" {{
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
            _process: process,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}
