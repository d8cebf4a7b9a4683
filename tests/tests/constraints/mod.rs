//! Output under a constraint: always in its language, wherever it is computed.

mod schemas;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use baton_proto::v1::constraint::Kind;
use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{
    Constraint, FinishReason, Finished, GenerateRequest, PrefillPeer, SamplingParams, Started,
};
use baton_tests::binaries::build_dir;
use baton_tests::http::ids;
use baton_tests::{Cluster, Role, grpc};
use serde_json::{Value, json};
use tonic::{Code, Status};

/// The validator's release.
const JSONSCHEMA: &str = "jsonschema==4.26.0";

/// What came of a request.
#[derive(Debug)]
struct Output {
    tokens: Vec<u32>,
    started: Started,
    finished: Finished,
}

fn request(kind: Kind, prompt: &[u32], seed: u64) -> GenerateRequest {
    GenerateRequest {
        request_id: format!("seed-{seed}"),
        prompt_token_ids: prompt.to_vec(),
        sampling: Some(SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            max_tokens: 1500,
            seed,
            constraint: Some(Constraint { kind: Some(kind) }),
            ..SamplingParams::default()
        }),
        handoff_min_tokens: 1,
        timeout_ms: 300_000,
        ..GenerateRequest::default()
    }
}

async fn generate(address: &str, request: GenerateRequest) -> Result<Output, Status> {
    let mut events = grpc::worker(address).await.generate(request).await?.into_inner();
    let (mut tokens, mut start, mut end) = (Vec::new(), None, None);
    while let Some(event) = events.message().await? {
        match event.event.expect("an event") {
            Event::Started(started) => start = Some(started),
            Event::Tokens(more) => tokens.extend(more.tokens.iter().map(|token| token.id)),
            Event::Finished(finished) => end = Some(finished),
            Event::PromptLogprobs(_) => panic!("nobody asked for prompt logprobs"),
            Event::Released(_) => panic!("the worker does not drain"),
        }
    }
    let (started, finished) = (start.expect("a start"), end.expect("an end"));
    Ok(Output { tokens, started, finished })
}

async fn tokenize(cluster: &Cluster, text: &str) -> Vec<u32> {
    let body = json!({"prompt": text, "add_special_tokens": false});
    ids(&cluster.api.ok("/tokenize", &body).await["tokens"])
}

/// The text of an output that ended by itself.
async fn text(cluster: &Cluster, output: &Output) -> String {
    assert_eq!(output.finished.reason(), FinishReason::Stop, "{output:?}");
    let (_eos, tokens) = output.tokens.split_last().expect("the end of the sequence");
    let reply = cluster.api.ok("/detokenize", &json!({"tokens": tokens})).await;
    reply["prompt"].as_str().expect("a text").to_owned()
}

/// A Python with the validator: `BATON_TEST_PYTHON`, or an environment in the build's folder.
fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("BATON_TEST_PYTHON") {
        return python.into();
    }
    let folder = build_dir().with_file_name("test-venv-jsonschema");
    fs::create_dir_all(&folder).expect("create the environment's folder");
    let lock = File::create(folder.join("lock")).expect("create a lock");
    lock.lock().expect("take the lock");
    let (python, made) = (folder.join("bin/python"), folder.join("made"));
    if fs::read_to_string(&made).is_ok_and(|of| of == JSONSCHEMA) {
        return python;
    }
    let run = |command: &mut Command| {
        assert!(command.status().expect("run Python").success(), "{command:?}");
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", JSONSCHEMA]));
    fs::write(made, JSONSCHEMA).expect("remember what was made");
    python
}

/// Asserts that each text is JSON that its schema allows.
fn validate(texts: &[(Value, String)]) {
    const SCRIPT: &str = "import json, sys, jsonschema\n\
        wrong = 0\n\
        for n, (schema, text) in enumerate(json.load(sys.stdin)):\n\
        \x20   try:\n\
        \x20       jsonschema.validate(json.loads(text), schema)\n\
        \x20   except Exception as error:\n\
        \x20       wrong += 1\n\
        \x20       print(n, repr(text), json.dumps(schema), str(error)[:300])\n\
        print('validated', n + 1)\n\
        sys.exit(wrong > 0)\n";
    let mut child = Command::new(python())
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start Python");
    let input = serde_json::to_vec(texts).expect("JSON");
    child.stdin.take().expect("a pipe").write_all(&input).expect("give the texts");
    let output = child.wait_with_output().expect("wait for Python");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("validated"), "{said}");
}

/// Generates for the schemas of these seeds, `at_once` at a time, and validates.
async fn schemas_hold(
    cluster: &Cluster,
    worker: &str,
    peer: Option<&PrefillPeer>,
    seeds: std::ops::Range<u64>,
    at_once: usize,
) {
    let prompt = tokenize(cluster, "Here is an example of such a JSON document:\n").await;
    let turns = tokio::sync::Semaphore::new(at_once);
    let start = Instant::now();
    let calls = seeds.clone().map(async |seed| {
        let _turn = turns.acquire().await.expect("a turn");
        let schema = schemas::schema(seed);
        let mut request = request(Kind::JsonSchema(schema.to_string()), &prompt, seed);
        request.prefill = peer.cloned();
        // Prompts of their own are handed off anew.
        request.cache_salt = format!("{}-{seed}", peer.is_some());
        let output = generate(worker, request).await;
        let output = output.unwrap_or_else(|status| panic!("{seed}: {status} for {schema}"));
        let handed_off = output.started.handed_off_tokens as usize;
        assert_eq!(handed_off, if peer.is_some() { prompt.len() } else { 0 });
        (schema, text(cluster, &output).await, output.tokens.len())
    });
    let outputs = futures::future::join_all(calls).await;
    let tokens: usize = outputs.iter().map(|(_, _, tokens)| tokens).sum();
    println!("{} schemas, {tokens} tokens, {:.1?}", outputs.len(), start.elapsed());
    let texts: Vec<_> = outputs.into_iter().map(|(schema, text, _)| (schema, text)).collect();
    // No text is that of another by accident of the model.
    let different: std::collections::HashSet<_> = texts.iter().map(|(_, text)| text).collect();
    assert!(different.len() * 2 > texts.len(), "{} different texts", different.len());
    tokio::task::spawn_blocking(move || validate(&texts)).await.expect("valid");
}

