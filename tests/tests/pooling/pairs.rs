//! Scores and ranks, of embedders and of cross-encoders; classes.

use baton_tests::Cluster;
use baton_tests::binaries::repository;
use baton_tests::reference::Tensors;
use serde_json::{Value, json};

use super::{cosine, numbers, vectors};

fn scores(reply: &Value) -> Vec<f64> {
    let data = reply["data"].as_array().unwrap_or_else(|| panic!("{reply}"));
    data.iter().map(|item| item["score"].as_f64().expect("a score")).collect()
}

#[tokio::test]
async fn an_embedder_scores_by_the_cosine() {
    let cluster = Cluster::builder().pooling(1).start().await;
    let api = &cluster.api;
    let query = "Who sleeps?";
    let documents = ["Interest rates rose again.", "A cat sleeps on the sofa.", "It rains."];
    let all = [&[query][..], &documents[..]].concat();
    let embedded = vectors(&api.ok("/v1/embeddings", &json!({"input": all})).await);
    let expected: Vec<f64> =
        embedded[1..].iter().map(|vector| cosine(&embedded[0], vector)).collect();
    for (path, body) in [
        ("/score", json!({"text_1": query, "text_2": documents})),
        ("/v1/score", json!({"queries": query, "documents": documents})),
        ("/score", json!({"data_1": [query, query, query], "data_2": documents})),
    ] {
        let reply = api.ok(path, &body).await;
        assert!(reply["id"].as_str().is_some_and(|id| id.starts_with("score-")), "{reply}");
        for (score, expected) in scores(&reply).iter().zip(&expected) {
            assert!((score - expected).abs() < 1e-4, "{body}: {score} is not {expected}");
        }
    }
    let body = json!({"query": query, "documents": documents, "top_n": 2});
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let reply = api.ok(path, &body).await;
        let results = reply["results"].as_array().expect("results");
        assert_eq!(results.len(), 2, "{reply}");
        assert_eq!(results[0]["index"], 1);
        assert_eq!(results[0]["document"], json!({"text": documents[1], "multi_modal": null}));
        let best = results[0]["relevance_score"].as_f64().expect("a score");
        assert!((best - expected[1]).abs() < 1e-4, "{best} is not {}", expected[1]);
        assert_eq!(reply["usage"]["prompt_tokens"], reply["usage"]["total_tokens"]);
    }
    // Cohere's first form, and Jina's objects.
    let cohere = json!({
        "query": query,
        "documents": [{"title": "Money", "text": documents[0]}, {"title": "Cats", "text": documents[1]}],
        "rank_fields": ["title", "text"],
        "return_documents": false,
        "max_tokens_per_doc": 512,
    });
    let reply = api.ok("/v1/rerank", &cohere).await;
    assert_eq!(reply["results"][0]["index"], 1, "{reply}");
    assert!(reply["results"][0].get("document").is_none(), "{reply}");
    let jina =
        json!({"query": query, "documents": [{"text": documents[0]}, {"text": documents[1]}]});
    let reply = api.ok("/v1/rerank", &jina).await;
    assert_eq!(reply["results"][0]["document"]["text"], documents[1], "{reply}");
    // A document is cut when the request says so.
    let long = json!({"query": query, "documents": ["river ".repeat(600)]});
    api.post("/rerank", &long).await.error(400).expect("400");
    let mut cut = long.clone();
    cut["max_tokens_per_doc"] = json!(4096);
    assert!(api.ok("/rerank", &cut).await["usage"]["total_tokens"].as_u64() < Some(270));
    cluster.finish().await;
}

/// Texts of a fixture: what its tokens say, between the special ones. The fixture's tokenizer has a
/// token for each byte, so nothing is lost but what was cut within a letter.
async fn texts_of(cluster: &Cluster, model: &str, tokens: &[u32]) -> Option<String> {
    let body = json!({"model": model, "tokens": tokens});
    let text = cluster.api.ok("/detokenize", &body).await["prompt"].as_str()?.to_owned();
    (!text.is_empty() && !text.contains('\u{fffd}')).then_some(text)
}

