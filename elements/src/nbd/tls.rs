//! Certificates from PEM files, under the names that QEMU and nbdkit use: `ca-cert.pem`,
//! `server-cert.pem` and `server-key.pem`, `client-cert.pem` and `client-key.pem`.

use super::client::TlsIdentity;
use blockmason::{Error, Result};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::path::Path;
use std::sync::Arc;

/// Whom a server asks for a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Nobody.
    #[default]
    None,
    /// Whoever has one; it must be good.
    Optional,
    /// Everybody.
    Required,
}

/// The server's side, from `server-cert.pem`, `server-key.pem` and, if clients are to show
/// certificates, `ca-cert.pem` in `folder`. Errors name the file.
pub fn server_config(folder: &Path, clients: ClientCertificates) -> Result<Arc<ServerConfig>> {
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(internal)?;
    let builder = match clients {
        ClientCertificates::None => builder.with_no_client_auth(),
        ClientCertificates::Optional | ClientCertificates::Required => {
            let path = folder.join("ca-cert.pem");
            let roots = Arc::new(authorities(&path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = match clients {
                ClientCertificates::Optional => verifier.allow_unauthenticated(),
                _ => verifier,
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|source| {
                Error::invalid("no client can be verified with this authority")
                    .with_path(&path)
                    .with_source(source)
            })?)
        }
    };
    let (certificates, key, path) = identity(folder, "server")?;
    let config = builder.with_single_cert(certificates, key).map_err(|source| mismatch(source, &path))?;
    Ok(Arc::new(config))
}

/// The client's side: trusts `ca-cert.pem` in `folder`, shows `client-cert.pem` if there is one, and
/// expects the server's certificate to be for `name` (a host name or an address). Errors name the file.
pub fn client_identity(folder: &Path, name: &str) -> Result<TlsIdentity> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(internal)?
        .with_root_certificates(authorities(&folder.join("ca-cert.pem"))?);
    let shows = ["client-cert.pem", "client-key.pem"].iter().any(|file| folder.join(file).exists());
    let config = match shows {
        true => {
            let (certificates, key, path) = identity(folder, "client")?;
            builder.with_client_auth_cert(certificates, key).map_err(|source| mismatch(source, &path))?
        }
        false => builder.with_no_client_auth(),
    };
    let name = ServerName::try_from(name.to_owned())
        .map_err(|_| Error::invalid(format!("{name:?} is no host name that a certificate could carry")))?;
    Ok(TlsIdentity { config: Arc::new(config), name })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn internal(source: rustls::Error) -> Error {
    Error::internal("TLS cannot be set up").with_source(source)
}

fn mismatch(source: rustls::Error, path: &Path) -> Error {
    Error::invalid("the certificate cannot be used with its key").with_path(path).with_source(source)
}

/// The certificates in a file: at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<std::result::Result<Vec<_>, _>>();
    let certificates = read().map_err(|source| unreadable(source, path))?;
    if certificates.is_empty() {
        return Err(Error::invalid("there is no certificate in this file").with_path(path));
    }
    Ok(certificates)
}

/// The authorities in a file.
fn authorities(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| {
            Error::invalid("this certificate cannot be an authority").with_path(path).with_source(source)
        })?;
    }
    Ok(roots)
}

/// The certificates and the key of `side`, and the file of the certificates.
fn identity(
    folder: &Path,
    side: &str,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, std::path::PathBuf)> {
    let path = folder.join(format!("{side}-cert.pem"));
    let certificates = certificates(&path)?;
    let key_path = folder.join(format!("{side}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|source| unreadable(source, &key_path))?;
    Ok((certificates, key, path))
}

fn unreadable(source: pem::Error, path: &Path) -> Error {
    match source {
        pem::Error::Io(source) => Error::io(source, "cannot be read").with_path(path),
        pem::Error::NoItemsFound => {
            Error::invalid("there is no certificate or key of the kind wanted in this file").with_path(path)
        }
        other => Error::invalid(format!("is no PEM file: {other}")).with_path(path),
    }
}
