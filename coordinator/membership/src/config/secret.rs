//! What is told of settings that hold secrets.

/// In place of a key.
pub(super) const HIDDEN: &str = "…";

/// A URL as it may be shown: who logs in is nobody's business.
pub fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let host = rest.find('/').unwrap_or(rest.len());
    match rest[..host].rfind('@') {
        Some(at) => format!("{scheme}://***{}", &rest[at..]),
        None => url.to_owned(),
    }
}

/// A URL likewise, which may have a password among its parameters too.
pub fn without_parameters(url: &str) -> String {
    let shown = without_password(url);
    match shown.split_once('?').filter(|(url, _)| url.contains("://")) {
        Some((url, _)) => format!("{url}?***"),
        None => shown,
    }
}

/// Whether a value was made by those above, so that what it stood for is not there.
pub(super) fn is_hidden(value: &str) -> bool {
    value == HIDDEN || value.contains("://***@") || value.ends_with("?***")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_known_again() {
        let database = "postgres://user:hush-1@db/x?password=hush-2";
        for shown in [
            without_parameters(database),
            without_password("http://user:hush-3@etcd:2379"),
            without_parameters("postgres:///x?password=hush-4"),
        ] {
            assert!(!shown.contains("hush") && is_hidden(&shown), "{shown}");
        }
        assert!(is_hidden(HIDDEN));
        for value in ["sqlite:/data/x.db", "http://etcd:2379", "http://h/path?x=1", "name=/p@q"] {
            assert_eq!(without_password(value), value);
            assert!(!is_hidden(value));
        }
    }
}
