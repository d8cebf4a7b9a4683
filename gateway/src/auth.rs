//! Keys: who may call which route.
//!
//! An API key opens the API. Routes that change the cluster, or that show how it is set up, want
//! an admin key when there is one; an admin key opens the API too.

use std::path::Path;

use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

use crate::error::ApiError;

/// Routes that answer without a key. `/` is the chat page: it is the same for all, holds nothing
/// of the cluster, and asks its user for a key.
const OPEN: [&str; 9] =
    ["/", "/health", "/ping", "/live", "/load", "/version", "/metrics", "/docs", "/openapi.json"];

/// Routes that answer without a key whatever is set: a probe has none to send, and learns no more
/// than whether the gateway serves, or answers.
const PROBES: [&str; 3] = ["/health", "/ping", "/live"];

/// Routes for operators. A route that is not served yet may be listed: it is guarded from its
/// first day.
const ADMIN: [&str; 22] = [
    "/abort_requests",
    "/collective_rpc",
    "/drain",
    "/finish_weight_update",
    "/init_weight_transfer_engine",
    "/is_scaling_elastic_ep",
    "/pause",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/scale_elastic_ep",
    "/server_info",
    "/sleep",
    "/start_profile",
    "/start_weight_update",
    "/stop_profile",
    "/undrain",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/wake_up",
];

/// Of a key, only this is kept.
pub type KeyDigest = [u8; 32];

/// All keys. Without any, everything is open.
#[derive(Clone, Default)]
pub struct Keys {
    api: KeySet,
    admin: KeySet,
    guard_all: bool,
}

/// Keys of one kind.
#[derive(Clone, Default)]
pub struct KeySet(Vec<KeyDigest>);

/// A request that may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The key that it came with, if it needed one.
    pub key: Option<KeyDigest>,
    /// Whether the limits of a client hold for it: not on open routes, nor for operators.
    pub limited: bool,
}

