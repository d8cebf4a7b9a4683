//! Model files: a GGUF, or a folder as Hugging Face publishes it. Whisper models come in folders of
//! CTranslate2 too.
//!
//! [`Checkpoint`] is what a model needs of either: its shape, its tensors by the names that GGUF has
//! for them, its tokenizer. Everything that a file claims is checked before it is used, so that a
//! truncated or corrupt file is an error here and never a fault later.

mod ctranslate2;
pub mod encoder;
mod gguf;
mod gguf_architecture;
mod gguf_tokenizer;
mod hugging_face;
pub mod sentence_transformers;
mod sentencepiece;
mod whisper;

pub use whisper::{WhisperFolder, WhisperShape};

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_proto::TokenizerBundle;
use candle_core::quantized::GgmlDType;
use memmap2::{Mmap, UncheckedAdvice};

use crate::kernels::quant;
use crate::model::ModelConfig;

/// The unit of mappings, or a multiple of it.
const PAGE: usize = 4096;

/// Why a model file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no such file.
    #[error("model file {} does not exist; give an existing GGUF file with --model", .0.display())]
    Missing(PathBuf),
    /// The file cannot be opened or mapped.
    #[error("model file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The header does not parse.
    #[error("model file {} is not a valid model: {reason}; fetch it again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The header names more bytes than the file has.
    #[error(
        "model file {} is truncated: tensor {tensor} ends at byte {needs}, the file has {has}; fetch it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The first tensor found outside the file.
        tensor: String,
        /// Where it would end.
        needs: u64,
        /// The file's length.
        has: u64,
    },
    /// A well-formed file that this engine cannot run.
    #[error("model file {}: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        reason: String,
    },
    /// What is to compute it cannot.
    #[error("--device: {0}")]
    Device(String),
    /// What is to compute it is there, and failed.
    #[error("the device failed: {0}")]
    DeviceFailed(String),
}

/// A tensor's bytes in the mapping.
#[derive(Clone)]
pub struct TensorBytes {
    map: Arc<Mmap>,
    start: usize,
    len: usize,
    /// Block format of the elements.
    pub dtype: GgmlDType,
    /// Rows first, elements of a row last.
    pub dims: Vec<usize>,
}

impl TensorBytes {
    /// The raw blocks.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }

    /// All elements.
    pub(crate) fn floats(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.dims.iter().product()];
        quant::decode_row(self.dtype, self.bytes(), &mut values);
        values
    }

    /// Lets go of the tensor's pages in memory; they are read from the file again when needed.
    pub fn forget(&self) {
        // What the mapping of a tensor shares with its neighbours stays. A failure costs memory only.
        let start = self.start.next_multiple_of(PAGE);
        let len = (self.start + self.len).saturating_sub(start) / PAGE * PAGE;
        // SAFETY: the mapping is private, read-only and of a file, so the pages' content is there
        // again at the next access.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
    }

    /// Some of the rows of a tensor of floats.
    ///
    /// # Panics
    /// When there are fewer.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.dims[0] && self.dtype.block_size() == 1, "rows");
        let row = self.len / self.dims[0].max(1);
        let dims = [&[count], &self.dims[1..]].concat();
        Self { start: self.start + first * row, len: count * row, dims, ..self.clone() }
    }

    /// A tensor that is not in a file.
    ///
    /// # Panics
    /// When the system has no memory left.
    #[allow(clippy::unwrap_used)]
    pub fn anonymous(bytes: &[u8], dtype: GgmlDType, dims: Vec<usize>) -> Self {
        let mut map = memmap2::MmapMut::map_anon(bytes.len().max(1)).unwrap();
        map[..bytes.len()].copy_from_slice(bytes);
        let map = Arc::new(map.make_read_only().unwrap());
        Self { map, start: 0, len: bytes.len(), dtype, dims }
    }
}

/// Bytes of a tensor's start, middle and end that tell its weights from another training's. To read
/// all of them would take as long as to load the model.
const SAMPLE: usize = 4096;

