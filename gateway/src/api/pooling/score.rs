//! `POST /score` and `POST /rerank`: which texts are compared with which.

use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::sampling::in_range;
use super::replies::{OneText, Texts};
use super::{Naming, checked, count, empty, text_of};
use crate::error::ApiError;

/// The most tokens that a field may ask for.
const MOST_TOKENS: i64 = u32::MAX as i64;

/// The fields that scores and ranks share.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct PairFields {
    /// Keep this many tokens of each query; 0 is all.
    #[schema(minimum = 0, maximum = 4294967295i64)]
    max_tokens_per_query: Option<i64>,
    /// Keep this many tokens of each document, and no more than fit beside the query; 0 is off.
    #[schema(minimum = 0, maximum = 4294967295i64)]
    max_tokens_per_doc: Option<i64>,
}

/// The texts of `POST /score`: two fields of these.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ScoreFields {
    /// One text, or as many as there are on the other side.
    #[schema(value_type = Option<Texts>)]
    queries: Option<Value>,
    /// What `queries` are compared with.
    #[schema(value_type = Option<Texts>)]
    documents: Option<Value>,
    /// The same as `documents`.
    #[schema(value_type = Option<Texts>)]
    items: Option<Value>,
    /// The same as `queries`, with `data_2`.
    #[schema(value_type = Option<Texts>)]
    data_1: Option<Value>,
    /// What `data_1` is compared with.
    #[schema(value_type = Option<Texts>)]
    data_2: Option<Value>,
    /// The same as `queries`, with `text_2`.
    #[schema(value_type = Option<Texts>)]
    text_1: Option<Value>,
    /// What `text_1` is compared with.
    #[schema(value_type = Option<Texts>)]
    text_2: Option<Value>,
}

/// The fields of `POST /rerank`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct RerankFields {
    /// What is looked for.
    #[schema(value_type = OneText)]
    query: Option<Value>,
    /// Where.
    #[schema(value_type = Texts)]
    documents: Option<Value>,
    /// How many documents are returned; 0 is all.
    #[schema(minimum = 0)]
    top_n: Option<i64>,
    /// Return the documents' texts; on by default.
    return_documents: Option<bool>,
    /// Of documents that are objects, the fields that count, in this order; by default `text`.
    #[schema(min_items = 1)]
    rank_fields: Option<Vec<String>>,
}

/// Pairs of texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// One for all of `second`, or one for each.
    pub first: Vec<String>,
    /// How messages name those.
    pub first_naming: Naming,
    /// At least as many as `first`.
    pub second: Vec<String>,
    /// How messages name those.
    pub second_naming: Naming,
}

/// What `POST /rerank` is asked for.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// The query with each document.
    pub pairs: Pairs,
    /// How many documents are returned.
    pub top: usize,
    /// The documents as they are returned, if they are.
    pub documents: Option<Vec<Value>>,
}

impl PairFields {
    /// Tokens to keep of each text of the first and of the second side.
    pub fn limits(&self) -> Result<(Option<usize>, Option<usize>), ApiError> {
        let limit = |field, value| {
            let tokens = in_range(field, value, 0, 0..=MOST_TOKENS)?;
            Ok((tokens > 0).then_some(tokens as usize))
        };
        Ok((
            limit("max_tokens_per_query", self.max_tokens_per_query)?,
            limit("max_tokens_per_doc", self.max_tokens_per_doc)?,
        ))
    }
}

impl ScoreFields {
    /// The pairs, of at most `most` texts on a side.
    pub fn pairs(&self, most: usize) -> Result<Pairs, ApiError> {
        let sides = [
            ("queries", &self.queries, "documents", &self.documents),
            ("queries", &self.queries, "items", &self.items),
            ("data_1", &self.data_1, "data_2", &self.data_2),
            ("text_1", &self.text_1, "text_2", &self.text_2),
        ];
        let given = sides.into_iter().find_map(|(one, first, two, second)| {
            Some((one, first.as_ref()?, two, second.as_ref()?))
        });
        let Some((one, first, two, second)) = given else {
            let message = "Two fields are required: `queries` and `documents`, `queries` and \
                           `items`, `data_1` and `data_2`, or `text_1` and `text_2`.";
            return Err(ApiError::malformed(message).param("queries"));
        };
        let (first, first_naming) = texts(one, first, most)?;
        let (second, second_naming) = texts(two, second, most)?;
        if first.len() != 1 && first.len() != second.len() {
            let message = format!(
                "Input lengths must be either 1:1, 1:N or N:N, but `{one}` has {} texts and \
                 `{two}` {}.",
                first.len(),
                second.len()
            );
            return Err(ApiError::bad_value(one, message));
        }
        Ok(Pairs { first, first_naming, second, second_naming })
    }
}

