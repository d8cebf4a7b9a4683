//! Embeddings, classes and scores of texts: what clients send and get.
//!
//! * [`PoolingFields`], [`InputFields`]: what the routes have in common.
//! * [`embed`]: `/v1/embeddings` and `/pooling`. [`score`]: `/score` and `/rerank`.
//! * [`cohere`]: embeddings in Cohere's form.
//! * [`encoding`]: how vectors are written. [`replies`]: what comes back.

pub mod cohere;
pub mod embed;
pub mod encoding;
pub mod replies;
pub mod score;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use self::replies::EmbeddingInput;
use super::completion::Prompt;
use super::sampling::{TruncationSide, in_range};
use super::token_ids;
use crate::error::ApiError;
use crate::text::sequences::Cut;

/// Fields that change nothing on these routes.
pub const IGNORED: &[&str] = &["cache_salt", "mm_processor_kwargs", "user"];

/// The fields that all routes of texts share.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct PoolingFields {
    /// Served model; the first that does this, when it is absent.
    pub model: Option<String>,
    /// Base of the reply's id.
    pub request_id: Option<String>,
    /// Keep this many tokens of each text; -1 keeps what the model takes.
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    /// The end at which texts are cut, the right one unless this says `left`.
    truncation_side: Option<TruncationSide>,
    /// Lower is sooner.
    #[schema(minimum = -2147483648, maximum = 2147483647)]
    priority: Option<i64>,
    /// Embeddings of length one, classes and scores by the model's activation; on by default.
    use_activation: Option<bool>,
    /// An older name of `use_activation`.
    softmax: Option<bool>,
    /// An older name of `use_activation`.
    activation: Option<bool>,
}

/// Texts, beside `messages`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct InputFields {
    /// One text or several, each as a string or as tokens.
    #[schema(value_type = EmbeddingInput)]
    input: Option<Value>,
    /// Put the model's special tokens around each text; on by default for texts, off for messages.
    add_special_tokens: Option<bool>,
}

/// Texts to be tokenized, and the field that they came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// The texts.
    pub prompts: Vec<Prompt>,
    /// How messages about them name them.
    pub naming: Naming,
}

/// How a text of a request is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Naming {
    /// The field.
    pub field: &'static str,
    /// Whether it is a list.
    pub listed: bool,
}

impl Naming {
    /// The name of the text at this place.
    pub fn of(self, at: usize) -> String {
        match self.listed {
            true => format!("{}[{at}]", self.field),
            false => self.field.to_owned(),
        }
    }
}

impl PoolingFields {
    /// How texts are cut, if at all; -1 stands for all that the model takes.
    pub fn cut(&self, max_model_len: u32) -> Result<Option<Cut>, ApiError> {
        let field = "truncate_prompt_tokens";
        let most = i64::from(max_model_len);
        let keep = match self.truncate_prompt_tokens {
            None => return Ok(None),
            Some(-1) => most,
            Some(n) => in_range(field, Some(n), 0, -1..=most)?,
        };
        Ok(Some(Cut { keep: keep as usize, left: self.left() }))
    }

    /// Whether texts that are cut lose their beginning.
    pub fn left(&self) -> bool {
        self.truncation_side == Some(TruncationSide::Left)
    }

    /// Whether values go through the model's activation, as far as these fields say.
    pub fn activate(&self) -> Option<bool> {
        self.use_activation.or(self.softmax).or(self.activation)
    }

    /// Lower is sooner.
    pub fn priority(&self) -> Result<i32, ApiError> {
        let range = i64::from(i32::MIN)..=i64::from(i32::MAX);
        in_range("priority", self.priority, 0, range).map(|priority| priority as i32)
    }
}

impl InputFields {
    /// Whether special tokens are put around texts.
    pub fn add_special_tokens(&self) -> bool {
        self.add_special_tokens.unwrap_or(true)
    }

