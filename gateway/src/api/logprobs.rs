//! Log-probabilities in the two shapes that the API has for them.

use baton_proto::v1::{PromptTokenLogprob, Token, TokenLogprob};
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

    /// Both routes' `prompt_logprobs`: nothing for the first token, then the token itself and the
    /// most likely ones, by id.
    pub fn prompt(self, model: &TextModel, prompt: &[PromptTokenLogprob]) -> Value {
        let entry = |id: u32, logprob: f32, rank: usize| {
            let decoded = self.name(model, id);
            let value = json!({"logprob": finite(logprob), "rank": rank, "decoded_token": decoded});
            (id.to_string(), value)
        };
        let rest = prompt.iter().map(|token| {
            let top = token.top.iter().zip(1..);
            let mut all: Map<String, Value> =
                top.map(|(top, rank)| entry(top.id, top.logprob, rank)).collect();
            all.extend([entry(token.id, token.logprob, token.rank as usize)]);
            Value::Object(all)
        });
        std::iter::once(Value::Null).chain(rest).collect()
    }

    /// Completions: four lists side by side. `offset` is where in the text the first token
    /// begins, in characters; it is moved on.
    pub fn completion(self, model: &TextModel, tokens: &[Token], offset: &mut usize) -> Columns {
        let mut columns = Columns::default();
        for token in tokens {
            let logprob = token.logprob.unwrap_or_default();
            let name = self.name(model, token.id);
            let top = self.top(model, &name, logprob, &token.top);
            columns.push(name, offset, Some((logprob, top)));
        }
        columns
    }

    /// The same of a prompt that is echoed: there is no log-probability of its first token.
    pub fn completion_prompt(
        self,
        model: &TextModel,
        first: u32,
        rest: &[PromptTokenLogprob],
        offset: &mut usize,
    ) -> Columns {
        let mut columns = Columns::default();
        columns.push(self.name(model, first), offset, None);
        for token in rest {
            let name = self.name(model, token.id);
            let top = self.top(model, &name, token.logprob, &token.top);
            columns.push(name, offset, Some((token.logprob, top)));
        }
        columns
    }

    /// The chosen token is there even when it is none of the best.
    fn top(
        self,
        model: &TextModel,
        chosen: &str,
        logprob: f32,
        top: &[TokenLogprob],
    ) -> Map<String, Value> {
        let each = top.iter().map(|top| (self.name(model, top.id), finite(top.logprob).into()));
        let mut all: Map<String, Value> = each.collect();
        all.entry(chosen).or_insert_with(|| finite(logprob).into());
        all
    }
}

/// The `logprobs` of a completion: lists of one length.
#[derive(Debug, Default)]
pub struct Columns {
    offsets: Vec<usize>,
    names: Vec<String>,
    chosen: Vec<Option<f32>>,
    tops: Vec<Option<Map<String, Value>>>,
}

impl Columns {
    /// Adds what follows.
    pub fn append(&mut self, next: Self) {
        self.offsets.extend(next.offsets);
        self.names.extend(next.names);
        self.chosen.extend(next.chosen);
        self.tops.extend(next.tops);
    }

    /// The object.
    pub fn json(self) -> Value {
        json!({
            "text_offset": self.offsets,
            "token_logprobs": self.chosen,
            "tokens": self.names,
            "top_logprobs": self.tops,
        })
    }

    fn push(
        &mut self,
        name: String,
        offset: &mut usize,
        logprobs: Option<(f32, Map<String, Value>)>,
    ) {
        self.offsets.push(*offset);
        *offset += name.chars().count();
        self.names.push(name);
        let (chosen, top) = logprobs.unzip();
        self.chosen.push(chosen.map(finite));
        self.tops.push(top);
    }
}

/// JSON has no infinity; vLLM sends this.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
