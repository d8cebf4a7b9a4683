//! Settings in force, as a file: it can be used again, and says where each setting is from.

use std::collections::BTreeSet;

use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::setting::Setting;

/// What the hidden flag is given for it.
pub const WANTED: &str = "values";

/// One setting in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    key: String,
    /// `None` when it is not set.
    value: Option<Value>,
    source: Source,
    /// Whether all daemons have it.
    common: bool,
}

/// Where a setting is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Source {
    Flag,
    Variable(String),
    File,
    Default,
}

impl Shown {
    pub(super) fn new(
        setting: &Setting,
        matches: &ArgMatches,
        from_file: bool,
        common: bool,
    ) -> Self {
        let source = match matches.value_source(setting.id()) {
            _ if from_file => Source::File,
            Some(ValueSource::CommandLine) => Source::Flag,
            Some(ValueSource::EnvVariable) => {
                Source::Variable(setting.variable().unwrap_or_default().to_owned())
            }
            _ => Source::Default,
        };
        let texts = matches.get_raw(setting.id());
        Self {
            key: setting.key.clone(),
            value: texts.map(|texts| setting.shown(texts)),
            source,
            common,
        }
    }

    fn line(&self) -> String {
        let Self { key, value, source, .. } = self;
        let Some(value) = value else { return format!("# {key} is not set\n") };
        let value = toml(value);
        match source {
            Source::Flag => format!("{key} = {value}  # flag\n"),
            Source::Variable(name) => format!("{key} = {value}  # {name}\n"),
            Source::File => format!("{key} = {value}  # file\n"),
            Source::Default => format!("# {key} = {value}  # default\n"),
        }
    }
}

/// The settings of several programs as one file. What is the same for all is at its top; defaults
/// are comments.
pub fn file(tables: &[(&str, Vec<Shown>)]) -> String {
    let all = || tables.iter().flat_map(|(_, shown)| shown);
    let shared = |shown: &Shown| {
        shown.common && all().filter(|it| it.key == shown.key).all(|it| it == shown)
    };
    let mut top = BTreeSet::new();
    let mut text: String =
        all().filter(|it| shared(it) && top.insert(&it.key)).map(Shown::line).collect();
    for (name, shown) in tables {
        text.push_str(&format!("\n[{name}]\n"));
        text.extend(shown.iter().filter(|it| !shared(it)).map(Shown::line));
    }
    text
}

fn toml(value: &Value) -> String {
    match value {
        Value::String(text) => toml_edit::Value::from(text.as_str()).to_string(),
        Value::Array(all) => format!("[{}]", all.iter().map(toml).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(key: &str, value: Value, source: Source, common: bool) -> Shown {
        Shown { key: key.into(), value: Some(value), source, common }
    }

    #[test]
    fn what_all_share_is_at_the_top_and_says_where_it_is_from() {
        let unset = Shown { value: None, ..shown("model", json!(0), Source::Default, false) };
        let etcd = shown("etcd", json!(["a", "b\"'\\"]), Source::File, true);
        let lease = |seconds: u64| shown("lease-ttl", json!(seconds), Source::Default, true);
        let gateway = vec![etcd.clone(), lease(5), shown("key", json!(["…"]), Source::File, false)];
        let variable = Source::Variable("BATON_SHARE".into());
        let worker = vec![etcd, lease(6), unset, shown("share", json!(95.0), variable, false)];
        let text = file(&[("gateway", gateway), ("worker", worker)]);
        let lines: Vec<&str> = text.lines().collect();
        let (etcd, rest) = lines.split_first().unwrap();
        let etcd: toml_edit::DocumentMut = etcd.parse().unwrap();
        assert_eq!(etcd["etcd"].as_array().unwrap().get(1).unwrap().as_str(), Some("b\"'\\"));
        assert_eq!(
            rest,
            [
                "",
                "[gateway]",
                "# lease-ttl = 5  # default",
                "key = [\"…\"]  # file",
                "",
                "[worker]",
                "# lease-ttl = 6  # default",
                "# model is not set",
                "share = 95.0  # BATON_SHARE",
            ]
        );
    }
}
