//! The fields that all generation routes share: how to draw tokens, and what to send back.

use std::collections::HashMap;
use std::fmt::Display;
use std::ops::RangeInclusive;

use baton_proto::v1::{Constraint, SamplingParams, TokenSequence};
use rand::RngExt as _;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::schema::{OneOrMany, TokenId};
use super::{strings, token_ids};
use crate::error::ApiError;
use crate::generate::answer::TextSettings;
use crate::text::defaults::Defaults;

/// The most sequences that one request may ask for.
pub const MAX_SEQUENCES: usize = 128;
/// The most stop strings, and stop tokens.
const MAX_STOPS: usize = 256;
/// The longest stop string, and cache salt.
const MAX_STOP_BYTES: usize = 1024;
/// The most tokens that `logit_bias` may name.
const MAX_BIASED: usize = 4096;
/// The most entries of `bad_words`.
const MAX_BAD_WORDS: usize = 256;
/// Below this a temperature makes logits overflow; vLLM raises it too.
const MIN_TEMPERATURE: f64 = 0.01;

/// The fields as they come. Absent and `null` are the same.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct SamplingFields {
    /// Served model; any, when it is absent.
    pub model: Option<String>,
    /// Base of the reply's id.
    pub request_id: Option<String>,
    /// Requests share cached prefixes only when their salts are equal.
    #[schema(min_length = 1, max_length = 1024)]
    pub cache_salt: Option<String>,
    /// Send tokens as they come.
    pub stream: Option<bool>,
    /// Settings of the stream.
    pub stream_options: Option<StreamOptions>,
    /// Name tokens in logprobs `token_id:N`.
    pub return_tokens_as_token_ids: Option<bool>,
    /// Send token ids beside the text.
    pub return_token_ids: Option<bool>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: Option<bool>,
    /// Keep the stop string in the text.
    pub include_stop_str_in_output: Option<bool>,
    /// Passed back in the reply as it came.
    #[schema(value_type = Option<Object>)]
    pub kv_transfer_params: Option<Map<String, Value>>,
    /// Keep this many tokens of the prompt; -1 keeps what leaves room for the answer.
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    truncation_side: Option<TruncationSide>,
    /// Lower is sooner.
    #[schema(minimum = -2147483648, maximum = 2147483647)]
    priority: Option<i64>,
    /// Alternatives to return with each token of the prompt; -1 is the whole vocabulary.
    #[schema(minimum = -1)]
    prompt_logprobs: Option<i64>,
    /// Answers to each prompt.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<i64>,
    /// 0 is greedy.
    #[schema(minimum = 0.0, maximum = 2.0)]
    temperature: Option<f64>,
    /// Draw from the most likely tokens that have this probability together.
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    top_p: Option<f64>,
    /// Draw from this many of the most likely tokens; 0 and -1 are off.
    #[schema(minimum = -1, maximum = 4294967295i64)]
    top_k: Option<i64>,
    /// Leave out tokens less likely than this share of the most likely one.
    #[schema(minimum = 0.0, maximum = 1.0)]
    min_p: Option<f64>,
    /// The same seed gives the same answer.
    #[schema(minimum = -9223372036854775808i64, maximum = 9223372036854775807i64)]
    seed: Option<i64>,
    /// The most tokens of an answer.
    #[schema(minimum = 1, maximum = 4294967295i64)]
    max_tokens: Option<i64>,
    /// The same under OpenAI's newer name, which wins.
    #[schema(minimum = 1, maximum = 4294967295i64)]
    max_completion_tokens: Option<i64>,
    /// Neither a stop string nor the end of the sequence counts before this many tokens.
    #[schema(minimum = 0, maximum = 4294967295i64)]
    min_tokens: Option<i64>,
    /// Taken from the logit of each token that the answer has.
    #[schema(minimum = -2.0, maximum = 2.0)]
    presence_penalty: Option<f64>,
    /// Taken from a token's logit as often as the answer has it.
    #[schema(minimum = -2.0, maximum = 2.0)]
    frequency_penalty: Option<f64>,
    /// Divides the logits of tokens that prompt or answer have; 1 is off.
    #[schema(exclusive_minimum = 0.0)]
    repetition_penalty: Option<f64>,
    /// Strings that end the answer, and are no part of it.
    #[schema(value_type = Option<OneOrMany>)]
    stop: Option<Value>,
    /// Tokens that end the answer.
    #[schema(value_type = Option<Vec<TokenId>>, max_items = 256)]
    stop_token_ids: Option<Vec<Value>>,
    /// Go on behind the end of the sequence.
    ignore_eos: Option<bool>,
    /// Added to the logits of tokens, which are named by their ids; clamped to -100 to 100.
    #[schema(value_type = Option<std::collections::HashMap<String, f64>>)]
    logit_bias: Option<Map<String, Value>>,
    /// The only tokens that an answer may have.
    #[schema(value_type = Option<Vec<TokenId>>, min_items = 1)]
    allowed_token_ids: Option<Vec<Value>>,
    /// Words that an answer must not have.
    #[schema(value_type = Option<OneOrMany>)]
    bad_words: Option<Value>,
}

