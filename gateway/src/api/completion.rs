//! `POST /v1/completions`: what is particular to completions.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::sampling::{MAX_SEQUENCES, Wish};
use super::schema::PromptInput;
use super::structured::StructuredFields;
use super::token_ids;
use crate::error::ApiError;

/// Tokens generated when the request does not say.
pub const DEFAULT_MAX_TOKENS: u32 = 16;

/// The fields that only completions have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct CompletionFields {
    /// One prompt or several, each a text or tokens.
    #[schema(value_type = PromptInput)]
    prompt: Option<Value>,
    /// Alternatives to return with each token; -1 is the whole vocabulary.
    #[schema(minimum = -1)]
    logprobs: Option<i64>,
    /// Put the prompt before the answer.
    pub echo: Option<bool>,
    /// Let the tokenizer add its special tokens to a text; on by default.
    add_special_tokens: Option<bool>,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, to be tokenized.
    Text(String),
    /// Tokens, as they are.
    Tokens(Vec<u32>),
}

impl CompletionFields {
    /// What these fields ask of the answer.
    pub fn wish(&self, structured: &StructuredFields) -> Result<Wish, ApiError> {
        let echo = self.echo.unwrap_or(false);
        let constraint = structured.constraint()?.map(|it| (it, structured.field()));
        Ok(Wish { logprobs: self.logprobs, echo, prompt_alone: echo, constraint })
    }

    /// Whether the tokenizer adds its special tokens to a text.
    pub fn add_special_tokens(&self) -> bool {
        self.add_special_tokens.unwrap_or(true)
    }

    /// The prompts: a text, texts, tokens, or lists of tokens.
    pub fn prompts(&self, vocab_size: u32) -> Result<Vec<Prompt>, ApiError> {
        let wrong = || {
            let message = "`prompt` must be a string, a list of strings, a list of token ids or a \
                           list of such lists.";
            ApiError::malformed(message).param("prompt")
        };
        let tokens = |list: &[Value]| {
            if list.is_empty() {
                let message = "`prompt` must hold at least one token.";
                return Err(ApiError::bad_value("prompt", message));
            }
            token_ids("prompt", list, vocab_size).map(Prompt::Tokens)
        };
        let prompts = match &self.prompt {
            None => {
                return Err(ApiError::malformed("`prompt` is required.").param("prompt"));
            }
            Some(Value::String(text)) => vec![Prompt::Text(text.clone())],
            Some(Value::Array(list)) => match list.first() {
                None | Some(Value::Number(_)) => vec![tokens(list)?],
                Some(_) => list
                    .iter()
                    .map(|item| match item {
                        Value::String(text) => Ok(Prompt::Text(text.clone())),
                        Value::Array(list) => tokens(list),
                        _ => Err(wrong()),
                    })
                    .collect::<Result<_, _>>()?,
            },
            Some(_) => return Err(wrong()),
        };
        if prompts.len() > MAX_SEQUENCES {
            let message = format!("`prompt` holds {}, at most {MAX_SEQUENCES}.", prompts.len());
            return Err(ApiError::bad_value("prompt", message));
        }
        Ok(prompts)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn prompts(value: Value) -> Result<Vec<Prompt>, ApiError> {
        serde_json::from_value::<CompletionFields>(json!({"prompt": value})).unwrap().prompts(100)
    }

    #[test]
    fn all_four_shapes_are_read() {
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts(json!("a")).unwrap(), [text("a")]);
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(prompts(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        let lists = [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])];
        assert_eq!(prompts(json!([[1], [2]])).unwrap(), lists);
    }

    #[test]
    fn all_others_are_refused() {
        for bad in [
            json!(null),
            json!(5),
            json!({}),
            json!([]),
            json!([[]]),
            json!([1, "a"]),
            json!(["a", 1]),
            json!([-1]),
            json!([1.5]),
            json!([100]),
            json!([[1], [100]]),
            json!(vec!["a"; 129]),
        ] {
            let error = prompts(bad.clone()).unwrap_err().body();
            assert_eq!(error["error"]["param"], "prompt", "{bad}");
        }
    }
}
