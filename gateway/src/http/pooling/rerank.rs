//! `POST /rerank`, `POST /v1/rerank` and `POST /v2/rerank`: documents by how close they are to a
//! query, as Jina and Cohere have it.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::Value;

use super::super::Shared;
use super::super::generation::Intake;
use super::super::model::RERANK;
use super::Work;
use super::score::scores;
use crate::api::pooling::PoolingFields;
use crate::api::pooling::replies::{RankUsage, Ranked, RankedDocument};
use crate::api::pooling::score::{PairFields, Ranking, RerankFields};
use crate::api::requests::RerankRequest;
use crate::error::ApiError;

/// Ranks documents.
#[utoipa::path(
    post, path = "/rerank", tag = "pooling", request_body = RerankRequest,
    responses((status = 200, description = "The documents, best first.", body = Ranked)),
)]
pub(in super::super) async fn rerank(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer(intake, shared).await
}

/// Ranks documents, under Jina's path and Cohere's first.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "pooling", request_body = RerankRequest,
    responses((status = 200, description = "The documents, best first.", body = Ranked)),
)]
pub(in super::super) async fn rerank_v1(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    rerank(request, payload, shared).await
}

/// Ranks documents, under Cohere's second path.
#[utoipa::path(
    post, path = "/v2/rerank", tag = "pooling", request_body = RerankRequest,
    responses((status = 200, description = "The documents, best first.", body = Ranked)),
)]
pub(in super::super) async fn rerank_v2(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    rerank(request, payload, shared).await
}

/// Answers a rank whose body has been read.
pub(in super::super) async fn answer(
    mut intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let fields: PoolingFields = intake.body.read()?;
    let limits: PairFields = intake.body.read()?;
    let rerank: RerankFields = intake.body.read()?;
    let shared = shared.into_inner();
    let (work, body) = Work::new(intake, shared, &fields, &RERANK, "rerank")?;
    let Ranking { pairs, top, documents } = rerank.ranking(work.shared.limits.max_texts)?;
    let activate = fields.activate().unwrap_or(true);
    let (scores, tokens) = scores(&work, pairs, limits.limits()?, activate).await?;
    let results = ranked(&scores, top, documents);
    let usage = RankUsage { prompt_tokens: tokens, total_tokens: tokens };
    let (id, model) = (work.envelope.id.clone(), work.envelope.model.clone());
    let values = results.len();
    work.reply(&body, Ranked { id, model, usage, results }, values).await
}

/// The best `top`, best first; equal ones as they came.
fn ranked(scores: &[f32], top: usize, documents: Option<Vec<Value>>) -> Vec<RankedDocument> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|one, two| scores[*two].total_cmp(&scores[*one]));
    order.truncate(top);
    let mut documents = documents;
    let mut document =
        |index: usize| documents.as_mut().and_then(|all| all.get_mut(index)).map(Value::take);
    order
        .into_iter()
        .map(|index| RankedDocument {
            index,
            document: document(index),
            relevance_score: scores[index],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_best_come_first_and_equal_ones_as_they_came() {
        let documents = Some(vec![json!("a"), json!("b"), json!("c"), json!("d")]);
        let ranked = ranked(&[0.5, -1.0, 0.9, 0.5], 3, documents);
        let order: Vec<_> = ranked.iter().map(|it| (it.index, it.document.clone())).collect();
        assert_eq!(order, [(2, Some(json!("c"))), (0, Some(json!("a"))), (3, Some(json!("d")))]);
    }
}