impl RerankFields {
    /// What is asked for, of at most `most` documents.
    pub fn ranking(&self, most: usize) -> Result<Ranking, ApiError> {
        let required =
            |field: &str| ApiError::malformed(format!("`{field}` is required.")).param(field);
        let query = self.query.as_ref().ok_or_else(|| required("query"))?;
        let documents = self.documents.as_ref().ok_or_else(|| required("documents"))?;
        let first_naming = Naming { field: "query", listed: false };
        let query = match parts(query) {
            Some(parts) => parts
                .iter()
                .map(|part| of_part(part, "query"))
                .collect::<Result<Vec<_>, _>>()?
                .join("\n"),
            None => match text_of(query) {
                Some(text) => text.to_owned(),
                None => {
                    let message = "`query` must be a string, or an object with `text`.";
                    return Err(ApiError::malformed(message).param("query"));
                }
            },
        };
        let query = checked(&query, "query")?;
        let (second, second_naming) = match (&self.rank_fields, documents) {
            (Some(fields), Value::Array(list)) => {
                count("documents", list.len(), most)?;
                (by_fields(list, fields)?, Naming { field: "documents", listed: true })
            }
            _ => texts("documents", documents, most)?,
        };
        let top = in_range("top_n", self.top_n, 0, 0..=i64::MAX)?;
        let top = if top == 0 { second.len() } else { usize::try_from(top).unwrap_or(usize::MAX) };
        let returned = self.return_documents.unwrap_or(true).then(|| {
            let list = documents.as_array();
            let of = |(at, text): (usize, &String)| match list.and_then(|list| list.get(at)) {
                Some(object @ Value::Object(_)) => object.clone(),
                _ => json!({"text": text, "multi_modal": null}),
            };
            second.iter().enumerate().map(of).collect()
        });
        let pairs = Pairs { first: vec![query], first_naming, second, second_naming };
        Ok(Ranking { pairs, top, documents: returned })
    }
}

/// The texts of a field: a string, an object, or a list of those.
fn texts(
    field: &'static str,
    value: &Value,
    most: usize,
) -> Result<(Vec<String>, Naming), ApiError> {
    let wrong = |name: String| {
        let message = format!(
            "`{name}` must be a string, an object with `text` or with `content` of text parts, or \
             a list of those."
        );
        ApiError::malformed(message).param(name)
    };
    let naming = Naming { field, listed: true };
    if let Some(list) = parts(value) {
        // vLLM's form of several: an object whose parts are one text each.
        count(field, list.len(), most)?;
        let texts: Vec<String> = list
            .iter()
            .enumerate()
            .map(|(at, part)| checked(&of_part(part, &naming.of(at))?, &naming.of(at)))
            .collect::<Result<_, _>>()?;
        return if texts.is_empty() { Err(empty(field)) } else { Ok((texts, naming)) };
    }
    if let Some(text) = text_of(value) {
        return Ok((vec![checked(text, field)?], Naming { field, listed: false }));
    }
    let Value::Array(list) = value else { return Err(wrong(field.to_owned())) };
    if list.is_empty() {
        return Err(empty(field));
    }
    count(field, list.len(), most)?;
    let each = list.iter().enumerate().map(|(at, item)| {
        let name = naming.of(at);
        let text = match parts(item) {
            Some(parts) => {
                let each: Result<Vec<String>, _> =
                    parts.iter().map(|part| of_part(part, &name)).collect();
                each?.join("\n")
            }
            None => text_of(item).ok_or_else(|| wrong(name.clone()))?.to_owned(),
        };
        checked(&text, &name)
    });
    Ok((each.collect::<Result<_, _>>()?, naming))
}

/// The parts of an object with `content`.
fn parts(value: &Value) -> Option<&[Value]> {
    value.get("content")?.as_array().map(Vec::as_slice)
}

fn of_part(part: &Value, name: &str) -> Result<String, ApiError> {
    let text = part.get("text").and_then(Value::as_str).filter(|_| part["type"] == "text");
    text.map(str::to_owned).ok_or_else(|| {
        let message =
            format!("`{name}` has a part that is no text; only parts of type text are taken.");
        ApiError::bad_value(name, message)
    })
}

