//! The parts of requests and replies that the code handles as JSON values, described for the
//! OpenAPI document. `tests/tests/openapi.rs` holds real replies against them.

use std::collections::HashMap;

use serde_json::Value;
use utoipa::ToSchema;

use super::pooling::replies::{Classes, Embeddings, PoolingReply, Ranked, Scores};

/// The id of a token of the model.
#[derive(ToSchema)]
#[schema(minimum = 0)]
pub struct TokenId(pub u32);

/// A string, or a list of strings.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// What completions begin with.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum PromptInput {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Tokens.
    Tokens(Vec<TokenId>),
    /// Several prompts of tokens.
    TokenLists(Vec<Vec<TokenId>>),
}

/// A response; OpenAI's reference has all of its fields.
#[derive(ToSchema)]
#[schema(as = Response)]
pub struct ResponseObject {
    /// `resp_…`, or the request's own.
    pub id: String,
    /// `response`.
    pub object: String,
    /// Unix time in seconds.
    pub created_at: u64,
    /// queued, in_progress, completed, incomplete, failed or cancelled.
    pub status: String,
    /// The served name.
    pub model: String,
    /// Reasoning, messages and calls.
    pub output: Vec<Value>,
    /// Tokens, once it has ended.
    pub usage: Option<Value>,
    /// Why it failed.
    pub error: Option<Value>,
}

/// What is left of a response that was deleted.
#[derive(ToSchema)]
pub struct DeletedResponse {
    /// Its id.
    pub id: String,
    /// `response`.
    pub object: String,
    /// True.
    pub deleted: bool,
}

/// From which end items are listed.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ItemOrder {
    /// The first one first.
    Asc,
    /// The last one first.
    Desc,
}

/// Items of a response's input.
#[derive(ToSchema)]
pub struct InputItems {
    /// `list`.
    pub object: String,
    /// The items.
    pub data: Vec<Value>,
    /// The first one's id.
    pub first_id: Option<String>,
    /// The last one's id.
    pub last_id: Option<String>,
    /// Whether there are more behind them.
    pub has_more: bool,
}

/// A message of a chat. Templates may want more.
#[derive(ToSchema)]
pub struct ChatMessage {
    /// system, developer, user, assistant, tool, or what the template knows.
    pub role: String,
    /// What is said.
    pub content: Option<Content>,
    /// Who says it.
    pub name: Option<Value>,
    /// What the assistant thought before it answered.
    pub reasoning: Option<Value>,
    /// What the assistant called.
    pub tool_calls: Option<Vec<MadeCall>>,
    /// The call whose result this is.
    pub tool_call_id: Option<Value>,
}

/// A text, or parts of one.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// As one.
    Text(String),
    /// In parts.
    Parts(Vec<ContentPart>),
}

/// A part of a message; images and audio are refused.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum ContentPart {
    /// Text.
    Plain(String),
    /// Text.
    Text(TextPart),
    /// Text in which the assistant refused.
    Refusal(RefusalPart),
    /// Text in which the assistant thought.
    Thinking(ThinkingPart),
}

/// A part that is text.
#[derive(ToSchema)]
#[schema(as = ChatTextPart)]
pub struct TextPart {
    /// Its kind.
    #[schema(rename = "type")]
    pub kind: PartKind,
    /// The text.
    pub text: String,
}

/// A part in which the assistant refused.
#[derive(ToSchema)]
#[schema(as = ChatRefusalPart)]
pub struct RefusalPart {
    /// `refusal`
    #[schema(rename = "type", pattern = "^refusal$")]
    pub kind: String,
    /// The text.
    pub refusal: String,
}

/// A part in which the assistant thought.
#[derive(ToSchema)]
#[schema(as = ChatThinkingPart)]
pub struct ThinkingPart {
    /// `thinking`
    #[schema(rename = "type", pattern = "^thinking$")]
    pub kind: String,
    /// The text.
    pub thinking: String,
}

/// Names of text.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum PartKind {
    /// Text.
    Text,
    /// Text.
    InputText,
    /// Text.
    OutputText,
}

