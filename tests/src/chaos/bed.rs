//! The cluster that faults are injected into.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::disk::SmallDisk;
use super::link::Link;
use crate::balancer::{Balancer, Kind};
use crate::binaries::{MODEL_NAME, model, program};
use crate::etcd::Etcd;
use crate::http::Api;
use crate::poll::eventually;
use crate::process::{Process, Spec};
use crate::prometheus::Scrape;
use crate::{grpc, leftovers, ports};

/// How long leases live.
const LEASE_TTL: &str = "3";
/// How long a cluster may take to be whole after a fault's end.
const WHOLE_WITHIN: Duration = Duration::from_secs(90);
/// The pools.
pub const POOLS: [&str; 2] = ["prefill", "decode"];
/// What makes a process see the time that a file gives.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// What a fault needs beside the cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// Logs and responses on a small disk.
    pub disk: bool,
    /// A clock that can be set.
    pub clock: bool,
    /// One worker of each pool behind a network of its own.
    pub link: bool,
}

/// A daemon that this bed starts, and starts again.
#[derive(Debug)]
pub struct Daemon {
    spec: Spec,
    dir: PathBuf,
    /// Its process.
    pub process: Process,
    /// Where it serves.
    pub address: String,
}

impl Daemon {
    async fn start(spec: Spec, dir: &Path) -> Self {
        let mut process = Process::start(&spec, dir);
        let address = process.ready().await;
        Self { spec, dir: dir.to_owned(), process, address }
    }

