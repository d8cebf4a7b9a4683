//! Certificates from PEM files, read again when they change. Files that are broken, or half
//! written, leave the last good ones in use.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tracing::{info, warn};

use super::server::Named;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
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
        let configs = ArcSwap::from_pointee(files.read(name.as_ref())?);
        let seen = files.contents();
        let (troubles, told) = (Mutex::default(), Mutex::default());
        let tls = Arc::new(Self { files, name, configs, troubles, told });
        tokio::spawn(refresh(Arc::downgrade(&tls), seen));
        Ok(tls)
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

/// Reads the files again whenever they have changed.
async fn refresh(tls: Weak<Tls>, mut seen: Vec<Option<Vec<u8>>>) {
    let mut told = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(tls) = tls.upgrade() else { return };
        let contents = tls.files.contents();
        if contents == seen {
            continue;
        }
        let flags = tls.files.flags;
        match tls.files.read(tls.name.as_ref()) {
            Ok(configs) => {
                info!(flags, "certificates have changed, and are used from now on");
                tls.configs.store(Arc::new(configs));
                (seen, told) = (contents, None);
            }
            // Perhaps one file is new and the other not yet: looked at again until it is well.
            Err(error) if told.as_ref() != Some(&error) => {
                warn!(error, "certificates have changed, but cannot be used; the old ones stay");
                told = Some(error);
            }
            Err(_) => {}
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
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates("ca", &self.ca)? {
            let added = roots.add(certificate);
            added.map_err(|error| self.at("ca", &self.ca, format!("cannot be used: {error}")))?;
        }
        let roots = Arc::new(roots);
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
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| self.at("ca", &self.ca, format!("cannot be used: {error}")))?;
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
        let chain = self.certificates("cert", certificate)?;
        let key = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| self.at("key", key, format!("holds no private key: {error}")))?;
        Ok(Some((chain, key)))
    }

    fn certificates(
        &self,
        flag: &str,
        file: &Path,
    ) -> Result<Vec<CertificateDer<'static>>, String> {
        let read =
            CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let all = read.map_err(|error| self.at(flag, file, format!("cannot be read: {error}")))?;
        match all.is_empty() {
            true => Err(self.at(flag, file, "holds no certificate in PEM")),
            false => Ok(all),
        }
    }

    fn unfit(&self, error: &rustls::Error) -> String {
        let key = self.identity.as_ref().map_or(Path::new(""), |(_, key)| key);
        self.at("key", key, format!("does not go with {}-cert: {error}", self.flags))
    }

    fn at(&self, flag: &str, file: &Path, problem: impl fmt::Display) -> String {
        format!("{}-{flag} {} {problem}", self.flags, file.display())
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}
