//! What is done to a cluster.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::bed::{Bed, Daemon, Needs, signal};
use super::traffic::Traffic;

/// How long a fault lasts that ends, in milliseconds: shorter and longer than a lease.
const LASTS: std::ops::Range<u64> = 500..8000;
/// Until a daemon that was killed is started again, in milliseconds.
const RESTART_AFTER: std::ops::Range<u64> = 100..1500;
/// Between two requests of a client, in milliseconds.
const PAUSE: std::ops::Range<u64> = 20..250;
/// Between the beginnings of two changes of a pool's size.
const SCALE_EVERY: Duration = Duration::from_secs(10);

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of a prefill worker.
    KillPrefill,
    /// SIGSTOP of a prefill worker, and SIGCONT.
    StopPrefill,
    /// `kill -9` of a decode worker.
    KillDecode,
    /// SIGSTOP of a decode worker, and SIGCONT.
    StopDecode,
    /// `kill -9` of the coordinator that leads.
    KillLeader,
    /// SIGSTOP of the coordinator that leads, and SIGCONT.
    StopLeader,
    /// `kill -9` of a gateway.
    KillGateway,
    /// SIGSTOP of a gateway, and SIGCONT.
    StopGateway,
    /// `kill -9` of all members of etcd.
    KillEtcd,
    /// SIGSTOP of all members of etcd, and SIGCONT.
    StopEtcd,
    /// `kill -9` of the member of etcd that leads.
    KillEtcdLeader,
    /// SIGSTOP of the member of etcd that leads, and SIGCONT.
    StopEtcdLeader,
    /// No packet passes between two hosts.
    CutNetwork,
    /// 200 ms of delay and 1 % of loss between two hosts.
    SlowNetwork,
    /// No room for logs and responses.
    FullDisk,
    /// The wall clock jumps, and back.
    ClockJump,
    /// A pool grows or shrinks every ten seconds.
    Scale,
}

impl Fault {
    /// All kinds.
    pub const ALL: [Self; 17] = [
        Self::KillPrefill,
        Self::StopPrefill,
        Self::KillDecode,
        Self::StopDecode,
        Self::KillLeader,
        Self::StopLeader,
        Self::KillGateway,
        Self::StopGateway,
        Self::KillEtcd,
        Self::StopEtcd,
        Self::KillEtcdLeader,
        Self::StopEtcdLeader,
        Self::CutNetwork,
        Self::SlowNetwork,
        Self::FullDisk,
        Self::ClockJump,
        Self::Scale,
    ];