/// Adds a sample of a tensor to a digest.
fn hash_sample(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    let last = bytes.len().saturating_sub(SAMPLE);
    for start in [0, last / 2, last] {
        hasher.update(&bytes[start..bytes.len().min(start + SAMPLE)]);
    }
}

/// A model on disk.
pub trait Checkpoint {
    /// The file or folder.
    fn path(&self) -> &Path;
    /// The model's shape.
    fn config(&self) -> Result<ModelConfig, LoadError>;
    /// Whether there is a tensor of this (GGUF) name.
    fn has_tensor(&self, name: &str) -> bool;
    /// A tensor's bytes.
    fn tensor(&self, name: &str) -> Result<TensorBytes, LoadError>;
    /// What is to be added to the weights of norms: some models keep them as differences from one.
    fn norm_offset(&self) -> f32 {
        0.0
    }
    /// Tokenizer and chat template.
    fn tokenizer(&self) -> Result<TokenizerBundle, LoadError>;
    /// The tokens that end a generation.
    fn eos_token_ids(&self) -> Result<Vec<u32>, LoadError>;
    /// Equal for checkpoints that hold the same model, other for two trainings of one: of names,
    /// shapes and a [sample](hash_sample) of each tensor.
    fn digest(&self) -> String;

    /// An error that says the file is damaged.
    fn corrupt(&self, reason: String) -> LoadError {
        LoadError::Corrupt { path: self.path().to_owned(), reason }
    }
    /// An error that says the file is sound but beyond this engine.
    fn unsupported(&self, reason: String) -> LoadError {
        LoadError::Unsupported { path: self.path().to_owned(), reason }
    }
}

impl dyn Checkpoint + '_ {
    /// A tensor of two dimensions.
    pub(crate) fn matrix(
        &self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<TensorBytes, LoadError> {
        let tensor = self.tensor(name)?;
        if tensor.dims != [outputs, inputs] {
            return Err(self.corrupt(format!(
                "tensor {name} is {:?}, expected [{outputs}, {inputs}]",
                tensor.dims
            )));
        }
        Ok(tensor)
    }

    /// A tensor of one dimension, as floats.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensor(name)?;
        let known = quant::supported(tensor.dtype) && len.is_multiple_of(tensor.dtype.block_size());
        if tensor.dims != [len] || !known {
            return Err(self.corrupt(format!(
                "tensor {name} is {:?} {:?}, expected [{len}]",
                tensor.dtype, tensor.dims
            )));
        }
        Ok(tensor.floats())
    }

    /// The weights of a norm.
    pub(crate) fn norm(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let mut values = self.vector(name, len)?;
        let offset = self.norm_offset();
        values.iter_mut().for_each(|value| *value += offset);
        Ok(values)
    }

    /// [`Self::vector`] where there is one.
    pub(crate) fn optional_vector(
        &self,
        name: &str,
        len: usize,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        self.has_tensor(name).then(|| self.vector(name, len)).transpose()
    }

    /// [`Self::norm`] where there is one.
    pub(crate) fn optional_norm(
        &self,
        name: &str,
        len: usize,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        self.has_tensor(name).then(|| self.norm(name, len)).transpose()
    }
}

/// Opens a GGUF file, or a folder with `config.json` and `*.safetensors`.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>, LoadError> {
    match path.is_dir() {
        true => Ok(Box::new(hugging_face::Folder::open(path)?)),
        false => Ok(Box::new(gguf::Gguf::open(path)?)),
    }
}

/// Maps a regular file.
fn map(path: &Path) -> Result<Arc<Mmap>, LoadError> {
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => LoadError::Missing(path.to_owned()),
        _ => LoadError::Io { path: path.to_owned(), source },
    };
    let file = File::open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        let reason = "not a regular file".to_owned();
        return Err(LoadError::Corrupt { path: path.to_owned(), reason });
    }
    // SAFETY: the mapping is read-only and private. As with every mapped model, changing the file
    // under a running worker is undefined; the README tells operators to replace model files by
    // rename.
    unsafe { Mmap::map(&file) }.map(Arc::new).map_err(io)
}
