//! Products with many rows, by cuBLAS.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::cublas::sys;

use crate::driver::{Buffer, Stream};
use crate::{Device, Error};

/// What NVIDIA recommends for Hopper. Given once, so that products allocate nothing and can be
/// captured.
const WORKSPACE: usize = 32 << 20;

fn check(call: &'static str, status: sys::cublasStatus_t) -> Result<(), Error> {
    match status {
        sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(Error::Blas { call, code: status as u32 }),
    }
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// bf16.
    Store,
    /// Added to floats.
    Add,
    /// Floats.
    Floats,
}

/// cuBLAS on one stream.
pub(crate) struct Blas {
    handle: sys::cublasHandle_t,
    device: Arc<Device>,
    _workspace: Buffer<u8>,
}

// SAFETY: used by one thread at a time, whichever.
unsafe impl Send for Blas {}

impl Blas {
    pub(crate) fn new(stream: &Stream) -> Result<Self, Error> {
        // SAFETY: loads the library, whose initialization takes no arguments.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Library("libcublas.so"));
        }
        let device = stream.device().clone();
        device.bind()?;
        let workspace = Buffer::<u8>::new(&device, WORKSPACE, "cuBLAS's workspace")?;
        let mut handle = null_mut();
        // SAFETY: cuBLAS writes the handle.
        check("cublasCreate", unsafe { sys::cublasCreate_v2(&mut handle) })?;
        let blas = Self { handle, device, _workspace: workspace };
        // SAFETY: handle and stream live; both libraries name the same type of stream.
        check("cublasSetStream", unsafe { sys::cublasSetStream_v2(handle, stream.raw.cast()) })?;
        let workspace = blas._workspace.address(0) as *mut _;
        // SAFETY: the memory is `WORKSPACE` bytes and lives as long as the handle.
        check("cublasSetWorkspace", unsafe {
            sys::cublasSetWorkspace_v2(handle, workspace, WORKSPACE)
        })?;
        Ok(blas)
    }

    /// `out[row][n] = sum over k of x[row][k] w[n][k]`.
    ///
    /// # Safety
    /// The addresses are of device memory of these sizes, `out` of the type that `result` says.
    #[allow(clippy::too_many_arguments)]
    pub(crate) unsafe fn multiply(
        &self,
        x: u64,
        w: u64,
        out: u64,
        rows: usize,
        n: usize,
        k: usize,
        result: Outcome,
    ) -> Result<(), Error> {
        self.device.bind()?;
        let (one, zero) = (1.0f32, 0.0f32);
        let (half, single) = (sys::cudaDataType::CUDA_R_16BF, sys::cudaDataType::CUDA_R_32F);
        let out_type = if result == Outcome::Store { half } else { single };
        let beta = if result == Outcome::Add { &one } else { &zero };
        let (rows, n, k) = (rows as i32, n as i32, k as i32);
        // SAFETY: cuBLAS counts by columns: its A is w with k to a column, transposed; its B is x
        // with k to a column; its C is out with n to a column. The caller vouches for the memory.
        check("cublasGemmEx", unsafe {
            sys::cublasGemmEx(
                self.handle,
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                n,
                rows,
                k,
                (&raw const one).cast(),
                w as *const _,
                half,
                k,
                x as *const _,
                half,
                k,
                std::ptr::from_ref(beta).cast(),
                out as *mut _,
                out_type,
                n,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`.
            let _ = unsafe { sys::cublasDestroy_v2(self.handle) };
        }
    }
}
