//! A cluster whose workers compute nothing: what is left is the gateway.

use std::time::Duration;

use super::direct::request;
use crate::binaries::program;
use crate::cluster::{Builder, Cluster};
use crate::grpc;
use crate::poll::eventually;
use crate::process::{Process, Spec};
use crate::prometheus::Scrape;

/// The token that `baton-null-worker` answers with.
pub const TOKEN: u32 = 1000;

/// A cluster of a gateway and a null worker.
#[derive(Debug)]
pub struct NullCluster {
    /// The cluster; it lists no worker.
    pub cluster: Cluster,
    /// The worker's process.
    pub worker: Process,
    /// The worker's address.
    pub address: String,
}

impl NullCluster {
    /// Starts `builder`'s etcd and gateway, and a null worker that is like a real one.
    pub async fn start(builder: Builder) -> Self {
        Self::start_with(builder, &[]).await
    }

    /// The same with flags for the null worker.
    pub async fn start_with(builder: Builder, flags: &[&str]) -> Self {
        let mut cluster = builder.unified(1).start().await;
        let (worker, address) = start(&cluster, &cluster.workers[0].address, flags).await;
        cluster.kill_worker(0);
        let null = Self { cluster, worker, address };
        null.found(1).await;
        null
    }

    /// Starts another null worker, with these flags; it is like the first one.
    pub async fn add(&self, flags: &[&str]) -> (Process, String) {
        start(&self.cluster, &self.address, flags).await
    }

    /// Waits until so many workers are up, and no others are known.
    pub async fn found(&self, workers: usize) {
        let what = format!("{workers} null workers alone are left");
        eventually(&what, Duration::from_secs(20), async || {
            let scrape = Scrape::parse(&self.cluster.api.get("/metrics").await.text)?;
            let up = scrape.sum("baton_workers", &[("state", "up")]);
            let all = scrape.sum("baton_workers", &[]);
            let expected = Some(workers as f64);
            if (up, all) == (expected, expected) {
                Ok(())
            } else {
                Err(format!("{up:?} of {all:?} up"))
            }
        })
        .await;
    }

    /// Asks the worker itself for one token; returns when its answer has ended.
    pub async fn ask(client: &mut grpc::WorkerClient, prompt_tokens: usize) {
        let reply = client.generate(request(vec![TOKEN; prompt_tokens], 1)).await;
        let mut events = reply.expect("accepted").into_inner();
        while events.message().await.expect("an event").is_some() {}
    }

    /// Stops everything, which must leave nothing behind.
    pub async fn finish(mut self) {
        self.worker.stop().await;
        self.cluster.finish().await;
    }
}

async fn start(cluster: &Cluster, like: &str, flags: &[&str]) -> (Process, String) {
    let args = ["--etcd", cluster.etcd.url(), "--like", like];
    let args = args.iter().chain(flags).copied();
    let spec = Spec::new("null-worker", program("baton-null-worker"), args);
    let mut worker = Process::start(&spec, cluster.dir());
    let address = worker.ready().await;
    (worker, address)
}
