//! What Prometheus reads: vLLM's names where vLLM has one, `baton_*` for the rest.
//!
//! Requests are counted here, as they pass. What workers count comes with their status and is
//! added up at each scrape, by growth, so that a sum does not fall when a worker leaves. As all
//! counters it begins at zero with the process: what workers had counted before would look like
//! growth of that moment.

mod families;
mod http;
pub(crate) mod lora;
mod pooling;
mod scaling;
mod steps;
mod tokens;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use baton_proto::InstanceRole;
use baton_proto::v1::{
    KvDtype, KvLayout, ModelCard, ScaleOperation, Started, Transport, WorkerStatus,
};
use parking_lot::{Mutex, RwLock};
use prometheus::{Encoder as _, HistogramVec, Opts, Registry, TextEncoder};

use crate::http::Load;
use crate::metrics::lora::LoraRequests;
use crate::workers::Registry as Workers;
use families::{
    CounterVec, ENGINE, GaugeVec, INTER_TOKEN, LABELS, LATENCY, SEQUENCES, SecondsVec, TTFT,
    counter, gauge, histogram, register,
};
use http::HttpMetrics;
pub use pooling::PoolingRecord;
use scaling::ScaleMetrics;
use steps::StepTokens;
pub use tokens::Siblings;
use tokens::TokenHistograms;

/// Why a sequence may end, as vLLM has it.
const REASONS: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];
/// Where a prompt's KV may come from, as vLLM has it.
const SOURCES: [&str; 3] = ["local_compute", "local_cache_hit", "external_kv_transfer"];
/// Where the KV of a sequence came from that went on with another worker.
const MIGRATED_KV: [&str; 3] = ["pulled", "cached", "computed"];

/// Whether a worker is sent requests, ends those that it has, or does not answer.
const STATES: [&str; 3] = ["up", "draining", "down"];

/// What the store of responses is asked to do.
const STORE_OPERATIONS: [&str; 12] = [
    "append",
    "begin",
    "cancel",
    "conversation",
    "delete",
    "expire",
    "finish",
    "follow",
    "get",
    "insert",
    "look",
    "tend",
];

/// Workers whose last counters are remembered after they have left.
const MAX_SEEN: usize = 4096;

fn store_errors(registry: &Registry) -> Result<CounterVec, prometheus::Error> {
    let name = "baton_responses_store_errors_total";
    let errors = counter(registry, name, "Failures of the store of responses.", &["operation"])?;
    // From the beginning, so that the first failure is a rise.
    for operation in STORE_OPERATIONS {
        errors.with_label_values(&[operation]);
    }
    Ok(errors)
}

/// All metrics of this process.
pub struct Metrics {
    registry: Registry,
    http: HttpMetrics,
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
    inference: HistogramVec,
    per_token: HistogramVec,
    params_n: HistogramVec,
    /// By model, because the buckets are the model's own.
    tokens: RwLock<HashMap<String, Arc<TokenHistograms>>>,
    by_source: CounterVec,
    external_queries: CounterVec,
    external_hits: CounterVec,
    cache_config: GaugeVec,
    handoffs: CounterVec,
    handoff_tokens: CounterVec,
    migrations: CounterVec,
    migrated_tokens: CounterVec,
    running: GaugeVec,
    waiting: GaugeVec,
    kv_usage: GaugeVec,
    preemptions: CounterVec,
    pooled_texts: CounterVec,
    pooled_batches: CounterVec,
    drafts: CounterVec,
    draft_tokens: CounterVec,
    accepted_tokens: CounterVec,
    steps: StepTokens,
    constrained: CounterVec,
    constraint_wait: SecondsVec,
    handoff_bytes: CounterVec,
    handoff_failures: CounterVec,
    workers: GaugeVec,
    kv_blocks: GaugeVec,
    etcd: GaugeVec,
    inflight: GaugeVec,
    inflight_limit: GaugeVec,
    kv_index: GaugeVec,
    heard: prometheus::CounterVec,
    pub(crate) lora: LoraRequests,
    store_errors: CounterVec,
    scaling: ScaleMetrics,
    /// Each worker's counters at the last scrape.
    seen: Mutex<HashMap<String, Arc<WorkerStatus>>>,
}

