//! HTTPS: certificates from PEM files, read again when they change.
//!
//! A certificate lives for weeks and a gateway for longer, so what is renewed on disk is taken up
//! without a restart: connections that are made from then on see it. Files that are broken, or
//! half written, leave the last good ones in use.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use baton_membership::tls::pem;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};

use crate::config::TlsArgs;

/// The files.
#[derive(Clone, Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    /// Who signs clients' certificates, and whether a client must have one.
    clients: Option<(PathBuf, bool)>,
}

/// What the files held when they were last good.
pub struct Tls {
    files: Files,
    provider: Arc<CryptoProvider>,
    key: ArcSwap<CertifiedKey>,
    clients: Option<ArcSwap<Arc<dyn ClientCertVerifier>>>,
}

impl Tls {
    /// Reads the files; `None` when HTTP is to be served. An error names the flag.
    pub fn load(args: &TlsArgs) -> Result<Option<Arc<Self>>, String> {
        let clients = match (args.ssl_cert_reqs, &args.ssl_ca_certs) {
            (0, _) => None,
            (reqs, Some(file)) => Some((file.clone(), reqs == 2)),
            (_, None) => return Err("--ssl-cert-reqs needs --ssl-ca-certs".into()),
        };
        let Some(certificate) = args.ssl_certfile.clone() else { return Ok(None) };
        let key = args.ssl_keyfile.clone().unwrap_or_else(|| certificate.clone());
        let files = Files { certificate, key, clients };
        let provider = Arc::new(ring::default_provider());
        let key = files.read_key(&provider)?;
        let clients = files.read_clients(&provider)?.map(ArcSwap::from_pointee);
        Ok(Some(Arc::new(Self { files, provider, key: ArcSwap::from_pointee(key), clients })))
    }

    /// What a server needs; it follows what [`Tls::refresh`] reads.
    pub fn server_config(self: &Arc<Self>) -> Result<ServerConfig, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match self.clients {
            Some(_) => builder.with_client_cert_verifier(self.clone()),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(self.clone());
        // HTTP/2 is not offered: of many requests on one connection, the one whose client has
        // left could not be told from the others.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Reads the files again whenever they have changed, for as long as the process lives.
    pub async fn refresh(self: Arc<Self>) {
        let seen = self.files.stamps();
        let look = || Some((&self, self.files.stamps()));
        pem::follow("--ssl", seen, look, |tls| tls.read_again()).await;
    }

    fn read_again(&self) -> Result<(), String> {
        let key = self.files.read_key(&self.provider)?;
        let clients = self.files.read_clients(&self.provider)?;
        self.key.store(Arc::new(key));
        if let (Some(current), Some(new)) = (&self.clients, clients) {
            current.store(Arc::new(new));
        }
        Ok(())
    }
}

impl Files {
    fn read_key(&self, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
        let chain = pem::certificates("--ssl-certfile", &self.certificate)?;
        let named = if self.key == self.certificate { "--ssl-certfile" } else { "--ssl-keyfile" };
        let key = pem::private_key(named, &self.key)?;
        CertifiedKey::from_der(chain, key, provider).map_err(|error| {
            let problem = format!("does not go with --ssl-certfile: {error}");
            pem::at(named, &self.key, problem)
        })
    }

    fn read_clients(
        &self,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Option<Arc<dyn ClientCertVerifier>>, String> {
        let Some((file, required)) = &self.clients else { return Ok(None) };
        let roots = pem::roots("--ssl-ca-certs", file)?;
        let builder =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let builder = if *required { builder } else { builder.allow_unauthenticated() };
        let verifier = builder
            .build()
            .map_err(|error| pem::at("--ssl-ca-certs", file, format!("cannot be used: {error}")))?;
        Ok(Some(verifier))
    }

    /// What tells that a file has changed, also when a link to it has.
    fn stamps(&self) -> Vec<Option<(SystemTime, u64)>> {
        let clients = self.clients.as_ref().map(|(file, _)| file);
        let files = [&self.certificate, &self.key].into_iter().chain(clients);
        let stamp = |file: &PathBuf| {
            let metadata = std::fs::metadata(file).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        files.map(stamp).collect()
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Tls {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key.load_full())
    }
}

impl Tls {
    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
        let current = self.clients.as_ref().map(|clients| Arc::clone(&**clients.load()));
        current.ok_or_else(|| rustls::Error::General("no clients' certificates are known".into()))
    }
}

/// Asks whatever verifier the files have made last.
impl ClientCertVerifier for Tls {
    fn client_auth_mandatory(&self) -> bool {
        self.files.clients.as_ref().is_none_or(|(_, required)| *required)
    }

    /// No hints: they would have to outlive a change of the file. Clients that have one
    /// certificate send it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verifier()?.verify_client_cert(certificate, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier()?.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier()?.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
