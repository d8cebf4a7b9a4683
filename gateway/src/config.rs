//! Command line and environment of `baton-gateway`.

use std::net::SocketAddr;
use std::path::PathBuf;

use baton_membership::config::without_password;
use baton_membership::daemon::ClusterArgs;
use clap::{Args, Parser};
use serde_json::{Value, json};

use crate::output::{ReasoningSyntax, ToolSyntax};
use crate::routing::Policy;
use crate::store;

const EXAMPLE: &str = "Example:\n  baton-gateway --listen 0.0.0.0:8000 --etcd http://10.0.0.5:2379 --api-key-file keys.txt";

/// Baton's HTTP gateway: speaks the OpenAI and vLLM API and forwards to the cluster's workers.
///
/// Workers are found through etcd; no address of theirs has to be given.
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-gateway", version, after_help = EXAMPLE)]
pub struct Settings {
    /// Address to serve HTTP on; port 0 takes any free one.
    #[arg(long, env = "BATON_LISTEN", default_value = "0.0.0.0:8000")]
    pub listen: SocketAddr,

    /// URL under which others reach this gateway; by default the listen address.
    #[arg(long, env = "BATON_ADVERTISE")]
    pub advertise: Option<String>,

    /// The cluster to join.
    #[command(flatten)]
    pub cluster: ClusterArgs,

    /// Who may call.
    #[command(flatten)]
    pub access: AccessArgs,

    /// Encryption.
    #[command(flatten)]
    pub tls: TlsArgs,

    /// What browsers may do.
    #[command(flatten)]
    pub cors: CorsArgs,

    /// Recordings.
    #[command(flatten)]
    pub audio: AudioArgs,

    /// Responses that are kept.
    #[command(flatten)]
    pub responses: ResponsesArgs,

    /// Prompt tokens, beyond those cached on the decode worker, from which a prefill worker is
    /// used. docs/architecture.md says how the default was measured.
    #[arg(long, env = "BATON_HANDOFF_MIN_TOKENS", default_value_t = 64)]
    pub handoff_min_tokens: u32,

    /// By what the worker for a request is chosen: what it has cached of the prompt, beside its
    /// queue and free KV blocks (kv-aware), its queue alone (least-loaded), or its turn.
    #[arg(long, env = "BATON_ROUTING_POLICY", value_enum, default_value_t)]
    pub routing_policy: Policy,

    /// The most alternatives that `logprobs` may ask for; -1 is any number.
    #[arg(long, env = "BATON_MAX_LOGPROBS", default_value_t = 20, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..=1_000_000))]
    pub max_logprobs: i64,

    /// How models write tool calls: hermes, llama3_json, mistral, qwen3_coder, pythonic. By default
    /// each model's chat template tells.
    #[arg(long, env = "BATON_TOOL_CALL_PARSER")]
    pub tool_call_parser: Option<ToolSyntax>,

    /// How models write their reasoning: deepseek_r1, qwen3. By default each model's chat template
    /// tells.
    #[arg(long, env = "BATON_REASONING_PARSER")]
    pub reasoning_parser: Option<ReasoningSyntax>,

    /// Take a `chat_template` that a request brings.
    #[arg(long, env = "BATON_TRUST_REQUEST_CHAT_TEMPLATE")]
    pub trust_request_chat_template: bool,

    /// Tell in `usage` how many prompt tokens were found in a prefix cache.
    #[arg(long, env = "BATON_ENABLE_PROMPT_TOKENS_DETAILS")]
    pub enable_prompt_tokens_details: bool,

    /// The most texts that one request may have embedded, classified or compared; more are
    /// answered 400.
    #[arg(long, env = "BATON_MAX_TEXTS", default_value = "2048", value_parser = parse_positive)]
    pub max_texts: usize,

    /// Seconds a request may take in all.
    #[arg(long, env = "BATON_REQUEST_TIMEOUT", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_timeout: u64,

