//! Calls written as JSON: Hermes, Llama 3, Mistral, and lists that a grammar constrains.

use super::ToolSyntax;
use super::json::{CallObject, Scan, Step, ValueEnd};
use super::marker::Markers;
use super::sink::Sink;

const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

/// Reads calls written as JSON.
#[derive(Debug)]
pub(super) struct JsonCalls {
    form: Form,
    state: State,
    /// Text that may turn out to be no call.
    held: String,
}

/// What tells the syntaxes apart.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Open a call.
    starts: &'static [&'static str],
    /// Closes a call.
    end: Option<&'static str>,
    /// What begins a call where the answer begins.
    first: Option<char>,
    /// Objects must be calls without doubt, for nothing marks them.
    strict: bool,
    /// `name{…}` is a call too, and so are lists.
    mistral: bool,
}

#[derive(Debug)]
enum State {
    /// `at_start`: there was nothing but white space yet. `open`: a call's end marker is to come.
    Content {
        markers: Markers,
        at_start: bool,
        open: bool,
    },
    /// Before a call; `list`: in a list of them.
    Before {
        list: bool,
    },
    Object {
        object: CallObject,
        list: bool,
    },
    /// Behind a call's object.
    Behind {
        list: bool,
    },
    /// Mistral's name of a function.
    Name(String),
    /// What is between name and arguments.
    Header {
        name: String,
        header: String,
    },
    /// Arguments that no object holds.
    Arguments(Option<ValueEnd>),
    /// Arguments that are not JSON: all up to the next marker.
    Broken(Markers),
}

impl JsonCalls {
    pub(super) fn new(syntax: &ToolSyntax) -> Self {
        let none = Form { starts: &[], end: None, first: None, strict: false, mistral: false };
        let form = match syntax {
            // Llama 4 has a pair of tags, Llama 3 one.
            ToolSyntax::Llama3Json => Form {
                starts: &["<|python_tag|>", "<|python_start|>"],
                end: Some("<|python_end|>"),
                first: Some('{'),
                strict: true,
                ..none
            },
            ToolSyntax::Mistral => Form { starts: &["[TOOL_CALLS]"], mistral: true, ..none },
            ToolSyntax::JsonList => Form { first: Some('['), strict: true, ..none },
            _ => Form { starts: &["<tool_call>"], end: Some("</tool_call>"), ..none },
        };
        let mut calls = Self { form, state: State::Name(String::new()), held: String::new() };
        calls.content(true, false);
        calls
    }

    pub(super) fn step(&mut self, c: char, sink: &mut Sink) {
        // A letter that a state does not take is read again in the next, which is at last
        // `Content`, and that takes all.
        while !self.take(c, sink) {}
    }

