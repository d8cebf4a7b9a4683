//! Structured output: what `response_format`, `structured_outputs` and the older `guided_*` fields
//! ask for, as one constraint for the worker.

use baton_proto::v1::Constraint;
use baton_proto::v1::constraint::Kind;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::gbnf;
use super::schema::{ResponseFormat, StructuredOutputs};
use crate::error::ApiError;

/// The most bytes of a schema, an expression or a grammar.
const MAX_BYTES: usize = 256 * 1024;
/// The most entries of `choice`.
const MAX_CHOICES: usize = 4096;
/// Between the tokens of JSON. Unbounded, a small model may go on with spaces until its
/// `max_tokens`.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,32}";

/// The fields as they come.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct StructuredFields {
    /// OpenAI's way to ask for JSON.
    #[schema(value_type = Option<ResponseFormat>)]
    response_format: Option<Value>,
    /// vLLM's way to constrain the answer; exactly one of the first five.
    #[schema(value_type = Option<StructuredOutputs>)]
    structured_outputs: Option<Map<String, Value>>,
    /// An older name of `structured_outputs.json`.
    guided_json: Option<Value>,
    /// An older name of `structured_outputs.regex`.
    #[schema(value_type = Option<String>)]
    guided_regex: Option<Value>,
    /// An older name of `structured_outputs.choice`.
    #[schema(value_type = Option<Vec<String>>, min_items = 1)]
    guided_choice: Option<Value>,
    /// An older name of `structured_outputs.grammar`.
    #[schema(value_type = Option<String>)]
    guided_grammar: Option<Value>,
    /// An older name of `structured_outputs.whitespace_pattern`.
    #[schema(value_type = Option<String>)]
    guided_whitespace_pattern: Option<Value>,
}

/// A field at fault, and why.
fn wrong(field: &str, what: &str) -> ApiError {
    ApiError::malformed(format!("`{field}` {what}.")).param(field)
}

impl StructuredFields {
    /// The field that a constraint comes from, to be named when the worker refuses it.
    pub fn field(&self) -> &'static str {
        let format = self.response_format.as_ref().is_some_and(|it| it["type"] != "text");
        let guided = [
            ("guided_json", &self.guided_json),
            ("guided_regex", &self.guided_regex),
            ("guided_choice", &self.guided_choice),
        ];
        match (format, &self.structured_outputs) {
            (true, _) => "response_format",
            (false, Some(_)) => "structured_outputs",
            (false, None) => {
                let given = guided.iter().find(|(_, value)| value.is_some());
                given.map_or("guided_grammar", |(field, _)| field)
            }
        }
    }

    /// Whether `json`, `regex` or `choice` is asked for in vLLM's own fields: no tool may be named
    /// beside them. What else there is, `response_format` too, yields to the tool's schema.
    pub fn excludes_named_tool(&self) -> bool {
        let given = |key: &str| {
            let outputs = self.structured_outputs.as_ref();
            outputs.and_then(|outputs| outputs.get(key)).is_some_and(|value| !value.is_null())
        };
        let guided = [&self.guided_json, &self.guided_regex, &self.guided_choice];
        ["json", "regex", "choice"].into_iter().any(given)
            || guided.into_iter().any(Option::is_some)
    }

    /// The constraint; `None` when the text is free. `response_format` comes before
    /// `structured_outputs`, as in vLLM.
    pub fn constraint(&self) -> Result<Option<Constraint>, ApiError> {
        if let Some(format) = &self.response_format
            && let Some(kind) = of_response_format(format)?
        {
            return Ok(Some(kind));
        }
        if let Some(outputs) = &self.structured_outputs {
            return of_structured_outputs(outputs, "structured_outputs.").map(Some);
        }
        let guided = [
            ("json", &self.guided_json),
            ("regex", &self.guided_regex),
            ("choice", &self.guided_choice),
            ("grammar", &self.guided_grammar),
            ("whitespace_pattern", &self.guided_whitespace_pattern),
        ];
        let guided: Map<String, Value> = guided
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)))
            .collect();
        if guided.get("whitespace_pattern").is_some_and(|pattern| !pattern.is_string()) {
            return Err(wrong("guided_whitespace_pattern", "must be a string"));
        }
        match guided.keys().any(|key| key != "whitespace_pattern") {
            true => of_structured_outputs(&guided, "guided_").map(Some),
            false => Ok(None),
        }
    }
}

