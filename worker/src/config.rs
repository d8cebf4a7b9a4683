//! Command line and environment of `baton-worker`.

use std::net::SocketAddr;
use std::path::PathBuf;

use baton_membership::InstanceRole;
use baton_membership::config::model_name;
use baton_membership::daemon::ClusterArgs;
use baton_proto::v1;
use clap::Parser;

use crate::device::Device;
use crate::model::Precision;
use crate::pooling::{Dtype, Pooling};
use crate::scheduler::Speculation;

const EXAMPLE: &str = "Example:\n  baton-worker --role decode --model SmolLM2-135M-Instruct.Q4_1.gguf --etcd http://10.0.0.5:2379";

/// A Baton worker: computes prompts, generates, or both.
///
/// It joins the cluster through etcd; gateways find it there.
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-worker", version, after_help = EXAMPLE)]
pub struct Settings {
    /// What this worker does.
    #[arg(long, env = "BATON_ROLE")]
    pub role: Role,

    /// A GGUF file, or a folder with config.json, *.safetensors and tokenizer.json. To replace a file under a running worker, rename another over it.
    #[arg(long, env = "BATON_MODEL")]
    pub model: PathBuf,

    /// Names that clients may use in `model`, separated by spaces or commas; the first is the one
    /// in replies. By default the file's name without its ending.
    #[arg(long, env = "BATON_SERVED_MODEL_NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,

    /// LoRA adapters to serve: name=path, or as JSON {"name": …, "path": …}; several are separated
    /// by spaces, or in a JSON list. A path is a folder as PEFT saves it.
    #[arg(long, env = "BATON_LORA_MODULES", num_args = 1.., value_parser = parse_lora_modules)]
    pub lora_modules: Vec<LoraModules>,

    /// LoRA adapters that may be loaded at once.
    #[arg(long, env = "BATON_MAX_LORAS", default_value_t = 8)]
    pub max_loras: usize,

    /// The highest rank that an adapter may have. Memory and time grow with the rank.
    #[arg(long, env = "BATON_MAX_LORA_RANK", default_value = "64", value_parser = parse_positive)]
    pub max_lora_rank: usize,

    /// A file with a Jinja chat template in place of the model's own, as vLLM takes one: for a base
    /// model, or to give tools to a model whose template knows none.
    #[arg(long, env = "BATON_CHAT_TEMPLATE")]
    pub chat_template: Option<PathBuf>,

    /// Address to serve gRPC on; port 0 takes any free one.
    #[arg(long, env = "BATON_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,

    /// URL under which others reach this worker; by default the listen address.
    #[arg(long, env = "BATON_ADVERTISE")]
    pub advertise: Option<String>,

    /// The cluster to join.
    #[command(flatten)]
    pub cluster: ClusterArgs,

    /// What computes: cpu, or an NVIDIA GPU: cuda is the first one, cuda:N the one of this number.
    /// A worker on a GPU rounds weights and KV cache to bfloat16; it must have been built with the
    /// feature `cuda`. Equal on all workers that hand KV over.
    #[arg(long, env = "BATON_DEVICE", default_value = "cpu")]
    pub device: Device,

    /// Memory for the KV cache, such as 512MiB or 2GiB. Touched only as it fills; a GPU's is taken at
    /// once.
    #[arg(long, env = "BATON_KV_MEMORY", default_value = "1GiB", value_parser = parse_bytes)]
    pub kv_memory: Bytes,

    /// Tokens in a KV block: 16, 32, 48 and so on, equal on all workers.
    #[arg(long, env = "BATON_BLOCK_SIZE", default_value = "16", value_parser = parse_block_size)]
    pub block_size: usize,

    /// Bits of the KV cache on a processor: int8 holds twice the tokens and halves the hand-off, at a small cost in
    /// quality. Equal on all workers.
    #[arg(long, env = "BATON_KV_CACHE_DTYPE", default_value = "int16")]
    pub kv_cache_dtype: KvCacheDtype,

