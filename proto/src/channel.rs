//! How Baton's processes call each other.

use std::time::Duration;

use tonic::transport::{Endpoint, Error};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a silent connection is probed, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// An endpoint that notices within seconds when its peer is gone. Connects when it is used.
///
/// # Errors
/// When the address is no URL.
pub fn endpoint(address: &str) -> Result<Endpoint, Error> {
    Ok(Endpoint::from_shared(address.to_owned())?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        // Who drops a stream resets it, and may find frames of it on their way. h2 takes them for
        // the peer's errors, and by default closes the connection, with all its streams, after a
        // thousand: a defence against strangers, but these are peers.
        .http2_max_local_error_reset_streams(None)
        .tcp_nodelay(true))
}
