//! Debian's `docker-registry`, really running.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The password file's only account; bcrypt is all that the registry reads.
pub const USER: &str = "me";
pub const PASSWORD: &str = "s3cret";
const HTPASSWD: &str = "$2b$04$oy9yaUKEGHeX8a8JsZrfBuzyCekGIfMWwW7lFTbH532SWPYS0L5Iy";

/// A registry that lives as long as this handle.
pub struct DockerRegistry {
    child: Child,
    directory: TempDir,
    pub host: String,
}

impl DockerRegistry {
    pub fn start() -> Self {
        Self::launch(false)
    }

    /// One that asks for Basic authentication.
    pub fn with_password() -> Self {
        Self::launch(true)
    }

    fn launch(password: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // A port can be taken between choosing and binding it; choose again.
        for _ in 0..20 {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let host = listener.local_addr().unwrap().to_string();
            drop(listener);
            let config = write_config(directory.path(), &host, password);
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("docker-registry (of Debian's package of that name) is needed");
            if answers(&host, &mut child) {
                return Self {
                    child,
                    directory,
                    host,
                };
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry does not start");
    }

    /// Where its blobs are kept.
    pub fn storage(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_config(directory: &Path, host: &str, password: bool) -> std::path::PathBuf {
    let mut text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp: {{addr: \"{host}\"}}\n",
        directory.join("data").display()
    );
    if password {
        let file = directory.join("htpasswd");
        std::fs::write(&file, format!("{USER}:{HTPASSWD}\n")).unwrap();
        text.push_str(&format!(
            "auth:\n  htpasswd: {{realm: test, path: {}}}\n",
            file.display()
        ));
    }
    let path = directory.join("config.yml");
    std::fs::write(&path, text).unwrap();
    path
}

fn answers(host: &str, child: &mut Child) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if std::net::TcpStream::connect(host).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}
