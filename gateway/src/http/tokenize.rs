//! `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`.

use std::sync::Arc;

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::json;

use super::generation::trace;
use super::model::any_model as model;
use super::{Shared, body};
use crate::api::chat::Conversation;
use crate::api::requests::{DetokenizeRequest, TokenizeRequest};
use crate::api::schema::{Detokenized, Tokenized, TokenizerInfo};
use crate::api::tokenize::{DetokenizeFields, TokenizeFields};
use crate::api::tools::Tools;
use crate::error::ApiError;
use crate::text::{TextModel, parallel};
use crate::trace::Trace;

/// Texts from this length on are tokenized off the threads that serve.
const LONG_TEXT: usize = 16 * 1024;

/// Turns a text or a chat into tokens.
#[utoipa::path(
    post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest,
    responses((status = 200, description = "The tokens.", body = Tokenized)),
)]
pub(super) async fn tokenize(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut body = body::read(&request, payload, &shared.limits).await?;
    let fields: TokenizeFields = body.read()?;
    let conversation: Conversation = body.read()?;
    let tools = Tools::read(&mut body)?;
    let served = model(&shared, fields.model.as_deref())?;
    let text = match &fields.prompt {
        Some(prompt) => {
            // They are not needed, and wrong all the same.
            conversation.check()?;
            prompt.clone()
        }
        None if conversation.is_given() => {
            let tools = tools.as_ref().map(|tools| tools.raw.as_slice());
            let trusted = shared.limits.trust_request_chat_template;
            conversation.render(&served.text, tools, trusted)?
        }
        None => {
            let message = "`prompt` or `messages` is required.";
            return Err(ApiError::malformed(message).param("prompt"));
        }
    };
    let special = fields.add_special_tokens.unwrap_or(fields.prompt.is_some());
    let tokens = encode(&served.text, text, special, &trace(&request)).await?;
    let names = fields.return_token_strs.unwrap_or(false).then(|| {
        let name = |id: &u32| served.text.tokenizer.id_to_token(*id);
        tokens.iter().map(name).collect::<Vec<_>>()
    });
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(&body, &mut response);
    Ok(response.json(json!({
        "count": tokens.len(),
        "max_model_len": served.card.max_model_len,
        "tokens": tokens,
        "token_strs": names,
    })))
}

/// Turns tokens into a text.
#[utoipa::path(
    post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest,
    responses((status = 200, description = "The text.", body = Detokenized)),
)]
pub(super) async fn detokenize(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut body = body::read(&request, payload, &shared.limits).await?;
    let fields: DetokenizeFields = body.read()?;
    let served = model(&shared, fields.model.as_deref())?;
    let tokens = fields.tokens(served.card.vocab_size)?;
    let tokens_are_many = tokens.len() >= LONG_TEXT / 4;
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(&body, &mut response);
    let text = served.text.clone();
    let decode = move || text.decode(&tokens, false);
    let prompt = match tokens_are_many {
        true => parallel::run(decode).await?,
        false => decode(),
    };
    Ok(response.json(json!({"prompt": prompt})))
}

/// The model that a question is about.
#[derive(Debug, Deserialize)]
pub(super) struct OfModel {
    /// Served model; any, when it is absent.
    model: Option<String>,
}

/// Shows a tokenizer's configuration.
#[utoipa::path(
    get, path = "/tokenizer_info", tag = "tokens",
    params(("model" = Option<String>, Query, description = "Served model; any without it.")),
    responses((status = 200, description = "The configuration.", body = TokenizerInfo)),
)]
pub(super) async fn info(
    request: HttpRequest,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let query = web::Query::<OfModel>::from_query(request.query_string()).map_err(|error| {
        ApiError::malformed(format!("The query does not parse: {error}.")).param("model")
    })?;
    let served = model(&shared, query.model.as_deref())?;
    Ok(HttpResponse::Ok().json(&served.text.tokenizer_config))
}

/// Tokenizes a text without keeping other requests waiting.
pub(super) async fn encode(
    text_model: &Arc<TextModel>,
    text: String,
    add_special_tokens: bool,
    trace: &Trace,
) -> Result<Vec<u32>, ApiError> {
    let mut span = trace.span("tokenize");
    let tokens = match text.len() < LONG_TEXT {
        true => text_model.encode(&text, add_special_tokens),
        false => {
            let text_model = text_model.clone();
            parallel::run(move || text_model.encode(&text, add_special_tokens)).await?
        }
    };
    let tokens =
        tokens.map_err(|error| ApiError::internal(format!("The tokenizer failed: {error}.")))?;
    span.set("baton.tokens", tokens.len() as i64);
    Ok(tokens)
}
