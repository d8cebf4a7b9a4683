//! Text in, tokens out, and back: tokenizer, chat template, incremental detokenizing.

pub mod defaults;
pub mod detokenize;
pub mod parallel;
pub mod sequences;
pub mod stop;
pub mod template;

use std::collections::HashSet;
use std::str::FromStr as _;

use baton_proto::TokenizerBundle;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::output::{ReasoningSyntax, ToolSyntax};
use defaults::Defaults;
use template::ChatTemplate;

/// What a model needs to read and write text. Made once from a worker's bundle.
pub struct TextModel {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, if the model has one.
    pub template: Option<ChatTemplate>,
    /// Bytes of the longest token: a prompt with more bytes than this times the context cannot fit.
    pub longest_token: usize,
    /// Tokens that stand for no text.
    special: HashSet<u32>,
    /// How the model writes tool calls, as far as its template tells.
    pub tool_syntax: Option<ToolSyntax>,
    /// How it writes its reasoning, likewise.
    pub reasoning_syntax: Option<ReasoningSyntax>,
    /// What holds for sampling fields that a request leaves out.
    pub defaults: Defaults,
    /// `tokenizer_config.json`, as far as the model has one, with at least `tokenizer_class` and,
    /// if there is a chat template, `chat_template`.
    pub tokenizer_config: Map<String, Value>,
}

#[cfg(test)]
impl TextModel {
    /// A tokenizer alone.
    pub(crate) fn of(tokenizer: &Value) -> Self {
        Self::new(&TokenizerBundle {
            tokenizer_json: tokenizer.to_string(),
            chat_template: None,
            bos_token: None,
            eos_token: None,
            tokenizer_config: Map::new(),
            generation_config: Map::new(),
        })
        .expect("a tokenizer")
    }
}

impl TextModel {
    /// Builds it.
    pub fn new(bundle: &TokenizerBundle) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_str(&bundle.tokenizer_json)
            .map_err(|error| format!("the worker's tokenizer does not load: {error}"))?;
        // Some files have them set; what is cut is each request's to say, and nothing is padded.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        let longest_token =
            tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(1).max(1);
        let added = tokenizer.get_added_tokens_decoder().into_iter();
        let special = added.filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        let template = bundle
            .chat_template
            .as_ref()
            .map(|source| {
                ChatTemplate::new(source, bundle.bos_token.clone(), bundle.eos_token.clone())
            })
            .transpose()
            .map_err(|error| format!("the worker's chat template does not compile: {error}"))?;
        Ok(Self {
            tokenizer,
            template,
            longest_token,
            special,
            tool_syntax: bundle.chat_template.as_deref().and_then(ToolSyntax::detect),
            reasoning_syntax: bundle.chat_template.as_deref().and_then(ReasoningSyntax::detect),
            defaults: Defaults::of(&bundle.generation_config),
            tokenizer_config: tokenizer_config(bundle),
        })
    }

    /// Tokenizes a text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        self.tokenizer
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| error.to_string())
    }

    /// The special token with this text, if there is one.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        self.tokenizer.token_to_id(text).filter(|id| self.special.contains(id))
    }

    /// The text of some tokens.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        // The decoder fails on nothing that a vocabulary check lets through.
        self.tokenizer.decode(ids, skip_special_tokens).unwrap_or_default()
    }
}

fn tokenizer_config(bundle: &TokenizerBundle) -> Map<String, Value> {
    let mut config = bundle.tokenizer_config.clone();
    // GGUF files have no such thing; this is the class that reads any `tokenizer.json`.
    config.entry("tokenizer_class").or_insert_with(|| "PreTrainedTokenizerFast".into());
    if let Some(template) = &bundle.chat_template {
        config.insert("chat_template".into(), template.as_str().into());
    }
    config
}