    /// Starts it again after its death.
    pub async fn restart(&mut self) {
        self.process = Process::start(&self.spec, &self.dir);
        self.address = self.process.ready().await;
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Bed {
    /// Three members.
    pub etcd: Etcd,
    /// Two coordinators, which own the workers.
    pub coordinators: Vec<Daemon>,
    /// Two gateways behind HAProxy.
    pub gateways: Vec<Daemon>,
    /// The gateways that were hit, when, and until when.
    pub hit: Vec<(String, Instant, Instant)>,
    /// The network to the far workers.
    pub link: Option<Link>,
    /// The disk of logs and responses.
    pub disk: Option<SmallDisk>,
    sizes: BTreeMap<&'static str, usize>,
    far: Vec<Daemon>,
    proxy: Balancer,
    clock: Option<PathBuf>,
    owner: File,
    // Last, so that the processes end before their folder goes.
    dir: TempDir,
}

impl Bed {
    /// Starts a cluster of two prefill and two decode workers and waits until it is whole.
    pub async fn start(needs: Needs) -> Self {
        let dir = tempfile::Builder::new().prefix("baton-chaos-").tempdir().expect("a folder");
        let path = |name: &str| dir.path().join(name);
        let link = needs.link.then(Link::start);
        let host = link.as_ref().map_or_else(|| "127.0.0.1".to_owned(), Link::near);
        let disk = needs.disk.then(|| SmallDisk::mount(&path("disk"), 16));
        // Where logs go, and the gateways' responses.
        let logs = if needs.disk { path("disk") } else { dir.path().to_owned() };
        let clock = needs.clock.then(|| path("clock"));
        let mut env: Vec<(OsString, OsString)> = vec![(leftovers::MARK.into(), dir.path().into())];
        env.push(("XDG_DATA_HOME".into(), logs.join("data").into()));
        if let Some(clock) = &clock {
            fs::write(clock, "+0").expect("write the clock");
            env.push(("LD_PRELOAD".into(), FAKETIME.into()));
            env.push(("FAKETIME_TIMESTAMP_FILE".into(), clock.into()));
            // A clock that is set moves no timer.
            env.push(("FAKETIME_DONT_FAKE_MONOTONIC".into(), "1".into()));
            env.push(("FAKETIME_CACHE_DURATION".into(), "1".into()));
        }

        let etcd = Etcd::of(3, &host, dir.path()).await;
        let listen = format!("{host}:0");
        let common = ["--etcd", etcd.url(), "--lease-ttl", LEASE_TTL];
        let owner = File::create(path("owner")).expect("a file to lock");
        owner.lock().expect("lock it");
        let pools = POOLS.map(|pool| {
            let args = [&common[..], &["--listen", &listen], &worker(pool)].concat();
            json!({"pool": pool, "model": MODEL_NAME, "program": program("baton-worker"),
                "args": args})
        });
        fs::write(path("workers.json"), json!({"pools": pools}).to_string()).expect("write");
        let text = |path: PathBuf| path.to_str().expect("a path in UTF-8").to_owned();
        let (file, workers, lock) = (path("workers.json"), path("workers"), path("owner"));
        let owned = [
            ("--workers", text(file)),
            ("--workers-dir", text(workers)),
            ("--workers-logs", text(logs.join("logs"))),
            ("--workers-owner", text(lock)),
        ];
        let daemon = |name: &str, program_name: &str, listen: &str| {
            let args = common.iter().copied().chain(["--listen", listen]);
            let mut spec = Spec::new(name, program(program_name), args);
            spec.env = env.clone();
            spec
        };
        let mut coordinators = Vec::new();
        for n in 0..2 {
            let mut spec = daemon(&format!("coordinator-{n}"), "baton-coordinator", &listen);
            spec.args.extend(owned.iter().flat_map(|(flag, value)| [flag.into(), value.into()]));
            coordinators.push(Daemon::start(spec, &logs).await);
        }
        let mut gateways = Vec::new();
        for n in 0..2 {
            let listen = format!("{host}:{}", ports::free());
            let spec = daemon(&format!("gateway-{n}"), "baton-gateway", &listen);
            gateways.push(Daemon::start(spec, &logs).await);
        }
        let addresses = [0, 1].map(|n: usize| &*gateways[n].address);
        let proxy = Balancer::start(Kind::Haproxy, &host, addresses, dir.path());

        let (far, sizes) = (Vec::new(), BTreeMap::new());
        let mut bed = Self {
            etcd,
            coordinators,
            gateways,
            hit: Vec::new(),
            link,
            disk,
            sizes,
            far,
            proxy,
            clock,
            owner,
            dir,
        };
        // The sizes of pools count all workers, so those far away come after.
        let launched = if needs.link { 1 } else { 2 };
        for pool in POOLS {
            bed.scale(pool, launched).await;
        }
        if let Some(link) = &bed.link {
            for pool in POOLS {
                let inside = ["netns", "exec", link.namespace()];
                let mut spec = Spec::new(format!("far-{pool}"), "ip".into(), inside);
                let listen = format!("{}:0", link.far());
                spec.args.push(program("baton-worker").into());
                let common = ["--etcd", bed.etcd.url(), "--lease-ttl", LEASE_TTL];
                let args = [&common[..], &["--listen", &listen], &worker(pool)].concat();
                spec.args.extend(args.iter().map(Into::into));
                // Another machine's memory is not shared.
                spec.args.extend(["--transports".into(), "grpc".into()]);
                bed.far.push(Daemon::start(spec, bed.dir.path()).await);
            }
        }
        bed.whole().await;
        bed
    }

    /// The address that clients use.
    pub fn url(&self) -> &str {
        self.proxy.url()
    }

    /// Has the coordinators make a pool this large, as an operator does.
    pub async fn scale(&mut self, pool: &'static str, size: usize) {
        let body = json!({"new_data_parallel_size": size, "pool": pool, "drain_timeout": 30});
        // Not through HAProxy: it takes a gateway without workers for dead.
        Api::new(&self.gateways[0].address, None).ok("/scale_elastic_ep", &body).await;
        self.sizes.insert(pool, size);
    }

    /// The process of a launched worker of this pool, by a number.
    pub fn worker(&self, pool: &str, number: usize) -> Pid {
        let pids = self.workers(pool);
        pids[number % pids.len()]
    }

    /// The processes of the launched workers of this pool.
    pub fn workers(&self, pool: &str) -> Vec<Pid> {
        let folders = fs::read_dir(self.dir.path().join("workers")).expect("the workers");
        let mut pids: Vec<i32> = folders
            .flatten()
            .filter(|it| it.file_name().to_string_lossy().starts_with(pool))
            .filter_map(|it| fs::read(it.path().join("status.json")).ok())
            .filter_map(|status| serde_json::from_slice::<Value>(&status).ok())
            .filter_map(|status| status["pid"].as_i64()?.try_into().ok())
            .filter(|pid| *pid > 0)
            .collect();
        pids.sort_unstable();
        pids.into_iter().map(Pid::from_raw).collect()
    }

    /// KV blocks of all workers that requests own, and hand-offs.
    pub async fn owned_blocks(&self) -> u64 {
        let mut owned = 0;
        for address in self.registered() {
            owned += grpc::owned_blocks(&grpc::status(&address).await);
        }
        owned
    }

    /// The addresses of the workers that are registered.
    fn registered(&self) -> Vec<String> {
        let mut all = self.etcd.instances();
        all.retain(|record| POOLS.contains(&record.role.as_str()));
        all.into_iter().map(|record| record.address).collect()
    }

    /// Which coordinator leads, by position.
    pub async fn leader(&self) -> usize {
        eventually("a coordinator leads", WHOLE_WITHIN, async || {
            let view = grpc::cluster_view(&self.coordinators[0].address).await;
            let leader = view.instances.iter().find(|it| it.id == view.leader);
            let leads = |it: &Daemon| leader.is_some_and(|leader| leader.address == it.address);
            self.coordinators.iter().position(leads).ok_or_else(|| format!("{view:?}"))
        })
        .await
        .0
    }

    /// Sets the clock of all processes of Baton to so many seconds from what it is.
    pub fn set_clock(&self, seconds: i64) {
        let clock = self.clock.as_ref().expect("a clock that can be set");
        let next = clock.with_extension("next");
        fs::write(&next, format!("{seconds:+}")).expect("write the clock");
        fs::rename(&next, clock).expect("set the clock");
    }

    /// Waits until everything that should run does, and everyone has found everyone.
    pub async fn whole(&self) {
        let wanted = |pool: &str| {
            let far = usize::from(!self.far.is_empty());
            self.sizes.get(pool).copied().unwrap_or_default() + far
        };
        let all: usize = POOLS.iter().map(|pool| wanted(pool)).sum();
        self.leader().await;
        eventually("the cluster is whole", WHOLE_WITHIN, async || {
            let instances = self.etcd.instances();
            for pool in POOLS {
                let count = instances.iter().filter(|it| it.role.as_str() == pool).count();
                if count != wanted(pool) {
                    return Err(format!("{count} workers of {pool} are registered"));
                }
            }
            // One that was killed is registered until its lease ends.
            for address in self.registered() {
                grpc::look(&address).await.map_err(|error| format!("{address}: {error}"))?;
            }
            for gateway in &self.gateways {
                let metrics = Api::new(&gateway.address, None).get("/metrics").await;
                let up = Scrape::parse(&metrics.text)?.sum("baton_workers", &[("state", "up")]);
                if up != Some(all as f64) {
                    return Err(format!("{} has {up:?} of {all} workers", gateway.address));
                }
            }
            self.proxy.found_both().await
        })
        .await;
    }

    /// Ends everything: no request and no KV block may be left on a worker, and nothing at all
    /// after the end.
    pub async fn finish(mut self) {
        eventually("all workers are at rest", Duration::from_secs(30), async || {
            for address in self.registered() {
                grpc::at_rest(&address).await?;
            }
            Ok(())
        })
        .await;
        self.proxy.kill();
        for daemon in self.gateways.iter_mut().chain(&mut self.coordinators).chain(&mut self.far) {
            daemon.process.stop().await;
        }
        // As when the owner ends.
        self.owner.unlock().expect("unlock");
        eventually("the workers follow their owner", Duration::from_secs(20), async || {
            let left = leftovers::processes(self.dir.path());
            let left: Vec<_> = left.iter().filter(|it| !it.contains("etcd --name")).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:#?}")) }
        })
        .await;
        self.etcd.kill();
        leftovers::assert_none(self.dir.path());
    }
}

/// Sends a signal.
pub fn signal(pid: Pid, signal: Signal) {
    kill(pid, signal).unwrap_or_else(|e| panic!("{signal} to {pid}: {e}"));
}

/// The flags of a worker of this pool.
fn worker(pool: &str) -> [&str; 12] {
    static MODEL: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| model().to_str().expect("a path in UTF-8").to_owned());
    let (role, name) = (["--role", pool], ["--served-model-name", MODEL_NAME]);
    let (threads, memory) = (["--threads", "1"], ["--kv-memory", "128MiB"]);
    let (model, drain) = (["--model", &MODEL], ["--drain-timeout", "5"]);
    let flags = [role, name, threads, memory, model, drain];
    std::array::from_fn(|n| flags[n / 2][n % 2])
}
