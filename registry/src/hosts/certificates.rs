//! TLS as a host's files say: whom to trust, and who we are.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// A client's certificate, and its key if that is in another file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientPair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: Option<PathBuf>,
}

/// What TLS to a host is to be like.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tls {
    /// PEM files with authorities to trust beside the system's.
    pub(crate) ca: Vec<PathBuf>,
    pub(crate) client: Vec<ClientPair>,
    /// Whether any certificate will do.
    pub(crate) skip_verify: bool,
}

impl Tls {
    /// The TLS library's configuration, or what is wrong with which file.
    pub(crate) fn config(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = if self.skip_verify {
            let anyone = Arc::new(Anyone(Arc::clone(&provider)));
            builder.dangerous().with_custom_certificate_verifier(anyone)
        } else {
            builder.with_root_certificates(self.roots()?)
        };
        let mut tls = match self.client.is_empty() {
            true => builder.with_no_client_auth(),
            false => {
                let keys = self
                    .client
                    .iter()
                    .map(|pair| certified_key(pair, &provider).map(Arc::new))
                    .collect::<Result<_, _>>()?;
                builder.with_client_cert_resolver(Arc::new(ClientKeys(keys)))
            }
        };
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(tls)
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        // A machine without certificates can still use plain HTTP; a handshake
        // will say that the issuer is unknown.
        for error in &native.errors {
            tracing::debug!(%error, "a certificate of the system could not be read");
        }
        roots.add_parsable_certificates(native.certs);
        for path in &self.ca {
            add_file(&mut roots, path).map_err(|why| {
                format!(
                    "the certificates in {} cannot be used: {why}",
                    path.display()
                )
            })?;
        }
        Ok(roots)
    }
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| error.to_string())?;
    match found.is_empty() {
        true => Err("it holds no PEM certificate".to_owned()),
        false => Ok(found),
    }
}

fn certified_key(pair: &ClientPair, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let key_file = pair.key.as_ref().unwrap_or(&pair.certificate);
    let failed = |path: &Path, why: String| {
        format!(
            "the client certificate in {} cannot be used: {why}",
            path.display()
        )
    };
    let chain = certificates(&pair.certificate).map_err(|why| failed(&pair.certificate, why))?;
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|error| failed(key_file, error.to_string()))?;
    CertifiedKey::from_der(chain, key, provider)
        .map_err(|error| failed(&pair.certificate, error.to_string()))
}

/// Several client certificates, of which the server says by its authorities'
/// names which it takes.
#[derive(Debug)]
struct ClientKeys(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientKeys {
    fn resolve(
        &self,
        authorities: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let usable = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        // A certificate holds its issuer's name as the server writes it.
        let issued = |key: &&Arc<CertifiedKey>| {
            authorities.iter().any(|name| {
                let mut chain = key.cert.iter();
                chain.any(|one| one.windows(name.len().max(1)).any(|part| part == *name))
            })
        };
        let mut keys = self.0.iter().filter(usable);
        let matching = keys.clone().find(issued);
        // Servers that name no authority, or another name of it, decide then.
        matching.or_else(|| keys.next()).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Takes any certificate. The handshake's signatures are still checked, and
/// content by its digest.
struct Anyone(Arc<CryptoProvider>);

impl fmt::Debug for Anyone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Anyone")
    }
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, cert, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, cert, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
