//! An encoder's weights, by the names of [`EncoderFolder`].

use super::EncoderConfig;
use super::config::Positions;
use candle_core::quantized::GgmlDType;

use crate::checkpoint::encoder::EncoderFolder;
use crate::checkpoint::{LoadError, TensorBytes};
use crate::kernels::arena::Arena;
use crate::kernels::cpu::Isa;
use crate::kernels::elementwise::{layer_norm, layer_norm_in_place};
use crate::kernels::linear::{Linear, Product};
use crate::kernels::pool::ThreadPool;
use crate::kernels::quant;

/// All weights.
pub(crate) struct Weights {
    pub(super) tokens: Table,
    /// Present when positions are learned.
    pub(super) positions: Option<Table>,
    pub(super) types: Option<Table>,
    pub(super) embedding_norm: Norm,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Option<Norm>,
}

/// A layer's weights. What is optional depends on the architecture.
pub(super) struct Layer {
    /// Of what goes into the attention.
    pub(super) attention_norm: Option<Norm>,
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) value: Projection,
    pub(super) output: Projection,
    /// Of the residual stream after the attention.
    pub(super) attention_output_norm: Option<Norm>,
    /// Of what goes into the MLP.
    pub(super) ffn_norm: Option<Norm>,
    /// What the activation of a gated MLP is applied to.
    pub(super) gate: Option<Projection>,
    pub(super) up: Projection,
    pub(super) down: Projection,
    /// Of the residual stream after the MLP.
    pub(super) ffn_output_norm: Option<Norm>,
}

/// Rows that are looked up.
pub(super) struct Table(TensorBytes);

impl Table {
    /// One row.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.0.bytes().len() / self.0.dims[0];
        quant::decode_row(self.0.dtype, &self.0.bytes()[row * bytes..][..bytes], out);
    }
}

/// `y = x Wᵀ + b`.
pub(crate) struct Projection {
    pub(crate) weight: Linear,
    pub(crate) bias: Option<Vec<f32>>,
}

impl Projection {
    /// The product that overwrites `y`.
    pub(crate) fn set<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        self.weight.set(y).bias(self.bias.as_deref())
    }

    /// The product that is added to `y`.
    pub(crate) fn add_to<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        self.weight.add_to(y).bias(self.bias.as_deref())
    }
}

/// Layer normalization (Ba et al. 2016).
pub(crate) struct Norm {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
}

impl Norm {
    /// Of one row.
    pub(crate) fn apply(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        layer_norm(isa, x, &self.weight, self.bias.as_deref(), self.eps, out);
    }

    /// Of a row that it replaces.
    pub(crate) fn in_place(&self, isa: Isa, x: &mut [f32]) {
        layer_norm_in_place(isa, x, &self.weight, self.bias.as_deref(), self.eps);
    }
}

impl Weights {
    /// Reads and repacks all tensors, on the pool's threads; matrices as the reader rounds them.
    pub(crate) fn read(reader: &mut Reader<'_>, config: &EncoderConfig) -> Result<Self, LoadError> {
        let &EncoderConfig { hidden, ffn, .. } = config;
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
    /// What matrices are rounded to.
    rounding: Option<GgmlDType>,
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
        Self { folder, norm_eps, rounding, threads, arena: Arena::default() }
    }

    /// From here on matrices stay as they are.
    pub(crate) fn stop_rounding(&mut self) {
        self.rounding = None;
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
    ) -> Result<Projection, LoadError> {
        let weight = self.tensor(&format!("{stem}.weight"), &[outputs, inputs])?;
        let bias = format!("{stem}.bias");
        let bias = self.has(&bias).then(|| self.vector(&bias, outputs)).transpose()?;
        projection(&mut self.threads, &mut self.arena, self.rounding, weight, bias)
            .ok_or_else(|| self.folder.unsupported(format!("{stem}: rows of {inputs} elements")))
    }

    fn table(&self, name: &str, rows: usize, width: usize) -> Result<Table, LoadError> {
        self.tensor(name, &[rows, width]).map(Table)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        Ok(floats(&self.tensor(name, &[len])?))
    }

    /// A norm.
    pub(crate) fn norm(&self, stem: &str, len: usize) -> Result<Norm, LoadError> {
        let bias = format!("{stem}.bias");
        Ok(Norm {
            weight: self.vector(&format!("{stem}.weight"), len)?,
            bias: self.has(&bias).then(|| self.vector(&bias, len)).transpose()?,
            eps: self.norm_eps,
        })
    }

    /// A norm that not all architectures have.
    pub(crate) fn optional_norm(&self, stem: &str, len: usize) -> Result<Option<Norm>, LoadError> {
        self.has(&format!("{stem}.weight")).then(|| self.norm(stem, len)).transpose()
    }
}

/// A matrix to multiply with; `None` when its rows are not whole blocks.
pub(crate) fn projection(
    threads: &mut ThreadPool,
    arena: &mut Arena,
    rounding: Option<GgmlDType>,
    weight: TensorBytes,
    bias: Option<Vec<f32>>,
) -> Option<Projection> {
    let file = weight.clone();
    let linear = match rounding {
        Some(to) => Linear::rounded(threads, arena, weight, to)?,
        None => Linear::new(threads, arena, weight)?,
    };
    if linear.is_repacked() {
        file.forget();
    }
    Some(Projection { weight: linear, bias })
}

/// A tensor's elements.
pub(crate) fn floats(tensor: &TensorBytes) -> Vec<f32> {
    let mut values = vec![0.0; tensor.dims.iter().product()];
    quant::decode_row(tensor.dtype, tensor.bytes(), &mut values);
    values
}
