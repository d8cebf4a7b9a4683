//! `POST /v1/audio/transcriptions` and `…/translations`: fields and replies.

use std::fmt::Display;
use std::str::FromStr;

use baton_proto::v1::SamplingParams;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::Body;
use super::sampling::{self, in_range};
use crate::error::ApiError;
use crate::speech::languages;
use crate::speech::listen::Wish;
use crate::speech::transcript::Segment;
use crate::speech::words::Word;

/// Fields that change nothing here.
pub const IGNORED: &[&str] =
    &["chunking_strategy", "include_stop_str_in_output", "length_penalty", "user", "vllm_xargs"];

/// Fields that are not built, and the value that asks for nothing, as JSON.
pub const UNSUPPORTED: &[(&str, &str)] =
    &[("n", r#""1""#), ("to_language", r#""""#), ("use_beam_search", r#""false""#)];

/// The fields of the form, but for the file.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct AudioFields {
    /// A served model; any that does this, when it is absent.
    #[schema(nullable = false)]
    pub model: Option<String>,
    /// The spoken language, by ISO 639-1 code or English name; without it the model tells.
    #[schema(nullable = false)]
    language: Option<String>,
    /// Text that the recording goes on from.
    #[schema(nullable = false)]
    prompt: Option<String>,
    /// Words to expect.
    #[schema(nullable = false)]
    hotwords: Option<String>,
    /// What the reply is.
    #[serde(default, deserialize_with = "choice")]
    #[schema(nullable = false)]
    response_format: Option<ResponseFormat>,
    /// What `verbose_json` tells the times of; segments unless it is given.
    #[serde(rename = "timestamp_granularities[]")]
    #[schema(nullable = false)]
    timestamp_granularities: Option<Vec<Granularity>>,
    /// Where the tries of a window begin: 0 is greedy. Poor text is drawn again, 0.2 higher.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = 0.0, maximum = 2.0, nullable = false)]
    temperature: Option<f64>,
    /// Draw from the most likely tokens that have this probability together.
    #[serde(default, deserialize_with = "lax")]
    #[schema(exclusive_minimum = 0.0, maximum = 1.0, nullable = false)]
    top_p: Option<f64>,
    /// Draw from this many of the most likely tokens; 0 and -1 are off.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = -1, maximum = 4294967295i64, nullable = false)]
    top_k: Option<i64>,
    /// Leave out tokens less likely than this share of the most likely one.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = 0.0, maximum = 1.0, nullable = false)]
    min_p: Option<f64>,
    /// Divides the logits of tokens that prompt or text have; 1 is off.
    #[serde(default, deserialize_with = "lax")]
    #[schema(exclusive_minimum = 0.0, nullable = false)]
    repetition_penalty: Option<f64>,
    /// Taken from a token's logit as often as the window's text has it.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = -2.0, maximum = 2.0, nullable = false)]
    frequency_penalty: Option<f64>,
    /// Taken from the logit of each token that the window's text has.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = -2.0, maximum = 2.0, nullable = false)]
    presence_penalty: Option<f64>,
    /// Another seed draws another text where the temperature is over 0; 0 unless it is given.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = -9223372036854775808i64, maximum = 9223372036854775807i64, nullable = false)]
    seed: Option<i64>,
    /// The most tokens of a window of 30 s.
    #[serde(default, deserialize_with = "lax")]
    #[schema(minimum = 1, maximum = 4294967295i64, nullable = false)]
    max_completion_tokens: Option<i64>,
    /// Send the text as it comes.
    #[serde(default, deserialize_with = "lax")]
    #[schema(nullable = false)]
    stream: Option<bool>,
    /// One more event with the usage, before the end.
    #[serde(default, deserialize_with = "lax")]
    #[schema(nullable = false)]
    stream_include_usage: Option<bool>,
    /// Usage so far in every event.
    #[serde(default, deserialize_with = "lax")]
    #[schema(nullable = false)]
    stream_continuous_usage_stats: Option<bool>,
}

/// `response_format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// The text in an object.
    #[default]
    Json,
    /// The text alone.
    Text,
    /// Subtitles in SubRip's format.
    Srt,
    /// The text with times, in an object.
    VerboseJson,
    /// Subtitles as WebVTT.
    Vtt,
}

