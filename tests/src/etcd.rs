//! A real etcd that can be stopped and started again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use baton_proto::InstanceRecord;
use baton_proto::instance::instances_prefix;

use crate::poll::eventually;
use crate::ports;
use crate::process::{Process, Spec};

/// A one-member etcd with its data in the test's folder.
#[derive(Debug)]
pub struct Etcd {
    dir: PathBuf,
    client: String,
    peer: String,
    process: Option<Process>,
}

impl Etcd {
    /// Starts an etcd and waits until it answers.
    pub async fn start(dir: &Path) -> Self {
        let address = |port| format!("http://127.0.0.1:{port}");
        let (client, peer) = (address(ports::free()), address(ports::free()));
        let mut etcd = Self { dir: dir.to_path_buf(), client, peer, process: None };
        etcd.restart().await;
        etcd
    }

    /// The address that clients use.
    pub fn url(&self) -> &str {
        &self.client
    }

    /// Kills etcd, as a crash would.
    pub fn kill(&mut self) {
        self.process.take().expect("etcd runs").kill();
    }

    /// Starts etcd, on the data that it had.
    pub async fn restart(&mut self) {
        let data = self.dir.join("etcd");
        let data = data.to_str().expect("a path in UTF-8");
        let cluster = format!("test={}", self.peer);
        let args = [
            ["--name", "test"],
            ["--data-dir", data],
            ["--listen-client-urls", &self.client],
            ["--advertise-client-urls", &self.client],
            ["--listen-peer-urls", &self.peer],
            ["--initial-advertise-peer-urls", &self.peer],
            ["--initial-cluster", &cluster],
        ];
        let spec = Spec::new("etcd", "etcd".into(), args.concat());
        let mut process = Process::start(&spec, &self.dir);
        let health = format!("{}/health", self.client);
        eventually("etcd is healthy", Duration::from_secs(30), async || {
            if let Some(status) = process.exited() {
                panic!("etcd ended with {status}:\n{}", process.stderr());
            }
            let reply = reqwest::get(&health).await.map_err(|e| format!("{e:?}"))?;
            let body = reply.text().await.map_err(|e| format!("{e:?}"))?;
            if body.contains("true") { Ok(()) } else { Err(body) }
        })
        .await;
        self.process = Some(process);
    }

    /// The instance records of the cluster `default`, by key, read by etcd's own client.
    pub fn instances(&self) -> Vec<InstanceRecord> {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.client, "get", "--prefix", "--print-value-only"])
            .arg(instances_prefix("default"))
            .output()
            .expect("run etcdctl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let records = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
        records.map(|record| record.expect("an instance record")).collect()
    }
}
