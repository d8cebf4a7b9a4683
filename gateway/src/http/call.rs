//! A chat, read and checked: what chat completions, responses and messages have in common.
//!
//! A route turns its body into the form of chat completions, makes a [`Call`] of it, and words the
//! answer itself. [`Reading`] gives it the answer's parts: reasoning, content and tool calls.

use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use super::Shared;
use super::generation::{Order, check, check_length};
use super::load::Place;
use super::model::{Api, model};
use super::tokenize::encode;
use crate::api::Body;
use crate::api::chat::{ChatFields, Conversation};
use crate::api::sampling::{Sampling, SamplingFields, Wish};
use crate::api::structured::{Reasoned, StructuredFields, after_reasoning, by_schema};
use crate::api::tools::{ToolChoice, ToolSchema, Tools};
use crate::api::usage::{Budget, Usage};
use crate::error::ApiError;
use crate::output::constraint::constraint;
use crate::output::{OutputFormat, OutputParser, ReasoningSyntax, ToolSyntax};
use crate::text::TextModel;
use crate::trace::Trace;
use crate::workers::Served;

/// A chat that is ready to be generated.
pub(super) struct Call {
    pub(super) served: Arc<Served>,
    pub(super) fields: SamplingFields,
    pub(super) sampling: Sampling,
    pub(super) prompt: Arc<[u32]>,
    /// The role under which the answer is given.
    pub(super) role: String,
    /// The text that is put before the answer.
    pub(super) echo: Option<String>,
    /// Whether log-probabilities are wanted.
    pub(super) logprobs: bool,
    pub(super) reading: Reading,
    usage_details: bool,
    trace: Trace,
}

/// How the answer's text is to be read.
pub(super) struct Reading {
    format: OutputFormat,
    tools: Vec<ToolSchema>,
    choice: ToolChoice,
    /// Whether reasoning is sent.
    pub(super) include_reasoning: bool,
}

impl Call {
    /// Reads the fields of a chat that came by `api`. Fields of `body` that no type takes stay
    /// unknown.
    pub(super) async fn read(
        shared: &Shared,
        body: &mut Body,
        api: &Api,
        trace: Trace,
    ) -> Result<Self, ApiError> {
        let fields: SamplingFields = body.read()?;
        let chat: ChatFields = body.read()?;
        let conversation: Conversation = body.read()?;
        let structured: StructuredFields = body.read()?;
        let tools = Tools::read(body)?;
        body.refuse_unsupported()?;
        let served = model(shared, fields.model.as_deref(), api)?;
        let mut wish = Wish {
            logprobs: chat.logprobs()?,
            echo: chat.echo.unwrap_or(false),
            prompt_alone: false,
            constraint: structured.constraint()?.map(|it| (it, structured.field())),
        };
        let choice = tools.as_ref().map_or(ToolChoice::None, |tools| tools.choice.clone());
        if matches!(choice, ToolChoice::Named(_)) && structured.excludes_named_tool() {
            let message = "`tool_choice` names a function, whose parameters the answer will be: \
                           leave `structured_outputs` out.";
            return Err(ApiError::malformed(message).param("tool_choice"));
        }
        if let Some(schema) = tools.as_ref().and_then(constraint) {
            wish.constraint = Some((by_schema(schema), "tools"));
        }
        let logprobs = wish.logprobs.is_some();
        let mut sampling = check(shared, &served, &fields, wish)?;
        let offered = tools.as_ref().map(|tools| tools.raw.as_slice());
        let trusted = shared.limits.trust_request_chat_template;
        let rendering = trace.span("render");
        let text = conversation.render(&served.text, offered, trusted)?;
        drop(rendering);
        if !fields.truncates() {
            check_length(&served, &text)?;
        }
        let reasoning = shared.parsers.reasoning(&served.text);
        let syntax = shared.parsers.tools(&served.text);
        let format = OutputFormat::new(tools.as_ref(), syntax.as_ref(), reasoning, &text);
        // Some models mark reasoning and calls with special tokens.
        let markers = markers(&format).into_iter();
        sampling.text.markers = markers.filter_map(|it| served.text.special_token(it)).collect();
        let reading = Reading {
            format,
            tools: tools.map_or_else(Vec::new, |tools| tools.list),
            choice,
            include_reasoning: chat.include_reasoning.unwrap_or(true),
        };
        if reading.hides_reasoning() {
            // They would not be shown.
            sampling.params.logprobs = None;
        }
        if let Some(syntax) = reasoning
            && let Some(constraint) = sampling.params.constraint.take()
        {
            let reasoned = match (syntax, reading.format.in_reasoning) {
                (_, Some(true)) | (ReasoningSyntax::DeepseekR1, None) => Reasoned::Inside,
                (ReasoningSyntax::Qwen3, None) => Reasoned::Maybe,
                (_, Some(false)) => Reasoned::Not,
            };
            sampling.params.constraint = Some(after_reasoning(constraint, reasoned));
        }
        let special = conversation.add_special_tokens();
        let mut prompt = encode(&served.text, text, special, &trace).await?;
        fields.truncate(&mut prompt, served.card.max_model_len, sampling.max_tokens)?;
        if prompt.is_empty() {
            return Err(ApiError::bad_value("messages", "`messages` make an empty prompt."));
        }
        let echo = if chat.echo.unwrap_or(false) { conversation.echoed() } else { None };
        let role = conversation.answer_role();
        let prompt = prompt.into();
        let usage_details = shared.limits.prompt_tokens_details;
        Ok(Self {
            served,
            fields,
            sampling,
            prompt,
            role,
            echo,
            logprobs,
            reading,
            usage_details,
            trace,
        })
    }

