//! What the file says, put among the arguments: where neither a flag nor a variable says it.
//!
//! The arguments are read twice. First leniently, for what is given and which file is named; then,
//! with what the file adds put before them, as if all had been flags, so that clap's own rules hold
//! for the whole: what is required, and what goes together.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, Id};

use super::file::{Entry, File};
use super::keys::{self, Keys};
use super::setting::{FILE_FLAG, Setting};
use super::{PRINT_FLAG, Program, Stop, secret};

/// A program's arguments, with what the file adds.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) matches: ArgMatches,
    /// clap's names of the settings that the file gives.
    pub(super) from_file: Vec<String>,
    /// What is asked for in place of running.
    pub(super) print: Option<String>,
    pub(super) warning: Option<String>,
}

/// What the file adds.
#[derive(Debug, Default)]
struct Added {
    flags: Vec<String>,
    ids: Vec<String>,
    secrets: bool,
}

impl Program {
    /// Reads the arguments, the environment, and the file that they name.
    pub(super) fn merge(&self, arguments: Vec<OsString>) -> Result<Merged, Stop> {
        let plainly = |command: &Command, arguments: &[OsString]| {
            command.clone().try_get_matches_from(arguments).map_err(Stop::Clap)
        };
        let lenient = |arg: Arg| {
            let nothing = || Resettable::<Id>::Reset;
            arg.required(false).requires(nothing()).conflicts_with(nothing())
        };
        let given = self.command.clone().mut_args(lenient).try_get_matches_from(&arguments);
        let given = given.as_ref().ok().and_then(|given| self.matches(given));
        let Some(given) = given else {
            // Wrong flags are told, and other subcommands read, as ever.
            let matches = plainly(&self.command, &arguments)?;
            return Ok(Merged { matches, from_file: Vec::new(), print: None, warning: None });
        };
        let file = given.get_one::<PathBuf>(FILE_FLAG);
        let added = file.map(|file| self.added(file, given)).transpose().map_err(Stop::File)?;
        let added = added.unwrap_or_default();
        let printing = given.try_get_one::<String>(PRINT_FLAG).ok().flatten();
        let command = match printing {
            // What is missing may still be given by a flag.
            Some(_) => self.command.clone().mut_args(|arg| arg.required(false)),
            None => self.command.clone(),
        };
        let mut all = arguments;
        let at = all.len().min(if self.subcommand.is_some() { 2 } else { 1 });
        all.splice(at..at, added.flags.into_iter().map(OsString::from));
        Ok(Merged {
            matches: plainly(&command, &all)?,
            from_file: added.ids,
            print: printing.cloned(),
            warning: file.filter(|file| added.secrets && is_open(file)).map(|file| {
                let file = file.display();
                format!("{file} holds secrets, and everybody may read it: chmod o-r {file}")
            }),
        })
    }

    /// What a file adds to what is given.
    fn added(&self, path: &Path, given: &ArgMatches) -> Result<Added, String> {
        let settings = self.settings();
        let file = File::read(path, &Keys::new(self.schema, self.table(), &settings))?;
        let mut added = Added::default();
        let common: Vec<String> = keys::common().into_iter().map(|it| it.key).collect();
        let top = file.entries(None);
        let top: Vec<&Entry<'_>> =
            top.iter().filter(|entry| common.iter().any(|key| key == entry.key)).collect();
        let own = file.entries(Some(self.table()));
        for setting in &settings {
            let is = |entry: &&Entry<'_>| entry.key == setting.key;
            let (own, top) = (own.iter().find(is), top.iter().copied().find(|entry| is(entry)));
            // Both are looked at; the table's own counts.
            for (entry, counts) in [(top, own.is_none()), (own, true)] {
                let Some(entry) = entry else { continue };
                let wrong = |why: String| format!("{}: {why}", entry.place);
                let flags = setting.flags(entry.value()?).map_err(wrong)?;
                if counts && !is_given(given, setting) {
                    added.take(setting, flags).map_err(wrong)?;
                }
            }
        }
        Ok(added)
    }
}

impl Added {
    fn take(&mut self, setting: &Setting, flags: Vec<String>) -> Result<(), String> {
        let values = flags.iter().filter_map(|flag| flag.split_once('='));
        if values.into_iter().any(|(_, value)| secret::is_hidden(value)) {
            return Err("`baton config` shows no secrets: put it in again".into());
        }
        self.secrets |= setting.is_secret();
        self.ids.push(setting.id().to_owned());
        self.flags.extend(flags);
        Ok(())
    }
}

/// Whether a flag or a variable says it.
fn is_given(given: &ArgMatches, setting: &Setting) -> bool {
    let source = given.value_source(setting.id());
    matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
}

