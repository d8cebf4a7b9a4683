//! What the document says of request bodies beyond their types: rules between fields, the shapes of
//! fields that the code handles as JSON values, and an example of each field that must be there.
//!
//! Each rule is the one that a check in this folder makes; what no JSON Schema can say (a length in
//! tokens, an id of the vocabulary, a name that another field has) is left to those checks.

use serde_json::{Map, Value, json};

use super::responses::request::INCLUDES;

/// Completes the schemas of a document.
pub fn complete(document: &mut Value) {
    let Some(Value::Object(schemas)) = document.pointer_mut("/components/schemas") else { return };
    for (name, more) in rules() {
        match schemas.get_mut(name) {
            Some(schema) => merge(schema, more),
            None => drop(schemas.insert(name.to_owned(), more)),
        }
    }
    for (name, schema) in schemas {
        if name.ends_with("Request") {
            absent_is_null(schema);
        }
    }
}

/// Objects are merged, anything else is replaced.
fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more,
    }
}

/// A field that may be null is as if it were absent then.
fn absent_is_null(schema: &mut Value) {
    let required = schema["required"].clone();
    let required = required.as_array().map_or(&[][..], Vec::as_slice);
    let Some(Value::Object(fields)) = schema.get_mut("properties") else { return };
    for (name, field) in fields {
        if !required.contains(&Value::from(name.as_str())) && takes_null(field) {
            field["default"] = Value::Null;
        }
    }
}

fn takes_null(schema: &Value) -> bool {
    let null = |list: &Value, is: &dyn Fn(&Value) -> bool| {
        list.as_array().is_some_and(|list| list.iter().any(is))
    };
    let restricted = ["type", "oneOf", "enum", "$ref"].iter().any(|key| schema.get(*key).is_some());
    !restricted
        || schema["type"] == "null"
        || null(&schema["type"], &|kind| kind == "null")
        || null(&schema["oneOf"], &|one| one["type"] == "null")
        || null(&schema["enum"], &Value::is_null)
}

fn rules() -> Vec<(&'static str, Value)> {
    let chat = all([sampling(), streams(), guided(), tools(), turns(), top_logprobs()]);
    let example = json!([{"role": "user", "content": "Say hello."}]);
    let messages = json!({"properties": {"messages": {"example": example}}});
    let one_turn = json!({"properties": {"model": {"example": "smollm2"}}});
    let anthropic = all([messages.clone(), one_turn, anthropic_tools()]);
    let prompt = json!({"properties": {"prompt": {"example": "Once upon a time"}}});
    vec![
        ("ChatRequest", all([chat, messages.clone()])),
        ("CompletionRequest", all([sampling(), streams(), guided(), prompt])),
        ("TokenizeRequest", all([messages.clone(), tools(), turns(), either()])),
        ("InvocationRequest", all([messages, invocation()])),
        ("DetokenizeRequest", json!({"properties": {"tokens": {"example": [1, 2, 3]}}})),
        (
            "MessagesRequest",
            all([
                anthropic.clone(),
                json!({"properties": {"max_tokens": {"type": "integer", "example": 8}}}),
            ]),
        ),
        ("CountTokensRequest", anthropic),
        ("ResponsesRequest", responses()),
        ("ResponseItem", item()),
        ("StopStrings", one_or_many(&json!({"minLength": 1, "maxLength": 1024}))),
        ("BadWords", one_or_many(&json!({"pattern": "\\S", "maxLength": 1024}))),
        ("StructuredOutputs", structured_outputs()),
        ("ResponseFormat", response_format()),
        ("PromptInput", prompts()),
        ("Tool", json!({"properties": {"type": {"const": "function"}}})),
        ("NamedTool", json!({"properties": {"type": {"const": "function"}}})),
        ("ToolFunction", json!({"properties": {"parameters": parameters()}})),
        (
            "AnthropicTool",
            json!({"properties": {
                "input_schema": parameters(),
                "type": {"enum": ["custom", null]},
            }}),
        ),
        (
            "AnthropicUserContent",
            json!({"oneOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/AnthropicUserBlock"}},
            ]}),
        ),
        (
            "AnthropicToolChoice",
            json!({"dependentSchemas": {
                "type": never(json!({"type": {"const": "tool"}, "name": null_type()}), &[]),
            }}),
        ),
    ]
}

fn all<const N: usize>(parts: [Value; N]) -> Value {
    let mut whole = Value::Object(Map::new());
    parts.into_iter().for_each(|part| merge(&mut whole, part));
    whole
}

fn null_type() -> Value {
    json!({"type": "null"})
}

/// Refuses these fields together; those of `required` count only if they are there.
fn never(fields: Value, required: &[&str]) -> Value {
    json!({"not": {"properties": fields, "required": required}})
}