/// A constraint by a JSON schema, with a bound on white space unless it has a rule of its own.
pub fn by_schema(mut schema: Value) -> Constraint {
    if let Value::Object(fields) = &mut schema
        && let Value::Object(style) = fields.entry("x-guidance").or_insert_with(|| json!({}))
        && style.get("whitespace_flexible") != Some(&Value::Bool(false))
    {
        style.entry("whitespace_pattern").or_insert_with(|| WHITESPACE.into());
    }
    Constraint { kind: Some(Kind::JsonSchema(schema.to_string())) }
}

/// Where an answer's beginning is, seen from its reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reasoned {
    /// There is none.
    Not,
    /// The model may open one.
    Maybe,
    /// The prompt has opened it.
    Inside,
}

/// Lets a model think before it answers within `constraint`, as vLLM does.
pub fn after_reasoning(constraint: Constraint, reasoned: Reasoned) -> Constraint {
    let begin = match reasoned {
        Reasoned::Not => return constraint,
        Reasoned::Maybe => "start: (\"<think>\" think)? answer\n",
        Reasoned::Inside => "start: think answer\n",
    };
    let answer = match constraint.kind {
        None => return constraint,
        Some(Kind::JsonSchema(schema)) => format!("answer: %json {schema}\n"),
        Some(Kind::Regex(regex)) => format!("answer: /{}/\n", slashes_escaped(&regex)),
        // With names of its own.
        Some(Kind::Lark(lark)) => format!("answer: %lark {{\n{lark}\n}}\n"),
    };
    // The shortest text up to the tag: what follows the first one is the answer.
    let lark = format!("{begin}think[lazy]: /(.|\\n)*<\\/think>\\s*/\n{answer}");
    Constraint { kind: Some(Kind::Lark(lark)) }
}

/// A regular expression as Lark has it between slashes.
fn slashes_escaped(regex: &str) -> String {
    let mut out = String::with_capacity(regex.len());
    let mut escaped = false;
    for c in regex.chars() {
        if c == '/' && !escaped {
            out.push('\\');
        }
        escaped = c == '\\' && !escaped;
        out.push(c);
    }
    out
}

fn of_response_format(format: &Value) -> Result<Option<Constraint>, ApiError> {
    if !matches!(format["json_schema"], Value::Null | Value::Object(_)) {
        return Err(wrong(
            "response_format.json_schema",
            "must be an object with `name` and `schema`",
        ));
    }
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(by_schema(json!({"type": "object"})))),
        Some("json_schema") => {
            let field = "response_format.json_schema.schema";
            let holder = format.get("json_schema").filter(|holder| holder.is_object());
            let holder = holder.ok_or_else(|| {
                wrong("response_format.json_schema", "must be an object with `name` and `schema`")
            })?;
            // `schema` may be left out in OpenAI's API: any object then.
            let schema = holder.get("schema").or_else(|| holder.get("json_schema"));
            let schema = schema.filter(|schema| !schema.is_null());
            let schema = schema.cloned().unwrap_or_else(|| json!({"type": "object"}));
            Ok(Some(by_schema(checked_schema(schema, field)?)))
        }
        Some("structural_tag") => Err(ApiError::bad_value(
            "response_format.type",
            "`response_format.type` \"structural_tag\" is not supported by this server; use \
             \"json_schema\", or `structured_outputs` with a grammar.",
        )),
        _ => Err(wrong(
            "response_format.type",
            "must be \"text\", \"json_object\" or \"json_schema\"",
        )),
    }
}

