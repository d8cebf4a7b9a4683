//! The bodies that routes take, described for the OpenAPI document: the fields of the types that
//! [`Body::read`](super::Body::read) takes out of them, one after the other.

use serde_json::Value;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::{PartialSchema, ToSchema};

use super::audio::{self, AudioFields};
use super::chat::{ChatFields, Conversation};
use super::completion::CompletionFields;
use super::messages::{self, MessagesFields};
use super::pooling::cohere::{self, CohereEmbedFields};
use super::pooling::embed::{EmbedFields, EncodingFields, PoolFields};
use super::pooling::score::{PairFields, RerankFields, ScoreFields};
use super::pooling::{self, InputFields, PoolingFields};
use super::responses::request::{self as responses, ResponsesFields};
use super::sampling::SamplingFields;
use super::schema::{AudioFile, ChatMessage};
use super::structured::StructuredFields;
use super::tokenize::{DetokenizeFields, TokenizeFields};
use super::tools::ToolFields;
use super::{IGNORED, UNSUPPORTED};

/// Defines a body: its parts, the fields that must be there, those that change nothing, and
/// whether fields that are not built are refused.
macro_rules! request {
    ($(#[$doc:meta])* $name:ident: [$($part:ty),+], $required:expr, $ignored:expr, $refused:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                merged(vec![$(<$part>::schema()),+], $required, $ignored, $refused)
            }
        }

        impl ToSchema for $name {
            fn schemas(list: &mut Vec<(String, RefOr<Schema>)>) {
                $(<$part>::schemas(list);)+
            }
        }
    };
}

request!(
    /// The body of `POST /v1/chat/completions`.
    ChatRequest:
    [Conversation, SamplingFields, ChatFields, ToolFields, StructuredFields],
    &["messages"],
    &[IGNORED],
    UNSUPPORTED
);
request!(
    /// The body of `POST /v1/completions`.
    CompletionRequest:
    [CompletionFields, SamplingFields, StructuredFields],
    &["prompt"],
    &[IGNORED],
    UNSUPPORTED
);
request!(
    /// The body of `POST /v1/messages`.
    MessagesRequest:
    [MessagesFields],
    &["model", "messages", "max_tokens"],
    &[messages::IGNORED, &["metadata", "service_tier"]],
    &[]
);
request!(
    /// The body of `POST /v1/messages/count_tokens`.
    CountTokensRequest:
    [MessagesFields],
    &["model", "messages"],
    &[messages::IGNORED, &["metadata", "service_tier"]],
    &[]
);
request!(
    /// The body of `POST /v1/responses`.
    ResponsesRequest:
    [ResponsesFields, SharedFields],
    &["input"],
    &[responses::IGNORED],
    &[]
);
request!(
    /// The form of `POST /v1/audio/transcriptions` and `POST /v1/audio/translations`.
    AudioRequest:
    [AudioFile, AudioFields],
    &["file"],
    &[audio::IGNORED],
    audio::UNSUPPORTED
);
request!(
    /// The body of `POST /v1/embeddings`: with `input`, or with `messages`.
    EmbeddingRequest:
    [Conversation, InputFields, PoolingFields, EmbedFields, EncodingFields],
    &[],
    &[pooling::IGNORED],
    &[]
);
request!(
    /// The body of `POST /pooling`: with `input`, or with `messages`.
    PoolingRequest:
    [Conversation, InputFields, PoolingFields, PoolFields, EncodingFields],
    &[],
    &[pooling::IGNORED],
    &[]
);
request!(
    /// The body of `POST /classify`: with `input`, or with `messages`.
    ClassifyRequest:
    [Conversation, InputFields, PoolingFields],
    &[],
    &[pooling::IGNORED],
    &[]
);
request!(
    /// The body of `POST /score`: with two fields of texts.
    ScoreRequest:
    [ScoreFields, PairFields, PoolingFields],
    &[],
    &[pooling::IGNORED],
    &[]
);
request!(
    /// The body of `POST /rerank`.
    RerankRequest:
    [RerankFields, PairFields, PoolingFields],
    &["query", "documents"],
    &[pooling::IGNORED],
    &[]
);
request!(
    /// The body of `POST /v2/embed`.
    CohereEmbedRequest:
    [CohereEmbedFields],
    &[],
    &[pooling::IGNORED, cohere::IGNORED],
    &[]
);
request!(
    /// The body of `POST /tokenize`: with `prompt`, or with `messages`.
    TokenizeRequest:
    [TokenizeFields, Conversation, ToolFields],
    &[],
    &[],
    &[]
);
request!(
    /// The body of `POST /detokenize`.
    DetokenizeRequest:
    [DetokenizeFields],
    &["tokens"],
    &[],
    &[]
);
request!(
    /// The body of `POST /invocations`: that of the route which does it. With `messages` a chat's,
    /// else with `prompt` a completion's, else with `input` that of embeddings, of classes or of
    /// `/pooling`, by what the model does; then that of scores, and of ranks. `query` and
    /// `documents` are a rank's.
    InvocationRequest:
    [Invocation],
    &[],
    &[],
    &[]
);