/// A call of an earlier turn.
#[derive(ToSchema)]
pub struct MadeCall {
    /// Its id.
    pub id: Option<Value>,
    /// `function`.
    #[schema(rename = "type")]
    pub kind: Option<Value>,
    /// What was called.
    pub function: MadeFunction,
}

/// A function that was called.
#[derive(ToSchema)]
pub struct MadeFunction {
    /// Its name.
    pub name: Option<Value>,
    /// Its arguments, as text or as an object.
    pub arguments: Value,
}

/// OpenAI's way to ask for JSON.
#[derive(ToSchema)]
pub struct ResponseFormat {
    /// Free text, any object, or an object by a schema.
    #[schema(rename = "type")]
    pub kind: ResponseFormatKind,
    /// The schema, for the last kind.
    pub json_schema: Option<JsonSchemaFormat>,
}

/// Kinds of formats.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ResponseFormatKind {
    /// Free text.
    Text,
    /// Any JSON object.
    JsonObject,
    /// What a schema says.
    JsonSchema,
}

/// A schema with a name.
#[derive(ToSchema)]
pub struct JsonSchemaFormat {
    /// Its name.
    pub name: Option<Value>,
    /// The JSON schema; any object when it is absent.
    pub schema: Option<Value>,
    /// Accepted; answers always follow the schema.
    pub strict: Option<Value>,
}

/// vLLM's way to constrain an answer.
#[derive(ToSchema)]
pub struct StructuredOutputs {
    /// A JSON schema, as an object or as text.
    pub json: Option<Value>,
    /// Any JSON object.
    pub json_object: Option<Value>,
    /// A regular expression.
    pub regex: Option<String>,
    /// The texts to choose from.
    #[schema(min_items = 1, max_items = 4096)]
    pub choice: Option<Vec<String>>,
    /// A grammar in GBNF or Lark.
    pub grammar: Option<String>,
    /// No white space in JSON beyond what it needs.
    pub disable_any_whitespace: Option<Value>,
    /// Objects have only the properties that the schema names.
    pub disable_additional_properties: Option<Value>,
    /// What white space in JSON may be, as a regular expression.
    pub whitespace_pattern: Option<String>,
}

/// A tool.
#[derive(ToSchema)]
pub struct Tool {
    /// What it is.
    pub function: ToolFunction,
}

/// A function that the model may call.
#[derive(ToSchema)]
pub struct ToolFunction {
    /// Its name, unlike that of any other.
    #[schema(pattern = "^[a-zA-Z0-9_.-]{1,128}$")]
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<HashMap<String, Value>>,
    /// Whether arguments must follow the schema.
    pub strict: Option<bool>,
}

/// Whether a function is called.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum ToolChoiceInput {
    /// none, auto or required.
    Mode(ToolMode),
    /// This function.
    Function(NamedTool),
}

/// Whether any function is called.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ToolMode {
    /// None is.
    None,
    /// The model decides.
    Auto,
    /// At least one is.
    Required,
}

/// A choice of one tool.
#[derive(ToSchema)]
pub struct NamedTool {
    /// Which.
    pub function: FunctionName,
}

/// A function's name.
#[derive(ToSchema)]
pub struct FunctionName {
    /// The name.
    pub name: String,
}

/// An error.
#[derive(ToSchema)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: ErrorObject,
}

/// What is wrong.
#[derive(ToSchema)]
pub struct ErrorObject {
    /// In words.
    #[schema(min_length = 1)]
    pub message: String,
    /// The status's phrase, or the error's name.
    #[schema(rename = "type")]
    pub kind: String,
    /// The field at fault.
    #[schema(required = true)]
    pub param: Option<String>,
    /// The status.
    #[schema(minimum = 400, maximum = 599)]
    pub code: u16,
}

