//! What an operator watches a cluster with: dashboard, alerts and their pages, against a real
//! Prometheus that scrapes real gateways.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use baton_tests::binaries::{MODEL_NAME, repository};
use baton_tests::monitor::{Monitor, folder};
use baton_tests::{Api, Cluster, eventually};
use serde_json::{Value, json};

/// By when Prometheus has seen what there is.
const SEEN: Duration = Duration::from_secs(30);

fn text(name: &str) -> String {
    fs::read_to_string(folder().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The names of the alerts.
fn alerts() -> BTreeSet<String> {
    let rules = text("alerts.yaml");
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let names: BTreeSet<String> = names.map(str::to_owned).collect();
    assert!(!names.is_empty(), "no alerts");
    names
}

fn dashboard() -> Value {
    serde_json::from_str(&text("grafana-dashboard.json")).expect("JSON")
}

/// The dashboard's panels and rows.
fn panels(dashboard: &Value) -> &[Value] {
    dashboard["panels"].as_array().expect("panels")
}

/// The queries of its panels, as Grafana sends them.
fn queries(dashboard: &Value) -> Vec<String> {
    let targets = panels(dashboard).iter().flat_map(|panel| panel["targets"].as_array());
    let queries = targets.flatten().map(|target| target["expr"].as_str().expect("a query"));
    queries.map(|it| it.replace("$__rate_interval", "10s").replace("$model", ".*")).collect()
}

/// The metrics that a query asks for: the names in it that are no function, keyword or label.
fn metrics(query: &str) -> BTreeSet<String> {
    const WORDS: [&str; 16] = [
        "sum",
        "max",
        "min",
        "avg",
        "count",
        "by",
        "without",
        "on",
        "ignoring",
        "group_left",
        "and",
        "or",
        "unless",
        "offset",
        "bool",
        "topk",
    ];
    // Labels, ranges and strings, which may hold each other's brackets.
    let mut bare = String::new();
    let (mut inside, mut quoted) = (0, false);
    for char in query.chars() {
        match char {
            '"' => quoted = !quoted,
            '{' | '[' if !quoted => inside += 1,
            '}' | ']' if !quoted => inside -= 1,
            _ if inside == 0 && !quoted => bare.push(char),
            _ => {}
        }
    }
    for grouping in ["by (", "without (", "on (", "ignoring (", "group_left ("] {
        while let Some(at) = bare.find(&format!(" {grouping}")) {
            let end = at + bare[at..].find(')').expect("a closing bracket");
            bare.replace_range(at..=end, " ");
        }
    }
    let part_of_name = |char: char| char.is_ascii_alphanumeric() || char == '_' || char == ':';
    let mut names = BTreeSet::new();
    let mut rest = bare.as_str();
    while let Some(start) = rest.find(part_of_name) {
        let word = &rest[start..];
        let end = word.find(|char: char| !part_of_name(char)).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        rest = after;
        let function = after.trim_start().starts_with('(');
        let number = word.starts_with(|char: char| char.is_ascii_digit());
        if !function && !number && !WORDS.contains(&word) {
            names.insert(word.to_owned());
        }
    }
    names
}

#[test]
fn metrics_are_found_in_queries() {
    let query = "1 - sum by (model_name, le) (rate(vllm:a_bucket{le=\"2.5\", x!=\"y(z\"}[1h])) \
                 / sum(b) > 0.3\nand\nmax(c_total) unless on (q) histogram_quantile(0.5, d)";
    let expected = ["vllm:a_bucket", "b", "c_total", "d"].map(str::to_owned);
    assert_eq!(metrics(query), BTreeSet::from(expected));
}

#[test]
fn alerts_are_raised_by_what_should_raise_them() {
    let tests = text("alerts-test.yaml");
    for name in alerts() {
        let raised = tests.contains(&format!("- alertname: {name}\n"));
        assert!(raised, "alerts-test.yaml never expects {name}");
    }
    for args in [
        ["check", "rules", "alerts.yaml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "alerts-test.yaml"],
    ] {
        let output = Command::new("promtool").args(args).current_dir(folder()).output();
        let output = output.expect("run promtool (Debian: prometheus)");
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&said));
    }
}

#[test]
fn each_alert_has_its_page_and_each_page_its_alert() {
    let (rules, alerts) = (text("alerts.yaml"), alerts());
    let pages = fs::read_dir(repository().join("docs/runbooks")).expect("the pages");
    let pages: BTreeSet<String> = pages
        .map(|page| page.expect("a page").file_name().into_string().expect("UTF-8"))
        .map(|name| name.strip_suffix(".md").expect("a page").to_owned())
        .collect();
    assert_eq!(pages, alerts);
    for name in &alerts {
        let link = format!("docs/runbooks/{name}.md");
        assert!(rules.contains(&format!("runbook_url: {link}\n")), "{name} has no runbook_url");
        let page = fs::read_to_string(repository().join(&link)).expect("the page");
        assert!(page.starts_with(&format!("# {name}\n")), "{link} has another title");
        let headings: Vec<&str> = page.lines().filter(|line| line.starts_with("## ")).collect();
        assert_eq!(headings, ["## Meaning", "## Impact", "## Look", "## Mend"], "{link}");
        let lines = page.lines().count();
        assert!((15..=30).contains(&lines), "{link} has {lines} lines");
    }
}

#[test]
fn the_dashboard_is_well_formed() {
    let (dashboard, rules) = (dashboard(), text("alerts.yaml"));
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels(&dashboard) {
        let title = panel["title"].as_str().expect("a title");
        assert!(ids.insert(panel["id"].as_u64()), "{title}: its id is another's");
        let of = |side: &str| panel["gridPos"][side].as_u64().expect("a place");
        assert!(of("x") + of("w") <= 24, "{title} is too wide");
        for x in of("x")..of("x") + of("w") {
            for y in of("y")..of("y") + of("h") {
                assert!(taken.insert((x, y)), "{title} lies on another panel");
            }
        }
        if panel["type"] == "row" {
            continue;
        }
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{title} shows nothing");
        let references: BTreeSet<_> = targets.iter().map(|it| it["refId"].as_str()).collect();
        assert_eq!(references.len(), targets.len(), "{title}");
        for part in targets.iter().chain([panel]) {
            assert_eq!(part["datasource"]["uid"], "${datasource}", "{title}");
        }
        // Its line is where an alert has its own.
        let steps = &panel["fieldConfig"]["defaults"]["thresholds"]["steps"];
        for line in steps.as_array().into_iter().flatten().filter_map(|it| it["value"].as_f64()) {
            let (above, within) = (format!("> {line}\n"), format!("le=\"{line}\""));
            assert!(rules.contains(&above) || rules.contains(&within), "{title}: no alert");
        }
    }
}

/// Requests that are handed over, cached, streamed and refused.
async fn traffic(api: &Api) {
    let prompt: Vec<u32> = (0..100).map(|n| 2000 + n).collect();
    for stream in [false, true, false] {
        let body = json!({
            "model": MODEL_NAME, "prompt": prompt, "max_tokens": 8, "ignore_eos": true,
            "stream": stream, "cache_salt": format!("{stream} {}", api.base()),
        });
        match stream {
            true => drop(api.stream("/v1/completions", &body).await.collect().await),
            false => drop(api.ok("/v1/completions", &body).await),
        }
    }
    api.post("/v1/completions", &json!({"max_tokens": "many"})).await.error(400).expect("an error");
}

#[tokio::test]
async fn prometheus_finds_every_series_that_dashboard_and_alerts_ask_for() {
    let builder = Cluster::builder().prefill(1).decode(1).coordinator().handoff_min_tokens(16);
    let mut cluster = builder.start().await;
    let (mut gateway, second) = cluster.add_gateway().await;
    let gateways = [cluster.api.base(), second.base()];
    let monitor = Monitor::start(gateways, cluster.dir()).await;
    eventually("both gateways are scraped", SEEN, async || {
        let up = monitor.query("up{job=\"baton\"} == 1").await?;
        if up.len() == 2 { Ok(()) } else { Err(format!("{up:?}")) }
    })
    .await;
    // A rate is of what came after the first scrape.
    for api in [&cluster.api, &second] {
        traffic(api).await;
    }
    let counted = "sum(increase(vllm:request_success_total{finished_reason=\"length\"}[1m]))";
    eventually("the requests are counted", SEEN, async || {
        let series = monitor.query(counted).await?;
        let count = series.first().map(|it| it["value"][1].as_str().unwrap_or("").to_owned());
        let count: f64 = count.unwrap_or_default().parse().unwrap_or(0.0);
        if count >= 5.5 { Ok(()) } else { Err(format!("{count}")) }
    })
    .await;

    let rules = monitor.get("rules").await;
    let rules = rules["groups"][0]["rules"].as_array().expect("rules");
    let found: BTreeSet<&str> = rules.iter().filter_map(|rule| rule["name"].as_str()).collect();
    let expected = alerts();
    let expected: BTreeSet<&str> = expected.iter().map(String::as_str).collect();
    assert_eq!(found, expected);
    let dashboard = dashboard();
    let mut queries = queries(&dashboard);
    // Nothing failed, and nobody drains.
    let quiet = |query: &str| query.contains("status=~\"5..\"") || query.contains("state!=\"up\"");
    for query in queries.iter().filter(|query| !quiet(query)) {
        // A series that began with the requests has a rate from its second scrape on.
        eventually(&format!("something is found for {query}"), SEEN, async || {
            let series = monitor.query(query).await?;
            if series.is_empty() { Err("nothing".to_owned()) } else { Ok(()) }
        })
        .await;
    }
    for variable in dashboard["templating"]["list"].as_array().expect("variables") {
        if let Some(definition) = variable["definition"].as_str() {
            let inner = definition.strip_prefix("label_values(").expect("a list of labels");
            queries.push(inner.split_once(',').expect("a metric and a label").0.to_owned());
        }
    }
    for rule in rules {
        assert_eq!((&rule["health"], &rule["state"]), (&json!("ok"), &json!("inactive")), "{rule}");
        queries.push(rule["query"].as_str().expect("a query").to_owned());
    }
    let asked: BTreeSet<String> = queries.iter().flat_map(|query| metrics(query)).collect();
    println!("{} metrics: {asked:?}", asked.len());
    assert!(asked.len() > 20, "too few: {asked:?}");
    for name in asked {
        let series = monitor.query(&format!("count({name}{{job=\"baton\"}})")).await;
        assert_eq!(series.expect("a query").len(), 1, "no gateway exposes {name}");
    }

    // What goes wrong is noticed.
    let pending = async |name: &str| {
        eventually(&format!("{name} is noticed"), SEEN, async || {
            let state = monitor.alert(name).await;
            if state == "inactive" { Err(state) } else { Ok(()) }
        })
        .await
    };
    cluster.etcd.kill();
    pending("BatonEtcdUnreachable").await;
    cluster.etcd.restart().await;
    eventually("etcd is back", SEEN, async || {
        let state = monitor.alert("BatonEtcdUnreachable").await;
        if state == "inactive" { Ok(()) } else { Err(state) }
    })
    .await;
    gateway.stop().await;
    pending("BatonGatewayDown").await;
    drop(monitor);
    cluster.finish().await;
}
