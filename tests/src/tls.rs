//! Registries that speak TLS, and clients that trust them.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// What a server that is reached by 127.0.0.1 shows, as PEM files.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The authority that signed it, which no system trusts.
    pub authority: PathBuf,
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Identity {
    /// Makes one in a directory.
    pub fn make(dir: &Path) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let names = [Ipv4Addr::LOCALHOST.to_string()];
        let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
        let write = |name, text: String| -> Result<PathBuf> {
            let file = dir.join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
            Ok(file)
        };
        Ok(Self {
            authority: write("authority.pem", authority.pem())?,
            certificate: write("certificate.pem", certificate.pem())?,
            key: write("key.pem", key.serialize_pem())?,
        })
    }
}

/// Has clients that look into `hosts_dir` reach a host by TLS, and trust whom
/// `authority` has signed. The host is named as its own server as well, as
/// containerd's documentation does it.
pub fn trust(hosts_dir: &Path, host: &str, authority: &Path) -> Result<()> {
    let dir = hosts_dir.join(host);
    fs::create_dir_all(&dir)?;
    let text = format!(
        "server = \"https://{host}\"\n[host.\"https://{host}\"]\n\
         capabilities = [\"pull\", \"resolve\", \"push\"]\nca = {authority:?}\n"
    );
    Ok(fs::write(dir.join("hosts.toml"), text)?)
}
