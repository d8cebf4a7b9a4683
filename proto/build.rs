//! Compiles the `.proto` files. Needs `protoc` (Debian: `protobuf-compiler`), as etcd-client does.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure()
        // Block payloads, tokenizer files and sound are moved, never copied.
        .bytes(".baton.v1.BlockData.payload")
        .bytes(".baton.v1.ModelChunk.payload")
        .bytes(".baton.v1.AudioWindow.samples")
        .compile_protos(
            &["proto/baton/v1/worker.proto", "proto/baton/v1/coordinator.proto"],
            &["proto"],
        )?;
    Ok(())
}
