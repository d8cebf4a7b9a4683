//! Workers on a GPU, or on its double.
//!
//! `tests/gpu/build` builds them, beside the other programs. The double is the driver's and the
//! libraries' functions in C++, computed by the processor: see `tests/gpu/README.md`. With
//! `BATON_TEST_GPU=real` the machine's own driver and GPU are used.

use std::path::PathBuf;

use crate::binaries::build_dir;
use crate::cluster::{Builder, Cluster};

/// Whether there is a GPU.
pub fn real() -> bool {
    std::env::var_os("BATON_TEST_GPU").is_some_and(|which| which == "real")
}

/// A worker that was built for GPUs.
pub fn worker() -> PathBuf {
    let path = build_dir().join("baton-worker-cuda");
    assert!(path.is_file(), "{} is missing: tests/gpu/build says why", path.display());
    path
}

/// What such a worker needs in its environment.
pub fn environment() -> Vec<(&'static str, String)> {
    if real() {
        return Vec::new();
    }
    let libraries = build_dir().join("gpu-double");
    let built = libraries.join("complete").is_file();
    assert!(built, "{} is not complete: tests/gpu/build says why", libraries.display());
    vec![
        ("LD_LIBRARY_PATH", libraries.display().to_string()),
        // On the double the matrix products of a library are much faster than a kernel's.
        ("BATON_CUDA_NARROW_ROWS", "0".into()),
    ]
}

/// A cluster whose workers compute on the GPU.
pub fn cluster() -> Builder {
    let builder = Cluster::builder().worker_program(worker(), &environment());
    builder.worker_arg("--device", "cuda").kv_memory("64MiB")
}
