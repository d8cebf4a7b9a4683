//! Outputs of an independent implementation on the same weights.
//!
//! `reference/README.md` says how the files were made.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Tensors of a file of `safetensors`.
pub struct Tensors {
    header: Value,
    data: Vec<u8>,
}

impl Tensors {
    /// Reads `reference/NAME`.
    pub fn load(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference").join(name);
        let mut bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let length = bytes[..8].try_into().map(u64::from_le_bytes).expect("eight bytes") as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
        Self { header, data: bytes.split_off(8 + length) }
    }

    /// The numbers of an `F32` tensor.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name, "F32").map(f32::from_bits).collect()
    }

    /// The numbers of an `I32` tensor, none of them negative.
    pub fn numbers(&self, name: &str) -> Vec<u32> {
        self.words(name, "I32").collect()
    }

    fn words(&self, name: &str, kind: &str) -> impl Iterator<Item = u32> {
        let tensor = &self.header[name];
        assert_eq!(tensor["dtype"], kind, "{name}");
        let at = |end: usize| tensor["data_offsets"][end].as_u64().expect("an offset") as usize;
        let words = self.data[at(0)..at(1)].as_chunks::<4>().0;
        words.iter().map(|word| u32::from_le_bytes(*word))
    }
}

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

/// The texts whose embeddings `pooling/minilm.safetensors` holds.
pub fn embedded_texts() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/pooling/minilm.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
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
