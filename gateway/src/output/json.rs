//! JSON that comes letter by letter: where a value ends, and what a call's object says.

use serde::de::IgnoredAny;

use super::sink::Sink;

/// Finds the end of a JSON value. It knows strings, and that brackets match; whether commas and
/// colons are where they belong it leaves to who reads the value.
#[derive(Debug, Default)]
pub(super) struct ValueEnd {
    /// Closing brackets to come.
    open: Vec<char>,
    in_string: bool,
    escaped: bool,
    in_scalar: bool,
}

/// What a letter is to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// Part of it.
    More,
    /// Its last letter.
    Last,
    /// Not part of it: the value ended before.
    Behind,
    /// Something that no value has here.
    Fault,
}

impl ValueEnd {
    pub(super) fn step(&mut self, c: char) -> Scan {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    return self.last_if_closed();
                }
                _ => {}
            }
            return Scan::More;
        }
        if self.in_scalar && self.open.is_empty() {
            return if scalar(c) { Scan::More } else { Scan::Behind };
        }
        match c {
            '"' => self.in_string = true,
            '{' => self.open.push('}'),
            '[' => self.open.push(']'),
            '}' | ']' => {
                if self.open.pop() != Some(c) {
                    return Scan::Fault;
                }
                return self.last_if_closed();
            }
            _ if scalar(c) => self.in_scalar = true,
            ',' | ':' | ' ' | '\n' | '\r' | '\t' if !self.open.is_empty() => {}
            _ => return Scan::Fault,
        }
        Scan::More
    }

    fn last_if_closed(&self) -> Scan {
        if self.open.is_empty() { Scan::Last } else { Scan::More }
    }
}

/// A letter of a number, `true`, `false` or `null`.
fn scalar(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')
}

/// Reads `{"name": …, "arguments": {…}}` behind its opening brace, fields in any order.
#[derive(Debug)]
pub(super) struct CallObject {
    /// Only what must be a call is one: no fields but the known, and arguments that are an object.
    strict: bool,
    state: State,
    value: ValueEnd,
    /// The key or name being read, or arguments that cannot be given yet.
    text: String,
    name: Option<String>,
    arguments: Arguments,
    started: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    BeforeKey,
    Key,
    Colon(Field),
    Value(Field),
    Within(Field),
    BehindValue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

#[derive(Debug, PartialEq, Eq)]
enum Arguments {
    None,
    /// Given as they come.
    Flowing,
    /// In `text` until they are complete: they are a string, or came before the name.
    Kept,
    /// Complete, waiting for the name.
    Waiting(String),
    Given,
}

/// What a letter did to a call's object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It belongs to it.
    More,
    /// It is its end.
    Done,
    /// It does not belong to it.
    Failed,
}

impl CallObject {
    pub(super) fn new(strict: bool) -> Self {
        Self {
            strict,
            state: State::BeforeKey,
            value: ValueEnd::default(),
            text: String::new(),
            name: None,
            arguments: Arguments::None,
            started: false,
        }
    }

    /// Whether the sink has the call's start.
    pub(super) fn started(&self) -> bool {
        self.started
    }

    /// Whether the sink has all arguments.
    pub(super) fn complete(&self) -> bool {
        self.arguments == Arguments::Given
    }

    pub(super) fn step(&mut self, c: char, sink: &mut Sink) -> Step {
        match self.state {
            State::Key => return self.key(c),
            State::Within(field) => return self.within(field, c, sink),
            _ if matches!(c, ' ' | '\n' | '\r' | '\t') => return Step::More,
            State::Value(field) => return self.value(field, c, sink),
            State::BeforeKey if c == '"' => {
                self.text = c.into();
                self.value = ValueEnd { in_string: true, ..ValueEnd::default() };
                self.state = State::Key;
            }
            State::Colon(field) if c == ':' => self.state = State::Value(field),
            State::BehindValue if c == ',' => self.state = State::BeforeKey,
            // A comma before the brace is forgiven.
            State::BehindValue | State::BeforeKey if c == '}' => return self.end(sink),
            _ => return Step::Failed,
        }
        Step::More
    }

