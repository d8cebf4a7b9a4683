//! Any text as events: a reader of server-sent events gets back what was written.
#![no_main]

use baton_gateway::api::sse::Frames;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|texts: Vec<String>| {
    let mut frames = Frames::default();
    let events: Vec<_> = texts.iter().map(|text| json!({ text: text })).collect();
    for (at, event) in events.iter().enumerate() {
        match at % 3 {
            0 => frames.data(event),
            1 => frames.event("response.delta", event),
            _ => {
                frames.comment("still working");
                frames.data(event);
            }
        }
    }
    frames.done();
    let written = frames.take().expect("it holds the last event at least");
    let mut read = Vec::new();
    for block in written.split("\n\n") {
        let data: Vec<&str> =
            block.split(['\n', '\r']).filter_map(|line| line.strip_prefix("data: ")).collect();
        assert!(data.len() <= 1, "{block:?}");
        read.extend(data);
    }
    assert_eq!(read.pop(), Some("[DONE]"));
    let read: Vec<serde_json::Value> =
        read.into_iter().map(|data| serde_json::from_str(data).expect("JSON")).collect();
    assert_eq!(read, events);
});
