//! What the pooling routes answer: each type is written as it is described.

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::envelope::Envelope;
use super::super::schema::TokenId;
use super::encoding::{Binary, Written};
use crate::pool::Pooled;

/// Texts to be embedded or classified.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum EmbeddingInput {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<OneText>),
    /// A text's tokens.
    Tokens(Vec<TokenId>),
    /// Several texts' tokens.
    TokenLists(Vec<Vec<TokenId>>),
}

/// A text.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum OneText {
    /// As it is.
    Text(String),
    /// In an object.
    Object(TextObject),
}

/// A text, or several.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Texts {
    /// One.
    One(String),
    /// Several.
    Many(Vec<OneText>),
}

/// A text in an object.
#[derive(ToSchema)]
pub struct TextObject {
    /// The text.
    pub text: String,
}

/// Tokens of texts.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct PoolingUsage {
    /// Of all texts that were computed.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
    /// 0: nothing is generated.
    pub completion_tokens: usize,
    /// null.
    #[schema(value_type = Option<Object>, required = true)]
    pub prompt_tokens_details: (),
}

impl PoolingUsage {
    /// Of texts with so many tokens.
    pub fn new(tokens: usize) -> Self {
        Self {
            prompt_tokens: tokens,
            total_tokens: tokens,
            completion_tokens: 0,
            prompt_tokens_details: (),
        }
    }
}

/// Defines a reply that is a list.
macro_rules! list {
    ($(#[$doc:meta])* $name:ident, $item:ident, $pattern:literal) => {
        $(#[$doc])*
        #[derive(Debug, Serialize, ToSchema)]
        pub struct $name {
            /// The request's id.
            #[schema(pattern = $pattern)]
            pub id: String,
            /// `list`.
            #[schema(value_type = String)]
            pub object: &'static str,
            /// Unix time in seconds.
            pub created: u64,
            /// The served name.
            pub model: String,
            /// In the order of the request.
            pub data: Vec<$item>,
            /// Tokens.
            pub usage: PoolingUsage,
        }

        impl $name {
            /// With what was computed of so many tokens.
            pub fn new(envelope: &Envelope, data: Vec<$item>, tokens: usize) -> Self {
                Self {
                    id: envelope.id.clone(),
                    object: "list",
                    created: envelope.created,
                    model: envelope.model.clone(),
                    data,
                    usage: PoolingUsage::new(tokens),
                }
            }
        }
    };
}

list!(
    /// The reply of `POST /v1/embeddings`.
    Embeddings, Embedding, "^embd-"
);
list!(
    /// The reply of `POST /pooling`.
    PoolingReply, PooledData, "^pool-"
);
list!(
    /// The reply of `POST /classify`.
    Classes, Class, "^classify-"
);
list!(
    /// The reply of `POST /score`.
    Scores, Score, "^score-"
);

/// An embedding.
#[derive(Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// The place of its text in the request.
    pub index: usize,
    /// `embedding`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// Numbers, or base64.
    #[schema(value_type = Vector)]
    pub embedding: Written,
}

/// What was computed of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct PooledData {
    /// The place of its text in the request.
    pub index: usize,
    /// `pooling`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// Numbers, a list of them for each token, or base64.
    #[schema(value_type = VectorOrRows)]
    pub data: Written,
}

/// Numbers, or base64 of them.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Vector {
    /// Numbers.
    Numbers(Vec<f32>),
    /// Base64.
    Base64(String),
}

/// Numbers, a list of them for each token, or base64 of them.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum VectorOrRows {
    /// Numbers.
    Numbers(Vec<f32>),
    /// A list for each token.
    Rows(Vec<Vec<f32>>),
    /// Base64.
    Base64(String),
}

/// The class of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct Class {
    /// The place of its text in the request.
    pub index: usize,
    /// The likeliest class; null when the model's classes have no names.
    #[schema(required = true)]
    pub label: Option<String>,
    /// Of each class.
    pub probs: Vec<f32>,
    /// How many classes.
    pub num_classes: usize,
}

/// The score of a pair.
#[derive(Debug, Serialize, ToSchema)]
pub struct Score {
    /// The place of the pair in the request.
    pub index: usize,
    /// `score`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// By a cross-encoder its output, else the cosine of two embeddings.
    pub score: f32,
}

/// The reply of `POST /rerank`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ranked {
    /// The request's id.
    #[schema(pattern = "^rerank-")]
    pub id: String,
    /// The served name.
    pub model: String,
    /// Tokens.
    pub usage: RankUsage,
    /// Best first.
    pub results: Vec<RankedDocument>,
}

/// Tokens of a rank.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct RankUsage {
    /// Of all texts that were computed.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}

/// A document and its score.
#[derive(Debug, Serialize, ToSchema)]
pub struct RankedDocument {
    /// Its place in the request.
    pub index: usize,
    /// As it came, a string as an object with `text`; absent when documents are not wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub document: Option<Value>,
    /// Higher is closer to the query.
    pub relevance_score: f32,
}

/// The reply of `POST /v2/embed`.
#[derive(Debug, Serialize, ToSchema)]
pub struct CohereEmbeddings {
    /// The request's id.
    #[schema(pattern = "^embd-")]
    pub id: String,
    /// By how they are written.
    pub embeddings: EmbeddingsByType,
    /// The texts, as they came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub texts: Option<Vec<String>>,
    /// About the request.
    #[schema(value_type = Object)]
    pub meta: Value,
}

/// Embeddings, by how they are written; those that were not asked for are absent.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct EmbeddingsByType {
    /// Numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub float: Option<Vec<Vec<f32>>>,
    /// Bits in signed bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<Vec<Vec<i8>>>,
    /// Bits in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ubinary: Option<Vec<Vec<u8>>>,
    /// Base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<Vec<String>>,
}

impl CohereEmbeddings {
    /// What Cohere tells of a request.
    pub fn meta(tokens: usize) -> Value {
        json!({
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": tokens},
            "tokens": {"input_tokens": tokens},
        })
    }
}

/// All vectors as bytes, one after the other, and where each of them is. Matrices of one row stay
/// matrices when `rows` says so.
pub fn as_bytes(pooled: &Pooled, binary: Binary, rows: bool) -> (Vec<u8>, Vec<Value>) {
    let mut bytes = Vec::new();
    let mut items = Vec::with_capacity(pooled.outputs.len());
    for (index, output) in pooled.outputs.iter().enumerate() {
        let start = bytes.len();
        bytes.extend(binary.bytes(&output.values));
        let width = (output.width as usize).max(1);
        let shape = match rows {
            true => vec![output.values.len() / width, width],
            false => vec![output.values.len()],
        };
        items.push(json!({
            "index": index,
            "embed_dtype": binary.dtype,
            "endianness": binary.endianness,
            "start": start,
            "end": bytes.len(),
            "shape": shape,
        }));
    }
    (bytes, items)
}
