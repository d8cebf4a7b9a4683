//! All routes, in one list: what is served is what the OpenAPI document describes.

use actix_web::web::ServiceConfig;
use utoipa::OpenApi;

use super::at;

macro_rules! routes {
    ($($path:literal: $($($method:ident)|+ $module:ident::$handler:ident),+;)+) => {
        /// Every route's path and methods.
        pub(super) const ROUTES: &[(&str, &[&str])] =
            &[$(($path, &[$($(stringify!($method)),+),+])),+];

        /// Puts every route in place.
        pub(super) fn register(config: &mut ServiceConfig) {
            $(config.service(at($path)$($(.$method(super::$module::$handler))+)+);)+
        }

        /// The operations, each as its handler's annotation describes it.
        #[derive(OpenApi)]
        #[openapi(paths($($(super::$module::$handler,)+)+))]
        pub(super) struct Paths;
    };
}

routes! {
    "/v1/chat/completions": post chat::create;
    "/v1/completions": post completions::create;
    "/v1/messages": post messages::create;
    "/v1/messages/count_tokens": post messages::count_tokens;
    "/v1/responses": post responses::create;
    "/v1/responses/{id}": get responses::retrieve, delete responses::delete;
    "/v1/responses/{id}/cancel": post responses::cancel;
    "/v1/responses/{id}/input_items": get responses::input_items;
    "/v1/audio/transcriptions": post audio::transcribe;
    "/v1/audio/translations": post audio::translate;
    "/v1/embeddings": post embed::embeddings;
    "/v2/embed": post cohere::embed;
    "/pooling": post embed::pool;
    "/classify": post classify::classify;
    "/score": post score::score;
    "/v1/score": post score::score_v1;
    "/rerank": post rerank::rerank;
    "/v1/rerank": post rerank::rerank_v1;
    "/v2/rerank": post rerank::rerank_v2;
    "/invocations": post invocations::invoke;
    "/tokenize": post tokenize::tokenize;
    "/detokenize": post tokenize::detokenize;
    "/tokenizer_info": get tokenize::info;
    "/v1/models": get ops::models;
    // Names may have slashes.
    "/v1/models/{name:.+}": get ops::model;
    "/v1/load_lora_adapter": post lora::load;
    "/v1/unload_lora_adapter": post lora::unload;
    "/scale_elastic_ep": post scale::scale;
    "/is_scaling_elastic_ep": post scale::is_scaling;
    "/health": get ops::health;
    "/ping": get|post ops::ping;
    "/live": get ops::live;
    "/version": get ops::version;
    "/load": get ops::load;
    "/metrics": get ops::metrics;
    "/server_info": get server_info::show;
    "/cluster": get cluster::show;
    "/": get|head page::show;
    "/openapi.json": get openapi::json;
    "/docs": get openapi::index;
    "/docs/{file}": get openapi::page;
}

/// The methods of the route with this pattern, as the `Allow` header lists them.
pub(super) fn allowed(pattern: Option<&str>) -> String {
    let methods = ROUTES.iter().find(|(path, _)| Some(*path) == pattern);
    let methods = methods.map_or(&[][..], |(_, methods)| methods);
    methods.iter().map(|method| method.to_uppercase()).collect::<Vec<_>>().join(", ")
}
