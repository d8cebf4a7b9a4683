//! `POST /v1/completions`.

use std::sync::Arc;

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::PromptTokenLogprob;
use serde_json::{Value, json};

use super::Shared;
use super::frames::{Frames, Shape};
use super::generation::{Intake, Order, check, check_length};
use super::model::{COMPLETIONS, model};
use super::tokenize::encode;
use crate::api::completion::{CompletionFields, DEFAULT_MAX_TOKENS, Prompt};
use crate::api::envelope::Envelope;
use crate::api::logprobs::{Columns, Naming};
use crate::api::requests::CompletionRequest;
use crate::api::sampling::SamplingFields;
use crate::api::schema::{StreamEvent, TextCompletion};
use crate::api::structured::StructuredFields;
use crate::api::usage::{Budget, Usage};
use crate::error::ApiError;
use crate::generate::answer::Delta;
use crate::workers::Served;

/// Completes texts or tokens.
#[utoipa::path(
    post, path = "/v1/completions", tag = "generation", request_body = CompletionRequest,
    params((
        "endpoint-load-metrics-format" = Option<String>, Header,
        description = "JSON or TEXT: a reply that is no stream has a header \
                       `endpoint-load-metrics` then, which says how busy the workers are.",
    )),
    responses((
        status = 200, description = "The answers; a stream of events if `stream` is true.",
        content((TextCompletion = "application/json"), (StreamEvent = "text/event-stream")),
    )),
)]
pub(super) async fn create(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer(intake, shared).await
}

/// Answers a completion whose body has been read.
pub(super) async fn answer(
    intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let Intake { arrived, place, mut body, client, request_id, trace, load } = intake;
    let fields: SamplingFields = body.read()?;
    let completion: CompletionFields = body.read()?;
    let structured: StructuredFields = body.read()?;
    body.refuse_unsupported()?;
    let served = model(&shared, fields.model.as_deref(), &COMPLETIONS)?;
    let wish = completion.wish(&structured)?;
    let logprobs = wish.logprobs.is_some();
    let mut sampling = check(&shared, &served, &fields, wish)?;
    let echo = completion.echo.unwrap_or(false);
    let (mut prompts, mut echoes): (Vec<Arc<[u32]>>, _) = (Vec::new(), Vec::new());
    for prompt in completion.prompts(served.card.vocab_size)? {
        if echo {
            echoes.push(match &prompt {
                Prompt::Tokens(_) => None,
                Prompt::Text(text) => Some(text.clone()),
            });
        }
        let mut tokens = match prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(text) => {
                if !fields.truncates() {
                    check_length(&served, &text)?;
                }
                encode(&served.text, text, completion.add_special_tokens(), &trace).await?
            }
        };
        let wanted = sampling.max_tokens.or(Some(DEFAULT_MAX_TOKENS));
        fields.truncate(&mut tokens, served.card.max_model_len, wanted)?;
        if tokens.is_empty() {
            let message = "`prompt` is empty, and this model puts nothing before it.";
            return Err(ApiError::bad_value("prompt", message));
        }
        prompts.push(tokens.into());
    }
    // The engine draws one token with every prompt; it is left out of the answer.
    let prompt_alone = sampling.max_tokens == Some(0);
    sampling.max_tokens = sampling.max_tokens.map(|tokens| tokens.max(1));
    let answers = prompts.len() * sampling.n;
    let shape = Completion {
        envelope: Envelope::new("cmpl", &request_id, served.name()),
        naming: Naming { as_token_ids: fields.return_tokens_as_token_ids.unwrap_or(false) },
        logprobs,
        prompt_logprobs: fields.wants_prompt_logprobs(),
        token_ids: fields.return_token_ids.unwrap_or(false),
        prompt_alone,
        prompts: prompts.clone(),
        echoes,
        n: sampling.n,
        begun: vec![false; answers],
        pending: vec![Vec::new(); answers],
        offsets: vec![0; answers],
        usage: fields.usage_in_stream(),
        usage_details: shared.limits.prompt_tokens_details,
        kv_transfer_params: fields.kv_transfer_params.clone().map(Value::Object),
        served: served.clone(),
    };
    let order = Order {
        shared: shared.into_inner(),
        served,
        sampling,
        prompts,
        budget: Budget { default: Some(DEFAULT_MAX_TOKENS), clip: false },
        arrived,
        id: shape.envelope.id.clone(),
        place,
        trace,
    };
    order.respond(shape, fields.streams(), &body, client, load).await
}