/// Tokens of a request.
#[derive(ToSchema)]
pub struct UsageObject {
    /// Of the prompts.
    pub prompt_tokens: u64,
    /// Of the answers.
    pub completion_tokens: u64,
    /// Of both.
    pub total_tokens: u64,
    /// Told when the gateway is started so.
    #[schema(required = true)]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// About the tokens of the prompts.
#[derive(ToSchema)]
pub struct PromptTokensDetails {
    /// Those found in a prefix cache.
    pub cached_tokens: u64,
}

/// The reply of `POST /v1/chat/completions`. A stream has the object `chat.completion.chunk`, a
/// `delta` in each choice in place of `message`, and ends with `[DONE]`.
#[derive(ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-…`
    #[schema(pattern = "^chatcmpl-")]
    pub id: String,
    /// `chat.completion`
    pub object: String,
    /// Unix time in seconds.
    pub created: u64,
    /// The served name.
    pub model: String,
    /// The answers.
    #[schema(min_items = 1)]
    pub choices: Vec<ChatChoice>,
    /// Tokens.
    pub usage: UsageObject,
    /// By position: the token itself and its alternatives, by id.
    #[schema(required = true)]
    pub prompt_logprobs: Option<Vec<Option<HashMap<String, PromptLogprob>>>>,
    /// The prompt's tokens, if they were asked for.
    #[schema(required = true)]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// As the request had them.
    #[schema(required = true, value_type = Option<Object>)]
    pub kv_transfer_params: Option<HashMap<String, Value>>,
}

/// An answer.
#[derive(ToSchema)]
pub struct ChatChoice {
    /// Which.
    pub index: u64,
    /// What it says.
    pub message: AnswerMessage,
    /// Log-probabilities, if they were asked for.
    #[schema(required = true)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    #[schema(required = true)]
    pub finish_reason: Option<FinishReason>,
    /// The stop string or stop token that ended it.
    #[schema(required = true)]
    pub stop_reason: Option<StopReason>,
    /// Its tokens, if they were asked for.
    #[schema(required = true)]
    pub token_ids: Option<Vec<u32>>,
}

/// Why an answer ended.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum FinishReason {
    /// It is complete.
    Stop,
    /// It has as many tokens as it may have.
    Length,
    /// It calls.
    ToolCalls,
    /// It was cut.
    Abort,
}

/// What ended an answer.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// A string.
    Text(String),
    /// A token.
    Token(u32),
}

/// What an answer says.
#[derive(ToSchema)]
pub struct AnswerMessage {
    /// Mostly `assistant`.
    pub role: String,
    /// The text.
    #[schema(required = true)]
    pub content: Option<String>,
    /// What the model thought before.
    #[schema(required = true)]
    pub reasoning: Option<String>,
    /// The same under its older name.
    #[schema(required = true)]
    pub reasoning_content: Option<String>,
    /// What it calls.
    pub tool_calls: Vec<ToolCall>,
}

/// A call.
#[derive(ToSchema)]
pub struct ToolCall {
    /// Its id.
    pub id: String,
    /// `function`
    #[schema(rename = "type")]
    pub kind: String,
    /// What is called.
    pub function: CalledFunction,
}

/// A function that is called.
#[derive(ToSchema)]
pub struct CalledFunction {
    /// Its name.
    pub name: String,
    /// Its arguments, a JSON text as the model wrote it.
    pub arguments: String,
}

/// Log-probabilities of a chat.
#[derive(ToSchema)]
pub struct ChatLogprobs {
    /// By token.
    pub content: Vec<TokenLogprob>,
}

/// A token's log-probability.
#[derive(ToSchema)]
pub struct TokenLogprob {
    /// Its text.
    pub token: String,
    /// -9999 in place of minus infinity.
    pub logprob: f64,
    /// Its text's bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens in its place.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// -9999 in place of minus infinity.
    pub logprob: f64,
    /// Its text's bytes.
    pub bytes: Vec<u8>,
}

/// A token of a prompt.
#[derive(ToSchema)]
pub struct PromptLogprob {
    /// -9999 in place of minus infinity.
    pub logprob: f64,
    /// 1 is the most likely.
    pub rank: u64,
    /// Its text.
    pub decoded_token: String,
}

/// The reply of `POST /v1/completions`, also in a stream, which ends with `[DONE]`.
#[derive(ToSchema)]
pub struct TextCompletion {
    /// `cmpl-…`
    #[schema(pattern = "^cmpl-")]
    pub id: String,
    /// `text_completion`
    pub object: String,
    /// Unix time in seconds.
    pub created: u64,
    /// The served name.
    pub model: String,
    /// The answers: `n` to the first prompt, then `n` to the next.
    #[schema(min_items = 1)]
    pub choices: Vec<TextChoice>,
    /// Tokens.
    pub usage: UsageObject,
    /// As the request had them.
    #[schema(required = true, value_type = Option<Object>)]
    pub kv_transfer_params: Option<HashMap<String, Value>>,
}

