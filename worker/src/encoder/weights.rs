//! An encoder's weights, by the names of [`EncoderFolder`].

use super::EncoderConfig;
use super::config::Positions;
use candle_core::quantized::GgmlDType;

use crate::checkpoint::encoder::EncoderFolder;
use crate::checkpoint::{LoadError, TensorBytes};
use crate::kernels::affine::{Affine, LayerNorm};
use crate::kernels::arena::Arena;
use crate::kernels::linear::Linear;
use crate::kernels::pool::ThreadPool;

/// Bytes that the matrices of a model may take more, so that rows in pairs are computed faster: models
/// of up to some 35 million parameters in their layers.
const MOST_FOR_PAIRS: usize = 256 << 20;

/// All weights.
pub(crate) struct Weights {
    pub(super) tokens: Linear,
    /// Present when positions are learned.
    pub(super) positions: Option<Linear>,
    pub(super) types: Option<Linear>,
    pub(super) embedding_norm: LayerNorm,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Option<LayerNorm>,
}

/// A layer's weights. What is optional depends on the architecture.
pub(super) struct Layer {
    /// Of what goes into the attention.
    pub(super) attention_norm: Option<LayerNorm>,
    pub(super) query: Affine,
    pub(super) key: Affine,
    pub(super) value: Affine,
    pub(super) output: Affine,
    /// Of the residual stream after the attention.
    pub(super) attention_output_norm: Option<LayerNorm>,
    /// Of what goes into the MLP.
    pub(super) ffn_norm: Option<LayerNorm>,
    /// What the activation of a gated MLP is applied to.
    pub(super) gate: Option<Affine>,
    pub(super) up: Affine,
    pub(super) down: Affine,
    /// Of the residual stream after the MLP.
    pub(super) ffn_output_norm: Option<LayerNorm>,
}

impl Weights {
    /// Reads and repacks all tensors, on the pool's threads; matrices as the reader rounds them.
    pub(crate) fn read(reader: &mut Reader<'_>, config: &EncoderConfig) -> Result<Self, LoadError> {
        let &EncoderConfig { hidden, ffn, .. } = config;
        let wide = if reader.has("layer.0.gate.weight") { 2 } else { 1 };
        let bytes = [
            (4, Linear::bytes_of_pairs(hidden, hidden)),
            (wide, Linear::bytes_of_pairs(ffn, hidden)),
            (1, Linear::bytes_of_pairs(hidden, ffn)),
        ];
        let bytes = bytes.into_iter().fold(0usize, |sum, (count, of_each)| {
            sum.saturating_add(of_each.saturating_mul(count * config.layers))
        });
        reader.how.pairs = bytes <= MOST_FOR_PAIRS;
        let layers = (0..config.layers)
            .map(|i| {
                let name = |rest: &str| format!("layer.{i}.{rest}");
                Ok(Layer {
                    attention_norm: reader.optional_norm(&name("attention_norm"), hidden)?,
                    query: reader.projection(&name("query"), hidden, hidden)?,
                    key: reader.projection(&name("key"), hidden, hidden)?,
                    value: reader.projection(&name("value"), hidden, hidden)?,
                    output: reader.projection(&name("output"), hidden, hidden)?,
                    attention_output_norm: reader
                        .optional_norm(&name("attention_output_norm"), hidden)?,
                    ffn_norm: reader.optional_norm(&name("ffn_norm"), hidden)?,
                    gate: match reader.has(&name("gate.weight")) {
                        true => Some(reader.projection(&name("gate"), ffn, hidden)?),
                        false => None,
                    },
                    up: reader.projection(&name("up"), ffn, hidden)?,
                    down: reader.projection(&name("down"), hidden, ffn)?,
                    ffn_output_norm: reader.optional_norm(&name("ffn_output_norm"), hidden)?,
                })
            })
            .collect::<Result<Vec<_>, LoadError>>()?;
        Ok(Self {
            tokens: reader.table("tokens.weight", config.vocab, hidden)?,
            positions: match config.positions {
                Positions::Learned { first } => {
                    let rows = first + config.max_tokens;
                    Some(reader.table("positions.weight", rows, hidden)?)
                }
                Positions::Rotary { .. } => None,
            },
            types: match config.types {
                0 => None,
                types => Some(reader.table("types.weight", types, hidden)?),
            },
            embedding_norm: reader.norm("embedding_norm", hidden)?,
            layers,
            final_norm: reader.optional_norm("final_norm", hidden)?,
        })
    }
}