fn is_open(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|file| file.permissions().mode() & 0o004 != 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use clap::{CommandFactory as _, FromArgMatches as _, Parser};
    use tempfile::NamedTempFile;

    use super::*;
    use crate::daemon::ClusterArgs;

    /// A worker, as far as these tests need one. PATH stands for a variable that is set.
    #[derive(Debug, Parser)]
    #[command(name = "baton-worker")]
    struct Settings {
        #[arg(long)]
        role: String,
        #[arg(long, env = "PATH")]
        listen: Option<String>,
        #[arg(long, default_value_t = 256)]
        max_waiting: usize,
        #[arg(long, value_delimiter = ',', default_value = "shm,grpc")]
        transports: Vec<String>,
        #[arg(long, requires = "chat_template")]
        model: Option<String>,
        #[arg(long)]
        chat_template: Option<String>,
        #[arg(long)]
        speculate: bool,
        #[arg(long, hide_env_values = true)]
        api_key: Vec<String>,
        #[command(flatten)]
        cluster: ClusterArgs,
    }

    fn program() -> Program {
        // What another program has.
        let schema =
            r#"{"properties": {"gateway": {"properties": {"max-inflight": {}, "lease-ttl": {}}}}}"#;
        Program { command: Settings::command(), subcommand: None, schema }
    }

    /// The settings, or what is wrong, by a file with this text and these flags.
    fn settings(text: &str, flags: &[&str]) -> Result<Settings, String> {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let path = file.path().to_str().unwrap();
        let start = ["baton-worker", "--config", path, "--role", "decode"];
        let arguments = start.iter().chain(flags).map(OsString::from).collect();
        let merged = program().merge(arguments).map_err(|stop| match stop {
            Stop::Clap(error) => error.to_string(),
            Stop::File(message) => message.replace(path, "FILE"),
        })?;
        Ok(Settings::from_arg_matches(&merged.matches).unwrap())
    }

    #[test]
    fn flags_win_over_variables_and_those_over_the_file_and_that_over_defaults() {
        let text = "[worker]\nmax-waiting = 7\nlisten = 'file'\n";
        assert_eq!(settings("", &[]).unwrap().max_waiting, 256);
        assert_eq!(settings(text, &[]).unwrap().max_waiting, 7);
        assert_eq!(settings(text, &["--max-waiting", "8"]).unwrap().max_waiting, 8);
        let listen = |flags: &[&str]| settings(text, flags).unwrap().listen;
        assert_eq!(listen(&[]), std::env::var("PATH").ok());
        assert_eq!(listen(&["--listen", "flag"]).as_deref(), Some("flag"));
    }

    #[test]
    fn the_top_is_for_all_programs_and_a_table_for_one() {
        let top = "lease-ttl = 7\n";
        assert_eq!(settings(top, &[]).unwrap().cluster.lease_ttl, 7);
        let other = format!("{top}[gateway]\nlease-ttl = 8\nmax-inflight = 9\n");
        assert_eq!(settings(&other, &[]).unwrap().cluster.lease_ttl, 7);
        let own = format!("{top}[worker]\nlease-ttl = 8\n");
        assert_eq!(settings(&own, &[]).unwrap().cluster.lease_ttl, 8);
    }

    #[test]
    fn arrays_switches_and_texts_like_flags_are_taken() {
        let text = "[worker]\ntransports = ['grpc']\nspeculate = true\nchat-template = '--model'\n\
                    api-key = ['a', 'b']\n";
        let settings = settings(text, &["--max-waiting", "8"]).unwrap();
        assert_eq!(settings.transports, ["grpc"]);
        assert!(settings.speculate);
        assert_eq!(settings.chat_template.as_deref(), Some("--model"));
        assert_eq!(settings.model, None);
        assert_eq!(settings.api_key, ["a", "b"]);
        assert_eq!(settings.max_waiting, 8);
    }

    #[test]
    fn what_a_flag_needs_may_be_in_the_file_and_the_other_way_round() {
        let error = settings("[worker]\nmodel = 'm'\n", &[]).unwrap_err();
        assert!(error.contains("--chat-template"), "{error}");
        let both = "[worker]\nmodel = 'm'\nchat-template = 't'\n";
        assert!(settings(both, &[]).is_ok());
        assert!(settings("[worker]\nchat-template = 't'\n", &["--model", "m"]).is_ok());
        assert!(settings("[worker]\nmodel = 'm'\n", &["--chat-template", "t"]).is_ok());
        let error = program().merge(vec!["baton-worker".into()]).map(drop).unwrap_err();
        assert!(matches!(error, Stop::Clap(error) if error.to_string().contains("--role")));
    }

    #[test]
    fn what_is_wrong_names_key_file_and_line() {
        for (text, expected) in [
            (
                "[worker]\nmax-waiting = 'x'\n",
                "`max-waiting` in [worker] (FILE:2): expected an integer, found a string",
            ),
            ("lease-ttl = 0\n", "`lease-ttl` (FILE:1): 0 is not in 1..=3600"),
            // Also where something else counts.
            ("lease-ttl = 0\n[worker]\nlease-ttl = 1\n", "`lease-ttl` (FILE:1): 0 is not in"),
            ("[gateway]\nlisten-on = 'x'\n", "unknown key `listen-on` in [gateway] (FILE:2);"),
            ("[worker.model]\n", "`model` in [worker] (FILE:1): a table where a value"),
            (
                "[worker]\napi-key = ['…']\n",
                "`api-key` in [worker] (FILE:2): `baton config` shows no secrets",
            ),
        ] {
            let error = settings(text, &[]).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
        let missing = ["baton-worker", "--config", "/no/such.toml", "--role", "decode"];
        let missing = program().merge(missing.map(OsString::from).into()).map(drop).unwrap_err();
        let named = |text: &str| text.starts_with("--config /no/such.toml cannot be read: ");
        assert!(matches!(missing, Stop::File(text) if named(&text)));
    }

    #[test]
    fn a_file_with_secrets_that_all_may_read_is_told() {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(b"[worker]\napi-key = ['hush']\n").unwrap();
        let arguments = |flags: &[&str]| -> Vec<OsString> {
            let start = ["baton-worker", "--role", "x", "--config", file.path().to_str().unwrap()];
            start.iter().chain(flags).map(OsString::from).collect()
        };
        let warning = |flags: &[&str]| program().merge(arguments(flags)).unwrap().warning;
        assert_eq!(warning(&[]), None, "only its owner may read it");
        let mode = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(file.path(), mode).unwrap();
        assert!(warning(&[]).unwrap().contains("chmod o-r"));
        assert_eq!(warning(&["--api-key", "x"]), None, "the file's is not used");
    }
}
