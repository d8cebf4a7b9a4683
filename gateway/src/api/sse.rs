//! Server-sent events: the framing of WHATWG HTML, section 9.2.

use serde_json::Value;

/// Events that are to be sent.
#[derive(Debug, Default)]
pub struct Frames(String);

impl Frames {
    /// An event without a name.
    pub fn data(&mut self, event: &Value) {
        self.0.push_str("data: ");
        self.0.push_str(&event.to_string());
        self.0.push_str("\n\n");
    }

    /// An event with a name, which must not contain a line feed.
    pub fn event(&mut self, name: &str, event: &Value) {
        self.0.push_str("event: ");
        self.0.push_str(name);
        self.0.push('\n');
        self.data(event);
    }

    /// What readers skip.
    pub fn comment(&mut self, text: &str) {
        self.0.push_str(": ");
        self.0.push_str(text);
        self.0.push_str("\n\n");
    }

    /// OpenAI's last event.
    pub fn done(&mut self) {
        self.0.push_str("data: [DONE]\n\n");
    }

    /// The text so far; `None` when there are none, since an empty chunk would end a response.
    pub fn take(&mut self) -> Option<String> {
        (!self.0.is_empty()).then(|| std::mem::take(&mut self.0))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_cannot_break_out_of_its_event() {
        let mut frames = Frames::default();
        frames.event("delta", &json!({"text": "a\n\ndata: [DONE]\r\n"}));
        frames.done();
        let text = frames.take().unwrap();
        let expected = concat!(
            "event: delta\ndata: {\"text\":\"a\\n\\ndata: [DONE]\\r\\n\"}\n\n",
            "data: [DONE]\n\n"
        );
        assert_eq!(text, expected);
        assert_eq!(frames.take(), None);
    }
}