/// How a completion's answer is worded.
struct Completion {
    envelope: Envelope,
    naming: Naming,
    logprobs: bool,
    prompt_logprobs: bool,
    token_ids: bool,
    prompt_alone: bool,
    prompts: Vec<Arc<[u32]>>,
    /// The prompts, where they are to be given back: the text of those that came as text.
    echoes: Vec<Option<String>>,
    n: usize,
    /// Answers of which something has been sent.
    begun: Vec<bool>,
    /// Log-probabilities of the prompt that wait for the first token's event.
    pending: Vec<Vec<PromptTokenLogprob>>,
    /// Characters of each answer's text so far, for logprobs.
    offsets: Vec<usize>,
    usage: (bool, bool),
    usage_details: bool,
    kv_transfer_params: Option<Value>,
    served: Arc<Served>,
}

impl Completion {
    /// A choice of a whole reply or of an event: completions keep nulls in both.
    fn choice(&mut self, index: usize, delta: Delta) -> Value {
        let Delta { mut text, mut tokens, end, prompt: _ } = delta;
        if self.prompt_alone {
            text.clear();
            tokens.clear();
        }
        let first = !std::mem::replace(&mut self.begun[index], true);
        let prompt = &self.prompts[index / self.n];
        let known = std::mem::take(&mut self.pending[index]);
        let (naming, model) = (self.naming, &self.served.text);
        let offset = &mut self.offsets[index];
        let echo = self.echoes.get(index / self.n).filter(|_| first);
        match echo {
            Some(Some(sent)) => text.insert_str(0, sent),
            Some(None) => text.insert_str(0, &model.decode(prompt, false)),
            None => {}
        }
        let echoed = echo.is_some();
        let logprobs = (self.logprobs && (echoed || !tokens.is_empty())).then(|| {
            let mut columns = match echoed {
                true => naming.completion_prompt(model, prompt[0], &known, offset),
                false => Columns::default(),
            };
            columns.append(naming.completion(model, &tokens, offset));
            columns.json()
        });
        let ids: Option<Vec<u32>> =
            self.token_ids.then(|| tokens.iter().map(|token| token.id).collect());
        let prompt_ids = (self.token_ids && first).then(|| prompt.to_vec());
        let prompt_logprobs = (self.prompt_logprobs && first).then(|| naming.prompt(model, &known));
        json!({
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": end.as_ref().map(|end| end.reason),
            "stop_reason": end.map(|end| end.stop),
            "token_ids": ids,
            "prompt_logprobs": prompt_logprobs,
            "prompt_token_ids": prompt_ids,
        })
    }

    fn usage(&self, usage: Usage) -> Value {
        let completion_tokens = if self.prompt_alone { 0 } else { usage.completion_tokens };
        Usage { completion_tokens, ..usage }.json(self.usage_details)
    }
}

impl Shape for Completion {
    fn whole(&mut self, wholes: Vec<Delta>, usage: Usage) -> Value {
        let mut choices = Vec::with_capacity(wholes.len());
        for (index, mut whole) in wholes.into_iter().enumerate() {
            self.pending[index] = std::mem::take(&mut whole.prompt);
            choices.push(self.choice(index, whole));
        }
        let mut reply = self.envelope.frame("text_completion", choices);
        reply.insert("service_tier".into(), Value::Null);
        reply.insert("system_fingerprint".into(), Value::Null);
        reply.insert("usage".into(), self.usage(usage));
        reply.insert("kv_transfer_params".into(), json!(self.kv_transfer_params));
        reply.into()
    }

    fn opening(&mut self, _prompts: &[usize], _frames: &mut Frames) {}

    fn delta(&mut self, index: usize, mut delta: Delta, usage: Usage, frames: &mut Frames) {
        self.pending[index].append(&mut delta.prompt);
        if delta.text.is_empty() && delta.tokens.is_empty() && delta.end.is_none() {
            return;
        }
        let choice = self.choice(index, delta);
        let mut event = self.envelope.frame("text_completion", vec![choice]);
        let usage = self.usage.1.then(|| self.usage(usage));
        event.insert("usage".into(), json!(usage));
        frames.data(&event.into());
    }

    fn close(&mut self, usage: Usage, frames: &mut Frames) {
        if self.usage.0 {
            let mut event = self.envelope.frame("text_completion", Vec::new());
            event.insert("usage".into(), self.usage(usage));
            frames.data(&event.into());
        }
        frames.done();
    }
}
