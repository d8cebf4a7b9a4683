//! `POST /scale_elastic_ep` and `POST /is_scaling_elastic_ep`: how many workers a pool has.
//!
//! The coordinators do it; here it is asked for and waited for. A client that leaves stops nothing.

use std::time::{Duration, Instant};

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::{GetScaleRequest, ScaleOperation, ScaleRequest};
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::{Code, Status};
use utoipa::ToSchema;

use super::{Shared, body};
use crate::coordinators::{ask, scales};
use crate::error::ApiError;
use crate::workers::{Registry, Worker};

/// Between two looks at the operation.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long all coordinators may be silent before the wait is given up: one must be elected when
/// the leader dies, and may have to be started.
const SILENT_FOR: Duration = Duration::from_secs(60);
/// How long this gateway waits for what the coordinator has seen.
const KNOWN_WITHIN: Duration = Duration::from_secs(3);
/// Time for running requests, when the request does not say.
const DRAIN_SECONDS: u64 = 120;

/// The body.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = ScaleRequest)]
pub(super) struct Fields {
    /// How many workers the pool is to have.
    #[schema(value_type = u32, minimum = 1, maximum = 1024)]
    new_data_parallel_size: Option<Value>,
    /// Seconds that the requests of workers that are to go have; 120 unless it is given.
    #[schema(value_type = Option<u64>, minimum = 1)]
    drain_timeout: Option<Value>,
    /// `prefill`, `decode`, `unified`, `pooling` or `audio`; absent: the pool that generates.
    pool: Option<String>,
    /// Where the pool has several models: which.
    model: Option<String>,
    /// The pool whose workers are to be the new ones: `prefill`, `decode` or `unified`. They change
    /// their role and keep their model. Absent: new workers are launched.
    from_pool: Option<String>,
}

/// The reply.
#[derive(ToSchema)]
#[schema(as = Scaled)]
pub(super) struct Scaled {
    /// `Scaled to N data parallel engines`.
    #[allow(dead_code, reason = "it describes a reply")]
    message: String,
}

/// The reply of the question.
#[derive(ToSchema)]
#[schema(as = IsScaling)]
pub(super) struct IsScaling {
    /// Whether an operation runs, of any pool.
    #[allow(dead_code, reason = "it describes a reply")]
    is_scaling_elastic_ep: bool,
}

/// Changes how many workers a pool has, and answers when it has them.
#[utoipa::path(
    post, path = "/scale_elastic_ep", tag = "operation", request_body = Fields,
    responses((status = 200, description = "The pool has the size.", body = Scaled)),
)]
pub(super) async fn scale(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut body = body::read_as(&request, payload, &shared.limits, "Invalid JSON format").await?;
    let fields: Fields = body.read()?;
    let size = fields.new_data_parallel_size.filter(|size| !size.is_null());
    let size = size.ok_or_else(|| ApiError::malformed("new_data_parallel_size is required"))?;
    let size = positive("new_data_parallel_size", &size)?;
    let seconds = match fields.drain_timeout.filter(|seconds| !seconds.is_null()) {
        Some(seconds) => positive("drain_timeout", &seconds)?,
        None => DRAIN_SECONDS,
    };
    let wanted = ScaleRequest {
        pool: fields.pool.unwrap_or_default(),
        model: fields.model.unwrap_or_default(),
        // The coordinator says what is too much.
        size: u32::try_from(size).unwrap_or(u32::MAX),
        drain_timeout_ms: seconds.saturating_mul(1000),
        from_pool: fields.from_pool.unwrap_or_default(),
    };
    let asked = ask(&shared.registry, async |mut client| client.scale(wanted.clone()).await);
    let operation = asked.await.map_err(|status| refused(&status))?;
    let ended = wait(&shared, operation).await?;
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(&body, &mut response);
    match ended.phase.as_str() {
        "done" => {
            known(&shared.registry, &ended).await;
            let message = format!("Scaled to {} data parallel engines", ended.size);
            Ok(response.json(json!({"message": message})))
        }
        "cancelled" => {
            let message = format!("The scale operation {} was cancelled.", ended.id);
            Err(ApiError::conflict(message))
        }
        _ if ended.drain_timed_out => {
            Err(ApiError::drain_timed_out(ended.drain_timeout_ms / 1000, &ended.reason))
        }
        _ => Err(ApiError::scale_failed(&ended.reason)),
    }
}