/// The pairs of a fixture, and the numbers of its tensor `values`, `width` for each.
async fn pairs_of(
    cluster: &Cluster,
    name: &str,
    width: usize,
) -> Vec<(String, String, usize, Vec<f32>)> {
    const SEPARATOR: u32 = 2;
    let tensors = Tensors::load(&format!("pooling/{name}.safetensors"));
    let mut tokens = tensors.numbers("tokens").into_iter();
    let logits = tensors.floats("logits");
    let mut pairs = Vec::new();
    for (length, values) in tensors.numbers("lengths").into_iter().zip(logits.chunks(width)) {
        let row: Vec<u32> = tokens.by_ref().take(length as usize).collect();
        let mut texts = row[1..].split(|token| *token == SEPARATOR);
        let (first, second) = (texts.next().expect("a text"), texts.next().expect("a text"));
        let first = texts_of(cluster, name, first).await;
        let second = texts_of(cluster, name, second).await;
        if let (Some(first), Some(second)) = (first, second) {
            pairs.push((first, second, row.len(), values.to_vec()));
        }
    }
    assert!(pairs.len() >= 5, "{} pairs", pairs.len());
    pairs
}

fn model(name: &str) -> std::path::PathBuf {
    repository().join("tests/reference/pooling").join(name)
}

#[tokio::test]
async fn a_cross_encoder_reads_both_texts_in_one_sequence() {
    let name = "cross_encoder";
    let cluster = Cluster::builder().pooling_model(1, model(name), name).start().await;
    let pairs = pairs_of(&cluster, name, 1).await;
    let firsts: Vec<&str> = pairs.iter().map(|(first, ..)| first.as_str()).collect();
    let seconds: Vec<&str> = pairs.iter().map(|(_, second, ..)| second.as_str()).collect();
    let body = json!({"text_1": firsts, "text_2": seconds, "use_activation": false});
    let reply = cluster.api.ok("/score", &body).await;
    let tokens: usize = pairs.iter().map(|(_, _, tokens, _)| tokens).sum();
    assert_eq!(reply["usage"]["prompt_tokens"], tokens);
    for (score, (first, second, _, expected)) in scores(&reply).iter().zip(&pairs) {
        let expected = f64::from(expected[0]);
        let apart = (score - expected).abs();
        assert!(apart < 0.01 + 0.002 * expected.abs(), "{first:?} {second:?}: {score} {expected}");
    }
    let ranked = json!({"query": firsts[0], "documents": seconds, "use_activation": false});
    let reply = cluster.api.ok("/rerank", &ranked).await;
    let results = reply["results"].as_array().expect("results");
    let of = |item: &Value| item["relevance_score"].as_f64().expect("a score");
    assert!(results.windows(2).all(|two| of(&two[0]) >= of(&two[1])), "{reply}");
    let query = json!({"text_1": firsts[0], "text_2": seconds, "use_activation": false});
    let scored = scores(&cluster.api.ok("/score", &query).await);
    for result in results {
        let at = result["index"].as_u64().expect("a place") as usize;
        assert!((of(result) - scored[at]).abs() < 1e-4, "{result}");
    }
    // What does not fit beside the query is cut, when that is asked for.
    let long = json!({"query": "one", "documents": ["x".repeat(500)], "max_tokens_per_doc": 300});
    let usage = &cluster.api.ok("/v2/rerank", &long).await["usage"];
    assert_eq!(usage["total_tokens"], 128, "{usage}");
    cluster.finish().await;
}

#[tokio::test]
async fn classes_have_names_and_probabilities() {
    let name = "bert_classifier";
    let cluster = Cluster::builder().pooling_model(1, model(name), name).start().await;
    let texts = ["river stone", "seven windows", "a"];
    let raw = json!({"input": texts, "use_activation": false});
    let raw = cluster.api.ok("/classify", &raw).await;
    let reply = cluster.api.ok("/classify", &json!({"input": texts})).await;
    assert!(reply["id"].as_str().is_some_and(|id| id.starts_with("classify-")), "{reply}");
    let labels = ["calm", "glad", "sad"];
    for at in 0..texts.len() {
        let item = &reply["data"][at];
        let probs = numbers(&item["probs"]);
        assert_eq!((&item["index"], &item["num_classes"]), (&json!(at), &json!(3)), "{item}");
        let logits = numbers(&raw["data"][at]["probs"]);
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        for (prob, logit) in probs.iter().zip(&logits) {
            assert!((prob - logit.exp() / sum).abs() < 1e-4, "{probs:?} of {logits:?}");
        }
        let best = (0..3).max_by(|a, b| probs[*a].total_cmp(&probs[*b])).expect("a class");
        assert_eq!(item["label"], labels[best]);
    }
    // The model has no embeddings to give.
    cluster.api.post("/v1/embeddings", &json!({"input": "a"})).await.error(400).expect("400");
    cluster.finish().await;
}