impl Admitted {
    /// Whose things are made by the request: its key's digest in hex, and for all who come without
    /// a key the same empty text.
    pub fn owner(&self) -> String {
        self.key.iter().flatten().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl KeySet {
    /// Takes keys as they are, and one from each line of `file` that is neither empty nor a
    /// comment (`#`).
    pub fn load(keys: &[String], file: Option<&Path>) -> std::io::Result<Self> {
        let lines = file.map(std::fs::read_to_string).transpose()?.unwrap_or_default();
        let from_file = lines.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        let all = keys.iter().map(String::as_str).chain(from_file);
        Ok(Self(all.filter(|key| !key.is_empty()).map(digest).collect()))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the digests is that of a key. All are compared, in constant time: how long
    /// it takes tells nothing about any key.
    fn find(&self, given: &[KeyDigest]) -> Option<KeyDigest> {
        let mut found = None;
        for one in given {
            let known = self.0.iter().fold(Choice::from(0), |known, key| known | key.ct_eq(one));
            if known.into() {
                found = Some(*one);
            }
        }
        found
    }
}

impl Keys {
    /// Keys of both kinds. With `guard_all` only probes pass without a key.
    pub fn new(api: KeySet, admin: KeySet, guard_all: bool) -> Self {
        Self { api, admin, guard_all }
    }

    /// Whether a request to `path`, decoded as the router sees it, may pass with these headers.
    pub fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Admitted, ApiError> {
        if self.open(path) {
            return Ok(Admitted { key: None, limited: false });
        }
        let for_admins = ADMIN.contains(&path);
        let needed = !self.api.is_empty() || (for_admins && !self.admin.is_empty());
        if !needed {
            return Ok(Admitted { key: None, limited: !for_admins });
        }
        let given = presented(headers);
        let admin = self.admin.find(&given);
        let Some(key) = admin.or(self.api.find(&given)) else {
            return Err(ApiError::unauthorized());
        };
        if for_admins && !self.admin.is_empty() && admin.is_none() {
            return Err(ApiError::forbidden(path));
        }
        Ok(Admitted { key: Some(key), limited: !for_admins })
    }

    fn open(&self, path: &str) -> bool {
        is_open(path) && (!self.guard_all || PROBES.contains(&path))
    }
}

/// The digests of the keys that a request shows: `Authorization: Bearer KEY`, and `x-api-key`,
/// which is what Anthropic's clients send.
fn presented(headers: &HeaderMap) -> Vec<KeyDigest> {
    let bearer = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key);
    let other = headers.get("x-api-key").and_then(|value| value.to_str().ok());
    bearer.into_iter().chain(other).map(|key| digest(key.trim())).collect()
}

/// Whether a route is for operators.
pub fn is_for_admins(path: &str) -> bool {
    ADMIN.contains(&path)
}

/// Whether a route answers without a key, unless everything is guarded.
pub fn is_open(path: &str) -> bool {
    OPEN.contains(&path) || path.starts_with("/docs/")
}

fn digest(key: &str) -> KeyDigest {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::{HeaderName, HeaderValue};

    use super::*;

    fn set(keys: &[&str]) -> KeySet {
        KeySet(keys.iter().map(|key| digest(key)).collect())
    }

    fn headers(name: &str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    fn bearer(key: &str) -> HeaderMap {
        headers("authorization", &format!("Bearer {key}"))
    }

    fn status(result: Result<Admitted, ApiError>) -> u16 {
        use actix_web::ResponseError as _;
        result.map_or_else(|error| error.status_code().as_u16(), |_| 200)
    }

    #[test]
    fn only_known_keys_pass_and_only_open_routes_pass_without() {
        let keys = Keys::new(set(&["a", "b"]), KeySet::default(), false);
        for good in ["Bearer a", "bearer b", "BEARER  b "] {
            let headers = headers("authorization", good);
            assert_eq!(status(keys.admit("/v1/models", &headers)), 200, "{good}");
        }
        assert_eq!(status(keys.admit("/v1/models", &headers("x-api-key", "b"))), 200);
        for bad in ["", "a", "Bearer", "Bearer ", "Basic a", "Bearer c"] {
            let headers = headers("authorization", bad);
            assert_eq!(status(keys.admit("/v1/models", &headers)), 401, "{bad:?}");
            assert_eq!(status(keys.admit("/health", &headers)), 200);
        }
        let none = HeaderMap::new();
        for guarded in ["/health/x", "//health", "/v1/models", "/docsx", "/no/such/route"] {
            assert_eq!(status(keys.admit(guarded, &none)), 401, "{guarded}");
        }
        for open in ["/", "/docs", "/docs/swagger-ui.css", "/metrics", "/openapi.json"] {
            assert_eq!(status(keys.admit(open, &none)), 200, "{open}");
        }
        assert_eq!(status(Keys::default().admit("/v1/models", &none)), 200);
        // One wrong key beside a right one does no harm.
        let mut both = bearer("wrong");
        both.insert(HeaderName::from_static("x-api-key"), HeaderValue::from_static("a"));
        assert_eq!(status(keys.admit("/v1/models", &both)), 200);
    }

    #[test]
    fn admin_routes_want_an_admin_key_when_there_is_one() {
        let both = Keys::new(set(&["api"]), set(&["admin"]), false);
        let api_only = Keys::new(set(&["api"]), KeySet::default(), false);
        let admin_only = Keys::new(KeySet::default(), set(&["admin"]), false);
        let none = HeaderMap::new();
        for path in ADMIN {
            assert_eq!(status(both.admit(path, &none)), 401, "{path}");
            assert_eq!(status(both.admit(path, &bearer("api"))), 403, "{path}");
            assert_eq!(status(both.admit(path, &bearer("admin"))), 200, "{path}");
            assert_eq!(status(api_only.admit(path, &bearer("api"))), 200, "{path}");
            assert_eq!(status(api_only.admit(path, &none)), 401, "{path}");
            assert_eq!(status(admin_only.admit(path, &none)), 401, "{path}");
        }
        assert_eq!(status(both.admit("/v1/models", &bearer("admin"))), 200);
        assert_eq!(status(admin_only.admit("/v1/models", &none)), 200);
    }

    #[test]
    fn with_everything_guarded_only_probes_pass() {
        let keys = Keys::new(set(&["a"]), KeySet::default(), true);
        let none = HeaderMap::new();
        for path in OPEN.into_iter().chain(["/docs/x"]) {
            let expected = if PROBES.contains(&path) { 200 } else { 401 };
            assert_eq!(status(keys.admit(path, &none)), expected, "{path}");
            assert_eq!(status(keys.admit(path, &bearer("a"))), 200, "{path}");
        }
    }

    #[test]
    fn limits_hold_for_clients_alone() {
        let keys = Keys::new(set(&["a"]), set(&["b"]), false);
        let admitted = |path| keys.admit(path, &bearer("b")).unwrap();
        assert_eq!(admitted("/v1/models").key, Some(digest("b")));
        assert!(admitted("/v1/models").limited);
        assert!(!admitted("/drain").limited && !admitted("/metrics").limited);
    }

    #[test]
    fn a_file_holds_one_key_a_line() {
        let file = std::env::temp_dir().join(format!("baton-keys-{}", std::process::id()));
        std::fs::write(&file, "# team\nfirst\n\n  second \n").unwrap();
        let keys = Keys::new(KeySet::load(&[], Some(&file)).unwrap(), KeySet::default(), false);
        std::fs::remove_file(&file).unwrap();
        for (key, expected) in [("first", 200), ("second", 200), ("# team", 401), ("", 401)] {
            assert_eq!(status(keys.admit("/x", &bearer(key))), expected, "{key}");
        }
    }
}
