//! `POST /v1/embeddings` and `POST /pooling`: how vectors are wanted.

use baton_proto::v1::{ModelCard, Task};
use serde::Deserialize;
use utoipa::ToSchema;

use super::encoding::{Binary, Dtype, Endianness, Format};
use crate::error::ApiError;
use crate::workers::tasks::name;

/// Texts whose vectors a header may describe, for `bytes`: a header has no more room.
const MAX_DESCRIBED: usize = 128;

/// How vectors are written.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct EncodingFields {
    /// As JSON numbers, as base64, or as a body of bytes.
    encoding_format: Option<Format>,
    /// How a value is written in base64 and bytes.
    embed_dtype: Option<Dtype>,
    /// The order of its bytes there.
    endianness: Option<Endianness>,
}

/// The fields that only embeddings have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct EmbedFields {
    /// Cut embeddings to so many dimensions, for models that are made for it.
    #[schema(minimum = 1)]
    dimensions: Option<i64>,
    /// Embeddings of length one; on by default.
    normalize: Option<bool>,
    /// The same, as Jina has it.
    normalized: Option<bool>,
    /// `encoding_format`, as Jina has it: float or base64.
    embedding_type: Option<Format>,
    /// Cut texts to what the model takes, as Jina has it.
    pub truncate: Option<bool>,
}

/// What `POST /pooling` is asked for.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct PoolFields {
    /// By default what the model is for.
    task: Option<PoolTask>,
    /// Not taken here; use /v1/embeddings.
    #[schema(minimum = 1)]
    dimensions: Option<i64>,
    /// Embeddings of length one; on by default.
    pub normalize: Option<bool>,
}

/// A task of `POST /pooling`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolTask {
    /// What the model is for.
    Encode,
    /// A vector for each text.
    Embed,
    /// Classes of each text.
    Classify,
    /// The score of each text, which holds both texts of a pair.
    Score,
    /// A vector for each token.
    TokenEmbed,
    /// Classes of each token.
    TokenClassify,
}

impl EncodingFields {
    /// The format, of which `bytes` is only for a few texts, and how bytes are written.
    pub fn encoding(&self, texts: usize) -> Result<(Format, Binary), ApiError> {
        let format = self.encoding_format.unwrap_or_default();
        if format == Format::Bytes && texts > MAX_DESCRIBED {
            let message = format!(
                "`encoding_format` is \"bytes\" and there are {texts} texts, but the header that \
                 tells of them takes {MAX_DESCRIBED}; use \"bytes_only\"."
            );
            return Err(ApiError::bad_value("encoding_format", message));
        }
        let dtype = self.embed_dtype.unwrap_or_default();
        let endianness = self.endianness.unwrap_or_default();
        Ok((format, Binary { dtype, endianness }))
    }

    /// The same fields, with the format by Jina's name where vLLM's is absent.
    pub fn or(mut self, embed: &EmbedFields) -> Self {
        self.encoding_format = self.encoding_format.or(embed.embedding_type);
        self
    }
}

impl EmbedFields {
    /// Whether embeddings get length one, as far as these fields say.
    pub fn normalize(&self) -> Option<bool> {
        self.normalize.or(self.normalized)
    }

    /// To how many dimensions embeddings are cut; 0 is all.
    pub fn dimensions(&self, card: &ModelCard) -> Result<u32, ApiError> {
        self.dimensions.map_or(Ok(0), |wanted| dimensions("dimensions", wanted, card))
    }
}

