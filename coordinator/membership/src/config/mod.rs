//! One file with the settings of all programs, beside flags and environment.
//!
//! The only list of settings is clap's: a key of the file is a flag's name, and its value is read
//! by clap as the flag's, by the same types and within the same bounds. A flag wins over the
//! environment, that over the file, and that over the default.
//!
//! * [`parse`], [`parse_subcommand`]: a program's settings, from wherever they are.
//! * `setting`: one setting, as clap's definition says it.
//! * `keys`: which keys there are; `file`: which are given, and on what line.
//! * `merge`: what the file says, put among the arguments.
//! * [`shown`]: settings in force, as a file and with where each is from.
//! * [`schema`]: the file's JSON schema.
//! * [`without_password`]: what is told of secrets.

mod file;
mod keys;
mod merge;
pub mod schema;
mod secret;
mod setting;
pub mod shown;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches, Args, Command, Parser};

pub use secret::{without_parameters, without_password};

use crate::daemon::{Exit, Failure};
use merge::Merged;
use setting::Setting;
use shown::Shown;

/// The name of a model that has been given none: its folder's, or its file's without the ending.
pub fn model_name(path: &Path) -> String {
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// A hidden flag of all daemons, by which the command `baton` asks for their settings: it does not
/// hold their code.
pub const PRINT_FLAG: &str = "print-settings";

/// The flag that names the file.
#[derive(Clone, Debug, Default, Args)]
pub struct FileArgs {
    /// A TOML file with settings, by their flags' names; flags and variables win over it. `baton
    /// config` shows what comes of it, and what there is.
    #[arg(long, env = "BATON_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl FileArgs {
    /// The flag again, for a process that is started in any folder.
    pub fn flags(&self) -> Vec<String> {
        let path = |file: &PathBuf| std::path::absolute(file).unwrap_or_else(|_| file.clone());
        let flags = |file| ["--config".to_owned(), path(file).display().to_string()];
        self.config.iter().flat_map(flags).collect()
    }
}

/// Settings of a daemon. Ends the process when they are wrong, or when only a word about them was
/// asked for. `schema` is that of the file: it tells which settings other programs have.
pub fn parse<S: Parser>(schema: &'static str) -> S {
    let choices = [shown::WANTED, schema::WANTED];
    let print = Arg::new(PRINT_FLAG).long(PRINT_FLAG).hide(true).value_parser(choices);
    finish(&Program { command: S::command().arg(print), subcommand: None, schema })
}

/// The same, of a command of which one subcommand has the flag that names the file.
pub fn parse_subcommand<S: Parser>(subcommand: &'static str, schema: &'static str) -> S {
    finish(&Program { command: S::command(), subcommand: Some(subcommand), schema })
}

/// A subcommand's settings in force, without flags, by the file if there is one.
///
/// # Errors
/// [`Exit::Config`] when the file is wrong.
pub fn shown_of_subcommand<S: Parser>(
    subcommand: &'static str,
    schema: &'static str,
    file: &FileArgs,
) -> Result<Vec<Shown>, Failure> {
    let program = Program { command: S::command(), subcommand: Some(subcommand), schema };
    let mut given = [program.command.get_name(), subcommand].map(OsString::from).to_vec();
    given.extend(file.config.iter().flat_map(|file| ["--config".into(), file.into()]));
    let wrong = |why| match why {
        Stop::Clap(error) => error.to_string().trim_start_matches("error: ").trim().to_owned(),
        Stop::File(message) => message,
    };
    let merged = program.merge(given).map_err(|why| Failure::new(Exit::Config, wrong(why)))?;
    Ok(program.shown(&merged))
}

/// Whose settings are wanted.
struct Program {
    command: Command,
    subcommand: Option<&'static str>,
    /// The file's.
    schema: &'static str,
}

/// Why there are none.
#[derive(Debug)]
enum Stop {
    /// Help, or a wrong flag or variable.
    Clap(clap::Error),
    /// The file is wrong.
    File(String),
}

impl Program {
    /// The name of its table.
    fn table(&self) -> &str {
        let name = self.command.get_name();
        self.subcommand.unwrap_or_else(|| name.strip_prefix("baton-").unwrap_or(name))
    }

    /// What has the settings as its flags.
    fn flags(&self) -> &Command {
        let sub = self.subcommand.and_then(|name| self.command.find_subcommand(name));
        sub.unwrap_or(&self.command)
    }

    /// The matches that hold them.
    fn matches<'a>(&self, all: &'a ArgMatches) -> Option<&'a ArgMatches> {
        match self.subcommand {
            Some(name) => all.subcommand_matches(name),
            // A subcommand of a daemon does something else.
            None => Some(all).filter(|all| all.subcommand_name().is_none()),
        }
    }

    fn settings(&self) -> Vec<Setting> {
        Setting::all(self.flags())
    }

    fn shown(&self, merged: &Merged) -> Vec<Shown> {
        let matches = self.matches(&merged.matches).unwrap_or(&merged.matches);
        let common = keys::common();
        let shown = |setting: &Setting| {
            let from_file = merged.from_file.iter().any(|id| id == setting.id());
            let common = common.iter().any(|common| common.key == setting.key);
            Shown::new(setting, matches, from_file, common)
        };
        self.settings().iter().map(shown).collect()
    }
}

fn finish<S: Parser>(program: &Program) -> S {
    let merged = program.merge(std::env::args_os().collect()).unwrap_or_else(|why| end(why));
    if let Some(warning) = &merged.warning {
        eprintln!("warning: {warning}");
    }
    match merged.print.as_deref() {
        Some(shown::WANTED) => print(&serde_json::json!(program.shown(&merged))),
        Some(_) => print(&schema::table(program.flags())),
        None => {}
    }
    let mut command = program.command.clone();
    S::from_arg_matches(&merged.matches).unwrap_or_else(|error| error.format(&mut command).exit())
}

fn end(why: Stop) -> ! {
    match why {
        Stop::Clap(error) => error.exit(),
        Stop::File(message) => {
            eprintln!("error: {message}");
            std::process::exit(Exit::Config as i32)
        }
    }
}

fn print(value: &serde_json::Value) -> ! {
    println!("{value}");
    std::process::exit(0)
}