/// `timestamp_granularities[]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// Times of words.
    Word,
    /// Times of segments.
    Segment,
}

/// How the reply is to be worded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wording {
    /// Whether English is wanted, whatever is spoken.
    pub translate: bool,
    /// What the reply is.
    pub format: ResponseFormat,
    /// Whether it is a stream.
    pub stream: bool,
    /// Whether a stream tells its usage at the end, and in every event.
    pub usage: (bool, bool),
    /// Whether `verbose_json` has segments, and words.
    pub times: (bool, bool),
}

impl AudioFields {
    /// Takes the fields out of a form.
    pub fn read(body: &mut Body) -> Result<Self, ApiError> {
        let fields: Self = body.read()?;
        for (name, harmless) in UNSUPPORTED {
            let harmless: Value = serde_json::from_str(harmless).unwrap_or_default();
            if body.get(name).is_some_and(|value| *value != harmless && *value != "") {
                return Err(ApiError::not_supported(name));
            }
            body.ignore(&[name]);
        }
        body.ignore(IGNORED);
        Ok(fields)
    }

    /// Checks what concerns the reply.
    pub fn wording(&self, translate: bool) -> Result<Wording, ApiError> {
        let format = self.response_format.unwrap_or_default();
        let stream = self.stream.unwrap_or(false);
        let times = self.timestamp_granularities.as_deref().unwrap_or_default();
        if stream && !matches!(format, ResponseFormat::Json | ResponseFormat::Text) {
            let message = "`response_format` must be json or text when `stream` is true.";
            return Err(ApiError::bad_value("response_format", message));
        }
        if !times.is_empty() && format != ResponseFormat::VerboseJson {
            let field = "timestamp_granularities[]";
            let message = format!("`{field}` needs `response_format` to be verbose_json.");
            return Err(ApiError::bad_value(field, message));
        }
        let include = self.stream_include_usage.unwrap_or(false);
        let continuous = self.stream_continuous_usage_stats.unwrap_or(false);
        for (field, set) in
            [("stream_include_usage", include), ("stream_continuous_usage_stats", continuous)]
        {
            if set && !stream {
                let message = format!("`{field}` is only for streams: set `stream` to true.");
                return Err(ApiError::bad_value(field, message));
            }
        }
        let words = times.contains(&Granularity::Word);
        let segments = times.is_empty() || times.contains(&Granularity::Segment);
        let usage = (include, include && continuous);
        Ok(Wording { translate, format, stream, usage, times: (segments, words) })
    }

    /// Checks what concerns the model, which knows `languages`, codes; none of them is one that
    /// knows English alone.
    pub fn wish(&self, wording: &Wording, known: &[&str]) -> Result<Wish, ApiError> {
        let temperature = sampling::temperature(self.temperature, 0.0)?;
        let top_p = sampling::top_p(self.top_p, 1.0)?;
        let most = f64::from(f32::MAX);
        let repetition_penalty = sampling::repetition_penalty(self.repetition_penalty, 1.0, most)?;
        let limit = self.max_completion_tokens;
        let limits = 1..=i64::from(u32::MAX);
        let max_tokens =
            limit.map(|limit| in_range("max_completion_tokens", Some(limit), 0, limits));
        let penalty = |field: &str, value| in_range(field, value, 0.0, -2.0..=2.0);
        let params = SamplingParams {
            temperature: temperature as f32,
            top_p: top_p as f32,
            top_k: in_range("top_k", self.top_k, 0, -1..=i64::from(u32::MAX))?.max(0) as u32,
            min_p: in_range("min_p", self.min_p, 0.0, 0.0..=1.0)? as f32,
            repetition_penalty: repetition_penalty as f32,
            frequency_penalty: penalty("frequency_penalty", self.frequency_penalty)? as f32,
            presence_penalty: penalty("presence_penalty", self.presence_penalty)? as f32,
            seed: self.seed.unwrap_or(0) as u64,
            ..SamplingParams::default()
        };
        Ok(Wish {
            language: self.language(known)?,
            translate: wording.translate,
            prompt: self.prompt.clone().unwrap_or_default(),
            hotwords: self.hotwords.clone().unwrap_or_default(),
            params,
            max_tokens: max_tokens.transpose()?.map(|limit| limit as u32),
            words: wording.times.1,
        })
    }

