//! Reads a model that pools: an encoder's folder, or any decoder that the engine runs.

use std::path::{Path, PathBuf};

use baton_proto::TokenizerBundle;
use baton_proto::v1::PoolingCard;
use candle_core::quantized::GgmlDType;

use super::head::{Function, Head, Kind, Step};
use super::methods::Pooling;
use crate::checkpoint::encoder::{self, EncoderFolder, Purpose};
use crate::checkpoint::sentence_transformers::{self as st, Modules};
use crate::checkpoint::{self, LoadError, TensorBytes};
use crate::encoder::{Bidirectional, Causal, Encoder, How, Reader, Weights, projection};
use crate::kernels::activations::Precision;
use crate::kernels::arena::Arena;
use crate::kernels::pool::ThreadPool;
use crate::model::{Decoder, Model as _};

/// What an encoder's weights are rounded to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// Nothing: float32 arithmetic with the numbers of the file.
    #[default]
    Float32,
    /// Bfloat16, and activations too, where the CPU multiplies them.
    #[value(name = "bfloat16")]
    BFloat16,
    /// Eight bits, with a scale for each 32.
    Int8,
}

impl Dtype {
    fn rounding(self) -> Option<GgmlDType> {
        match self {
            Self::Float32 => None,
            Self::BFloat16 => Some(GgmlDType::BF16),
            Self::Int8 => Some(GgmlDType::Q8_0),
        }
    }
}

/// How to load.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads that compute.
    pub threads: usize,
    /// How activations are rounded before products with quantized weights.
    pub activations: Precision,
    /// What an encoder's weights are rounded to.
    pub dtype: Dtype,
    /// In place of what the model's files say.
    pub pooling: Option<Pooling>,
    /// Longest text; by default what the model's files say.
    pub max_tokens: Option<usize>,
    /// Tokens of one batch.
    pub max_batch_tokens: usize,
}

/// A model and what is done with its hidden states.
pub struct Model {
    pub(super) encoder: Box<dyn Encoder>,
    pub(super) head: Head,
    pub(super) vocab: usize,
    /// Segments that tokens can belong to.
    pub(super) types: usize,
    pub(super) max_tokens: usize,
    /// Whether and to which numbers embeddings may be cut; empty: to any.
    pub(super) matryoshka: Option<Vec<u32>>,
}

/// A model and what else its files tell.
pub struct Loaded {
    /// To compute with.
    pub model: Model,
    /// For the model card.
    pub card: PoolingCard,
    /// Likewise.
    pub architecture: String,
    /// For the gateways.
    pub tokenizer: TokenizerBundle,
    /// Tokens that end a text, of decoders.
    pub eos_token_ids: Vec<u32>,
    /// Equal for equal files that are used in the same way.
    pub weights_digest: String,
}

impl Model {
    /// The same model to compute with on one's own thread alone, where that takes little memory.
    pub(super) fn alone(&self) -> Option<Self> {
        Some(Self {
            encoder: self.encoder.alone()?,
            head: self.head.share(),
            vocab: self.vocab,
            types: self.types,
            max_tokens: self.max_tokens,
            matryoshka: self.matryoshka.clone(),
        })
    }

    /// Rows of the embedding table.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Tokens of the longest text.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// What is done with hidden states.
    pub fn head(&self) -> &Head {
        &self.head
    }
}

/// Loads a model to pool.
pub fn load(path: &Path, options: &Options) -> Result<Loaded, LoadError> {
    if !path.is_dir() {
        return load_decoder(path, path.to_owned(), Modules::default(), options);
    }
    let modules = st::read(path)?;
    let folder = modules.transformer.clone().unwrap_or_else(|| path.to_owned());
    let (model_type, architecture) = encoder::kind(&folder)?;
    if encoder::is_encoder(&model_type) {
        return load_encoder(path, &folder, modules, options);
    }
    if architecture.ends_with("Classification") {
        let reason = format!("`{architecture}` is not supported: classifiers must be encoders");
        return Err(LoadError::Unsupported { path: folder, reason });
    }
    load_decoder(path, folder, modules, options)
}

