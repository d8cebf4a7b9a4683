//! The JSON schema that an answer must follow when the request demands a call.
//!
//! The forms are those that vLLM constrains to. [`JsonList`](super::ToolSyntax::JsonList) and
//! [`Named`](super::ToolSyntax::Named) read them; [`OutputFormat::new`](super::OutputFormat::new)
//! chooses.

use serde_json::{Map, Value, json};

use crate::api::tools::{ToolChoice, ToolSchema, Tools};

/// The schema for a request's tools; `None` if the model may answer without a call.
///
/// * Required: a list of at least one `{"name": …, "parameters": …}`, at most one if calls are not
///   parallel.
/// * Named: the function's arguments.
pub fn constraint(tools: &Tools) -> Option<Value> {
    match &tools.choice {
        ToolChoice::None | ToolChoice::Auto => None,
        ToolChoice::Required => Some(list(tools)),
        ToolChoice::Named(name) => {
            let tool = tools.list.iter().find(|tool| tool.name == *name)?;
            Some(arguments(tool))
        }
    }
}

fn list(tools: &Tools) -> Value {
    let mut definitions = Map::new();
    let calls: Vec<Value> = tools
        .list
        .iter()
        .enumerate()
        .map(|(at, tool)| {
            let mut schema = arguments(tool);
            // References are paths from the root, so a schema that has some moves with all its
            // definitions, and the paths with it.
            let place = format!("#/$defs/tool{at}");
            if rebase(&mut schema, &place) {
                definitions.insert(format!("tool{at}"), schema);
                schema = json!({"$ref": place});
            }
            json!({
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": false,
            })
        })
        .collect();
    let mut list = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
    if !tools.parallel {
        list["maxItems"] = 1.into();
    }
    if !definitions.is_empty() {
        list["$defs"] = definitions.into();
    }
    list
}

/// The schema of a function's arguments, which are an object.
fn arguments(tool: &ToolSchema) -> Value {
    let Some(Value::Object(schema)) = &tool.parameters else {
        return json!({"type": "object", "properties": {}, "additionalProperties": false});
    };
    let mut schema = schema.clone();
    // These would give references another root.
    schema.shift_remove("$id");
    schema.shift_remove("$schema");
    let elsewhere = ["type", "$ref", "anyOf", "oneOf", "allOf"];
    if !elsewhere.iter().any(|key| schema.contains_key(*key)) {
        schema.insert("type".into(), "object".into());
    }
    schema.into()
}

/// Lets the references within a schema start from `place`; whether there are any.
fn rebase(schema: &mut Value, place: &str) -> bool {
    match schema {
        Value::Object(fields) => {
            let mut any = false;
            for (key, value) in fields {
                any |= match (key.as_str(), value) {
                    ("$ref", Value::String(path)) => match path.strip_prefix('#') {
                        Some(rest) => {
                            *path = format!("{place}{rest}");
                            true
                        }
                        None => false,
                    },
                    // Values, not schemas.
                    ("const" | "enum" | "default" | "examples", _) => false,
                    // The keys are names here, and each value a schema.
                    (
                        "properties" | "patternProperties" | "dependentSchemas" | "$defs"
                        | "definitions",
                        Value::Object(schemas),
                    ) => schemas.values_mut().fold(false, |any, value| rebase(value, place) | any),
                    (_, value) => rebase(value, place),
                };
            }
            any
        }
        Value::Array(items) => items.iter_mut().fold(false, |any, item| rebase(item, place) | any),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(list: &[(&str, Option<Value>)], choice: ToolChoice, parallel: bool) -> Tools {
        let list = list
            .iter()
            .map(|(name, parameters)| ToolSchema {
                name: (*name).into(),
                description: None,
                parameters: parameters.clone(),
                strict: false,
            })
            .collect();
        Tools { list, choice, parallel, raw: Vec::new() }
    }

    #[test]
    fn required_is_a_list_of_calls() {
        let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let list = [("f", Some(parameters.clone())), ("g", None)];
        let schema = constraint(&tools(&list, ToolChoice::Required, true)).unwrap();
        let call = |name: &str, parameters: Value| {
            json!({
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": false,
            })
        };
        let none = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let calls = [call("f", parameters), call("g", none)];
        let expected = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
        assert_eq!(schema, expected);
        let schema = constraint(&tools(&list, ToolChoice::Required, false)).unwrap();
        assert_eq!(schema["maxItems"], 1);
        assert_eq!(schema["minItems"], 1);
    }

    #[test]
    fn every_reference_still_leads_to_its_definition() {
        // Two tools with definitions of one name, one that holds itself, and a property that is
        // called like a keyword.
        let one = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": "https://example.org/one",
            "properties": {
                "p": {"$ref": "#/$defs/P"},
                "again": {"$ref": "#/properties/p"},
                "default": {"$ref": "#/$defs/P"},
                "fixed": {"const": {"$ref": "#/$defs/P"}},
            },
            "$defs": {"P": {"type": "string"}},
        });
        let two = json!({
            "$ref": "#/definitions/P",
            "definitions": {
                "P": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
            },
        });
        let list = [("f", Some(one)), ("g", Some(two))];
        let schema = constraint(&tools(&list, ToolChoice::Required, true)).unwrap();
        let mut seen = Vec::new();
        let mut follow = vec![&schema];
        while let Some(value) = follow.pop() {
            match value {
                Value::Object(fields) => {
                    if let Some(path) = fields.get("$ref").and_then(Value::as_str) {
                        let path = path.strip_prefix('#').unwrap();
                        seen.push((path.to_owned(), schema.pointer(path).cloned()));
                    }
                    follow.extend(fields.iter().filter(|(key, _)| *key != "const").map(|(_, v)| v));
                }
                Value::Array(items) => follow.extend(items),
                _ => {}
            }
        }
        seen.sort_by(|a, b| a.0.cmp(&b.0));
        seen.dedup();
        let paths: Vec<&str> = seen.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/$defs/tool0",
                "/$defs/tool0/$defs/P",
                "/$defs/tool0/properties/p",
                "/$defs/tool1",
                "/$defs/tool1/definitions/P",
            ]
        );
        assert!(seen.iter().all(|(_, target)| target.is_some()));
        assert_eq!(seen[1].1, Some(json!({"type": "string"})));
        assert_eq!(seen[4].1.as_ref().unwrap()["type"], "object");
        let fixed = &schema["$defs"]["tool0"]["properties"]["fixed"]["const"];
        assert_eq!(*fixed, json!({"$ref": "#/$defs/P"}));
        assert_eq!(schema["$defs"]["tool0"].get("$id"), None);
        assert_eq!(schema["$defs"]["tool0"]["type"], "object");
        assert_eq!(schema["$defs"]["tool1"].get("type"), None);
    }

    #[test]
    fn named_is_the_arguments() {
        let parameters = json!({
            "type": "object",
            "properties": {"p": {"$ref": "#/$defs/P"}},
            "$defs": {"P": {"type": "string"}},
        });
        let list = [("f", None), ("g", Some(parameters.clone()))];
        let named = constraint(&tools(&list, ToolChoice::Named("g".into()), true)).unwrap();
        assert_eq!(named, parameters);
        assert_eq!(constraint(&tools(&list, ToolChoice::Auto, true)), None);
        assert_eq!(constraint(&tools(&list, ToolChoice::None, true)), None);
    }
}
