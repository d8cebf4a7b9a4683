//! What Prometheus reads: vLLM's names where vLLM has one, `baton_*` for the rest.
//!
//! Requests are counted here, as they pass. What workers count comes with their status and is
//! added up at each scrape, by growth, so that a sum does not fall when a worker leaves.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use baton_proto::v1::{Started, Transport, WorkerStatus};
use parking_lot::Mutex;
use prometheus::core::{AtomicF64, AtomicU64, Collector, GenericCounterVec, GenericGaugeVec};
use prometheus::{Encoder as _, HistogramOpts, HistogramVec, Opts, Registry, TextEncoder};

use crate::lora_requests::LoraRequests;
use crate::workers::Registry as Workers;

type CounterVec = GenericCounterVec<AtomicU64>;
type GaugeVec = GenericGaugeVec<AtomicF64>;

/// vLLM's labels. `engine` is the index of a data-parallel engine; seen from outside, a Baton
/// cluster is one.
const LABELS: [&str; 2] = ["model_name", "engine"];
const ENGINE: &str = "0";

/// Buckets of the time to the first token, in seconds.
const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of the time between tokens, in seconds.
const ITL: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Buckets of a request's phases, in seconds.
const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Buckets of token counts.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];

/// Workers whose last counters are remembered after they have left.
const MAX_SEEN: usize = 4096;

/// All metrics of this process.
pub struct Metrics {
    registry: Registry,
    http_requests: CounterVec,
    prompt_tokens: CounterVec,
    cached_tokens: CounterVec,
    generation_tokens: CounterVec,
    prefix_queries: CounterVec,
    prefix_hits: CounterVec,
    finished: CounterVec,
    ttft: HistogramVec,
    itl: HistogramVec,
    e2e: HistogramVec,
    queue: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
    request_prompt_tokens: HistogramVec,
    request_generation_tokens: HistogramVec,
    handoffs: CounterVec,
    handoff_tokens: CounterVec,
    running: GaugeVec,
    waiting: GaugeVec,
    kv_usage: GaugeVec,
    preemptions: CounterVec,
    drafts: CounterVec,
    draft_tokens: CounterVec,
    accepted_tokens: CounterVec,
    handoff_bytes: CounterVec,
    handoff_failures: CounterVec,
    workers: GaugeVec,
    kv_blocks: GaugeVec,
    etcd: GaugeVec,
    pub(crate) lora: LoraRequests,
    /// Each worker's counters at the last scrape.
    seen: Mutex<HashMap<String, WorkerStatus>>,
}