/// What tells the kinds of invocations apart.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description; the bodies are read as those of their routes")]
struct Invocation {
    /// Served model; any, when it is absent.
    model: Option<String>,
    /// A chat's conversation.
    #[schema(value_type = Option<Vec<ChatMessage>>, min_items = 1)]
    messages: Option<Value>,
    /// What a completion begins with.
    prompt: Option<Value>,
    /// Texts to embed, to classify or to pool.
    input: Option<Value>,
    /// What documents are ranked for.
    query: Option<Value>,
    /// What is ranked.
    documents: Option<Value>,
    /// The most tokens of an answer.
    #[schema(minimum = 1, maximum = 4294967295i64)]
    max_tokens: Option<i64>,
    /// Send tokens as they come.
    stream: Option<bool>,
}

/// The fields that responses share with chats.
struct SharedFields;

impl PartialSchema for SharedFields {
    fn schema() -> RefOr<Schema> {
        let chats = vec![
            SamplingFields::schema(),
            StructuredFields::schema(),
            Conversation::schema(),
            ToolFields::schema(),
        ];
        let mut all = merged(chats, &[], &[], &[]);
        if let RefOr::T(Schema::Object(all)) = &mut all {
            all.properties.retain(|name, _| responses::SHARED.contains(&name.as_str()));
        }
        all
    }
}

impl ToSchema for SharedFields {
    fn schemas(list: &mut Vec<(String, RefOr<Schema>)>) {
        SamplingFields::schemas(list);
        StructuredFields::schemas(list);
        Conversation::schemas(list);
        ToolFields::schemas(list);
    }
}

fn merged(
    parts: Vec<RefOr<Schema>>,
    required: &[&str],
    ignored: &[&[&str]],
    refused: &[(&str, &str)],
) -> RefOr<Schema> {
    let mut all = ObjectBuilder::new()
        .schema_type(SchemaType::new(Type::Object))
        .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(true)));
    for part in parts {
        let RefOr::T(Schema::Object(part)) = part else { continue };
        for (name, schema) in part.properties {
            all = all.property(name, schema);
        }
    }
    for name in ignored.iter().copied().flatten() {
        all = all.property(*name, any("Changes nothing here."));
    }
    for (name, harmless) in refused {
        let mut values = vec![Value::Null];
        values.extend(serde_json::from_str(harmless).ok().filter(|value| *value != Value::Null));
        let only = ObjectBuilder::new()
            .schema_type(SchemaType::AnyValue)
            .description(Some("Not supported; only what asks for nothing is taken."))
            .enum_values(Some(values));
        all = all.property(*name, only);
    }
    for name in required {
        all = all.required(*name);
    }
    all.build().into()
}

fn any(description: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).description(Some(description))
}