    /// Its name on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::KillPrefill => "kill-prefill",
            Self::StopPrefill => "stop-prefill",
            Self::KillDecode => "kill-decode",
            Self::StopDecode => "stop-decode",
            Self::KillLeader => "kill-leader",
            Self::StopLeader => "stop-leader",
            Self::KillGateway => "kill-gateway",
            Self::StopGateway => "stop-gateway",
            Self::KillEtcd => "kill-etcd",
            Self::StopEtcd => "stop-etcd",
            Self::KillEtcdLeader => "kill-etcd-leader",
            Self::StopEtcdLeader => "stop-etcd-leader",
            Self::CutNetwork => "cut-network",
            Self::SlowNetwork => "slow-network",
            Self::FullDisk => "full-disk",
            Self::ClockJump => "clock-jump",
            Self::Scale => "scale",
        }
    }

    /// What it needs beside the cluster.
    pub fn needs(self) -> Needs {
        Needs {
            disk: self == Self::FullDisk,
            clock: self == Self::ClockJump,
            link: matches!(self, Self::CutNetwork | Self::SlowNetwork),
        }
    }

    /// Who asks meanwhile.
    pub fn traffic(self, learnt: Traffic) -> Traffic {
        let traffic = learnt.clients(5, PAUSE);
        if self == Self::FullDisk { traffic.responses(PAUSE) } else { traffic }
    }

    /// Whether a gateway's open requests may be lost.
    pub fn hits_gateway(self) -> bool {
        matches!(self, Self::KillGateway | Self::StopGateway)
    }

    /// Whether requests may be refused clearly: a response cannot be kept on a full disk.
    pub fn may_refuse(self) -> bool {
        self == Self::FullDisk
    }

    /// Injects the `n`th of them and, when it has an end, waits for that. Says what was done.
    pub async fn inject(self, bed: &mut Bed, n: usize, rng: &mut StdRng) -> String {
        let lasts = Duration::from_millis(rng.random_range(LASTS));
        let soon = Duration::from_millis(rng.random_range(RESTART_AFTER));
        let which: usize = rng.random_range(0..1000);
        match self {
            Self::KillPrefill => kill_worker(bed.worker("prefill", which)),
            Self::KillDecode => kill_worker(bed.worker("decode", which)),
            Self::StopPrefill => pause(&[bed.worker("prefill", which)], lasts).await,
            Self::StopDecode => pause(&[bed.worker("decode", which)], lasts).await,
            Self::KillLeader => {
                let leader = bed.leader().await;
                revive(&mut bed.coordinators[leader], soon).await
            }
            Self::StopLeader => {
                let leader = bed.leader().await;
                pause(&[pid(bed.coordinators[leader].process.pid())], lasts).await
            }
            Self::KillGateway | Self::StopGateway => {
                let which = which % bed.gateways.len();
                let from = Instant::now();
                let gateway = &mut bed.gateways[which];
                let what = match self {
                    Self::KillGateway => revive(gateway, soon).await,
                    _ => pause(&[pid(gateway.process.pid())], lasts).await,
                };
                bed.hit.push((format!("gateway-{which}"), from, Instant::now()));
                what
            }
            Self::KillEtcd => {
                bed.etcd.kill();
                tokio::time::sleep(lasts).await;
                bed.etcd.restart().await;
                format!("etcd away for {lasts:.1?}")
            }
            Self::StopEtcd => pause(&members(bed), lasts).await,
            Self::KillEtcdLeader => {
                let leader = bed.etcd.leader().expect("etcd has a leader");
                bed.etcd.kill_member(leader);
                tokio::time::sleep(lasts).await;
                bed.etcd.restart().await;
                format!("etcd's leader away for {lasts:.1?}")
            }
            Self::StopEtcdLeader => {
                let leader = bed.etcd.leader().expect("etcd has a leader");
                pause(&[members(bed)[leader]], lasts).await
            }
            Self::CutNetwork => network(bed, "cut", lasts).await,
            Self::SlowNetwork => network(bed, "delay 200 1", lasts + lasts).await,
            Self::FullDisk => {
                let disk = bed.disk.as_ref().expect("a small disk");
                disk.fill();
                tokio::time::sleep(lasts).await;
                disk.free();
                format!("no room for {lasts:.1?}")
            }
            Self::ClockJump => {
                let seconds = rng.random_range(-86_400..86_400);
                bed.set_clock(seconds);
                tokio::time::sleep(lasts).await;
                bed.set_clock(0);
                format!("{seconds:+} s for {lasts:.1?}")
            }
            Self::Scale => {
                let from = Instant::now();
                let steps = [("decode", 3), ("prefill", 1), ("decode", 1), ("prefill", 2)];
                let (pool, size) = [steps.as_slice(), &[("decode", 2)]].concat()[n % 5];
                bed.scale(pool, size).await;
                let took = from.elapsed();
                tokio::time::sleep(SCALE_EVERY.saturating_sub(took)).await;
                format!("{pool} to {size} in {took:.1?}")
            }
        }
    }
}

fn kill_worker(worker: Pid) -> String {
    signal(worker, Signal::SIGKILL);
    format!("{worker} killed")
}

async fn revive(daemon: &mut Daemon, after: Duration) -> String {
    daemon.process.kill();
    tokio::time::sleep(after).await;
    daemon.restart().await;
    format!("killed, started again after {after:.1?}")
}

async fn pause(processes: &[Pid], lasts: Duration) -> String {
    for process in processes {
        signal(*process, Signal::SIGSTOP);
    }
    tokio::time::sleep(lasts).await;
    for process in processes {
        signal(*process, Signal::SIGCONT);
    }
    format!("stopped for {lasts:.1?}")
}

async fn network(bed: &mut Bed, how: &str, lasts: Duration) -> String {
    let link = bed.link.as_mut().expect("a link");
    link.tell(how);
    tokio::time::sleep(lasts).await;
    link.tell("heal");
    format!("{how} for {lasts:.1?}")
}

fn members(bed: &Bed) -> Vec<Pid> {
    bed.etcd.processes().flatten().map(|process| pid(process.pid())).collect()
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().expect("a process id"))
}