impl Metrics {
    /// Metrics at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let with = |extra: &'static str| [LABELS[0], LABELS[1], extra];
        Ok(Self {
            http: HttpMetrics::new(&r)?,
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
                INTER_TOKEN,
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
            inference: histogram(
                &r,
                "vllm:request_inference_time_seconds",
                "From a sequence's admission to its end.",
                LATENCY,
            )?,
            per_token: histogram(
                &r,
                "vllm:request_time_per_output_token_seconds",
                "Of each sequence, the mean time from one token to the next.",
                INTER_TOKEN,
            )?,
            params_n: histogram(
                &r,
                "vllm:request_params_n",
                "Sequences asked for by `n`, of each prompt.",
                SEQUENCES,
            )?,
            tokens: RwLock::default(),
            by_source: counter(
                &r,
                "vllm:prompt_tokens_by_source_total",
                "Prompt tokens, by where their KV came from.",
                &with("source"),
            )?,
            external_queries: counter(
                &r,
                "vllm:external_prefix_cache_queries_total",
                "Prompt tokens that the generating worker had not cached.",
                &LABELS,
            )?,
            external_hits: counter(
                &r,
                "vllm:external_prefix_cache_hits_total",
                "Prompt tokens of those whose KV was pulled from a prefill worker.",
                &LABELS,
            )?,
            cache_config: gauge(
                &r,
                "vllm:cache_config_info",
                "How KV caches are laid out; 1 for each kind of worker that generates.",
                &["engine", "block_size", "cache_dtype", "num_gpu_blocks", "enable_prefix_caching"],
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
            migrations: counter(
                &r,
                "baton_migrations_total",
                "Sequences that went on with another worker, by what became of their KV.",
                &with("kv"),
            )?,
            migrated_tokens: counter(
                &r,
                "baton_migrated_tokens_total",
                "Tokens of those, prompt and output, whose KV was pulled.",
                &LABELS,
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
            pooled_texts: counter(
                &r,
                "baton_pooled_texts_total",
                "Texts that pooling workers have computed.",
                &LABELS,
            )?,
            pooled_batches: counter(
                &r,
                "baton_pooled_batches_total",
                "Batches that they computed them in.",
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
            steps: register(&r, StepTokens::new()?)?,
            constrained: counter(
                &r,
                "baton_constrained_tokens_total",
                "Tokens drawn under a constraint.",
                &LABELS,
            )?,
            constraint_wait: register(
                &r,
                SecondsVec::new(
                    Opts::new(
                        "baton_constraint_wait_seconds_total",
                        "Time that engines stood still for a constraint's next tokens.",
                    ),
                    &LABELS,
                )?,
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
                "Workers known, by role and by whether they take requests, drain or do not answer.",
                &["role", "state"],
            )?,
            kv_blocks: gauge(
                &r,
                "baton_worker_kv_blocks",
                "A worker's KV blocks, by owner.",
                &["instance", "role", "owner"],
            )?,
            kv_index: gauge(
                &r,
                "baton_kv_index_blocks",
                "Addresses of KV blocks by which this gateway routes.",
                &[],
            )?,
            etcd: gauge(
                &r,
                "baton_etcd_connected",
                "Whether etcd answers this gateway; without it the last view is used.",
                &[],
            )?,
            inflight: gauge(
                &r,
                "baton_inflight_requests",
                "Generation requests in progress at this gateway.",
                &[],
            )?,
            inflight_limit: gauge(
                &r,
                "baton_inflight_requests_limit",
                "Generation requests that it serves at once; more are answered 429.",
                &[],
            )?,
            heard: families::register(
                &r,
                prometheus::CounterVec::new(
                    prometheus::Opts::new(
                        "baton_audio_seconds_total",
                        "Seconds of recordings that were listened to, silence included.",
                    ),
                    &LABELS,
                )?,
            )?,
            lora: LoraRequests::new(&r)?,
            store_errors: store_errors(&r)?,
            scaling: ScaleMetrics::new(&r)?,
            registry: r,
            seen: Mutex::default(),
        })
    }

    /// The store of responses has failed at `operation`.
    pub fn store_failed(&self, operation: &str) {
        self.store_errors.with_label_values(&[operation]).inc();
    }

    /// What the coordinators tell of scale operations: those that run and the last ones that ended.
    pub fn scaling(&self, operations: &[ScaleOperation]) {
        self.scaling.show(operations);
    }

    /// A model has listened to so many seconds of a recording.
    pub fn heard(&self, model: &str, seconds: f64) {
        self.heard.with_label_values(&[model, ENGINE]).inc_by(seconds);
    }

    /// Counts an HTTP answer. `handler` is the route's pattern.
    pub fn answered(&self, handler: &str, method: &str, status: u16) {
        self.http.answered(handler, method, status);
    }

    /// An answer's last byte was taken, or its client has left: how long it took, and the bytes of
    /// both bodies.
    pub fn exchanged(
        &self,
        handler: &str,
        method: &str,
        took: Duration,
        request: u64,
        response: u64,
    ) {
        self.http.exchanged(handler, method, took, request, response);
    }

    /// The sequences of one prompt, about to be generated.
    pub fn siblings(self: &Arc<Self>, model: &ModelCard, n: usize) -> Arc<Siblings> {
        let params_n = self.params_n.with_label_values(&[&*model.name, ENGINE]);
        Arc::new(Siblings::new(self.tokens(model), params_n, n))
    }

    /// A sequence's prompt has been computed.
    pub fn started(&self, model: &ModelCard, prompt_tokens: usize, started: &Started) {
        let name = model.name.as_str();
        let labels = [name, ENGINE];
        let (prompt, cached) = (prompt_tokens as u64, u64::from(started.cached_tokens));
        let pulled = u64::from(started.handed_off_tokens);
        let computed = prompt.saturating_sub(cached + pulled);
        self.prompt_tokens.with_label_values(&labels).inc_by(prompt);
        self.prefix_queries.with_label_values(&labels).inc_by(prompt);
        self.cached_tokens.with_label_values(&labels).inc_by(cached + pulled);
        self.prefix_hits.with_label_values(&labels).inc_by(cached);
        self.external_queries.with_label_values(&labels).inc_by(prompt.saturating_sub(cached));
        self.external_hits.with_label_values(&labels).inc_by(pulled);
        for (source, tokens) in SOURCES.into_iter().zip([computed, cached, pulled]) {
            self.by_source.with_label_values(&[name, ENGINE, source]).inc_by(tokens);
        }
        let tokens = self.tokens(model);
        tokens.prompt.observe(prompt as f64);
        tokens.computed.observe(computed as f64);
        self.queue.with_label_values(&labels).observe(started.queue_us as f64 / 1e6);
        self.prefill.with_label_values(&labels).observe(started.prefill_us as f64 / 1e6);
        if started.handed_off_tokens > 0 {
            let labels = [name, ENGINE, transport(started.transport())];
            self.handoffs.with_label_values(&labels).inc();
            self.handoff_tokens.with_label_values(&labels).inc_by(pulled);
        }
    }

    /// A sequence went on with another worker.
    pub fn migrated(&self, model: &ModelCard, started: &Started) {
        let name = model.name.as_str();
        let pulled = started.handed_off_tokens;
        let [by_pull, by_cache, by_computing] = MIGRATED_KV;
        let kv = match (pulled, started.cached_tokens) {
            (1.., _) => by_pull,
            (0, 1..) => by_cache,
            (0, 0) => by_computing,
        };
        self.migrations.with_label_values(&[name, ENGINE, kv]).inc();
        self.migrated_tokens.with_label_values(&[name, ENGINE]).inc_by(pulled.into());
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

    /// A sequence ended.
    pub fn finished(&self, model: &ModelCard, end: &Ended<'_>) {
        let name = model.name.as_str();
        let labels = [name, ENGINE];
        self.finished.with_label_values(&[name, ENGINE, end.reason]).inc();
        self.e2e.with_label_values(&labels).observe(end.took.as_secs_f64());
        let tokens = self.tokens(model);
        tokens.generation.observe(end.tokens as f64);
        tokens.max_tokens.observe(end.max_tokens.into());
        if let Some(decode) = end.decode {
            self.decode.with_label_values(&labels).observe(decode.as_secs_f64());
            let inference = end.prefill + decode;
            self.inference.with_label_values(&labels).observe(inference.as_secs_f64());
            let gaps = end.tokens.saturating_sub(1).max(1) as f64;
            self.per_token.with_label_values(&labels).observe(decode.as_secs_f64() / gaps);
        }
    }

    fn tokens(&self, model: &ModelCard) -> Arc<TokenHistograms> {
        if let Some(known) = self.tokens.read().get(&model.name) {
            return known.clone();
        }
        let mut all = self.tokens.write();
        let make = || Arc::new(TokenHistograms::new(&self.registry, model));
        all.entry(model.name.clone()).or_insert_with(make).clone()
    }

    /// The text that Prometheus reads, with what workers last said.
    pub fn scrape(&self, workers: &Workers, load: &Load) -> Result<Vec<u8>, prometheus::Error> {
        // One scrape at a time: growth must be counted once, and gauges seen whole.
        let mut seen = self.seen.lock();
        self.inflight.with_label_values::<&str>(&[]).set(load.now() as f64);
        self.inflight_limit.with_label_values::<&str>(&[]).set(load.most() as f64);
        self.take_in(workers, &mut seen);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    fn take_in(&self, workers: &Workers, seen: &mut HashMap<String, Arc<WorkerStatus>>) {
        let gauges = [
            &self.running,
            &self.waiting,
            &self.kv_usage,
            &self.cache_config,
            &self.workers,
            &self.kv_blocks,
        ];
        gauges.iter().for_each(|gauge| gauge.reset());
        // No worker is a number too: an alert must see it.
        for role in InstanceRole::WORKERS {
            for state in STATES {
                self.workers.with_label_values(&[role.as_str(), state]);
            }
        }
        let indexed = workers.kv.read().len() as f64;
        self.kv_index.with_label_values::<&str>(&[]).set(indexed);
        self.etcd.with_label_values::<&str>(&[]).set(workers.etcd_connected().into());
        self.scaling.coordinators(workers.coordinators().len());
        self.lora.show(workers);
        let mut blocks: HashMap<String, (u64, u64)> = HashMap::new();
        let mut layouts: BTreeMap<(u32, &str), u64> = BTreeMap::new();
        for worker in workers.workers() {
            let role = worker.record.role.as_str();
            let [up, draining, down] = STATES;
            let state = match (worker.alive(), worker.answers()) {
                (true, _) => up,
                (false, true) => draining,
                (false, false) => down,
            };
            self.workers.with_label_values(&[role, state]).inc();
            let (Some(served), Some(status)) = (worker.served(), worker.status()) else { continue };
            let model = served.card.name.as_str();
            let id = worker.record.id.as_str();
            self.preset(&served.card);
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
                    let layout = served.description.kv_layout.unwrap_or_default();
                    *layouts.entry((layout.block_size, dtype(&layout))).or_default() +=
                        status.kv_blocks_total;
                }
            }
            let before = seen.get(id).cloned().unwrap_or_else(|| worker.counted_before());
            self.add_growth(model, &before, &status);
            seen.insert(id.to_owned(), status);
        }
        for (model, (used, total)) in blocks {
            let share = used as f64 / total.max(1) as f64;
            self.kv_usage.with_label_values(&[model.as_str(), ENGINE]).set(share);
        }
        for ((block_size, dtype), blocks) in layouts {
            let (block_size, blocks) = (block_size.to_string(), blocks.to_string());
            let labels = [ENGINE, &*block_size, dtype, &*blocks, "True"];
            self.cache_config.with_label_values(&labels).set(1.0);
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
        let pooled = grown(|status| status.pooled_inputs);
        self.pooled_texts.with_label_values(&labels).inc_by(pooled);
        let batches = grown(|status| status.pooled_batches);
        self.pooled_batches.with_label_values(&labels).inc_by(batches);
        self.drafts.with_label_values(&labels).inc_by(grown(|status| status.spec_decode_drafts));
        let drafted = grown(|status| status.spec_decode_draft_tokens);
        self.draft_tokens.with_label_values(&labels).inc_by(drafted);
        let accepted = grown(|status| status.spec_decode_accepted_tokens);
        self.accepted_tokens.with_label_values(&labels).inc_by(accepted);
        self.steps.add(model, before, now);
        let constrained = grown(|status| status.constrained_tokens);
        self.constrained.with_label_values(&labels).inc_by(constrained);
        let waited = Duration::from_micros(grown(|status| status.constraint_wait_us));
        self.constraint_wait.with_label_values(&labels).inc_by(waited.as_secs_f64());
        let failures = grown(|status| status.handoff_failures);
        self.handoff_failures.with_label_values(&labels).inc_by(failures);
        let bytes = [
            (Transport::SharedMemory, grown(|status| status.handoff_bytes_shared_memory)),
            (Transport::Grpc, grown(|status| status.handoff_bytes_grpc)),
            (Transport::CudaIpc, grown(|status| status.handoff_bytes_cuda_ipc)),
            (Transport::Nccl, grown(|status| status.handoff_bytes_nccl)),
        ];
        for (kind, bytes) in bytes {
            let labels = [model, ENGINE, transport(kind)];
            self.handoff_bytes.with_label_values(&labels).inc_by(bytes);
        }
    }

    /// Series that dashboards expect to be there at zero.
    fn preset(&self, model: &ModelCard) {
        let labels = [model.name.as_str(), ENGINE];
        let [name, engine] = labels;
        let counters = [
            &self.prompt_tokens,
            &self.cached_tokens,
            &self.generation_tokens,
            &self.prefix_queries,
            &self.prefix_hits,
            &self.external_queries,
            &self.external_hits,
            &self.migrated_tokens,
        ];
        counters.iter().for_each(|counter| drop(counter.with_label_values(&labels)));
        let histograms = [
            &self.ttft,
            &self.itl,
            &self.e2e,
            &self.queue,
            &self.prefill,
            &self.decode,
            &self.inference,
            &self.per_token,
            &self.params_n,
        ];
        histograms.iter().for_each(|histogram| drop(histogram.with_label_values(&labels)));
        self.tokens(model);
        self.heard.with_label_values(&labels);
        for kv in MIGRATED_KV {
            self.migrations.with_label_values(&[name, engine, kv]);
        }
        for reason in REASONS {
            self.finished.with_label_values(&[name, engine, reason]);
        }
        for source in SOURCES {
            self.by_source.with_label_values(&[name, engine, source]);
        }
        for kind in TRANSPORTS {
            for counter in [&self.handoffs, &self.handoff_tokens] {
                counter.with_label_values(&[name, engine, transport(kind)]);
            }
        }
    }
}

/// How a sequence ended.
pub struct Ended<'a> {
    /// Why.
    pub reason: &'a str,
    /// Tokens generated.
    pub tokens: usize,
    /// Tokens that there might have been.
    pub max_tokens: u32,
    /// From the request's arrival.
    pub took: Duration,
    /// From admission to the first token.
    pub prefill: Duration,
    /// From the first token, if there was one.
    pub decode: Option<Duration>,
}

fn dtype(layout: &KvLayout) -> &'static str {
    match layout.dtype() {
        KvDtype::I16 => "int16",
        KvDtype::I8 => "int8",
        KvDtype::Bf16 => "bfloat16",
        KvDtype::Unspecified => "unknown",
    }
}

/// All ways in which KV comes.
const TRANSPORTS: [Transport; 4] =
    [Transport::SharedMemory, Transport::Grpc, Transport::CudaIpc, Transport::Nccl];

/// A transport's name, as workers' flags have it.
pub fn transport(kind: Transport) -> &'static str {
    match kind {
        Transport::SharedMemory => "shm",
        Transport::Grpc => "grpc",
        Transport::CudaIpc => "cuda-ipc",
        Transport::Nccl => "nccl",
        Transport::Unspecified => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::fake;

    #[tokio::test]
    async fn what_workers_had_counted_before_a_gateway_came_is_no_growth() {
        let metrics = Metrics::new().unwrap();
        let workers = fake::registry();
        let (old, new) = (("old", InstanceRole::Decode), ("new", InstanceRole::Decode));
        let model = fake::served("m");
        let mut seen = HashMap::new();
        let mut failures = |workers: &Workers| {
            metrics.take_in(workers, &mut seen);
            metrics.handoff_failures.with_label_values(&["m", ENGINE]).get()
        };
        let status =
            |failures: u64| WorkerStatus { handoff_failures: failures, ..WorkerStatus::default() };
        fake::list(&workers, &[old]);
        let there = fake::serves(&workers, "old", &model);
        fake::says(&there, status(700));
        // Between its first status and the first scrape one more has failed.
        fake::says(&there, status(701));
        assert_eq!(failures(&workers), 1);
        fake::says(&there, status(703));
        assert_eq!(failures(&workers), 3);
        // One that comes later has not been counted by anybody.
        fake::list(&workers, &[old, new]);
        let joined = fake::serves(&workers, "new", &model);
        fake::says(&joined, status(5));
        assert_eq!(failures(&workers), 8);
    }
}
