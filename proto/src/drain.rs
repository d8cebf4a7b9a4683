//! How a worker that drains says so when it refuses a request, or gives one up.
//!
//! UNAVAILABLE alone could be a worker that died. With the mark it lives, has not failed, and the
//! request goes elsewhere at once.

use tonic::Status;
use tonic::metadata::MetadataValue;

/// The key of the mark in a status's metadata.
const MARK: &str = "baton-draining";

/// UNAVAILABLE, marked.
pub fn draining(message: impl Into<String>) -> Status {
    let mut status = Status::unavailable(message);
    status.metadata_mut().insert(MARK, MetadataValue::from_static("1"));
    status
}

/// Whether a status comes from a worker that drains.
pub fn is_draining(status: &Status) -> bool {
    status.metadata().contains_key(MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_drains_is_told_from_one_that_is_gone() {
        assert!(is_draining(&draining("the worker drains")));
        assert!(!is_draining(&Status::unavailable("connection refused")));
    }
}
