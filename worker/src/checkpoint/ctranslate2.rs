//! `model.bin` of CTranslate2, binary version 6.
//!
//! Format: `python/ctranslate2/specs/model_spec.py` of the CTranslate2 project. All numbers are
//! little-endian; a string is its length with a closing zero, in two bytes, and its bytes:
//!
//! ```text
//! u32 version, string name of the spec, u32 revision
//! u32 variables, each: string name, u8 rank, u32 dims…, u8 type, u32 bytes, data
//! u32 aliases, each: string alias, string name
//! ```

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;

use super::{LoadError, TensorBytes, hugging_face};

/// The only version there is in use.
const VERSION: u32 = 6;

/// The file's variables.
pub(super) struct Variables {
    /// The spec's name, such as `WhisperSpec`.
    pub(super) spec: String,
    /// Those of floats, by name, aliases too.
    pub(super) tensors: HashMap<String, TensorBytes>,
    /// Whole numbers without dimensions.
    pub(super) scalars: HashMap<String, i64>,
}

/// Maps a file and checks all of its structure. What tells its weights from others goes into the
/// hasher.
pub(super) fn open(path: &Path, hasher: &mut blake3::Hasher) -> Result<Variables, LoadError> {
    let map = super::map(path)?;
    let file = File { path, map: &map };
    let mut at = 0;
    let version = file.u32(&mut at)?;
    if version != VERSION {
        let reason = format!(
            "CTranslate2 binary version {version} is not supported; convert the model with a \
             CTranslate2 that writes version {VERSION}"
        );
        return Err(LoadError::Unsupported { path: path.to_owned(), reason });
    }
    let spec = file.string(&mut at)?;
    let _revision = file.u32(&mut at)?;
    let (mut tensors, mut scalars) = (HashMap::new(), HashMap::new());
    for _ in 0..file.u32(&mut at)? {
        let name = file.string(&mut at)?;
        let rank = file.take::<1>(&mut at, &name)?[0];
        let dims = (0..rank)
            .map(|_| file.u32(&mut at).map(|dim| dim as usize))
            .collect::<Result<Vec<_>, _>>()?;
        let kind = file.take::<1>(&mut at, &name)?[0];
        let len = file.u32(&mut at)? as usize;
        let start = at;
        let data = file.bytes(&mut at, len, &name)?;
        hasher.update(name.as_bytes());
        super::hash_sample(hasher, data);
        let elements = dims.iter().try_fold(1usize, |all, dim| all.checked_mul(*dim));
        let sized = |bytes: usize| match elements.and_then(|all| all.checked_mul(bytes)) {
            Some(bytes) if bytes == len => Ok(()),
            _ => Err(file.corrupt(format!("{name} is {dims:?} in {len} bytes"))),
        };
        let dtype = match kind {
            0 => Some((GgmlDType::F32, 4)),
            4 => Some((GgmlDType::F16, 2)),
            5 => Some((GgmlDType::BF16, 2)),
            _ => None,
        };
        match (dtype, kind, data) {
            (Some((dtype, bytes)), ..) => {
                sized(bytes)?;
                tensors.insert(name, hugging_face::tensor(&map, start, len, dtype, &dims));
            }
            (None, 1, &[a]) => drop(scalars.insert(name, i64::from(a as i8))),
            (None, 2, &[a, b]) => drop(scalars.insert(name, i64::from(i16::from_le_bytes([a, b])))),
            (None, 3, &[a, b, c, d]) => {
                scalars.insert(name, i64::from(i32::from_le_bytes([a, b, c, d])));
            }
            // Flags in more than one number, and quantized weights, which are missed by their name.
            _ => {}
        }
    }
    for _ in 0..file.u32(&mut at)? {
        let (alias, name) = (file.string(&mut at)?, file.string(&mut at)?);
        if let Some(tensor) = tensors.get(&name).cloned() {
            tensors.insert(alias, tensor);
        }
    }
    hasher.update(&(map.len() as u64).to_le_bytes());
    Ok(Variables { spec, tensors, scalars })
}

struct File<'a> {
    path: &'a Path,
    map: &'a Arc<Mmap>,
}

impl File<'_> {
    fn corrupt(&self, reason: String) -> LoadError {
        LoadError::Corrupt { path: self.path.to_owned(), reason }
    }

    fn bytes(&self, at: &mut usize, len: usize, what: &str) -> Result<&[u8], LoadError> {
        let bytes = at.checked_add(len).and_then(|end| self.map.get(*at..end));
        let bytes = bytes.ok_or_else(|| LoadError::Truncated {
            path: self.path.to_owned(),
            tensor: what.to_owned(),
            needs: *at as u64 + len as u64,
            has: self.map.len() as u64,
        })?;
        *at += len;
        Ok(bytes)
    }

    fn take<const N: usize>(&self, at: &mut usize, what: &str) -> Result<[u8; N], LoadError> {
        let bytes = self.bytes(at, N, what)?;
        bytes.try_into().map_err(|_| self.corrupt(format!("{what} is cut")))
    }

    fn u32(&self, at: &mut usize) -> Result<u32, LoadError> {
        self.take(at, "the header").map(u32::from_le_bytes)
    }

    fn string(&self, at: &mut usize) -> Result<String, LoadError> {
        let len = u16::from_le_bytes(self.take(at, "the header")?) as usize;
        match self.bytes(at, len, "the header")? {
            [text @ .., 0] => String::from_utf8(text.to_vec())
                .map_err(|_| self.corrupt("a name is not UTF-8".into())),
            _ => Err(self.corrupt("a name has no end".into())),
        }
    }
}