    /// Bits that activations are rounded to before products with quantized weights. 16 gives what
    /// float32 arithmetic gives, to about five digits; 8 is faster, and rounds as llama.cpp does.
    /// Equal on all workers.
    #[arg(long, env = "BATON_ACTIVATION_BITS", default_value = "16")]
    pub activation_bits: ActivationBits,

    /// Longest prompt and output together; by default what the model was trained for.
    #[arg(long, env = "BATON_MAX_MODEL_LEN", value_parser = parse_positive)]
    pub max_model_len: Option<usize>,

    /// Role pooling: what an encoder's weights are rounded to; less is faster and less exact.
    #[arg(long, env = "BATON_DTYPE", default_value = "float32")]
    pub dtype: Dtype,

    /// Role pooling: how the vectors of a text's tokens become one, in place of what the model's
    /// files say. Where they do not say either: `cls` for encoders, `lasttoken` for decoders.
    #[arg(long, env = "BATON_POOLING")]
    pub pooling: Option<Pooling>,

    /// Tokens computed in one step, or, role pooling, of one batch of texts (by default 1024). Less
    /// shortens the pauses that long prompts cause, more computes prompts faster.
    #[arg(
        long,
        env = "BATON_MAX_BATCH_TOKENS",
        default_value = "512",
        default_value_if("role", "pooling", "1024"),
        value_parser = parse_positive
    )]
    pub max_batch_tokens: usize,

    /// Sequences computed at once.
    #[arg(long, env = "BATON_MAX_RUNNING", default_value = "64", value_parser = parse_positive)]
    pub max_running: usize,

    /// Requests that may wait; more are refused. Role pooling: up to 64 texts for each, of 4,096
    /// tokens together.
    #[arg(long, env = "BATON_MAX_WAITING", default_value_t = 256)]
    pub max_waiting: usize,

    /// Seconds of waiting that count as one step of a request's `priority`, so that none starves.
    #[arg(long, env = "BATON_PRIORITY_AGING_SECONDS", default_value = "30", value_parser = parse_positive)]
    pub priority_aging_seconds: usize,

    /// Tokens guessed ahead of each sequence in a step, from what it holds already; 0 is off.
    /// Answers stay the same, those that repeat their prompt come faster.
    #[arg(long, env = "BATON_SPECULATIVE_TOKENS", default_value_t = 0)]
    pub speculative_tokens: usize,

    /// Guess only after at least so many tokens that occurred before.
    #[arg(long, env = "BATON_SPECULATIVE_NGRAM_MIN", default_value = "2", value_parser = parse_positive)]
    pub speculative_ngram_min: usize,

    /// Prefer places where so many tokens are alike.
    #[arg(long, env = "BATON_SPECULATIVE_NGRAM_MAX", default_value = "4", value_parser = parse_positive)]
    pub speculative_ngram_max: usize,

    /// Threads that compute; by default one for each core.
    #[arg(long, env = "BATON_THREADS", value_parser = parse_positive)]
    pub threads: Option<usize>,

    /// How KV blocks may cross between workers, best first. By default shm,grpc; between GPUs
    /// cuda-ipc,nccl,grpc, as far as they are built in.
    #[arg(long, env = "BATON_TRANSPORTS", value_delimiter = ',')]
    pub transports: Vec<Transport>,

    /// Seconds that finished blocks are kept for the worker that asked for them.
    #[arg(long, env = "BATON_HOLD_LEASE", default_value_t = 30)]
    pub hold_lease: u64,

    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(long, env = "BATON_DRAIN_TIMEOUT", default_value_t = 30)]
    pub drain_timeout: u64,

    /// Seconds that a step may take: a worker whose device hangs ends with exit code 1. More than the
    /// longest step of --max-batch-tokens takes; 0 is never. Role pooling has none.
    #[arg(long, env = "BATON_STEP_TIMEOUT", default_value_t = 300)]
    pub step_timeout: u64,
}

