//! Command line and environment of `baton-gateway`.

use std::net::SocketAddr;
use std::path::PathBuf;

use baton_membership::daemon::ClusterArgs;
use clap::Parser;

use crate::output::{ReasoningSyntax, ToolSyntax};

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

    /// A key that opens the API; may be repeated. Without any key the API is open to all.
    /// VLLM_API_KEY is read too.
    #[arg(long = "api-key", env = "BATON_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_keys: Vec<String>,

    /// A file with one key a line; lines that begin with # are comments.
    #[arg(long, env = "BATON_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Prompt tokens, beyond those cached on the decode worker, from which a prefill worker is
    /// used. docs/architecture.md says how the default was measured.
    #[arg(long, env = "BATON_HANDOFF_MIN_TOKENS", default_value_t = 64)]
    pub handoff_min_tokens: u32,

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

    /// Seconds a request may take in all.
    #[arg(long, env = "BATON_REQUEST_TIMEOUT", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub request_timeout: u64,

    /// Largest request body.
    #[arg(long, env = "BATON_MAX_BODY_BYTES", default_value_t = 8 * 1024 * 1024)]
    pub max_body_bytes: usize,

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

fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "must be a whole number above 0".into())
}