/// An answer.
#[derive(ToSchema)]
pub struct TextChoice {
    /// Which.
    pub index: u64,
    /// What it says.
    pub text: String,
    /// Log-probabilities, if they were asked for.
    #[schema(required = true)]
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended.
    #[schema(required = true)]
    pub finish_reason: Option<FinishReason>,
    /// The stop string or stop token that ended it.
    #[schema(required = true)]
    pub stop_reason: Option<StopReason>,
    /// Its tokens, if they were asked for.
    #[schema(required = true)]
    pub token_ids: Option<Vec<u32>>,
    /// By position: the token itself and its alternatives, by id.
    #[schema(required = true)]
    pub prompt_logprobs: Option<Vec<Option<HashMap<String, PromptLogprob>>>>,
    /// The prompt's tokens, if they were asked for.
    #[schema(required = true)]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// The file of a transcription or translation.
#[derive(ToSchema)]
pub struct AudioFile {
    /// The recording: WAV, MP3, FLAC, Ogg, WebM, MP4, M4A, AIFF or CAF.
    #[schema(format = Binary)]
    pub file: String,
}

/// The reply of a transcription or translation, of `response_format` json or verbose_json.
#[derive(ToSchema)]
pub struct Transcription {
    /// The whole text.
    pub text: String,
    /// Of a transcription: how long the recording is.
    #[schema(nullable = false)]
    pub usage: Option<AudioUsage>,
    /// `transcribe` or `translate`.
    #[schema(nullable = false)]
    pub task: Option<String>,
    /// The text's language, in English.
    #[schema(nullable = false)]
    pub language: Option<String>,
    /// Seconds of the recording.
    #[schema(nullable = false)]
    pub duration: Option<f64>,
    /// The text with its times.
    #[schema(nullable = false)]
    pub segments: Option<Vec<TranscriptSegment>>,
    /// The words with their times.
    #[schema(nullable = false)]
    pub words: Option<Vec<TranscriptWord>>,
}

/// What a transcription is counted by.
#[derive(ToSchema)]
pub struct AudioUsage {
    /// `duration`.
    pub r#type: String,
    /// Seconds of the recording, rounded up.
    pub seconds: u64,
}

/// A stretch of a transcript.
#[derive(ToSchema)]
pub struct TranscriptSegment {
    /// From 0.
    pub id: u64,
    /// Where its window of 30 s begins, in steps of 10 ms.
    pub seek: u64,
    /// In seconds.
    pub start: f64,
    /// In seconds.
    pub end: f64,
    /// With the space before it.
    pub text: String,
    /// Text and times.
    pub tokens: Vec<TokenId>,
    /// At which its window was drawn.
    pub temperature: f64,
    /// Mean log-probability of its window's tokens.
    pub avg_logprob: f64,
    /// By how much zlib makes its window's text smaller.
    pub compression_ratio: f64,
    /// How likely it is that nobody speaks in its window.
    pub no_speech_prob: f64,
}

/// A word of a transcript.
#[derive(ToSchema)]
pub struct TranscriptWord {
    /// The word.
    pub word: String,
    /// In seconds.
    pub start: f64,
    /// In seconds.
    pub end: f64,
}

/// One event of a stream.
#[derive(ToSchema)]
pub struct StreamEvent {
    /// Its type, on routes whose events have one.
    #[schema(nullable = false)]
    pub event: Option<String>,
    /// A JSON text, or `[DONE]`.
    pub data: String,
}

/// The reply of `POST /invocations`.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Invoked {
    /// A chat's.
    Chat(ChatCompletion),
    /// A completion's.
    Text(TextCompletion),
    /// Of embeddings.
    Embeddings(Embeddings),
    /// Of classes.
    Classes(Classes),
    /// Of scores.
    Scores(Scores),
    /// Of a rank.
    Ranked(Ranked),
    /// Of `POST /pooling`.
    Pooled(PoolingReply),
}

