//! A real Prometheus, with the configuration that operators are given.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;

use crate::binaries::repository;
use crate::deployed::Deployed;
use crate::http::Api;
use crate::poll::eventually;
use crate::ports;
use crate::process::{Process, Spec};

/// The folder of what an operator watches a cluster with.
pub fn folder() -> PathBuf {
    repository().join("deploy/observability")
}

/// A running Prometheus.
#[derive(Debug)]
pub struct Monitor {
    _process: Process,
    api: Api,
}

impl Monitor {
    /// Starts it for these gateways. Of `deploy/observability/prometheus.yml` their addresses are
    /// exchanged, and intervals are seconds: a test has no time for quarters of minutes.
    pub async fn start(gateways: [&str; 2], dir: &Path) -> Self {
        let mut config = Deployed::read("observability/prometheus.yml");
        config.gateways(gateways);
        config.exchange("interval: 15s", "interval: 1s");
        let file = dir.join("prometheus.yml");
        fs::write(&file, config.text).expect("write the configuration");
        fs::copy(folder().join("alerts.yaml"), dir.join("alerts.yaml")).expect("copy the rules");
        let listen = format!("127.0.0.1:{}", ports::free());
        let path = |name: &str| dir.join(name).to_str().expect("a path in UTF-8").to_owned();
        let args = [
            format!("--config.file={}", path("prometheus.yml")),
            format!("--storage.tsdb.path={}", path("prometheus-data")),
            format!("--web.listen-address={listen}"),
        ];
        let process = Process::start(&Spec::new("prometheus", "prometheus".into(), args), dir);
        let api = Api::new(&format!("http://{listen}"), None);
        eventually("Prometheus is ready", Duration::from_secs(30), async || {
            match api.send(Method::GET, "/-/ready", None, "").await {
                Ok(reply) if reply.status == 200 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        Self { _process: process, api }
    }

    /// What its API has under a path.
    pub async fn get(&self, path: &str) -> Value {
        self.api.get(&format!("/api/v1/{path}")).await.ok()["data"].take()
    }

    /// The series that a query has now, or what is wrong with it.
    pub async fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let mut body = "query=".to_owned();
        for byte in expression.bytes() {
            write!(body, "%{byte:02X}").expect("write into a string");
        }
        let form = Some("application/x-www-form-urlencoded");
        let reply = self.api.send(Method::POST, "/api/v1/query", form, body).await;
        let mut reply = reply.map_err(|error| format!("{error:?}"))?.json();
        match reply["data"]["result"].take() {
            Value::Array(series) => Ok(series),
            _ => Err(format!("{expression}: {reply}")),
        }
    }

    /// The state of an alert: inactive, pending or firing; of several series the worst.
    pub async fn alert(&self, name: &str) -> String {
        let rules = self.get("rules").await;
        let groups = rules["groups"].as_array().into_iter().flatten();
        let mut rules = groups.flat_map(|group| group["rules"].as_array().into_iter().flatten());
        let rule = rules.find(|rule| rule["name"] == name);
        let rule = rule.unwrap_or_else(|| panic!("there is no alert {name}"));
        rule["state"].as_str().expect("a state").to_owned()
    }
}
