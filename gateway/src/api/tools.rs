//! `tools` and `tool_choice`: which functions the model may call, and whether it must.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::Body;
use super::schema::{Tool, ToolChoiceInput};
use crate::error::ApiError;

/// The most tools of a request.
pub const MAX_TOOLS: usize = 128;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolSchema {
    /// 1 to 128 letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The JSON schema of its arguments, an object; `None` if it takes any or none.
    pub parameters: Option<Value>,
    /// Whether the arguments must follow the schema.
    pub strict: bool,
}

/// Whether the model may, must or must not call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// It does not call.
    None,
    /// It decides.
    Auto,
    /// It calls at least one function.
    Required,
    /// It calls this function.
    Named(String),
}

/// The tools of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// The functions, at least one.
    pub list: Vec<ToolSchema>,
    /// Whether one is called.
    pub choice: ToolChoice,
    /// Whether the answer may hold more than one call.
    pub parallel: bool,
    /// As they came, for the chat template.
    pub raw: Vec<Value>,
}

/// The fields as they come.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ToolFields {
    /// Functions that the model may call.
    #[schema(value_type = Option<Vec<Tool>>, min_items = 1, max_items = 128)]
    tools: Option<Value>,
    /// Whether it may, must or must not call: none, auto, required, or an object that names one.
    /// auto when there are tools.
    #[schema(value_type = Option<ToolChoiceInput>)]
    tool_choice: Option<Value>,
    /// Whether an answer may hold several calls; true when it is absent.
    parallel_tool_calls: Option<bool>,
}

impl Tools {
    /// The fields `tools`, `tool_choice` and `parallel_tool_calls` in the form of chats; `None`
    /// without tools.
    pub fn read(body: &mut Body) -> Result<Option<Self>, ApiError> {
        let fields: ToolFields = body.read()?;
        let (tools, choice) = (fields.tools.as_ref(), fields.tool_choice.as_ref());
        Self::from_chat(tools, choice, fields.parallel_tool_calls)
    }

    /// The same from values, for routes that convert their own form to that of chats.
    pub fn from_chat(
        tools: Option<&Value>,
        choice: Option<&Value>,
        parallel: Option<bool>,
    ) -> Result<Option<Self>, ApiError> {
        let choice = choice.filter(|choice| !choice.is_null());
        let mut raw = match tools {
            None | Some(Value::Null) => {
                return match choice {
                    Some(choice) if choice != "none" => {
                        Err(wrong("tool_choice", "needs `tools`; set them or leave it out"))
                    }
                    _ => Ok(None),
                };
            }
            Some(Value::Array(list)) if list.is_empty() => {
                return Err(wrong("tools", "must hold at least one tool; leave it out for none"));
            }
            Some(Value::Array(list)) if list.len() > MAX_TOOLS => {
                let what = format!("holds {} tools; the most are {MAX_TOOLS}", list.len());
                return Err(wrong("tools", &what));
            }
            Some(Value::Array(list)) => list.clone(),
            Some(_) => return Err(wrong("tools", "must be a list of tools")),
        };
        let mut list: Vec<ToolSchema> = Vec::with_capacity(raw.len());
        for (at, tool) in raw.iter_mut().enumerate() {
            let at = format!("tools[{at}]");
            let schema = schema(tool, &at)?;
            if list.iter().any(|other| other.name == schema.name) {
                let what = format!("`{}` is the name of an earlier tool too", schema.name);
                return Err(wrong(&format!("{at}.function.name"), &what));
            }
            list.push(schema);
        }
        let choice = choice.map_or(Ok(ToolChoice::Auto), |choice| read_choice(choice, &list))?;
        Ok(Some(Self { list, choice, parallel: parallel.unwrap_or(true), raw }))
    }
}

/// One tool. Its `type` is filled in: templates look at it.
fn schema(tool: &mut Value, at: &str) -> Result<ToolSchema, ApiError> {
    let Value::Object(fields) = tool else {
        return Err(wrong(at, "must be an object with `type` and `function`"));
    };
    match fields.get("type") {
        None => {
            fields.shift_insert(0, "type".into(), "function".into());
        }
        Some(kind) if kind == "function" => {}
        Some(_) => {
            return Err(wrong(&format!("{at}.type"), "must be \"function\": there are no others"));
        }
    }
    let at = format!("{at}.function");
    let Some(Value::Object(function)) = fields.get("function") else {
        return Err(wrong(&at, "must be an object with `name` and `parameters`"));
    };
    let field = |key: &str| function.get(key).filter(|value| !value.is_null());
    let at = |key: &str| format!("{at}.{key}");
    let name = field("name").and_then(Value::as_str).filter(|name| is_name(name));
    let name = name.ok_or_else(|| {
        wrong(&at("name"), "must be 1 to 128 of the letters a-z and A-Z, digits, `_`, `-` and `.`")
    })?;
    let description = match field("description") {
        None => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(_) => return Err(wrong(&at("description"), "must be a string")),
    };
    let parameters = match field("parameters") {
        None => None,
        Some(Value::Object(schema)) => {
            if schema.get("type").is_some_and(|kind| kind != "object") {
                return Err(wrong(&at("parameters.type"), "must be \"object\""));
            }
            Some(Value::Object(schema.clone()))
        }
        Some(_) => return Err(wrong(&at("parameters"), "must be an object, a JSON schema")),
    };
    let strict = match field("strict") {
        None => false,
        Some(Value::Bool(strict)) => *strict,
        Some(_) => return Err(wrong(&at("strict"), "must be true or false")),
    };
    Ok(ToolSchema { name: name.into(), description, parameters, strict })
}

