//! `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`: success is plain text, as vLLM
//! has it.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use utoipa::ToSchema;

use super::{Shared, body};
use crate::adapters::Load;
use crate::api::Body;
use crate::error::ApiError;

/// The body of a load.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = LoadAdapter)]
pub(super) struct LoadFields {
    /// The name under which it is served.
    #[schema(value_type = String, min_length = 1)]
    lora_name: Option<String>,
    /// Its folder, as the workers see it.
    #[schema(value_type = String, min_length = 1)]
    lora_path: Option<String>,
    /// Replace the adapter of this name.
    load_inplace: Option<bool>,
    /// Which model it is for, where there are several.
    base_model_name: Option<String>,
}

/// The body of an unload.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = UnloadAdapter)]
pub(super) struct UnloadFields {
    /// The name under which it is served.
    #[schema(value_type = String, min_length = 1)]
    lora_name: Option<String>,
    /// vLLM's own number of the adapter; the name is enough.
    #[serde(rename = "lora_int_id")]
    _lora_int_id: Option<i64>,
}

/// Loads a LoRA adapter on every worker of its model.
#[utoipa::path(
    post, path = "/v1/load_lora_adapter", tag = "operation", request_body = LoadFields,
    responses((status = 200, description = "Done.", content_type = "text/plain", body = String)),
)]
pub(super) async fn load(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut body = body::read(&request, payload, &shared.limits).await?;
    let fields: LoadFields = body.read()?;
    let given = |field: Option<String>| field.filter(|text| !text.is_empty());
    let (Some(name), Some(path)) = (given(fields.lora_name), given(fields.lora_path)) else {
        let message = "Both 'lora_name' and 'lora_path' must be provided.";
        return Err(ApiError::adapter_refused(message));
    };
    let reply = format!("Success: LoRA adapter '{name}' added successfully.");
    let in_place = fields.load_inplace.unwrap_or(false);
    let load = Load { name, path, in_place, base: given(fields.base_model_name) };
    shared.adapters.load(load).await?;
    Ok(done(&body, reply))
}

/// Unloads a LoRA adapter.
#[utoipa::path(
    post, path = "/v1/unload_lora_adapter", tag = "operation", request_body = UnloadFields,
    responses((status = 200, description = "Done.", content_type = "text/plain", body = String)),
)]
pub(super) async fn unload(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut body = body::read(&request, payload, &shared.limits).await?;
    let fields: UnloadFields = body.read()?;
    let Some(name) = fields.lora_name.filter(|name| !name.is_empty()) else {
        let message = "'lora_name' must be provided to unload a LoRA adapter.";
        return Err(ApiError::adapter_refused(message));
    };
    let reply = format!("Success: LoRA adapter '{name}' removed successfully.");
    shared.adapters.unload(name).await?;
    Ok(done(&body, reply))
}

fn done(body: &Body, reply: String) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(body, &mut response);
    response.content_type("text/plain; charset=utf-8").body(reply)
}