/// A field that is there and not null.
fn given(field: &str) -> Value {
    json!({"required": [field], "properties": {field: {"not": null_type()}}})
}

fn one_or_many(one: &Value) -> Value {
    let mut one = one.clone();
    one["type"] = "string".into();
    json!({"oneOf": [one, {"type": "array", "items": one, "maxItems": 256}]})
}

fn reference(name: &str) -> Value {
    json!({"oneOf": [{"$ref": format!("#/components/schemas/{name}")}, null_type()]})
}

fn sampling() -> Value {
    json!({
        "properties": {
            "stop": reference("StopStrings"),
            "bad_words": reference("BadWords"),
            "logit_bias": {"maxProperties": 4096, "propertyNames": {"pattern": "^[0-9]+$"}},
        },
        "dependentSchemas": {
            "n": never(
                json!({"n": {"type": "integer", "minimum": 2}, "temperature": {"const": 0}}),
                &["temperature"],
            ),
        },
    })
}

fn streams() -> Value {
    json!({"dependentSchemas": {
        "stream_options": never(
            json!({"stream_options": {"type": "object"}, "stream": {"enum": [false, null]}}),
            &[],
        ),
        "prompt_logprobs": never(
            json!({"prompt_logprobs": {"type": "integer", "not": {"const": 0}}, "stream": {"const": true}}),
            &["stream"],
        ),
    }})
}

fn top_logprobs() -> Value {
    json!({"dependentSchemas": {"top_logprobs": never(
        json!({
            "top_logprobs": {"type": "integer", "not": {"const": 0}},
            "logprobs": {"enum": [false, null]},
        }),
        &[],
    )}})
}

/// At most one of these.
fn guided() -> Value {
    let names = ["guided_json", "guided_regex", "guided_choice", "guided_grammar"];
    let alone = (0..3).map(|at| {
        let others: Vec<Value> = names[at + 1..].iter().map(|other| given(other)).collect();
        let set = json!({names[at]: {"not": null_type()}});
        (names[at].to_owned(), json!({"not": {"properties": set, "anyOf": others}}))
    });
    let alone: Map<String, Value> = alone.collect();
    json!({
        "properties": {
            "guided_json": {"type": ["object", "boolean", "string", "null"]},
            "guided_regex": {"minLength": 1},
            "guided_choice": {"items": {"minLength": 1}, "maxItems": 4096},
            "guided_grammar": {"minLength": 1},
        },
        "dependentSchemas": alone,
    })
}

fn tools() -> Value {
    json!({"dependentSchemas": {"tool_choice": never(
        json!({"tool_choice": {"not": {"enum": ["none", null]}}, "tools": null_type()}),
        &[],
    )}})
}

fn turns() -> Value {
    json!({"dependentSchemas": {"continue_final_message": never(
        json!({"continue_final_message": {"const": true}, "add_generation_prompt": {"const": true}}),
        &["add_generation_prompt"],
    )}})
}

