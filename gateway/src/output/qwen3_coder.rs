//! Calls written as Qwen3-Coder writes them: tags around plain values, which get their types from
//! the tool's schema. What stands between parameters is dropped.

use std::collections::HashMap;

use serde::de::IgnoredAny;
use serde_json::Value;

use super::marker::Markers;
use super::python::{escaped, to_json};
use super::sink::Sink;
use crate::api::tools::ToolSchema;

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// Reads calls of tags.
#[derive(Debug)]
pub(super) struct Qwen3Coder {
    /// By function and parameter.
    types: HashMap<String, HashMap<String, Types>>,
    state: State,
    /// Text that may turn out to be no call.
    held: String,
    /// The function being called, and how many arguments it has.
    function: String,
    arguments: usize,
}

#[derive(Debug)]
enum State {
    /// `open`: a call's end tag is to come.
    Content {
        markers: Markers,
        open: bool,
    },
    /// Behind `<tool_call>`: white space, then this much of `<function=`.
    Before {
        matched: usize,
    },
    Name(String),
    /// Between parameters.
    Body(Markers),
    Parameter(String),
    Value {
        markers: Markers,
        value: Argument,
    },
}

/// A value being read.
#[derive(Debug)]
enum Argument {
    /// A string, given as it comes. One line feed at each end belongs to the tags.
    Text { first: bool, line_feed: bool },
    /// Something else, which must be seen whole.
    Typed { types: Types, text: String },
}

impl Qwen3Coder {
    pub(super) fn new(tools: &[ToolSchema]) -> Self {
        let types = tools.iter().map(|tool| (tool.name.clone(), parameters(tool))).collect();
        Self {
            types,
            state: content(false),
            held: String::new(),
            function: String::new(),
            arguments: 0,
        }
    }

    pub(super) fn step(&mut self, c: char, sink: &mut Sink) {
        while !self.take(c, sink) {}
    }

    /// Whether the letter is read; if not, it is for the state that follows.
    fn take(&mut self, c: char, sink: &mut Sink) -> bool {
        match &mut self.state {
            State::Content { markers, .. } => {
                let marker = markers.step(c, |c| sink.content(c));
                self.tag(marker, sink);
            }
            State::Before { matched } => {
                let next = FUNCTION[*matched..].chars().next();
                if next == Some(c) {
                    self.held.push(c);
                    *matched += 1;
                    if *matched == FUNCTION.len() {
                        self.state = State::Name(String::new());
                    }
                } else if *matched == 0 && c.is_whitespace() {
                    self.held.push(c);
                } else {
                    return self.no_call(sink);
                }
            }
            State::Name(name) => match c {
                '>' if !name.trim().is_empty() => {
                    self.function = name.trim().to_owned();
                    self.arguments = 0;
                    self.held.clear();
                    sink.start(&self.function);
                    self.state = body();
                }
                '>' | '<' | '\n' => return self.no_call(sink),
                _ => {
                    name.push(c);
                    self.held.push(c);
                }
            },
            State::Body(markers) => {
                let marker = markers.step(c, |_| {});
                self.tag(marker, sink);
            }
            State::Parameter(name) => match c {
                '>' => {
                    let name = std::mem::take(name);
                    self.begin_value(name.trim(), sink);
                }
                _ => name.push(c),
            },
            State::Value { markers, value } => {
                let marker = markers.step(c, |c| value.push(c, sink));
                if marker.is_some() {
                    value.end(sink);
                    self.state = body();
                    if marker != Some(PARAMETER_END) {
                        self.tag(marker, sink);
                    }
                }
            }
        }
        true
    }

    /// The answer is over.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        sink.content_all(&std::mem::take(&mut self.held));
        match &mut self.state {
            State::Content { markers, open } => {
                let held = markers.finish();
                if !(*open && CALL_END.starts_with(&held)) {
                    sink.content_all(&held);
                }
            }
            State::Value { markers, value } => {
                markers.finish().chars().for_each(|c| value.push(c, sink));
            }
            _ => {}
        }
    }

    /// A tag outside values.
    fn tag(&mut self, marker: Option<&'static str>, sink: &mut Sink) {
        let Some(marker) = marker else { return };
        if marker == PARAMETER {
            self.state = State::Parameter(String::new());
            return;
        }
        if !matches!(self.state, State::Content { .. }) {
            sink.arguments(if self.arguments == 0 { "{}" } else { "}" });
        }
        self.state = match marker {
            FUNCTION_END => content(true),
            CALL_END => content(false),
            _ => {
                self.held.push_str(marker);
                match marker {
                    CALL => State::Before { matched: 0 },
                    _ => State::Name(String::new()),
                }
            }
        };
    }

    fn begin_value(&mut self, name: &str, sink: &mut Sink) {
        let mut text = String::from(if self.arguments == 0 { "{\"" } else { ", \"" });
        name.chars().for_each(|c| escaped(c, &mut text));
        text.push_str("\": ");
        self.arguments += 1;
        let types = self.types.get(&self.function).and_then(|types| types.get(name));
        let types = types.copied().unwrap_or_default();
        let value = if types.only_string() {
            text.push('"');
            Argument::Text { first: true, line_feed: false }
        } else {
            Argument::Typed { types, text: String::new() }
        };
        sink.arguments(&text);
        let ends = [PARAMETER_END, PARAMETER, FUNCTION_END, CALL_END];
        self.state = State::Value { markers: Markers::new(&ends), value };
    }

    fn no_call(&mut self, sink: &mut Sink) -> bool {
        sink.content_all(&std::mem::take(&mut self.held));
        self.state = content(false);
        false
    }
}