    fn language(&self, known: &[&str]) -> Result<Option<&'static str>, ApiError> {
        let Some(asked) = self.language.as_deref().filter(|asked| !asked.trim().is_empty()) else {
            return Ok(None);
        };
        let code = languages::code(asked);
        let fits = |code: &&str| match known {
            [] => *code == "en",
            known => known.contains(code),
        };
        match code.filter(fits) {
            Some(code) => Ok(Some(code)),
            None => {
                let mut codes = known.to_vec();
                codes.sort_unstable();
                let codes = if codes.is_empty() { "en".to_owned() } else { codes.join(", ") };
                let message = format!("`language` is {asked:?}; this model knows {codes}.");
                Err(ApiError::bad_value("language", message))
            }
        }
    }
}

/// A value of a form, which is a string; an empty one is none.
fn lax<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
    let text = text.trim();
    // As Python writes it.
    let text = match text {
        "True" | "1" if std::any::type_name::<T>() == "bool" => "true",
        "False" | "0" if std::any::type_name::<T>() == "bool" => "false",
        text => text,
    };
    if text.is_empty() {
        return Ok(None);
    }
    let value = text.parse();
    value.map(Some).map_err(|error| de::Error::custom(format!("{text:?} does not fit: {error}")))
}

/// The same for a choice of words.
fn choice<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
    match text.trim() {
        "" => Ok(None),
        _ => T::deserialize(de::value::StringDeserializer::new(text)).map(Some),
    }
}

/// What was said, to be told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The code of the spoken language.
    pub language: &'static str,
    /// Seconds of the recording.
    pub seconds: f64,
    /// What was said.
    pub segments: Vec<Segment>,
    /// Its words.
    pub words: Vec<Word>,
}

impl Told {
    /// The whole text.
    pub fn text(&self) -> String {
        let text: String = self.segments.iter().map(|segment| segment.text.as_str()).collect();
        text.trim().to_owned()
    }

    /// The reply's media type and text.
    pub fn reply(&self, wording: &Wording) -> (&'static str, String) {
        const TEXT: &str = "text/plain; charset=utf-8";
        const JSON: &str = "application/json";
        match wording.format {
            ResponseFormat::Json => (JSON, self.json(wording).to_string()),
            ResponseFormat::VerboseJson => (JSON, self.verbose(wording).to_string()),
            ResponseFormat::Text => (TEXT, self.text() + "\n"),
            ResponseFormat::Srt => (TEXT, self.srt()),
            ResponseFormat::Vtt => (TEXT, self.vtt()),
        }
    }

    fn json(&self, wording: &Wording) -> Value {
        match wording.translate {
            true => json!({"text": self.text()}),
            false => json!({"text": self.text(), "usage": self.usage()}),
        }
    }

    fn usage(&self) -> Value {
        json!({"type": "duration", "seconds": self.seconds.ceil() as u64})
    }

    fn verbose(&self, wording: &Wording) -> Value {
        let language = if wording.translate { "en" } else { self.language };
        let mut reply = json!({
            "task": if wording.translate { "translate" } else { "transcribe" },
            "language": languages::name(language),
            "duration": (self.seconds * 1000.0).round() / 1000.0,
            "text": self.text(),
        });
        if wording.times.0 {
            let segments = self.segments.iter().enumerate().map(|(id, segment)| {
                json!({
                    "id": id,
                    "seek": segment.seek,
                    "start": segment.start,
                    "end": segment.end,
                    "text": segment.text,
                    "tokens": segment.tokens,
                    "temperature": f64::from((segment.temperature * 1000.0).round()) / 1000.0,
                    "avg_logprob": segment.avg_logprob,
                    "compression_ratio": segment.compression_ratio,
                    "no_speech_prob": segment.no_speech,
                })
            });
            reply["segments"] = segments.collect();
        }
        if wording.times.1 {
            let words = self
                .words
                .iter()
                .map(|word| json!({"word": word.text, "start": word.start, "end": word.end}));
            reply["words"] = words.collect();
        }
        if !wording.translate {
            reply["usage"] = self.usage();
        }
        reply
    }

