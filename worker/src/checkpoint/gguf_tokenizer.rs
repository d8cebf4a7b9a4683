//! The tokenizer and chat template that a GGUF carries, in the form gateways take.

use baton_proto::TokenizerBundle;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::tokenizer::TokenizerFromGguf as _;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::sequence::Sequence as Processors;
use tokenizers::{
    AddedToken, AddedVocabulary, ModelWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    SplitDelimiterBehavior, Tokenizer,
};

use super::gguf::Gguf;
use super::sentencepiece::{self, CONTROL, UNKNOWN, USER_DEFINED, around, flag, integer};
use super::{Checkpoint, LoadError};

/// Texts of tokens that end a turn or a text, as `llama-vocab.cpp` of llama.cpp has them: few files
/// name all of theirs.
const ENDS: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<|eom_id|>",
];

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
    if LLAMA3.contains(&pre) {
        as_llama3(gguf, &mut tokenizer)?;
    }
    // candle takes all that are no plain text for special.
    tokenizer.with_added_vocabulary(AddedVocabulary::new());
    tokenizer
        .add_tokens(added_tokens(gguf)?)
        .map_err(|error| gguf.corrupt(format!("tokenizer: {error}")))?;
    Ok(tokenizer)
}

/// What llama.cpp does for Llama 3's pre-tokenizer: a word that is a token is not split, and each
/// text begins with BOS unless the file says otherwise.
fn as_llama3(gguf: &Gguf, tokenizer: &mut Tokenizer) -> Result<(), LoadError> {
    if let ModelWrapper::BPE(model) = tokenizer.get_model() {
        let mut model = model.clone();
        model.ignore_merges = true;
        tokenizer.with_model(model);
    }
    let token = |key: &str| -> Result<Option<(String, u32)>, LoadError> {
        let id = gguf.optional_usize(key)?;
        Ok(token_text(gguf, key)?.zip(id).map(|(text, id)| (text, id as u32)))
    };
    let first = token("tokenizer.ggml.bos_token_id")?;
    if first.is_none() || flag(gguf, "tokenizer.ggml.add_bos_token").is_some() {
        return Ok(());
    }
    let last = match flag(gguf, "tokenizer.ggml.add_eos_token") {
        Some(true) => token("tokenizer.ggml.eos_token_id")?,
        _ => None,
    };
    let template = around(first, last).map_err(|error| gguf.corrupt(error))?;
    let steps: Vec<PostProcessorWrapper> = vec![ByteLevel::default().into(), template.into()];
    tokenizer.with_post_processor(Some(Processors::new(steps)));
    Ok(())
}

/// The tokens that are found in texts as a whole. Special ones are not shown; what a user defined,
/// such as `<think>`, is text. Unused ones are none of them.
fn added_tokens(gguf: &Gguf) -> Result<Vec<AddedToken>, LoadError> {
    let kinds = array(gguf, "tokenizer.ggml.token_type");
    let mut named = eos_token_ids(gguf)?;
    let first = gguf.optional_usize("tokenizer.ggml.bos_token_id")?;
    named.extend(first.map(|id| id as u32));
    let mut added = Vec::new();
    for (id, text) in array(gguf, "tokenizer.ggml.tokens").iter().enumerate() {
        let Value::String(text) = text else { continue };
        let kind = kinds.get(id).and_then(integer);
        let special = matches!(kind, Some(UNKNOWN | CONTROL)) || named.contains(&(id as u32));
        if special || kind == Some(USER_DEFINED) {
            added.push(AddedToken::from(text.as_str(), special).normalized(false));
        }
    }
    Ok(added)
}

/// The tokens that end a generation. The file's own end of text comes first, then what else it
/// names, then those that are known by their texts.
pub(super) fn eos_token_ids(gguf: &Gguf) -> Result<Vec<u32>, LoadError> {
    let mut ids: Vec<u32> = Vec::new();
    let mut add = |id: usize| {
        if !ids.contains(&(id as u32)) {
            ids.push(id as u32);
        }
    };
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(id) = gguf.optional_usize(&format!("tokenizer.ggml.{key}"))? {
            add(id);
        }
    }
    let texts = array(gguf, "tokenizer.ggml.tokens");
    for end in ENDS {
        let is_end = |text: &Value| matches!(text, Value::String(text) if text == end);
        if let Some(id) = texts.iter().position(is_end) {
            add(id);
        }
    }
    Ok(ids)
}

