//! A configuration that operators are given, with what a test must exchange in it.

use std::fs;

use crate::binaries::repository;

/// The gateways' addresses in all of them.
const GATEWAYS: [&str; 2] = ["10.0.0.11:8000", "10.0.0.12:8000"];

/// A file of `deploy/`.
pub(crate) struct Deployed {
    name: String,
    pub(crate) text: String,
}

impl Deployed {
    /// Reads it; `name` is its path in `deploy/`.
    pub(crate) fn read(name: &str) -> Self {
        let path = repository().join("deploy").join(name);
        Self { name: name.to_owned(), text: fs::read_to_string(path).expect("a configuration") }
    }

    /// Puts something in the place of what must be there.
    pub(crate) fn exchange(&mut self, from: &str, to: &str) {
        assert!(self.text.contains(from), "{} has no {from:?}", self.name);
        self.text = self.text.replace(from, to);
    }

    /// Puts these gateways, by URL, in the place of its own.
    pub(crate) fn gateways(&mut self, urls: [&str; 2]) {
        for (from, to) in GATEWAYS.into_iter().zip(urls) {
            self.exchange(from, to.trim_start_matches("http://"));
        }
    }
}
