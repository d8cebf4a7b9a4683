//! The file's JSON schema, made from clap's definitions.

use clap::Command;
use serde_json::{Map, Value, json};

use super::keys;
use super::setting::Setting;

/// What the hidden flag is given for it.
pub const WANTED: &str = "schema";

/// The schema of a program's table. What all daemons have is described at the file's top.
pub fn table(command: &Command) -> Value {
    let common: Vec<String> = keys::common().into_iter().map(|setting| setting.key).collect();
    let property = |setting: Setting| {
        let schema = match common.contains(&setting.key) {
            true => json!({"$ref": format!("#/properties/{}", setting.key)}),
            false => setting.schema(),
        };
        (setting.key, schema)
    };
    let properties: Map<String, Value> = Setting::all(command).into_iter().map(property).collect();
    let about = command.get_about().map(ToString::to_string);
    json!({
        "description": about,
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

/// The schema of a file with these tables.
pub fn file(tables: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let common = keys::common().into_iter().map(|setting| {
        let schema = setting.schema();
        (setting.key, schema)
    });
    let tables = tables.into_iter().map(|(name, schema)| (name.to_owned(), schema));
    let properties: Map<String, Value> = common.chain(tables).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of Baton",
        "description": "The file of --config, in TOML. Keys at the top are for all programs; \
                        a table's own win for its program.",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::daemon::ClusterArgs;

    #[derive(Debug, clap::Parser)]
    /// A worker.
    struct Settings {
        #[arg(long)]
        threads: Option<usize>,
        #[command(flatten)]
        cluster: ClusterArgs,
    }

    #[test]
    fn tables_refer_to_what_they_share_and_take_nothing_else() {
        let table = table(&Settings::command());
        assert_eq!(table["description"], "A worker");
        assert_eq!(table["properties"]["threads"]["type"], "integer");
        assert_eq!(table["properties"]["lease-ttl"], json!({"$ref": "#/properties/lease-ttl"}));
        assert_eq!(table["additionalProperties"], false);
        assert!(table["properties"].get("config").is_none());
        let file = file([("worker", table)]);
        assert_eq!(file["properties"]["lease-ttl"]["default"], 5);
        assert_eq!(file["properties"]["worker"]["type"], "object");
        assert_eq!(file["additionalProperties"], false);
    }
}
