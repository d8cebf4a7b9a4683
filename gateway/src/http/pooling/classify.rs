//! `POST /classify`.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::{PoolOutput, Task};

use super::super::Shared;
use super::super::generation::Intake;
use super::super::model::CLASSIFY;
use super::Work;
use crate::api::pooling::PoolingFields;
use crate::api::pooling::replies::{Class, Classes};
use crate::api::requests::ClassifyRequest;
use crate::error::ApiError;

/// Classifies texts.
#[utoipa::path(
    post, path = "/classify", tag = "pooling", request_body = ClassifyRequest,
    responses((status = 200, description = "Each text's classes.", body = Classes)),
)]
pub(in super::super) async fn classify(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer(intake, shared).await
}

/// Answers a classification whose body has been read.
pub(in super::super) async fn answer(
    mut intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let fields: PoolingFields = intake.body.read()?;
    let shared = shared.into_inner();
    let (work, mut body) = Work::new(intake, shared, &fields, &CLASSIFY, "classify")?;
    let (inputs, special) = work.inputs(&mut body)?;
    let inputs = work.sequences(inputs, special, work.bound.1).await?;
    let activate = fields.activate().unwrap_or(true);
    let (pooled, tokens) = work.compute(inputs, Task::Classify, activate, 0).await?;
    let pooling = work.served.card.pooling.as_ref();
    let labels = pooling.map_or(&[][..], |pooling| &pooling.labels);
    let each = pooled.outputs.into_iter().enumerate();
    let reply = Classes::new(
        &work.envelope,
        each.map(|(index, output)| class(index, output, labels)).collect(),
        tokens,
    );
    let values = reply.data.iter().map(|class| class.num_classes).sum();
    work.reply(&body, reply, values).await
}

/// The class of a text: the first of the likeliest.
fn class(index: usize, output: PoolOutput, labels: &[String]) -> Class {
    let probs = output.values;
    let best = probs.iter().enumerate().rev().max_by(|one, two| one.1.total_cmp(two.1));
    let label = best.and_then(|(best, _)| labels.get(best)).cloned();
    Class { index, label, num_classes: probs.len(), probs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_class_gives_its_name() {
        let labels = ["sad".to_owned(), "glad".to_owned()];
        let of = |values: &[f32], labels: &[String]| {
            class(0, PoolOutput { values: values.to_vec(), width: 2 }, labels).label
        };
        assert_eq!(of(&[0.2, 0.8], &labels).as_deref(), Some("glad"));
        assert_eq!(of(&[0.5, 0.5], &labels).as_deref(), Some("sad"));
        assert_eq!(of(&[0.2, 0.8], &[]), None);
    }
}
