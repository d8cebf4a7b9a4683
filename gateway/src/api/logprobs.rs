//! Log-probabilities in the two shapes that the API has for them.

use baton_proto::v1::Token;
use serde_json::{Map, Value, json};

use crate::text::TextModel;

/// How tokens are named.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naming {
    /// `token_id:N` in place of the text.
    pub as_token_ids: bool,
}

impl Naming {
    fn name(self, model: &TextModel, id: u32) -> String {
        match self.as_token_ids {
            true => format!("token_id:{id}"),
            false => model.decode(&[id], false),
        }
    }

    /// Chat: `logprobs.content`, one item for each token.
    pub fn chat(self, model: &TextModel, tokens: &[Token]) -> Value {
        let item = |id: u32, logprob: f32| {
            let token = self.name(model, id);
            let bytes: Vec<u8> = token.bytes().collect();
            json!({"token": token, "logprob": finite(logprob), "bytes": bytes})
        };
        let content: Vec<Value> = tokens
            .iter()
            .map(|token| {
                let mut entry = item(token.id, token.logprob.unwrap_or_default());
                entry["top_logprobs"] =
                    token.top.iter().map(|top| item(top.id, top.logprob)).collect();
                entry
            })
            .collect();
        json!({"content": content})
    }

    /// Completions: four lists side by side. `offset` is where in the text the first token
    /// begins, in characters; it is moved on.
    pub fn completion(self, model: &TextModel, tokens: &[Token], offset: &mut usize) -> Value {
        let (mut offsets, mut names, mut chosen, mut tops) = (vec![], vec![], vec![], vec![]);
        for token in tokens {
            let name = self.name(model, token.id);
            offsets.push(*offset);
            *offset += name.chars().count();
            let logprob = finite(token.logprob.unwrap_or_default());
            // The chosen token is there even when it is none of the best.
            let mut top: Map<String, Value> = token
                .top
                .iter()
                .map(|top| (self.name(model, top.id), finite(top.logprob).into()))
                .collect();
            top.entry(name.clone()).or_insert_with(|| logprob.into());
            names.push(name);
            chosen.push(logprob);
            tops.push(top);
        }
        json!({
            "text_offset": offsets,
            "token_logprobs": chosen,
            "tokens": names,
            "top_logprobs": tops,
        })
    }
}

/// JSON has no infinity; vLLM sends this.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
