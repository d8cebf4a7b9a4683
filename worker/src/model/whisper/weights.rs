//! A Whisper model's weights.

use candle_core::quantized::GgmlDType;

use super::super::weights::Reader;
use crate::checkpoint::{Checkpoint as _, LoadError, TensorBytes, WhisperFolder, WhisperShape};
use crate::kernels::affine::{Affine, LayerNorm};
use crate::kernels::arena::Arena;
use crate::kernels::dot::BLOCK;
use crate::kernels::linear::Linear;
use crate::kernels::pool::ThreadPool;

/// Of the layer norms.
const EPSILON: f32 = 1e-5;

/// All weights.
pub(super) struct Weights {
    pub(super) encoder: Encoder,
    /// Token embedding; the output projection too.
    pub(super) embedding: Linear,
    /// `text_positions × hidden`.
    pub(super) positions: Vec<f32>,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: LayerNorm,
}

/// What turns a spectrogram into what the decoder looks at.
pub(super) struct Encoder {
    pub(super) convolutions: [Affine; 2],
    /// `audio_positions × hidden`.
    pub(super) positions: Vec<f32>,
    pub(super) layers: Vec<EncoderLayer>,
    pub(super) norm: LayerNorm,
}

pub(super) struct EncoderLayer {
    pub(super) attention: Attention,
    pub(super) mlp: Mlp,
}

pub(super) struct DecoderLayer {
    /// Of the text to itself.
    pub(super) attention: Attention,
    /// Of the text to the sound. Keys and values are made of the encoder's output.
    pub(super) cross: Attention,
    pub(super) mlp: Mlp,
}

pub(super) struct Attention {
    pub(super) norm: LayerNorm,
    pub(super) query: Affine,
    pub(super) key: Affine,
    pub(super) value: Affine,
    pub(super) output: Affine,
}

pub(super) struct Mlp {
    pub(super) norm: LayerNorm,
    pub(super) up: Affine,
    pub(super) down: Affine,
}

impl Weights {
    /// Reads all tensors.
    pub(super) fn read(
        folder: &WhisperFolder,
        threads: &mut ThreadPool,
    ) -> Result<Self, LoadError> {
        let shape = folder.shape();
        let reader = Reader { checkpoint: folder, threads, arena: Arena::default() };
        let mut reader = Source { reader, folder, shape };
        let WhisperShape { hidden, mels, vocab, .. } = shape;
        Ok(Self {
            encoder: Encoder {
                convolutions: [
                    reader.convolution("model.encoder.conv1", mels)?,
                    reader.convolution("model.encoder.conv2", hidden)?,
                ],
                positions: reader.positions("model.encoder", shape.audio_positions)?,
                layers: (0..shape.encoder_layers)
                    .map(|i| {
                        let name = format!("model.encoder.layers.{i}");
                        Ok(EncoderLayer {
                            attention: reader.attention(&name, "self_attn")?,
                            mlp: reader.mlp(&name)?,
                        })
                    })
                    .collect::<Result<_, LoadError>>()?,
                norm: reader.norm("model.encoder.layer_norm")?,
            },
            embedding: reader.reader.linear("model.decoder.embed_tokens.weight", vocab, hidden)?,
            positions: reader.positions("model.decoder", shape.text_positions)?,
            layers: (0..shape.decoder_layers)
                .map(|i| {
                    let name = format!("model.decoder.layers.{i}");
                    Ok(DecoderLayer {
                        attention: reader.attention(&name, "self_attn")?,
                        cross: reader.attention(&name, "encoder_attn")?,
                        mlp: reader.mlp(&name)?,
                    })
                })
                .collect::<Result<_, LoadError>>()?,
            norm: reader.norm("model.decoder.layer_norm")?,
        })
    }
}

/// Reads parts of a model by their names.
struct Source<'a> {
    reader: Reader<'a>,
    folder: &'a WhisperFolder,
    shape: WhisperShape,
}

