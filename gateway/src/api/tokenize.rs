//! `POST /tokenize` and `POST /detokenize`.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::schema::TokenId;
use super::token_ids;
use crate::error::ApiError;

/// The fields of `/tokenize`, beside those of a conversation.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct TokenizeFields {
    /// Served model.
    pub model: Option<String>,
    /// The text; without it, `messages` are rendered.
    pub prompt: Option<String>,
    /// Whether the tokenizer adds its special tokens: by default to a text, not to messages.
    pub add_special_tokens: Option<bool>,
    /// Send the tokens' texts too.
    pub return_token_strs: Option<bool>,
}

/// The fields of `/detokenize`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct DetokenizeFields {
    /// Served model.
    pub model: Option<String>,
    /// Token ids of this model.
    #[schema(value_type = Vec<TokenId>)]
    tokens: Option<Vec<Value>>,
}

impl DetokenizeFields {
    /// The tokens.
    pub fn tokens(&self, vocab_size: u32) -> Result<Vec<u32>, ApiError> {
        let tokens = self
            .tokens
            .as_ref()
            .ok_or_else(|| ApiError::malformed("`tokens` is required.").param("tokens"))?;
        token_ids("tokens", tokens, vocab_size)
    }
}