/// Log-probabilities of a completion: lists of one length.
#[derive(ToSchema)]
pub struct TextLogprobs {
    /// Where in the text each token begins, in characters.
    pub text_offset: Vec<u64>,
    /// Of the tokens.
    pub token_logprobs: Vec<Option<f64>>,
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// The most likely tokens in their places.
    pub top_logprobs: Vec<Option<HashMap<String, f64>>>,
}

/// The reply of `POST /tokenize`.
#[derive(ToSchema)]
pub struct Tokenized {
    /// How many tokens.
    pub count: u64,
    /// How many tokens prompt and answer may have together.
    pub max_model_len: u64,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Their texts in the vocabulary, if they were asked for.
    #[schema(required = true)]
    pub token_strs: Option<Vec<Option<String>>>,
}

/// The reply of `POST /detokenize`.
#[derive(ToSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}

/// The reply of `GET /tokenizer_info`: the model's `tokenizer_config.json`.
#[derive(ToSchema)]
pub struct TokenizerInfo {
    /// The class of `transformers` that reads the tokenizer.
    pub tokenizer_class: String,
    /// The chat template, if there is one.
    #[schema(nullable = false)]
    pub chat_template: Option<String>,
}

/// The reply of `GET /v1/models`.
#[derive(ToSchema)]
pub struct Models {
    /// `list`
    pub object: String,
    /// The models.
    pub data: Vec<ModelCard>,
}

/// A model.
#[derive(ToSchema)]
pub struct ModelCard {
    /// The served name.
    pub id: String,
    /// `model`
    pub object: String,
    /// Unix time in seconds.
    pub created: u64,
    /// `vllm`
    pub owned_by: String,
    /// Where its files are.
    pub root: String,
    /// The model that an adapter changes.
    #[schema(required = true)]
    pub parent: Option<String>,
    /// How many tokens prompt and answer may have together.
    #[schema(required = true)]
    pub max_model_len: Option<u64>,
    /// What it can be asked for: generate, embed, classify, score, token_embed, token_classify,
    /// transcribe, translate.
    pub tasks: Vec<String>,
    /// What may be done with it.
    #[schema(value_type = Vec<Object>)]
    pub permission: Vec<Value>,
}

/// The reply of `GET /version`.
#[derive(ToSchema)]
pub struct Version {
    /// This gateway's.
    pub version: String,
}

/// The reply of `GET /load`.
#[derive(ToSchema)]
pub struct ServerLoad {
    /// Requests in progress.
    pub server_load: u64,
}

/// How `GET /server_info` shows settings.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ConfigFormat {
    /// As one line.
    Text,
    /// As an object.
    Json,
}

/// What Anthropic's API has.
pub mod anthropic {
    use super::*;

    /// A message.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicMessage)]
    pub enum Message {
        /// The user's.
        User(UserMessage),
        /// The model's.
        Assistant(AssistantMessage),
        /// The system's.
        System(SystemMessage),
    }

    /// A message of the user.
    #[derive(ToSchema)]
    #[schema(as = AnthropicUserMessage)]
    pub struct UserMessage {
        /// `user`, or vLLM's other words for it.
        #[schema(pattern = "^(user|ctx|msg)$")]
        pub role: String,
        /// What is said.
        pub content: UserContent,
    }

    /// A message of the model.
    #[derive(ToSchema)]
    #[schema(as = AnthropicAssistantMessage)]
    pub struct AssistantMessage {
        /// `assistant`
        #[schema(pattern = "^assistant$")]
        pub role: String,
        /// What is said.
        pub content: AssistantContent,
    }

    /// What the model is told among the messages.
    #[derive(ToSchema)]
    #[schema(as = AnthropicSystemMessage)]
    pub struct SystemMessage {
        /// `system`
        #[schema(pattern = "^system$")]
        pub role: String,
        /// What it is told.
        pub content: Text,
    }

    /// Who speaks.
    #[derive(ToSchema)]
    #[schema(as = AnthropicRole, rename_all = "snake_case")]
    pub enum Role {
        /// The user.
        User,
        /// The model.
        Assistant,
    }

    /// A text, or at least one block.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicUserContent)]
    pub enum UserContent {
        /// A text.
        Text(String),
        /// Blocks.
        Blocks(Vec<UserBlock>),
    }