/// The end at which `truncate_prompt_tokens` cuts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TruncationSide {
    /// The prompt's beginning goes.
    #[default]
    Left,
    /// The prompt's end goes.
    Right,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// One more event with the usage, before the end.
    pub include_usage: Option<bool>,
    /// Usage so far in every event.
    pub continuous_usage_stats: Option<bool>,
}

/// What fields are checked against.
pub struct Bounds<'a> {
    /// Tokens of the model.
    pub vocab_size: u32,
    /// The most alternatives that `logprobs` may ask for; without it any number.
    pub max_logprobs: Option<u32>,
    /// What holds for fields that are absent.
    pub defaults: &'a Defaults,
    /// Tokenizes a text without special tokens.
    pub encode: &'a dyn Fn(&str) -> Result<Vec<u32>, String>,
}

/// What the routes ask for in their own fields.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Alternatives to return with each token of the answer; `None` for no logprobs at all.
    pub logprobs: Option<i64>,
    /// Whether the prompt is part of the answer, with its logprobs.
    pub echo: bool,
    /// Whether `max_tokens` may be 0: the prompt alone is wanted.
    pub prompt_alone: bool,
    /// What the answer must be like, and the field that says so.
    pub constraint: Option<(Constraint, &'static str)>,
}

/// The fields, checked, with defaults filled in.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// For the worker, save `max_tokens`, which depends on the prompt, and the seed, which is the
    /// first sequence's.
    pub params: SamplingParams,
    /// Whether the request names the seed: then every prompt's sequences draw with the same ones.
    pub seeded: bool,
    /// `max_tokens` or `max_completion_tokens`.
    pub max_tokens: Option<u32>,
    /// The model's, where neither the request nor the route says.
    pub default_max_tokens: Option<u32>,
    /// Sequences for each prompt.
    pub n: usize,
    /// What ends the text, and what is left out of it.
    pub text: TextSettings,
    /// Requests share cached prefixes only when their salts are equal.
    pub salt: String,
    /// Lower is sooner.
    pub priority: i32,
    /// The field that asks for `params.constraint`.
    pub constraint_field: Option<&'static str>,
}

impl SamplingFields {
    /// Whether the answer is a stream.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether to send usage at the end of a stream, and in all of its events.
    pub fn usage_in_stream(&self) -> (bool, bool) {
        let options = self.stream_options.unwrap_or_default();
        let include = options.include_usage.unwrap_or(false);
        (include, include && options.continuous_usage_stats.unwrap_or(false))
    }