/// Tells whether a pool is being scaled.
#[utoipa::path(
    post, path = "/is_scaling_elastic_ep", tag = "operation",
    responses((status = 200, description = "Whether one is.", body = IsScaling)),
)]
pub(super) async fn is_scaling(shared: web::Data<Shared>) -> Result<HttpResponse, ApiError> {
    // Without coordinators nothing is changed.
    let scaling = !shared.registry.coordinators().is_empty() && {
        let operations = scales(&shared.registry).await.map_err(|status| refused(&status))?;
        operations.iter().any(|operation| operation.ended_ms == 0)
    };
    Ok(HttpResponse::Ok().json(json!({"is_scaling_elastic_ep": scaling})))
}

type Client = baton_proto::v1::coordinator_client::CoordinatorClient<tonic::transport::Channel>;

/// Waits for the operation's end, which comes: each of its phases has a deadline.
async fn wait(shared: &Shared, mut operation: ScaleOperation) -> Result<ScaleOperation, ApiError> {
    let mut heard = Instant::now();
    while operation.ended_ms == 0 {
        tokio::time::sleep(LOOK_EVERY).await;
        let request = GetScaleRequest { id: operation.id.clone() };
        let look = async |mut client: Client| client.get_scale(request.clone()).await;
        match ask(&shared.registry, look).await {
            Ok(now) => (operation, heard) = (now, Instant::now()),
            Err(status) if status.code() == Code::Unavailable && heard.elapsed() < SILENT_FOR => {}
            Err(status) => {
                let (id, why) = (&operation.id, status.message());
                return Err(ApiError::scale_failed(&format!("{id} cannot be followed: {why}")));
            }
        }
    }
    Ok(operation)
}

/// Waits until this gateway has heard from the workers too: they are asked what they serve a moment
/// after they are registered, and who has scaled from nothing sends a request at once.
async fn known(registry: &Registry, ended: &ScaleOperation) {
    let until = Instant::now() + KNOWN_WITHIN;
    let of_pool = |worker: &Worker| worker.record.role.as_str() == ended.pool;
    let known = |worker: &Worker| of_pool(worker) && worker.alive() && worker.served().is_some();
    while Instant::now() < until {
        let there = registry.workers().iter().filter(|worker| known(worker)).count();
        if there as u64 >= u64::from(ended.size) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn positive(field: &str, value: &Value) -> Result<u64, ApiError> {
    let wrong = || ApiError::malformed(format!("{field} must be a positive integer"));
    value.as_u64().filter(|&number| number > 0).ok_or_else(wrong)
}

/// What a coordinator's refusal is for the client.
fn refused(status: &Status) -> ApiError {
    let message = format!("{}.", status.message().trim_end_matches('.'));
    match status.code() {
        Code::InvalidArgument if message.starts_with("`model`") => {
            ApiError::bad_value("model", message)
        }
        Code::InvalidArgument if message.starts_with("`size`") => {
            ApiError::bad_value("size", message).rename("size", "new_data_parallel_size")
        }
        Code::InvalidArgument if message.starts_with("`from_pool`") => {
            ApiError::bad_value("from_pool", message)
        }
        Code::InvalidArgument => ApiError::bad_value("pool", message),
        Code::AlreadyExists => ApiError::conflict(format!("Scale {message}")),
        Code::Unavailable => ApiError::unavailable(message),
        _ => ApiError::scale_failed(&message),
    }
}
