//! `LoadAdapter`, `UnloadAdapter`: the set of adapters changes while requests run.

use std::sync::Arc;

use baton_proto::v1::{AdapterList, LoadAdapterRequest};
use tonic::Status;
use tracing::info;

use crate::lora::{AdapterError, Adapters};

/// Reads an adapter, off the threads that serve.
pub(super) async fn load(
    adapters: Arc<Adapters>,
    request: LoadAdapterRequest,
) -> Result<AdapterList, Status> {
    let LoadAdapterRequest { name, path, .. } = request.clone();
    let loaded = tokio::task::spawn_blocking(move || {
        adapters.load(&request, false).map(|()| adapters.list())
    });
    let list =
        loaded.await.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| {
            info!(name, path, %error, "an adapter was not loaded");
            refused(&error)
        })?;
    info!(name, path, "adapter loaded");
    Ok(list)
}

/// Takes an adapter away from new requests.
pub(super) fn unload(adapters: &Adapters, name: &str) -> Result<AdapterList, Status> {
    if !adapters.unload(name) {
        return Err(Status::not_found(format!("no adapter is loaded as `{name}`")));
    }
    info!(name, "adapter unloaded");
    Ok(adapters.list())
}

/// What an error is in gRPC.
fn refused(error: &AdapterError) -> Status {
    let message = error.to_string();
    match error {
        AdapterError::Missing { .. } => Status::not_found(message),
        AdapterError::Io { .. } | AdapterError::Refused { .. } | AdapterError::Name { .. } => {
            Status::invalid_argument(message)
        }
        AdapterError::Exists(_) => Status::already_exists(message),
        AdapterError::Full(_) => Status::resource_exhausted(message),
        AdapterError::Differs { .. } => Status::failed_precondition(message),
    }
}
