//! What clients send and what they get: types, defaults and checks, without any I/O.
//!
//! A body is read in two steps. [`Body::parse`] makes JSON of it; [`Body::read`] takes the fields
//! of a type out of it, as often as needed, and remembers which nobody asked for. So a field
//! belongs to one struct, and routes share structs.

pub mod chat;
pub mod completion;
pub mod envelope;
pub mod gbnf;
pub mod logprobs;
pub mod messages;
pub mod requests;
pub mod responses;
pub mod rules;
pub mod sampling;
pub mod schema;
pub mod sse;
pub mod structured;
pub mod tokenize;
pub mod tools;
pub mod usage;

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// A request's body.
#[derive(Debug)]
pub struct Body {
    fields: Value,
    /// Fields that no type has taken.
    unknown: BTreeSet<String>,
}

impl Body {
    /// Reads an object.
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let mut fields: Value = serde_json::from_slice(bytes).map_err(|error| {
            ApiError::malformed(format!("JSON decode error: the body is not valid JSON: {error}."))
        })?;
        let Value::Object(object) = &fields else {
            return Err(ApiError::malformed("The body must be a JSON object."));
        };
        let unknown = object.keys().cloned().collect();
        integral(&mut fields);
        Ok(Self { fields, unknown })
    }

    /// A body that another form was turned into.
    pub fn new(fields: Map<String, Value>) -> Self {
        Self { unknown: fields.keys().cloned().collect(), fields: fields.into() }
    }

    /// Sets a field.
    pub fn set(&mut self, field: &str, value: Value) {
        self.unknown.insert(field.to_owned());
        self.fields[field] = value;
    }

    /// Takes the fields of `T`. An error names the field at fault.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        let mut ignored = BTreeSet::new();
        let mut track = serde_path_to_error::Track::new();
        let fields = serde_path_to_error::Deserializer::new(&self.fields, &mut track);
        // Only the top level is of interest: a path without separators.
        let read: Result<T, _> = serde_ignored::deserialize(fields, |path| {
            ignored.insert(path.to_string());
        });
        let taken = read.map_err(|error| {
            let path = track.path().to_string();
            ApiError::malformed(format!("`{path}`: {error}.")).param(path)
        })?;
        self.unknown.retain(|field| ignored.contains(field));
        Ok(taken)
    }

    /// A field as it came; `None` also for `null`.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Refuses fields that ask for what is not built, unless their value asks for nothing.
    pub fn refuse_unsupported(&mut self) -> Result<(), ApiError> {
        // A body has few fields that no type takes, and mostly none.
        let refused = self.unknown.iter().find(|field| {
            let unsupported = UNSUPPORTED.iter().find(|(name, _)| name == field);
            let value = self.get(field);
            unsupported
                .zip(value)
                .is_some_and(|((_, harmless), value)| !asks_nothing(harmless, value))
        });
        if let Some(field) = refused {
            return Err(ApiError::not_supported(field));
        }
        self.unknown.retain(|field| {
            let known = UNSUPPORTED.iter().any(|(name, _)| name == field);
            !known && !IGNORED.contains(&field.as_str())
        });
        Ok(())
    }

    /// Takes note that these fields change nothing on this route.
    pub fn ignore(&mut self, fields: &[&str]) {
        self.unknown.retain(|field| !fields.contains(&field.as_str()));
    }

    /// Fields that were neither used nor refused.
    pub fn unknown(&self) -> &BTreeSet<String> {
        &self.unknown
    }
}

/// Fields of the API that are not built, and the value, as JSON, that asks for nothing; so does
/// null.
pub const UNSUPPORTED: &[(&str, &str)] = &[
    ("audio", "null"),
    ("function_call", r#""none""#),
    ("functions", "[]"),
    ("logits_processors", "[]"),
    ("modalities", r#"["text"]"#),
    ("prompt_embeds", "null"),
    ("suffix", r#""""#),
    ("thinking_token_budget", "null"),
    ("use_beam_search", "false"),
];

/// Fields of the API that change nothing here.
pub const IGNORED: &[&str] = &[
    "best_of",
    "guided_decoding_backend",
    "length_penalty",
    "metadata",
    "prediction",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
    "user",
];

fn asks_nothing(harmless: &str, value: &Value) -> bool {
    serde_json::from_str(harmless).is_ok_and(|harmless: Value| harmless == *value)
}

/// Makes `1.0` the integer 1, as pydantic does for vLLM.
fn integral(value: &mut Value) {
    match value {
        Value::Number(number) => {
            // Below 2^53 every integral float is one integer.
            if let Some(float) = number.as_f64()
                && number.is_f64()
                && float.fract() == 0.0
                && float.abs() < 9_007_199_254_740_992.0
            {
                *value = Value::from(float as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(integral),
        Value::Object(fields) => fields.values_mut().for_each(integral),
        _ => {}
    }
}

/// A field that takes one string or a list of strings.
fn strings(field: &str, value: Option<&Value>) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::malformed(format!("`{field}` must be a string or a list of strings."));
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(one @ Value::String(_)) => std::slice::from_ref(one),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong().param(field)),
    };
    list.iter()
        .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| wrong().param(field)))
        .collect()
}

/// A list of token ids, each within the vocabulary.
fn token_ids(field: &str, list: &[Value], vocab_size: u32) -> Result<Vec<u32>, ApiError> {
    list.iter()
        .map(|item| {
            let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
            id.filter(|id| *id < vocab_size).ok_or_else(|| {
                let message = format!(
                    "`{field}` holds {item}, which is no token id: ids are integers from 0 to {}.",
                    vocab_size.saturating_sub(1)
                );
                ApiError::bad_value(field, message)
            })
        })
        .collect()
}

/// An object's fields, as JSON objects are built in replies.
fn object(fields: Value) -> Map<String, Value> {
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct A {
        a: Option<i64>,
    }

    #[derive(Debug, Deserialize)]
    struct B {
        b: Option<Vec<bool>>,
    }

    fn body(value: Value) -> Body {
        Body::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_no_type_takes_is_unknown() {
        let mut body = body(json!({"a": 1.0, "b": [true], "c": {"d": 1}, "user": "u"}));
        assert_eq!(body.read::<A>().unwrap().a, Some(1));
        assert_eq!(body.read::<B>().unwrap().b, Some(vec![true]));
        body.refuse_unsupported().unwrap();
        assert_eq!(body.unknown().iter().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn errors_name_the_place() {
        let error = body(json!({"b": [true, 5]})).read::<B>().unwrap_err();
        assert_eq!(error.body()["error"]["param"], "b[1]");
        let error = body(json!({"a": 1.5})).read::<A>().unwrap_err();
        assert_eq!(error.body()["error"]["param"], "a");
    }

    #[test]
    fn what_is_not_built_is_refused_unless_it_asks_for_nothing() {
        body(json!({"functions": [], "modalities": ["text"], "prompt_embeds": null}))
            .refuse_unsupported()
            .unwrap();
        let error = body(json!({"suffix": "x"})).refuse_unsupported().unwrap_err();
        assert_eq!(error.body()["error"]["param"], "suffix");
    }

    #[test]
    fn only_objects_are_bodies() {
        for bad in ["", "[]", "5", "{\"a\": 1,}", "{} {}", &"[".repeat(10_000)] {
            assert!(Body::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