    /// The texts: a string, strings, tokens, or lists of tokens; as Jina has it, also objects with
    /// `text`. At most `most`.
    pub fn inputs(&self, vocab_size: u32, most: usize) -> Result<Inputs, ApiError> {
        const FIELD: &str = "input";
        let wrong = |at: String| {
            let message = format!(
                "`{at}` must be a string, a list of strings, a list of token ids or a list of such \
                 lists."
            );
            ApiError::malformed(message).param(at)
        };
        let one = Naming { field: FIELD, listed: false };
        let each = Naming { field: FIELD, listed: true };
        let tokens = |list: &[Value], name: &str| {
            if list.is_empty() {
                return Err(empty(name));
            }
            token_ids(FIELD, list, vocab_size).map(Prompt::Tokens)
        };
        let single = |prompt| Inputs { prompts: vec![prompt], naming: one };
        match &self.input {
            None | Some(Value::Null) => {
                Err(ApiError::malformed("`input` is required.").param(FIELD))
            }
            Some(Value::String(text)) => Ok(single(Prompt::Text(checked(text, FIELD)?))),
            Some(Value::Array(list)) if list.is_empty() => Err(empty(FIELD)),
            Some(Value::Array(list)) if list[0].is_number() => Ok(single(tokens(list, FIELD)?)),
            Some(Value::Array(list)) => {
                count(FIELD, list.len(), most)?;
                let prompt = |(at, item): (usize, &Value)| match item {
                    Value::Array(list) => tokens(list, &each.of(at)),
                    _ => match text_of(item) {
                        Some(text) => checked(text, &each.of(at)).map(Prompt::Text),
                        None => Err(wrong(each.of(at))),
                    },
                };
                let prompts = list.iter().enumerate().map(prompt).collect::<Result<_, _>>()?;
                Ok(Inputs { prompts, naming: each })
            }
            Some(_) => Err(wrong(FIELD.to_owned())),
        }
    }
}

/// A string, or an object with the string `text`.
fn text_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("text")?.as_str())
}

/// A text, which must not be empty.
fn checked(text: &str, name: &str) -> Result<String, ApiError> {
    match text.is_empty() {
        true => Err(empty(name)),
        false => Ok(text.to_owned()),
    }
}

/// 400: there is nothing in a text or a list of texts.
fn empty(name: &str) -> ApiError {
    ApiError::bad_value(
        name,
        format!("`{name}` is empty; give it at least one character or token."),
    )
}

/// Refuses more texts than one request may have.
fn count(field: &str, texts: usize, most: usize) -> Result<(), ApiError> {
    if texts <= most {
        return Ok(());
    }
    let message = format!(
        "`{field}` holds {texts} texts, at most {most} are taken in one request; send them in \
         several, or raise --max-texts."
    );
    Err(ApiError::bad_value(field, message))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn inputs(input: Value) -> Result<Vec<Prompt>, ApiError> {
        let fields: InputFields = serde_json::from_value(json!({"input": input})).unwrap();
        fields.inputs(100, 3).map(|inputs| inputs.prompts)
    }

    #[test]
    fn all_shapes_of_texts_are_read() {
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(inputs(json!("a")).unwrap(), [text("a")]);
        assert_eq!(inputs(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(inputs(json!([{"text": "a"}, "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(inputs(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        let lists = [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])];
        assert_eq!(inputs(json!([[1], [2]])).unwrap(), lists);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, param) in [
            (json!(null), "input"),
            (json!(""), "input"),
            (json!([]), "input"),
            (json!(["a", ""]), "input[1]"),
            (json!([[1], []]), "input[1]"),
            (json!(["a", true]), "input[1]"),
            (json!({"a": 1}), "input"),
            (json!([1, 100]), "input"),
            (json!([1, "a"]), "input"),
            (json!(["a", "b", "c", "d"]), "input"),
        ] {
            let error = inputs(bad.clone()).unwrap_err();
            assert_eq!(error.field(), Some(param), "{bad}: {error}");
            assert_eq!(error.body()["error"]["code"], 400);
        }
    }

    #[test]
    fn texts_are_cut_as_the_fields_say() {
        let cut = |fields: Value| {
            let fields: PoolingFields = serde_json::from_value(fields).unwrap();
            fields.cut(256)
        };
        assert_eq!(cut(json!({})).unwrap(), None);
        let all = json!({"truncate_prompt_tokens": -1});
        assert_eq!(cut(all).unwrap(), Some(Cut { keep: 256, left: false }));
        let some = json!({"truncate_prompt_tokens": 5, "truncation_side": "left"});
        assert_eq!(cut(some).unwrap(), Some(Cut { keep: 5, left: true }));
        let side = |fields: Value| serde_json::from_value::<PoolingFields>(fields).unwrap().left();
        assert!(side(json!({"truncation_side": "left"})));
        assert!(!side(json!({"truncation_side": "right"})) && !side(json!({})));
        for bad in [-2, 257] {
            let error = cut(json!({"truncate_prompt_tokens": bad})).unwrap_err();
            assert_eq!(error.field(), Some("truncate_prompt_tokens"));
        }
    }
}