    /// Checks all values.
    pub fn check(&self, bounds: &Bounds<'_>, wish: Wish) -> Result<Sampling, ApiError> {
        let (vocab_size, defaults) = (bounds.vocab_size, bounds.defaults);
        if self.stream_options.is_some() && !self.streams() {
            let message = "`stream_options` is only for streams: set `stream` to true.";
            return Err(ApiError::malformed(message).param("stream_options"));
        }
        if self.cache_salt.as_deref() == Some("") {
            let message = "`cache_salt` must not be empty; leave it out to share the cache.";
            return Err(ApiError::malformed(message).param("cache_salt"));
        }
        let temperature = temperature(self.temperature, defaults.temperature)?;
        let greedy = temperature == 0.0;
        let top_p = top_p(self.top_p, defaults.top_p)?;
        let top_k = in_range("top_k", self.top_k, defaults.top_k, -1..=i64::from(u32::MAX))?.max(0);
        let repetition_penalty =
            repetition_penalty(self.repetition_penalty, defaults.repetition_penalty, f64::MAX)?;
        let n = in_range("n", self.n, 1, 1..=MAX_SEQUENCES as i64)? as usize;
        if greedy && n > 1 {
            let message = "`n` must be 1 when `temperature` is 0: all answers would be the same.";
            return Err(ApiError::bad_value("n", message));
        }
        let (limit_field, limit) = match self.max_completion_tokens {
            Some(limit) => ("max_completion_tokens", Some(limit)),
            None => ("max_tokens", self.max_tokens),
        };
        let limits = i64::from(!wish.prompt_alone)..=i64::from(u32::MAX);
        let max_tokens = limit.map(|limit| in_range(limit_field, Some(limit), 0, limits));
        let max_tokens = max_tokens.transpose()?.map(|limit| limit as u32);
        let min_tokens =
            in_range("min_tokens", self.min_tokens, 0, 0..=i64::from(u32::MAX))? as u32;
        if max_tokens.is_some_and(|max| min_tokens > max) {
            let message = format!("`min_tokens` must be at most `{limit_field}`.");
            return Err(ApiError::bad_value("min_tokens", message));
        }
        let stop = strings("stop", self.stop.as_ref())?;
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::bad_value("stop", "`stop` must not hold an empty string."));
        }
        let stop_token_ids = self.stop_token_ids.as_deref().unwrap_or_default();
        at_most("stop", stop.len(), MAX_STOPS, "strings")?;
        let longest = stop.iter().map(String::len).max().unwrap_or(0);
        at_most("stop", longest, MAX_STOP_BYTES, "bytes in a string")?;
        at_most("stop_token_ids", stop_token_ids.len(), MAX_STOPS, "ids")?;
        let salt = self.cache_salt.as_ref().map_or(0, String::len);
        at_most("cache_salt", salt, MAX_STOP_BYTES, "bytes")?;
        let biased = self.logit_bias.as_ref().map_or(0, Map::len);
        at_most("logit_bias", biased, MAX_BIASED, "tokens")?;
        let priority =
            in_range("priority", self.priority, 0, i64::from(i32::MIN)..=i64::from(i32::MAX))?;
        let logprobs = bounds.count("logprobs", wish.logprobs)?;
        let allowed = self.allowed_token_ids.as_deref();
        if allowed.is_some_and(<[Value]>::is_empty) {
            let message = "`allowed_token_ids` must not be empty; leave it out to allow all.";
            return Err(ApiError::bad_value("allowed_token_ids", message));
        }
        let (constraint, constraint_field) = wish.constraint.unzip();
        // -1 is none, as in vLLM.
        let seed = self.seed.filter(|&seed| seed != -1);
        let params = SamplingParams {
            temperature: temperature as f32,
            top_p: top_p as f32,
            top_k: top_k as u32,
            min_p: in_range("min_p", self.min_p, defaults.min_p, 0.0..=1.0)? as f32,
            seed: seed.map_or_else(|| rand::rng().random(), |seed| seed as u64),
            max_tokens: 0,
            min_tokens,
            stop_token_ids: token_ids("stop_token_ids", stop_token_ids, vocab_size)?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            repetition_penalty: repetition_penalty as f32,
            presence_penalty: penalty("presence_penalty", self.presence_penalty)?,
            frequency_penalty: penalty("frequency_penalty", self.frequency_penalty)?,
            logit_bias: self.logit_bias(vocab_size)?,
            logprobs,
            allowed_token_ids: token_ids(
                "allowed_token_ids",
                allowed.unwrap_or_default(),
                vocab_size,
            )?,
            bad_words: self.bad_words(bounds)?,
            prompt_logprobs: self.prompt_logprobs(bounds, wish.echo, logprobs)?,
            constraint,
            speech: None,
        };
        let text = TextSettings {
            stop,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            markers: Vec::new(),
        };
        let salt = self.cache_salt.clone().unwrap_or_default();
        Ok(Sampling {
            params,
            seeded: seed.is_some(),
            max_tokens,
            default_max_tokens: defaults.max_tokens,
            n,
            text,
            salt,
            priority: priority as i32,
            constraint_field,
        })
    }

    /// Cuts a prompt as `truncate_prompt_tokens` says.
    pub fn truncate(
        &self,
        prompt: &mut Vec<u32>,
        max_model_len: u32,
        max_tokens: Option<u32>,
    ) -> Result<(), ApiError> {
        let field = "truncate_prompt_tokens";
        let keep = match self.truncate_prompt_tokens {
            None => return Ok(()),
            // What leaves room for the answer; but no wish for its length takes half of the context
            // away from the prompt.
            Some(-1) => {
                let room = max_tokens.unwrap_or(1).clamp(1, (max_model_len / 2).max(1));
                max_model_len.saturating_sub(room) as usize
            }
            Some(n) => in_range(field, Some(n), 0, -1..=i64::from(max_model_len))? as usize,
        };
        let surplus = prompt.len().saturating_sub(keep);
        match self.truncation_side.unwrap_or_default() {
            TruncationSide::Left => drop(prompt.drain(..surplus)),
            TruncationSide::Right => prompt.truncate(keep),
        }
        Ok(())
    }

    /// Whether the reply has log-probabilities of the prompt in a place of their own.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Whether a prompt of any length may come, because it is cut.
    pub fn truncates(&self) -> bool {
        self.truncate_prompt_tokens.is_some()
    }

    fn prompt_logprobs(
        &self,
        bounds: &Bounds<'_>,
        echo: bool,
        logprobs: Option<u32>,
    ) -> Result<Option<u32>, ApiError> {
        let asked = bounds.count("prompt_logprobs", self.prompt_logprobs)?;
        if asked.is_some_and(|count| count > 0) && self.streams() {
            let message = "`prompt_logprobs` is not for streams: set `stream` to false.";
            return Err(ApiError::malformed(message).param("prompt_logprobs"));
        }
        Ok(asked.or_else(|| logprobs.filter(|_| echo)))
    }

    /// A word's tokens at the beginning of a text and after a space, as vLLM takes them: the
    /// second only where the space belongs to the word's first token.
    fn bad_words(&self, bounds: &Bounds<'_>) -> Result<Vec<TokenSequence>, ApiError> {
        let words = strings("bad_words", self.bad_words.as_ref())?;
        at_most("bad_words", words.len(), MAX_BAD_WORDS, "words")?;
        let longest = words.iter().map(String::len).max().unwrap_or(0);
        at_most("bad_words", longest, MAX_STOP_BYTES, "bytes in a word")?;
        let mut sequences = Vec::with_capacity(2 * words.len());
        for word in words {
            let word = word.trim_start();
            let encode = |text: &str| {
                (bounds.encode)(text)
                    .map_err(|error| ApiError::internal(format!("The tokenizer failed: {error}.")))
            };
            let plain = encode(word)?;
            if plain.is_empty() {
                let message = "`bad_words` must not hold an empty word.";
                return Err(ApiError::bad_value("bad_words", message));
            }
            let spaced = encode(&format!(" {word}"))?;
            let differs = spaced.len() == plain.len() && spaced[0] != plain[0];
            sequences.push(TokenSequence { token_ids: plain });
            if differs {
                sequences.push(TokenSequence { token_ids: spaced });
            }
        }
        Ok(sequences)
    }

    fn logit_bias(&self, vocab_size: u32) -> Result<HashMap<u32, f32>, ApiError> {
        let wrong = |key: &str, what: &str| {
            let message = format!("`logit_bias` maps token ids to numbers; {key:?} {what}.");
            ApiError::bad_value("logit_bias", message)
        };
        self.logit_bias
            .iter()
            .flatten()
            .map(|(key, bias)| {
                let id = key.parse().ok().filter(|id| *id < vocab_size);
                let id = id.ok_or_else(|| wrong(key, "is no token id of this model"))?;
                let bias = bias.as_f64().ok_or_else(|| wrong(key, "has none"))?;
                Ok((id, bias.clamp(-100.0, 100.0) as f32))
            })
            .collect()
    }
}

