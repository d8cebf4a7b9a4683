//! GGUF files: candle parses the header, the weights stay in the mapping.
//!
//! Format: the GGUF specification of the ggml project (`docs/gguf.md`). Everything that the header
//! claims is checked against the file before it is used, so that a truncated or corrupt file is an
//! error here and never a fault later.

use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use memmap2::{Mmap, UncheckedAdvice};

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
    #[error("model file {} is not a valid GGUF file: {reason}; fetch it again", path.display())]
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
}

/// A mapped and checked GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    content: Content,
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

    /// Lets go of the tensor's pages in memory; they are read from the file again when needed.
    pub fn forget(&self) {
        // What the mapping of a tensor shares with its neighbours stays. A failure costs memory only.
        let start = self.start.next_multiple_of(PAGE);
        let len = (self.start + self.len).saturating_sub(start) / PAGE * PAGE;
        // SAFETY: the mapping is private, read-only and of a file, so the pages' content is there
        // again at the next access.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
    }

    /// A tensor that is not in a file, for tests of what reads one.
    #[cfg(test)]
    pub(crate) fn anonymous(bytes: &[u8], dtype: GgmlDType, dims: Vec<usize>) -> Self {
        let mut map = memmap2::MmapMut::map_anon(bytes.len().max(1)).unwrap();
        map[..bytes.len()].copy_from_slice(bytes);
        let map = Arc::new(map.make_read_only().unwrap());
        Self { map, start: 0, len: bytes.len(), dtype, dims }
    }
}

impl Gguf {
    /// Maps a file and checks its header.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound => LoadError::Missing(path.to_owned()),
            _ => LoadError::Io { path: path.to_owned(), source },
        };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            let reason = "not a regular file".to_owned();
            return Err(LoadError::Corrupt { path: path.to_owned(), reason });
        }
        // SAFETY: the mapping is read-only and private. As with every mapped model, changing the
        // file under a running worker is undefined; the README tells operators to replace model
        // files by rename.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let corrupt = |reason: String| LoadError::Corrupt { path: path.to_owned(), reason };
        let content = Content::read(&mut Cursor::new(&map[..]))
            .map_err(|error| corrupt(error.to_string().lines().next().unwrap_or("").to_owned()))?;
        let gguf = Self { path: path.to_owned(), map: Arc::new(map), content };
        let mut names: Vec<_> = gguf.content.tensor_infos.keys().collect();
        names.sort();
        for name in names {
            gguf.tensor(name)?;
        }
        Ok(gguf)
    }

    /// The parsed header.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Hash of the header and the file's length: equal for files that hold the same model.
    pub fn digest(&self) -> String {
        let header = (self.content.tensor_data_offset as usize).min(self.map.len());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.map[..header]);
        hasher.update(&(self.map.len() as u64).to_le_bytes());
        hasher.finalize().to_hex().to_string()
    }

    /// Whether the file has a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A tensor's bytes.
    pub fn tensor(&self, name: &str) -> Result<TensorBytes, LoadError> {
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

    /// A whole number in the metadata.
    pub fn usize(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_usize(key)?
            .ok_or_else(|| self.corrupt(format!("metadata key {key} is missing")))
    }

    /// A whole number that may be absent.
    pub fn optional_usize(&self, key: &str) -> Result<Option<usize>, LoadError> {
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
    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
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
    pub fn optional_str(&self, key: &str) -> Result<Option<&str>, LoadError> {
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

    /// An error that says the file is damaged.
    pub fn corrupt(&self, reason: String) -> LoadError {
        LoadError::Corrupt { path: self.path.clone(), reason }
    }

    /// An error that says the file is sound but beyond this engine.
    pub fn unsupported(&self, reason: String) -> LoadError {
        LoadError::Unsupported { path: self.path.clone(), reason }
    }
}
