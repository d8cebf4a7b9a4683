//! `baton`: the operator's command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use baton_coordinator::cli::{self, Command};
use baton_membership::{config, daemon};

/// Of the file of settings: it tells what settings the programs have.
const SCHEMA: &str = include_str!("../../../deploy/baton.schema.json");

// One thread: children are tied to the life of the thread that starts them.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let command: Command = config::parse_subcommand(cli::UP, SCHEMA);
    if command.only_prints() {
        // Who reads the output may have seen enough, as `head` has: no reason to panic. Commands that
        // talk to others would die of connections that these close.
        sigpipe::reset();
    }
    daemon::exit(cli::run(command, SCHEMA).await)
}