    /// The `usage` object.
    pub(super) fn usage(&self, usage: Usage) -> Value {
        usage.json(self.usage_details)
    }

    /// The order for it; `id` is the reply's.
    pub(super) fn order(
        &self,
        shared: Arc<Shared>,
        id: String,
        budget: Budget,
        arrived: Instant,
        place: Place,
    ) -> Order {
        Order {
            shared,
            served: self.served.clone(),
            sampling: self.sampling.clone(),
            prompts: vec![self.prompt.clone()],
            budget,
            arrived,
            id,
            place,
            trace: self.trace.clone(),
        }
    }
}

/// What an answer is read by, as far as it may be special tokens of a model: a call that a grammar
/// constrains has no such marks.
fn markers(format: &OutputFormat) -> Vec<&'static str> {
    let of_calls: &[&'static str] = match &format.tools {
        Some(ToolSyntax::Hermes | ToolSyntax::Qwen3Coder) => &["<tool_call>", "</tool_call>"],
        Some(ToolSyntax::Llama3Json) => &["<|python_tag|>", "<|python_start|>", "<|python_end|>"],
        Some(ToolSyntax::Pythonic) => &["<|python_start|>", "<|python_end|>"],
        Some(ToolSyntax::Mistral) => &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
        None | Some(ToolSyntax::JsonList | ToolSyntax::Named(_)) => &[],
    };
    let mut all = of_calls.to_vec();
    if format.reasoning.is_some() {
        all.extend(["<think>", "</think>"]);
    }
    all
}

impl Reading {
    /// A parser for one answer.
    pub(super) fn parser(&self) -> OutputParser {
        OutputParser::new(&self.format, &self.tools)
    }

    /// Whether what the model thinks is kept from the client, who could read it from tokens too.
    pub(super) fn hides_reasoning(&self) -> bool {
        self.format.reasoning.is_some() && !self.include_reasoning
    }

    /// Whether the text of an answer with calls is `""` in place of null: vLLM's way where a call
    /// was not the model's choice.
    pub(super) fn forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// Why an answer ended, in the words of chats: `engine` is why the text did.
    pub(super) fn finish_reason(&self, engine: &'static str, called: bool) -> &'static str {
        match self.choice {
            ToolChoice::Auto if called => "tool_calls",
            // An answer that was cut is no call.
            ToolChoice::Required if called && engine == "stop" => "tool_calls",
            _ => engine,
        }
    }
}

/// Who reads models' answers, when the operator says so.
#[derive(Clone, Debug, Default)]
pub struct Parsers {
    /// `--tool-call-parser`.
    pub tools: Option<ToolSyntax>,
    /// `--reasoning-parser`.
    pub reasoning: Option<ReasoningSyntax>,
}

impl Parsers {
    fn tools(&self, model: &TextModel) -> Option<ToolSyntax> {
        self.tools.clone().or_else(|| model.tool_syntax.clone())
    }

    fn reasoning(&self, model: &TextModel) -> Option<ReasoningSyntax> {
        self.reasoning.or(model.reasoning_syntax)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Parsed;

    #[test]
    fn answers_are_read_by_their_markers() {
        for (syntax, calls) in [
            (
                ToolSyntax::Hermes,
                &[r#"<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>"#][..],
            ),
            (
                ToolSyntax::Qwen3Coder,
                &["<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"],
            ),
            (
                ToolSyntax::Llama3Json,
                &[
                    r#"<|python_tag|>{"name": "f", "parameters": {"a": 1}}"#,
                    r#"<|python_start|>{"name": "f", "parameters": {"a": 1}}<|python_end|>"#,
                ],
            ),
            (ToolSyntax::Pythonic, &["<|python_start|>[f(a=1)]<|python_end|>"]),
            (ToolSyntax::Mistral, &[r#"[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}"#]),
        ] {
            let reasoning = Some(ReasoningSyntax::Qwen3);
            let format = OutputFormat { tools: Some(syntax), reasoning, ..OutputFormat::default() };
            let answers: Vec<String> =
                calls.iter().map(|call| format!("<think>hm</think>{call}")).collect();
            for answer in &answers {
                let mut parser = OutputParser::new(&format, &[]);
                let mut parsed = Parsed::default();
                parsed.extend(parser.push(answer));
                parsed.extend(parser.finish());
                assert_eq!((&*parsed.reasoning, &*parsed.content), ("hm", ""), "{answer}");
                assert_eq!(parsed.calls.len(), 1, "{answer}");
            }
            for marker in markers(&format) {
                assert!(answers.iter().any(|answer| answer.contains(marker)), "{marker}");
            }
        }
        assert_eq!(markers(&OutputFormat::default()), [""; 0]);
    }

    #[test]
    fn only_a_model_that_reasons_has_reasoning_to_hide() {
        for (syntax, include_reasoning, hides) in [
            (Some(ReasoningSyntax::Qwen3), false, true),
            (Some(ReasoningSyntax::Qwen3), true, false),
            (None, false, false),
        ] {
            let format = OutputFormat { reasoning: syntax, ..OutputFormat::default() };
            let (tools, choice) = (Vec::new(), ToolChoice::None);
            let reading = Reading { format, tools, choice, include_reasoning };
            assert_eq!(reading.hides_reasoning(), hides);
        }
    }
}