impl Metrics {
    /// Metrics at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let with = |extra: &'static str| [LABELS[0], LABELS[1], extra];
        Ok(Self {
            http_requests: counter(
                &r,
                "http_requests_total",
                "HTTP requests answered.",
                &["handler", "method", "status"],
            )?,
            prompt_tokens: counter(
                &r,
                "vllm:prompt_tokens_total",
                "Prompt tokens processed.",
                &LABELS,
            )?,
            cached_tokens: counter(
                &r,
                "vllm:prompt_tokens_cached_total",
                "Prompt tokens found in a prefix cache.",
                &LABELS,
            )?,
            generation_tokens: counter(
                &r,
                "vllm:generation_tokens_total",
                "Tokens generated.",
                &LABELS,
            )?,
            prefix_queries: counter(
                &r,
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
                &LABELS,
            )?,
            prefix_hits: counter(
                &r,
                "vllm:prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache.",
                &LABELS,
            )?,
            finished: counter(
                &r,
                "vllm:request_success_total",
                "Sequences ended, by reason.",
                &with("finished_reason"),
            )?,
            ttft: histogram(
                &r,
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                TTFT,
            )?,
            itl: histogram(
                &r,
                "vllm:inter_token_latency_seconds",
                "From one token to the next.",
                ITL,
            )?,
            e2e: histogram(
                &r,
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its end.",
                LATENCY,
            )?,
            queue: histogram(
                &r,
                "vllm:request_queue_time_seconds",
                "From a sequence's arrival at its worker to its admission.",
                LATENCY,
            )?,
            prefill: histogram(
                &r,
                "vllm:request_prefill_time_seconds",
                "From a sequence's admission to its first token, hand-off included.",
                LATENCY,
            )?,
            decode: histogram(
                &r,
                "vllm:request_decode_time_seconds",
                "From a sequence's first token to its end.",
                LATENCY,
            )?,
            request_prompt_tokens: histogram(
                &r,
                "vllm:request_prompt_tokens",
                "Tokens of a sequence's prompt.",
                TOKENS,
            )?,
            request_generation_tokens: histogram(
                &r,
                "vllm:request_generation_tokens",
                "Tokens generated for a sequence.",
                TOKENS,
            )?,
            handoffs: counter(
                &r,
                "baton_handoffs_total",
                "Prompts computed by a prefill worker and pulled, by transport.",
                &with("transport"),
            )?,
            handoff_tokens: counter(
                &r,
                "baton_handoff_tokens_total",
                "Prompt tokens whose KV was pulled, by transport.",
                &with("transport"),
            )?,
            running: gauge(
                &r,
                "vllm:num_requests_running",
                "Sequences in the running batches of all workers.",
                &LABELS,
            )?,
            waiting: gauge(
                &r,
                "vllm:num_requests_waiting",
                "Sequences in the queues of all workers.",
                &LABELS,
            )?,
            kv_usage: gauge(
                &r,
                "vllm:kv_cache_usage_perc",
                "Share of KV blocks that requests own, 0 to 1, over all workers that generate.",
                &LABELS,
            )?,
            preemptions: counter(
                &r,
                "vllm:num_preemptions_total",
                "Sequences put back for want of KV blocks.",
                &LABELS,
            )?,
            drafts: counter(
                &r,
                "vllm:spec_decode_num_drafts_total",
                "Steps of a sequence that were guessed ahead of.",
                &LABELS,
            )?,
            draft_tokens: counter(
                &r,
                "vllm:spec_decode_num_draft_tokens_total",
                "Tokens guessed ahead.",
                &LABELS,
            )?,
            accepted_tokens: counter(
                &r,
                "vllm:spec_decode_num_accepted_tokens_total",
                "Tokens guessed ahead that were right.",
                &LABELS,
            )?,
            handoff_bytes: counter(
                &r,
                "baton_handoff_bytes_total",
                "Bytes of KV pulled, by transport.",
                &with("transport"),
            )?,
            handoff_failures: counter(
                &r,
                "baton_handoff_failures_total",
                "Hand-offs given up; the decode worker computed the prompt itself.",
                &LABELS,
            )?,
            workers: gauge(
                &r,
                "baton_workers",
                "Workers known, by role and by whether they answer.",
                &["role", "state"],
            )?,
            kv_blocks: gauge(
                &r,
                "baton_worker_kv_blocks",
                "A worker's KV blocks, by owner.",
                &["instance", "role", "owner"],
            )?,
            etcd: gauge(
                &r,
                "baton_etcd_connected",
                "Whether etcd answers this gateway; without it the last view is used.",
                &[],
            )?,
            lora: LoraRequests::new(&r)?,
            registry: r,
            seen: Mutex::default(),
        })
    }

    /// Counts an HTTP answer. `handler` is the route's pattern.
    pub fn answered(&self, handler: &str, method: &str, status: u16) {
        let status = status.to_string();
        self.http_requests.with_label_values(&[handler, method, &status]).inc();
    }

    /// A sequence's prompt has been computed.
    pub fn started(&self, model: &str, prompt_tokens: usize, started: &Started) {
        let labels = [model, ENGINE];
        let (prompt, cached) = (prompt_tokens as u64, u64::from(started.cached_tokens));
        self.prompt_tokens.with_label_values(&labels).inc_by(prompt);
        self.prefix_queries.with_label_values(&labels).inc_by(prompt);
        self.cached_tokens.with_label_values(&labels).inc_by(cached);
        self.prefix_hits.with_label_values(&labels).inc_by(cached);
        self.request_prompt_tokens.with_label_values(&labels).observe(prompt as f64);
        self.queue.with_label_values(&labels).observe(started.queue_us as f64 / 1e6);
        self.prefill.with_label_values(&labels).observe(started.prefill_us as f64 / 1e6);
        if started.handed_off_tokens > 0 {
            let labels = [model, ENGINE, transport(started.transport())];
            self.handoffs.with_label_values(&labels).inc();
            let tokens = u64::from(started.handed_off_tokens);
            self.handoff_tokens.with_label_values(&labels).inc_by(tokens);
        }
    }

    /// A sequence's first token came, this long after the request.
    pub fn first_token(&self, model: &str, after: Duration) {
        self.generation_tokens.with_label_values(&[model, ENGINE]).inc();
        self.ttft.with_label_values(&[model, ENGINE]).observe(after.as_secs_f64());
    }

    /// Another token came, this long after the one before.
    pub fn next_token(&self, model: &str, after: Duration) {
        self.generation_tokens.with_label_values(&[model, ENGINE]).inc();
        self.itl.with_label_values(&[model, ENGINE]).observe(after.as_secs_f64());
    }

    /// A sequence ended: why, with how many tokens, after how long, and how long it decoded.
    pub fn finished(
        &self,
        model: &str,
        reason: &str,
        tokens: usize,
        took: Duration,
        decode: Option<Duration>,
    ) {
        let labels = [model, ENGINE];
        self.finished.with_label_values(&[model, ENGINE, reason]).inc();
        self.e2e.with_label_values(&labels).observe(took.as_secs_f64());
        self.request_generation_tokens.with_label_values(&labels).observe(tokens as f64);
        if let Some(decode) = decode {
            self.decode.with_label_values(&labels).observe(decode.as_secs_f64());
        }
    }

    /// The text that Prometheus reads, with what workers last said.
    pub fn scrape(&self, workers: &Workers) -> Result<Vec<u8>, prometheus::Error> {
        // One scrape at a time: growth must be counted once, and gauges seen whole.
        let mut seen = self.seen.lock();
        self.take_in(workers, &mut seen);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    fn take_in(&self, workers: &Workers, seen: &mut HashMap<String, WorkerStatus>) {
        let gauges = [&self.running, &self.waiting, &self.kv_usage, &self.workers, &self.kv_blocks];
        gauges.iter().for_each(|gauge| gauge.reset());
        self.etcd.with_label_values::<&str>(&[]).set(workers.etcd_connected().into());
        self.lora.show(workers);
        let mut blocks: HashMap<String, (u64, u64)> = HashMap::new();
        for worker in workers.workers() {
            let role = worker.record.role.as_str();
            let state = if worker.alive() { "up" } else { "down" };
            self.workers.with_label_values(&[role, state]).inc();
            let (Some(served), Some(status)) = (worker.served(), worker.status()) else { continue };
            let model = served.card.name.as_str();
            let id = worker.record.id.as_str();
            self.preset(model);
            if worker.alive() {
                let labels = [model, ENGINE];
                self.running.with_label_values(&labels).add(status.running.into());
                self.waiting.with_label_values(&labels).add(status.waiting.into());
                let owned = [
                    ("requests", status.kv_blocks_requests),
                    ("handoff", status.kv_blocks_handoff),
                    ("cached", status.kv_blocks_cached),
                ];
                let used: u64 = owned.iter().map(|(_, blocks)| blocks).sum();
                let free = status.kv_blocks_total.saturating_sub(used);
                for (owner, blocks) in owned.into_iter().chain([("free", free)]) {
                    self.kv_blocks.with_label_values(&[id, role, owner]).set(blocks as f64);
                }
                if worker.record.role.generates() {
                    let sum = blocks.entry(model.to_owned()).or_default();
                    sum.0 += status.kv_blocks_requests + status.kv_blocks_handoff;
                    sum.1 += status.kv_blocks_total;
                }
            }
            let before = seen.get(id).copied().unwrap_or_default();
            self.add_growth(model, &before, &status);
            seen.insert(id.to_owned(), *status);
        }
        for (model, (used, total)) in blocks {
            let share = used as f64 / total.max(1) as f64;
            self.kv_usage.with_label_values(&[model.as_str(), ENGINE]).set(share);
        }
        // Workers that are away may come back; those of long ago do not.
        if seen.len() > MAX_SEEN {
            let known: HashSet<String> =
                workers.workers().iter().map(|worker| worker.record.id.clone()).collect();
            seen.retain(|id, _| known.contains(id));
        }
    }

    fn add_growth(&self, model: &str, before: &WorkerStatus, now: &WorkerStatus) {
        let grown = |of: fn(&WorkerStatus) -> u64| of(now).saturating_sub(of(before));
        let labels = [model, ENGINE];
        self.preemptions.with_label_values(&labels).inc_by(grown(|status| status.preemptions));
        self.drafts.with_label_values(&labels).inc_by(grown(|status| status.spec_decode_drafts));
        let drafted = grown(|status| status.spec_decode_draft_tokens);
        self.draft_tokens.with_label_values(&labels).inc_by(drafted);
        let accepted = grown(|status| status.spec_decode_accepted_tokens);
        self.accepted_tokens.with_label_values(&labels).inc_by(accepted);
        let failures = grown(|status| status.handoff_failures);
        self.handoff_failures.with_label_values(&labels).inc_by(failures);
        let bytes = [
            (Transport::SharedMemory, grown(|status| status.handoff_bytes_shared_memory)),
            (Transport::Grpc, grown(|status| status.handoff_bytes_grpc)),
        ];
        for (kind, bytes) in bytes {
            let labels = [model, ENGINE, transport(kind)];
            self.handoff_bytes.with_label_values(&labels).inc_by(bytes);
        }
    }

    /// Series that dashboards expect to be there at zero.
    fn preset(&self, model: &str) {
        for counter in [&self.prompt_tokens, &self.generation_tokens] {
            counter.with_label_values(&[model, ENGINE]);
        }
        for reason in ["stop", "length", "abort", "error"] {
            self.finished.with_label_values(&[model, ENGINE, reason]);
        }
    }
}

fn transport(kind: Transport) -> &'static str {
    match kind {
        Transport::SharedMemory => "shm",
        Transport::Grpc => "grpc",
        Transport::Unspecified => "none",
    }
}

fn register<T: Collector + Clone + 'static>(
    registry: &Registry,
    metric: T,
) -> Result<T, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counter(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<CounterVec, prometheus::Error> {
    register(registry, CounterVec::new(Opts::new(name, help), labels)?)
}

fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<GaugeVec, prometheus::Error> {
    register(registry, GaugeVec::new(Opts::new(name, help), labels)?)
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, HistogramVec::new(opts, &LABELS)?)
}
