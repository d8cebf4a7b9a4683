//! One setting, as clap's definition of its flag says it.

use std::any::TypeId;
use std::error::Error as _;
use std::ffi::OsStr;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command, Id};
use serde_json::{Value, json};
use toml_edit::Value as TomlValue;

use super::secret;

/// The flag that names the file; no setting of it.
pub(super) const FILE_FLAG: &str = "config";

/// A flag that may be in the file.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    /// Its key: the flag's name.
    pub(super) key: String,
    arg: Arg,
    kind: Kind,
}

/// What its values are.
#[derive(Clone, Debug)]
enum Kind {
    /// A flag without a value: it is there or not.
    Switch,
    Integer {
        signed: bool,
    },
    Number,
    Choice(Vec<String>),
    Text,
}

impl Kind {
    fn of(arg: &Arg) -> Self {
        let parser = arg.get_value_parser();
        if let Some(values) = parser.possible_values() {
            let shown = values.filter(|value| !value.is_hide_set());
            return Self::Choice(shown.map(|value| value.get_name().to_owned()).collect());
        }
        let parsed = parser.type_id();
        let is = |types: &[TypeId]| types.iter().any(|of| parsed == *of);
        let unsigned = [
            TypeId::of::<u8>(),
            TypeId::of::<u16>(),
            TypeId::of::<u32>(),
            TypeId::of::<u64>(),
            TypeId::of::<usize>(),
        ];
        let signed = [
            TypeId::of::<i8>(),
            TypeId::of::<i16>(),
            TypeId::of::<i32>(),
            TypeId::of::<i64>(),
            TypeId::of::<isize>(),
        ];
        if is(&unsigned) || is(&signed) {
            Self::Integer { signed: is(&signed) }
        } else if is(&[TypeId::of::<f32>(), TypeId::of::<f64>()]) {
            Self::Number
        } else {
            Self::Text
        }
    }

    fn schema(&self) -> Value {
        match self {
            Self::Switch => json!({"type": "boolean"}),
            Self::Integer { signed: true } => json!({"type": "integer"}),
            Self::Integer { signed: false } => json!({"type": "integer", "minimum": 0}),
            Self::Number => json!({"type": "number"}),
            Self::Choice(names) => {
                let numbers = names.iter().filter_map(|name| name.parse::<i64>().ok());
                let names = names.iter().map(|name| json!(name));
                json!({"enum": names.chain(numbers.map(Value::from)).collect::<Vec<_>>()})
            }
            Self::Text => json!({"type": "string"}),
        }
    }

    /// What the flag would be given for a value of the file, if it is of this kind.
    fn text(&self, value: &TomlValue) -> Option<String> {
        match (self, value) {
            (Self::Integer { .. } | Self::Number, TomlValue::Integer(number)) => {
                Some(number.value().to_string())
            }
            (Self::Number, TomlValue::Float(number)) => Some(number.value().to_string()),
            (Self::Choice(names), TomlValue::Integer(number)) => {
                Some(number.value().to_string()).filter(|name| names.contains(name))
            }
            (Self::Choice(_) | Self::Text, TomlValue::String(text)) => Some(text.value().clone()),
            _ => None,
        }
    }

    /// What the flag was given, as JSON and TOML have it.
    fn value(&self, text: &str) -> Value {
        match self {
            Self::Switch => json!(text == "true"),
            Self::Integer { .. } => text.parse::<i64>().map_or_else(|_| json!(text), Value::from),
            Self::Number => text.parse::<f64>().map_or_else(|_| json!(text), Value::from),
            Self::Choice(_) | Self::Text => json!(text),
        }
    }
}

impl Setting {
    /// All of a program.
    pub(super) fn all(command: &Command) -> Vec<Self> {
        command.get_arguments().filter_map(Self::new).collect()
    }

    fn new(arg: &Arg) -> Option<Self> {
        let key = arg.get_long().filter(|key| *key != FILE_FLAG && !arg.is_hide_set())?;
        let kind = match arg.get_action() {
            ArgAction::SetTrue => Kind::Switch,
            ArgAction::Set | ArgAction::Append => Kind::of(arg),
            _ => return None,
        };
        Some(Self { key: key.to_owned(), arg: arg.clone(), kind })
    }

    /// clap's name of it.
    pub(super) fn id(&self) -> &str {
        self.arg.get_id().as_str()
    }

    /// The variable that sets it too.
    pub(super) fn variable(&self) -> Option<&str> {
        self.arg.get_env().and_then(OsStr::to_str)
    }

    /// Whether its values are shown to nobody. What is hidden but no plain text, such as a URL,
    /// loses its password alone.
    pub(super) fn is_secret(&self) -> bool {
        self.arg.is_hide_env_values_set()
            && self.arg.get_value_parser().type_id() == TypeId::of::<String>()
    }

    fn is_list(&self) -> bool {
        matches!(self.arg.get_action(), ArgAction::Append)
    }

    /// Whether the flag may be given without a value.
    fn is_optional(&self) -> bool {
        let values = self.arg.get_num_args();
        !matches!(self.kind, Kind::Switch) && values.is_some_and(|values| values.min_values() == 0)
    }

