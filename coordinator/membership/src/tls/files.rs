//! Certificates from PEM files, read again when they change. Files that are broken, or half
//! written, leave the last good ones in use.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tracing::warn;

use super::pem;
use super::server::Named;

/// Between two lines of the log about callers that were refused.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Peers whose last trouble is kept in mind, so that it is told once.
const MAX_TROUBLES: usize = 256;

/// Where certificates are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// What the names of their flags begin with, such as `--etcd`.
    pub flags: &'static str,
    /// Certificates of those who may sign.
    pub ca: PathBuf,
    /// The own certificate, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// What the files held when they were last good.
pub struct Tls {
    files: Files,
    /// The name that clients must have; without it nobody is served.
    name: Option<ServerName<'static>>,
    configs: ArcSwap<Configs>,
    troubles: Mutex<HashMap<String, String>>,
    told: Mutex<Option<Instant>>,
}

struct Configs {
    client: Arc<ClientConfig>,
    server: Option<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files, and again whenever they change, for as long as the value lives. With a name
    /// it serves callers that have it. An error names the flag.
    pub fn load(files: Files, name: Option<ServerName<'static>>) -> Result<Arc<Self>, String> {
        // In this order: what changes in between is read again.
        let seen = files.contents();
        let configs = ArcSwap::from_pointee(files.read(name.as_ref())?);
        let (troubles, told) = (Mutex::default(), Mutex::default());
        let tls = Arc::new(Self { files, name, configs, troubles, told });
        let (weak, flags) = (Arc::downgrade(&tls), tls.files.flags);
        let look = move || {
            let tls = weak.upgrade()?;
            let contents = tls.files.contents();
            Some((tls, contents))
        };
        tokio::spawn(pem::follow(flags, seen, look, |tls: &Arc<Self>| tls.read_again()));
        Ok(tls)
    }

    fn read_again(&self) -> Result<(), String> {
        let configs = self.files.read(self.name.as_ref())?;
        self.configs.store(Arc::new(configs));
        Ok(())
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        self.configs.load().client.clone()
    }

    pub(super) fn server(&self) -> Option<Arc<ServerConfig>> {
        self.configs.load().server.clone()
    }

    /// Says why a peer could not be reached, once until that changes.
    pub(super) fn trouble(&self, peer: &str, error: Option<String>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(error) = error else {
            troubles.remove(peer);
            return;
        };
        if troubles.get(peer) == Some(&error) {
            return;
        }
        warn!(peer, error, "no TLS connection to a peer");
        if troubles.len() >= MAX_TROUBLES {
            troubles.clear();
        }
        troubles.insert(peer.to_owned(), error);
    }

    /// Says why a caller was refused; not of each, when there are many.
    pub(super) fn refused(&self, caller: &str, error: &str) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|last| last.elapsed() >= TELL_EVERY) {
            *told = Some(Instant::now());
            warn!(caller, error, "a caller was refused: it must show a certificate of the cluster");
        }
    }
}

impl Files {
    /// What the files hold: they are small, and a time of change may not tell.
    fn contents(&self) -> Vec<Option<Vec<u8>>> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert, key]);
        [&self.ca].into_iter().chain(identity).map(|file| std::fs::read(file).ok()).collect()
    }

    fn read(&self, name: Option<&ServerName<'static>>) -> Result<Configs, String> {
        let provider = Arc::new(ring::default_provider());
        let roots = Arc::new(pem::roots(&self.flag("ca"), &self.ca)?);
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots.clone());
        let mut client = match self.identity()? {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                builder.with_client_auth_cert(chain, key).map_err(|error| self.unfit(&error))?
            }
        };
        client.alpn_protocols = vec![b"h2".to_vec()];
        let server = match (name, self.identity()?) {
            (Some(name), Some((chain, key))) => {
                Some(self.server(provider, roots, name, chain, key)?)
            }
            _ => None,
        };
        Ok(Configs { client: Arc::new(client), server })
    }

    fn server(
        &self,
        provider: Arc<CryptoProvider>,
        roots: Arc<RootCertStore>,
        name: &ServerName<'static>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Arc<ServerConfig>, String> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().map_err(
                |error| pem::at(&self.flag("ca"), &self.ca, format!("cannot be used: {error}")),
            )?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(Arc::new(Named::new(verifier, name.clone())))
            .with_single_cert(chain, key)
            .map_err(|error| self.unfit(&error))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    fn identity(
        &self,
    ) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, String> {
        let Some((certificate, key)) = &self.identity else { return Ok(None) };
        let chain = pem::certificates(&self.flag("cert"), certificate)?;
        let key = pem::private_key(&self.flag("key"), key)?;
        Ok(Some((chain, key)))
    }

    fn unfit(&self, error: &rustls::Error) -> String {
        let key = self.identity.as_ref().map_or(Path::new(""), |(_, key)| key);
        let problem = format!("does not go with {}: {error}", self.flag("cert"));
        pem::at(&self.flag("key"), key, problem)
    }

    fn flag(&self, file: &str) -> String {
        format!("{}-{file}", self.flags)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}
