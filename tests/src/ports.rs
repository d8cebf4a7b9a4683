//! Ports for programs that must know theirs beforehand.

use std::net::TcpListener;

/// Below the range that the kernel gives to outgoing connections and to port 0, so that nobody
/// takes a port of ours while its owner is down for a while.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// A port that is free now. Random, so that tests which run at once rarely want the same.
pub fn free() -> u16 {
    (0..1000)
        .map(|_| rand::random_range(RANGE))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}