impl Source<'_> {
    fn attention(&mut self, layer: &str, which: &str) -> Result<Attention, LoadError> {
        let hidden = self.shape.hidden;
        let mut part = |part: &str| self.affine(&format!("{layer}.{which}.{part}"), hidden, hidden);
        Ok(Attention {
            query: part("q_proj")?,
            key: part("k_proj")?,
            value: part("v_proj")?,
            output: part("out_proj")?,
            norm: self.norm(&format!("{layer}.{which}_layer_norm"))?,
        })
    }

    fn mlp(&mut self, layer: &str) -> Result<Mlp, LoadError> {
        let WhisperShape { hidden, ffn, .. } = self.shape;
        Ok(Mlp {
            norm: self.norm(&format!("{layer}.final_layer_norm"))?,
            up: self.affine(&format!("{layer}.fc1"), ffn, hidden)?,
            down: self.affine(&format!("{layer}.fc2"), hidden, ffn)?,
        })
    }

    fn affine(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Affine, LoadError> {
        let weight = self.reader.linear(&format!("{name}.weight"), outputs, inputs)?;
        let bias = self.reader.checkpoint.optional_vector(&format!("{name}.bias"), outputs)?;
        // Keys have none; some files write it out.
        let bias = bias.filter(|bias| bias.iter().any(|x| *x != 0.0));
        Ok(Affine { weight, bias })
    }

    fn norm(&self, name: &str) -> Result<LayerNorm, LoadError> {
        let hidden = self.shape.hidden;
        Ok(LayerNorm {
            weight: self.reader.checkpoint.vector(&format!("{name}.weight"), hidden)?,
            bias: Some(self.reader.checkpoint.vector(&format!("{name}.bias"), hidden)?),
            eps: EPSILON,
        })
    }

    /// A table of positions.
    fn positions(&self, side: &str, count: usize) -> Result<Vec<f32>, LoadError> {
        let name = format!("{side}.embed_positions.weight");
        let dims = [count, self.shape.hidden];
        Ok(self.floats(&name, &dims)?.floats())
    }

    /// A convolution over three frames as a product with three frames after each other.
    fn convolution(&mut self, name: &str, channels: usize) -> Result<Affine, LoadError> {
        let hidden = self.shape.hidden;
        let tensor = self.floats(&format!("{name}.weight"), &[hidden, channels, 3])?;
        let inputs = frame_inputs(channels);
        let (element, bytes) = (tensor.dtype.type_size(), tensor.bytes());
        let mut turned = vec![0u8; hidden * inputs * element];
        for (row, turned) in turned.chunks_exact_mut(inputs * element).enumerate() {
            for (i, to) in turned.chunks_exact_mut(element).take(3 * channels).enumerate() {
                let (tap, channel) = (i / channels, i % channels);
                let from = ((row * channels + channel) * 3 + tap) * element;
                to.copy_from_slice(&bytes[from..from + element]);
            }
        }
        let turned = TensorBytes::anonymous(&turned, tensor.dtype, vec![hidden, inputs]);
        let Reader { threads, arena, .. } = &mut self.reader;
        let weight = Linear::new(threads, arena, turned)
            .ok_or_else(|| self.folder.unsupported(format!("tensor {name}.weight")))?;
        let bias = Some(self.reader.checkpoint.vector(&format!("{name}.bias"), hidden)?);
        Ok(Affine { weight, bias })
    }

    fn floats(&self, name: &str, dims: &[usize]) -> Result<TensorBytes, LoadError> {
        let tensor = self.folder.tensor(name)?;
        let float = matches!(tensor.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        match float && tensor.dims == dims {
            true => Ok(tensor),
            false => Err(self.folder.corrupt(format!(
                "tensor {name} is {:?} {:?}, expected {dims:?}",
                tensor.dtype, tensor.dims
            ))),
        }
    }
}

/// What three frames after each other are padded to, for the products.
pub(super) fn frame_inputs(channels: usize) -> usize {
    (3 * channels).next_multiple_of(BLOCK)
}
