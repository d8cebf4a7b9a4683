//! Who is alive, and the operator's command.
//!
//! * [`election`]: one of several coordinators leads.
//! * [`scale`]: changes of a pool's size, carried out by the leader.
//! * [`launch`]: who starts and ends workers.
//! * [`planner`]: how large pools should be, and the leader's wish that they were.
//! * [`service`]: the cluster as the coordinator sees it, over gRPC.
//! * [`workers`]: what a coordinator asks of workers.
//! * [`cli`]: the `baton` command: a whole cluster on one machine, and its operation.
//!
//! The coordinator is never on the path of a token: without it, everything goes on being served.

#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod election;
pub mod launch;
pub mod planner;
pub mod scale;
pub mod service;
pub mod workers;
