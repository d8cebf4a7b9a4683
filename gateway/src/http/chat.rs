//! `POST /v1/chat/completions`.

use std::sync::Arc;

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Map, Value, json};

use super::Shared;
use super::generation::{Intake, Order, Shape, check_length};
use super::tokenize::{encode, model};
use crate::api::chat::{ChatFields, Conversation};
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
    let chat: ChatFields = body.read()?;
    let conversation: Conversation = body.read()?;
    body.refuse_unsupported()?;
    let served = model(&shared, fields.model.as_deref())?;
    let logprobs = chat.logprobs()?;
    let sampling = fields.check(served.card.vocab_size, logprobs)?;
    let text = conversation.render(&served.text)?;
    check_length(&served, &text)?;
    let prompt = encode(&served.text, text, conversation.add_special_tokens()).await?;
    if prompt.is_empty() {
        return Err(ApiError::bad_value("messages", "`messages` make an empty prompt."));
    }
    let shape = Chat {
        envelope: Envelope::new("chatcmpl", own_id.as_deref(), served.name()),
        role: conversation.answer_role(),
        naming: Naming { as_token_ids: fields.return_tokens_as_token_ids.unwrap_or(false) },
        logprobs: logprobs.is_some(),
        token_ids: fields.return_token_ids.unwrap_or(false),
        prompt: prompt.into(),
        usage: fields.usage_in_stream(),
        served: served.clone(),
    };
    let order = Order {
        shared: shared.into_inner(),
        served,
        sampling,
        prompts: vec![shape.prompt.clone()],
        default_max_tokens: None,
        arrived,
        id: shape.envelope.id.clone(),
        place,
        fields,
    };
    order.respond(shape, &body, client).await
}

/// How a chat's answer is framed.
struct Chat {
    envelope: Envelope,
    role: String,
    naming: Naming,
    logprobs: bool,
    token_ids: bool,
    prompt: Arc<[u32]>,
    usage: (bool, bool),
    served: Arc<Served>,
}

impl Chat {
    /// A choice of a whole reply.
    fn choice(&self, index: usize, whole: Delta) -> Value {
        let Delta { text, tokens, end } = whole;
        let logprobs = self.logprobs.then(|| self.naming.chat(&self.served.text, &tokens));
        let ids: Option<Vec<u32>> =
            self.token_ids.then(|| tokens.iter().map(|token| token.id).collect());
        json!({
            "index": index,
            "message": {
                "role": self.role,
                "content": text,
                "refusal": null,
                "annotations": null,
                "audio": null,
                "function_call": null,
                "tool_calls": [],
                "reasoning": null,
            },
            "logprobs": logprobs,
            "finish_reason": end.as_ref().map(|end| end.reason),
            "stop_reason": end.map(|end| end.stop),
            "token_ids": ids,
        })
    }

    fn frame(&self, choice: Value) -> Map<String, Value> {
        self.envelope.frame("chat.completion.chunk", vec![choice])
    }
}

/// Events have only the keys that are set, as vLLM does it.
impl Shape for Chat {
    fn whole(&mut self, wholes: Vec<Delta>, usage: Usage) -> Map<String, Value> {
        let choices = wholes.into_iter().enumerate().map(|(i, whole)| self.choice(i, whole));
        let mut reply = self.envelope.frame("chat.completion", choices.collect());
        let prompt_ids = self.token_ids.then(|| self.prompt.to_vec());
        reply.insert("service_tier".into(), Value::Null);
        reply.insert("system_fingerprint".into(), Value::Null);
        reply.insert("usage".into(), usage.json());
        reply.insert("prompt_logprobs".into(), Value::Null);
        reply.insert("prompt_token_ids".into(), json!(prompt_ids));
        reply.insert("kv_transfer_params".into(), Value::Null);
        reply
    }

    fn opening(&mut self, index: usize) -> Option<Map<String, Value>> {
        let mut event = self.frame(json!({
            "index": index,
            "delta": {"role": self.role, "content": ""},
            "logprobs": null,
            "finish_reason": null,
        }));
        let prompt_ids = self.token_ids.then(|| self.prompt.to_vec());
        event.insert("prompt_token_ids".into(), json!(prompt_ids));
        Some(event)
    }

    fn delta(&mut self, index: usize, delta: Delta) -> Map<String, Value> {
        let Delta { text, tokens, end } = delta;
        let mut choice = json!({
            "index": index,
            "delta": {"content": text},
            "logprobs": null,
            "finish_reason": end.as_ref().map(|end| end.reason),
        });
        if self.logprobs && !tokens.is_empty() {
            choice["logprobs"] = self.naming.chat(&self.served.text, &tokens);
        }
        if let Some(end) = end {
            choice["stop_reason"] = end.stop;
        }
        if self.token_ids {
            choice["token_ids"] = tokens.iter().map(|token| token.id).collect();
        }
        self.frame(choice)
    }

    fn usage(&self) -> Map<String, Value> {
        self.envelope.frame("chat.completion.chunk", Vec::new())
    }

    fn usage_wanted(&self) -> (bool, bool) {
        self.usage
    }
}
