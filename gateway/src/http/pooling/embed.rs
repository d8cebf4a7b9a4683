//! `POST /v1/embeddings` and `POST /pooling`.

use actix_web::http::header::{ContentType, HeaderName, HeaderValue};
use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::{PoolOutput, Task};
use serde_json::json;

use super::super::generation::Intake;
use super::super::model::{EMBEDDINGS, POOLING};
use super::super::{Shared, body};
use super::Work;
use crate::api::Body;
use crate::api::pooling::PoolingFields;
use crate::api::pooling::embed::{EmbedFields, EncodingFields, PoolFields};
use crate::api::pooling::encoding::{Binary, Format, Written};
use crate::api::pooling::replies::{Embedding, Embeddings, PooledData, PoolingReply, as_bytes};
use crate::api::requests::{EmbeddingRequest, PoolingRequest};
use crate::error::ApiError;
use crate::pool::Pooled;
use crate::text::sequences::Cut;

/// With bodies of bytes: what they hold.
const METADATA: HeaderName = HeaderName::from_static("metadata");

/// Embeds texts.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "pooling", request_body = EmbeddingRequest,
    responses((
        status = 200, description = "A vector for each text.",
        content((Embeddings = "application/json"), (String = "application/octet-stream")),
    )),
)]
pub(in super::super) async fn embeddings(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer_embeddings(intake, shared).await
}

/// Computes whatever the model is for, of texts.
#[utoipa::path(
    post, path = "/pooling", tag = "pooling", request_body = PoolingRequest,
    responses((
        status = 200, description = "A vector or a matrix for each text.",
        content((PoolingReply = "application/json"), (String = "application/octet-stream")),
    )),
)]
pub(in super::super) async fn pool(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer_pooling(intake, shared).await
}

/// Answers embeddings whose body has been read.
pub(in super::super) async fn answer_embeddings(
    mut intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let fields: PoolingFields = intake.body.read()?;
    let embed: EmbedFields = intake.body.read()?;
    let encoding: EncodingFields = intake.body.read()?;
    let shared = shared.into_inner();
    let (work, mut body) = Work::new(intake, shared, &fields, &EMBEDDINGS, "embd")?;
    let dimensions = embed.dimensions(&work.served.card)?;
    let (inputs, special) = work.inputs(&mut body)?;
    let (format, binary) = encoding.or(&embed).encoding(inputs.prompts.len())?;
    let all = Cut { keep: work.bound.0, left: fields.left() };
    let cut = work.bound.1.or(embed.truncate.unwrap_or(false).then_some(all));
    let activate = fields.activate().or(embed.normalize()).unwrap_or(true);
    let inputs = work.sequences(inputs, special, cut).await?;
    let (pooled, tokens) = work.compute(inputs, Task::Embed, activate, dimensions).await?;
    if matches!(format, Format::Bytes | Format::BytesOnly) {
        return bytes(&work, &body, &pooled, tokens, (format, binary, false));
    }
    let values = values(&pooled);
    let each = pooled.outputs.into_iter().enumerate();
    let data = each.map(|(index, output)| Embedding {
        index,
        object: "embedding",
        embedding: written(output, format, binary, false),
    });
    let reply = Embeddings::new(&work.envelope, data.collect(), tokens);
    work.reply(&body, reply, values).await
}

/// Answers `POST /pooling` whose body has been read.
pub(in super::super) async fn answer_pooling(
    mut intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let fields: PoolingFields = intake.body.read()?;
    let pool: PoolFields = intake.body.read()?;
    let encoding: EncodingFields = intake.body.read()?;
    let shared = shared.into_inner();
    let (work, mut body) = Work::new(intake, shared, &fields, &POOLING, "pool")?;
    let task = pool.task(&work.served.tasks())?;
    let (inputs, special) = work.inputs(&mut body)?;
    let (format, binary) = encoding.encoding(inputs.prompts.len())?;
    let activate = fields.activate().or(pool.normalize).unwrap_or(true);
    let inputs = work.sequences(inputs, special, work.bound.1).await?;
    let (pooled, tokens) = work.compute(inputs, task, activate, 0).await?;
    let rows = matches!(task, Task::TokenEmbed | Task::TokenClassify);
    if matches!(format, Format::Bytes | Format::BytesOnly) {
        return bytes(&work, &body, &pooled, tokens, (format, binary, rows));
    }
    let values = values(&pooled);
    let each = pooled.outputs.into_iter().enumerate();
    let data = each.map(|(index, output)| PooledData {
        index,
        object: "pooling",
        data: written(output, format, binary, rows),
    });
    let reply = PoolingReply::new(&work.envelope, data.collect(), tokens);
    work.reply(&body, reply, values).await
}

fn values(pooled: &Pooled) -> usize {
    pooled.outputs.iter().map(|output| output.values.len()).sum()
}

fn written(output: PoolOutput, format: Format, binary: Binary, rows: bool) -> Written {
    match format {
        Format::Base64 => Written::Base64(binary.base64(&output.values)),
        _ if rows => Written::Rows(output.values, output.width as usize),
        _ => Written::Vector(output.values),
    }
}

/// A reply whose body is the vectors' bytes.
fn bytes(
    work: &Work,
    body: &Body,
    pooled: &Pooled,
    tokens: usize,
    (format, binary, rows): (Format, Binary, bool),
) -> Result<HttpResponse, ApiError> {
    let (bytes, data) = as_bytes(pooled, binary, rows);
    let mut response = HttpResponse::Ok();
    if format == Format::Bytes {
        let metadata = json!({
            "id": work.envelope.id,
            "created": work.envelope.created,
            "model": work.envelope.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        });
        let value = HeaderValue::from_str(&metadata.to_string()).map_err(|error| {
            ApiError::internal(format!("The metadata cannot be sent as a header: {error}."))
        })?;
        response.insert_header((METADATA, value));
    }
    body::warn_of_unknown(body, &mut response);
    Ok(response.insert_header(ContentType::octet_stream()).body(bytes))
}
