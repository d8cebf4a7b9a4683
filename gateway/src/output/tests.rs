//! Examples of each syntax, and what holds for any text.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

const SYNTAXES: [ToolSyntax; 6] = [
    ToolSyntax::Hermes,
    ToolSyntax::Llama3Json,
    ToolSyntax::Mistral,
    ToolSyntax::Qwen3Coder,
    ToolSyntax::Pythonic,
    ToolSyntax::JsonList,
];

fn tool(name: &str, parameters: Value) -> ToolSchema {
    ToolSchema { name: name.into(), description: None, parameters: Some(parameters), strict: false }
}

fn tools() -> Vec<ToolSchema> {
    let properties = json!({
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": ["number", "null"]},
        "b": {"type": "boolean"},
        "l": {"type": "array", "items": {}},
        "o": {"$ref": "#/$defs/o"},
        "e": {"enum": [1, "x"]},
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    });
    vec![
        tool("f", json!({"properties": properties, "$defs": {"o": {"type": "object"}}})),
        tool("get_weather", json!({"properties": {"city": {"type": "string"}}})),
    ]
}

fn format(tools: ToolSyntax) -> OutputFormat {
    OutputFormat { tools: Some(tools), ..OutputFormat::default() }
}

/// The parts of a text that comes in pieces, neighbours of one kind joined.
fn parts<'a>(format: &OutputFormat, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
    let mut next = 0;
    let ids = move || {
        next += 1;
        format!("id-{next}")
    };
    let mut parser = OutputParser::with_ids(format, &tools(), Box::new(ids));
    let mut all: Vec<Part> = Vec::new();
    let mut add = |parts: Vec<Part>| {
        for part in parts {
            match (all.last_mut(), part) {
                (Some(Part::Content(text)), Part::Content(more)) => text.push_str(&more),
                (Some(Part::Reasoning(text)), Part::Reasoning(more)) => text.push_str(&more),
                (
                    Some(Part::CallArguments { text, .. }),
                    Part::CallArguments { text: more, .. },
                ) => {
                    text.push_str(&more);
                }
                (_, part) => all.push(part),
            }
        }
    };
    pieces.into_iter().for_each(|piece| add(parser.push(piece)));
    add(parser.finish());
    all
}

/// Content and calls.
fn read(format: &OutputFormat, text: &str) -> (String, Vec<(String, String)>) {
    let parsed = parse_whole(format, &tools(), text);
    let calls = parsed.calls.into_iter().map(|call| (call.name, call.arguments)).collect();
    (parsed.content, calls)
}

fn check(syntax: ToolSyntax, text: &str, content: &str, calls: &[(&str, &str)]) {
    let calls = calls.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
    assert_eq!(read(&format(syntax), text), (content.to_owned(), calls), "{text}");
}