fn content(open: bool) -> State {
    let markers: &[_] = if open { &[CALL, FUNCTION, CALL_END] } else { &[CALL, FUNCTION] };
    State::Content { markers: Markers::new(markers), open }
}

fn body() -> State {
    State::Body(Markers::new(&[PARAMETER, FUNCTION_END, CALL_END, CALL, FUNCTION]))
}

impl Argument {
    fn push(&mut self, c: char, sink: &mut Sink) {
        match self {
            Self::Typed { text, .. } => text.push(c),
            Self::Text { first, line_feed } => {
                let mut json = String::new();
                if std::mem::take(line_feed) {
                    json.push_str("\\n");
                }
                let first = std::mem::take(first);
                match c {
                    '\n' if first => {}
                    '\n' => *line_feed = true,
                    _ => escaped(c, &mut json),
                }
                sink.arguments(&json);
            }
        }
    }

    fn end(&mut self, sink: &mut Sink) {
        match self {
            Self::Text { .. } => sink.arguments("\""),
            Self::Typed { types, text } => {
                let text = text.strip_prefix('\n').unwrap_or(text);
                let text = text.strip_suffix('\n').unwrap_or(text);
                sink.arguments(&types.json(text));
            }
        }
    }
}

/// What a schema lets a value be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Types {
    string: bool,
    number: bool,
    boolean: bool,
    null: bool,
    /// An array or object.
    container: bool,
}

impl Types {
    /// A schema that says nothing means a string, as in vLLM.
    fn only_string(self) -> bool {
        !(self.number || self.boolean || self.null || self.container)
    }

    /// A value's JSON. What is none of the types is a string, so that nothing is lost.
    fn json(self, text: &str) -> String {
        let plain = text.trim();
        let is = |word: &str| plain.eq_ignore_ascii_case(word);
        let valid = || serde_json::from_str::<IgnoredAny>(plain).is_ok();
        if (is("null") || is("none")) && (self.null || !self.string) {
            return "null".into();
        }
        if self.boolean && (is("true") || is("false")) {
            return plain.to_ascii_lowercase();
        }
        if self.number && plain.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) {
            if valid() {
                return plain.to_owned();
            }
            if let Some(number) = to_json(plain).filter(|json| !json.starts_with(['"', '[', '{'])) {
                return number;
            }
        }
        if self.container && plain.starts_with(['[', '{', '(']) {
            if valid() {
                return plain.to_owned();
            }
            if let Some(json) = to_json(plain) {
                return json;
            }
        }
        Value::from(text).to_string()
    }

    /// Adds what a schema lets a value be. `visits` bounds references that go in circles, which
    /// may be many at each turn.
    fn add(&mut self, schema: &Value, root: &Value, visits: &mut usize) {
        if *visits == 0 {
            return;
        }
        *visits -= 1;
        let kinds = match &schema["type"] {
            Value::Array(kinds) => kinds.as_slice(),
            one => std::slice::from_ref(one),
        };
        kinds.iter().filter_map(Value::as_str).for_each(|kind| match kind {
            "string" => self.string = true,
            "integer" | "number" => self.number = true,
            "boolean" => self.boolean = true,
            "null" => self.null = true,
            "array" | "object" => self.container = true,
            _ => {}
        });
        let values = schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"));
        values.filter(|_| schema["type"].is_null()).for_each(|value| match value {
            Value::String(_) => self.string = true,
            Value::Number(_) => self.number = true,
            Value::Bool(_) => self.boolean = true,
            Value::Null => self.null = true,
            Value::Array(_) | Value::Object(_) => self.container = true,
        });
        if schema["type"].is_null()
            && (schema["properties"].is_object() || schema["items"].is_object())
        {
            self.container = true;
        }
        for part in
            ["anyOf", "oneOf", "allOf"].map(|key| schema[key].as_array()).into_iter().flatten()
        {
            part.iter().for_each(|part| self.add(part, root, visits));
        }
        let pointer = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#'));
        if let Some(target) = pointer.and_then(|pointer| root.pointer(pointer)) {
            self.add(target, root, visits);
        }
    }
}

fn parameters(tool: &ToolSchema) -> HashMap<String, Types> {
    let Some(root) = &tool.parameters else { return HashMap::new() };
    let properties = root["properties"].as_object().into_iter().flatten();
    properties
        .map(|(name, schema)| {
            let mut types = Types::default();
            types.add(schema, root, &mut 64);
            (name.clone(), types)
        })
        .collect()
}