    /// The arguments so far, when they will not be complete.
    pub(super) fn give_up(&mut self, sink: &mut Sink) {
        if self.started && self.arguments == Arguments::Kept {
            sink.arguments(&std::mem::take(&mut self.text));
        }
        self.arguments = Arguments::Given;
    }

    fn key(&mut self, c: char) -> Step {
        self.text.push(c);
        if self.value.step(c) != Scan::Last {
            return Step::More;
        }
        let field = match serde_json::from_str::<String>(&self.text).as_deref() {
            Ok("name") if self.name.is_none() => Field::Name,
            Ok("arguments" | "parameters") if self.arguments == Arguments::None => Field::Arguments,
            Ok("type" | "id" | "name" | "arguments" | "parameters") => Field::Other,
            Ok(_) if !self.strict => Field::Other,
            _ => return Step::Failed,
        };
        self.state = State::Colon(field);
        Step::More
    }

    fn value(&mut self, field: Field, c: char, sink: &mut Sink) -> Step {
        match field {
            Field::Name if c != '"' => return Step::Failed,
            Field::Arguments if self.strict && c != '{' => return Step::Failed,
            Field::Arguments if self.name.is_none() || c == '"' => {
                self.start(sink);
                self.arguments = Arguments::Kept;
            }
            Field::Arguments => {
                self.start(sink);
                self.arguments = Arguments::Flowing;
            }
            Field::Name | Field::Other => {}
        }
        self.text.clear();
        self.value = ValueEnd::default();
        self.state = State::Within(field);
        self.within(field, c, sink)
    }

    fn within(&mut self, field: Field, c: char, sink: &mut Sink) -> Step {
        let scan = self.value.step(c);
        match (scan, field) {
            (Scan::Fault, _) => return Step::Failed,
            (Scan::Behind, _) | (_, Field::Other) => {}
            _ if self.arguments == Arguments::Flowing => sink.argument(c),
            _ => self.text.push(c),
        }
        if scan == Scan::More {
            return Step::More;
        }
        match field {
            Field::Name => match serde_json::from_str::<String>(&self.text) {
                Ok(name) if !name.is_empty() => {
                    self.name = Some(name);
                    // In the strict form the arguments must prove that this is a call.
                    if !self.strict || matches!(self.arguments, Arguments::Waiting(_)) {
                        self.start(sink);
                    }
                }
                _ => return Step::Failed,
            },
            Field::Arguments if self.arguments == Arguments::Kept => {
                let text = unquoted(std::mem::take(&mut self.text));
                if self.started {
                    sink.arguments(&text);
                    self.arguments = Arguments::Given;
                } else {
                    self.arguments = Arguments::Waiting(text);
                }
            }
            Field::Arguments => self.arguments = Arguments::Given,
            Field::Other => {}
        }
        self.state = State::BehindValue;
        if scan == Scan::Behind { self.step(c, sink) } else { Step::More }
    }

    fn start(&mut self, sink: &mut Sink) {
        if let Some(name) = self.name.as_ref().filter(|_| !self.started) {
            sink.start(name);
            self.started = true;
            if let Arguments::Waiting(text) = &self.arguments {
                sink.arguments(text);
                self.arguments = Arguments::Given;
            }
        }
    }

    fn end(&mut self, sink: &mut Sink) -> Step {
        if !self.started {
            return Step::Failed;
        }
        if self.arguments == Arguments::None {
            sink.arguments("{}");
            self.arguments = Arguments::Given;
        }
        Step::Done
    }
}

/// Arguments that were written as a JSON text within a string, as in OpenAI's own messages.
fn unquoted(text: String) -> String {
    match serde_json::from_str::<String>(&text) {
        Ok(inner)
            if inner.trim_start().starts_with('{')
                && serde_json::from_str::<IgnoredAny>(&inner).is_ok() =>
        {
            inner
        }
        _ => text,
    }
}
