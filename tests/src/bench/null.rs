//! A cluster whose only worker computes nothing: what is left is the gateway.

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
        let mut cluster = builder.unified(1).start().await;
        let args = ["--etcd", cluster.etcd.url(), "--like", &cluster.workers[0].address];
        let spec = Spec::new("null-worker", program("baton-null-worker"), args);
        let mut worker = Process::start(&spec, cluster.dir());
        let address = worker.ready().await;
        cluster.kill_worker(0);
        eventually("the null worker alone is left", Duration::from_secs(20), async || {
            let scrape = Scrape::parse(&cluster.api.get("/metrics").await.text)?;
            let up = scrape.sum("baton_workers", &[("state", "up")]);
            let all = scrape.sum("baton_workers", &[]);
            if (up, all) == (Some(1.0), Some(1.0)) {
                Ok(())
            } else {
                Err(format!("{up:?} of {all:?} up"))
            }
        })
        .await;
        Self { cluster, worker, address }
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
