//! What a model's authors recommend for sampling: `generation_config.json`.

use serde_json::{Map, Value};

/// Values of fields that a request leaves out.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    /// 0 is greedy.
    pub temperature: f64,
    /// 1 is off.
    pub top_p: f64,
    /// 0 is off.
    pub top_k: i64,
    /// 0 is off.
    pub min_p: f64,
    /// 1 is off.
    pub repetition_penalty: f64,
    /// Tokens of an answer.
    pub max_tokens: Option<u32>,
}

impl Defaults {
    /// What OpenAI's API has.
    pub const OPENAI: Self = Self {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        max_tokens: None,
    };

    /// The model's, as far as it has any. `transformers` writes values that mean nothing (a
    /// temperature beside `do_sample: false`), but vLLM reads them all the same, and so do we.
    pub fn of(config: &Map<String, Value>) -> Self {
        let number = |name: &str| config.get(name).and_then(Value::as_f64);
        let openai = Self::OPENAI;
        Self {
            temperature: number("temperature").unwrap_or(openai.temperature),
            top_p: number("top_p").unwrap_or(openai.top_p),
            top_k: config.get("top_k").and_then(Value::as_i64).unwrap_or(openai.top_k),
            min_p: number("min_p").unwrap_or(openai.min_p),
            repetition_penalty: number("repetition_penalty").unwrap_or(openai.repetition_penalty),
            max_tokens: config
                .get("max_new_tokens")
                .and_then(Value::as_u64)
                .and_then(|tokens| u32::try_from(tokens).ok())
                .filter(|tokens| *tokens > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_model_does_not_say_is_as_with_openai() {
        let config = json!({"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]});
        let expected = Defaults { temperature: 0.6, top_k: 20, ..Defaults::OPENAI };
        assert_eq!(Defaults::of(config.as_object().unwrap()), expected);
    }
}
