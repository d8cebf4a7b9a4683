//! Which keys the tables have: what is not among them is a mistake, for which the nearest is named.
//!
//! A program knows its own settings from clap. Those of the others, whose code it does not hold, it
//! has from the schema that is made of them all; a test keeps it current.

use clap::Args as _;
use serde_json::{Map, Value};

use super::setting::Setting;
use crate::daemon::ClusterArgs;

/// How alike two names must be for one to be meant by the other, as clap has it.
const ALIKE: f64 = 0.7;

/// The keys of the top and of each table.
pub(super) struct Keys {
    top: Vec<String>,
    tables: Vec<(String, Vec<String>)>,
}

/// Settings that all daemons have; they may be at the file's top.
pub(super) fn common() -> Vec<Setting> {
    Setting::all(&ClusterArgs::augment_args(clap::Command::new("common")))
}

impl Keys {
    /// As they are for the program whose `table` has these settings.
    pub(super) fn new(schema: &str, table: &str, settings: &[Setting]) -> Self {
        let schema: Value = serde_json::from_str(schema).unwrap_or_default();
        let properties =
            |of: &Value| -> Option<Map<String, Value>> { of["properties"].as_object().cloned() };
        let names = |of: Map<String, Value>| of.into_iter().map(|(key, _)| key).collect();
        let others = properties(&schema).unwrap_or_default().into_iter();
        let others = others.filter(|(name, _)| name != table);
        let others = others.filter_map(|(name, of)| Some((name, names(properties(&of)?))));
        let own = (table.to_owned(), settings.iter().map(|it| it.key.clone()).collect());
        Self {
            top: common().into_iter().map(|setting| setting.key).collect(),
            tables: std::iter::once(own).chain(others).collect(),
        }
    }

    pub(super) fn has_table(&self, name: &str) -> bool {
        self.tables.iter().any(|(table, _)| table == name)
    }

    /// Whether a table, or the top, has a key.
    pub(super) fn has(&self, table: Option<&str>, key: &str) -> bool {
        self.of(table).iter().any(|known| known == key)
    }

    /// What to do about a key that is not there.
    pub(super) fn way_out(&self, table: Option<&str>, key: &str) -> String {
        let having = self.tables.iter().filter(|(_, keys)| keys.iter().any(|known| known == key));
        let having: Vec<String> = having.map(|(table, _)| format!("[{table}]")).collect();
        match having.as_slice() {
            [] => {}
            [only] => return format!("it belongs in {only}"),
            [others @ .., last] => return format!("it belongs in {} or {last}", others.join(", ")),
        }
        let tables = self.tables.iter().map(|(name, _)| name).filter(|_| table.is_none());
        let alike = self.of(table).iter().chain(tables);
        let alike = alike.map(|known| (strsim::jaro(known, key), known));
        let nearest = alike.filter(|(alike, _)| *alike > ALIKE).max_by(|a, b| a.0.total_cmp(&b.0));
        match nearest {
            Some((_, known)) => format!("did you mean `{known}`?"),
            None => "`baton config --schema` has all there are".into(),
        }
    }

    fn of(&self, table: Option<&str>) -> &[String] {
        let Some(name) = table else { return &self.top };
        let found = self.tables.iter().find(|(table, _)| table == name);
        found.map_or(&[], |(_, keys)| keys)
    }

    #[cfg(test)]
    pub(super) fn of_tables<const N: usize>(tables: [(&str, &[&str]); N]) -> Self {
        let keys = |keys: &[&str]| keys.iter().map(|&key| key.to_owned()).collect();
        let tables = tables.map(|(name, of)| (name.to_owned(), keys(of)));
        Self { top: keys(&["etcd", "lease-ttl"]), tables: tables.into() }
    }
}
