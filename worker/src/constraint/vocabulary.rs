//! What each token is in bytes, as llguidance wants to know it.

use std::str::FromStr as _;
use std::sync::Arc;

use llguidance::token_bytes_from_tokenizer_json;
use serde_json::Value;
use tokenizers::Tokenizer;
use toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

/// A model's tokens as a trie of bytes, and its tokenizer.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

/// Reads a `tokenizer.json` for a model of `vocab` logits. Special tokens begin with llguidance's
/// marker, a byte that no text has: a grammar can name them, and no text produces them. Ids that
/// the tokenizer does not use have no bytes and never match.
pub(super) fn read(tokenizer_json: &str, vocab: usize, eos: &[u32]) -> Result<TokEnv, String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let mut description: Value =
        serde_json::from_str(tokenizer_json).map_err(|error| failed(&error))?;
    let mut bytes = token_bytes_from_tokenizer_json(&description).map_err(|error| failed(&error))?;
    bytes.resize(vocab, Vec::new());
    for &id in eos {
        // A file may forget to call it special.
        if let Some(bytes) = bytes.get_mut(id as usize)
            && bytes.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER)
        {
            bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
    }
    let first = eos.first().copied().unwrap_or(INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(vocab as u32, first), &bytes);
    if eos.len() > 1 {
        trie = trie.with_eos_tokens(eos);
    }
    // What a grammar forces goes on after other text.
    without_prefix(&mut description["normalizer"]);
    without_prefix(&mut description["pre_tokenizer"]);
    let mut tokenizer =
        Tokenizer::from_str(&description.to_string()).map_err(|error| failed(&error))?;
    tokenizer.set_encode_special_tokens(true);
    Ok(Arc::new(Vocabulary { trie, tokenizer }))
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let encoded = self.tokenizer.encode_fast(text, false);
            let ids = encoded.map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default();
            // The bytes that a grammar forces, whatever a normalizer makes of them.
            match self.trie.decode_raw(&ids) == text.as_bytes() {
                true => ids,
                false => self.trie.greedy_tokenize(text.as_bytes()),
            }
        })
    }
}

/// Takes out what puts a space before a text.
fn without_prefix(part: &mut Value) {
    match part {
        Value::Object(fields) => {
            let changes = [
                ("prepend_scheme", Value::from("never")),
                ("add_prefix_space", Value::from(false)),
                ("prepend", Value::from("")),
            ];
            for (field, value) in changes {
                fields.entry(field).and_modify(|it| *it = value);
            }
            fields.values_mut().for_each(without_prefix);
        }
        Value::Array(parts) => parts.iter_mut().for_each(without_prefix),
        _ => {}
    }
}