    /// The flags that say what the file's value says, or what is wrong with it.
    pub(super) fn flags(&self, value: &TomlValue) -> Result<Vec<String>, String> {
        let key = &self.key;
        let wrong = |found: &TomlValue| {
            let found = found.type_name();
            let article = if found.starts_with(['a', 'i']) { "an" } else { "a" };
            format!("expected {}, found {article} {found}", self.expected())
        };
        let switch = matches!(self.kind, Kind::Switch) || self.is_optional();
        let flags = match value {
            TomlValue::Boolean(on) if switch => {
                on.value().then(|| format!("--{key}")).into_iter().collect()
            }
            TomlValue::Array(array) if self.is_list() => {
                if array.is_empty() {
                    return Err("expected at least one value; leave it out for the default".into());
                }
                let each = array.iter().map(|item| {
                    let text = self.kind.text(item).ok_or_else(|| wrong(item))?;
                    match self.arg.get_value_delimiter().filter(|it| text.contains(*it)) {
                        Some(it) => Err(format!("a value in an array must not contain `{it}`")),
                        None => Ok(format!("--{key}={text}")),
                    }
                });
                each.collect::<Result<Vec<_>, _>>()?
            }
            _ => {
                let text = self.kind.text(value).ok_or_else(|| wrong(value))?;
                vec![format!("--{key}={text}")]
            }
        };
        self.check(&flags).map(|()| flags)
    }

    fn expected(&self) -> String {
        let one = match &self.kind {
            Kind::Switch => "true or false".to_owned(),
            Kind::Integer { .. } => "an integer".to_owned(),
            Kind::Number => "a number".to_owned(),
            Kind::Choice(names) => format!("one of {}", names.join(", ")),
            Kind::Text => "a string".to_owned(),
        };
        match (self.is_list(), self.is_optional()) {
            (true, _) => format!("{one}, or an array of such"),
            (_, true) => format!("{one}, true or false"),
            _ => one,
        }
    }

    /// Has clap read the flags, with nothing beside them.
    fn check(&self, flags: &[String]) -> Result<(), String> {
        let nothing = || Resettable::<Id>::Reset;
        let alone = self.arg.clone().required(false).env(None::<&'static str>);
        let alone = alone.requires(nothing()).conflicts_with(nothing());
        let command = Command::new("file").no_binary_name(true).arg(alone);
        let Err(error) = command.try_get_matches_from(flags) else { return Ok(()) };
        Err(match (error.source(), error.get(ContextKind::ValidValue)) {
            (Some(reason), _) => reason.to_string(),
            (None, Some(ContextValue::Strings(names))) if !names.is_empty() => {
                format!("expected one of {}", names.join(", "))
            }
            _ => error.to_string().lines().next().unwrap_or_default().replace("error: ", ""),
        })
    }

    /// What the flag was given, as JSON and TOML have it, without secrets.
    pub(super) fn shown<'a>(&self, texts: impl IntoIterator<Item = &'a OsStr>) -> Value {
        let bare = match self.arg.is_hide_env_values_set() {
            true => secret::without_parameters,
            false => secret::without_password,
        };
        let one = |text: &OsStr| {
            let text = text.to_string_lossy();
            match self.is_secret() {
                true => json!(secret::HIDDEN),
                false => self.kind.value(&bare(&text)),
            }
        };
        let mut all = texts.into_iter().map(one);
        match self.is_list() {
            true => Value::Array(all.collect()),
            // Without a value: the flag alone.
            false => all.next().unwrap_or(Value::Bool(true)),
        }
    }

    /// Its JSON schema.
    pub(super) fn schema(&self) -> Value {
        let one = self.kind.schema();
        let mut schema = match (self.is_list(), self.is_optional()) {
            (true, _) => {
                let array = json!({"type": "array", "items": one, "minItems": 1});
                json!({"anyOf": [{"type": "string"}, array]})
            }
            (_, true) => json!({"anyOf": [{"type": "boolean"}, one]}),
            _ => one,
        };
        let help = self.arg.get_long_help().or_else(|| self.arg.get_help());
        if let Some(help) = help {
            schema["description"] = json!(help.to_string());
        }
        let defaults = self.arg.get_default_values();
        if !defaults.is_empty() && !self.arg.is_hide_default_value_set() {
            let split = |text: &OsStr| -> Vec<String> {
                let text = text.to_string_lossy();
                match self.arg.get_value_delimiter() {
                    Some(delimiter) => text.split(delimiter).map(str::to_owned).collect(),
                    None => vec![text.into_owned()],
                }
            };
            let defaults: Vec<String> =
                defaults.iter().flat_map(|text| split(text.as_os_str())).collect();
            schema["default"] = self.shown(defaults.iter().map(OsStr::new));
        }
        schema
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args, ValueEnum};

    use super::*;

    #[derive(Clone, Debug, ValueEnum)]
    enum Bits {
        #[value(name = "16")]
        Sixteen,
        #[value(name = "8")]
        Eight,
    }

