//! Outputs of an independent implementation on the same weights.
//!
//! `reference/README.md` says how the files were made.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// One greedy continuation.
#[derive(Clone, Debug, Deserialize)]
pub struct Greedy {
    /// Names the case in messages.
    pub name: String,
    /// Token ids of the prompt.
    #[serde(rename = "prompt_token_ids")]
    pub prompt: Vec<u32>,
    /// Token ids of the answer, up to a number of steps or the end of the sequence.
    #[serde(rename = "output_token_ids")]
    pub output: Vec<u32>,
    /// The four best tokens and their logits at each step of the answer.
    pub top: Vec<Vec<(u32, f32)>>,
}

impl Greedy {
    /// By how much the reference preferred its token at this step of the answer.
    pub fn margin(&self, step: usize) -> Option<f32> {
        let top = self.top.get(step)?;
        Some(top.first()?.1 - top.get(1)?.1)
    }
}

/// A text and its tokens.
#[derive(Clone, Debug, Deserialize)]
pub struct Tokenized {
    /// The text.
    pub text: String,
    /// Its token ids, without special tokens added.
    pub ids: Vec<u32>,
    /// The text of the ids, where it is not `text`.
    pub decoded: Option<String>,
}

impl Tokenized {
    /// The text of the ids.
    pub fn decoded(&self) -> &str {
        self.decoded.as_deref().unwrap_or(&self.text)
    }
}

/// Messages and the tokens of the rendered template.
#[derive(Clone, Debug, Deserialize)]
pub struct Templated {
    /// The messages.
    pub messages: Value,
    /// Whether the start of an answer is rendered.
    pub add_generation_prompt: bool,
    /// The rendered text.
    pub rendered: String,
    /// Its token ids.
    pub ids: Vec<u32>,
}

/// All greedy cases.
pub fn greedy() -> Vec<Greedy> {
    read("greedy.json")
}

/// All tokenizer cases.
pub fn tokenize() -> Vec<Tokenized> {
    read("tokenize.json")
}

/// All chat-template cases.
pub fn chat_template() -> Vec<Templated> {
    read("chat_template.json")
}

fn read<T: DeserializeOwned>(name: &str) -> Vec<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference").join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut file: Value =
        serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_value(file["cases"].take())
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greedy_cases_cover_prompts_from_one_token_to_1500() {
        let cases = greedy();
        assert!(cases.len() >= 40, "{}", cases.len());
        let lengths: Vec<usize> = cases.iter().map(|case| case.prompt.len()).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&1), Some(&1500)));
        for case in &cases {
            assert_eq!(case.top.len(), case.output.len(), "{}", case.name);
            for (top, token) in case.top.iter().zip(&case.output) {
                assert_eq!(top[0].0, *token, "{}: greedy takes the best", case.name);
            }
        }
    }

    #[test]
    fn all_files_are_read() {
        assert!(tokenize().len() >= 100);
        assert!(chat_template().iter().any(|case| !case.add_generation_prompt));
    }
}
