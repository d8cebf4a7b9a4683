//! KV block ownership.