impl Bounds<'_> {
    /// A number of alternatives; -1 is the whole vocabulary.
    fn count(&self, field: &str, asked: Option<i64>) -> Result<Option<u32>, ApiError> {
        let Some(asked) = asked else { return Ok(None) };
        let count = if asked == -1 { i64::from(self.vocab_size) } else { asked };
        let most = self.max_logprobs.unwrap_or(self.vocab_size).min(self.vocab_size);
        if (0..=i64::from(most)).contains(&count) {
            return Ok(Some(count as u32));
        }
        let message =
            format!("`{field}` must be from 0 to {most}, not {asked}: see --max-logprobs.");
        Err(ApiError::bad_value(field, message))
    }
}

impl Sampling {
    /// The parameters of one of a prompt's `n` sequences. Each draws with a seed of its own, as in
    /// vLLM; equal prompts have equal answers only where the request names a seed.
    pub fn params_for(&self, prompt: usize, choice: usize, max_tokens: u32) -> SamplingParams {
        let index = if self.seeded { choice } else { prompt * self.n + choice };
        let seed = self.params.seed.wrapping_add(index as u64);
        SamplingParams { seed, max_tokens, ..self.params.clone() }
    }
}

/// Each of these is looked at for every token, and kept for every sequence.
fn at_most(field: &str, count: usize, most: usize, what: &str) -> Result<(), ApiError> {
    if count <= most {
        return Ok(());
    }
    let message = format!("`{field}` has {count} {what}; at most {most} are taken.");
    Err(ApiError::bad_value(field, message))
}

