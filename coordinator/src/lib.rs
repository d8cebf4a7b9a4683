//! Who is alive, and the operator's command.
//!
//! * [`election`]: one of several coordinators leads.
//! * [`service`]: the cluster as the coordinator sees it, over gRPC.
//! * [`cli`]: `baton up`, `status`, `down`, `model`: a whole cluster on one machine.
//!
//! The coordinator is never on the path of a token: without it, everything goes on being served.

#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod election;
pub mod service;
