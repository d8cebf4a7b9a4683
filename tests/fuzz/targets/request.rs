//! Any bytes as a request's body: each type reads it or refuses it.
#![no_main]

use baton_gateway::api::Body;
use baton_gateway::api::chat::{ChatFields, Conversation};
use baton_gateway::api::completion::CompletionFields;
use baton_gateway::api::sampling::{Bounds, SamplingFields, Wish};
use baton_gateway::api::structured::StructuredFields;
use baton_gateway::api::tokenize::{DetokenizeFields, TokenizeFields};
use baton_gateway::api::tools::Tools;
use baton_gateway::output::constraint::constraint;
use baton_gateway::text::defaults::Defaults;
use libfuzzer_sys::fuzz_target;

const VOCABULARY: u32 = 1000;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut body) = Body::parse(bytes) else { return };
    let _ = body.read::<TokenizeFields>();
    if let Ok(fields) = body.read::<DetokenizeFields>() {
        let _ = fields.tokens(VOCABULARY);
    }
    if let Ok(fields) = body.read::<CompletionFields>() {
        let _ = fields.prompts(VOCABULARY);
    }
    if let Ok(chat) = body.read::<ChatFields>() {
        let _ = chat.logprobs();
    }
    if let Ok(conversation) = body.read::<Conversation>() {
        let _ = (conversation.answer_role(), conversation.echoed());
    }
    let structured = body.read::<StructuredFields>().ok();
    let structured = structured.and_then(|fields| fields.constraint().ok().flatten());
    if let Ok(Some(tools)) = Tools::read(&mut body) {
        let _ = constraint(&tools);
    }
    if let Ok(fields) = body.read::<SamplingFields>() {
        let bounds = Bounds {
            vocab_size: VOCABULARY,
            max_logprobs: Some(20),
            defaults: &Defaults::OPENAI,
            encode: &|text| Ok(text.bytes().map(u32::from).collect()),
        };
        let constraint = structured.map(|it| (it, "structured_outputs"));
        let wish = Wish { constraint, ..Wish::default() };
        if let Ok(sampling) = fields.check(&bounds, wish) {
            let mut prompt: Vec<u32> = (0..64).collect();
            let _ = fields.truncate(&mut prompt, 64, sampling.max_tokens);
            assert!(prompt.len() <= 64);
        }
    }
    let _ = body.refuse_unsupported();
});