    fn srt(&self) -> String {
        let cues = self.segments.iter().enumerate().map(|(i, segment)| {
            let (start, end) = (clock(segment.start, ','), clock(segment.end, ','));
            format!("{}\n{start} --> {end}\n{}\n\n", i + 1, cue(&segment.text))
        });
        cues.collect()
    }

    fn vtt(&self) -> String {
        let cues = self.segments.iter().map(|segment| {
            let (start, end) = (clock(segment.start, '.'), clock(segment.end, '.'));
            format!("{start} --> {end}\n{}\n\n", cue(&segment.text))
        });
        std::iter::once("WEBVTT\n\n".to_owned()).chain(cues).collect()
    }
}

/// A cue's text: an arrow in it would be read as a time.
fn cue(text: &str) -> String {
    text.trim().replace("-->", "->").replace(['\r', '\n'], " ")
}

/// `00:00:07,480`.
fn clock(seconds: f64, point: char) -> String {
    let millis = (seconds * 1000.0).round() as u64;
    let (hours, minutes) = (millis / 3_600_000, millis / 60_000 % 60);
    format!("{hours:02}:{minutes:02}:{:02}{point}{:03}", millis / 1000 % 60, millis % 1000)
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;

    fn fields(form: &[(&str, &str)]) -> Result<AudioFields, ApiError> {
        let mut map = Map::new();
        for (name, value) in form {
            let value: Value = match name.ends_with("[]") {
                true => value.split(',').collect::<Vec<_>>().into(),
                false => (*value).into(),
            };
            map.insert((*name).to_owned(), value);
        }
        AudioFields::read(&mut Body::new(map))
    }

    fn refused(form: &[(&str, &str)], known: &[&str]) -> String {
        let outcome = fields(form).and_then(|fields| {
            let wording = fields.wording(false)?;
            fields.wish(&wording, known)
        });
        let error = outcome.unwrap_err().body();
        assert_eq!(error["error"]["code"], 400, "{error}");
        error["error"]["param"].as_str().unwrap().to_owned()
    }

    #[test]
    fn texts_of_a_form_are_read_as_what_they_stand_for() {
        let form = [
            ("temperature", "0.4"),
            ("seed", "-7"),
            ("stream", "True"),
            ("stream_include_usage", "1"),
            ("top_k", ""),
            ("response_format", "text"),
            ("language", "German"),
            ("n", "1"),
            ("use_beam_search", "false"),
            ("to_language", ""),
        ];
        let fields = fields(&form).unwrap();
        let wording = fields.wording(false).unwrap();
        assert_eq!((wording.format, wording.stream), (ResponseFormat::Text, true));
        assert_eq!((wording.usage, wording.times), ((true, false), (true, false)));
        let wish = fields.wish(&wording, &["en", "de"]).unwrap();
        assert_eq!((wish.language, wish.params.seed), (Some("de"), -7_i64 as u64));
        assert_eq!((wish.params.temperature, wish.params.top_k, wish.params.top_p), (0.4, 0, 1.0));
    }

    #[test]
    fn what_32_bits_do_not_hold_is_raised() {
        let form =
            [("temperature", "1e-40"), ("top_p", "5e-324"), ("repetition_penalty", "5e-324")];
        let fields = fields(&form).unwrap();
        let params = fields.wish(&fields.wording(false).unwrap(), &["en"]).unwrap().params;
        assert!(params.temperature > 0.005, "{params:?}");
        assert!(params.top_p > 0.0 && params.repetition_penalty > 0.0, "{params:?}");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (form, field) in [
            (&[("temperature", "warm")][..], "temperature"),
            (&[("temperature", "-0.1")], "temperature"),
            (&[("temperature", "NaN")], "temperature"),
            (&[("seed", "1.5")], "seed"),
            (&[("stream", "maybe")], "stream"),
            (&[("response_format", "pdf")], "response_format"),
            (&[("response_format", "srt"), ("stream", "true")], "response_format"),
            (&[("timestamp_granularities[]", "word")], "timestamp_granularities[]"),
            (&[("timestamp_granularities[]", "line")], "timestamp_granularities[][0]"),
            (&[("stream_include_usage", "true")], "stream_include_usage"),
            (&[("language", "klingon")], "language"),
            (&[("language", "fr")], "language"),
            (&[("to_language", "en")], "to_language"),
            (&[("n", "2")], "n"),
            (&[("use_beam_search", "true")], "use_beam_search"),
            (&[("top_p", "0")], "top_p"),
            (&[("repetition_penalty", "0")], "repetition_penalty"),
            (&[("max_completion_tokens", "0")], "max_completion_tokens"),
        ] {
            assert_eq!(refused(form, &["en", "de"]), field, "{form:?}");
        }
        // A model that knows English alone.
        assert_eq!(refused(&[("language", "de")], &[]), "language");
    }

    fn told() -> Told {
        let segment = |start, end, text: &str| Segment {
            seek: 0,
            start,
            end,
            text: text.to_owned(),
            tokens: vec![5],
            temperature: 0.2,
            avg_logprob: -0.5,
            compression_ratio: 1.25,
            no_speech: 0.5,
        };
        Told {
            language: "de",
            seconds: 3723.25,
            segments: vec![segment(0.0, 2.5, " One"), segment(3661.25, 3723.25, " --> two\n")],
            words: vec![Word { text: "One".into(), start: 0.5, end: 1.0 }],
        }
    }

    #[test]
    fn a_transcript_is_worded_as_it_is_wished() {
        let of = |format: &str, translate| {
            let fields = fields(&[("response_format", format)]).unwrap();
            told().reply(&fields.wording(translate).unwrap())
        };
        let (media, srt) = of("srt", false);
        assert_eq!(media, "text/plain; charset=utf-8");
        let expected = "1\n00:00:00,000 --> 00:00:02,500\nOne\n\n\
                        2\n01:01:01,250 --> 01:02:03,250\n-> two\n\n";
        assert_eq!(srt, expected);
        let expected = "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nOne\n\n\
                        01:01:01.250 --> 01:02:03.250\n-> two\n\n";
        assert_eq!(of("vtt", false).1, expected);
        assert_eq!(of("text", true).1, "One --> two\n");
        let json = |format, translate| -> Value {
            serde_json::from_str(&of(format, translate).1).unwrap()
        };
        let usage = json!({"type": "duration", "seconds": 3724});
        assert_eq!(json("json", false), json!({"text": "One --> two", "usage": usage}));
        assert_eq!(json("json", true), json!({"text": "One --> two"}));
        let verbose = json("verbose_json", false);
        assert_eq!(
            (&verbose["task"], &verbose["language"]),
            (&json!("transcribe"), &json!("german"))
        );
        assert_eq!(verbose["segments"][1]["id"], 1);
        assert_eq!(verbose["segments"][0]["temperature"], 0.2);
        assert!(verbose.get("words").is_none());
        let verbose = json("verbose_json", true);
        assert_eq!(
            (&verbose["task"], &verbose["language"]),
            (&json!("translate"), &json!("english"))
        );
    }

    #[test]
    fn times_are_told_of_what_was_asked_for() {
        for (asked, expected) in [("word", (false, true)), ("word,segment", (true, true))] {
            let form = [("response_format", "verbose_json"), ("timestamp_granularities[]", asked)];
            let wording = fields(&form).unwrap().wording(false).unwrap();
            assert_eq!(wording.times, expected);
            let reply: Value = serde_json::from_str(&told().reply(&wording).1).unwrap();
            assert_eq!(reply.get("segments").is_some(), expected.0);
            assert_eq!(reply["words"][0], json!({"word": "One", "start": 0.5, "end": 1.0}));
        }
    }
}