#[test]
fn hermes_calls_are_between_tags() {
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
        check(ToolSyntax::Hermes, text, content, calls);
    };
    let one = r#"<tool_call>
{"name": "get_weather", "arguments": {"city": "Zürich </tool_call> {\"}"}}
</tool_call>"#;
    let city = r#"{"city": "Zürich </tool_call> {\"}"}"#;
    check(one, "", &[("get_weather", city)]);
    check(&format!("Let me see.\n{one}\n{one}\n"), "Let me see.\n", &[("get_weather", city); 2]);
    check(&format!("\n\n{one} Done."), "Done.", &[("get_weather", city)]);
    // Fields in the other order, other fields, arguments as a string, none at all.
    check(
        r#"<tool_call>{"id": [1], "arguments": {"a": 1.50}, "name": "f"}</tool_call>"#,
        "",
        &[("f", r#"{"a": 1.50}"#)],
    );
    check(
        r#"<tool_call>{"name": "f", "arguments": "{\"a\": \"\\n\"}"}</tool_call>"#,
        "",
        &[("f", r#"{"a": "\n"}"#)],
    );
    check(r#"<tool_call>{"name": "f"}</tool_call>"#, "", &[("f", "{}")]);
    // A brace too few or too many, an end tag that is missing.
    let arguments = r#"<tool_call>{"name": "f", "arguments": {"a": [1]}"#;
    for end in ["</tool_call>", "}}\n</tool_call>", "}\n", "}</tool_c", ""] {
        check(&format!("{arguments}{end}"), "", &[("f", r#"{"a": [1]}"#)]);
    }
    check(&format!("{arguments}}}\n{one}"), "", &[("f", r#"{"a": [1]}"#), ("get_weather", city)]);
}

#[test]
fn what_is_no_call_is_content_and_a_broken_call_keeps_its_text() {
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
        check(ToolSyntax::Hermes, text, content, calls);
    };
    for text in [
        "a <tool_cal",
        "<tool_call>",
        "<tool_call>no JSON</tool_call>",
        r#"<tool_call>{"name": 5}</tool_call>"#,
        r#"<tool_call>{"arguments": {"a": 1}}</tool_call>"#,
        r#"<tool_call>{"name": "", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"arguments": {"a": "#,
        "a < b </tool_call> é",
        "  \n",
    ] {
        check(text, text, &[]);
    }
    check(
        r#"<tool_call>{"x" <tool_call>{"name": "f", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"x" "#,
        &[("f", "{}")],
    );
    check(
        r#"<tool_call>{"name": "f", "arguments": {"a": 'x'}}</tool_call> more"#,
        "more",
        &[("f", r#"{"a": 'x'}}"#)],
    );
    check(r#"<tool_call>{"name": "f", "arguments": {"a": "b"#, "", &[("f", r#"{"a": "b"#)]);
    check(r#"<tool_call>{"name": "f", "argu"#, "", &[("f", "")]);
}

#[test]
fn llama_calls_are_the_whole_answer() {
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
        check(ToolSyntax::Llama3Json, text, content, calls);
    };
    let one = r#"{"name": "f", "parameters": {"s": "a;b"}}"#;
    let got = ("f", r#"{"s": "a;b"}"#);
    check(one, "", &[got]);
    check(&format!("\n<|python_tag|>{one}; {one};{one}"), "", &[got; 3]);
    check(&format!("I call <|python_tag|>{one}"), "I call ", &[got]);
    check(&format!("<|python_start|>{one}<|python_end|>"), "", &[got]);
    check(&format!("{one}; then"), "; then", &[got]);
    check(r#"{"type": "function", "name": "f", "parameters": {}}"#, "", &[("f", "{}")]);
    check(r#"{"parameters": {"a": [{}]}, "name": "f"}"#, "", &[("f", r#"{"a": [{}]}"#)]);
    // JSON that is an answer.
    for text in [
        r#"{"answer": 42}"#,
        r#"{"name": "Ann", "age": 5}"#,
        r#"{"name": "Ann"}"#,
        r#"{"name": "f", "parameters": 5}"#,
        r#"See {"name": "f", "parameters": {}}"#,
        r#"<|python_tag|>search.call(query="x")"#,
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn json_that_is_no_call_flows_as_soon_as_that_is_known() {
    let mut parser = OutputParser::new(&format(ToolSyntax::Llama3Json), &tools());
    assert_eq!(parser.push(r#"{"answer"#), []);
    assert_eq!(parser.push(r#"": 4"#), [Part::Content(r#"{"answer": 4"#.into())]);
}

#[test]
fn mistral_calls_come_in_three_forms() {
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
        check(ToolSyntax::Mistral, text, content, calls);
    };
    let two = [("f", r#"{"a": "]"}"#), ("get_weather", "{}")];
    check(
        r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "get_weather", "arguments": {}, "id": "123456789"}]"#,
        "",
        &two,
    );
    check(r#"[TOOL_CALLS]f{"a": "]"}[TOOL_CALLS]get_weather{}"#, "", &two);
    check(r#"Hm.[TOOL_CALLS]f[ARGS]{"a": "]"} [TOOL_CALLS]get_weather[ARGS]{}"#, "Hm.", &two);
    check(r#"[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": "]"}"#, "", &two[..1]);
    check(r#"[TOOL_CALLS] {"name": "f", "arguments": {"a": "]"}}"#, "", &two[..1]);
    check(
        r#"[TOOL_CALLS]f[ARGS]{"a": 'x'} [TOOL_CALLS]get_weather{}"#,
        "",
        &[("f", r#"{"a": 'x'} "#), two[1]],
    );
    for text in ["[TOOL_CALLS]", "[TOOL_CALLS] f g", "[TOOL_CALLS][5]", "[TOOL_CALLS]f[ARG]{}"] {
        check(text, text, &[]);
    }
}

#[test]
fn qwen3_coder_values_have_their_types_from_the_schema() {
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
        check(ToolSyntax::Qwen3Coder, text, content, calls);
    };
    check(
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n\"Süd\"\n</parameter>\n</function>\n</tool_call>",
        "Sure.\n",
        &[("get_weather", r#"{"city": "Zürich\n\"Süd\""}"#)],
    );
    for (name, text, json) in [
        ("s", "5", r#""5""#),
        ("s", "null", r#""null""#),
        ("s", "", r#""""#),
        ("s", "\n\n", r#""\n\n""#),
        ("i", "-5", "-5"),
        ("i", "05", "5"),
        ("i", "five", r#""five""#),
        ("n", "1.50", "1.50"),
        ("n", "null", "null"),
        ("b", "True", "true"),
        ("l", "[1, \"a\"]", "[1, \"a\"]"),
        ("l", "['it''s', (1, None)]", r#""['it''s', (1, None)]""#),
        ("o", "{'a': True}", r#"{"a": true}"#),
        ("e", "x", r#""x""#),
        ("e", "1", "1"),
        ("any", "null", "null"),
        ("any", "1", r#""1""#),
        ("unknown", "1", r#""1""#),
    ] {
        let call = format!("<function=f><parameter={name}>\n{text}\n</parameter></function>");
        let arguments = format!("{{\"{name}\": {json}}}");
        check(&format!("<tool_call>{call}</tool_call>"), "", &[("f", &arguments)]);
        check(&call, "", &[("f", &arguments)]);
    }
    let two = r#"{"i": 1, "s": "x"}"#;
    check(
        "<tool_call><function=f><parameter=i>1<parameter=s>x</function></tool_call><tool_call><function=f></function>",
        "",
        &[("f", two), ("f", "{}")],
    );
    check(
        "<tool_call><function=f><parameter=i>1</parameter><parameter=s>x</tool_call> Ok",
        "Ok",
        &[("f", two)],
    );
    // An answer that ends too early, and what is no call.
    check("<tool_call><function=f><parameter=s>x y</par", "", &[("f", r#"{"s": "x y</par"#)]);
    for text in
        ["<tool_call>", "<tool_call><function=", "<tool_call>x", "<function=>", "<parameter=a>"]
    {
        check(text, text, &[]);
    }
}

#[test]
fn pythonic_calls_become_json() {
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| {
        check(ToolSyntax::Pythonic, text, content, calls);
    };
    check(
        r#"[f(a=1, b="x]", c=[True, None, -1.5], d={'k': (1, 2)}), g(), a.b(x = 'it\'s \u00e9\n')]"#,
        "",
        &[
            ("f", r#"{"a": 1, "b": "x]", "c": [true, null, -1.5], "d": {"k": [1, 2]}}"#),
            ("g", "{}"),
            ("a.b", r#"{"x": "it's é\n"}"#),
        ],
    );
    check("<|python_start|>[f(a='')]<|python_end|>", "", &[("f", r#"{"a": ""}"#)]);
    check(r#"[f(a="""x"y""", b=0x10,)]"#, "", &[("f", r#"{"a": "x\"y", "b": 16}"#)]);
    check(r"[f(a='\ud83d\ude00\ud83d!')]", "", &[("f", "{\"a\": \"😀\u{fffd}!\"}")]);
    check("[f(a=g(1), b=2)] x", "", &[("f", "{\"a\": g(1), b=2)] x")]);
    check("[f(a=", "", &[("f", "{\"a\": ")]);
    for text in
        ["[1, 2]", "[see(below)]", "[link](url)", "[f(1)]", "f(a=1)", "[", "[f(a", "x [f(a=1)]"]
    {
        check(text, text, &[]);
    }
}

#[test]
fn constrained_answers_are_calls() {
    let list = r#"[{"name": "f", "parameters": {"a": [1]}}, {"name": "g", "parameters": {}}]"#;
    check(ToolSyntax::JsonList, list, "", &[("f", r#"{"a": [1]}"#), ("g", "{}")]);
    check(ToolSyntax::JsonList, &list[..40], "", &[("f", r#"{"a": [1]}"#)]);
    check(ToolSyntax::Named("f".into()), " {\"a\": 1}", "", &[("f", "{\"a\": 1}")]);
    check(ToolSyntax::Named("f".into()), "{\"a\"", "", &[("f", "{\"a\"")]);
    check(ToolSyntax::Named("f".into()), "", "", &[]);
}

#[test]
fn the_format_follows_the_request() {
    let tools = |choice: Value| {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        Tools::from_chat(Some(&tools), Some(&choice), Some(false)).unwrap().unwrap()
    };
    let new = |choice: Value| {
        let (syntax, reasoning) = (ToolSyntax::Mistral, ReasoningSyntax::Qwen3);
        let tools = tools(choice);
        OutputFormat::new(Some(&tools), Some(&syntax), Some(reasoning), "<think>\n")
    };
    assert_eq!(new(json!("none")).tools, None);
    assert_eq!(new(json!("auto")).tools, Some(ToolSyntax::Mistral));
    assert_eq!(new(json!("required")).tools, Some(ToolSyntax::JsonList));
    let named = new(json!({"function": {"name": "f"}}));
    assert_eq!(named.tools, Some(ToolSyntax::Named("f".into())));
    assert_eq!((named.in_reasoning, named.parallel_tool_calls), (Some(true), false));
    // The ids are those of the model, whatever constrains the answer.
    let ids = |format: &OutputFormat| parse_whole(format, &[], "</think>{}").calls[0].id.clone();
    let id = ids(&named);
    assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
    let id = ids(&OutputFormat { short_ids: false, ..named.clone() });
    assert!(id.strip_prefix("chatcmpl-tool-").is_some_and(|hex| hex.len() == 32), "{id}");
    assert_ne!(id, ids(&OutputFormat { short_ids: false, ..named }));
    let plain = OutputFormat::new(None, Some(&ToolSyntax::Hermes), None, "<think>");
    assert_eq!((plain.tools, plain.in_reasoning, plain.parallel_tool_calls), (None, None, true));
}

#[test]
fn only_the_first_call_is_kept_if_calls_are_not_parallel() {
    let format = OutputFormat { parallel_tool_calls: false, ..format(ToolSyntax::JsonList) };
    let list = r#"[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": 2}}]"#;
    let calls = vec![("f".to_owned(), r#"{"a": 1}"#.to_owned())];
    assert_eq!(read(&format, list), (String::new(), calls));
}

#[test]
fn arguments_flow_as_they_come() {
    let mut parser = OutputParser::new(&format(ToolSyntax::Hermes), &tools());
    assert_eq!(parser.push("Hi <b <tool"), [Part::Content("Hi <b ".into())]);
    assert_eq!(parser.push("_call>{\"name\": \"f"), []);
    let started = parser.push("\"");
    assert!(matches!(&started[..], [Part::CallStart { index: 0, id, name }]
        if id.starts_with("chatcmpl-tool-") && name == "f"));
    let arguments = |text: &str| [Part::CallArguments { index: 0, text: text.into() }];
    assert_eq!(parser.push(", \"arguments\": {\"s"), arguments("{\"s"));
    assert_eq!(parser.push("\": \"ü"), arguments("\": \"ü"));
    assert_eq!(parser.push("\"}}"), arguments("\"}"));
    assert_eq!(parser.push("</tool_call>"), []);
    assert_eq!(parser.finish(), []);
    let mut parser = OutputParser::new(&format(ToolSyntax::Qwen3Coder), &tools());
    parser.push("<function=f><parameter=s>");
    assert_eq!(parser.push("a\nb\n"), arguments("a\\nb"));
}

#[test]
fn reasoning_comes_first() {
    let read = |reasoning, in_reasoning, text: &str| {
        let format =
            OutputFormat { reasoning: Some(reasoning), in_reasoning, ..format(ToolSyntax::Hermes) };
        let parsed = parse_whole(&format, &[], text);
        (parsed.reasoning, parsed.content, parsed.calls.len())
    };
    let got = |reasoning: &str, content: &str, calls| (reasoning.into(), content.into(), calls);
    use ReasoningSyntax::{DeepseekR1, Qwen3};
    let call = "<tool_call>{\"name\": \"f\"}</tool_call>";
    for syntax in [DeepseekR1, Qwen3] {
        let text = format!("<think>\na <tool_call> b\n</think>\n\n{call}");
        assert_eq!(read(syntax, None, &text), got("\na <tool_call> b\n", "", 1));
        assert_eq!(read(syntax, Some(true), "a</think>b<think>"), got("a", "b<think>", 0));
        assert_eq!(read(syntax, Some(true), "a</thin"), got("a</thin", "", 0));
        assert_eq!(read(syntax, Some(false), "a</think>"), got("", "a</think>", 0));
        assert_eq!(read(syntax, None, "<think></think>\n\na"), got("", "\n\na", 0));
        assert_eq!(read(syntax, None, ""), got("", "", 0));
    }
    assert_eq!(read(DeepseekR1, None, "a</think>b"), got("a", "b", 0));
    assert_eq!(read(DeepseekR1, None, "</think>b"), got("", "b", 0));
    assert_eq!(read(DeepseekR1, None, "<thin"), got("<thin", "", 0));
    assert_eq!(read(Qwen3, None, "a</think>b"), got("", "a</think>b", 0));
    assert_eq!(read(Qwen3, None, "<thin"), got("", "<thin", 0));
}

#[test]
fn schemas_that_go_in_circles_are_read_in_bounded_time() {
    let circle = vec![json!({"$ref": "#/properties/a"}); 200];
    let tools = [tool("f", json!({"properties": {"a": {"anyOf": circle}}}))];
    let text = "<function=f><parameter=a>1</parameter></function>";
    let parsed = parse_whole(&format(ToolSyntax::Qwen3Coder), &tools, text);
    assert_eq!(parsed.calls[0].arguments, r#"{"a": "1"}"#);
}

/// Texts of a million characters: what reads them again with each piece takes minutes.
#[test]
fn time_is_linear_in_the_text() {
    let long = |unit: &str| unit.repeat((1 << 20) / unit.len());
    let texts = [
        long("word "),
        long(" "),
        long("<tool_call>"),
        long("<tool_call>{\"x\": [\"<\"], "),
        format!("<tool_call>{{\"name\": \"f\", \"arguments\": {{\"a\": \"{}\"}}}}", long("é\\n")),
        format!("<tool_call>{{\"arguments\": {{\"a\": \"{}\"}}, \"name\": \"f\"}}", long("x")),
        format!("{{\"name\": \"f\", \"parameters\": {}", long("{\"a\": [")),
        format!("[TOOL_CALLS]{}", long("f")),
        format!("[TOOL_CALLS][{}]", long("{\"name\": \"f\", \"arguments\": {}}, ")),
        long("<function=f><parameter=s>x\n</parameter>"),
        format!("<function=f><parameter=l>{}", long("[")),
        format!("[f(a={}", long("[")),
        format!("[{}]", long("f(a=\"\"\"x\"\"\"), ")),
    ];
    let begun = std::time::Instant::now();
    for syntax in SYNTAXES {
        for text in &texts {
            let mut parser = OutputParser::new(&format(syntax.clone()), &tools());
            let mut from = 0;
            while from < text.len() {
                let mut to = text.len().min(from + 16);
                while !text.is_char_boundary(to) {
                    to += 1;
                }
                parser.push(&text[from..to]);
                from = to;
            }
            parser.finish();
        }
    }
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
}

/// Cuts a text at some of its characters.
fn cut<'a>(text: &'a str, cuts: &[prop::sample::Index]) -> Vec<&'a str> {
    let places: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| *cut.get(&places)).collect();
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect()
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e9..1e9f64).prop_map(Value::from),
        "[a-zé😀 <>/\\\\\"'{}\\[\\](),;=\n\t]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-zé\"]{1,4}", inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A function's name and arguments.
type Made = (String, Map<String, Value>);

fn calls() -> impl Strategy<Value = Vec<Made>> {
    let arguments = prop::collection::btree_map("[a-z_]{1,4}", value(), 0..4)
        .prop_map(|fields| fields.into_iter().collect());
    prop::collection::vec(("[a-z][a-z0-9_]{0,6}", arguments), 1..4)
}

/// A Python literal.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => {
            let text = text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n");
            format!("'{text}'")
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(python).collect::<Vec<_>>().join(", "))
        }
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(key, value)| format!("{}: {}", python(&key.clone().into()), python(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
    }
}

/// An answer with calls, as a model writes it.
fn written(syntax: &ToolSyntax, calls: &[Made]) -> String {
    let object = |(name, arguments): &Made, key: &str| {
        format!("{{\"name\": \"{name}\", \"{key}\": {}}}", Value::from(arguments.clone()))
    };
    let each = |write: &dyn Fn(&Made) -> String, between: &str| {
        calls.iter().map(write).collect::<Vec<_>>().join(between)
    };
    match syntax {
        ToolSyntax::Hermes => {
            each(&|call| format!("<tool_call>\n{}\n</tool_call>", object(call, "arguments")), "\n")
        }
        ToolSyntax::Llama3Json => each(&|call| object(call, "parameters"), "; "),
        ToolSyntax::Mistral if calls.len().is_multiple_of(2) => each(
            &|(name, arguments)| {
                format!("[TOOL_CALLS]{name}[ARGS]{}", Value::from(arguments.clone()))
            },
            "",
        ),
        ToolSyntax::Mistral => {
            format!("[TOOL_CALLS][{}]", each(&|call| object(call, "arguments"), ", "))
        }
        ToolSyntax::Qwen3Coder => each(
            &|(name, arguments)| {
                let parameters: String = arguments
                    .iter()
                    .map(|(key, value)| {
                        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                        format!("<parameter={key}>\n{text}\n</parameter>\n")
                    })
                    .collect();
                format!("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
            },
            "\n",
        ),
        ToolSyntax::Pythonic => {
            let call = |(name, arguments): &Made| {
                let arguments = arguments.iter().map(|(k, v)| format!("{k}={}", python(v)));
                format!("{name}({})", arguments.collect::<Vec<_>>().join(", "))
            };
            format!("[{}]", each(&call, ", "))
        }
        _ => format!("[{}]", each(&|call| object(call, "parameters"), ", ")),
    }
}

/// A tool with a schema for each argument, by its value's type.
fn schemas(calls: &[Made]) -> Vec<ToolSchema> {
    let schema = |value: &Value| match value {
        Value::Null => json!({"type": "null"}),
        Value::Bool(_) => json!({"type": "boolean"}),
        Value::Number(_) => json!({"type": "number"}),
        Value::String(_) => json!({"type": "string"}),
        Value::Array(_) => json!({"type": "array"}),
        Value::Object(_) => json!({"type": "object"}),
    };
    calls
        .iter()
        .map(|(name, arguments)| {
            let properties: Map<_, _> =
                arguments.iter().map(|(key, value)| (key.clone(), schema(value))).collect();
            tool(name, json!({"properties": properties}))
        })
        .collect()
}

/// Text of markers, JSON, Python and letters in any order.
fn soup() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "<function=",
        "</function>",
        "<parameter=s>",
        "<parameter=i>",
        "</parameter>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<|python_start|>",
        "<|python_end|>",
        "<think>",
        "</think>",
        "{\"name\": \"f\", \"arguments\": ",
        "\"name\": \"f\"",
        "\"parameters\": ",
        "{\"a\": 1}",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ",",
        ";",
        ":",
        "=",
        "\"",
        "'",
        "\\",
        "<",
        ">",
        "/",
        "\n",
        " ",
        "f",
        "f(",
        "a=",
        "é",
        "😀",
        "1",
        "-2.5",
        "True",
        "null",
        "\\u",
        "d83d",
        "x",
    ];
    prop::collection::vec(prop::sample::select(PIECES), 0..24).prop_map(|parts| parts.concat())
}

/// Valid answers, cut off or changed, and text of all sorts.
fn answer() -> impl Strategy<Value = String> {
    let valid = (prop::sample::select(&SYNTAXES[..]), calls())
        .prop_map(|(syntax, calls)| written(&syntax, &calls));
    let harm = prop::collection::vec((any::<prop::sample::Index>(), soup(), 0usize..3), 0..3);
    let harmed = (valid, harm, any::<Option<prop::sample::Index>>(), soup()).prop_map(
        |(valid, harm, end, before)| {
            let mut letters: Vec<char> = valid.chars().collect();
            if let Some(end) = end {
                letters.truncate(end.index(letters.len() + 1));
            }
            for (at, new, gone) in harm {
                let at = at.index(letters.len() + 1);
                let to = letters.len().min(at + gone);
                letters.splice(at..to, new.chars().take(3));
            }
            let before = if before.len().is_multiple_of(2) { before } else { String::new() };
            before + &letters.into_iter().collect::<String>()
        },
    );
    prop_oneof![3 => harmed, 2 => soup(), 1 => any::<String>()]
}

proptest! {
    #[test]
    fn any_cut_gives_what_the_whole_text_gives(
        text in answer(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        reasoning in prop::option::of(prop::sample::select(
            &[ReasoningSyntax::DeepseekR1, ReasoningSyntax::Qwen3][..])),
        in_reasoning: Option<bool>,
        parallel_tool_calls: bool,
    ) {
        for syntax in SYNTAXES.into_iter().chain([ToolSyntax::Named("f".into())]) {
            let tools = Some(syntax);
            let format = OutputFormat {
                tools, reasoning, in_reasoning, parallel_tool_calls, short_ids: false,
            };
            let whole = parts(&format, [text.as_str()]);
            prop_assert_eq!(&parts(&format, cut(&text, &cuts)), &whole);
            let mut letters = [0; 4];
            let mut one = |c: char| c.encode_utf8(&mut letters).to_owned();
            let letters: Vec<String> = text.chars().map(&mut one).collect();
            prop_assert_eq!(&parts(&format, letters.iter().map(String::as_str)), &whole);
        }
    }

    #[test]
    fn arguments_of_valid_calls_are_what_was_written(calls in calls(), said in "[a-z]{0,8}") {
        for syntax in SYNTAXES {
            let text = written(&syntax, &calls);
            // These are calls only where the answer begins.
            let bare = matches!(
                syntax, ToolSyntax::Llama3Json | ToolSyntax::Pythonic | ToolSyntax::JsonList);
            // Of calls with one name the last schema counts.
            let mut names: Vec<&str> = calls.iter().map(|(name, _)| name.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            if syntax == ToolSyntax::Qwen3Coder && names.len() < calls.len() {
                continue;
            }
            let text = if bare { text } else { format!("{said}{text}") };
            let parsed = parse_whole(&format(syntax.clone()), &schemas(&calls), &text);
            prop_assert_eq!(&parsed.content, if bare { "" } else { &said });
            prop_assert_eq!(parsed.calls.len(), calls.len(), "{}", text);
            for (got, (name, arguments)) in parsed.calls.iter().zip(&calls) {
                prop_assert_eq!(&got.name, name);
                let got: Value = serde_json::from_str(&got.arguments)
                    .map_err(|error| TestCaseError::fail(format!("{error}: {got:?} of {text}")))?;
                // As it reads what was written: serde_json's floats change on the way.
                let written = Value::from(arguments.clone()).to_string();
                prop_assert_eq!(got, serde_json::from_str::<Value>(&written).unwrap());
            }
        }
    }

    #[test]
    fn an_answer_without_calls_is_content(text in answer()) {
        for syntax in SYNTAXES {
            let parsed = parse_whole(&format(syntax), &tools(), &text);
            if parsed.calls.is_empty() {
                prop_assert_eq!(&parsed.content, &text);
            }
        }
    }
}
