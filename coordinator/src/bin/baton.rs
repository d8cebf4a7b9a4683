//! `baton`: the operator's command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use baton_coordinator::cli::{self, Command};
use baton_membership::daemon;
use clap::Parser as _;

// One thread: children are tied to the life of the thread that starts them.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    daemon::exit(cli::run(Command::parse()).await)
}
