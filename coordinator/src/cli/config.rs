//! `baton config`: the settings in force, and the schema of their file.
//!
//! What settings there are is in the code of each program, which this one does not hold. It asks
//! them: they lie beside it, of the same build.

use std::process::{Command as Process, Stdio};

use baton_membership::config::shown::{self, Shown};
use baton_membership::config::{self, FileArgs, PRINT_FLAG, schema};
use baton_membership::daemon::{Exit, Failure};
use clap::{Args, CommandFactory as _, ValueEnum};
use serde::de::DeserializeOwned;

use super::process::programs;
use super::{Command, UP};

/// Flags of `baton config`.
#[derive(Clone, Debug, Args)]
pub struct ConfigArgs {
    /// Whose; by default all.
    #[arg(value_enum)]
    table: Option<Table>,

    /// The file.
    #[command(flatten)]
    file: FileArgs,

    /// Print nothing: only say what is wrong, if anything.
    #[arg(long)]
    check: bool,

    /// Print the file's JSON schema.
    #[arg(long, conflicts_with_all = ["table", "check"])]
    schema: bool,
}

/// A table of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Table {
    Gateway,
    Worker,
    Coordinator,
    /// `baton up`.
    Up,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Worker => "worker",
            Self::Coordinator => "coordinator",
            Self::Up => UP,
        }
    }

    fn shown(self, schema: &'static str, file: &FileArgs) -> Result<Vec<Shown>, Failure> {
        match self {
            Self::Up => config::shown_of_subcommand::<Command>(UP, schema, file),
            _ => ask(self.name(), shown::WANTED, file),
        }
    }

    fn schema(self) -> Result<serde_json::Value, Failure> {
        match self {
            Self::Up => {
                let command = Command::command();
                Ok(schema::table(command.find_subcommand(UP).unwrap_or(&command)))
            }
            _ => ask(self.name(), schema::WANTED, &FileArgs::default()),
        }
    }
}

/// Asks, and prints. `kept` is the schema as it was when this was built.
pub fn run(args: &ConfigArgs, kept: &'static str) -> Result<(), Failure> {
    if args.schema {
        let tables = Table::value_variants().iter();
        let tables = tables.map(|table| Ok((table.name(), table.schema()?)));
        println!("{:#}", schema::file(tables.collect::<Result<Vec<_>, Failure>>()?));
        return Ok(());
    }
    let wanted = args.table.map_or_else(|| Table::value_variants().to_vec(), |table| vec![table]);
    let tables = wanted.into_iter().map(|table| Ok((table.name(), table.shown(kept, &args.file)?)));
    let tables = tables.collect::<Result<Vec<_>, Failure>>()?;
    if !args.check {
        print!("{}", shown::file(&tables));
    }
    Ok(())
}

/// Asks a program about its settings.
fn ask<T: DeserializeOwned>(name: &str, wanted: &str, file: &FileArgs) -> Result<T, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failure, error);
    let program = programs()?.join(format!("baton-{name}"));
    let mut process = Process::new(&program);
    process.args([format!("--{PRINT_FLAG}"), wanted.to_owned()]).stdin(Stdio::null());
    match &file.config {
        Some(file) => process.arg("--config").arg(file),
        None => process.env_remove("BATON_CONFIG"),
    };
    let output = process.output().map_err(|e| failed(&format!("{}: {e}", program.display())))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let message = said.trim().trim_start_matches("error: ").to_owned();
        let exit = output.status.code().map_or(Exit::Failure, Exit::from_code);
        return Err(Failure::new(exit, message));
    }
    // Warnings.
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).map_err(|error| {
        failed(&format!("{} is of another version than this program: {error}", program.display()))
    })
}