    /// Largest request body.
    #[arg(long, env = "BATON_MAX_BODY_BYTES", default_value_t = 8 * 1024 * 1024)]
    pub max_body_bytes: usize,

    /// Seconds a client may take to send a request's head.
    #[arg(long, env = "BATON_HEAD_TIMEOUT", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub head_timeout: u64,

    /// Seconds a client may take to send a request's body.
    #[arg(long, env = "BATON_BODY_TIMEOUT", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub body_timeout: u64,

    /// Seconds a client may leave what it was sent unread; then its connection is cut.
    #[arg(long, env = "BATON_SEND_TIMEOUT", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub send_timeout: u64,

    /// Seconds an idle connection is kept.
    #[arg(long, env = "BATON_KEEP_ALIVE_TIMEOUT", default_value_t = 75, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keep_alive_timeout: u64,

    /// Generation requests served at once; more are answered 429.
    #[arg(long, env = "BATON_MAX_INFLIGHT", default_value = "1024", value_parser = parse_positive)]
    pub max_inflight: usize,

    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(long, env = "BATON_DRAIN_TIMEOUT", default_value_t = 30)]
    pub drain_timeout: u64,

    /// Threads that serve HTTP.
    #[arg(long, env = "BATON_HTTP_THREADS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub http_threads: u16,
}

/// Flags of keys and of what each may use.
#[derive(Clone, Debug, Args)]
pub struct AccessArgs {
    /// A key that opens the API; may be repeated. Without any key the API is open to all.
    /// VLLM_API_KEY is read too.
    #[arg(long = "api-key", env = "BATON_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_keys: Vec<String>,

    /// A file with one key a line; lines that begin with # are comments.
    #[arg(long, env = "BATON_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,

    /// A key for routes that change the cluster or show its settings; may be repeated. It opens
    /// the API too. Without one, API keys open these routes.
    #[arg(
        long = "admin-key",
        env = "BATON_ADMIN_KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub admin_keys: Vec<String>,

    /// A file with one admin key a line; lines that begin with # are comments.
    #[arg(long, env = "BATON_ADMIN_KEY_FILE")]
    pub admin_key_file: Option<PathBuf>,

    /// Wants a key for /metrics, /load, /version, /docs, /openapi.json and / as well; only /health,
    /// /ping and /live stay open.
    #[arg(long, env = "BATON_GUARD_ALL")]
    pub guard_all: bool,

    /// Requests a minute of one key, or of one address where there are no keys; 0 is no limit.
    #[arg(long, env = "BATON_KEY_REQUESTS_PER_MINUTE", default_value_t = 0)]
    pub key_requests_per_minute: u32,

    /// Requests at once of one key, or of one address where there are no keys; 0 is no limit.
    #[arg(long, env = "BATON_KEY_MAX_CONCURRENT", default_value_t = 0)]
    pub key_max_concurrent: usize,
}

/// Flags of TLS, by vLLM's names.
#[derive(Clone, Debug, Args)]
pub struct TlsArgs {
    /// The certificate, and those that lead to its issuer, in PEM. With it, HTTPS is served in
    /// place of HTTP. Files that change are read again.
    #[arg(long, env = "BATON_SSL_CERTFILE")]
    pub ssl_certfile: Option<PathBuf>,

    /// The certificate's private key in PEM; by default it is looked for in --ssl-certfile.
    #[arg(long, env = "BATON_SSL_KEYFILE", requires = "ssl_certfile")]
    pub ssl_keyfile: Option<PathBuf>,

    /// Certificates of those who may sign clients' certificates, in PEM.
    #[arg(long, env = "BATON_SSL_CA_CERTS", requires = "ssl_certfile")]
    pub ssl_ca_certs: Option<PathBuf>,

    /// Clients' certificates: 0 not asked for, 1 checked if there is one, 2 required.
    #[arg(long, env = "BATON_SSL_CERT_REQS", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub ssl_cert_reqs: u8,
}

