//! What a model's text means: reasoning, content, tool calls.
//!
//! [`OutputParser`] reads an answer as it comes; [`parse_whole`] reads a finished one with the
//! same machine, so a stream and a whole answer cannot differ.

pub mod constraint;
pub mod syntax;

use std::fmt;

pub use syntax::{ReasoningSyntax, ToolSyntax};

use crate::api::tools::ToolSchema;

/// A piece of an answer. Pieces of one kind that follow each other are one text, cut anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// More of what the model thinks before it answers.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// A tool call begins.
    CallStart {
        /// Counts the calls of this answer from 0.
        index: usize,
        /// The call's id.
        id: String,
        /// The function that is called.
        name: String,
    },
    /// More of a call's arguments, a JSON text.
    CallArguments {
        /// The call that they belong to; always the one that began last.
        index: usize,
        /// The next piece of the text.
        text: String,
    },
}

/// How to read an answer's text. The default reads all of it as content.
#[derive(Clone, Debug)]
pub struct OutputFormat {
    /// How calls are written; `None` where none are to be found: a request without tools, or with
    /// `tool_choice` none.
    pub tools: Option<ToolSyntax>,
    /// How reasoning is written.
    pub reasoning: Option<ReasoningSyntax>,
    /// What the prompt's end says of the reasoning: `Some(true)` has opened it, `Some(false)` has
    /// closed it. See [`ReasoningSyntax::state_after`].
    pub in_reasoning: Option<bool>,
    /// Whether calls behind the first are kept.
    pub parallel_tool_calls: bool,
}

impl Default for OutputFormat {
    fn default() -> Self {
        Self { tools: None, reasoning: None, in_reasoning: None, parallel_tool_calls: true }
    }
}

/// Where the ids of calls come from.
pub type CallIds = Box<dyn FnMut() -> String + Send>;

/// Reads an answer piece by piece.
pub struct OutputParser {
    format: OutputFormat,
}

impl OutputParser {
    /// Begins an answer. `tools` are the request's; ids are random.
    pub fn new(format: &OutputFormat, tools: &[ToolSchema]) -> Self {
        Self::with_ids(format, tools, Box::new(String::new))
    }

    /// [`OutputParser::new`] with ids from `ids`.
    pub fn with_ids(format: &OutputFormat, _tools: &[ToolSchema], _ids: CallIds) -> Self {
        Self { format: format.clone() }
    }

    /// Takes more text and gives what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        if text.is_empty() { Vec::new() } else { vec![Part::Content(text.to_owned())] }
    }

    /// Gives what was held back, when no more text follows.
    pub fn finish(&mut self) -> Vec<Part> {
        Vec::new()
    }
}

impl fmt::Debug for OutputParser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutputParser").field("format", &self.format).finish_non_exhaustive()
    }
}

/// A tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Its id.
    pub id: String,
    /// The function that is called.
    pub name: String,
    /// A JSON text, as the model wrote it: it may be invalid, or end in the middle.
    pub arguments: String,
}

/// A whole answer. The parts of several pushes gather in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// All reasoning.
    pub reasoning: String,
    /// All content.
    pub content: String,
    /// All calls.
    pub calls: Vec<Call>,
}

impl Parsed {
    /// Adds what a push gave.
    pub fn extend(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Reasoning(text) => self.reasoning.push_str(&text),
                Part::Content(text) => self.content.push_str(&text),
                Part::CallStart { id, name, .. } => {
                    self.calls.push(Call { id, name, arguments: String::new() });
                }
                Part::CallArguments { index, text } => {
                    if let Some(call) = self.calls.get_mut(index) {
                        call.arguments.push_str(&text);
                    }
                }
            }
        }
    }
}

/// Reads a finished answer.
pub fn parse_whole(format: &OutputFormat, tools: &[ToolSchema], text: &str) -> Parsed {
    let mut parser = OutputParser::new(format, tools);
    let mut parsed = Parsed::default();
    parsed.extend(parser.push(text));
    parsed.extend(parser.finish());
    parsed
}
