//! `GET /cluster`: what runs, how busy it is, and where the last answers were computed.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::http::header::{CACHE_CONTROL, HeaderValue};
use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use super::Shared;
use crate::workers::Worker;
use crate::workers::recent::Placement;

/// The cluster as this gateway sees it, for people: the chat page draws it, once a second.
///
/// ```json
/// {
///   "object": "cluster",
///   "gateway": {
///     "version": "0.1.0",
///     "requests": 1,              // in progress here
///     "draining": false,
///     "etcd_connected": true
///   },
///   "workers": [{                 // by id
///     "id": "decode-5f0c…",
///     "role": "decode",           // prefill, decode, unified, pooling or audio
///     "state": "up",              // up, draining or down
///     "model": "smollm2",
///     "version": "0.1.0",
///     "started": 1790000000,      // Unix time in seconds
///     "status": {                 // at most a quarter of a second old; null before the first
///       "running": 1, "waiting": 0, "max_waiting": 256,          // sequences
///       "kv_blocks": {            // by owner; they add up to `total`
///         "total": 1000, "requests": 9, "handoff": 0, "cached": 120, "free": 871
///       },
///       "block_size": 16,         // tokens
///       "block_bytes": 195840,
///       "prompt_tokens": 900, "generation_tokens": 5000,         // since its start, as all below
///       "preemptions": 0,
///       "handoffs": {"requests": 4, "failures": 0, "bytes_shm": 800000, "bytes_grpc": 0,
///                    "bytes_cuda_ipc": 0, "bytes_nccl": 0},
///       "pooled": {"texts": 0, "batches": 0}                     // of pooling workers
///     }
///   }],
///   "recent": [{                  // the last 64 sequences of this gateway, newest first
///     "id": "chatcmpl-…",         // the reply's; sequences of one request share it
///     "model": "smollm2",
///     "started": 1790000000.25,   // Unix time of the first token, in seconds
///     "decode": "decode-5f0c…",   // who generates
///     "prefill": "prefill-91aa…", // who computed the prompt; null when `decode` did
///     "transport": "shm",         // how its KV came: shm, grpc, cuda-ipc, nccl or null
///     "prompt_tokens": 80,
///     "cached_tokens": 16,        // found in the prefix cache of `decode`
///     "handed_off_tokens": 64,    // computed by `prefill`
///     "handed_off_bytes": 783360,
///     "queue_us": 40,             // waiting at the worker
///     "prefill_us": 90000,        // from admission to the first token
///     "ttft_us": 93000,           // from the request's arrival to the first token
///     "migrations": 0             // how often another worker went on
///   }]
/// }
/// ```
///
/// Addresses are left out: clients have no business with them. Errors: 401.
#[utoipa::path(
    get, path = "/cluster", tag = "operation",
    responses((status = 200, description = "The cluster.", body = Object)),
)]
pub(super) async fn show(shared: web::Data<Shared>) -> HttpResponse {
    let registry = &shared.registry;
    let workers: Vec<_> = registry.workers().iter().map(|worker| describe(worker)).collect();
    let recent: Vec<_> = registry.recent.list().iter().map(placement).collect();
    HttpResponse::Ok().insert_header((CACHE_CONTROL, HeaderValue::from_static("no-store"))).json(
        json!({
            "object": "cluster",
            "gateway": {
                "version": env!("CARGO_PKG_VERSION"),
                "requests": shared.load.now(),
                "draining": shared.draining.load(Relaxed),
                "etcd_connected": registry.etcd_connected(),
            },
            "workers": workers,
            "recent": recent,
        }),
    )
}

fn describe(worker: &Worker) -> Value {
    let (record, served, status) = (&worker.record, worker.served(), worker.status());
    let state = match &status {
        _ if worker.alive() => "up",
        Some(status) if status.draining => "draining",
        _ => "down",
    };
    let status = status.map(|status| {
        let (total, requests) = (status.kv_blocks_total, status.kv_blocks_requests);
        let (handoff, cached) = (status.kv_blocks_handoff, status.kv_blocks_cached);
        json!({
            "running": status.running,
            "waiting": status.waiting,
            "max_waiting": status.max_waiting,
            "kv_blocks": {
                "total": total,
                "requests": requests,
                "handoff": handoff,
                "cached": cached,
                "free": total.saturating_sub(requests + handoff + cached),
            },
            "block_size": served.as_ref().map(|served| served.block_size()),
            "block_bytes": served.as_ref().map(|served| served.block_bytes()),
            "prompt_tokens": status.prompt_tokens,
            "generation_tokens": status.generation_tokens,
            "preemptions": status.preemptions,
            "handoffs": {
                "requests": status.handoff_requests,
                "failures": status.handoff_failures,
                "bytes_shm": status.handoff_bytes_shared_memory,
                "bytes_grpc": status.handoff_bytes_grpc,
                "bytes_cuda_ipc": status.handoff_bytes_cuda_ipc,
                "bytes_nccl": status.handoff_bytes_nccl,
            },
            "pooled": {"texts": status.pooled_inputs, "batches": status.pooled_batches},
        })
    });
    json!({
        "id": record.id,
        "role": record.role.as_str(),
        "state": state,
        "model": record.model,
        "version": record.version,
        "started": record.started_ms / 1000,
        "status": status,
    })
}

fn placement(placement: &Placement) -> Value {
    json!({
        "id": placement.request_id,
        "model": placement.model,
        "started": unix_seconds(placement.started),
        "decode": placement.decode,
        "prefill": placement.prefill,
        "transport": placement.transport,
        "prompt_tokens": placement.prompt_tokens,
        "cached_tokens": placement.cached_tokens,
        "handed_off_tokens": placement.handed_off_tokens,
        "handed_off_bytes": placement.handed_off_bytes,
        "queue_us": placement.queue.as_micros() as u64,
        "prefill_us": placement.prefill_time.as_micros() as u64,
        "ttft_us": placement.ttft.as_micros() as u64,
        "migrations": placement.migrations,
    })
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