/// Flags of Cross-Origin Resource Sharing, by vLLM's names. Each takes a JSON list, or one value
/// and is repeated.
#[derive(Clone, Debug, Args)]
pub struct CorsArgs {
    /// Origins whose pages may call; "*" is any.
    #[arg(long, env = "BATON_ALLOWED_ORIGINS", default_value = "*")]
    pub allowed_origins: Vec<String>,

    /// Methods that they may use; "*" is any.
    #[arg(long, env = "BATON_ALLOWED_METHODS", default_value = "*")]
    pub allowed_methods: Vec<String>,

    /// Headers that they may send; "*" is any.
    #[arg(long, env = "BATON_ALLOWED_HEADERS", default_value = "*")]
    pub allowed_headers: Vec<String>,

    /// Whether they may send cookies and the like.
    #[arg(long, env = "BATON_ALLOW_CREDENTIALS")]
    pub allow_credentials: bool,
}

/// Flags of `/v1/audio`.
#[derive(Clone, Debug, Args)]
pub struct AudioArgs {
    /// Largest recording, in MiB.
    #[arg(long, env = "BATON_MAX_AUDIO_FILESIZE_MB", default_value = "25", value_parser = parse_mebibytes)]
    pub max_audio_filesize_mb: usize,

    /// Longest recording, in seconds.
    #[arg(long, env = "BATON_MAX_AUDIO_SECONDS", default_value_t = 7200, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub max_audio_seconds: u64,

    /// Recordings served at once, each of which is kept in memory; more are answered 429.
    #[arg(long, env = "BATON_MAX_RECORDINGS", default_value = "64", value_parser = parse_positive)]
    pub max_recordings: usize,
}

/// Flags of the Responses API.
#[derive(Clone, Debug, Args)]
pub struct ResponsesArgs {
    /// Where responses are kept: sqlite:PATH, postgres://USER:PASSWORD@HOST/DATABASE for gateways
    /// that share them, or none. By default a file: $XDG_DATA_HOME/baton/responses.db, or
    /// ~/.local/share/baton/responses.db.
    #[arg(
        long,
        env = "BATON_RESPONSES_STORE",
        default_value = "sqlite",
        hide_env_values = true,
        hide_default_value = true
    )]
    pub responses_store: store::Place,

    /// Seconds that a response is kept; by default 30 days.
    #[arg(long, env = "BATON_RESPONSES_TTL", default_value_t = 30 * 24 * 60 * 60, value_parser = clap::value_parser!(u64).range(1..=3_153_600_000))]
    pub responses_ttl: u64,

    /// Responses in the background at once; more are answered 429.
    #[arg(long, env = "BATON_MAX_BACKGROUND_RESPONSES", default_value = "64", value_parser = parse_positive)]
    pub max_background_responses: usize,
}

