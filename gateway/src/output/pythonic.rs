//! Calls written as Python: `[f(a=1, b="x"), g()]`.

use super::json::Scan;
use super::marker::Markers;
use super::python::Literal;
use super::sink::Sink;

/// Llama 4 puts these around its calls.
const START: &str = "<|python_start|>";
const END: &str = "<|python_end|>";

/// Reads calls written as Python.
#[derive(Debug)]
pub(super) struct Pythonic {
    state: State,
    /// Text that may turn out to be no call.
    held: String,
}

#[derive(Debug)]
enum State {
    /// `at_start`: a list may begin here. `open`: a closing tag is to come.
    Content {
        markers: Markers,
        at_start: bool,
        open: bool,
    },
    /// Behind the opening tag.
    Tagged,
    /// A function's name comes.
    Before,
    Name(String),
    /// Behind `name(`, before the call is certain.
    First {
        name: String,
    },
    /// The name of an argument. `call`: the function, if the call has not begun.
    Key {
        call: Option<String>,
        key: String,
    },
    /// Behind the comma between arguments.
    BeforeKey,
    Value(Literal),
    BehindValue,
    /// Behind a call.
    Behind,
    /// Arguments that are not Python: all up to the next marker.
    Broken(Markers),
}

impl Pythonic {
    pub(super) fn new() -> Self {
        Self { state: content(true, false), held: String::new() }
    }

    pub(super) fn step(&mut self, c: char, sink: &mut Sink) {
        while !self.take(c, sink) {}
    }

    /// Whether the letter is read; if not, it is for the state that follows.
    fn take(&mut self, c: char, sink: &mut Sink) -> bool {
        let white = c.is_whitespace();
        match &mut self.state {
            State::Content { markers, at_start, .. } => {
                if *at_start && c == '[' {
                    self.held.push(c);
                    self.state = State::Before;
                    return true;
                }
                *at_start &= white;
                let marker = markers.step(c, |c| sink.content(c));
                self.tag(marker);
            }
            State::Tagged => match c {
                _ if white => self.held.push(c),
                '[' => {
                    self.held.push(c);
                    self.state = State::Before;
                }
                _ => return self.no_call(sink),
            },
            State::Before => match c {
                _ if white => self.held.push(c),
                _ if identifier(c) && !c.is_ascii_digit() => {
                    self.held.push(c);
                    self.state = State::Name(c.into());
                }
                _ => return self.no_call(sink),
            },
            State::Name(name) => match c {
                '(' => {
                    self.held.push(c);
                    self.state = State::First { name: std::mem::take(name) };
                }
                _ if identifier(c) || c == '.' || c == '-' => {
                    self.held.push(c);
                    name.push(c);
                }
                _ => return self.no_call(sink),
            },
            State::First { name } => match c {
                _ if white => self.held.push(c),
                ')' => {
                    let name = std::mem::take(name);
                    self.start(&name, sink);
                    sink.arguments("{}");
                    self.state = State::Behind;
                }
                _ if identifier(c) => {
                    self.held.push(c);
                    self.state = State::Key { call: Some(std::mem::take(name)), key: c.into() };
                }
                _ => return self.no_call(sink),
            },
            State::Key { call, key } => match c {
                '=' => {
                    let (call, key) = (call.take(), std::mem::take(key));
                    match call {
                        Some(name) => {
                            self.start(&name, sink);
                            sink.arguments("{\"");
                        }
                        None => sink.arguments(", \""),
                    }
                    sink.arguments(key.trim_end());
                    sink.arguments("\": ");
                    self.state = State::Value(Literal::default());
                }
                _ if white || (identifier(c) && !key.ends_with(char::is_whitespace)) => {
                    key.push(c);
                    if call.is_some() {
                        self.held.push(c);
                    }
                }
                _ if call.is_some() => return self.no_call(sink),
                _ => {
                    sink.arguments(", ");
                    sink.arguments(&std::mem::take(key));
                    self.broken();
                    return false;
                }
            },
            State::BeforeKey => match c {
                _ if white => {}
                ')' => self.end(sink),
                _ if identifier(c) => self.state = State::Key { call: None, key: c.into() },
                _ => {
                    self.broken();
                    return false;
                }
            },
            State::Value(literal) => {
                let mut json = String::new();
                let scan = literal.step(c, &mut json);
                sink.arguments(&json);
                match scan {
                    Scan::More => {}
                    Scan::Last => self.state = State::BehindValue,
                    Scan::Behind => {
                        self.state = State::BehindValue;
                        return false;
                    }
                    Scan::Fault => {
                        self.broken();
                        return false;
                    }
                }
            }
            State::BehindValue => match c {
                _ if white => {}
                ',' => self.state = State::BeforeKey,
                ')' => self.end(sink),
                _ => {
                    self.broken();
                    return false;
                }
            },
            State::Behind => match c {
                _ if white => {}
                // The comma is content if no call follows.
                ',' => {
                    self.held.push(c);
                    self.state = State::Before;
                }
                ']' => self.state = content(false, true),
                _ => {
                    self.state = content(false, true);
                    return false;
                }
            },
            State::Broken(markers) => {
                let marker = markers.step(c, |c| sink.argument(c));
                self.tag(marker);
            }
        }
        true
    }

    /// The answer is over.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        sink.content_all(&std::mem::take(&mut self.held));
        match &mut self.state {
            State::Content { markers, open, .. } => {
                let held = markers.finish();
                if !(*open && END.starts_with(&held)) {
                    sink.content_all(&held);
                }
            }
            State::Broken(markers) => sink.arguments(&markers.finish()),
            _ => {}
        }
    }

    fn start(&mut self, name: &str, sink: &mut Sink) {
        self.held.clear();
        sink.start(name);
    }

    fn end(&mut self, sink: &mut Sink) {
        sink.arguments("}");
        self.state = State::Behind;
    }

    fn no_call(&mut self, sink: &mut Sink) -> bool {
        sink.content_all(&std::mem::take(&mut self.held));
        self.state = content(false, false);
        false
    }

    fn tag(&mut self, marker: Option<&'static str>) {
        match marker {
            None => {}
            Some(START) => {
                self.held.push_str(START);
                self.state = State::Tagged;
            }
            Some(_) => self.state = content(false, false),
        }
    }

    fn broken(&mut self) {
        self.state = State::Broken(Markers::new(&[START, END]));
    }
}

fn content(at_start: bool, open: bool) -> State {
    let markers: &[_] = if open { &[START, END] } else { &[START] };
    State::Content { markers: Markers::new(markers), at_start, open }
}

fn identifier(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
