//! What each token is in bytes, as llguidance wants to know it.

use std::str::FromStr as _;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

/// How SentencePiece writes a space.
const SPACE: char = '▁';

/// Reads a `tokenizer.json` for a model of `vocab` logits.
///
/// Special tokens begin with llguidance's marker, a byte that no text has: a grammar can name them,
/// and no text produces them. Ids that the tokenizer does not use have no bytes and never match.
///
/// Text that a constraint leaves no choice of is not tokenized for the model, which so draws among
/// all its tokenizations: a forced one might be what other parameters forbid, and forced text is of
/// any length.
pub(super) fn read(tokenizer_json: &str, vocab: usize, eos: &[u32]) -> Result<TokEnv, String> {
    let tokenizer = Tokenizer::from_str(tokenizer_json).map_err(|error| error.to_string())?;
    let mut bytes = token_bytes(&tokenizer, vocab)?;
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
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

/// The bytes of every token. Not llguidance's own function for this, which refuses a vocabulary
/// for one token that is not written as the others.
fn token_bytes(tokenizer: &Tokenizer, vocab: usize) -> Result<Vec<Vec<u8>>, String> {
    let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| e.to_string())?;
    // Either GPT-2's writing, a letter for each byte, or SentencePiece's: text with `▁` for a
    // space, and `<0xNN>` for a byte.
    let byte_level = mentions(&decoder, "ByteLevel");
    let letters = byte_letters();
    let added = tokenizer.get_added_tokens_decoder();
    let bytes = |id: u32| -> Option<Vec<u8>> {
        if let Some(token) = added.get(&id) {
            let marker = token.special.then_some(TokTrie::SPECIAL_TOKEN_MARKER);
            return Some(marker.into_iter().chain(token.content.bytes()).collect());
        }
        let text = tokenizer.id_to_token(id)?;
        match (byte_level, byte_piece(&text)) {
            (true, _) => text.chars().map(&letters).collect(),
            (false, Some(byte)) => Some(vec![byte]),
            (false, None) => Some(text.replace(SPACE, " ").into_bytes()),
        }
    };
    let all: Vec<Vec<u8>> = (0..vocab as u32).map(|id| bytes(id).unwrap_or_default()).collect();
    match all.iter().any(|bytes| !bytes.is_empty()) {
        true => Ok(all),
        false => Err("its tokens cannot be written as bytes".to_owned()),
    }
}

/// The byte that `<0xNN>` stands for.
fn byte_piece(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a letter of GPT-2's alphabet stands for: printable Latin-1 is itself, the others
/// follow in order from U+0100 on (`bytes_to_unicode` in GPT-2's `encoder.py`).
fn byte_letters() -> impl Fn(char) -> Option<u8> {
    let own = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others: Vec<u8> = (0..=255).filter(|byte| !own(*byte)).collect();
    move |letter| match u32::from(letter) {
        code @ 0..=255 => Some(code as u8).filter(|byte| own(*byte)),
        code => others.get(code as usize - 256).copied(),
    }
}

/// Whether a part of this type is in a tokenizer's description.
fn mentions(part: &Value, kind: &str) -> bool {
    match part {
        Value::Object(fields) => {
            fields.get("type").is_some_and(|it| it == kind)
                || fields.values().any(|it| mentions(it, kind))
        }
        Value::Array(parts) => parts.iter().any(|it| mentions(it, kind)),
        _ => false,
    }
}
