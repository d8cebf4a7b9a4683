//! Cross-Origin Resource Sharing, with vLLM's settings.

use actix_cors::Cors;
use actix_web::http::header::HeaderName;
use actix_web::http::{Method, Uri};

use crate::config::CorsArgs;

/// How long a browser may remember what it was told, in seconds: what vLLM's framework says.
const MAX_AGE: usize = 600;
/// What pages may read of a reply beside its body.
const EXPOSED: [&str; 6] = [
    "retry-after",
    "warning",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-request-id",
];

/// The settings, checked.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `None`: any.
    origins: Option<Vec<String>>,
    methods: Option<Vec<Method>>,
    headers: Option<Vec<HeaderName>>,
    credentials: bool,
}

impl Policy {
    /// Checks the flags. An error names the one at fault.
    pub fn new(args: &CorsArgs) -> Result<Self, String> {
        let origins = list("--allowed-origins", &args.allowed_origins, |text| {
            let uri: Uri = text.parse().ok()?;
            (uri.scheme().is_some() && uri.path() == "/" && !text.ends_with('/'))
                .then(|| text.to_owned())
        })?;
        let methods = list("--allowed-methods", &args.allowed_methods, |text| {
            text.to_uppercase().parse().ok()
        })?;
        let headers = list("--allowed-headers", &args.allowed_headers, |text| text.parse().ok())?;
        Ok(Self { origins, methods, headers, credentials: args.allow_credentials })
    }

    /// The middleware.
    pub(super) fn middleware(&self) -> Cors {
        let mut cors = Cors::default().max_age(MAX_AGE).expose_headers(EXPOSED);
        cors = match &self.origins {
            Some(origins) => origins.iter().fold(cors, |cors, origin| cors.allowed_origin(origin)),
            // With credentials a browser wants the origin by its name.
            None if self.credentials => cors.allow_any_origin(),
            // The same for everybody: nothing for caches to tell apart.
            None => cors.allow_any_origin().send_wildcard().disable_vary_header(),
        };
        cors = match &self.methods {
            Some(methods) => cors.allowed_methods(methods.iter().cloned()),
            None => cors.allow_any_method(),
        };
        cors = match &self.headers {
            Some(headers) => cors.allowed_headers(headers.iter().cloned()),
            None => cors.allow_any_header(),
        };
        if self.credentials { cors.supports_credentials() } else { cors }
    }
}

/// The values of a flag, each of which may be a JSON list; `None` when one is `*`.
fn list<T>(
    flag: &str,
    values: &[String],
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<Vec<T>>, String> {
    let mut all = Vec::new();
    for value in values {
        if value.trim_start().starts_with('[') {
            let items: Vec<String> = serde_json::from_str(value)
                .map_err(|error| format!("{flag} {value} is no JSON list of strings: {error}"))?;
            all.extend(items);
        } else {
            all.push(value.clone());
        }
    }
    if all.iter().any(|item| item == "*") {
        return Ok(None);
    }
    let parsed = all.iter().map(|item| {
        parse(item).ok_or_else(|| format!("{flag} {item:?} is not one that there can be"))
    });
    parsed.collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(origins: &[&str], methods: &[&str], headers: &[&str]) -> CorsArgs {
        let owned = |list: &[&str]| list.iter().map(|&item| item.to_owned()).collect();
        CorsArgs {
            allowed_origins: owned(origins),
            allowed_methods: owned(methods),
            allowed_headers: owned(headers),
            allow_credentials: false,
        }
    }

    #[test]
    fn lists_come_as_json_or_one_by_one() {
        let json = Policy::new(&args(&[r#"["http://a", "https://b:1"]"#], &["*"], &["*"])).unwrap();
        let plain = Policy::new(&args(&["http://a", "https://b:1"], &["*"], &["*"])).unwrap();
        assert_eq!(json.origins, plain.origins);
        assert_eq!(json.origins.unwrap().len(), 2);
        assert!(Policy::new(&args(&["http://a", "*"], &["get"], &[])).unwrap().origins.is_none());
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_flag() {
        let cases = [
            (args(&["a.example"], &[], &[]), "--allowed-origins"),
            (args(&["http://a/"], &[], &[]), "--allowed-origins"),
            (args(&["[1]"], &[], &[]), "--allowed-origins"),
            (args(&["*"], &["G E T"], &[]), "--allowed-methods"),
            (args(&["*"], &["*"], &["a b"]), "--allowed-headers"),
        ];
        for (args, flag) in cases {
            let error = Policy::new(&args).unwrap_err();
            assert!(error.contains(flag), "{error}");
        }
    }
}
