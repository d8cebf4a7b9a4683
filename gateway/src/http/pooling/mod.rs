//! Embeddings, classes and scores: from a body to what the workers computed.
//!
//! A route reads its fields, makes a [`Work`], has its texts tokenized ([`Work::sequences`]) and
//! computed ([`Work::compute`]), and words the answer itself.

pub(super) mod classify;
pub(super) mod cohere;
pub(super) mod embed;
pub(super) mod rerank;
pub(super) mod score;

use std::sync::Arc;
use std::time::Instant;

use actix_web::HttpResponse;
use actix_web::http::header::ContentType;
use baton_proto::v1::{PoolInput, Task};
use serde::Serialize;

use super::connection::Connection;
use super::generation::{Intake, unless_gone};
use super::load::Place;
use super::model::{Api, model};
use super::{Shared, body};
use crate::api::Body;
use crate::api::chat::Conversation;
use crate::api::completion::Prompt;
use crate::api::envelope::Envelope;
use crate::api::pooling::{IGNORED, InputFields, Inputs, Naming, PoolingFields};
use crate::error::ApiError;
use crate::pool::{self, Job, Pooled};
use crate::text::parallel;
use crate::text::sequences::Cut;
use crate::trace::Trace;
use crate::workers::Served;

/// Values from which a reply is written off the threads that serve.
const LONG_REPLY: usize = 64 * 1024;

/// A request, its model found.
pub(super) struct Work {
    shared: Arc<Shared>,
    served: Arc<Served>,
    envelope: Envelope,
    client: Option<Connection>,
    arrived: Instant,
    priority: i32,
    /// The longest sequence, and how longer ones are cut, if they are.
    bound: (usize, Option<Cut>),
    trace: Trace,
    _place: Place,
}

impl Work {
    /// A request by `api`, whose id begins with `prefix`, and its body.
    fn new(
        intake: Intake,
        shared: Arc<Shared>,
        fields: &PoolingFields,
        api: &Api,
        prefix: &str,
    ) -> Result<(Self, Body), ApiError> {
        let (mut work, body) =
            Self::of_model(intake, shared, fields.model.as_deref(), api, prefix)?;
        work.bound.1 = fields.cut(work.served.card.max_model_len)?;
        work.priority = fields.priority()?;
        Ok((work, body))
    }

    fn of_model(
        intake: Intake,
        shared: Arc<Shared>,
        name: Option<&str>,
        api: &Api,
        prefix: &str,
    ) -> Result<(Self, Body), ApiError> {
        let Intake { arrived, place, mut body, client, request_id, trace, .. } = intake;
        body.ignore(IGNORED);
        let served = model(&shared, name, api)?;
        let envelope = Envelope::new(prefix, &request_id, served.name());
        let bound = (served.card.max_model_len as usize, None);
        trace.asked(served.name(), |_| {});
        let work = Self {
            shared,
            served,
            envelope,
            client,
            arrived,
            priority: 0,
            bound,
            trace,
            _place: place,
        };
        Ok((work, body))
    }

    /// The texts of `input`, or of `messages`, and whether special tokens are put around them.
    fn inputs(&self, body: &mut Body) -> Result<(Inputs, bool), ApiError> {
        let fields: InputFields = body.read()?;
        if body.get("input").is_some() || body.get("messages").is_none() {
            let most = self.shared.limits.max_texts;
            let inputs = fields.inputs(self.served.card.vocab_size, most)?;
            return Ok((inputs, fields.add_special_tokens()));
        }
        if self.served.text.template.is_none() {
            let message = "This model has no chat template; send the text as `input`.";
            return Err(ApiError::bad_value("messages", message));
        }
        if body.get("add_generation_prompt").is_none() {
            // The turn that is asked about is the last one that is there.
            body.set("add_generation_prompt", false.into());
        }
        let conversation: Conversation = body.read()?;
        let trusted = self.shared.limits.trust_request_chat_template;
        let text = conversation.render(&self.served.text, None, trusted)?;
        let naming = Naming { field: "messages", listed: false };
        let inputs = Inputs { prompts: vec![Prompt::Text(text)], naming };
        Ok((inputs, conversation.add_special_tokens()))
    }

