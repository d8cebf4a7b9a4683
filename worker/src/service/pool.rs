//! `Pool`: texts in, vectors, classes or scores out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_membership::traces::Span;
use baton_proto::drain::draining;
use baton_proto::v1::{
    ModelCard, PoolOutput, PoolRequest, PoolResponse, Task, WorkerDescription, WorkerStatus,
};
use tonic::Status;
use tracing::debug;

use super::drain::{Drain, given_up};
use super::{micros, spans, timeout};
use crate::pooling::{Answer, Failure, Input, NewCall, Pooler, Refusal, Wanted};

/// What a pooling service is made of.
pub struct PoolingParts {
    /// Unique for this start.
    pub instance_id: String,
    /// The model, for clients.
    pub model: ModelCard,
    /// The tokenizer, for gateways.
    pub tokenizer: baton_proto::TokenizerBundle,
    /// How long a drain may take that names no time.
    pub drain_timeout: Duration,
    /// What computes.
    pub pooler: Arc<Pooler>,
}

/// What calls share.
pub(super) struct Shared {
    pub(super) instance_id: String,
    pub(super) model: ModelCard,
    pub(super) pooler: Arc<Pooler>,
    pub(super) drain: Arc<Drain>,
}

impl Shared {
    pub(super) fn describe(&self) -> WorkerDescription {
        WorkerDescription {
            instance_id: self.instance_id.clone(),
            role: baton_proto::v1::Role::Pooling.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            model: Some(self.model.clone()),
            ..WorkerDescription::default()
        }
    }

    pub(super) fn status(&self) -> WorkerStatus {
        WorkerStatus { instance_id: self.instance_id.clone(), ..self.pooler.status() }
    }

    /// Checks a call, waits for its answer. When the caller goes, what is left of it leaves the
    /// queue.
    pub(super) async fn pool(
        &self,
        request: PoolRequest,
        mut span: Span,
    ) -> Result<PoolResponse, Status> {
        if span.exports() {
            spans::named(&mut span, &request.request_id);
            let tokens = request.inputs.iter().map(|input| input.token_ids.len()).sum::<usize>();
            span.set("baton.texts", request.inputs.len() as i64);
            span.set("baton.computed_tokens", tokens as i64);
        }
        match self.answer(request).await {
            Ok(answer) => {
                span.set_time("gen_ai.latency.time_in_queue", answer.queued);
                span.set_time("gen_ai.latency.time_in_model_forward", answer.computed);
                Ok(response(answer))
            }
            Err(status) => {
                span.fail_rpc(status.code());
                Err(status)
            }
        }
    }

    async fn answer(&self, request: PoolRequest) -> Result<Answer, Status> {
        let deadline = Instant::now() + timeout(request.timeout_ms);
        let task = Task::try_from(request.task)
            .map_err(|_| Status::invalid_argument(format!("`task` {} is unknown", request.task)))?;
        let inputs = request
            .inputs
            .into_iter()
            .map(|input| Input { tokens: input.token_ids, types: input.type_ids });
        let wanted =
            Wanted { task, activate: request.activate, dimensions: request.dimensions as usize };
        let call = NewCall { inputs: inputs.collect(), wanted, priority: request.priority };
        debug!(request_id = request.request_id, texts = call.inputs.len(), "pool");
        let handle = self.pooler.submit(call).map_err(refused)?;
        let answer = tokio::time::timeout_at(deadline.into(), handle.answer());
        let answer = tokio::select! {
            answer = answer => answer,
            () = self.drain.over() => return Err(given_up()),
        };
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Failure::Stopping)) => Err(given_up()),
            Ok(Err(failure @ Failure::Failed(_))) => Err(Status::internal(failure.to_string())),
            Err(_) => Err(Status::deadline_exceeded("out of time")),
        }
    }
}

fn refused(refusal: Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::Full { .. } => Status::resource_exhausted(message),
        Refusal::Stopping => draining(message),
        Refusal::Invalid(_) => Status::invalid_argument(message),
    }
}

fn response(answer: Answer) -> PoolResponse {
    let outputs = answer.outputs.into_iter();
    PoolResponse {
        outputs: outputs
            .map(|output| PoolOutput { values: output.values, width: output.width as u32 })
            .collect(),
        queue_us: micros(answer.queued),
        compute_us: micros(answer.computed),
    }
}
