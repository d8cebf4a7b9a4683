//! Reads a form with a file in it (`multipart/form-data`, RFC 7578), within bounds of size and
//! time.

use std::time::Duration;

use actix_multipart::{Field, Multipart, MultipartError};
use actix_web::HttpRequest;
use actix_web::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use actix_web::web::{Bytes, Payload};
use futures::StreamExt as _;
use serde_json::{Map, Value};

use super::Limits;
use crate::api::Body;
use crate::error::ApiError;

/// Fields of a form.
const MAX_FIELDS: usize = 128;
/// Bytes of all fields that are no file, and of what stands between them.
const MAX_TEXT: usize = 256 * 1024;

/// A form.
pub(super) struct Form {
    /// The fields that are no file, each a string, those whose name ends with `[]` a list.
    pub(super) body: Body,
    /// The field `file`.
    pub(super) file: Bytes,
}

/// Reads a form whose field `file` is a file.
pub(super) async fn read(
    request: &HttpRequest,
    payload: Payload,
    limits: &Limits,
) -> Result<Form, ApiError> {
    let media = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media = media.unwrap_or_default();
    let kind = media.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("multipart/form-data") {
        let message = format!("Content-Type is {kind:?}; only multipart/form-data is allowed.");
        return Err(ApiError::malformed(message));
    }
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let announced: Option<u64> = announced.and_then(|length| length.parse().ok());
    if announced.is_some_and(|length| length > (limits.max_audio_bytes + MAX_TEXT) as u64) {
        return Err(too_large(limits.max_audio_bytes));
    }
    let form = Multipart::new(request.headers(), payload);
    in_time(limits.body_timeout, collect(form, limits.max_audio_bytes)).await
}

async fn in_time<T>(
    time: Duration,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    tokio::time::timeout(time, work).await.map_err(|_| ApiError::slow_body())?
}

async fn collect(mut form: Multipart, max_bytes: usize) -> Result<Form, ApiError> {
    let mut fields = Map::new();
    let mut file = None;
    let (mut count, mut text) = (0, 0);
    while let Some(field) = form.next().await {
        let mut field = field.map_err(broken)?;
        count += 1;
        if count > MAX_FIELDS {
            let message = format!("The form has more than {MAX_FIELDS} fields.");
            return Err(ApiError::malformed(message));
        }
        let Some(name) = field.name().map(str::to_owned) else {
            return Err(ApiError::malformed("A field of the form has no name."));
        };
        let disposition = field.content_disposition();
        let is_file = disposition
            .is_some_and(|it| it.get_filename().is_some() || it.get_filename_ext().is_some());
        if name == "file" {
            if !is_file {
                let message = "`file` is a text; send a file: a part with a `filename`.";
                return Err(ApiError::unprocessable("file", message));
            }
            if file.is_some() {
                let message = "`file` is there twice; send one file with each request.";
                return Err(ApiError::malformed(message).param("file"));
            }
            file = Some(bytes(&mut field, max_bytes, || too_large(max_bytes)).await?);
            continue;
        }
        let room = MAX_TEXT.saturating_sub(text);
        let value = bytes(&mut field, room, || {
            let message = format!("The form's texts are longer than {MAX_TEXT} bytes together.");
            ApiError::malformed(message).param(&*name)
        });
        let value = value.await?;
        text += value.len() + name.len();
        let value = String::from_utf8(value).map_err(|_| {
            ApiError::malformed(format!("`{name}` is no text in UTF-8.")).param(&*name)
        })?;
        if name.ends_with("[]") {
            let list = fields.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.push(value.into());
            }
        } else {
            fields.insert(name, value.into());
        }
    }
    let Some(file) = file else {
        return Err(ApiError::malformed("`file` is required: the recording.").param("file"));
    };
    Ok(Form { body: Body::new(fields), file: file.into() })
}

async fn bytes(
    field: &mut Field,
    most: usize,
    too_large: impl FnOnce() -> ApiError,
) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.next().await {
        let chunk = chunk.map_err(broken)?;
        if bytes.len() + chunk.len() > most {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn broken(error: MultipartError) -> ApiError {
    ApiError::malformed(format!("The form could not be read: {error}."))
}

fn too_large(max_bytes: usize) -> ApiError {
    let mebibytes = max_bytes / (1024 * 1024);
    let message = format!(
        "`file` is larger than {mebibytes} MiB, the most that is taken \
         (--max-audio-filesize-mb); send it in parts, or compressed."
    );
    // vLLM's name for it.
    ApiError::bad_value("audio_filesize_mb", message)
}
