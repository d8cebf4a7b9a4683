//! What Prometheus reads: all that vLLM's dashboard asks for, all that is documented, and nothing
//! else.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use baton_tests::binaries::{MODEL_NAME, repository};
use baton_tests::prometheus::Scrape;
use baton_tests::{Cluster, Role, eventually};
use serde_json::{Value, json};

/// The series that vLLM's dashboard queries: each name in the PromQL of its panels in
/// `examples/observability/prometheus_grafana/grafana.json` of vllm-project/vllm, at commit
/// 4b5c627c23e6690b8987100d1cbf78e34ac14bf9.
const DASHBOARD: [&str; 21] = [
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
];

async fn cluster() -> Cluster {
    Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16).start().await
}

async fn scrape(cluster: &Cluster) -> (Scrape, String) {
    let text = cluster.api.get("/metrics").await.text;
    let scrape = Scrape::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    (scrape, text)
}

/// One request that is handed over, with two choices, and one stream.
async fn traffic(cluster: &Cluster) {
    let prompt: Vec<u32> = (0..100).map(|i| 2000 + i).collect();
    let body = json!({
        "model": MODEL_NAME, "prompt": prompt, "max_tokens": 10, "ignore_eos": true,
        "temperature": 1.0, "n": 2,
    });
    cluster.api.ok("/v1/completions", &body).await;
    let body = json!({"model": MODEL_NAME, "prompt": "One", "max_tokens": 3, "stream": true});
    cluster.api.stream("/v1/completions", &body).await.collect().await;
}

#[tokio::test]
async fn vllm_s_dashboard_finds_every_series_it_asks_for() {
    let cluster = cluster().await;
    let model = [("model_name", MODEL_NAME)];
    // At zero from the start: a rate needs a first value.
    let (at_first, text) = scrape(&cluster).await;
    for name in DASHBOARD {
        let found = at_first.sum(name, &model);
        assert_eq!(found, Some(0.0), "{name} before any request\n{text}");
    }
    for reason in ["stop", "length", "abort", "error", "repetition"] {
        let labels = [model[0], ("finished_reason", reason)];
        assert_eq!(at_first.sum("vllm:request_success_total", &labels), Some(0.0), "{reason}");
    }
    traffic(&cluster).await;
    let counted = [
        ("vllm:request_params_n_count", 2.0),
        ("vllm:request_params_n_sum", 3.0),
        ("vllm:request_params_max_tokens_count", 3.0),
        ("vllm:request_params_max_tokens_sum", 23.0),
        ("vllm:request_max_num_generation_tokens_count", 2.0),
        ("vllm:request_max_num_generation_tokens_sum", 13.0),
        ("vllm:request_generation_tokens_sum", 23.0),
        ("vllm:generation_tokens_total", 23.0),
        ("vllm:request_inference_time_seconds_count", 3.0),
        ("vllm:request_time_per_output_token_seconds_count", 3.0),
    ];
    eventually("all is counted", Duration::from_secs(5), async || {
        let (now, _) = scrape(&cluster).await;
        for (name, expected) in counted {
            let found = now.sum(name, &model);
            if found != Some(expected) {
                return Err(format!("{name}: {found:?}, not {expected}"));
            }
        }
        Ok(())
    })
    .await;
    let (now, text) = scrape(&cluster).await;
    for name in DASHBOARD.iter().filter(|name| !name.contains("num_requests")) {
        let quiet = ["vllm:kv_cache_usage_perc", "vllm:request_queue_time_seconds_sum"];
        let found = now.sum(name, &model);
        assert!(quiet.contains(name) || found > Some(0.0), "{name} is {found:?}\n{text}");
    }
    // Every prompt's tokens and all drawn ones but a prompt's first came from some step. Workers
    // tell it with their next status.
    eventually("the steps are counted", Duration::from_secs(5), async || {
        let (now, text) = scrape(&cluster).await;
        let steps = |end: &str| {
            let name = format!("vllm:iteration_tokens_total_{end}");
            now.sum(&name, &model).unwrap_or_else(|| panic!("{name} is absent\n{text}"))
        };
        let (sum, count) = (steps("sum"), steps("count"));
        match sum >= 100.0 + 23.0 - 3.0 && (1.0..=sum).contains(&count) {
            true => Ok(()),
            false => Err(format!("{count} steps of {sum} tokens")),
        }
    })
    .await;
    // Where prompts' tokens came from adds up to all of them.
    let sources = ["local_compute", "local_cache_hit", "external_kv_transfer"].map(|source| {
        now.sum("vllm:prompt_tokens_by_source_total", &[("source", source)]).expect("a source")
    });
    assert_eq!(Some(sources.iter().sum()), now.sum("vllm:prompt_tokens_total", &model));
    assert!(sources[2] > 0.0, "nothing was handed over\n{text}");
    // Token counts have buckets up to the context's length, and none beyond it.
    let models = cluster.api.get("/v1/models").await.ok();
    let longest = models["data"][0]["max_model_len"].as_f64().expect("a length");
    let family = now.family("vllm:request_prompt_tokens").expect("a family");
    let bounds: Vec<f64> = family
        .samples
        .iter()
        .filter_map(|(_, labels, _)| labels.get("le")?.parse().ok())
        .filter(|bound: &f64| bound.is_finite())
        .collect();
    let last = bounds.iter().copied().fold(0.0, f64::max);
    assert!(last <= longest && last * 2.5 > longest, "{bounds:?} for {longest}");
    let info = now.family("vllm:cache_config_info").expect("a family");
    assert_eq!(info.samples[0].1["cache_dtype"], "int16", "{info:?}");
    assert!(info.samples[0].1["num_gpu_blocks"].parse::<u64>().is_ok_and(|n| n > 0), "{info:?}");
    cluster.finish().await;
}

