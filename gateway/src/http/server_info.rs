//! `GET /server_info`: what this gateway runs with, and what it sees of the cluster.
//!
//! `vllm_config` and `vllm_env` have vLLM's keys and Baton's content. Nothing here is a secret; it
//! is an operator's business all the same, and guarded as such.

use actix_web::{HttpRequest, HttpResponse, web};
use baton_membership::config::without_parameters;
use serde_json::{Map, Value, json};

use super::Shared;
use crate::api::schema::ConfigFormat;
use crate::error::ApiError;
use crate::workers::{Registry, Worker};

/// Shows what this gateway runs with, and what it sees of the cluster.
#[utoipa::path(
    get, path = "/server_info", tag = "operation",
    params(("config_format" = inline(Option<ConfigFormat>), Query, description = "text by default.")),
    responses((status = 200, description = "Settings and cluster.", body = Object)),
)]
pub(super) async fn show(
    request: HttpRequest,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let config = match format(request.query_string())? {
        Format::Json => shared.settings.clone(),
        Format::Text => Value::from(as_text(&shared.settings)),
    };
    Ok(HttpResponse::Ok().json(json!({
        "vllm_config": config,
        "vllm_env": environment(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        })),
        "system_env": {
            "baton_version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        },
        "baton": cluster(&shared.registry),
    })))
}

enum Format {
    Text,
    Json,
}

fn format(query: &str) -> Result<Format, ApiError> {
    let wanted =
        query.split('&').filter_map(|pair| pair.strip_prefix("config_format=")).next_back();
    match wanted {
        None | Some("text") => Ok(Format::Text),
        Some("json") => Ok(Format::Json),
        Some(other) => {
            let message = format!("`config_format` is {other:?}; it is `text` or `json`.");
            Err(ApiError::malformed(message).param("config_format"))
        }
    }
}

/// `name=value, …`, as Python shows an object.
fn as_text(settings: &Value) -> String {
    let fields = settings.as_object().into_iter().flatten();
    let fields: Vec<String> = fields.map(|(name, value)| format!("{name}={value}")).collect();
    fields.join(", ")
}

/// The variables that are settings. What may be a secret shows only that it is there.
fn environment(variables: impl Iterator<Item = (String, String)>) -> Map<String, Value> {
    let ours = ["BATON_", "VLLM_", "RUST_LOG"];
    let secret = ["KEY", "TOKEN", "PASSWORD", "SECRET", "CREDENTIAL"];
    let mut shown: Vec<(String, Value)> = variables
        .filter(|(name, _)| ours.iter().any(|prefix| name.starts_with(prefix)))
        .map(|(name, value)| {
            // The file that holds keys is none; BATON_KEY_… are limits of keys.
            let plain = name.ends_with("_FILE") || name.starts_with("BATON_KEY_");
            let hidden = !plain && secret.iter().any(|word| name.contains(word));
            // Several URLs are etcd's alone: elsewhere a comma may be part of a password.
            let value = match name.as_str() {
                "BATON_ETCD" => {
                    value.split(',').map(without_parameters).collect::<Vec<_>>().join(",")
                }
                _ => without_parameters(&value),
            };
            (name, if hidden { "***".into() } else { value.into() })
        })
        .collect();
    shown.sort_by(|(a, _), (b, _)| a.cmp(b));
    shown.into_iter().collect()
}

fn cluster(registry: &Registry) -> Value {
    let workers: Vec<Value> = registry.workers().iter().map(|worker| seen(worker)).collect();
    json!({"etcd_connected": registry.etcd_connected(), "workers": workers})
}

fn seen(worker: &Worker) -> Value {
    let record = &worker.record;
    let (served, status) = (worker.served(), worker.status());
    json!({
        "id": record.id,
        "role": record.role.as_str(),
        "address": record.address,
        "model": record.model,
        "version": record.version,
        "started_ms": record.started_ms,
        "state": if worker.alive() { "up" } else { "down" },
        "max_model_len": served.as_ref().map(|served| served.card.max_model_len),
        "block_size": served.as_ref().map(|served| served.block_size()),
        "draining": status.as_ref().map(|status| status.draining),
        "running": status.as_ref().map(|status| status.running),
        "waiting": status.as_ref().map(|status| status.waiting),
        "kv_blocks": status.as_ref().map(|status| json!({
            "total": status.kv_blocks_total,
            "requests": status.kv_blocks_requests,
            "handoff": status.kv_blocks_handoff,
            "cached": status.kv_blocks_cached,
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_tells_settings_and_no_secret() {
        let variables = [
            ("BATON_API_KEY", "hush"),
            ("VLLM_API_KEY", "hush"),
            ("BATON_ADMIN_KEY", "hush"),
            ("BATON_API_KEY_FILE", "/etc/keys"),
            ("BATON_DATABASE_URL", "postgres://user:hush@db/x"),
            ("BATON_RESPONSES_STORE", "postgres://user:hu,sh-hush@db/x?password=hush"),
            ("BATON_ETCD", "http://a:2379,http://u:hush@b:2379"),
            ("BATON_KEY_MAX_CONCURRENT", "4"),
            ("AWS_SECRET", "hush"),
            ("HOME", "/root"),
        ];
        let owned = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let shown = Value::from(environment(owned.into_iter()));
        assert!(!shown.to_string().contains("hush"), "{shown}");
        assert_eq!(shown["BATON_API_KEY_FILE"], "/etc/keys");
        assert_eq!(shown["BATON_ETCD"], "http://a:2379,http://***@b:2379");
        assert_eq!(shown["BATON_KEY_MAX_CONCURRENT"], "4");
        assert_eq!(shown.as_object().unwrap().len(), 8, "{shown}");
    }

    #[test]
    fn the_format_is_text_or_json() {
        assert!(matches!(format(""), Ok(Format::Text)));
        assert!(matches!(format("x=1&config_format=json"), Ok(Format::Json)));
        assert!(format("config_format=yaml").is_err());
    }
}
