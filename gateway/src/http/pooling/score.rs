//! `POST /score` and `POST /v1/score`, and the scores of `/rerank`.
//!
//! A cross-encoder reads both texts of a pair in one sequence. Of a model that embeds, the score is
//! the cosine of both embeddings.

use std::sync::Arc;

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::{PoolInput, PoolOutput, Task};

use super::super::Shared;
use super::super::generation::{Intake, unless_gone};
use super::super::model::SCORE;
use super::{Work, checked, untokenized};
use crate::api::completion::Prompt;
use crate::api::pooling::replies::{Score, Scores};
use crate::api::pooling::score::{PairFields, Pairs, ScoreFields};
use crate::api::pooling::{Inputs, Naming, PoolingFields};
use crate::api::requests::ScoreRequest;
use crate::error::ApiError;
use crate::text::parallel;
use crate::text::sequences::{Cut, Part};

/// Scores pairs of texts.
#[utoipa::path(
    post, path = "/score", tag = "pooling", request_body = ScoreRequest,
    responses((status = 200, description = "Each pair's score.", body = Scores)),
)]
pub(in super::super) async fn score(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer(intake, shared).await
}

/// Scores pairs of texts.
#[utoipa::path(
    post, path = "/v1/score", tag = "pooling", request_body = ScoreRequest,
    responses((status = 200, description = "Each pair's score.", body = Scores)),
)]
pub(in super::super) async fn score_v1(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    score(request, payload, shared).await
}

/// Answers scores whose body has been read.
pub(in super::super) async fn answer(
    mut intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let fields: PoolingFields = intake.body.read()?;
    let limits: PairFields = intake.body.read()?;
    let texts: ScoreFields = intake.body.read()?;
    let shared = shared.into_inner();
    let (work, body) = Work::new(intake, shared, &fields, &SCORE, "score")?;
    let pairs = texts.pairs(work.shared.limits.max_texts)?;
    let activate = fields.activate().unwrap_or(true);
    let (scores, tokens) = scores(&work, pairs, limits.limits()?, activate).await?;
    let each = scores.into_iter().enumerate();
    let reply = Scores::new(
        &work.envelope,
        each.map(|(index, score)| Score { index, object: "score", score }).collect(),
        tokens,
    );
    let values = reply.data.len();
    work.reply(&body, reply, values).await
}

/// The score of each pair, and the tokens that were computed. `limits` are the tokens to keep of
/// each text.
pub(super) async fn scores(
    work: &Work,
    pairs: Pairs,
    limits: (Option<usize>, Option<usize>),
    activate: bool,
) -> Result<(Vec<f32>, usize), ApiError> {
    if !work.served.does(&[Task::Score]) {
        return cosines(work, pairs, limits).await;
    }
    let inputs = unless_gone(work.client.as_ref(), sequences(work, pairs, limits)).await??;
    let (pooled, tokens) = work.compute(inputs, Task::Score, activate, 0).await?;
    let score = |output: &PoolOutput| output.values.first().copied();
    let scores: Option<Vec<f32>> = pooled.outputs.iter().map(score).collect();
    let scores = scores.ok_or_else(|| ApiError::internal("The worker gave no score."))?;
    Ok((scores, tokens))
}

/// Each pair in one sequence.
async fn sequences(
    work: &Work,
    pairs: Pairs,
    (of_first, of_second): (Option<usize>, Option<usize>),
) -> Result<Vec<PoolInput>, ApiError> {
    let Pairs { first, second, second_naming: naming, .. } = pairs;
    let (bound, cut) = work.bound;
    let text = work.served.text.clone();
    let firsts = parallel::map(first, String::len, move |_, string| {
        let mut part = text.part(&string).map_err(untokenized)?;
        part.shorten(of_first.unwrap_or(usize::MAX));
        Ok(part)
    });
    let firsts: Arc<Vec<Part>> = firsts.await?.into();
    let text = work.served.text.clone();
    let typed = work.served.card.pooling.as_ref().is_some_and(|pooling| pooling.type_ids);
    let around = text.special_tokens(true);
    let pair = move |at: usize, string: String| {
        // One for all, or one for each.
        let first = firsts[at.min(firsts.len() - 1)].clone();
        let mut second = text.part(&string).map_err(untokenized)?;
        if let Some(most) = of_second {
            // Cohere's documents are cut, never refused.
            let room = bound.saturating_sub(first.tokens() + around);
            second.shorten(most.min(room));
        }
        let (token_ids, type_ids) = text.pair(first, second, cut).map_err(untokenized)?;
        let type_ids = if typed { type_ids } else { Vec::new() };
        checked(PoolInput { token_ids, type_ids }, bound, &naming.of(at))
    };
    parallel::map(second, String::len, pair).await
}

/// The cosine of each pair's embeddings. A text that is in all pairs is embedded once.
async fn cosines(
    work: &Work,
    pairs: Pairs,
    (of_first, of_second): (Option<usize>, Option<usize>),
) -> Result<(Vec<f32>, usize), ApiError> {
    let Pairs { first, first_naming, second, second_naming } = pairs;
    let firsts = first.len();
    let mut inputs = side(work, first, first_naming, of_first).await?;
    inputs.extend(side(work, second, second_naming, of_second).await?);
    let (pooled, tokens) = work.compute(inputs, Task::Embed, true, 0).await?;
    let (first, second) = pooled.outputs.split_at(firsts);
    let each = second.iter().enumerate().map(|(at, second)| {
        let first = &first[at.min(firsts - 1)];
        cosine(&first.values, &second.values)
    });
    Ok((each.collect(), tokens))
}

async fn side(
    work: &Work,
    texts: Vec<String>,
    naming: Naming,
    most: Option<usize>,
) -> Result<Vec<PoolInput>, ApiError> {
    let prompts = texts.into_iter().map(Prompt::Text).collect();
    let around = work.served.text.special_tokens(false);
    let cut = match most {
        None => work.bound.1,
        Some(most) => {
            let keep = most.saturating_add(around).min(work.bound.0);
            let keep = work.bound.1.map_or(keep, |cut| keep.min(cut.keep));
            Some(Cut { keep, left: work.bound.1.is_some_and(|cut| cut.left) })
        }
    };
    work.sequences(Inputs { prompts, naming }, true, cut).await
}

/// Of a vector without a length the cosine is 0.
fn cosine(one: &[f32], two: &[f32]) -> f32 {
    let dot = |one: &[f32], two: &[f32]| -> f64 {
        one.iter().zip(two).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let lengths = (dot(one, one) * dot(two, two)).sqrt();
    if lengths > 0.0 { (dot(one, two) / lengths) as f32 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cosine_of_anything_is_a_number() {
        assert_eq!(cosine(&[3.0, 0.0], &[0.5, 0.0]), 1.0);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 1.0]), 0.0);
        assert_eq!(cosine(&[1.0, 1.0], &[-2.0, -2.0]), -1.0);
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
        assert_eq!(cosine(&[f32::MAX, f32::MAX], &[f32::MAX, f32::MAX]), 1.0);
    }
}
