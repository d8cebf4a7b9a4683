//! Where the readers put what they are certain of: parts, with neighbours of one kind joined.

use super::{CallIds, Part};

/// Gathers parts and keeps the rules on white space and on how many calls there are.
pub(super) struct Sink {
    parts: Vec<Part>,
    ids: CallIds,
    /// Calls so far, the ones that are left out too.
    calls: usize,
    /// The most calls to give.
    most: usize,
    /// White space before the first content. It is no content if a call comes first.
    blank: Option<String>,
    /// The last thing was a call: white space behind it only separates.
    behind_call: bool,
}

impl Sink {
    /// `tools`: calls may come.
    pub(super) fn new(ids: CallIds, most: usize, tools: bool) -> Self {
        let blank = tools.then(String::new);
        Self { parts: Vec::new(), ids, calls: 0, most, blank, behind_call: false }
    }

    pub(super) fn take(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }

    pub(super) fn reasoning(&mut self, c: char) {
        if let Some(Part::Reasoning(text)) = self.parts.last_mut() {
            text.push(c);
        } else {
            self.parts.push(Part::Reasoning(c.into()));
        }
    }

    pub(super) fn content(&mut self, c: char) {
        if c.is_whitespace() {
            if self.behind_call {
                return;
            }
            if let Some(blank) = &mut self.blank {
                blank.push(c);
                return;
            }
        }
        self.behind_call = false;
        self.end_blank();
        if let Some(Part::Content(text)) = self.parts.last_mut() {
            text.push(c);
        } else {
            self.parts.push(Part::Content(c.into()));
        }
    }

    pub(super) fn content_all(&mut self, text: &str) {
        text.chars().for_each(|c| self.content(c));
    }

    /// Begins the next call.
    pub(super) fn start(&mut self, name: &str) {
        self.blank = None;
        self.behind_call = true;
        self.calls += 1;
        if self.calls <= self.most {
            let (index, id) = (self.calls - 1, (self.ids)());
            self.parts.push(Part::CallStart { index, id, name: name.to_owned() });
        }
    }

    /// More arguments of the call that began last.
    pub(super) fn arguments(&mut self, more: &str) {
        if self.calls > self.most || more.is_empty() {
            return;
        }
        if let Some(Part::CallArguments { text, .. }) = self.parts.last_mut() {
            text.push_str(more);
        } else {
            let index = self.calls.saturating_sub(1);
            self.parts.push(Part::CallArguments { index, text: more.to_owned() });
        }
    }

    /// [`Sink::arguments`] of one character.
    pub(super) fn argument(&mut self, c: char) {
        self.arguments(c.encode_utf8(&mut [0; 4]));
    }

    /// The answer is over.
    pub(super) fn finish(&mut self) {
        self.end_blank();
    }

    fn end_blank(&mut self) {
        if let Some(blank) = self.blank.take()
            && !blank.is_empty()
        {
            self.parts.push(Part::Content(blank));
        }
    }
}