fn of_structured_outputs(
    outputs: &Map<String, Value>,
    prefix: &str,
) -> Result<Constraint, ApiError> {
    let given = |key: &str| outputs.get(key).filter(|value| !value.is_null());
    if given("structural_tag").is_some() {
        let field = format!("{prefix}structural_tag");
        return Err(ApiError::not_supported(&field));
    }
    if given("whitespace_pattern").is_some_and(|pattern| !pattern.is_string()) {
        return Err(wrong(&format!("{prefix}whitespace_pattern"), "must be a string"));
    }
    let wishes = ["json", "json_object", "regex", "choice", "grammar"];
    let set =
        wishes.iter().filter(|key| given(key).is_some_and(|v| **key != "json_object" || v == true));
    let [key] = set.copied().collect::<Vec<_>>()[..] else {
        let field = prefix.trim_end_matches(['.', '_']);
        let what =
            "must have exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`";
        return Err(wrong(field, what));
    };
    let value = given(key).unwrap_or(&Value::Null);
    let field = format!("{prefix}{key}");
    let text = || {
        let text = value.as_str().filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| wrong(&field, "must be a string that is not empty"))?;
        bounded(text.len(), &field)?;
        Ok::<_, ApiError>(text)
    };
    let kind = match key {
        "json_object" => return Ok(by_schema(with_style(json!({"type": "object"}), outputs)?)),
        "json" => {
            // As text, too: older clients send it so.
            let schema = match value.as_str() {
                Some(text) => serde_json::from_str(text)
                    .map_err(|error| wrong(&field, &format!("is not valid JSON: {error}")))?,
                None => value.clone(),
            };
            return Ok(by_schema(with_style(checked_schema(schema, &field)?, outputs)?));
        }
        "regex" => Kind::Regex(text()?.to_owned()),
        "grammar" => Kind::Lark(gbnf::to_lark(text()?).map_err(|error| {
            ApiError::bad_value(field.clone(), format!("`{field}` does not parse: {error}."))
        })?),
        _ => Kind::Lark(choice(value, &field)?),
    };
    Ok(Constraint { kind: Some(kind) })
}

/// A grammar with these texts and no other.
fn choice(value: &Value, field: &str) -> Result<String, ApiError> {
    let what = "must be a list of strings, none of them empty";
    let list =
        value.as_array().filter(|list| !list.is_empty()).ok_or_else(|| wrong(field, what))?;
    if list.len() > MAX_CHOICES {
        return Err(wrong(field, &format!("must have at most {MAX_CHOICES} entries")));
    }
    let mut bytes = 0;
    let mut texts = Vec::with_capacity(list.len());
    for item in list {
        let text =
            item.as_str().filter(|text| !text.is_empty()).ok_or_else(|| wrong(field, what))?;
        bytes += text.len();
        // Lark's strings are JSON's.
        texts.push(Value::from(text).to_string());
    }
    bounded(bytes, field)?;
    Ok(format!("start: {}\n", texts.join(" | ")))
}

fn bounded(bytes: usize, field: &str) -> Result<(), ApiError> {
    if bytes <= MAX_BYTES {
        return Ok(());
    }
    let message = format!("`{field}` has {bytes} bytes; at most {MAX_BYTES} are taken.");
    Err(ApiError::bad_value(field, message))
}

/// A schema: an object, or `true` and `false`.
fn checked_schema(schema: Value, field: &str) -> Result<Value, ApiError> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err(wrong(field, "must be a JSON schema"));
    }
    bounded(schema.to_string().len(), field)?;
    // As an object it can say how it is to be written.
    Ok(if schema == true { json!({}) } else { schema })
}

/// Puts the settings of style where llguidance reads them: `x-guidance` at the schema's root.
fn with_style(mut schema: Value, outputs: &Map<String, Value>) -> Result<Value, ApiError> {
    let mut style = Map::new();
    if outputs.get("disable_any_whitespace").and_then(Value::as_bool) == Some(true) {
        style.insert("whitespace_flexible".into(), false.into());
    }
    if let Some(pattern) = outputs.get("whitespace_pattern").filter(|value| !value.is_null()) {
        style.insert("whitespace_pattern".into(), pattern.clone());
    }
    if outputs.get("disable_additional_properties").and_then(Value::as_bool) == Some(true) {
        close_objects(&mut schema);
    }
    if let (Value::Object(fields), false) = (&mut schema, style.is_empty()) {
        fields.insert("x-guidance".into(), style.into());
    }
    Ok(schema)
}