/// Waits for this many steps, tokens of all, and steps of one token.
async fn steps(cluster: &Cluster, expected: [f64; 3]) {
    eventually("the steps are counted", Duration::from_secs(10), async || {
        let (now, text) = scrape(cluster).await;
        let of = |end: &str, le: &[(&str, &str)]| {
            now.sum(&format!("vllm:iteration_tokens_total_{end}"), le).unwrap_or(-1.0)
        };
        let found = [of("count", &[]), of("sum", &[]), of("bucket", &[("le", "1")])];
        if found == expected { Ok(()) } else { Err(format!("{found:?}\n{text}")) }
    })
    .await;
}

/// The count of a worker that left stays in the sum, and one that comes adds to it.
#[tokio::test]
async fn steps_are_added_up_over_workers_that_come_and_go() {
    let mut cluster = Cluster::builder().unified(1).start().await;
    let body = json!({
        "model": MODEL_NAME, "prompt": (0..40).map(|i| 2000 + i).collect::<Vec<u32>>(),
        "max_tokens": 5, "ignore_eos": true,
    });
    // The prompt's step draws the first token, four more steps the others.
    cluster.api.ok("/v1/completions", &body).await;
    steps(&cluster, [5.0, 44.0, 4.0]).await;
    cluster.kill_worker(0);
    cluster.add_worker(Role::Unified).await;
    eventually("the new worker is known", Duration::from_secs(20), async || {
        let (now, _) = scrape(&cluster).await;
        let up = now.sum("baton_workers", &[("state", "up")]);
        if up == Some(1.0) { Ok(()) } else { Err(format!("{up:?}")) }
    })
    .await;
    cluster.api.ok("/v1/completions", &body).await;
    steps(&cluster, [10.0, 88.0, 8.0]).await;
    cluster.finish().await;
}

#[tokio::test]
async fn draws_under_a_constraint_are_counted() {
    let cluster = cluster().await;
    let body = json!({
        "model": MODEL_NAME, "prompt": "Yes or no?", "max_tokens": 8,
        "structured_outputs": {"choice": ["absolutely", "certainly not"]},
    });
    cluster.api.ok("/v1/completions", &body).await;
    eventually("draws are counted", Duration::from_secs(5), async || {
        let (now, _) = scrape(&cluster).await;
        match now.sum("baton_constrained_tokens_total", &[("model_name", MODEL_NAME)]) {
            Some(tokens) if (1.0..=9.0).contains(&tokens) => Ok(()),
            other => Err(format!("{other:?} tokens")),
        }
    })
    .await;
    let (now, text) = scrape(&cluster).await;
    assert!(now.sum("baton_constraint_wait_seconds_total", &[]).is_some(), "{text}");
    cluster.finish().await;
}

