//! The official `openai` Python client against a cluster.

use baton_tests::binaries::{EMBEDDER_NAME, MODEL_NAME, WHISPER_NAME};
use baton_tests::speech::{SENTENCES, say};
use baton_tests::{Cluster, python};

/// The client's release that this test was written against.
const OPENAI: &str = "openai==3.54.0";

#[tokio::test]
async fn the_official_client_drives_chat_completions_streaming_models_and_errors() {
    let builder = Cluster::builder().prefill(1).decode(1).handoff_min_tokens(16);
    let cluster = builder.api_key("client-key").start().await;
    let url = format!("{}/v1", cluster.api.base());
    let arguments = [&url, "client-key", MODEL_NAME];
    println!("{}", python::drive(OPENAI, "openai_client/drive.py", &arguments).await);
    cluster.finish().await;
}

#[tokio::test]
async fn the_official_client_drives_embeddings() {
    let builder = Cluster::builder().unified(1).pooling(1);
    let cluster = builder.api_key("client-key").start().await;
    let url = format!("{}/v1", cluster.api.base());
    let arguments = [&url, "client-key", EMBEDDER_NAME, MODEL_NAME];
    println!("{}", python::drive(OPENAI, "openai_client/embeddings.py", &arguments).await);
    cluster.finish().await;
}

#[tokio::test]
async fn the_official_client_drives_audio() {
    let builder = Cluster::builder().unified(1).audio(1);
    let cluster = builder.api_key("client-key").start().await;
    let url = format!("{}/v1", cluster.api.base());
    let recording = cluster.dir().join("said.wav");
    std::fs::write(&recording, say(SENTENCES[0], "en-us")).expect("write the recording");
    let recording = recording.display().to_string();
    let arguments = [&url, "client-key", WHISPER_NAME, MODEL_NAME, &recording, "meeting"];
    println!("{}", python::drive(OPENAI, "openai_client/audio.py", &arguments).await);
    cluster.finish().await;
}

#[tokio::test]
async fn the_official_client_drives_responses() {
    let cluster = Cluster::builder().unified(1).api_key("client-key").start().await;
    let url = format!("{}/v1", cluster.api.base());
    let arguments = [&url, "client-key", MODEL_NAME];
    println!("{}", python::drive(OPENAI, "openai_client/responses.py", &arguments).await);
    cluster.finish().await;
}