/// OpenAI allows 64 letters, Anthropic 128.
fn is_name(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    (1..=128).contains(&name.len()) && name.chars().all(fine)
}

fn read_choice(choice: &Value, list: &[ToolSchema]) -> Result<ToolChoice, ApiError> {
    match choice.as_str() {
        Some("none") => return Ok(ToolChoice::None),
        Some("auto") => return Ok(ToolChoice::Auto),
        Some("required") => return Ok(ToolChoice::Required),
        _ => {}
    }
    // vLLM takes a named choice without its type.
    let is_function = choice.get("type").is_none_or(|kind| kind == "function");
    let Some(name) = choice["function"]["name"].as_str().filter(|_| is_function) else {
        let what = "must be \"none\", \"auto\", \"required\" or \
                    {\"type\": \"function\", \"function\": {\"name\": …}}";
        return Err(wrong("tool_choice", what));
    };
    if !list.iter().any(|tool| tool.name == name) {
        let what = format!("names `{name}`, which is not among the `tools`");
        return Err(wrong("tool_choice.function.name", &what));
    }
    Ok(ToolChoice::Named(name.into()))
}

fn wrong(path: &str, what: &str) -> ApiError {
    ApiError::malformed(format!("`{path}` {what}.")).param(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Option<Tools>, String> {
        let mut body = Body::parse(body.to_string().as_bytes()).unwrap();
        let tools = Tools::read(&mut body);
        assert!(tools.is_err() || body.unknown().is_empty());
        tools.map_err(|error| {
            assert_eq!(error.body()["error"]["code"], 400);
            error.body()["error"]["param"].as_str().unwrap().to_owned()
        })
    }

    fn function(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    #[test]
    fn tools_are_read_and_kept_for_the_template() {
        let parameters = json!({"type": "object", "properties": {"a": {"type": "string"}}});
        let full = json!({"function": {
            "name": "a.b-c_1", "description": "d", "parameters": parameters, "strict": true,
        }});
        let tools = read(json!({"tools": [full, function("g")]})).unwrap().unwrap();
        let first = ToolSchema {
            name: "a.b-c_1".into(),
            description: Some("d".into()),
            parameters: Some(parameters),
            strict: true,
        };
        assert_eq!(tools.list[0], first);
        assert_eq!(tools.list[1].parameters, None);
        assert_eq!(tools.raw[0]["type"], "function");
        assert_eq!(tools.raw[0]["function"], full["function"]);
        assert_eq!((tools.choice, tools.parallel), (ToolChoice::Auto, true));
    }

    #[test]
    fn choices_are_read() {
        for (choice, expected) in [
            (json!(null), ToolChoice::Auto),
            (json!("none"), ToolChoice::None),
            (json!("auto"), ToolChoice::Auto),
            (json!("required"), ToolChoice::Required),
            (function("g"), ToolChoice::Named("g".into())),
            (json!({"function": {"name": "f"}}), ToolChoice::Named("f".into())),
        ] {
            let body = json!({
                "tools": [function("f"), function("g")],
                "tool_choice": choice,
                "parallel_tool_calls": false,
            });
            let tools = read(body).unwrap().unwrap();
            assert_eq!((tools.choice, tools.parallel), (expected, false));
        }
        assert_eq!(read(json!({"tools": null, "tool_choice": "none"})), Ok(None));
        assert_eq!(read(json!({})), Ok(None));
    }

    #[test]
    fn errors_name_the_place() {
        let with = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        let many: Vec<Value> = (0..129).map(|at| function(&format!("f{at}"))).collect();
        let long = "x".repeat(129);
        assert!(read(json!({"tools": [function(&long[1..])]})).is_ok());
        for (bad, param) in [
            (json!({"tools": []}), "tools"),
            (json!({"tools": {}}), "tools"),
            (json!({"tools": many}), "tools"),
            (json!({"tools": [5]}), "tools[0]"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [function("f"), function("f")]}), "tools[1].function.name"),
            (json!({"tools": [function("")]}), "tools[0].function.name"),
            (json!({"tools": [function("a b")]}), "tools[0].function.name"),
            (json!({"tools": [function(&long)]}), "tools[0].function.name"),
            (with(json!({})), "tools[0].function.name"),
            (with(json!({"name": "f", "description": 5})), "tools[0].function.description"),
            (with(json!({"name": "f", "parameters": []})), "tools[0].function.parameters"),
            (
                with(json!({"name": "f", "parameters": {"type": "string"}})),
                "tools[0].function.parameters.type",
            ),
            (with(json!({"name": "f", "strict": "yes"})), "tools[0].function.strict"),
            (json!({"tool_choice": "auto"}), "tool_choice"),
            (json!({"tools": [function("f")], "tool_choice": "any"}), "tool_choice"),
            (json!({"tools": [function("f")], "tool_choice": {"type": "function"}}), "tool_choice"),
            (json!({"tools": [function("f")], "tool_choice": 5}), "tool_choice"),
            (
                json!({"tools": [function("f")], "tool_choice": function("g")}),
                "tool_choice.function.name",
            ),
            (json!({"tools": [function("f")], "parallel_tool_calls": "no"}), "parallel_tool_calls"),
        ] {
            assert_eq!(read(bad.clone()).unwrap_err(), param, "{bad}");
        }
    }
}