fn load_encoder(
    path: &Path,
    folder: &Path,
    modules: Modules,
    options: &Options,
) -> Result<Loaded, LoadError> {
    let files = EncoderFolder::open(folder)?;
    let config = files.config()?;
    let purpose = files.purpose()?;
    let hidden = config.hidden;
    let said = modules.max_tokens.or(files.tokenizer_limit()?);
    let max_tokens = longest(config.max_tokens, said, options);
    let threads = start_threads(path, options)?;
    let mut reader = Reader::new(&files, config.norm_eps, options.dtype.rounding(), threads);
    let weights = Weights::read(&mut reader, &config)?;
    // The head is small.
    reader.stop_rounding();
    let (activations, suffix) = match (options.dtype, options.activations) {
        (Dtype::Float32, _) => (Precision::Float, ""),
        (Dtype::BFloat16, _) => (Precision::BFloat16, "-bf16"),
        (Dtype::Int8, Precision::Eight) => (Precision::Eight, "-w8a8"),
        (Dtype::Int8, _) => (Precision::Sixteen, "-w8"),
    };
    let (mut head, labels) = match purpose {
        Purpose::Embedding => {
            // As in vLLM, where the files do not say.
            let pooling = poolings(&modules, options, Pooling::Cls);
            (Head::new(hidden, pooling, Kind::Embedding), Vec::new())
        }
        Purpose::Classification | Purpose::TokenClassification => {
            classifier(&files, &mut reader, purpose, hidden)?
        }
    };
    let mut threads = reader.into_threads();
    let weights_digest = digest(files.digest(), modules.hasher.clone(), &head) + suffix;
    if purpose == Purpose::Embedding {
        add_modules(path, &mut head, modules, &mut threads)?;
    }
    let (matryoshka, to) = files.matryoshka();
    let card = PoolingCard {
        matryoshka: matryoshka && purpose == Purpose::Embedding,
        matryoshka_dimensions: to.clone(),
        labels,
        type_ids: config.types > 1,
        ..card(&head)
    };
    let (vocab, types) = (config.vocab, config.types);
    Ok(Loaded {
        card,
        architecture: files.architecture().to_owned(),
        tokenizer: files.tokenizer()?,
        eos_token_ids: Vec::new(),
        weights_digest,
        model: Model {
            encoder: Box::new(Bidirectional::new(config, weights, threads, activations)),
            head,
            vocab,
            types,
            max_tokens,
            matryoshka: matryoshka.then_some(to),
        },
    })
}

fn load_decoder(
    path: &Path,
    folder: PathBuf,
    modules: Modules,
    options: &Options,
) -> Result<Loaded, LoadError> {
    let files = checkpoint::open(&folder)?;
    if options.dtype != Dtype::Float32 {
        return Err(files.unsupported("--dtype is for encoders: this is a decoder".into()));
    }
    let decoder = Decoder::new(&*files, options.threads, options.activations)?;
    let config = decoder.config().clone();
    let pooling = poolings(&modules, options, Pooling::Last);
    let mut head = Head::new(config.hidden, pooling, Kind::Embedding);
    let max_tokens = longest(config.max_context, modules.max_tokens, options);
    // A text's last block may be all but empty: at worst each token has one.
    let most = (options.max_batch_tokens * Causal::BLOCK_SIZE).max(max_tokens);
    let mut encoder = Causal::new(decoder, most)
        .map_err(|error| files.unsupported(format!("cannot map the KV pool: {error}")))?;
    let weights_digest = digest(&files.digest(), modules.hasher.clone(), &head);
    add_modules(path, &mut head, modules, encoder.threads())?;
    Ok(Loaded {
        card: card(&head),
        architecture: config.architecture.clone(),
        tokenizer: files.tokenizer()?,
        eos_token_ids: files.eos_token_ids()?,
        weights_digest: weights_digest + options.activations.suffix(),
        model: Model {
            encoder: Box::new(encoder),
            head,
            vocab: config.vocab,
            types: 1,
            max_tokens,
            matryoshka: None,
        },
    })
}

/// Of the weights and of what is done with the hidden states: workers of one digest must compute
/// the same.
fn digest(weights: &str, mut steps: blake3::Hasher, head: &Head) -> String {
    steps.update(weights.as_bytes());
    for pooling in &head.pooling {
        steps.update(pooling.name().as_bytes()).update(b"\0");
    }
    // Not all of a classifier's functions are named where its shape is.
    steps.update(format!("{:?}", head.kind).as_bytes());
    steps.finalize().to_hex().to_string()
}

fn start_threads(path: &Path, options: &Options) -> Result<ThreadPool, LoadError> {
    ThreadPool::new(options.threads).map_err(|error| LoadError::Unsupported {
        path: path.to_owned(),
        reason: format!("cannot start threads: {error}"),
    })
}

fn longest(positions: usize, said: Option<usize>, options: &Options) -> usize {
    positions.min(said.unwrap_or(usize::MAX)).min(options.max_tokens.unwrap_or(usize::MAX))
}

fn poolings(modules: &Modules, options: &Options, default: Pooling) -> Vec<Pooling> {
    match options.pooling {
        Some(pooling) => vec![pooling],
        None if modules.pooling.is_empty() => vec![default],
        None => modules.pooling.clone(),
    }
}