    /// A text, or blocks.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicAssistantContent)]
    pub enum AssistantContent {
        /// A text.
        Text(String),
        /// Blocks.
        Blocks(Vec<AssistantBlock>),
    }

    /// A block of the user's; images and documents are refused.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicUserBlock)]
    pub enum UserBlock {
        /// Text.
        Text(TextBlock),
        /// A call's result.
        ToolResult(ToolResultBlock),
    }

    /// A block of the model's.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicAssistantBlock)]
    pub enum AssistantBlock {
        /// Text.
        Text(TextBlock),
        /// What the model thought before.
        Thinking(ThoughtBlock),
        /// What it thought, for Anthropic's eyes; dropped.
        Redacted(RedactedBlock),
        /// A call.
        ToolUse(ToolUseBlock),
    }

    /// What the model thought before.
    #[derive(ToSchema)]
    #[schema(as = AnthropicThoughtBlock)]
    pub struct ThoughtBlock {
        /// `thinking`
        #[schema(rename = "type", pattern = "^thinking$")]
        pub kind: String,
        /// The text.
        pub thinking: String,
    }

    /// What the model thought, for Anthropic's eyes.
    #[derive(ToSchema)]
    #[schema(as = AnthropicRedactedBlock)]
    pub struct RedactedBlock {
        /// `redacted_thinking`
        #[schema(rename = "type", pattern = "^redacted_thinking$")]
        pub kind: String,
    }

    /// A call's result.
    #[derive(ToSchema)]
    #[schema(as = AnthropicToolResultBlock)]
    pub struct ToolResultBlock {
        /// `tool_result`
        #[schema(rename = "type", pattern = "^tool_result$")]
        pub kind: String,
        /// The call whose result this is.
        pub tool_use_id: String,
        /// The result.
        pub content: Option<Text>,
    }

    /// A text, or blocks of text.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicText)]
    pub enum Text {
        /// A text.
        Text(String),
        /// Blocks.
        Blocks(Vec<TextBlock>),
    }

    /// A block of text.
    #[derive(ToSchema)]
    #[schema(as = AnthropicTextBlock)]
    pub struct TextBlock {
        /// `text`
        #[schema(rename = "type", pattern = "^text$")]
        pub kind: String,
        /// The text.
        pub text: String,
    }

    /// A function that the model may call.
    #[derive(ToSchema)]
    #[schema(as = AnthropicTool)]
    pub struct Tool {
        /// Its name.
        #[schema(pattern = "^[a-zA-Z0-9_.-]{1,128}$")]
        pub name: String,
        /// What it does.
        pub description: Option<String>,
        /// The JSON schema of its arguments.
        #[schema(value_type = Object)]
        pub input_schema: HashMap<String, Value>,
    }

    /// Whether a tool is called.
    #[derive(ToSchema)]
    #[schema(as = AnthropicToolChoice)]
    pub struct ToolChoice {
        /// The model decides, at least one is called, the one of this name, or none.
        #[schema(rename = "type")]
        pub kind: ToolChoiceKind,
        /// The tool, for that kind.
        pub name: Option<String>,
        /// Call at most one.
        pub disable_parallel_tool_use: Option<bool>,
    }

    /// Kinds of choices.
    #[derive(ToSchema)]
    #[schema(as = AnthropicToolChoiceKind, rename_all = "snake_case")]
    pub enum ToolChoiceKind {
        /// The model decides.
        Auto,
        /// At least one.
        Any,
        /// The named one.
        Tool,
        /// None.
        None,
    }

    /// Whether the model thinks.
    #[derive(ToSchema)]
    #[schema(as = AnthropicThinking)]
    pub struct Thinking {
        /// Whether.
        #[schema(rename = "type")]
        pub kind: ThinkingKind,
        /// Accepted; `max_tokens` alone bounds thinking.
        #[schema(minimum = 0)]
        pub budget_tokens: Option<u64>,
    }

    /// Whether the model thinks.
    #[derive(ToSchema)]
    #[schema(as = AnthropicThinkingKind, rename_all = "snake_case")]
    pub enum ThinkingKind {
        /// It does.
        Enabled,
        /// The same.
        Adaptive,
        /// It does not.
        Disabled,
    }