/// A size in bytes. Its own type, as its flag takes a text and no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub usize);

/// A LoRA adapter to serve from the start.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraModule {
    /// The name that clients use in `model`.
    pub name: String,
    /// The folder.
    pub path: String,
    /// A name of the model that it is for.
    #[serde(default)]
    pub base_model_name: Option<String>,
}

/// What one value of `--lora-modules` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraModules(Vec<LoraModule>);

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Computes prompts for decode workers.
    Prefill,
    /// Generates; computes short prompts itself.
    Decode,
    /// Both in one process.
    Unified,
    /// Computes vectors, classes and scores of texts.
    Pooling,
    /// Writes down speech: `unified`, for a speech model.
    Audio,
}

/// Elements of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KvCacheDtype {
    /// Sixteen-bit integers with a scale for each token and head.
    Int16,
    /// Eight-bit integers, likewise.
    Int8,
}

impl From<KvCacheDtype> for v1::KvDtype {
    fn from(dtype: KvCacheDtype) -> Self {
        match dtype {
            KvCacheDtype::Int16 => Self::I16,
            KvCacheDtype::Int8 => Self::I8,
        }
    }
}

/// How finely activations are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ActivationBits {
    /// To sixteen bits.
    #[value(name = "16")]
    Sixteen,
    /// To eight bits.
    #[value(name = "8")]
    Eight,
}

impl From<ActivationBits> for Precision {
    fn from(bits: ActivationBits) -> Self {
        match bits {
            ActivationBits::Sixteen => Self::Sixteen,
            ActivationBits::Eight => Self::Eight,
        }
    }
}

/// How KV blocks cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// Shared memory, on one host.
    Shm,
    /// A gRPC stream, between any hosts.
    Grpc,
    /// From GPU to GPU, on one host.
    CudaIpc,
    /// From GPU to GPU, between any hosts.
    Nccl,
}

impl Transport {
    /// Those of a device, best first.
    fn of(device: Device) -> &'static [Self] {
        match device {
            Device::Cpu => &[Self::Shm, Self::Grpc],
            Device::Cuda(_) => &[Self::CudaIpc, Self::Nccl, Self::Grpc],
        }
    }

    fn built_in(self) -> bool {
        match self {
            Self::Shm | Self::Grpc => true,
            Self::CudaIpc => cfg!(feature = "cuda"),
            Self::Nccl => cfg!(feature = "nccl"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Grpc => "grpc",
            Self::CudaIpc => "cuda-ipc",
            Self::Nccl => "nccl",
        }
    }
}

impl Settings {
    /// The names that clients may use, each once, at least one; or what is wrong with them.
    pub fn model_names(&self) -> Result<Vec<String>, String> {
        let from_file = self.served_model_name.is_empty().then(|| model_name(&self.model));
        let given = self.served_model_name.iter().map(|name| name.trim().to_owned());
        let mut names: Vec<String> = Vec::new();
        for name in given.chain(from_file) {
            if name.is_empty() {
                return Err("--served-model-name holds an empty name".into());
            }
            if !names.contains(&name) {
                names.push(name);
            }
        }
        if names.is_empty() { Err("--served-model-name is needed".into()) } else { Ok(names) }
    }

    /// How KV blocks may cross, best first, or what is wrong with it.
    pub fn transports(&self) -> Result<Vec<Transport>, String> {
        let possible = Transport::of(self.device);
        if self.transports.is_empty() {
            return Ok(possible.iter().copied().filter(|it| it.built_in()).collect());
        }
        for transport in &self.transports {
            let name = transport.name();
            if !possible.contains(transport) {
                let possible: Vec<_> = possible.iter().map(|it| it.name()).collect();
                return Err(format!(
                    "--transports {name}: with --device {} KV blocks cross by {}",
                    self.device,
                    possible.join(", "),
                ));
            }
            if !transport.built_in() {
                return Err(format!(
                    "--transports {name}: this baton-worker was built without the feature `{}`",
                    if *transport == Transport::Nccl { "nccl" } else { "cuda" },
                ));
            }
        }
        Ok(self.transports.clone())
    }

