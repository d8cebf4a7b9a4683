//! All routes, in one list: what is served is what the OpenAPI document describes.

use actix_web::web::ServiceConfig;

use super::at;

macro_rules! routes {
    ($($path:literal: $($method:ident $module:ident::$handler:ident),+;)+) => {
        /// Puts every route in place.
        pub(super) fn register(config: &mut ServiceConfig) {
            $(config.service(at($path)$(.$method(super::$module::$handler))+);)+
        }
    };
}

routes! {
    "/health": get ops::health;
    "/ping": get ops::ping, post ops::ping;
    "/version": get ops::version;
    "/load": get ops::load;
    "/metrics": get ops::metrics;
    "/v1/models": get ops::models;
    "/v1/chat/completions": post chat::create;
    "/v1/completions": post completions::create;
    "/v1/messages": post messages::create;
    "/v1/messages/count_tokens": post messages::count_tokens;
    "/invocations": post invocations::invoke;
    "/tokenize": post tokenize::tokenize;
    "/detokenize": post tokenize::detokenize;
    "/tokenizer_info": get tokenize::info;
}
