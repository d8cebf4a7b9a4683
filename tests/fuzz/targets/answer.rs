//! Any text as a model's answer, cut anywhere: reading it in pieces gives what reading it at once
//! gives, in every syntax.
#![no_main]

use baton_gateway::api::tools::ToolSchema;
use baton_gateway::output::{
    OutputFormat, OutputParser, Parsed, ReasoningSyntax, ToolSyntax,
};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fn ids() -> Box<dyn FnMut() -> String + Send> {
    let mut count = 0;
    Box::new(move || {
        count += 1;
        format!("call-{count}")
    })
}

fuzz_target!(|input: (u8, u8, Vec<u8>, String)| {
    let (tools, reasoning, cuts, text) = input;
    let syntaxes = [
        None,
        Some(ToolSyntax::Hermes),
        Some(ToolSyntax::Llama3Json),
        Some(ToolSyntax::Mistral),
        Some(ToolSyntax::Qwen3Coder),
        Some(ToolSyntax::Pythonic),
        Some(ToolSyntax::JsonList),
        Some(ToolSyntax::Named("f".to_owned())),
    ];
    let (syntax, opened) = match reasoning % 5 {
        0 => (None, None),
        1 => (Some(ReasoningSyntax::DeepseekR1), None),
        2 => (Some(ReasoningSyntax::Qwen3), None),
        3 => (Some(ReasoningSyntax::Qwen3), Some(true)),
        _ => (Some(ReasoningSyntax::Qwen3), Some(false)),
    };
    let format = OutputFormat {
        tools: syntaxes[tools as usize % syntaxes.len()].clone(),
        reasoning: syntax,
        in_reasoning: opened,
        parallel_tool_calls: tools < 128,
        ..OutputFormat::default()
    };
    let schema = ToolSchema {
        name: "f".to_owned(),
        description: None,
        parameters: Some(json!({"type": "object", "properties": {"a": {"type": "integer"}}})),
        strict: false,
    };
    let schemas = [schema];
    let read = |pieces: &[&str]| {
        let mut parser = OutputParser::with_ids(&format, &schemas, ids());
        let mut parsed = Parsed::default();
        for piece in pieces {
            parsed.extend(parser.push(piece));
        }
        parsed.extend(parser.finish());
        parsed
    };
    let mut pieces = Vec::new();
    let mut rest = text.as_str();
    for cut in cuts {
        let mut at = (cut as usize).min(rest.len());
        while !rest.is_char_boundary(at) {
            at += 1;
        }
        let (piece, after) = rest.split_at(at);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    assert_eq!(read(&pieces), read(&[&text]), "{pieces:?}");
});