#[tokio::test]
async fn two_hundred_random_schemas_are_kept_to() {
    let cluster = Cluster::unified().await;
    let worker = cluster.only(Role::Unified);
    schemas_hold(&cluster, &worker.address, None, 0..200, 16).await;
    let status = worker.status().await;
    println!(
        "{} draws under a constraint waited {:.1} ms",
        status.constrained_tokens,
        status.constraint_wait_us as f64 / 1e3
    );
    cluster.finish().await;
}

#[tokio::test]
async fn a_handed_off_prompt_keeps_to_its_schema_and_draws_the_same() {
    let cluster = Cluster::builder().prefill(1).decode(1).start().await;
    let worker = cluster.only(Role::Decode).address.clone();
    let peer = PrefillPeer {
        instance_id: "peer".into(),
        address: cluster.only(Role::Prefill).address.clone(),
        ..Default::default()
    };
    schemas_hold(&cluster, &worker, Some(&peer), 1000..1030, 8).await;
    // With and without hand-off, and resumed after any token: the same output.
    let prompt = tokenize(&cluster, "A user's record, as JSON:\n").await;
    for seed in 2000..2003 {
        let kind = Kind::JsonSchema(schemas::schema(seed).to_string());
        let here = request(kind, &prompt, seed);
        let whole = generate(&worker, here.clone()).await.expect("an output");
        let there = GenerateRequest {
            prefill: Some(peer.clone()),
            cache_salt: "another".into(),
            ..here.clone()
        };
        assert_eq!(generate(&worker, there).await.expect("an output").tokens, whole.tokens);
        for at in [1, whole.tokens.len() / 2, whole.tokens.len() - 1] {
            for prefill in [None, Some(peer.clone())] {
                let resumed = GenerateRequest {
                    output_token_ids: whole.tokens[..at].to_vec(),
                    cache_salt: format!("{at}"),
                    prefill,
                    ..here.clone()
                };
                let rest = generate(&worker, resumed).await.expect("the rest").tokens;
                assert_eq!(rest, whole.tokens[at..], "{seed} from {at}");
            }
        }
    }
    cluster.finish().await;
}

#[tokio::test]
async fn regular_expressions_and_grammars_are_kept_to() {
    let cluster = Cluster::unified().await;
    let worker = &cluster.only(Role::Unified).address;
    let prompt = tokenize(&cluster, "The number is ").await;
    for seed in 0..10 {
        let kind = Kind::Regex("([0-9]{2}:){2}[0-9]{2}|none".into());
        let output = generate(worker, request(kind, &prompt, seed)).await.expect("an output");
        let text = text(&cluster, &output).await;
        let parts: Vec<&str> = text.split(':').collect();
        let time =
            parts.len() == 3 && parts.iter().all(|it| it.len() == 2 && it.parse::<u8>().is_ok());
        assert!(time || text == "none", "{text}");
        let grammar = "start: sum\nsum: NUMBER (\"+\" NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/";
        let kind = Kind::Lark(grammar.into());
        let output = generate(worker, request(kind, &prompt, seed)).await.expect("an output");
        let text = self::text(&cluster, &output).await;
        let numbers: Result<Vec<u32>, _> = text.split('+').map(str::parse).collect();
        assert!(numbers.is_ok_and(|it| (2..=4).contains(&it.len())), "{text}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_before_it_costs_anything() {
    let cluster = Cluster::builder().prefill(1).decode(1).start().await;
    let worker = &cluster.only(Role::Decode).address;
    let prompt = tokenize(&cluster, "The number is ").await;
    for (kind, reason) in [
        (Some(Kind::JsonSchema("{\"type\": \"objekt\"}".into())), "objekt"),
        (Some(Kind::JsonSchema("{\"type\": ".into())), "not JSON"),
        (Some(Kind::Regex("(".into())), ""),
        (Some(Kind::Lark("start: nothing".into())), "nothing"),
        (Some(Kind::Regex("a".repeat(1 << 20))), "bytes"),
        (None, "empty"),
    ] {
        let mut request = request(Kind::Regex(String::new()), &prompt, 0);
        let sampling = request.sampling.as_mut().expect("parameters");
        sampling.constraint = Some(Constraint { kind });
        let start = Instant::now();
        let status = generate(worker, request).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with("constraint: "), "{status}");
        assert!(status.message().contains(reason), "{status}");
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }
    // What no token can fulfil ends the one stream, and no other.
    let mut stuck = request(Kind::Regex("[0-9]+".into()), &prompt, 0);
    let sampling = stuck.sampling.as_mut().expect("parameters");
    sampling.allowed_token_ids = tokenize(&cluster, "abc").await;
    let other = request(Kind::Regex("[0-9]{40}".into()), &prompt, 1);
    let (stuck, other) = tokio::join!(generate(worker, stuck), generate(worker, other));
    let status = stuck.expect_err("nothing may come");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("allowed_token_ids"), "{status}");
    assert_eq!(text(&cluster, &other.expect("an output")).await.len(), 40);
    cluster.finish().await;
}
