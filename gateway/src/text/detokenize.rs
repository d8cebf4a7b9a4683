//! Tokens to text, one at a time, never half a character.

use super::TextModel;

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
}

impl Detokenizer {
    /// An empty text.
    pub fn new(skip_special_tokens: bool) -> Self {
        Self { ids: Vec::new(), context: 0, settled: 0, skip_special_tokens }
    }

    /// Adds a token and gives the text that is now certain.
    pub fn push(&mut self, model: &TextModel, id: u32) -> String {
        self.ids.push(id);
        let before = self.decode(model, self.settled);
        let after = self.decode(model, self.ids.len());
        // An unfinished character decodes to U+FFFD; one that stays so is given out at the end.
        if after.len() <= before.len() || after.ends_with('\u{fffd}') {
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
            ids => model.decode(ids, self.skip_special_tokens),
        }
    }
}
