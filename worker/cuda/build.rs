//! Compiles the kernels with nvcc, when the feature `cuda` asks for them.
//!
//! Each `.cu` becomes PTX for all GPUs from compute capability 8.0 on, which the driver compiles when
//! it loads it, and machine code for 9.0, which has what only those have. `BATON_CUDA_PTX=none` leaves
//! both empty: for the GPU double, which has the kernels in itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: [&str; 4] = ["decode_attention", "elementwise", "narrow", "prefill_attention"];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    for variable in ["BATON_CUDA_PTX", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let none = env::var("BATON_CUDA_PTX").is_ok_and(|value| value == "none");
    let nvcc = (!none).then(nvcc);
    for name in KERNELS {
        let source = Path::new("kernels").join(name).with_extension("cu");
        let (ptx, cubin) =
            (out.join(name).with_extension("ptx"), out.join(name).with_extension("cubin"));
        match &nvcc {
            Some(nvcc) => {
                compile(nvcc, &source, &ptx, &["-ptx", "-arch=compute_80"]);
                compile(nvcc, &source, &cubin, &["-cubin", "-arch=sm_90"]);
            }
            None => {
                write(&ptx, b"");
                write(&cubin, b"");
            }
        }
        // The driver takes PTX as a string that ends in zero.
        let mut text = fs::read(&ptx).unwrap_or_default();
        text.push(0);
        write(&ptx, &text);
    }
}

fn nvcc() -> PathBuf {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let homes = homes.map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = homes.chain(env::split_paths(&path));
    folders.find(|folder| folder.join("nvcc").is_file()).map(|folder| folder.join("nvcc")).unwrap_or_else(|| {
        fail("nvcc was not found by CUDA_HOME or PATH: `deploy/cuda-toolkit` fetches one and prints its CUDA_HOME. \
              BATON_CUDA_PTX=none builds without kernels, for the GPU double alone")
    })
}

fn compile(nvcc: &Path, source: &Path, target: &Path, arguments: &[&str]) {
    let mut command = Command::new(nvcc);
    command.args(["-O3", "-std=c++17"]).args(arguments);
    command.arg("-o").arg(target).arg(source);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("{command:?}: {status}")),
        Err(error) => fail(&format!("{command:?}: {error}")),
    }
}

fn write(path: &Path, bytes: &[u8]) {
    if let Err(error) = fs::write(path, bytes) {
        fail(&format!("{}: {error}", path.display()));
    }
}

fn fail(why: &str) -> ! {
    println!("cargo::error={why}");
    std::process::exit(1)
}
