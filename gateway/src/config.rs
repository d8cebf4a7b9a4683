//! Command line and environment of `baton-gateway`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use baton_membership::EtcdSettings;
use clap::Parser;

/// Baton's HTTP gateway: speaks the OpenAI and vLLM API and forwards to the cluster's workers.
///
/// Workers are found through etcd; no address of theirs has to be given. Example:
///
///     baton-gateway --listen 0.0.0.0:8000 --etcd http://10.0.0.5:2379 --api-key-file keys.txt
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-gateway", version, verbatim_doc_comment)]
pub struct Settings {
    /// Address to serve HTTP on; port 0 takes any free one.
    #[arg(long, env = "BATON_LISTEN", default_value = "0.0.0.0:8000")]
    pub listen: SocketAddr,

    /// URL under which others reach this gateway; by default the listen address.
    #[arg(long, env = "BATON_ADVERTISE")]
    pub advertise: Option<String>,

    /// etcd endpoints.
    #[arg(
        long,
        env = "BATON_ETCD",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379"
    )]
    pub etcd: Vec<String>,

    /// Name of the cluster: processes of other names are not seen.
    #[arg(long, env = "BATON_CLUSTER", default_value = "default")]
    pub cluster: String,

    /// Seconds until etcd forgets this process after its death.
    #[arg(long, env = "BATON_LEASE_TTL", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_ttl: u64,

    /// Seconds to wait for etcd at start.
    #[arg(long, env = "BATON_ETCD_TIMEOUT", default_value_t = 10)]
    pub etcd_timeout: u64,

    /// A key that opens the API; may be repeated. Without any key the API is open to all.
    /// VLLM_API_KEY is read too.
    #[arg(long = "api-key", env = "BATON_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_keys: Vec<String>,

    /// A file with one key a line; lines that begin with # are comments.
    #[arg(long, env = "BATON_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Prompt tokens, beyond those cached on the decode worker, from which a prefill worker is
    /// used. docs/architecture.md says how the default was measured.
    #[arg(long, env = "BATON_HANDOFF_MIN_TOKENS", default_value_t = 256)]
    pub handoff_min_tokens: u32,

    /// Seconds a request may take in all.
    #[arg(long, env = "BATON_REQUEST_TIMEOUT", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_timeout: u64,

    /// Largest request body.
    #[arg(long, env = "BATON_MAX_BODY_BYTES", default_value_t = 8 * 1024 * 1024)]
    pub max_body_bytes: usize,

    /// Generation requests served at once; more are answered 429.
    #[arg(long, env = "BATON_MAX_INFLIGHT", default_value_t = 1024)]
    pub max_inflight: usize,

    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(long, env = "BATON_DRAIN_TIMEOUT", default_value_t = 30)]
    pub drain_timeout: u64,

    /// Threads that serve HTTP.
    #[arg(long, env = "BATON_HTTP_THREADS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub http_threads: u16,

    /// Form of the log lines on stderr; RUST_LOG sets what is logged.
    #[arg(long, env = "BATON_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Settings {
    /// The part that concerns etcd.
    pub fn etcd_settings(&self) -> EtcdSettings {
        EtcdSettings {
            endpoints: self.etcd.clone(),
            cluster: self.cluster.clone(),
            lease_ttl: Duration::from_secs(self.lease_ttl),
            start_timeout: Duration::from_secs(self.etcd_timeout),
        }
    }
}
