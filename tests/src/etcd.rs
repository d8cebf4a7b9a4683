//! A real etcd whose members can be killed and started again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use baton_proto::InstanceRecord;
use baton_proto::adapter::adapters_prefix;
use baton_proto::instance::{election_name, instances_prefix};
use serde_json::Value;

use crate::poll::eventually;
use crate::ports;
use crate::process::{Process, Spec};

/// An etcd of one member or several, with its data in the test's folder.
#[derive(Debug)]
pub struct Etcd {
    dir: PathBuf,
    members: Vec<Member>,
    urls: String,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: String,
    peer: String,
    process: Option<Process>,
}

impl Etcd {
    /// Starts an etcd of one member and waits until it answers.
    pub async fn start(dir: &Path) -> Self {
        Self::of(1, "127.0.0.1", dir).await
    }

    /// Starts an etcd of so many members on this host and waits until they answer.
    pub async fn of(members: usize, host: &str, dir: &Path) -> Self {
        let address = |port| format!("http://{host}:{port}");
        let member = |n| Member {
            name: format!("etcd-{n}"),
            client: address(ports::free()),
            peer: address(ports::free()),
            process: None,
        };
        let members: Vec<Member> = (0..members).map(member).collect();
        let urls: Vec<&str> = members.iter().map(|member| &*member.client).collect();
        let urls = urls.join(",");
        let mut etcd = Self { dir: dir.to_path_buf(), members, urls };
        etcd.restart().await;
        etcd
    }

    /// The addresses that clients use, with commas between.
    pub fn url(&self) -> &str {
        &self.urls
    }

    /// The members' processes; none for one that was killed.
    pub fn processes(&self) -> impl Iterator<Item = Option<&Process>> {
        self.members.iter().map(|member| member.process.as_ref())
    }

    /// Which member leads, by position; none while there is no leader.
    pub fn leader(&self) -> Option<usize> {
        let (_, table) = self.ctl(&["endpoint", "status", "--write-out=json"]);
        let statuses: Vec<Value> = serde_json::from_str(&table).ok()?;
        let leads = statuses.iter().find(|it| {
            let status = &it["Status"];
            status["leader"] == status["header"]["member_id"]
        })?;
        self.members.iter().position(|member| leads["Endpoint"] == *member.client)
    }

    /// Kills etcd, as a crash would.
    pub fn kill(&mut self) {
        for n in 0..self.members.len() {
            self.kill_member(n);
        }
    }

    /// Kills one member.
    pub fn kill_member(&mut self, n: usize) {
        self.members[n].process.take().expect("etcd runs").kill();
    }

    /// Starts the members that do not run, on the data that they had.
    pub async fn restart(&mut self) {
        let all: Vec<String> =
            self.members.iter().map(|it| format!("{}={}", it.name, it.peer)).collect();
        let all = all.join(",");
        for member in self.members.iter_mut().filter(|member| member.process.is_none()) {
            let data = self.dir.join(&member.name);
            let data = data.to_str().expect("a path in UTF-8");
            let args = [
                ["--name", &member.name],
                ["--data-dir", data],
                ["--listen-client-urls", &member.client],
                ["--advertise-client-urls", &member.client],
                ["--listen-peer-urls", &member.peer],
                ["--initial-advertise-peer-urls", &member.peer],
                ["--initial-cluster", &all],
            ];
            let spec = Spec::new(&member.name, "etcd".into(), args.concat());
            member.process = Some(Process::start(&spec, &self.dir));
        }
        for member in &mut self.members {
            let process = member.process.as_mut().expect("it was started");
            let health = format!("{}/health", member.client);
            eventually("etcd is healthy", Duration::from_secs(30), async || {
                if let Some(status) = process.exited() {
                    panic!("etcd ended with {status}:\n{}", process.stderr());
                }
                let reply = reqwest::get(&health).await.map_err(|e| format!("{e:?}"))?;
                let body = reply.text().await.map_err(|e| format!("{e:?}"))?;
                if body.contains("true") { Ok(()) } else { Err(body) }
            })
            .await;
        }
    }

    /// The instance records of the cluster `default`, by key, read by etcd's own client.
    pub fn instances(&self) -> Vec<InstanceRecord> {
        let prefix = instances_prefix("default");
        let (good, records) = self.ctl(&["get", "--prefix", "--print-value-only", &prefix]);
        assert!(good, "etcdctl get failed");
        let records = serde_json::Deserializer::from_str(&records).into_iter();
        records.map(|record| record.expect("an instance record")).collect()
    }

    /// Ends every lease, as if all of them had run out.
    pub fn revoke_leases(&self) {
        let (good, list) = self.ctl(&["lease", "list"]);
        assert!(good, "etcdctl lease list failed");
        for lease in list.lines().filter(|line| !line.starts_with("found")) {
            // Its owner may have given it back meanwhile.
            self.ctl(&["lease", "revoke", lease]);
        }
    }

    /// The names of the LoRA adapters that are recorded.
    pub fn adapters(&self) -> Vec<String> {
        let prefix = adapters_prefix("default");
        let (_, keys) = self.ctl(&["get", "--prefix", "--keys-only", &prefix]);
        keys.lines().filter_map(|key| key.strip_prefix(&prefix)).map(str::to_owned).collect()
    }

    /// The ids of the coordinators that stand for election, the leader first.
    pub fn candidates(&self) -> Vec<String> {
        let name = election_name("default") + "/";
        let oldest_first = ["--sort-by=CREATE", "--order=ASCEND"];
        let args = [["get", "--prefix"], ["--print-value-only", &name], oldest_first].concat();
        let (good, ids) = self.ctl(&args);
        assert!(good, "etcdctl get failed");
        ids.lines().filter(|id| !id.is_empty()).map(str::to_owned).collect()
    }

    /// Runs etcdctl: whether that went well, and what it printed.
    fn ctl(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.urls, "--command-timeout=5s"])
            .args(args)
            .output()
            .expect("run etcdctl");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