    /// Texts as sequences, within the model's length.
    async fn sequences(
        &self,
        inputs: Inputs,
        special: bool,
        cut: Option<Cut>,
    ) -> Result<Vec<PoolInput>, ApiError> {
        let Inputs { prompts, naming } = inputs;
        let (text, bound) = (self.served.text.clone(), self.bound.0);
        let longest = text.longest_token.saturating_mul(bound);
        let bytes = |prompt: &Prompt| match prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Tokens(_) => 0,
        };
        let tokens = move |at: usize, prompt: Prompt| {
            let mut token_ids = match prompt {
                Prompt::Tokens(tokens) => tokens,
                Prompt::Text(string) if cut.is_none() && string.len() > longest => {
                    let message = format!(
                        "`{}` has {} bytes, but this model takes {bound} tokens, which is less \
                         than {longest} bytes of any text; shorten it, or cut it with \
                         `truncate_prompt_tokens`.",
                        naming.of(at),
                        string.len(),
                    );
                    return Err(ApiError::bad_value("input_text", message));
                }
                Prompt::Text(string) => {
                    text.sequence(&string, special, cut).map_err(untokenized)?
                }
            };
            if let Some(cut) = cut {
                let surplus = token_ids.len().saturating_sub(cut.keep);
                match cut.left {
                    true => drop(token_ids.drain(..surplus)),
                    false => token_ids.truncate(cut.keep),
                }
            }
            checked(PoolInput { token_ids, type_ids: Vec::new() }, bound, &naming.of(at))
        };
        let _span = self.trace.span("tokenize");
        unless_gone(self.client.as_ref(), parallel::map(prompts, bytes, tokens)).await?
    }

    /// Has all sequences computed.
    async fn compute(
        &self,
        inputs: Vec<PoolInput>,
        task: Task,
        activate: bool,
        dimensions: u32,
    ) -> Result<(Pooled, usize), ApiError> {
        let lengths: Vec<usize> = inputs.iter().map(|input| input.token_ids.len()).collect();
        let job = Job {
            served: self.served.clone(),
            request_id: self.envelope.id.clone(),
            task,
            activate,
            dimensions,
            priority: self.priority,
            deadline: self.arrived + self.shared.limits.request_timeout,
            trace: self.trace.clone(),
        };
        self.trace.prompt(lengths.iter().sum());
        let mut record = self.shared.metrics.pooling(&self.served.card, &lengths, self.arrived);
        let run = pool::run(&self.shared.registry, &job, inputs);
        let pooled = match unless_gone(self.client.as_ref(), run).await? {
            Ok(pooled) => pooled,
            Err(error) => {
                record.failed();
                return Err(error);
            }
        };
        record.done(&pooled);
        Ok((pooled, lengths.iter().sum()))
    }

    /// The reply. Fields of the body that nothing has read are named in a header.
    async fn reply<T: Serialize + Send + 'static>(
        &self,
        body: &Body,
        reply: T,
        values: usize,
    ) -> Result<HttpResponse, ApiError> {
        let failed = |error: &dyn std::fmt::Display| {
            ApiError::internal(format!("The reply cannot be written: {error}."))
        };
        let json = match values < LONG_REPLY {
            true => serde_json::to_vec(&reply),
            false => tokio::task::spawn_blocking(move || serde_json::to_vec(&reply))
                .await
                .map_err(|error| failed(&error))?,
        };
        let json = json.map_err(|error| failed(&error))?;
        let mut response = HttpResponse::Ok();
        body::warn_of_unknown(body, &mut response);
        Ok(response.insert_header(ContentType::json()).body(json))
    }
}

fn untokenized(error: String) -> ApiError {
    ApiError::internal(format!("The tokenizer failed: {error}."))
}

/// A sequence that the model can take.
fn checked(input: PoolInput, bound: usize, name: &str) -> Result<PoolInput, ApiError> {
    match input.token_ids.len() {
        0 => {
            let message = format!("`{name}` makes no token; send a text that does.");
            Err(ApiError::bad_value(name, message))
        }
        tokens if tokens > bound => {
            let message = format!(
                "`{name}` has {tokens} tokens, but {bound} are taken; shorten it, or have it cut: \
                 with `truncate_prompt_tokens`, or `truncate` where it is a field."
            );
            Err(ApiError::bad_value("input_tokens", message))
        }
        _ => Ok(input),
    }
}