/// A prompt, or messages.
fn either() -> Value {
    json!({"anyOf": [
        {"required": ["prompt"], "properties": {"prompt": {"not": null_type()}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    ]})
}

/// What makes an invocation a chat leaves `prompt` unread.
fn invocation() -> Value {
    let prompt = json!({"$ref": "#/components/schemas/PromptInput"});
    json!({"anyOf": [
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
        {"required": ["prompt"], "properties": {"prompt": prompt, "messages": null_type()}},
    ]})
}

/// What makes it no JSON by a schema leaves `json_schema` unread.
fn response_format() -> Value {
    let schema = json!({"type": ["object", "boolean", "null"]});
    let by_schema = json!({"type": "object", "properties": {"schema": schema}});
    json!({"dependentSchemas": {"type": {"anyOf": [
        {"properties": {"type": {"not": {"const": "json_schema"}}}},
        {"required": ["json_schema"], "properties": {"json_schema": by_schema}},
    ]}}})
}

fn prompts() -> Value {
    let token = json!({"$ref": "#/components/schemas/TokenId"});
    let tokens = json!({"type": "array", "items": token, "minItems": 1});
    json!({"oneOf": [
        {"type": "string", "description": "A text."},
        {
            "type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 128,
            "description": "Texts.",
        },
        all([tokens.clone(), json!({"description": "Tokens."})]),
        {
            "type": "array", "items": tokens, "minItems": 1, "maxItems": 128,
            "description": "Several prompts of tokens.",
        },
    ]})
}

/// The schema of a function's arguments: an object's.
fn parameters() -> Value {
    json!({"properties": {"type": {"const": "object"}}})
}

fn structured_outputs() -> Value {
    let mut one: Vec<Value> = ["json", "regex", "choice", "grammar"].map(given).into();
    one.push(json!({"required": ["json_object"], "properties": {"json_object": {"const": true}}}));
    json!({
        "properties": {
            "json": {"type": ["object", "boolean", "string", "null"]},
            "regex": {"minLength": 1},
            "choice": {"items": {"minLength": 1}},
            "grammar": {"minLength": 1},
            "structural_tag": {"type": "null", "description": "Not supported."},
        },
        "oneOf": one,
    })
}

fn anthropic_tools() -> Value {
    json!({
        "properties": {"stop_sequences": {"items": {"minLength": 1, "maxLength": 1024}}},
        "dependentSchemas": {"tool_choice": {"anyOf": [
            {"properties": {"tool_choice": {"anyOf": [
                null_type(),
                {"type": "object", "properties": {"type": {"const": "none"}}},
            ]}}},
            {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
        ]}},
    })
}

fn responses() -> Value {
    let items = json!({
        "type": "array", "minItems": 1, "maxItems": 4096,
        "items": {"$ref": "#/components/schemas/ResponseItem"},
    });
    let schema = json!({"type": ["object", "boolean"]});
    let formats = json!({"anyOf": [
        null_type(),
        {"type": "object", "required": ["type"], "properties": {
            "type": {"enum": ["text", "json_object"]},
        }},
        {"type": "object", "required": ["type", "name", "schema"], "properties": {
            "type": {"const": "json_schema"}, "name": {"type": "string"}, "schema": schema,
        }},
    ]});
    let tool = json!({
        "type": "object", "required": ["type", "name"],
        "properties": {
            "type": {"const": "function"},
            "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,128}$"},
            "description": {"type": ["string", "null"]},
            "parameters": all([json!({"type": ["object", "null"]}), parameters()]),
            "strict": {"type": ["boolean", "null"]},
        },
    });
    let choices = json!({"anyOf": [
        {"enum": ["auto", "none", "required", null]},
        {"type": "object", "required": ["type", "name"], "properties": {
            "type": {"const": "function"}, "name": {"type": "string"},
        }},
    ]});
    let of_responses = json!({
        "properties": {
            "input": {"oneOf": [{"type": "string"}, items], "example": "Say hello."},
            "text": {"properties": {"format": formats}},
            "include": {"items": {"enum": INCLUDES}},
            "metadata": {
                "type": ["object", "null"], "maxProperties": 16,
                "propertyNames": {"maxLength": 64},
                "additionalProperties": {"type": "string", "maxLength": 512},
            },
            "tools": {"type": ["array", "null"], "items": tool, "maxItems": 128},
            "tool_choice": choices,
            "enable_response_messages": {"enum": [false, null]},
            "prompt": null_type(),
            "conversation": null_type(),
            "context_management": null_type(),
            "previous_input_messages": null_type(),
        },
        "dependentSchemas": {
            "background": never(
                json!({"background": {"const": true}, "store": {"const": false}}),
                &["store"],
            ),
            "tool_choice": {"anyOf": [
                {"properties": {"tool_choice": {"enum": ["auto", "none", null]}}},
                {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
            ]},
        },
    });
    let mut shared = sampling();
    if let Some(rules) = shared.as_object_mut() {
        rules.remove("dependentSchemas");
    }
    all([shared, of_responses])
}

/// An item of a response's input.
fn item() -> Value {
    let text = json!({"type": "string"});
    let part = |kinds: &[&str], field: &str| {
        json!({"type": "object", "required": ["type", field], "properties": {
            "type": {"enum": kinds}, field: text,
        }})
    };
    let list = |parts: Value| json!({"type": "array", "items": parts});
    let said = json!({"anyOf": [
        part(&["input_text", "output_text", "text"], "text"),
        part(&["refusal"], "refusal"),
    ]});
    let thought =
        |kind: &str| all([list(part(&[kind], "text")), json!({"type": ["array", "null"]})]);
    json!({
        "description": "A message, a call of a function, its output, or reasoning.",
        "oneOf": [
            {
                "type": "object", "required": ["role", "content"],
                "properties": {
                    "type": {"enum": ["message", null]},
                    "role": {"enum": ["user", "assistant", "system", "developer"]},
                    "content": {"oneOf": [text, list(said)]},
                },
            },
            {
                "type": "object", "required": ["type", "call_id", "name", "arguments"],
                "properties": {
                    "type": {"const": "function_call"},
                    "call_id": text, "name": text, "arguments": text,
                },
            },
            {
                "type": "object", "required": ["type", "call_id", "output"],
                "properties": {
                    "type": {"const": "function_call_output"},
                    "call_id": text,
                    "output": {"oneOf": [text, list(part(&["input_text"], "text"))]},
                },
            },
            {
                "type": "object", "required": ["type"],
                "properties": {
                    "type": {"const": "reasoning"},
                    "content": thought("reasoning_text"),
                    "summary": thought("summary_text"),
                },
            },
        ],
    })
}