/// A list in the metadata; empty where there is none.
fn array<'a>(gguf: &'a Gguf, key: &str) -> &'a [Value] {
    match gguf.content().metadata.get(key) {
        Some(Value::Array(values)) => values,
        _ => &[],
    }
}

const PRE_TOKENIZERS: [&str; 5] = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"];

/// Names of Llama 3's.
const LLAMA3: [&str; 3] = ["llama-bpe", "llama3", "llama-v3"];

/// The splitter that llama.cpp's name stands for.
fn pre_tokenizer(name: &str) -> Option<PreTokenizerWrapper> {
    const LETTERS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+";
    const REST: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const GPT2: &str =
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    // One after the other: each splits what those before it left whole.
    let chain = |patterns: &[&str]| -> Option<PreTokenizerWrapper> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for pattern in patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).ok()?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Some(Sequence::new(steps).into())
    };
    let split = |digits: &str| {
        let pattern = format!("{LETTERS}|{digits}|{REST}");
        chain(&[pattern.as_str()])
    };
    // GPT-2's own pattern is built into the byte-level splitter.
    let gpt2 = ByteLevel::new(false, true, true);
    match name {
        // Not GPT-2's: LLAMA_VOCAB_PRE_TYPE_DEFAULT in llama.cpp's llama-vocab.cpp.
        "default" => chain(&[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
        "gpt-2" => Some(gpt2.into()),
        "smollm" => Some(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into()),
        "qwen2" => split(r"\p{N}"),
        _ if LLAMA3.contains(&name) => split(r"\p{N}{1,3}"),
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

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;
    use crate::checkpoint::gguf::tests::of;

    const TOKENS: &str = "tokenizer.ggml.tokens";

    fn texts(texts: &[&str]) -> Value {
        Value::Array(texts.iter().map(|text| Value::String((*text).to_owned())).collect())
    }

    fn kinds(kinds: &[i32]) -> Value {
        Value::Array(kinds.iter().map(|kind| Value::I32(*kind)).collect())
    }

    /// A file with a byte-level tokenizer.
    fn byte_level_of(
        tokens: &[&str],
        token_types: &[i32],
        merges: &[&str],
        more: &[(&str, Value)],
    ) -> Gguf {
        let mut metadata = vec![
            ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
            (TOKENS, texts(tokens)),
            ("tokenizer.ggml.token_type", kinds(token_types)),
            ("tokenizer.ggml.merges", texts(merges)),
        ];
        metadata.extend(more.iter().cloned());
        of(&metadata)
    }

    /// As gateways have it.
    fn read(gguf: &Gguf) -> Tokenizer {
        bundle(gguf).unwrap().tokenizer_json.parse().unwrap()
    }

    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec()
    }

    #[test]
    fn ends_are_named_or_known_by_their_texts() {
        let tokens = || (TOKENS, texts(&["a", "<|eom_id|>", "<|im_end|>", "</s>", "<|eot_id|>"]));
        let eos = ("tokenizer.ggml.eos_token_id", Value::U32(3));
        let eot = ("tokenizer.ggml.eot_token_id", Value::U32(2));
        let eom = ("tokenizer.ggml.eom_token_id", Value::U32(0));
        for (metadata, expected) in [
            (vec![tokens()], &[4u32, 2, 1][..]),
            (vec![tokens(), eos.clone()], &[3, 4, 2, 1]),
            (vec![tokens(), eom.clone(), eot.clone(), eos.clone()], &[3, 2, 0, 4, 1]),
            (vec![eos, eot, eom], &[3, 2, 0]),
        ] {
            assert_eq!(eos_token_ids(&of(&metadata)).unwrap(), expected);
        }
    }

    #[test]
    fn what_a_user_defined_is_text_and_what_is_unused_is_no_token() {
        let gguf = byte_level_of(
            &["a", "<think>", "<|im_end|>", "<|box|>", "[PAD4]", "<", "P"],
            &[1, 4, 4, 3, 5, 1, 1],
            &[],
            &[("tokenizer.ggml.pre", Value::String("qwen2".to_owned()))],
        );
        let tokenizer = read(&gguf);
        let added = tokenizer.get_added_tokens_decoder();
        let special = |id: u32| added.get(&id).map(|token| token.special);
        let found: Vec<Option<bool>> = (0..7).map(special).collect();
        // llama.cpp takes what ends a turn for special, whatever its kind.
        assert_eq!(found, [None, Some(false), Some(true), Some(true), None, None, None]);
        assert_eq!(ids(&tokenizer, "a<think>a<|im_end|>"), [0, 1, 0, 2]);
        assert!(!ids(&tokenizer, "[PAD4]").contains(&4));
        assert_eq!(tokenizer.decode(&[1, 0, 2, 3], true).unwrap(), "<think>a");
        assert_eq!(tokenizer.decode(&[4], false).unwrap(), "[PAD4]");
    }

    #[test]
    fn llama_3_begins_with_bos_and_keeps_words_that_are_tokens() {
        let tokens = ["a", "b", "c", "d", "ab", "cd", "abcd", "<s>", "</s>"];
        let types = [1, 1, 1, 1, 1, 1, 1, 3, 3];
        let of = |pre: &str, more: &[(&str, Value)]| {
            let mut metadata = vec![
                ("tokenizer.ggml.pre", Value::String(pre.to_owned())),
                ("tokenizer.ggml.bos_token_id", Value::U32(7)),
                ("tokenizer.ggml.eos_token_id", Value::U32(8)),
            ];
            metadata.extend(more.iter().cloned());
            ids(&read(&byte_level_of(&tokens, &types, &["a b", "c d"], &metadata)), "abcd")
        };
        let (bos, eos) = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token");
        for pre in LLAMA3 {
            assert_eq!(of(pre, &[]), [7, 6], "{pre}");
            assert_eq!(of(pre, &[(eos, Value::Bool(true))]), [7, 6, 8], "{pre}");
            assert_eq!(of(pre, &[(bos, Value::Bool(false))]), [6], "{pre}");
            assert_eq!(of(pre, &[(bos, Value::Bool(true))]), [7, 6], "{pre}");
        }
        assert_eq!(of("qwen2", &[]), [4, 5], "no other does");
        assert_eq!(of("qwen2", &[(bos, Value::Bool(true))]), [7, 4, 5]);
    }

    #[test]
    fn pre_tokenizers_split_as_in_llama_cpp() {
        let split = |name: &str, text: &str| -> Vec<String> {
            let mut text = PreTokenizedString::from(text);
            pre_tokenizer(name).unwrap().pre_tokenize(&mut text).unwrap();
            let parts = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            parts.into_iter().map(|(part, ..)| part.to_owned()).collect()
        };
        let text = "It's 12345 a=b, (c)  d";
        // Punctuation is cut off first, then words are as GPT-2's, then digits come by three.
        let default =
            ["It", "'", "s", "Ġ", "123", "45", "Ġa", "=", "b", ",", "Ġ", "(", "c", ")", "Ġ", "Ġd"];
        assert_eq!(split("default", text), default);
        let gpt2 = ["It", "'s", "Ġ12345", "Ġa", "=", "b", ",", "Ġ(", "c", ")", "Ġ", "Ġd"];
        assert_eq!(split("gpt-2", text), gpt2);
        for pre in LLAMA3 {
            let llama3 = ["It", "'s", "Ġ", "123", "45", "Ġa", "=b", ",", "Ġ(", "c", ")", "Ġ", "Ġd"];
            assert_eq!(split(pre, text), llama3);
        }
        assert!(pre_tokenizer("unheard of").is_none());
    }
}
