//! The tokenizer and chat template that a GGUF carries, in the form gateways take.

use baton_proto::TokenizerBundle;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::tokenizer::TokenizerFromGguf as _;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::gguf::Gguf;
use super::{Checkpoint, LoadError, sentencepiece};

/// Reads `tokenizer.ggml.*`.
///
/// # Errors
/// [`LoadError::Unsupported`] for a tokenizer model or pre-tokenizer this engine does not know.
pub(super) fn bundle(gguf: &Gguf) -> Result<TokenizerBundle, LoadError> {
    let tokenizer = match gguf.optional_str("tokenizer.ggml.model")?.unwrap_or_default() {
        "gpt2" => byte_level(gguf)?,
        "llama" => sentencepiece::read(gguf)?,
        other => {
            return Err(gguf.unsupported(format!(
                "tokenizer model `{other}` is not supported; supported: gpt2 (byte-level BPE), \
                 llama (SentencePiece BPE)"
            )));
        }
    };
    let tokenizer_json = tokenizer
        .to_string(false)
        .map_err(|error| gguf.corrupt(format!("tokenizer does not serialize: {error}")))?;
    Ok(TokenizerBundle {
        tokenizer_json,
        chat_template: gguf.optional_str("tokenizer.chat_template")?.map(str::to_owned),
        bos_token: token_text(gguf, "tokenizer.ggml.bos_token_id")?,
        eos_token: token_text(gguf, "tokenizer.ggml.eos_token_id")?,
        tokenizer_config: serde_json::Map::new(),
        generation_config: serde_json::Map::new(),
    })
}

/// Byte-level BPE. candle builds it; the pre-tokenizer is ours, because candle knows fewer of
/// llama.cpp's names (`tokenizer.ggml.pre`) and treats the rest as GPT-2's.
fn byte_level(gguf: &Gguf) -> Result<Tokenizer, LoadError> {
    let mut tokenizer = Tokenizer::from_gguf(gguf.content())
        .map_err(|error: candle_core::Error| gguf.corrupt(error.to_string()))?;
    let pre = gguf.optional_str("tokenizer.ggml.pre")?.unwrap_or("default");
    let splitter = pre_tokenizer(pre).ok_or_else(|| {
        gguf.unsupported(format!(
            "pre-tokenizer `{pre}` is not supported; supported: {}",
            PRE_TOKENIZERS.join(", ")
        ))
    })?;
    tokenizer.with_pre_tokenizer(Some(splitter));
    Ok(tokenizer)
}

/// The tokens that end a generation: end of text and, where the file names it, end of turn.
pub(super) fn eos_token_ids(gguf: &Gguf) -> Result<Vec<u32>, LoadError> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        if let Some(id) = gguf.optional_usize(key)?
            && !ids.contains(&(id as u32))
        {
            ids.push(id as u32);
        }
    }
    Ok(ids)
}

const PRE_TOKENIZERS: [&str; 5] = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"];

/// The splitter that llama.cpp's name stands for.
fn pre_tokenizer(name: &str) -> Option<PreTokenizerWrapper> {
    const LETTERS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+";
    const REST: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = |digits: &str| {
        let pattern = SplitPattern::Regex(format!("{LETTERS}|{digits}|{REST}"));
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).ok().map(|split| {
            Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into()
        })
    };
    // GPT-2's own pattern is built into the byte-level splitter.
    let gpt2 = ByteLevel::new(false, true, true);
    match name {
        "default" | "gpt-2" => Some(gpt2.into()),
        "smollm" => Some(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into()),
        "llama-bpe" | "llama3" => split(r"\p{N}{1,3}"),
        "qwen2" => split(r"\p{N}"),
        _ => None,
    }
}

fn token_text(gguf: &Gguf, key: &str) -> Result<Option<String>, LoadError> {
    let Some(id) = gguf.optional_usize(key)? else {
        return Ok(None);
    };
    match gguf.content().metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Array(tokens)) => match tokens.get(id) {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => Err(gguf.corrupt(format!("{key} {id} is not in tokenizer.ggml.tokens"))),
        },
        _ => Err(gguf.corrupt("metadata key tokenizer.ggml.tokens is missing".into())),
    }
}
