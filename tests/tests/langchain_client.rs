//! LangChain against a cluster: a client that many others are built on.

use baton_tests::binaries::MODEL_NAME;
use baton_tests::{Cluster, python};

/// The client's release that this test was written against.
const LANGCHAIN: &str = "langchain-openai==1.7.4";

#[tokio::test]
async fn langchain_invokes_streams_and_gets_structured_output() {
    let cluster = Cluster::builder().unified(1).api_key("client-key").start().await;
    let url = format!("{}/v1", cluster.api.base());
    let arguments = [&url, "client-key", MODEL_NAME];
    println!("{}", python::drive(LANGCHAIN, "langchain_client/drive.py", &arguments).await);
    cluster.finish().await;
}
