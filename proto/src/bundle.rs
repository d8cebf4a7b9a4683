//! The tokenizer as it crosses from worker to gateway.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a gateway needs to turn text into tokens and back.
///
/// Sent by `FetchTokenizer` as JSON, in chunks. `ModelCard.tokenizer_digest` is the BLAKE3 of the
/// JSON bytes in hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerBundle {
    /// The `tokenizer.json` of the Hugging Face `tokenizers` library, as text.
    pub tokenizer_json: String,
    /// The model's Jinja chat template; absent for a base model.
    pub chat_template: Option<String>,
    /// Text of the begin-of-sequence token, given to the template as `bos_token`.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token, given to the template as `eos_token`.
    pub eos_token: Option<String>,
    /// `tokenizer_config.json` as it came; empty for a format that has none.
    pub tokenizer_config: Map<String, Value>,
    /// `generation_config.json`, likewise.
    pub generation_config: Map<String, Value>,
}
