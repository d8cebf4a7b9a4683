//! `POST /v2/embed`, as Cohere has it.

use baton_proto::v1::ModelCard;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::super::completion::Prompt;
use super::super::sampling::in_range;
use super::{Inputs, Naming, checked, count, embed, empty};
use crate::error::ApiError;
use crate::text::sequences::Cut;

/// Fields that change nothing: prefixes that a model wants for an `input_type` are the client's to
/// put before its texts.
pub const IGNORED: &[&str] = &["input_type"];

/// The fields.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct CohereEmbedFields {
    /// Served model; the first that does this, when it is absent.
    pub model: Option<String>,
    /// The texts.
    texts: Option<Vec<String>>,
    /// The texts as lists of parts.
    inputs: Option<Vec<PartsInput>>,
    /// Not supported.
    #[schema(value_type = Option<Vec<String>>)]
    images: Option<Value>,
    /// How embeddings are written; numbers by default.
    embedding_types: Option<Vec<EmbeddingType>>,
    /// The end at which texts are cut; `END` by default, and `NONE` refuses those that are too
    /// long.
    truncate: Option<Truncate>,
    /// Keep this many tokens of each text.
    #[schema(minimum = 1)]
    max_tokens: Option<i64>,
    /// Cut embeddings to so many dimensions, for models that are made for it.
    #[schema(minimum = 1)]
    output_dimension: Option<i64>,
    /// Lower is sooner.
    #[schema(minimum = -2147483648, maximum = 2147483647)]
    priority: Option<i64>,
}

/// A text in parts.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct PartsInput {
    /// Of type text.
    content: Vec<TextPart>,
}

/// A part of a text.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct TextPart {
    /// `text`.
    r#type: String,
    /// The text.
    text: Option<String>,
}

/// How an embedding is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingType {
    /// Numbers.
    Float,
    /// A bit for each number, set unless it is negative; eight in a byte from -128 to 127.
    Binary,
    /// The same in a byte from 0 to 255.
    Ubinary,
    /// Base64 of the numbers, 32 bits each, least significant byte first.
    Base64,
}

/// The end at which texts are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Truncate {
    /// The end.
    #[default]
    End,
    /// The beginning.
    Start,
    /// None: what is too long is refused.
    None,
}

/// The longest text that is taken, and whether longer ones are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Cut.
    Cut(Cut),
    /// Refused.
    Refuse(usize),
}

impl CohereEmbedFields {
    /// The texts, at most `most`.
    pub fn inputs(&self, most: usize) -> Result<Inputs, ApiError> {
        if self.images.is_some() {
            return Err(ApiError::not_supported("images"));
        }
        let (field, texts): (_, Vec<String>) = match (&self.texts, &self.inputs) {
            (Some(texts), _) => ("texts", texts.clone()),
            (None, Some(inputs)) => {
                ("inputs", inputs.iter().map(joined).collect::<Result<_, _>>()?)
            }
            (None, None) => {
                return Err(ApiError::malformed("`texts` is required.").param("texts"));
            }
        };
        if texts.is_empty() {
            return Err(empty(field));
        }
        count(field, texts.len(), most)?;
        let naming = Naming { field, listed: true };
        let prompts = texts
            .iter()
            .enumerate()
            .map(|(at, text)| checked(text, &naming.of(at)).map(Prompt::Text))
            .collect::<Result<_, _>>()?;
        Ok(Inputs { prompts, naming })
    }

    /// The texts, as they came; `None` when they came in parts.
    pub fn texts(self) -> Option<Vec<String>> {
        self.texts
    }

    /// How long texts may be.
    pub fn bound(&self, max_model_len: u32) -> Result<Bound, ApiError> {
        let asked = self.max_tokens.unwrap_or(i64::from(max_model_len));
        let keep = in_range("max_tokens", Some(asked), 1, 1..=i64::MAX)?;
        let keep = keep.min(i64::from(max_model_len)) as usize;
        Ok(match self.truncate.unwrap_or_default() {
            Truncate::None => Bound::Refuse(keep),
            side => Bound::Cut(Cut { keep, left: side == Truncate::Start }),
        })
    }

    /// To how many dimensions embeddings are cut; 0 is all.
    pub fn dimensions(&self, card: &ModelCard) -> Result<u32, ApiError> {
        let wanted = self.output_dimension;
        wanted.map_or(Ok(0), |wanted| embed::dimensions("output_dimension", wanted, card))
    }

    /// How embeddings of so many dimensions are written.
    pub fn types(&self, dimensions: u32) -> Result<Vec<EmbeddingType>, ApiError> {
        let types = self.embedding_types.clone().filter(|types| !types.is_empty());
        let types = types.unwrap_or_else(|| vec![EmbeddingType::Float]);
        let bits =
            |kind: &EmbeddingType| matches!(kind, EmbeddingType::Binary | EmbeddingType::Ubinary);
        if types.iter().any(bits) && !dimensions.is_multiple_of(8) {
            let message = format!(
                "`embedding_types` wants bits in bytes, but {dimensions} dimensions are no \
                 multiple of 8."
            );
            return Err(ApiError::bad_value("embedding_types", message));
        }
        Ok(types)
    }

    /// Lower is sooner.
    pub fn priority(&self) -> Result<i32, ApiError> {
        let range = i64::from(i32::MIN)..=i64::from(i32::MAX);
        in_range("priority", self.priority, 0, range).map(|priority| priority as i32)
    }
}

fn joined(input: &PartsInput) -> Result<String, ApiError> {
    let texts = input.content.iter().map(|part| match (&*part.r#type, &part.text) {
        ("text", Some(text)) => Ok(text.as_str()),
        _ => {
            let message = "`inputs` has a part that is no text; only parts of type text are taken.";
            Err(ApiError::bad_value("inputs", message))
        }
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// A bit for each number, set unless it is negative, the first in the highest bit of a byte.
pub fn bits(values: &[f32]) -> Vec<u8> {
    let byte = |eight: &[f32]| {
        let bits = eight.iter().enumerate();
        bits.fold(0, |byte, (at, value)| byte | (u8::from(*value >= 0.0) << (7 - at)))
    };
    values.chunks_exact(8).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bits_are_packed_from_the_highest() {
        let values =
            [0.5, -0.5, 0.0, -1.0, 1.0, 1.0, -1.0, 2.0, -1., -1., -1., -1., -1., -1., -1., 1.];
        assert_eq!(bits(&values), [0b1010_1101, 1]);
    }

    #[test]
    fn long_texts_are_cut_unless_that_is_refused() {
        let bound =
            |fields: Value| serde_json::from_value::<CohereEmbedFields>(fields).unwrap().bound(100);
        let cut = |keep, left| Bound::Cut(Cut { keep, left });
        assert_eq!(bound(json!({})).unwrap(), cut(100, false));
        assert_eq!(bound(json!({"truncate": "START", "max_tokens": 7})).unwrap(), cut(7, true));
        assert_eq!(bound(json!({"max_tokens": 700})).unwrap(), cut(100, false));
        let refuse = json!({"truncate": "NONE", "max_tokens": 7});
        assert_eq!(bound(refuse).unwrap(), Bound::Refuse(7));
        assert!(bound(json!({"max_tokens": 0})).is_err());
    }
}
