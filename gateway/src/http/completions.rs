//! `POST /v1/completions`.

use std::sync::Arc;

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};

use super::Shared;
use super::generation::{Intake, Order, Shape, check_length};
use super::tokenize::{encode, model};
use crate::api::completion::{CompletionFields, DEFAULT_MAX_TOKENS, Prompt};
use crate::api::envelope::Envelope;
use crate::api::logprobs::Naming;
use crate::api::usage::Usage;
use crate::error::ApiError;
use crate::generate::answer::Delta;
use crate::workers::Served;

pub(super) async fn create(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    let Intake { arrived, place, mut body, fields, client, own_id } = intake;
    let completion: CompletionFields = body.read()?;
    body.refuse_unsupported()?;
    let served = model(&shared, fields.model.as_deref())?;
    let logprobs = completion.logprobs()?;
    let sampling = fields.check(served.card.vocab_size, logprobs)?;
    let mut prompts: Vec<Arc<[u32]>> = Vec::new();
    for prompt in completion.prompts(served.card.vocab_size)? {
        let tokens = match prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(text) => {
                check_length(&served, &text)?;
                encode(&served.text, text, completion.add_special_tokens()).await?
            }
        };
        if tokens.is_empty() {
            let message = "`prompt` is empty, and this model puts nothing before it.";
            return Err(ApiError::bad_value("prompt", message));
        }
        prompts.push(tokens.into());
    }
    let echo = completion.echo.unwrap_or(false);
    let shape = Completion {
        envelope: Envelope::new("cmpl", own_id.as_deref(), served.name()),
        naming: Naming { as_token_ids: fields.return_tokens_as_token_ids.unwrap_or(false) },
        logprobs: logprobs.is_some(),
        token_ids: fields.return_token_ids.unwrap_or(false),
        echo,
        prompts: prompts.clone(),
        n: sampling.n,
        begun: vec![false; prompts.len() * sampling.n],
        offsets: vec![0; prompts.len() * sampling.n],
        usage: fields.usage_in_stream(),
        served: served.clone(),
    };
    let order = Order {
        shared: shared.into_inner(),
        served,
        sampling,
        prompts,
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        arrived,
        id: shape.envelope.id.clone(),
        place,
        fields,
    };
    order.respond(shape, &body, client).await
}

/// How a completion's answer is framed.
struct Completion {
    envelope: Envelope,
    naming: Naming,
    logprobs: bool,
    token_ids: bool,
    echo: bool,
    prompts: Vec<Arc<[u32]>>,
    n: usize,
    /// Choices whose first event has been sent.
    begun: Vec<bool>,
    /// Characters of each choice's text so far, for logprobs.
    offsets: Vec<usize>,
    usage: (bool, bool),
    served: Arc<Served>,
}

impl Completion {
    /// A choice of a whole reply or of an event: completions keep nulls in both.
    fn choice(&mut self, index: usize, delta: Delta) -> Value {
        let Delta { mut text, tokens, end } = delta;
        let first = !std::mem::replace(&mut self.begun[index], true);
        let prompt = &self.prompts[index / self.n];
        if first && self.echo {
            text.insert_str(0, &self.served.text.decode(prompt, false));
        }
        let logprobs = (self.logprobs && !tokens.is_empty())
            .then(|| self.naming.completion(&self.served.text, &tokens, &mut self.offsets[index]));
        let ids: Option<Vec<u32>> =
            self.token_ids.then(|| tokens.iter().map(|token| token.id).collect());
        let prompt_ids = (self.token_ids && first).then(|| prompt.to_vec());
        json!({
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": end.as_ref().map(|end| end.reason),
            "stop_reason": end.map(|end| end.stop),
            "token_ids": ids,
            "prompt_logprobs": null,
            "prompt_token_ids": prompt_ids,
        })
    }
}

impl Shape for Completion {
    fn whole(&mut self, wholes: Vec<Delta>, usage: Usage) -> Map<String, Value> {
        let each = wholes.into_iter().enumerate();
        let choices = each.map(|(index, whole)| self.choice(index, whole)).collect();
        let mut reply = self.envelope.frame("text_completion", choices);
        reply.insert("service_tier".into(), Value::Null);
        reply.insert("system_fingerprint".into(), Value::Null);
        reply.insert("usage".into(), usage.json());
        reply.insert("kv_transfer_params".into(), Value::Null);
        reply
    }

    fn opening(&mut self, _index: usize) -> Option<Map<String, Value>> {
        None
    }

    fn delta(&mut self, index: usize, delta: Delta) -> Map<String, Value> {
        let choice = self.choice(index, delta);
        let mut event = self.envelope.frame("text_completion", vec![choice]);
        event.insert("usage".into(), Value::Null);
        event
    }

    fn usage(&self) -> Map<String, Value> {
        self.envelope.frame("text_completion", Vec::new())
    }

    fn usage_wanted(&self) -> (bool, bool) {
        self.usage
    }
}
