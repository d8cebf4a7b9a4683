//! Token counts, and the room that a prompt leaves.

use serde_json::{Value, json};

use crate::error::ApiError;

/// The `usage` object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of all prompts, each counted once.
    pub prompt_tokens: usize,
    /// Tokens of all answers.
    pub completion_tokens: usize,
    /// Prompt tokens that were found in a prefix cache.
    pub cached_tokens: usize,
}

impl Usage {
    /// What answers took together, `n` of them to each prompt, which counts once.
    pub fn total(answers: &[Self], n: usize) -> Self {
        let prompts = || answers.iter().step_by(n);
        Self {
            prompt_tokens: prompts().map(|usage| usage.prompt_tokens).sum(),
            completion_tokens: answers.iter().map(|usage| usage.completion_tokens).sum(),
            cached_tokens: prompts().map(|usage| usage.cached_tokens).sum(),
        }
    }

    /// The object. vLLM tells of cached tokens only when it is started so: `details`.
    pub fn json(self, details: bool) -> Value {
        let details = (details && self.cached_tokens > 0)
            .then(|| json!({"cached_tokens": self.cached_tokens}));
        json!({
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": details,
        })
    }
}

/// What a route makes of `max_tokens`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    /// Tokens when the request does not say; the rest of the context without it.
    pub default: Option<u32>,
    /// Give what is left in place of refusing a wish that does not fit.
    pub clip: bool,
}

impl Budget {
    /// With the model's default where the route has none.
    pub fn or(self, default: Option<u32>) -> Self {
        Self { default: self.default.or(default), ..self }
    }
}

/// How many tokens may be generated: what was asked for, else the route's default, else the rest
/// of the context. Only a wish that was spoken is refused when it does not fit.
pub fn room(
    prompt_tokens: usize,
    max_model_len: u32,
    asked: Option<u32>,
    budget: Budget,
) -> Result<u32, ApiError> {
    let left = (max_model_len as usize).saturating_sub(prompt_tokens) as u32;
    if left == 0 {
        let message = format!(
            "The prompt has {prompt_tokens} tokens, but this model takes {max_model_len} in all, \
             prompt and answer; shorten the prompt."
        );
        return Err(ApiError::bad_value("input_tokens", message));
    }
    match asked {
        Some(asked) if asked > left && !budget.clip => {
            let message = format!(
                "`max_tokens` is {asked} and the prompt has {prompt_tokens} tokens, but this \
                 model takes {max_model_len} in all; ask for at most {left}."
            );
            Err(ApiError::bad_value("max_tokens", message))
        }
        _ => Ok(asked.or(budget.default).map_or(left, |wanted| wanted.min(left))),
    }
}

/// Refuses a `min_tokens` that an answer of `max_tokens`, which the request may not have named,
/// cannot have; where a wish that does not fit is clipped, this one is too.
pub fn check_min_tokens(min_tokens: u32, max_tokens: u32, budget: Budget) -> Result<(), ApiError> {
    if min_tokens <= max_tokens || budget.clip {
        return Ok(());
    }
    let message =
        format!("`min_tokens` is {min_tokens}, but this answer may have {max_tokens} tokens only.");
    Err(ApiError::bad_value("min_tokens", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prompt_counts_once() {
        let usage = |prompt_tokens, completion_tokens, cached_tokens| Usage {
            prompt_tokens,
            completion_tokens,
            cached_tokens,
        };
        let answers = [usage(5, 1, 0), usage(5, 2, 4), usage(7, 3, 2), usage(7, 4, 2)];
        assert_eq!(Usage::total(&answers, 2), usage(12, 10, 2));
    }

    #[test]
    fn prompt_and_answer_share_the_context() {
        let rest = Budget::default();
        assert_eq!(room(200, 256, Some(56), rest).unwrap(), 56);
        assert!(room(200, 256, Some(57), rest).is_err());
        assert_eq!(room(200, 256, Some(57), Budget { clip: true, ..rest }).unwrap(), 56);
        assert_eq!(room(255, 256, None, rest).unwrap(), 1);
        assert_eq!(room(250, 256, None, Budget { default: Some(16), ..rest }).unwrap(), 6);
        assert!(room(256, 256, None, rest).is_err());
        // What the model's files say is no wish: it is clipped, and comes after the route's.
        assert_eq!(room(200, 256, None, rest.or(Some(2048))).unwrap(), 56);
        let sixteen = Budget { default: Some(16), ..rest };
        assert_eq!(room(200, 256, None, sixteen.or(Some(2048))).unwrap(), 16);
    }

    #[test]
    fn min_tokens_are_held_against_what_there_will_be() {
        let sixteen = Budget { default: Some(16), clip: false };
        let most = |prompt| room(prompt, 256, None, sixteen).unwrap();
        assert!(check_min_tokens(16, most(200), sixteen).is_ok());
        for (min_tokens, prompt) in [(17, 200), (7, 250)] {
            let error = check_min_tokens(min_tokens, most(prompt), sixteen).unwrap_err();
            assert_eq!(error.field(), Some("min_tokens"));
            assert!(check_min_tokens(min_tokens, 6, Budget { clip: true, ..sixteen }).is_ok());
        }
    }
}