/// The texts of documents by their fields, as Cohere has it: the values, one after the other.
fn by_fields(documents: &[Value], fields: &[String]) -> Result<Vec<String>, ApiError> {
    if documents.is_empty() {
        return Err(empty("documents"));
    }
    let naming = Naming { field: "documents", listed: true };
    let text = |(at, document): (usize, &Value)| {
        let name = naming.of(at);
        let Value::Object(document) = document else {
            return match document.as_str() {
                Some(text) => checked(text, &name),
                None => {
                    let message = format!("`{name}` must be an object or a string.");
                    Err(ApiError::malformed(message).param(name))
                }
            };
        };
        let values: Vec<String> = fields
            .iter()
            .filter_map(|field| document.get(field))
            .filter(|value| !value.is_null())
            .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
            .collect();
        if values.is_empty() {
            let message = format!("`{name}` has none of the `rank_fields`.");
            return Err(ApiError::bad_value(name, message));
        }
        checked(&values.join("\n"), &name)
    };
    documents.iter().enumerate().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(fields: Value) -> Result<(Vec<String>, Vec<String>), String> {
        let fields: ScoreFields = serde_json::from_value(fields).unwrap();
        let pairs = fields.pairs(3).map_err(|error| error.field().unwrap_or("").to_owned())?;
        Ok((pairs.first, pairs.second))
    }

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn each_pair_of_fields_is_read() {
        for (one, two) in [
            ("queries", "documents"),
            ("queries", "items"),
            ("data_1", "data_2"),
            ("text_1", "text_2"),
        ] {
            let read = pairs(json!({one: "a", two: ["b", {"text": "c"}]}));
            assert_eq!(read, Ok((texts(&["a"]), texts(&["b", "c"]))), "{one}");
        }
        let parts =
            json!({"content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]});
        let read = pairs(json!({"queries": ["a", "d"], "documents": parts}));
        assert_eq!(read, Ok((texts(&["a", "d"]), texts(&["b", "c"]))));
    }

    #[test]
    fn texts_that_cannot_be_paired_are_refused() {
        for (bad, field) in [
            (json!({"text_1": "a"}), "queries"),
            (json!({"text_1": ["a", "b"], "text_2": ["c"]}), "text_1"),
            (json!({"text_1": ["a", "b"], "text_2": "c"}), "text_1"),
            (json!({"text_1": [], "text_2": ["c"]}), "text_1"),
            (json!({"text_1": "a", "text_2": []}), "text_2"),
            (json!({"text_1": "a", "text_2": ["b", ""]}), "text_2[1]"),
            (json!({"text_1": "a", "text_2": ["b", 5]}), "text_2[1]"),
            (json!({"text_1": "a", "text_2": ["b", "b", "b", "b"]}), "text_2"),
            (json!({"text_1": "a", "text_2": {"content": [{"type": "image_url"}]}}), "text_2[0]"),
        ] {
            assert_eq!(pairs(bad.clone()), Err(field.into()), "{bad}");
        }
    }

    #[test]
    fn documents_are_ranked_by_their_fields() {
        let fields = json!({
            "query": {"text": "q"},
            "documents": [{"title": "t", "body": "b", "id": 7}, {"id": 8, "title": null}, "s"],
            "rank_fields": ["id", "title"],
            "top_n": 2,
        });
        let fields: RerankFields = serde_json::from_value(fields).unwrap();
        let ranking = fields.ranking(10).unwrap();
        assert_eq!(ranking.pairs.second, texts(&["7\nt", "8", "s"]));
        assert_eq!((ranking.pairs.first, ranking.top), (texts(&["q"]), 2));
        let returned = ranking.documents.unwrap();
        assert_eq!(returned[1]["id"], 8);
        assert_eq!(returned[2], json!({"text": "s", "multi_modal": null}));
    }

    #[test]
    fn documents_are_left_out_when_they_are_not_wanted() {
        let of = |more: Value| {
            let mut fields = json!({"query": "q", "documents": ["a", "b"]});
            fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            serde_json::from_value::<RerankFields>(fields).unwrap().ranking(10)
        };
        assert!(of(json!({})).unwrap().documents.is_some());
        assert!(of(json!({"return_documents": false})).unwrap().documents.is_none());
        assert_eq!(of(json!({"top_n": 0})).unwrap().top, 2);
        assert_eq!(of(json!({"top_n": -1})).unwrap_err().field(), Some("top_n"));
        assert_eq!(of(json!({"query": ""})).unwrap_err().field(), Some("query"));
    }
}
