//! `Align`: when each token of a transcript was said.

use std::time::Instant;

use baton_proto::InstanceRole;
use baton_proto::v1::{AlignRequest, AlignResponse, SamplingParams};
use tonic::Status;

use super::drain::given_up;
use super::{Shared, refused, timeout};
use crate::engine::{Event, Finish, NewRequest, Purpose};

/// Puts a transcript into the engine and waits for its times. Dropping the call cancels it.
pub(super) async fn align(shared: &Shared, request: AlignRequest) -> Result<AlignResponse, Status> {
    shared.is_not(InstanceRole::Prefill)?;
    let card = shared
        .engine
        .speech()
        .ok_or_else(|| Status::failed_precondition("this model is none for speech"))?;
    if request.prompt_token_ids.is_empty() || request.text_token_ids.is_empty() {
        return Err(Status::invalid_argument(
            "`prompt_token_ids` and `text_token_ids` need at least one token each",
        ));
    }
    let end = shared.model.eos_token_ids.first().copied();
    let end = end.ok_or_else(|| Status::internal("the model has no end of text"))?;
    let mut output = vec![card.no_timestamps];
    output.extend(request.text_token_ids);
    output.push(end);
    let mut handle = shared
        .engine
        .submit(NewRequest {
            prompt: request.prompt_token_ids,
            audio: request.audio.map(|audio| audio.samples),
            output,
            sampling: SamplingParams::default(),
            constraint: None,
            priority: 0,
            salt: String::new(),
            adapter: None,
            purpose: Purpose::Align,
            deadline: Instant::now() + timeout(request.timeout_ms),
            returning: false,
        })
        .map_err(refused)?;
    let mut response = None;
    while let Some(event) = handle.next().await {
        match event {
            Event::Aligned(aligned) => {
                response = Some(AlignResponse {
                    starts: aligned.starts,
                    probabilities: aligned.probabilities,
                });
            }
            Event::Finished(Finish::Deadline) => {
                return Err(Status::deadline_exceeded("out of time"));
            }
            Event::Finished(Finish::Stopping) => {
                return Err(given_up());
            }
            Event::Finished(Finish::Failed(reason)) => return Err(Status::internal(reason)),
            Event::Finished(_) => break,
            _ => {}
        }
    }
    response.ok_or_else(|| Status::internal("the engine dropped the request"))
}