    fn take(&mut self, c: char, sink: &mut Sink) -> bool {
        let white = c.is_whitespace();
        match &mut self.state {
            State::Content { markers, at_start, .. } => {
                if *at_start && self.form.first == Some(c) {
                    self.held.push(c);
                    self.state = match c {
                        '{' => self.object(false),
                        _ => State::Before { list: true },
                    };
                    return true;
                }
                *at_start &= white;
                match markers.step(c, |c| sink.content(c)) {
                    None => {}
                    Some(marker) if self.form.starts.contains(&marker) => self.before(marker),
                    Some(_) => self.content(false, false),
                }
            }
            State::Before { list } => match c {
                _ if white => self.held.push(c),
                '{' => {
                    let list = *list;
                    self.held.push(c);
                    self.state = self.object(list);
                }
                '[' if self.form.mistral && !*list => {
                    self.held.push(c);
                    self.state = State::Before { list: true };
                }
                _ if self.form.mistral && !*list && in_name(c) => {
                    self.held.push(c);
                    self.state = State::Name(c.into());
                }
                _ => return self.no_call(sink),
            },
            State::Object { object, list } => match object.step(c, sink) {
                Step::More if object.started() => self.held.clear(),
                Step::More => self.held.push(c),
                Step::Done => self.state = State::Behind { list: *list },
                Step::Failed if !object.started() => return self.no_call(sink),
                Step::Failed if object.complete() => {
                    self.state = State::Behind { list: *list };
                    return false;
                }
                Step::Failed => {
                    object.give_up(sink);
                    self.broken();
                    return false;
                }
            },
            State::Behind { list } => match c {
                _ if white => {}
                // What separates is content if no call follows.
                ',' if *list => {
                    self.held.push(c);
                    self.state = State::Before { list: true };
                }
                ']' if *list => self.content(false, false),
                ';' if self.form.strict && !*list => {
                    self.held.push(c);
                    self.state = State::Before { list: false };
                }
                '{' if self.form.strict && !*list => {
                    self.held.push(c);
                    self.state = self.object(false);
                }
                // One brace too many is a frequent slip.
                '}' => {}
                _ => {
                    self.content(false, true);
                    return false;
                }
            },
            State::Name(name) => match c {
                '{' => {
                    let name = std::mem::take(name);
                    return self.start(&name, sink);
                }
                '[' => {
                    self.held.push(c);
                    let name = std::mem::take(name);
                    self.state = State::Header { name, header: c.into() };
                }
                _ if in_name(c) => {
                    self.held.push(c);
                    name.push(c);
                }
                _ => return self.no_call(sink),
            },
            State::Header { name, header } => {
                header.push(c);
                self.held.push(c);
                if header.ends_with(ARGUMENTS) {
                    let name = std::mem::take(name);
                    self.start(&name, sink);
                } else if !in_header(header) {
                    self.held.pop();
                    return self.no_call(sink);
                }
            }
            State::Arguments(None) => {
                if !white {
                    self.state = State::Arguments(Some(ValueEnd::default()));
                    return false;
                }
            }
            State::Arguments(Some(value)) => match value.step(c) {
                Scan::More => sink.argument(c),
                Scan::Last => {
                    sink.argument(c);
                    self.content(false, false);
                }
                Scan::Behind => {
                    self.content(false, false);
                    return false;
                }
                Scan::Fault => {
                    self.broken();
                    return false;
                }
            },
            State::Broken(markers) => match markers.step(c, |c| sink.argument(c)) {
                None => {}
                Some(marker) if self.form.starts.contains(&marker) => self.before(marker),
                Some(_) => self.content(false, false),
            },
        }
        true
    }

    /// The answer is over.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        sink.content_all(&std::mem::take(&mut self.held));
        match &mut self.state {
            State::Content { markers, open, .. } => {
                let held = markers.finish();
                let end = self.form.end.filter(|_| *open);
                if !end.is_some_and(|end| end.starts_with(&held)) {
                    sink.content_all(&held);
                }
            }
            State::Object { object, .. } => object.give_up(sink),
            State::Broken(markers) => sink.arguments(&markers.finish()),
            _ => {}
        }
    }

    fn object(&self, list: bool) -> State {
        State::Object { object: CallObject::new(self.form.strict), list }
    }

    fn content(&mut self, at_start: bool, open: bool) {
        let end = self.form.end.filter(|_| open);
        let markers: Vec<_> = self.form.starts.iter().copied().chain(end).collect();
        self.state = State::Content { markers: Markers::new(&markers), at_start, open };
    }

    /// Behind an opening marker.
    fn before(&mut self, marker: &str) {
        self.held.push_str(marker);
        self.state = State::Before { list: false };
    }

    /// What was held is content, and the letter is to be read again.
    fn no_call(&mut self, sink: &mut Sink) -> bool {
        sink.content_all(&std::mem::take(&mut self.held));
        self.content(false, false);
        false
    }

    fn start(&mut self, name: &str, sink: &mut Sink) -> bool {
        self.held.clear();
        sink.start(name);
        self.state = State::Arguments(None);
        false
    }

    fn broken(&mut self) {
        let markers: Vec<_> = self.form.starts.iter().copied().chain(self.form.end).collect();
        self.state = State::Broken(Markers::new(&markers));
    }
}

/// Whether what is between name and arguments may go on like this.
fn in_header(header: &str) -> bool {
    let id = header.starts_with(CALL_ID) && header.len() <= 128;
    id || ARGUMENTS.starts_with(header) || CALL_ID.starts_with(header)
}

fn in_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | ':')
}
