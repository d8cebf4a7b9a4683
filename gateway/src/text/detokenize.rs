//! Tokens to text, one at a time, never half a character.

use super::TextModel;

/// Tokens of the prompt that the first ones of an answer are decoded with.
const CONTEXT: usize = 5;

/// Tokens that may wait for those that follow to become text. A character has four bytes, each a token
/// at most; more that wait are none, and would all be decoded again for every token.
const WAITING: usize = 64;

/// Turns a growing list of tokens into growing text.
///
/// A token's text depends on its neighbours (byte pieces of one character, leading blanks), so the
/// text of the last settled token is decoded together with the new ones and cut off again, as
/// vLLM and text-generation-inference do it.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Tokens before this one are no context any more.
    context: usize,
    /// Tokens before this one have been given out.
    settled: usize,
    skip_special_tokens: bool,
    /// Special tokens that are not skipped.
    kept: Vec<u32>,
}

impl Detokenizer {
    /// A text that goes on behind a prompt: decoders of SentencePiece take the blank away from a
    /// text's first word.
    pub fn after(model: &TextModel, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let mut ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        // Half a character at the prompt's end is none of the answer, whole or not.
        if model.decode(&ids, skip_special_tokens).ends_with('\u{fffd}') {
            ids.clear();
        }
        Self { settled: ids.len(), context: 0, ids, skip_special_tokens, kept: Vec::new() }
    }

    /// Has these special tokens in the text, also where others are skipped.
    pub fn keeping(mut self, kept: Vec<u32>) -> Self {
        self.kept = kept;
        self
    }

    /// Adds a token and gives the text that is now certain.
    pub fn push(&mut self, model: &TextModel, id: u32) -> String {
        let special = model.special.contains(&id);
        if self.skip_special_tokens && special && !self.kept.contains(&id) {
            return String::new();
        }
        self.ids.push(id);
        let before = self.decode(model, self.settled);
        let after = self.decode(model, self.ids.len());
        // An unfinished character decodes to U+FFFD; one that stays so is given out at the end.
        let waits = after.len() <= before.len() || after.ends_with('\u{fffd}');
        if waits && self.ids.len() - self.settled <= WAITING {
            return String::new();
        }
        if after.len() <= before.len() {
            // They are no text.
            self.ids.truncate(self.settled);
            return String::new();
        }
        let text = after.get(before.len()..).unwrap_or_default().to_owned();
        self.context = self.settled;
        self.settled = self.ids.len();
        text
    }

    /// The rest, when no token follows.
    pub fn finish(&mut self, model: &TextModel) -> String {
        if self.settled == self.ids.len() {
            return String::new();
        }
        let before = self.decode(model, self.settled);
        let after = self.decode(model, self.ids.len());
        self.context = self.ids.len();
        self.settled = self.ids.len();
        after.get(before.len()..).unwrap_or_default().to_owned()
    }

    fn decode(&self, model: &TextModel, end: usize) -> String {
        match &self.ids[self.context..end] {
            [] => String::new(),
            // Those that are skipped did not get here.
            ids => model.decode(ids, self.skip_special_tokens && self.kept.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const A: u32 = 0;
    /// The bytes of `é`.
    const E: [u32; 2] = [1, 2];
    const EOS: u32 = 3;
    const MARK: u32 = 4;

    fn model() -> TextModel {
        let special = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        };
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [special(EOS, "<eos>"), special(MARK, "<mark>")],
            "decoder": {
                "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true,
            },
            "model": {"type": "BPE", "vocab": {"a": A, "Ã": E[0], "©": E[1]}, "merges": []},
        });
        TextModel::of(&tokenizer)
    }

    #[test]
    fn half_a_character_waits_for_its_other_half() {
        let model = model();
        let mut text = Detokenizer::after(&model, &[], true);
        assert_eq!(text.push(&model, A), "a");
        assert_eq!(text.push(&model, E[0]), "");
        assert_eq!(text.push(&model, E[1]), "é");
        assert_eq!(text.push(&model, E[0]), "");
        assert_eq!(text.finish(&model), "\u{fffd}");
    }

    #[test]
    fn an_answer_goes_on_behind_its_prompt() {
        let tokenizer = json!({
            "version": "1.0",
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "model": {"type": "BPE", "vocab": {"▁is": 0, "▁Paris": 1}, "merges": []},
        });
        let model = TextModel::of(&tokenizer);
        assert_eq!(Detokenizer::after(&model, &[0], true).push(&model, 1), " Paris");
        assert_eq!(Detokenizer::after(&model, &[], true).push(&model, 1), "Paris");
    }

    #[test]
    fn tokens_without_text_are_not_kept() {
        let model = model();
        let mut text = Detokenizer::after(&model, &[], true);
        assert_eq!(text.push(&model, A), "a");
        for _ in 0..10_000 {
            assert_eq!(text.push(&model, EOS), "");
        }
        assert_eq!(text.ids, [A]);
        assert_eq!(text.push(&model, A), "a");
        // They are text where they are asked for.
        assert_eq!(Detokenizer::after(&model, &[], false).push(&model, EOS), "<eos>");
    }

    #[test]
    fn special_tokens_that_mark_something_are_text() {
        let model = model();
        assert_eq!(model.special_token("<mark>"), Some(MARK));
        assert_eq!(model.special_token("a"), None);
        let mut text = Detokenizer::after(&model, &[EOS], true).keeping(vec![MARK]);
        let pieces = [MARK, A, EOS, A, MARK].map(|id| text.push(&model, id));
        assert_eq!(pieces, ["<mark>", "a", "", "a", "<mark>"]);
        let mut all = Detokenizer::after(&model, &[], false).keeping(vec![MARK]);
        assert_eq!([MARK, EOS].map(|id| all.push(&model, id)), ["<mark>", "<eos>"]);
    }

    #[test]
    fn bytes_that_never_become_a_character_are_given_out() {
        let model = model();
        let mut text = Detokenizer::after(&model, &[], true);
        let mut all = String::new();
        for _ in 0..1000 {
            all += &text.push(&model, E[0]);
            assert!(text.ids.len() - text.settled <= WAITING);
        }
        all += &text.push(&model, A);
        assert_eq!(all, format!("{}a", "\u{fffd}".repeat(1000)));
    }
}
