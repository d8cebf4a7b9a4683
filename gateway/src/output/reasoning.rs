//! The reasoning at an answer's beginning.

use super::marker::Markers;
use super::sink::Sink;
use super::{OutputFormat, ReasoningSyntax};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Splits an answer into reasoning, which goes to the sink, and the rest.
#[derive(Debug)]
pub(super) enum Splitter {
    /// Nothing but white space and a beginning of the opening tag so far.
    Start {
        held: String,
        /// What the text is if no tag opens it.
        inside: bool,
    },
    Inside(Markers),
    Over,
}

impl Splitter {
    pub(super) fn new(format: &OutputFormat) -> Self {
        match format.reasoning {
            None => Self::Over,
            Some(syntax) => {
                let usual = syntax == ReasoningSyntax::DeepseekR1;
                Self::Start { held: String::new(), inside: format.in_reasoning.unwrap_or(usual) }
            }
        }
    }

    /// Adds a letter; what is no reasoning goes to `rest`.
    pub(super) fn step(&mut self, c: char, sink: &mut Sink, rest: &mut String) {
        match self {
            Self::Over => rest.push(c),
            Self::Inside(markers) => {
                if markers.step(c, |c| sink.reasoning(c)).is_some() {
                    *self = Self::Over;
                }
            }
            Self::Start { held, inside } => {
                held.push(c);
                let tag = held.trim_start();
                if tag == OPEN {
                    *self = Self::Inside(Markers::new(&[CLOSE]));
                } else if !OPEN.starts_with(tag) {
                    let (held, inside) = (std::mem::take(held), *inside);
                    *self = if inside { Self::Inside(Markers::new(&[CLOSE])) } else { Self::Over };
                    held.chars().for_each(|c| self.step(c, sink, rest));
                }
            }
        }
    }

    /// The answer is over.
    pub(super) fn finish(&mut self, sink: &mut Sink, rest: &mut String) {
        match self {
            Self::Over => {}
            Self::Inside(markers) => markers.finish().chars().for_each(|c| sink.reasoning(c)),
            Self::Start { held, inside: true } => held.chars().for_each(|c| sink.reasoning(c)),
            Self::Start { held, inside: false } => rest.push_str(held),
        }
        *self = Self::Over;
    }
}
