//! Any text as a chat template, over any messages: it renders or fails, in bounded time and space.
#![no_main]

use baton_gateway::text::template::{ChatTemplate, Options};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// Every length of text that a template may make of a short conversation.
const MAX_TEXT: usize = 64 << 20;

fuzz_target!(|input: (&str, &[u8], bool, bool)| {
    let (source, messages, generate, proceed) = input;
    let Ok(template) = ChatTemplate::new(source, Some("<s>".to_owned()), None) else { return };
    let messages: Vec<Value> = serde_json::from_slice(messages)
        .unwrap_or_else(|_| vec![json!({"role": "user", "content": "Hi \"there\"\n"})]);
    let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {}}})];
    let options = Options {
        add_generation_prompt: generate,
        continue_final_message: proceed,
        tools: generate.then_some(&tools),
        ..Options::default()
    };
    if let Ok(text) = template.render(&messages, &options) {
        assert!(text.len() <= MAX_TEXT, "{} bytes", text.len());
    }
});