fn card(head: &Head) -> PoolingCard {
    let names: Vec<_> = head.pooling.iter().map(|pooling| pooling.name()).collect();
    PoolingCard {
        dimensions: if head.kind == Kind::Embedding { head.width as u32 } else { 0 },
        pooling: names.join("+"),
        ..PoolingCard::default()
    }
}

/// The head of a classifier, and its labels.
fn classifier(
    files: &EncoderFolder,
    reader: &mut Reader<'_>,
    purpose: Purpose,
    hidden: usize,
) -> Result<(Head, Vec<String>), LoadError> {
    let labels = files.labels()?;
    let function = |name: &str| {
        Function::by_name(name)
            .ok_or_else(|| files.unsupported(format!("activation `{name}` is not supported")))
    };
    // As in vLLM: what `transformers` would train it with.
    let probabilities = match (files.problem_type(), labels.len()) {
        (Some("regression"), _) => Function::Identity,
        (Some("multi_label_classification"), _) | (_, 0..=1) => Function::Sigmoid,
        _ => Function::Softmax,
    };
    let (kind, pooling) = match purpose {
        Purpose::TokenClassification => (Kind::TokenClasses(Function::Softmax), Vec::new()),
        _ => {
            let score = match files.score_activation()? {
                Some(name) => function(&name)?,
                None => Function::Sigmoid,
            };
            let pooling = if files.classifies_mean() { Pooling::Mean } else { Pooling::Cls };
            (Kind::Classes { classify: probabilities, score }, vec![pooling])
        }
    };
    let mut head = Head::new(hidden, pooling, kind);
    let mut push = |step| head.push(step).map_err(|reason| files.corrupt(reason));
    // BERT's classifier of tokens has no such matrix, but its file may have one for texts.
    let first = match purpose {
        Purpose::Classification => true,
        _ => reader.has("head_norm.weight"),
    };
    if first {
        let dense = reader.projection("head", hidden, hidden)?;
        push(Step::Dense(dense, function(files.head_activation())?))?;
    }
    if let Some(norm) = reader.optional_norm("head_norm", hidden)? {
        push(Step::Norm(norm))?;
    }
    let classes = reader.projection("classifier", labels.len(), hidden)?;
    push(Step::Dense(classes, Function::Identity))?;
    Ok((head, labels))
}

/// The steps of sentence-transformers' files. The last one, when it makes vectors of length one, is
/// left to the request.
fn add_modules(
    path: &Path,
    head: &mut Head,
    modules: Modules,
    threads: &mut ThreadPool,
) -> Result<(), LoadError> {
    let unsupported = |reason: String| LoadError::Unsupported { path: path.to_owned(), reason };
    let mut steps = modules.steps;
    while matches!(steps.last(), Some(st::Step::Normalize)) {
        steps.pop();
    }
    let mut arena = Arena::default();
    for step in steps {
        let step = match step {
            st::Step::Normalize => Step::Normalize,
            st::Step::Dense { weight, bias, activation } => {
                let Some(function) = Function::by_name(&activation) else {
                    return Err(unsupported(format!(
                        "activation `{activation}` of a Dense module"
                    )));
                };
                let inputs = weight.dims[1];
                let bias = bias.as_ref().map(TensorBytes::floats);
                let dense = projection(threads, &mut arena, How::default(), weight, bias)
                    .ok_or_else(|| {
                        unsupported(format!("a Dense module that takes {inputs} dimensions"))
                    })?;
                Step::Dense(dense, function)
            }
        };
        head.push(step).map_err(unsupported)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pooling: &[Pooling], step: &str, kind: Kind) -> String {
        let mut steps = blake3::Hasher::new();
        steps.update(step.as_bytes());
        digest("weights", steps, &Head::new(4, pooling.to_vec(), kind))
    }

    #[test]
    fn the_digest_covers_what_is_done_with_hidden_states() {
        let classes = |score| Kind::Classes { classify: Function::Softmax, score };
        let digests = [
            of(&[Pooling::Mean], "", Kind::Embedding),
            of(&[Pooling::Cls], "", Kind::Embedding),
            of(&[Pooling::Cls, Pooling::Mean], "", Kind::Embedding),
            of(&[Pooling::Mean, Pooling::Cls], "", Kind::Embedding),
            of(&[Pooling::Mean], "step", Kind::Embedding),
            of(&[Pooling::Mean], "", classes(Function::Sigmoid)),
            of(&[Pooling::Mean], "", classes(Function::Identity)),
        ];
        assert_eq!(digests[0], of(&[Pooling::Mean], "", Kind::Embedding));
        for (i, one) in digests.iter().enumerate() {
            assert!(!digests[..i].contains(one), "{i}");
        }
    }
}
