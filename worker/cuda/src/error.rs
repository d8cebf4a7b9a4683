//! What can fail.

/// A failure of the GPU's side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver, or it has no device.
    #[error("no NVIDIA driver and GPU on this machine: {0}")]
    Absent(String),
    /// A library that is needed beside the driver cannot be loaded.
    #[error("{0} cannot be loaded: is it on the library path?")]
    Library(&'static str),
    /// A call of the driver failed.
    #[error("{call}: {name} ({code})")]
    Driver {
        /// The function.
        call: &'static str,
        /// `CUresult` in words.
        name: String,
        /// `CUresult`.
        code: u32,
    },
    /// A call of cuBLAS failed.
    #[error("{call}: cuBLAS status {code}")]
    Blas {
        /// The function.
        call: &'static str,
        /// `cublasStatus_t`.
        code: u32,
    },
    /// A call of NCCL failed, the peer went away, or the link was aborted.
    #[error("{call}: NCCL: {reason}")]
    Nccl {
        /// The function.
        call: &'static str,
        /// What NCCL says of it.
        reason: String,
    },
    /// The device's memory does not hold this.
    #[error("{what}: {wanted} bytes wanted, {free} bytes of device memory are free")]
    Memory {
        /// What was to be allocated.
        what: &'static str,
        /// Bytes.
        wanted: usize,
        /// Bytes.
        free: usize,
    },
    /// A model that the kernels do not compute.
    #[error("not supported on a GPU: {0}")]
    Unsupported(String),
    /// Weights, blocks or a step that do not fit what they are for.
    #[error("{0}")]
    Mismatch(String),
    /// A token id that the embedding table does not have.
    #[error("token id {0} is outside the vocabulary")]
    TokenOutOfRange(u32),
    /// The pass was stopped by its flag. The same batch can be computed again.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Whether the process can do nothing more with the device: what a kernel did wrong, or the
    /// hardware, ends the context, and every later call fails with it. Only a new process helps.
    pub fn is_lost(&self) -> bool {
        // Of `CUresult`: what its documentation says leaves the process in an inconsistent state,
        // and what comes of a context that was ended.
        matches!(self, Self::Driver { code: 4 | 201 | 214 | 700 | 702 | 708..=719 | 721 | 999, .. })
    }
}