/// Objects that say nothing of other properties have none.
fn close_objects(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.contains_key("properties") && !fields.contains_key("additionalProperties") {
                fields.insert("additionalProperties".into(), false.into());
            }
            fields.values_mut().for_each(close_objects);
        }
        Value::Array(items) => items.iter_mut().for_each(close_objects),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(fields: Value) -> Result<Option<Kind>, Value> {
        let fields: StructuredFields = serde_json::from_value(fields).unwrap();
        fields
            .constraint()
            .map(|constraint| constraint.and_then(|it| it.kind))
            .map_err(|error| error.body()["error"]["param"].clone())
    }

    #[test]
    fn every_form_becomes_one_constraint() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let by_schema = by_schema(schema.clone()).kind;
        for fields in [
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"structured_outputs": {"json": schema.to_string(), "regex": null}}),
            json!({"guided_json": schema}),
        ] {
            assert_eq!(kind(fields).unwrap(), by_schema);
        }
        assert_eq!(kind(json!({"response_format": {"type": "text"}})).unwrap(), None);
        assert_eq!(kind(json!({})).unwrap(), None);
        assert_eq!(
            kind(json!({"structured_outputs": {"choice": ["a\"b", "c"]}})).unwrap(),
            Some(Kind::Lark("start: \"a\\\"b\" | \"c\"\n".into()))
        );
        assert_eq!(kind(json!({"guided_regex": "a+"})).unwrap(), Some(Kind::Regex("a+".into())));
    }

    #[test]
    fn what_follows_reasoning_keeps_its_meaning() {
        let lark = |kind| {
            let constraint = Constraint { kind: Some(kind) };
            match after_reasoning(constraint, Reasoned::Inside).kind {
                Some(Kind::Lark(lark)) => lark,
                other => panic!("{other:?}"),
            }
        };
        for (regex, between_slashes) in
            [(r"https?:\/\/[a-z]+", r"https?:\/\/[a-z]+"), ("a/b", r"a\/b"), (r"\\/", r"\\\/")]
        {
            let answer = format!("answer: /{between_slashes}/\n");
            assert!(lark(Kind::Regex(regex.into())).ends_with(&answer), "{regex}");
        }
        let nested = lark(Kind::Lark("think: \"x\"\nstart: think".into()));
        assert!(nested.ends_with("answer: %lark {\nthink: \"x\"\nstart: think\n}\n"), "{nested}");
        let fields: StructuredFields =
            serde_json::from_value(json!({"guided_regex": "a"})).unwrap();
        assert_eq!(fields.field(), "guided_regex");
    }

    #[test]
    fn a_named_tool_goes_before_a_format_but_not_beside_a_constraint() {
        let excludes = |fields: Value| {
            serde_json::from_value::<StructuredFields>(fields).unwrap().excludes_named_tool()
        };
        let format = json!({"type": "json_object"});
        for fields in [
            json!({}),
            json!({"response_format": format}),
            json!({"structured_outputs": {"json_object": true, "json": null}}),
            json!({"structured_outputs": {"grammar": "start: \"a\""}}),
            json!({"guided_grammar": "start: \"a\"", "guided_json": null}),
        ] {
            assert!(!excludes(fields.clone()), "{fields}");
        }
        for fields in [
            json!({"structured_outputs": {"json": {}}, "response_format": format}),
            json!({"structured_outputs": {"regex": "a"}}),
            json!({"structured_outputs": {"choice": ["a"]}}),
            json!({"guided_json": {}}),
            json!({"guided_regex": "a"}),
            json!({"guided_choice": ["a"]}),
        ] {
            assert!(excludes(fields.clone()), "{fields}");
        }
    }

    #[test]
    fn style_reaches_the_schema() {
        let fields = json!({"structured_outputs": {
            "json": {"properties": {"a": {"properties": {}}}},
            "disable_any_whitespace": true, "disable_additional_properties": true,
        }});
        let Some(Kind::JsonSchema(text)) = kind(fields).unwrap() else { panic!() };
        let schema: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(schema["x-guidance"], json!({"whitespace_flexible": false}));
        assert_eq!(schema["properties"]["a"]["additionalProperties"], false);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (fields, param) in [
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {}}), "response_format.type"),
            (
                json!({"response_format": {"type": "text", "json_schema": 5}}),
                "response_format.json_schema",
            ),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
            (json!({"structured_outputs": {"json": "{"}}), "structured_outputs.json"),
            (json!({"guided_regex": 5}), "guided_regex"),
            (json!({"guided_whitespace_pattern": {}}), "guided_whitespace_pattern"),
            (
                json!({"structured_outputs": {"regex": "a", "whitespace_pattern": 5}}),
                "structured_outputs.whitespace_pattern",
            ),
        ] {
            assert_eq!(kind(fields).unwrap_err(), param);
        }
    }
}
