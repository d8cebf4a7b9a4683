//! A GPU that was opened.

use std::sync::Arc;

use crate::Error;

/// Whether there is a driver and at least one device.
pub fn present() -> bool {
    false
}

/// A GPU. Can be used from any thread.
pub struct Device {}

impl Device {
    /// Opens a GPU by its ordinal among those that the process sees.
    pub fn open(_ordinal: usize) -> Result<Arc<Self>, Error> {
        Err(Error::Absent("not yet written".into()))
    }

    /// Its name, such as `NVIDIA H200`.
    pub fn name(&self) -> String {
        String::new()
    }

    /// Free and all bytes of its memory.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        Err(Error::Absent("not yet written".into()))
    }

    /// What tells it from every other GPU.
    pub fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }
}
