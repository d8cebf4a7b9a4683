//! The harness of the whole-cluster tests.
//!
//! Every test owns its cluster: a real etcd and real Baton processes on free ports, with a
//! temporary folder for their files. Nothing is shared between tests, so they run in parallel,
//! and nothing outlives them, however they end.
//!
//! * [`cluster`]: starts, changes and stops a cluster.
//! * [`chaos`]: faults in a running cluster, injected and counted.
//! * [`collector`]: a receiver of traces.
//! * [`contract`]: the gRPC contract as data, compared, and spoken by an earlier peer.
//! * [`elastic`]: a cluster whose workers are launched by its coordinators.
//! * [`kubernetes`]: a scripted API server of Kubernetes, and a real one; pods are real workers.
//! * [`process`]: one child process: its logs, its signals, its end.
//! * [`etcd`]: a real etcd that can be stopped and started again.
//! * [`http`]: a client of the gateway that also checks the framing of what it reads.
//! * [`gpu`]: workers on a GPU, or on its double.
//! * [`grpc`]: the workers' and the coordinator's own view, asked directly.
//! * [`speech`]: recordings of known text.
//! * [`lora`]: adapters of random weights.
//! * [`postgres`]: a real PostgreSQL.
//! * [`python`]: clients in Python, with pinned packages.
//! * [`monitor`]: a real Prometheus.
//! * [`prometheus`]: a strict reader of the Prometheus text format.
//! * [`mod@reference`]: outputs of an independent implementation on the same weights.
//! * [`poll`]: waiting for a condition, never for a time.
//! * [`authority`]: a certificate authority of the test.
//! * [`balancer`]: a real HAProxy or nginx before gateways.
//! * [`package_index`]: a package index, of a real nginx.
//! * [`bench`]: what the benchmarks of whole clusters share.
//! * [`load`]: traffic: lengths, arrivals, a streaming client, and what came of it.
//! * [`sim`]: a simulated cluster that drives the planner.
//!
//! Harness functions panic when what they do fails: a test has nothing better to do either.

#![forbid(unsafe_code)]

pub mod authority;
pub mod balancer;
pub mod bench;
pub mod binaries;
pub mod chaos;
pub mod cluster;
pub mod collector;
pub mod contract;
mod deployed;
pub mod elastic;
pub mod etcd;
pub mod gpu;
pub mod grpc;
pub mod http;
pub mod kubernetes;
pub mod leftovers;
pub mod load;
pub mod lora;
pub mod monitor;
pub mod package_index;
pub mod poll;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod prometheus;
pub mod python;
pub mod reference;
pub mod sim;
pub mod speech;

pub use binaries::MODEL_NAME;
pub use cluster::{Cluster, Role, Worker};
pub use http::{Api, Reply, Sse};
pub use poll::eventually;