/// Takes tensors from a folder, checked.
pub(crate) struct Reader<'a> {
    folder: &'a EncoderFolder,
    norm_eps: f32,
    how: How,
    threads: ThreadPool,
    arena: Arena,
}

impl<'a> Reader<'a> {
    /// A reader of a folder's tensors.
    pub(crate) fn new(
        folder: &'a EncoderFolder,
        norm_eps: f32,
        rounding: Option<GgmlDType>,
        threads: ThreadPool,
    ) -> Self {
        let how = How { rounding, pairs: false };
        Self { folder, norm_eps, how, threads, arena: Arena::default() }
    }

    /// From here on matrices stay as they are.
    pub(crate) fn stop_rounding(&mut self) {
        self.how = How::default();
    }

    /// The threads, when all is read.
    pub(crate) fn into_threads(self) -> ThreadPool {
        self.threads
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.folder.has_tensor(name)
    }

    fn tensor(&self, name: &str, dims: &[usize]) -> Result<TensorBytes, LoadError> {
        let tensor = self.folder.tensor(name)?;
        if tensor.dims != dims {
            let here = self.folder.name_of(name);
            let found = &tensor.dims;
            return Err(self
                .folder
                .corrupt(format!("tensor {here} is {found:?}, expected {dims:?}")));
        }
        Ok(tensor)
    }

    /// A weight matrix and, where there is one, its bias.
    pub(crate) fn projection(
        &mut self,
        stem: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Affine, LoadError> {
        let weight = self.tensor(&format!("{stem}.weight"), &[outputs, inputs])?;
        let bias = format!("{stem}.bias");
        let bias = self.has(&bias).then(|| self.vector(&bias, outputs)).transpose()?;
        projection(&mut self.threads, &mut self.arena, self.how, weight, bias)
            .ok_or_else(|| self.folder.unsupported(format!("{stem}: rows of {inputs} elements")))
    }

    /// Rows that are looked up.
    fn table(&self, name: &str, rows: usize, width: usize) -> Result<Linear, LoadError> {
        Linear::lookup(self.tensor(name, &[rows, width])?)
            .ok_or_else(|| self.folder.unsupported(format!("{name}: rows of {width} elements")))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        Ok(self.tensor(name, &[len])?.floats())
    }

    /// A norm.
    pub(crate) fn norm(&self, stem: &str, len: usize) -> Result<LayerNorm, LoadError> {
        let bias = format!("{stem}.bias");
        Ok(LayerNorm {
            weight: self.vector(&format!("{stem}.weight"), len)?,
            bias: self.has(&bias).then(|| self.vector(&bias, len)).transpose()?,
            eps: self.norm_eps,
        })
    }

    /// A norm that not all architectures have.
    pub(crate) fn optional_norm(
        &self,
        stem: &str,
        len: usize,
    ) -> Result<Option<LayerNorm>, LoadError> {
        self.has(&format!("{stem}.weight")).then(|| self.norm(stem, len)).transpose()
    }
}

/// How a matrix is prepared.
#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    /// What it is rounded to.
    pub(crate) rounding: Option<GgmlDType>,
    /// For rows in pairs, too: when it is not rounded.
    pub(crate) pairs: bool,
}

/// A matrix to multiply with; `None` when its rows are not whole blocks.
pub(crate) fn projection(
    threads: &mut ThreadPool,
    arena: &mut Arena,
    how: How,
    weight: TensorBytes,
    bias: Option<Vec<f32>>,
) -> Option<Affine> {
    let file = weight.clone();
    let mut linear = match how.rounding {
        Some(to) => Linear::rounded(threads, arena, weight, to)?,
        None => Linear::new(threads, arena, weight)?,
    };
    if how.pairs && how.rounding.is_none() {
        linear.for_pairs(threads, arena);
    }
    if linear.is_repacked() {
        file.forget();
    }
    Some(Affine { weight: linear, bias })
}
