//! Texts and pairs of texts as the sequences that encoders take: with the special tokens around
//! them, cut to a length that leaves those whole.

use tokenizers::utils::truncation::{
    TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};
use tokenizers::{Encoding, PostProcessor as _};

use super::TextModel;

/// How a sequence is cut when it is longer than `keep` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tokens to keep, special ones among them.
    pub keep: usize,
    /// Whether the beginning goes, in place of the end.
    pub left: bool,
}

/// A text without the special tokens around it, for pairs.
#[derive(Clone)]
pub struct Part(Encoding);

impl Part {
    /// Leaves the first `tokens` of it.
    pub fn shorten(&mut self, tokens: usize) {
        self.0.truncate(tokens, 0, TruncationDirection::Right);
    }

    /// How many tokens.
    pub fn tokens(&self) -> usize {
        self.0.get_ids().len()
    }
}

impl TextModel {
    /// A text's tokens, cut if they are too many.
    pub fn sequence(
        &self,
        text: &str,
        add_special_tokens: bool,
        cut: Option<Cut>,
    ) -> Result<Vec<u32>, String> {
        let ids = self.encode(text, add_special_tokens)?;
        let Some(cut) = cut.filter(|cut| cut.keep < ids.len()) else { return Ok(ids) };
        // The special tokens must stay, so they come after the cut.
        let mut part = self.part(text)?.0;
        let added = if add_special_tokens { self.special_tokens(false) } else { 0 };
        part.truncate(cut.keep.saturating_sub(added), 0, direction(cut));
        let encoding = self
            .tokenizer
            .post_process(part, None, add_special_tokens)
            .map_err(|error| error.to_string())?;
        let mut ids = encoding.get_ids().to_vec();
        // There may be more special tokens than are to be kept at all.
        ids.truncate(cut.keep);
        Ok(ids)
    }

    /// A text's tokens, without special ones.
    pub fn part(&self, text: &str) -> Result<Part, String> {
        self.tokenizer.encode_fast(text, false).map(Part).map_err(|error| error.to_string())
    }

    /// Two texts in one sequence, and which of them each token belongs to. The longer one is cut
    /// first, as Hugging Face's `longest_first` does.
    pub fn pair(
        &self,
        first: Part,
        second: Part,
        cut: Option<Cut>,
    ) -> Result<(Vec<u32>, Vec<u32>), String> {
        let (mut first, mut second) = (first.0, second.0);
        if let Some(cut) = cut {
            let params = TruncationParams {
                direction: direction(cut),
                max_length: cut.keep.saturating_sub(self.special_tokens(true)),
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
            };
            let (one, two) = truncate_encodings(first, Some(second), &params)
                .map_err(|error| error.to_string())?;
            (first, second) = (one, two.unwrap_or_default());
        }
        let pair = self
            .tokenizer
            .post_process(first, Some(second), true)
            .map_err(|error| error.to_string())?;
        Ok((pair.get_ids().to_vec(), pair.get_type_ids().to_vec()))
    }

    /// How many special tokens come around a text, or around and between two.
    pub fn special_tokens(&self, pair: bool) -> usize {
        self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(pair))
    }
}

fn direction(cut: Cut) -> TruncationDirection {
    match cut.left {
        true => TruncationDirection::Left,
        false => TruncationDirection::Right,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Words `a` to `f` are tokens 3 to 8, between `[CLS]` (1) and `[SEP]` (2).
    fn model() -> TextModel {
        let special = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        };
        let tokenizer = json!({
            "version": "1.0",
            // Sentence-transformers files have both; they are the server's to decide.
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "[UNK]",
            },
            "added_tokens": [special(0, "[UNK]"), special(1, "[CLS]"), special(2, "[SEP]")],
            "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
            "decoder": null,
            "model": {
                "type": "WordLevel", "unk_token": "[UNK]",
                "vocab": {
                    "[UNK]": 0, "[CLS]": 1, "[SEP]": 2,
                    "a": 3, "b": 4, "c": 5, "d": 6, "e": 7, "f": 8,
                },
            },
        });
        TextModel::of(&tokenizer)
    }

    #[test]
    fn a_cut_text_keeps_its_special_tokens() {
        let model = model();
        let cut = |keep, left| Some(Cut { keep, left });
        let of = |cut| model.sequence("a b c d e f", true, cut).unwrap();
        assert_eq!(of(None), [1, 3, 4, 5, 6, 7, 8, 2]);
        assert_eq!(of(cut(8, false)), [1, 3, 4, 5, 6, 7, 8, 2]);
        assert_eq!(of(cut(4, false)), [1, 3, 4, 2]);
        assert_eq!(of(cut(4, true)), [1, 7, 8, 2]);
        assert_eq!(of(cut(2, false)), [1, 2]);
        assert_eq!(of(cut(1, false)), [1]);
        assert_eq!(of(cut(0, false)), [0; 0]);
        assert_eq!(model.sequence("a b c", false, cut(2, true)).unwrap(), [4, 5]);
    }

    #[test]
    fn pairs_have_types_and_lose_tokens_of_the_longer_text_first() {
        let model = model();
        let of = |cut| {
            let (first, second) = (model.part("a b").unwrap(), model.part("c d e f").unwrap());
            model.pair(first, second, cut).unwrap()
        };
        let whole = (vec![1, 3, 4, 2, 5, 6, 7, 8, 2], vec![0, 0, 0, 0, 1, 1, 1, 1, 1]);
        assert_eq!(of(None), whole);
        assert_eq!(of(Some(Cut { keep: 9, left: false })), whole);
        let cut = of(Some(Cut { keep: 7, left: false }));
        assert_eq!(cut, (vec![1, 3, 4, 2, 5, 6, 2], vec![0, 0, 0, 0, 1, 1, 1]));
    }
}
