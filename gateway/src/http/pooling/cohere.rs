//! `POST /v2/embed`, as Cohere has it.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::{PoolOutput, Task};

use super::super::Shared;
use super::super::generation::Intake;
use super::super::model::EMBEDDINGS;
use super::Work;
use crate::api::pooling::cohere::{Bound, CohereEmbedFields, EmbeddingType, IGNORED, bits};
use crate::api::pooling::encoding::{Binary, Dtype, Endianness};
use crate::api::pooling::replies::{CohereEmbeddings, EmbeddingsByType};
use crate::api::requests::CohereEmbedRequest;
use crate::error::ApiError;

/// Embeds texts, in Cohere's form.
#[utoipa::path(
    post, path = "/v2/embed", tag = "pooling", request_body = CohereEmbedRequest,
    responses((status = 200, description = "A vector for each text.", body = CohereEmbeddings)),
)]
pub(in super::super) async fn embed(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut intake = Intake::read(&request, payload, &shared).await?;
    let fields: CohereEmbedFields = intake.body.read()?;
    let shared = shared.into_inner();
    let name = fields.model.as_deref();
    let (mut work, mut body) = Work::of_model(intake, shared, name, &EMBEDDINGS, "embd")?;
    body.ignore(IGNORED);
    work.priority = fields.priority()?;
    let card = &work.served.card;
    let cut = match fields.bound(card.max_model_len)? {
        Bound::Cut(cut) => Some(cut),
        Bound::Refuse(most) => {
            work.bound.0 = most;
            None
        }
    };
    let dimensions = fields.dimensions(&work.served.card)?;
    let all = work.served.card.pooling.as_ref().map_or(0, |pooling| pooling.dimensions);
    let types = fields.types(if dimensions == 0 { all } else { dimensions })?;
    let inputs = fields.inputs(work.shared.limits.max_texts)?;
    let texts = fields.texts();
    let inputs = work.sequences(inputs, true, cut).await?;
    let (pooled, tokens) = work.compute(inputs, Task::Embed, true, dimensions).await?;
    let values = pooled.outputs.iter().map(|output| output.values.len()).sum();
    let reply = CohereEmbeddings {
        id: work.envelope.id.clone(),
        embeddings: by_type(pooled.outputs, &types),
        texts,
        meta: CohereEmbeddings::meta(tokens),
    };
    work.reply(&body, reply, values).await
}

fn by_type(outputs: Vec<PoolOutput>, types: &[EmbeddingType]) -> EmbeddingsByType {
    let wanted = |kind| types.contains(&kind).then_some(&outputs);
    let signed = |byte: u8| byte.wrapping_sub(128) as i8;
    let little = Binary { dtype: Dtype::Float32, endianness: Endianness::Little };
    let all = wanted(EmbeddingType::Binary);
    let binary = all.map(|all| {
        let each = |output: &PoolOutput| bits(&output.values).into_iter().map(signed).collect();
        all.iter().map(each).collect()
    });
    let all = wanted(EmbeddingType::Ubinary);
    let ubinary = all.map(|all| all.iter().map(|output| bits(&output.values)).collect());
    let all = wanted(EmbeddingType::Base64);
    let base64 = all.map(|all| all.iter().map(|output| little.base64(&output.values)).collect());
    let float = types
        .contains(&EmbeddingType::Float)
        .then(|| outputs.into_iter().map(|output| output.values).collect());
    EmbeddingsByType { float, binary, ubinary, base64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_is_there() {
        let outputs =
            || vec![PoolOutput { values: vec![1., -1., 1., 1., -1., -1., -1., -1.], width: 8 }];
        let all = [EmbeddingType::Binary, EmbeddingType::Ubinary];
        let of = by_type(outputs(), &all);
        assert_eq!(of.ubinary, Some(vec![vec![0b1011_0000]]));
        // As Cohere packs them: the unsigned byte less 128.
        assert_eq!(of.binary, Some(vec![vec![48]]));
        assert!(of.float.is_none() && of.base64.is_none());
        assert_eq!(by_type(outputs(), &[EmbeddingType::Float]).float.unwrap()[0][0], 1.0);
    }
}
