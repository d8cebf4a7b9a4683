//! `baton-worker` under another name, so that tests have one that was built for GPUs beside the other.

#![forbid(unsafe_code)]

#[path = "../main.rs"]
mod worker;

fn main() -> std::process::ExitCode {
    worker::main()
}