    /// How the model answers.
    #[derive(ToSchema)]
    #[schema(as = AnthropicOutputConfig)]
    pub struct OutputConfig {
        /// A variable of the template, `reasoning_effort`.
        pub effort: Option<String>,
        /// The form of the answer.
        pub format: Option<OutputFormat>,
    }

    /// The form of an answer.
    #[derive(ToSchema)]
    #[schema(as = AnthropicOutputFormat)]
    pub struct OutputFormat {
        /// `json_schema`
        #[schema(rename = "type", pattern = "^json_schema$")]
        pub kind: String,
        /// The JSON schema.
        #[schema(value_type = Object)]
        pub schema: HashMap<String, Value>,
    }

    /// The reply of `POST /v1/messages`. A stream has Anthropic's events, and no `[DONE]`.
    #[derive(ToSchema)]
    #[schema(as = AnthropicReply)]
    pub struct Reply {
        /// `chatcmpl-…`
        #[schema(pattern = "^chatcmpl-")]
        pub id: String,
        /// `message`
        #[schema(rename = "type")]
        pub kind: String,
        /// `assistant`
        pub role: Role,
        /// The served name.
        pub model: String,
        /// What it says.
        pub content: Vec<OutputBlock>,
        /// Why it ended.
        pub stop_reason: EndReason,
        /// The stop sequence that ended it.
        #[schema(required = true)]
        pub stop_sequence: Option<String>,
        /// Tokens.
        pub usage: Usage,
    }

    /// A block of an answer.
    #[derive(ToSchema)]
    #[serde(untagged)]
    #[schema(as = AnthropicOutputBlock)]
    pub enum OutputBlock {
        /// Text.
        Text(TextBlock),
        /// What the model thought before.
        Thinking(ThinkingBlock),
        /// A call.
        ToolUse(ToolUseBlock),
    }

    /// What the model thought before.
    #[derive(ToSchema)]
    #[schema(as = AnthropicThinkingBlock)]
    pub struct ThinkingBlock {
        /// `thinking`
        #[schema(rename = "type", pattern = "^thinking$")]
        pub kind: String,
        /// The text.
        pub thinking: String,
        /// Empty.
        pub signature: String,
    }

    /// A call.
    #[derive(ToSchema)]
    #[schema(as = AnthropicToolUseBlock)]
    pub struct ToolUseBlock {
        /// `tool_use`
        #[schema(rename = "type", pattern = "^tool_use$")]
        pub kind: String,
        /// Its id.
        pub id: String,
        /// The tool.
        pub name: String,
        /// Its arguments; empty when the answer was cut within them.
        #[schema(value_type = Object)]
        pub input: HashMap<String, Value>,
    }

    /// Why an answer ended.
    #[derive(ToSchema)]
    #[schema(as = AnthropicEndReason, rename_all = "snake_case")]
    pub enum EndReason {
        /// It is complete.
        EndTurn,
        /// It has as many tokens as it may have.
        MaxTokens,
        /// A stop sequence.
        StopSequence,
        /// It calls.
        ToolUse,
    }

    /// Tokens.
    #[derive(ToSchema)]
    #[schema(as = AnthropicUsage)]
    pub struct Usage {
        /// Of the whole prompt, cached or not.
        pub input_tokens: u64,
        /// Of the answer.
        pub output_tokens: u64,
    }

    /// The reply of `POST /v1/messages/count_tokens`.
    #[derive(ToSchema)]
    #[schema(as = AnthropicTokenCount)]
    pub struct TokenCount {
        /// Of the whole prompt.
        pub input_tokens: u64,
    }

    /// An error.
    #[derive(ToSchema)]
    #[schema(as = AnthropicError)]
    pub struct ErrorBody {
        /// `error`
        #[schema(rename = "type", pattern = "^error$")]
        pub kind: String,
        /// What is wrong.
        pub error: ErrorObject,
    }

    /// What is wrong.
    #[derive(ToSchema)]
    #[schema(as = AnthropicErrorObject)]
    pub struct ErrorObject {
        /// One of Anthropic's names.
        #[schema(rename = "type")]
        pub kind: String,
        /// In words.
        #[schema(min_length = 1)]
        pub message: String,
    }
}