    /// What a GPU is asked for that it cannot do.
    pub fn check_device(&self) -> Result<(), String> {
        if self.device == Device::Cpu {
            return Ok(());
        }
        let device = format!("--device {}", self.device);
        if !self.device.built_in() {
            return Err(format!(
                "{device}: this baton-worker was built without the feature `cuda`; docs/gpu.md says \
                 how to build it, or start it with --device cpu"
            ));
        }
        let wrong = match self {
            Self { role: Role::Pooling, .. } => "--role pooling",
            Self { role: Role::Audio, .. } => "--role audio",
            Self { kv_cache_dtype: KvCacheDtype::Int8, .. } => "--kv-cache-dtype int8",
            Self { activation_bits: ActivationBits::Eight, .. } => "--activation-bits 8",
            _ if self.lora_modules().next().is_some() => "--lora-modules",
            _ => return Ok(()),
        };
        Err(format!("{wrong} is not supported on a GPU; start the worker with --device cpu"))
    }

    /// The adapters to serve from the start.
    pub fn lora_modules(&self) -> impl Iterator<Item = &LoraModule> {
        self.lora_modules.iter().flat_map(|modules| &modules.0)
    }

    /// How much is guessed ahead, or what is wrong with it.
    pub fn speculation(&self) -> Result<Speculation, String> {
        let (min, max) = (self.speculative_ngram_min, self.speculative_ngram_max);
        if min > max {
            return Err(format!(
                "--speculative-ngram-min {min} is above --speculative-ngram-max {max}"
            ));
        }
        Ok(Speculation { tokens: self.speculative_tokens, ngram_min: min, ngram_max: max })
    }
}

impl From<Role> for InstanceRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Prefill => Self::Prefill,
            Role::Decode => Self::Decode,
            Role::Unified => Self::Unified,
            Role::Pooling => Self::Pooling,
            Role::Audio => Self::Audio,
        }
    }
}

impl From<Transport> for v1::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Shm => Self::SharedMemory,
            Transport::Grpc => Self::Grpc,
            Transport::CudaIpc => Self::CudaIpc,
            Transport::Nccl => Self::Nccl,
        }
    }
}

fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        other => return Err(format!("`{other}` is no unit; use KiB, MiB or GiB")),
    };
    let count: usize = digits.parse().map_err(|_| format!("`{text}` is no size such as 512MiB"))?;
    count.checked_mul(unit).map(Bytes).ok_or_else(|| format!("`{text}` is too much"))
}

fn parse_lora_modules(text: &str) -> Result<LoraModules, String> {
    let text = text.trim();
    let json = |error: serde_json::Error| error.to_string();
    if text.starts_with('{') {
        return serde_json::from_str(text).map(|module| LoraModules(vec![module])).map_err(json);
    }
    if text.starts_with('[') {
        return serde_json::from_str(text).map(LoraModules).map_err(json);
    }
    let pair = text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
    let (name, path) = pair.ok_or("give name=path, or JSON with `name` and `path`")?;
    let (name, path) = (name.to_owned(), path.to_owned());
    Ok(LoraModules(vec![LoraModule { name, path, base_model_name: None }]))
}

fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "must be a whole number above 0".into())
}

