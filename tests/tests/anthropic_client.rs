//! The official `anthropic` Python client against a cluster.

use baton_tests::binaries::MODEL_NAME;
use baton_tests::{Cluster, python};

/// The client's release that this test was written against.
const ANTHROPIC: &str = "anthropic==2.13.0";

#[tokio::test]
async fn the_official_client_drives_messages_streaming_tools_counting_and_errors() {
    let cluster = Cluster::builder().unified(1).api_key("client-key").start().await;
    let arguments = [cluster.api.base(), "client-key", MODEL_NAME];
    println!("{}", python::drive(ANTHROPIC, "anthropic_client/drive.py", &arguments).await);
    cluster.finish().await;
}
