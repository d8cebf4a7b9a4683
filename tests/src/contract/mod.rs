//! The gRPC contract as data: read from `.proto` files, compared, and spoken by a peer that knows
//! an earlier one only.
//!
//! * [`compare`]: what an earlier program would misread.
//! * [`shim`]: a peer of an earlier contract, in front of a worker of today.

pub mod compare;
pub mod shim;

use std::path::Path;
use std::process::Command;

use prost::Message as _;
use prost_types::FileDescriptorSet;

use crate::binaries::repository;

/// The contract as it is now.
pub fn current() -> FileDescriptorSet {
    read("proto/proto")
}

/// The contract in a folder of the repository.
pub fn read(folder: &str) -> FileDescriptorSet {
    compile(&repository().join(folder))
}

fn compile(root: &Path) -> FileDescriptorSet {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("contract.binpb");
    let program = std::env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let output = Command::new(program)
        .arg(format!("--proto_path={}", root.display()))
        .arg(format!("--descriptor_set_out={}", out.display()))
        .args(["--include_imports", "baton/v1/worker.proto", "baton/v1/coordinator.proto"])
        .output()
        .expect("run protoc, which building needs too");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", root.display());
    let bytes = std::fs::read(out).expect("what protoc wrote");
    FileDescriptorSet::decode(&*bytes).expect("a descriptor set")
}