impl Settings {
    /// The settings by their flags' names, without secrets.
    pub fn shown(&self) -> Value {
        let Self { access, tls, cors, cluster, audio, responses, .. } = self;
        let etcd: Vec<String> = cluster.etcd.iter().map(|url| without_password(url)).collect();
        let mut shown = json!({
            "listen": self.listen.to_string(),
            "advertise": self.advertise,
            "etcd": etcd,
            "cluster": cluster.cluster,
            "lease_ttl": cluster.lease_ttl,
            "etcd_timeout": cluster.etcd_timeout,
            "log_format": format!("{:?}", cluster.log_format).to_lowercase(),
            "api_keys": access.api_keys.len(),
            "api_key_file": access.api_key_file,
            "admin_keys": access.admin_keys.len(),
            "admin_key_file": access.admin_key_file,
            "guard_all": access.guard_all,
            "key_requests_per_minute": access.key_requests_per_minute,
            "key_max_concurrent": access.key_max_concurrent,
            "ssl_certfile": tls.ssl_certfile,
            "ssl_keyfile": tls.ssl_keyfile,
            "ssl_ca_certs": tls.ssl_ca_certs,
            "ssl_cert_reqs": tls.ssl_cert_reqs,
            "allowed_origins": cors.allowed_origins,
            "allowed_methods": cors.allowed_methods,
            "allowed_headers": cors.allowed_headers,
            "allow_credentials": cors.allow_credentials,
            "responses_store": responses.responses_store.shown(),
            "responses_ttl": responses.responses_ttl,
            "max_background_responses": responses.max_background_responses,
            "handoff_min_tokens": self.handoff_min_tokens,
            "max_logprobs": self.max_logprobs,
            "tool_call_parser": self.tool_call_parser.as_ref().map(|it| format!("{it:?}")),
            "reasoning_parser": self.reasoning_parser.map(|it| format!("{it:?}")),
            "trust_request_chat_template": self.trust_request_chat_template,
            "enable_prompt_tokens_details": self.enable_prompt_tokens_details,
            "max_texts": self.max_texts,
            "request_timeout": self.request_timeout,
            "max_body_bytes": self.max_body_bytes,
            "head_timeout": self.head_timeout,
            "body_timeout": self.body_timeout,
            "send_timeout": self.send_timeout,
            "keep_alive_timeout": self.keep_alive_timeout,
            "max_inflight": self.max_inflight,
            "drain_timeout": self.drain_timeout,
            "http_threads": self.http_threads,
        });
        shown["max_audio_filesize_mb"] = audio.max_audio_filesize_mb.into();
        shown["max_audio_seconds"] = audio.max_audio_seconds.into();
        shown["config"] = json!(cluster.file.config);
        shown["routing_policy"] = format!("{:?}", self.routing_policy).into();
        shown["max_recordings"] = audio.max_recordings.into();
        shown["cluster_tls_ca"] = json!(cluster.tls.cluster_tls_ca);
        shown["cluster_tls_cert"] = json!(cluster.tls.cluster_tls_cert);
        shown["cluster_tls_key"] = json!(cluster.tls.cluster_tls_key);
        shown["cluster_tls_name"] = json!(cluster.tls.cluster_tls_name);
        shown["etcd_ca"] = json!(cluster.etcd_ca);
        shown["etcd_cert"] = json!(cluster.etcd_cert);
        shown["etcd_key"] = json!(cluster.etcd_key);
        shown["etcd_user"] = json!(cluster.etcd_user);
        shown["etcd_password_file"] = json!(cluster.etcd_password_file);
        let endpoint = cluster.traces.endpoint();
        shown["otlp_traces_endpoint"] = endpoint.map(|url| without_password(&url)).into();
        shown
    }
}

fn parse_mebibytes(text: &str) -> Result<usize, String> {
    let most = 4096;
    let message = || format!("must be a whole number from 1 to {most}");
    text.parse().ok().filter(|n| (1..=most).contains(n)).ok_or_else(message)
}

fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "must be a whole number above 0".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_shown() {
        let args = [
            "baton-gateway",
            "--api-key=hush-1",
            "--admin-key=hush-2",
            "--etcd=http://user:hush-3@etcd:2379/x",
            "--responses-store=postgres://user:hush-4@db/x?password=hush-5",
        ];
        let shown = Settings::parse_from(args).shown();
        assert!(!shown.to_string().contains("hush"), "{shown}");
        assert_eq!((&shown["api_keys"], &shown["admin_keys"]), (&json!(1), &json!(1)));
        assert_eq!(shown["etcd"], json!(["http://***@etcd:2379/x"]));
    }

    /// A flag that is added later must be shown too, or be left out on purpose.
    #[test]
    fn every_flag_is_shown() {
        use clap::CommandFactory as _;
        let shown = Settings::parse_from(["baton-gateway"]).shown();
        for argument in Settings::command().get_arguments() {
            let id = argument.get_id().as_str();
            let aside = ["help", "version"].contains(&id);
            assert!(aside || shown.get(id).is_some(), "{id} is not shown by /server_info");
        }
    }
}