fn penalty(field: &str, value: Option<f64>) -> Result<f32, ApiError> {
    in_range(field, value, 0.0, -2.0..=2.0).map(|value| value as f32)
}

/// The temperature; 0 is greedy.
pub(super) fn temperature(given: Option<f64>, default: f64) -> Result<f64, ApiError> {
    let temperature = in_range("temperature", given, default, 0.0..=2.0)?;
    Ok(if temperature == 0.0 { 0.0 } else { temperature.max(MIN_TEMPERATURE) })
}

/// The share of the likeliest tokens. It may not become 0 in 32 bits.
pub(super) fn top_p(given: Option<f64>, default: f64) -> Result<f64, ApiError> {
    let top_p = in_range("top_p", given, default, 0.0..=1.0)?;
    match top_p == 0.0 {
        true => Err(ApiError::bad_value("top_p", "`top_p` must be over 0 and at most 1.")),
        false => Ok(top_p.max(f64::from(f32::MIN_POSITIVE))),
    }
}

/// What tokens that are there already are divided by. It may become neither 0 nor infinite in 32
/// bits.
pub(super) fn repetition_penalty(
    given: Option<f64>,
    default: f64,
    most: f64,
) -> Result<f64, ApiError> {
    let penalty = in_range("repetition_penalty", given, default, 0.0..=most)?;
    if penalty == 0.0 {
        let message = "`repetition_penalty` must be over 0.";
        return Err(ApiError::bad_value("repetition_penalty", message));
    }
    Ok(penalty.clamp(f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)))
}

