//! How vectors are written, and the forms of other APIs.

use baton_tests::Cluster;
use baton_tests::binaries::EMBEDDER_NAME;
use serde_json::{Value, json};

use super::{difference, numbers, vectors};

/// Standard base64, decoded.
fn decoded(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter(|byte| *byte != b'=');
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in digits {
        let value = DIGITS.iter().position(|it| *it == digit).expect("a digit of base64");
        (bits, count) = ((bits << 6) | value as u32, count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    bytes
}

fn floats(bytes: &[u8], read: fn([u8; 4]) -> f32) -> Vec<f32> {
    let (words, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    words.iter().map(|word| read(*word)).collect()
}

#[tokio::test]
async fn vectors_are_the_same_in_every_format() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let with = |more: Value| {
        let mut body = json!({"input": ["A cat sleeps.", "Rates rose."]});
        body.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        body
    };
    let ask = async |more: Value| cluster.api.ok("/v1/embeddings", &with(more)).await;
    let expected = vectors(&ask(json!({})).await);
    let base64 = ask(json!({"encoding_format": "base64"})).await;
    let big = ask(json!({"encoding_format": "base64", "endianness": "big"})).await;
    let half = ask(json!({"encoding_format": "base64", "embed_dtype": "bfloat16"})).await;
    for (at, expected) in expected.iter().enumerate() {
        let text = |reply: &Value| {
            let text = reply["data"][at]["embedding"].as_str();
            decoded(text.unwrap_or_else(|| panic!("{reply}")))
        };
        assert_eq!(&floats(&text(&base64), f32::from_le_bytes), expected);
        assert_eq!(&floats(&text(&big), f32::from_be_bytes), expected);
        let halves = text(&half);
        let wide = halves.as_chunks::<2>().0.iter();
        let wide: Vec<f32> =
            wide.map(|it| f32::from_bits(u32::from(u16::from_le_bytes(*it)) << 16)).collect();
        assert!(difference(&wide, expected) < 0.002);
    }
    let (headers, bytes) =
        cluster.api.bytes("/v1/embeddings", &with(json!({"encoding_format": "bytes"}))).await;
    let metadata: Value =
        serde_json::from_slice(headers["metadata"].as_bytes()).expect("a header of JSON");
    assert_eq!(metadata["model"], EMBEDDER_NAME);
    assert!(metadata["usage"]["prompt_tokens"].as_u64().is_some_and(|tokens| tokens > 6));
    for (at, expected) in expected.iter().enumerate() {
        let item = &metadata["data"][at];
        assert_eq!((&item["index"], &item["shape"]), (&json!(at), &json!([384])), "{item}");
        let range = |end: &str| item[end].as_u64().expect("an offset") as usize;
        let of = &bytes[range("start")..range("end")];
        assert_eq!(&floats(of, f32::from_le_bytes), expected);
    }
    let only = with(json!({"encoding_format": "bytes_only", "embed_dtype": "fp8_e4m3"}));
    let (headers, bytes) = cluster.api.bytes("/v1/embeddings", &only).await;
    assert!(!headers.contains_key("metadata"));
    assert_eq!(bytes.len(), 2 * 384);
    // Without a length of one they point the same way.
    let long = vectors(&ask(json!({"normalize": false})).await);
    let length = |vector: &[f32]| vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    assert!((length(&expected[0]) - 1.0).abs() < 1e-5);
    let scaled: Vec<f32> = long[0].iter().map(|value| value / length(&long[0])).collect();
    assert!((length(&long[0]) - 1.0).abs() > 1e-3 && difference(&scaled, &expected[0]) < 1e-5);
    cluster.finish().await;
}

#[tokio::test]
async fn pooling_gives_texts_and_tokens_their_vectors() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let text = "A cat sleeps.";
    let embedding = vectors(&cluster.api.ok("/v1/embeddings", &json!({"input": text})).await);
    for task in [json!(null), json!("encode"), json!("embed")] {
        let reply = cluster.api.ok("/pooling", &json!({"input": text, "task": task})).await;
        assert!(reply["id"].as_str().is_some_and(|id| id.starts_with("pool-")), "{reply}");
        assert_eq!(reply["data"][0]["object"], "pooling");
        assert!(difference(&numbers(&reply["data"][0]["data"]), &embedding[0]) < 1e-5);
    }
    let body = json!({"input": text, "task": "token_embed"});
    let reply = cluster.api.ok("/pooling", &body).await;
    let rows = reply["data"][0]["data"].as_array().expect("rows");
    assert_eq!(reply["usage"]["prompt_tokens"], rows.len());
    assert!(rows.iter().all(|row| numbers(row).len() == 384));
    cluster.finish().await;
}

#[tokio::test]
async fn cohere_s_and_jina_s_forms_are_taken() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let texts = ["A cat sleeps on the sofa.", "Interest rates rose again."];
    let expected = vectors(&cluster.api.ok("/v1/embeddings", &json!({"input": texts})).await);
    let body = json!({
        "model": EMBEDDER_NAME,
        "texts": texts,
        "input_type": "search_document",
        "embedding_types": ["float", "base64", "binary", "ubinary"],
    });
    let reply = cluster.api.post("/v2/embed", &body).await;
    assert_eq!(reply.header("warning"), "");
    let reply = reply.ok();
    assert_eq!(reply["texts"], json!(texts));
    assert!(reply["meta"]["billed_units"]["input_tokens"].is_u64(), "{reply}");
    for (at, expected) in expected.iter().enumerate() {
        let of = &reply["embeddings"];
        assert!(difference(&numbers(&of["float"][at]), expected) < 1e-5);
        let base64 = decoded(of["base64"][at].as_str().expect("base64"));
        assert!(difference(&floats(&base64, f32::from_le_bytes), expected) < 1e-5);
        let (signed, unsigned) = (numbers(&of["binary"][at]), numbers(&of["ubinary"][at]));
        assert_eq!((signed.len(), unsigned.len()), (48, 48));
        let first = unsigned[0] as u8;
        assert_eq!(first & 0x80 != 0, expected[0] >= 0.0);
        assert_eq!(signed[0], unsigned[0] - 128.0);
    }
    let parts = json!({"inputs": [{"content": [{"type": "text", "text": texts[0]}]}]});
    let reply = cluster.api.ok("/v2/embed", &parts).await;
    assert!(difference(&numbers(&reply["embeddings"]["float"][0]), &expected[0]) < 1e-4);

    let jina = json!({
        "model": EMBEDDER_NAME,
        "input": [{"text": texts[0]}, texts[1]],
        "normalized": true,
        "embedding_type": "float",
        "truncate": true,
    });
    let reply = cluster.api.ok("/v1/embeddings", &jina).await;
    assert!(difference(&vectors(&reply)[0], &expected[0]) < 1e-5);
    cluster.finish().await;
}

#[tokio::test]
async fn one_route_of_sagemaker_s_does_it_all() {
    let cluster = Cluster::builder().unified(1).pooling(1).start().await;
    for (body, prefix) in [
        (json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}), "chatcmpl-"),
        (json!({"prompt": "Hi", "max_tokens": 2}), "cmpl-"),
        (json!({"input": "Hi"}), "embd-"),
        (json!({"text_1": "a", "text_2": "b"}), "score-"),
        (json!({"queries": "a", "documents": ["b"]}), "score-"),
        (json!({"query": "a", "documents": ["b"]}), "rerank-"),
        (json!({"input": "Hi", "task": "token_embed"}), "pool-"),
    ] {
        let reply = cluster.api.ok("/invocations", &body).await;
        assert!(reply["id"].as_str().is_some_and(|id| id.starts_with(prefix)), "{body}: {reply}");
    }
    let error = cluster.api.post("/invocations", &json!({"text": 1})).await.error(400);
    let error = error.expect("400");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("RerankRequest")), "{error}");
    cluster.finish().await;
}
