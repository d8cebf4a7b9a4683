//! Notices when a client has gone, or no longer reads.
//!
//! actix-web polls a handler without looking at its socket, so a client that leaves while its
//! prompt is computed would be noticed with the answer only. Each connection is therefore watched
//! through a second descriptor of the same socket: it becomes readable, with nothing to read, when
//! the client has closed its side. As with uvicorn, a client that closes only its sending side
//! counts as gone. Under TLS it is the socket below that is watched.
//!
//! A client that stays and does not read is the kernel's to notice: a connection on which sent
//! data is not taken for too long is cut (`TCP_USER_TIMEOUT`), and then the client has gone.

use std::io::{Error, ErrorKind};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Duration;

use actix_web::dev::Extensions;
use actix_web::rt::net::TcpStream;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::io::Interest;
use tracing::warn;

/// A client's connection.
#[derive(Clone)]
pub(super) struct Connection(Rc<TcpStream>);

/// Called by the server for every new connection.
pub(super) fn watch(stream: &TcpStream, send_timeout: Duration, extensions: &mut Extensions) {
    // Else an event waits for the acknowledgement of the one before: 40 ms.
    let set = stream.set_nodelay(true).and_then(|()| {
        let millis = send_timeout.as_millis().try_into().unwrap_or(u32::MAX);
        Ok(set_tcp_user_timeout(stream, millis)?)
    });
    if let Err(error) = set {
        warn!(%error, "a connection cannot be set up as it should be");
    }
    let second = stream
        .as_fd()
        .try_clone_to_owned()
        .and_then(|descriptor| TcpStream::from_std(StdTcpStream::from(descriptor)));
    match second {
        Ok(second) => {
            extensions.insert(Connection(Rc::new(second)));
        }
        // Out of descriptors: the request is served, and a leave is noticed later.
        Err(error) => warn!(%error, "a connection cannot be watched"),
    }
}

impl Connection {
    /// Returns when the client has gone.
    pub(super) async fn closed(&self) {
        let stream = &self.0;
        loop {
            let Ok(ready) = stream.ready(Interest::READABLE | Interest::ERROR).await else {
                return;
            };
            if ready.is_read_closed() || ready.is_error() {
                return;
            }
            // Bytes of the next request, or of this one's body: they are for the server to read.
            // `WouldBlock` makes tokio wait for the next change.
            let _ = stream.try_io(Interest::READABLE, || -> std::io::Result<()> {
                Err(Error::from(ErrorKind::WouldBlock))
            });
        }
    }
}

/// Waits for the client to leave; for ever when the connection is not watched.
pub(super) async fn closed(connection: Option<&Connection>) {
    match connection {
        Some(connection) => connection.closed().await,
        None => std::future::pending().await,
    }
}