/// A number of dimensions that a model's embeddings may be cut to.
pub fn dimensions(field: &str, wanted: i64, card: &ModelCard) -> Result<u32, ApiError> {
    let pooling = card.pooling.clone().unwrap_or_default();
    let all = pooling.dimensions;
    let refused = |message: String| Err(ApiError::bad_value(field, message));
    // The width that embeddings have anyway is no cut.
    if wanted == i64::from(all) {
        return Ok(0);
    }
    if !pooling.matryoshka {
        return refused(format!(
            "`{field}` is {wanted}, but `{}` makes embeddings of {all} dimensions and is not made \
             for fewer (matryoshka); leave `{field}` out.",
            card.name
        ));
    }
    let listed = &pooling.matryoshka_dimensions;
    let wanted_u32 = u32::try_from(wanted).ok().filter(|&wanted| (1..=all).contains(&wanted));
    match wanted_u32 {
        Some(wanted) if listed.is_empty() || listed.contains(&wanted) => Ok(wanted),
        _ if listed.is_empty() => {
            refused(format!("`{field}` must be from 1 to {all}, not {wanted}."))
        }
        _ => refused(format!("`{field}` must be one of {listed:?}, not {wanted}.")),
    }
}

impl PoolFields {
    /// The task for a model that does these.
    pub fn task(&self, tasks: &[Task]) -> Result<Task, ApiError> {
        if self.dimensions.is_some() {
            let message = "`dimensions` is not taken here; use /v1/embeddings.";
            return Err(ApiError::bad_value("dimensions", message));
        }
        let pooling = |task: &&Task| named(**task).is_some();
        let wanted = match self.task {
            None | Some(PoolTask::Encode) => tasks.iter().find(pooling).copied(),
            Some(PoolTask::Embed) => Some(Task::Embed),
            Some(PoolTask::Classify) => Some(Task::Classify),
            Some(PoolTask::Score) => Some(Task::Score),
            Some(PoolTask::TokenEmbed) => Some(Task::TokenEmbed),
            Some(PoolTask::TokenClassify) => Some(Task::TokenClassify),
        };
        wanted.filter(|task| tasks.contains(task)).ok_or_else(|| {
            let names: Vec<&str> = tasks.iter().filter_map(|task| named(*task)).collect();
            let message = format!("This model's `task` is one of: {}.", names.join(", "));
            ApiError::bad_value("task", message)
        })
    }
}

/// The name of a task of `POST /pooling`.
fn named(task: Task) -> Option<&'static str> {
    use Task::{Classify, Embed, Score, TokenClassify, TokenEmbed};
    matches!(task, Embed | Classify | Score | TokenEmbed | TokenClassify).then(|| name(task))
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::PoolingCard;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn dimensions_are_for_models_that_are_made_for_them() {
        let wanted = |wanted: i64, matryoshka: bool, listed: &[u32]| {
            let pooling = PoolingCard {
                dimensions: 384,
                matryoshka,
                matryoshka_dimensions: listed.to_vec(),
                ..Default::default()
            };
            let card = ModelCard { pooling: Some(pooling), ..Default::default() };
            dimensions("dimensions", wanted, &card).map_err(|error| error.to_string())
        };
        assert_eq!(wanted(384, false, &[]), Ok(0));
        assert!(wanted(128, false, &[]).unwrap_err().contains("not made"));
        assert_eq!(wanted(128, true, &[]), Ok(128));
        assert_eq!(wanted(128, true, &[64, 128]), Ok(128));
        assert!(wanted(100, true, &[64, 128]).unwrap_err().contains("[64, 128]"));
        for bad in [0, -1, 385, i64::MAX] {
            assert!(wanted(bad, true, &[]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_task_is_the_models_own_unless_it_is_named() {
        let task = |fields: Value, tasks: &[Task]| {
            let fields: PoolFields = serde_json::from_value(fields).unwrap();
            fields.task(tasks).map_err(|error| error.field().unwrap().to_owned())
        };
        let embedder = [Task::Embed, Task::TokenEmbed];
        assert_eq!(task(json!({}), &embedder), Ok(Task::Embed));
        assert_eq!(task(json!({"task": "encode"}), &[Task::Classify]), Ok(Task::Classify));
        assert_eq!(task(json!({"task": "token_embed"}), &embedder), Ok(Task::TokenEmbed));
        assert_eq!(task(json!({"task": "classify"}), &embedder), Err("task".into()));
        assert_eq!(task(json!({"dimensions": 8}), &embedder), Err("dimensions".into()));
    }
}