fn parse_block_size(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|&n: &usize| n > 0 && n.is_multiple_of(16) && n <= 1024)
        .ok_or_else(|| "must be a multiple of 16, at most 1024".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_of_texts_are_larger_than_steps() {
        let tokens = |role: &str, flags: &[&str]| {
            let start = ["baton-worker", "--model", "a.gguf", "--role", role];
            Settings::try_parse_from(start.iter().chain(flags)).unwrap().max_batch_tokens
        };
        assert_eq!((tokens("unified", &[]), tokens("pooling", &[])), (512, 1024));
        assert_eq!(tokens("pooling", &["--max-batch-tokens", "64"]), 64);
    }

    #[test]
    fn names_and_adapters_come_in_the_forms_that_vllm_takes() {
        let settings = |flags: &[&str]| {
            let start = ["baton-worker", "--role", "unified", "--model", "a/b.gguf"];
            Settings::try_parse_from(start.iter().chain(flags)).map_err(|error| error.to_string())
        };
        let names = |flags: &[&str]| settings(flags).unwrap().model_names();
        assert_eq!(names(&[]).unwrap(), ["b"]);
        assert_eq!(
            names(&["--served-model-name", "x", "y", "--threads", "1"]).unwrap(),
            ["x", "y"]
        );
        assert_eq!(names(&["--served-model-name", "x,y,x"]).unwrap(), ["x", "y"]);
        assert!(names(&["--served-model-name", "x,,y"]).is_err());
        let adapters = |flags: &[&str]| -> Vec<(String, String)> {
            let settings = settings(flags).unwrap();
            settings.lora_modules().map(|it| (it.name.clone(), it.path.clone())).collect()
        };
        let pair = |name: &str, path: &str| (name.to_owned(), path.to_owned());
        assert_eq!(
            adapters(&["--lora-modules", "a=/x/a", r#"{"name":"b","path":"/x/b=1, c"}"#]),
            [pair("a", "/x/a"), pair("b", "/x/b=1, c")]
        );
        let list = r#"[{"name":"a","path":"/a"},{"name":"b","path":"/b","base_model_name":"x"}]"#;
        assert_eq!(adapters(&["--lora-modules", list]), [pair("a", "/a"), pair("b", "/b")]);
        for bad in ["a", "=/x", "a=", "{", r#"{"name":"a"}"#, r#"{"name":"a","path":"b","c":1}"#] {
            let error = settings(&["--lora-modules", bad]).unwrap_err();
            assert!(error.contains("--lora-modules"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_device_has_its_own_transports_and_limits() {
        let settings = |flags: &[&str]| {
            let start = ["baton-worker", "--role", "unified", "--model", "a/b.gguf"];
            Settings::try_parse_from(start.iter().chain(flags)).unwrap()
        };
        let transports = |flags: &[&str]| settings(flags).transports();
        assert_eq!(transports(&[]).unwrap(), [Transport::Shm, Transport::Grpc]);
        assert_eq!(transports(&["--transports", "grpc"]).unwrap(), [Transport::Grpc]);
        let on_gpu = transports(&["--device", "cuda"]).unwrap();
        assert_eq!(on_gpu.last(), Some(&Transport::Grpc));
        assert_eq!(on_gpu.contains(&Transport::Nccl), cfg!(feature = "nccl"));
        let error = transports(&["--transports", "cuda-ipc"]).unwrap_err();
        assert!(error.contains("--device cpu"), "{error}");
        let error = transports(&["--device", "cuda:1", "--transports", "shm"]).unwrap_err();
        assert!(error.contains("--device cuda:1"), "{error}");

        let check = |flags: &[&str]| settings(flags).check_device();
        assert_eq!(check(&["--kv-cache-dtype", "int8", "--lora-modules", "a=/a"]), Ok(()));
        for wrong in [["--kv-cache-dtype", "int8"], ["--activation-bits", "8"]] {
            let error = check(&[&["--device", "cuda"], &wrong[..]].concat()).unwrap_err();
            let expected = if cfg!(feature = "cuda") { wrong[0] } else { "feature `cuda`" };
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(check(&["--device", "cuda"]).is_ok(), cfg!(feature = "cuda"));
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_bytes("512MiB"), Ok(Bytes(512 << 20)));
        assert_eq!(parse_bytes("2g"), Ok(Bytes(2 << 30)));
        assert_eq!(parse_bytes("4096"), Ok(Bytes(4096)));
        for bad in ["", "MiB", "1.5GiB", "-1", "1XB", "99999999999GiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
