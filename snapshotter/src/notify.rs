//! The few words of `sd_notify(3)` that the daemon says to systemd.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Where the service manager listens; silent where there is none.
#[derive(Debug, Clone, Default)]
pub struct Notifier(Option<SocketAddr>);

impl Notifier {
    /// From the value of `NOTIFY_SOCKET`: a path, or an abstract name after
    /// `@`.
    pub fn new(socket: Option<&OsStr>) -> io::Result<Self> {
        let address = socket
            .map(|socket| match socket.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
                path => SocketAddr::from_pathname(OsStr::from_bytes(path)),
            })
            .transpose()?;
        Ok(Self(address))
    }

    /// The daemon serves from now on.
    pub fn ready(&self) {
        self.say("READY=1");
    }

    /// The daemon is on its way out.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, words: &str) {
        let Some(address) = &self.0 else { return };
        let sent = UnixDatagram::unbound()
            .and_then(|socket| socket.send_to_addr(words.as_bytes(), address));
        if let Err(error) = sent {
            tracing::warn!(%error, words, "cannot notify the service manager");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_its_words_to_a_path_and_to_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("sluice-notify-test-{}", std::process::id());
        let listeners = [
            (path.clone().into_os_string(), UnixDatagram::bind(&path)),
            (
                format!("@{name}").into(),
                SocketAddr::from_abstract_name(&name)
                    .and_then(|address| UnixDatagram::bind_addr(&address)),
            ),
        ];
        for (socket, listener) in listeners {
            let listener = listener.unwrap();
            let notifier = Notifier::new(Some(&socket)).unwrap();
            notifier.ready();
            notifier.stopping();
            for expected in ["READY=1", "STOPPING=1"] {
                let mut buffer = [0; 64];
                let read = listener.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..read], expected.as_bytes());
            }
        }
        Notifier::new(None).unwrap().ready();
    }
}