pub(super) fn in_range<T: PartialOrd + Display>(
    field: &str,
    value: Option<T>,
    default: T,
    range: RangeInclusive<T>,
) -> Result<T, ApiError> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    let (low, high) = range.into_inner();
    let message = format!("`{field}` must be from {low} to {high}, not {value}.");
    Err(ApiError::bad_value(field, message))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const BOUNDS: Bounds<'_> = Bounds {
        vocab_size: 100,
        max_logprobs: Some(20),
        defaults: &Defaults::OPENAI,
        // A letter is a token, and the space before a word belongs to its first letter.
        encode: &|text| {
            let word = text.trim_start();
            let shift = if word == text { 0 } else { 32 };
            Ok(word
                .bytes()
                .enumerate()
                .map(|(i, b)| u32::from(b) - 60 + if i == 0 { shift } else { 0 })
                .collect())
        },
    };

    fn check(fields: Value) -> Result<Sampling, ApiError> {
        let fields: SamplingFields = serde_json::from_value(fields).unwrap();
        fields.check(&BOUNDS, Wish::default())
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let Sampling { params, max_tokens, n, text, .. } = check(json!({"seed": 0})).unwrap();
        let expected = SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..SamplingParams::default()
        };
        assert_eq!((params, max_tokens, n), (expected, None, 1));
        assert!(text.skip_special_tokens && !text.include_stop && text.stop.is_empty());
    }

    #[test]
    fn without_a_seed_each_request_draws_its_own() {
        let seed = || check(json!({})).unwrap().params.seed;
        assert_ne!((seed(), seed()), (seed(), seed()));
    }

    #[test]
    fn the_edges_of_each_range_are_in_and_what_is_beyond_is_named() {
        for good in [
            json!({"temperature": 0}),
            json!({"temperature": 2}),
            json!({"top_k": -1}),
            json!({"min_p": 1}),
            json!({"presence_penalty": -2, "frequency_penalty": 2}),
            json!({"max_tokens": 5, "min_tokens": 5}),
            json!({"seed": -1}),
            json!({"stop": []}),
            json!({"stop_token_ids": [0, 99], "logit_bias": {"99": -1000}}),
        ] {
            check(good).unwrap();
        }
        for (field, bad) in [
            ("temperature", json!({"temperature": 2.1})),
            ("top_p", json!({"top_p": 0})),
            ("max_completion_tokens", json!({"max_completion_tokens": 0, "max_tokens": 5})),
            ("stop_token_ids", json!({"stop_token_ids": [100]})),
            ("logit_bias", json!({"logit_bias": {"100": 1}})),
            ("n", json!({"n": 129})),
        ] {
            let error = check(bad).unwrap_err().body();
            assert_eq!(error["error"]["param"], field);
        }
    }

    #[test]
    fn what_is_over_0_stays_so_in_32_bits() {
        let params = |of: Value| check(of).unwrap().params;
        let tiny = params(json!({"top_p": 5e-324, "repetition_penalty": 5e-324}));
        assert!(tiny.top_p > 0.0 && tiny.repetition_penalty > 0.0);
        assert!(params(json!({"repetition_penalty": 1e300})).repetition_penalty.is_finite());
    }

    #[test]
    fn each_sequence_has_a_seed_of_its_own() {
        let sampling = check(json!({"seed": 7, "n": 2})).unwrap();
        let seeds = |sampling: &Sampling| {
            let of = |at: usize| sampling.params_for(at / 2, at % 2, 1).seed;
            (0..4).map(of).collect::<Vec<_>>()
        };
        assert_eq!(seeds(&sampling), [7, 8, 7, 8]);
        // Nobody asked for equal answers to equal prompts.
        let free = seeds(&check(json!({"n": 2})).unwrap());
        assert_eq!(free, [0, 1, 2, 3].map(|at| free[0].wrapping_add(at)));
        let any = |of| check(of).unwrap().params.seed;
        assert_ne!(any(json!({"seed": -1})), any(json!({"seed": -1})));
    }
}
