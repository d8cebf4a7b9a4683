//! Mutual TLS between the processes of a cluster, and TLS to etcd.
//!
//! * [`ClusterTlsArgs`]: the flags. [`install`]: this process's identity, from its start on.
//! * [`connect`], [`connect_lazy`]: how all processes call each other; without an identity in
//!   plain text.
//! * [`incoming`]: whom a server listens to.
//! * [`pem`]: certificates and keys in files, and files that change.
//! * [`files`](Files): certificates are read again when they change; connections that are made
//!   from then on use them, and those that are there stay.
//!
//! Both sides must show a certificate of the cluster's authority that has the cluster's name: an
//! address says little where processes come and go, as pods do.

mod client;
mod files;
pub mod pem;
mod server;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use clap::Args;
use rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Error};

pub(crate) use client::Balanced;
pub use files::{Files, Tls};
pub use server::{Link, incoming};

use crate::daemon::{Exit, Failure};

static CLUSTER: OnceLock<Cluster> = OnceLock::new();

/// Who this process is among the others.
struct Cluster {
    tls: Arc<Tls>,
    name: ServerName<'static>,
}

/// Flags of mutual TLS between the cluster's processes.
#[derive(Clone, Debug, Default, Args)]
pub struct ClusterTlsArgs {
    /// Certificates of those who may sign the cluster's certificates, in PEM. With it the
    /// processes of the cluster talk TLS, and both sides must show a certificate. Files that
    /// change are read again.
    #[arg(long, env = "BATON_CLUSTER_TLS_CA", value_name = "FILE")]
    pub cluster_tls_ca: Option<PathBuf>,

    /// This process's certificate, and those that lead to its issuer, in PEM. It must be good for
    /// servers and for clients.
    #[arg(long, env = "BATON_CLUSTER_TLS_CERT", value_name = "FILE")]
    pub cluster_tls_cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, env = "BATON_CLUSTER_TLS_KEY", value_name = "FILE")]
    pub cluster_tls_key: Option<PathBuf>,

    /// The DNS name that all certificates of the cluster must have.
    #[arg(
        long,
        env = "BATON_CLUSTER_TLS_NAME",
        value_name = "NAME",
        default_value = "baton",
        value_parser = parse_name
    )]
    pub cluster_tls_name: String,
}

fn parse_name(text: &str) -> Result<String, String> {
    match ServerName::try_from(text.to_owned()) {
        Ok(ServerName::DnsName(_)) => Ok(text.to_owned()),
        _ => Err("must be a DNS name".into()),
    }
}

impl ClusterTlsArgs {
    /// The flags again, for a process that is started with the same identity.
    pub fn flags(&self) -> Vec<String> {
        let Some(files) = self.files().ok().flatten() else { return Vec::new() };
        let path = |path: &Option<PathBuf>| path.iter().map(|it| it.display().to_string()).next();
        let Files { ca, identity, .. } = files;
        let (cert, key) = identity.unzip();
        [("ca", Some(ca)), ("cert", cert), ("key", key)]
            .into_iter()
            .filter_map(|(flag, file)| Some([format!("--cluster-tls-{flag}"), path(&file)?]))
            .chain([["--cluster-tls-name".to_owned(), self.cluster_tls_name.clone()]])
            .flatten()
            .collect()
    }

    fn files(&self) -> Result<Option<Files>, Failure> {
        let Self { cluster_tls_ca: ca, cluster_tls_cert: cert, cluster_tls_key: key, .. } = self;
        match (ca.clone(), cert.clone(), key.clone()) {
            (None, None, None) => Ok(None),
            (Some(ca), Some(cert), Some(key)) => {
                Ok(Some(Files { flags: "--cluster-tls", ca, identity: Some((cert, key)) }))
            }
            _ => {
                let message = "--cluster-tls-ca, --cluster-tls-cert and --cluster-tls-key go \
                               together: give all of them, or none";
                Err(Failure::new(Exit::Config, message))
            }
        }
    }
}

/// Gives this process its identity, if the flags do; once, before it calls or serves anybody.
/// Belongs to a runtime of tokio.
pub fn install(args: &ClusterTlsArgs) -> Result<(), Failure> {
    let Some(files) = args.files()? else { return Ok(()) };
    let wrong = |message: String| Failure::new(Exit::Config, message);
    let name = ServerName::try_from(args.cluster_tls_name.clone())
        .map_err(|error| wrong(format!("--cluster-tls-name: {error}")))?;
    let tls = Tls::load(files, Some(name.clone())).map_err(wrong)?;
    let _ = CLUSTER.set(Cluster { tls, name });
    Ok(())
}

/// A channel that connects when it is used.
pub fn connect_lazy(endpoint: &Endpoint) -> Channel {
    match CLUSTER.get() {
        None => endpoint.connect_lazy(),
        Some(Cluster { tls, name }) => {
            endpoint.connect_with_connector_lazy(client::connector(tls.clone(), Some(name.clone())))
        }
    }
}

/// A channel that is connected.
pub async fn connect(endpoint: &Endpoint) -> Result<Channel, Error> {
    match CLUSTER.get() {
        None => endpoint.connect().await,
        Some(Cluster { tls, name }) => {
            let connector = client::connector(tls.clone(), Some(name.clone()));
            endpoint.connect_with_connector(connector).await
        }
    }
}

fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::other(error)
}
