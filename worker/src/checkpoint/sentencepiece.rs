//! SentencePiece's byte-pair encoding (Kudo and Richardson 2018), as GGUF carries it: pieces with
//! scores, `tokenizer.ggml.model` = `llama`.
//!
//! SentencePiece joins the two neighbours whose joined piece has the highest score. A list of merges
//! in the order of those scores does the same, so the tokenizer becomes an ordinary BPE one.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer};

use super::gguf::Gguf;
use super::{Checkpoint, LoadError};

/// How SentencePiece writes a space.
const SPACE: &str = "▁";

/// `tokenizer.ggml.token_type`.
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;

/// Builds the tokenizer.
pub(super) fn read(gguf: &Gguf) -> Result<Tokenizer, LoadError> {
    let pieces = array(gguf, "tokenizer.ggml.tokens", |value| value.to_string().ok().cloned())?;
    let scores = array(gguf, "tokenizer.ggml.scores", |value| value.to_f32().ok())?;
    let types = array(gguf, "tokenizer.ggml.token_type", integer)?;
    if scores.len() != pieces.len() || types.len() != pieces.len() {
        return Err(gguf.corrupt("tokenizer.ggml.* arrays differ in length".into()));
    }
    let unknown = gguf.optional_usize("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let unknown = pieces
        .get(unknown)
        .ok_or_else(|| gguf.corrupt(format!("unknown token {unknown} is not in the vocabulary")))?;
    let ids: HashMap<&str, u32> = pieces.iter().map(String::as_str).zip(0..).collect();
    let failed = |error: tokenizers::Error| gguf.corrupt(format!("tokenizer: {error}"));
    let vocab: Vocab = pieces.iter().cloned().zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges(&pieces, &scores, &ids))
        .unk_token(unknown.clone())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(failed)?;
    let mut tokenizer = Tokenizer::new(model);
    let prefix = flag(gguf, "tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let space = |from: &str, to: &str| Replace::new(from, to).map_err(failed);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![space(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(space(" ", SPACE)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(failed)?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    let added = |kind: i64, special: bool| {
        let of_kind = pieces.iter().zip(&types).filter(move |(_, t)| **t == kind);
        of_kind.map(move |(piece, _)| AddedToken::from(piece, special).normalized(false))
    };
    tokenizer.add_special_tokens(added(CONTROL, true)).map_err(failed)?;
    tokenizer.add_tokens(added(USER_DEFINED, false)).map_err(failed)?;
    // As llama.cpp does it where the file does not say.
    let first = flag(gguf, "tokenizer.ggml.add_bos_token").unwrap_or(true);
    let last = flag(gguf, "tokenizer.ggml.add_eos_token").unwrap_or(false);
    let special = |wanted: bool, key: &str| -> Result<Option<(String, u32)>, LoadError> {
        let id = if wanted { gguf.optional_usize(key)? } else { None };
        Ok(id.and_then(|id| Some((pieces.get(id)?.clone(), id as u32))))
    };
    let first = special(first, "tokenizer.ggml.bos_token_id")?;
    let last = special(last, "tokenizer.ggml.eos_token_id")?;
    if first.is_some() || last.is_some() {
        let template = around(first, last).map_err(|error| gguf.corrupt(error))?;
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

/// What puts these tokens around each text.
pub(super) fn around(
    first: Option<(String, u32)>,
    last: Option<(String, u32)>,
) -> Result<TemplateProcessing, String> {
    let put = |text: &str| -> Vec<String> {
        let before = first.iter().map(|(piece, _)| piece.clone());
        let after = last.iter().map(|(piece, _)| piece.clone());
        before.chain([text.to_owned()]).chain(after).collect()
    };
    let (single, pair) = (put("$A"), [put("$A"), put("$B")].concat());
    let special: Vec<(String, u32)> = first.iter().chain(&last).cloned().collect();
    TemplateProcessing::builder()
        .try_single(single)
        .and_then(|template| template.try_pair(pair))?
        .special_tokens(special)
        .build()
        .map_err(|error| error.to_string())
}

/// Every way to make a piece of two others, the highest score first.
fn merges(pieces: &[String], scores: &[f32], ids: &HashMap<&str, u32>) -> Merges {
    let mut merges = Vec::new();
    for (piece, score) in pieces.iter().zip(scores) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((*score, l, r, left, right));
            }
        }
    }
    // Of one piece's ways, those of the pieces that come first.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

fn array<T>(
    gguf: &Gguf,
    key: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>, LoadError> {
    let values = match gguf.content().metadata.get(key) {
        Some(Value::Array(values)) => values.iter().map(read).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    values.ok_or_else(|| gguf.corrupt(format!("metadata key {key} is missing or of another type")))
}

pub(super) fn integer(value: &Value) -> Option<i64> {
    match *value {
        Value::I32(v) => Some(v.into()),
        Value::U32(v) => Some(v.into()),
        _ => None,
    }
}

pub(super) fn flag(gguf: &Gguf, key: &str) -> Option<bool> {
    gguf.content().metadata.get(key).and_then(|value| value.to_bool().ok())
}

#[cfg(test)]
mod tests {
    use tokenizers::{Encoding, PostProcessor as _, Token};

    use super::*;

    #[test]
    fn texts_have_the_tokens_around_them_that_the_file_asks_for() {
        let text = |id: u32| Encoding::from_tokens(vec![Token::new(id, "a".into(), (0, 1))], 0);
        let (bos, eos) = (|| Some(("<s>".to_owned(), 1u32)), || Some(("</s>".to_owned(), 2u32)));
        for (first, last, single, pair) in [
            (bos(), None, &[1u32, 7][..], &[1u32, 7, 1, 8][..]),
            (None, eos(), &[7, 2], &[7, 2, 8, 2]),
            (bos(), eos(), &[1, 7, 2], &[1, 7, 2, 1, 8, 2]),
        ] {
            let template = around(first, last).unwrap();
            let one = template.process(text(7), None, true).unwrap();
            assert_eq!(one.get_ids(), single);
            let two = template.process(text(7), Some(text(8)), true).unwrap();
            assert_eq!(two.get_ids(), pair);
            assert_eq!(template.process(text(7), None, false).unwrap().get_ids(), [7]);
        }
    }
}
