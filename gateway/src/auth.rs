//! Bearer keys.

use std::path::Path;

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

/// Routes that answer without a key. `/` is the chat page: it is the same for all, holds nothing
/// of the cluster, and asks its user for a key.
const OPEN: [&str; 8] =
    ["/", "/health", "/ping", "/load", "/version", "/metrics", "/docs", "/openapi.json"];

/// The keys that open the API. Without any, everything is open.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
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

    /// Whether a request to `path` with this `Authorization` header may pass.
    pub fn admit(&self, path: &str, authorization: Option<&str>) -> bool {
        if self.0.is_empty() || OPEN.contains(&path) {
            return true;
        }
        let key = authorization
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map_or("", |(_, key)| key.trim());
        // Digests of one length, all compared: the time tells nothing about any key.
        let given = digest(key);
        let known = self.0.iter().fold(Choice::from(0), |known, key| known | key.ct_eq(&given));
        known.into()
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_keys_pass_and_only_open_routes_pass_without() {
        let keys = Keys::load(&["a".into(), "b".into()], None).unwrap();
        for good in ["Bearer a", "bearer b", "BEARER  b "] {
            assert!(keys.admit("/v1/models", Some(good)), "{good}");
        }
        for bad in [
            None,
            Some(""),
            Some("a"),
            Some("Bearer"),
            Some("Bearer "),
            Some("Basic a"),
            Some("Bearer c"),
        ] {
            assert!(!keys.admit("/v1/models", bad), "{bad:?}");
            assert!(keys.admit("/health", bad));
        }
        assert!(!keys.admit("/health/x", None));
        assert!(Keys::default().admit("/v1/models", None));
    }

    #[test]
    fn a_file_holds_one_key_a_line() {
        let file = std::env::temp_dir().join(format!("baton-keys-{}", std::process::id()));
        std::fs::write(&file, "# team\nfirst\n\n  second \n").unwrap();
        let keys = Keys::load(&[], Some(&file)).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(keys.admit("/x", Some("Bearer second")) && keys.admit("/x", Some("Bearer first")));
        assert!(!keys.admit("/x", Some("Bearer # team")));
        assert!(!keys.admit("/x", Some("Bearer ")));
    }
}
