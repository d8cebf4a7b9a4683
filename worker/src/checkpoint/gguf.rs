//! GGUF files: candle parses the header, the weights stay in the mapping.
//!
//! Format: the GGUF specification of the ggml project (`docs/gguf.md`). Everything that the header
//! claims is checked against the file before it is used, so that a truncated or corrupt file is an
//! error here and never a fault later.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_proto::TokenizerBundle;

use candle_core::quantized::gguf_file::{Content, Value};
use memmap2::Mmap;

use super::{Checkpoint, LoadError, TensorBytes, gguf_architecture, gguf_tokenizer};
use crate::model::ModelConfig;

/// A mapped and checked GGUF file.
pub(super) struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    content: Content,
}

impl Gguf {
    /// Maps a file and checks its header.
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let map = super::map(path)?;
        let corrupt = |reason: String| LoadError::Corrupt { path: path.to_owned(), reason };
        let content = Content::read(&mut Cursor::new(&map[..]))
            .map_err(|error| corrupt(error.to_string().lines().next().unwrap_or("").to_owned()))?;
        let gguf = Self { path: path.to_owned(), map, content };
        let mut names: Vec<_> = gguf.content.tensor_infos.keys().collect();
        names.sort();
        for name in names {
            gguf.tensor(name)?;
        }
        Ok(gguf)
    }

    /// The parsed header.
    pub(super) fn content(&self) -> &Content {
        &self.content
    }

    /// A whole number in the metadata.
    pub(super) fn usize(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_usize(key)?
            .ok_or_else(|| self.corrupt(format!("metadata key {key} is missing")))
    }

    /// A whole number that may be absent.
    pub(super) fn optional_usize(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.content
            .metadata
            .get(key)
            .map(|value| match *value {
                Value::U8(v) => Some(v.into()),
                Value::U16(v) => Some(v.into()),
                Value::U32(v) => usize::try_from(v).ok(),
                Value::U64(v) => usize::try_from(v).ok(),
                Value::I32(v) => usize::try_from(v).ok(),
                Value::I64(v) => usize::try_from(v).ok(),
                _ => None,
            })
            .map(|value| {
                value.ok_or_else(|| self.corrupt(format!("metadata key {key} is no whole number")))
            })
            .transpose()
    }

    /// A float that may be absent.
    pub(super) fn optional_f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
        self.content
            .metadata
            .get(key)
            .map(|value| {
                value
                    .to_f32()
                    .map_err(|_| self.corrupt(format!("metadata key {key} is no 32-bit float")))
            })
            .transpose()
    }

    /// A string that may be absent.
    pub(super) fn optional_str(&self, key: &str) -> Result<Option<&str>, LoadError> {
        self.content
            .metadata
            .get(key)
            .map(|value| {
                value
                    .to_string()
                    .map(String::as_str)
                    .map_err(|_| self.corrupt(format!("metadata key {key} is no string")))
            })
            .transpose()
    }
}

impl Checkpoint for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> Result<ModelConfig, LoadError> {
        gguf_architecture::config(self)
    }

    fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<TensorBytes, LoadError> {
        let info = self
            .content
            .tensor_infos
            .get(name)
            .ok_or_else(|| self.corrupt(format!("tensor {name} is missing")))?;
        let dims = info.shape.dims().to_vec();
        let (block, block_bytes) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        let row = dims.last().copied().unwrap_or(1);
        if row % block != 0 {
            return Err(self.corrupt(format!("tensor {name}: rows of {row} in blocks of {block}")));
        }
        let len = dims
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim as u64))
            .and_then(|elements| (elements / block as u64).checked_mul(block_bytes as u64));
        let start = self.content.tensor_data_offset.checked_add(info.offset);
        let end = start.zip(len).and_then(|(start, len)| start.checked_add(len));
        let has = self.map.len() as u64;
        match (start, len, end) {
            (Some(start), Some(len), Some(end)) if end <= has => Ok(TensorBytes {
                map: self.map.clone(),
                start: start as usize,
                len: len as usize,
                dtype: info.ggml_dtype,
                dims,
            }),
            _ => Err(LoadError::Truncated {
                path: self.path.clone(),
                tensor: name.to_owned(),
                needs: end.unwrap_or(u64::MAX),
                has,
            }),
        }
    }

    fn tokenizer(&self) -> Result<TokenizerBundle, LoadError> {
        gguf_tokenizer::bundle(self)
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>, LoadError> {
        gguf_tokenizer::eos_token_ids(self)
    }

    /// Of the header, the file's length, and a sample of each tensor.
    fn digest(&self) -> String {
        let header = (self.content.tensor_data_offset as usize).min(self.map.len());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.map[..header]);
        hasher.update(&(self.map.len() as u64).to_le_bytes());
        let mut names: Vec<_> = self.content.tensor_infos.keys().collect();
        names.sort();
        // All were found sound when the file was opened.
        for tensor in names.into_iter().filter_map(|name| self.tensor(name).ok()) {
            super::hash_sample(&mut hasher, tensor.bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file with this metadata and no tensors.
    pub(in crate::checkpoint) fn of(metadata: &[(&str, Value)]) -> Gguf {
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        let mut bytes = Cursor::new(Vec::new());
        candle_core::quantized::gguf_file::write(&mut bytes, &metadata, &[]).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes.into_inner()).unwrap();
        Gguf::open(file.path()).unwrap()
    }
}