/// The names and types of the tables of `docs/metrics.md`.
fn documented() -> BTreeMap<String, String> {
    let page = repository().join("docs/metrics.md");
    let page = std::fs::read_to_string(page).expect("docs/metrics.md");
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let name = cells.next()?.trim().trim_end_matches('`').to_owned();
        Some((name, cells.next()?.trim().to_owned()))
    });
    rows.collect()
}

#[tokio::test]
async fn the_documentation_lists_exactly_what_is_exposed() {
    let cluster = cluster().await;
    traffic(&cluster).await;
    let (scrape, _) = scrape(&cluster).await;
    let exposed: BTreeMap<String, String> = scrape
        .names()
        .map(|name| (name.to_owned(), scrape.family(name).expect("a family").kind.clone()))
        .collect();
    let documented = documented();
    let only = |a: &BTreeMap<String, String>, b: &BTreeMap<String, String>| -> Vec<String> {
        a.iter().filter(|(k, v)| b.get(*k) != Some(v)).map(|(k, v)| format!("{k} {v}")).collect()
    };
    let (missing, stale) = (only(&exposed, &documented), only(&documented, &exposed));
    assert!(missing.is_empty(), "not in docs/metrics.md:\n{}", missing.join("\n"));
    assert!(stale.is_empty(), "only in docs/metrics.md:\n{}", stale.join("\n"));
    cluster.finish().await;
}

#[tokio::test]
async fn prometheus_own_tool_finds_no_fault_but_vllm_s_names() {
    let cluster = cluster().await;
    traffic(&cluster).await;
    let (_, text) = scrape(&cluster).await;
    let mut tool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs (Debian: prometheus)");
    let mut stdin = tool.stdin.take().expect("a pipe");
    stdin.write_all(text.as_bytes()).expect("write");
    drop(stdin);
    let output = tool.wait_with_output().expect("promtool ends");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // The colon is vLLM's, and so is the name of a counter for a histogram.
    let vllm_s = |line: &str| {
        line.starts_with("vllm:") && line.contains("should not contain ':'")
            || line.starts_with("vllm:iteration_tokens_total") && line.contains("\"_total\" suffix")
    };
    let faults: Vec<&str> =
        said.lines().filter(|line| !vllm_s(line)).filter(|line| !line.trim().is_empty()).collect();
    assert!(faults.is_empty(), "{}\n{text}", faults.join("\n"));
    assert!(said.contains("vllm:"), "promtool has read nothing: {said}");
    cluster.finish().await;
}

#[tokio::test]
async fn http_exchanges_are_measured_to_their_last_byte() {
    let cluster = Cluster::unified().await;
    let body = json!({
        "model": MODEL_NAME, "prompt": "One two", "max_tokens": 64, "ignore_eos": true,
        "stream": true,
    });
    let events = cluster.api.stream("/v1/completions", &body).await.collect().await;
    let received: usize = events.iter().map(|event: &Value| event.to_string().len()).sum();
    cluster.api.get("/no/such/route").await.error(404).expect("a 404");
    let handler = [("handler", "/v1/completions")];
    eventually("the exchange is measured", Duration::from_secs(5), async || {
        let (now, _) = scrape(&cluster).await;
        let count = now.sum("http_request_duration_seconds_count", &handler);
        if count == Some(1.0) { Ok(()) } else { Err(format!("{count:?}")) }
    })
    .await;
    let (now, text) = scrape(&cluster).await;
    let of = |name: &str| now.sum(name, &handler).unwrap_or_else(|| panic!("{name}\n{text}"));
    assert_eq!(of("http_request_size_bytes_sum"), body.to_string().len() as f64);
    assert!(of("http_response_size_bytes_sum") >= received as f64, "{text}");
    // Longer than from the arrival to the last token: the stream is a part of it.
    let model = [("model_name", MODEL_NAME)];
    let tokens = now.sum("vllm:e2e_request_latency_seconds_sum", &model).expect("a sum");
    assert!(of("http_request_duration_seconds_sum") >= tokens * 0.9, "{text}");
    let ended = [handler[0], ("method", "POST"), ("status", "200")];
    assert_eq!(now.sum("http_requests_total", &ended), Some(1.0));
    assert_eq!(now.sum("http_requests_total", &[("handler", "none")]), Some(1.0));
    // Probes would hide the requests.
    assert_eq!(now.sum("http_requests_total", &[("handler", "/metrics")]), None);
    cluster.finish().await;
}