    /// A flag of every kind.
    #[derive(Debug, Args)]
    struct Flags {
        /// Whether.
        #[arg(long)]
        switch: bool,
        /// How many.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10))]
        count: u64,
        #[arg(long, allow_negative_numbers = true)]
        signed: Option<i64>,
        #[arg(long)]
        share: Option<f64>,
        #[arg(long, default_value = "16")]
        bits: Bits,
        #[arg(long)]
        name: Option<String>,
        #[arg(long, value_delimiter = ',', default_value = "a,b")]
        names: Vec<String>,
        #[arg(long)]
        maybe: Option<Option<String>>,
        #[arg(long = "key", value_delimiter = ',', hide_env_values = true)]
        keys: Vec<String>,
        #[arg(long, hide_env_values = true, value_parser = |text: &str| Ok::<_, String>(text.len()))]
        length: Option<usize>,
        #[arg(long, hide = true)]
        hidden: bool,
    }

    fn setting(key: &str) -> Setting {
        let all = Setting::all(&Flags::augment_args(Command::new("test")));
        all.into_iter().find(|setting| setting.key == key).unwrap()
    }

    fn flags(key: &str, toml: &str) -> Result<Vec<String>, String> {
        setting(key).flags(&toml.parse().unwrap())
    }

    #[test]
    fn values_of_the_file_become_flags() {
        for (key, toml, expected) in [
            ("switch", "true", &["--switch"][..]),
            ("switch", "false", &[]),
            ("count", "7", &["--count=7"]),
            ("count", "0x0A", &["--count=10"]),
            ("signed", "-1", &["--signed=-1"]),
            ("share", "95", &["--share=95"]),
            ("share", "99.5", &["--share=99.5"]),
            ("bits", "8", &["--bits=8"]),
            ("bits", "'8'", &["--bits=8"]),
            ("name", "'--x'", &["--name=--x"]),
            ("name", "''", &["--name="]),
            ("names", "['a', '-b']", &["--names=a", "--names=-b"]),
            ("names", "'a,b'", &["--names=a,b"]),
            ("maybe", "true", &["--maybe"]),
            ("maybe", "false", &[]),
            ("maybe", "'here'", &["--maybe=here"]),
        ] {
            assert_eq!(flags(key, toml).unwrap(), expected, "{key} = {toml}");
        }
    }

    #[test]
    fn a_value_of_another_type_or_range_is_told_with_what_is_expected() {
        for (key, toml, parts) in [
            ("switch", "'yes'", &["true or false", "a string"][..]),
            ("count", "'7'", &["an integer", "a string"]),
            ("count", "0", &["0 is not in 1..=10"]),
            ("count", "1.5", &["an integer", "a float"]),
            ("share", "true", &["a number", "a boolean"]),
            ("bits", "4", &["16, 8", "an integer"]),
            ("bits", "'4'", &["16, 8"]),
            ("name", "5", &["a string", "an integer"]),
            ("name", "['x']", &["a string", "an array"]),
            ("names", "[1]", &["a string", "an integer"]),
            ("names", "[]", &["at least one"]),
            ("names", "['a,b']", &["`,`"]),
            ("name", "{ x = 1 }", &["a string", "an inline table"]),
        ] {
            let error = flags(key, toml).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{key} = {toml}: {error}");
            }
        }
    }

    #[test]
    fn the_schema_says_types_defaults_and_help() {
        let schema = |key: &str| setting(key).schema();
        assert_eq!(
            schema("count"),
            json!({"type": "integer", "minimum": 0, "description": "How many", "default": 5})
        );
        assert_eq!(schema("signed"), json!({"type": "integer"}));
        assert_eq!(schema("share"), json!({"type": "number"}));
        assert_eq!(schema("bits"), json!({"enum": ["16", "8", 16, 8], "default": "16"}));
        assert_eq!(schema("switch")["type"], "boolean");
        let array = json!({"type": "array", "items": {"type": "string"}, "minItems": 1});
        let names = json!({"anyOf": [{"type": "string"}, array], "default": ["a", "b"]});
        assert_eq!(schema("names"), names);
        assert_eq!(schema("maybe"), json!({"anyOf": [{"type": "boolean"}, {"type": "string"}]}));
    }

    #[test]
    fn secrets_are_hidden_and_hidden_flags_are_no_settings() {
        let shown = |key: &str, texts: &[&str]| setting(key).shown(texts.iter().map(OsStr::new));
        assert_eq!(shown("key", &["hush-1", "hush-2"]), json!(["…", "…"]));
        assert_eq!(shown("names", &["http://u:hush@h/x"]), json!(["http://***@h/x"]));
        assert_eq!(shown("count", &["7"]), json!(7));
        assert_eq!(shown("maybe", &[]), json!(true));
        assert!(setting("key").is_secret() && !setting("length").is_secret());
        let all = Setting::all(&Flags::augment_args(Command::new("test")));
        assert!(all.iter().all(|setting| setting.key != "hidden"));
    }
}
