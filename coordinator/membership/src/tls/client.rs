//! Connections to peers, and to etcd's members.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use etcd_client::{BalancedChannelBuilder, Channel};
use futures::StreamExt as _;
use futures::stream::poll_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::http::Uri;
use tonic::transport::channel::Change;
use tonic::transport::{Endpoint, Error};
use tower::balance::p2c::Balance;
use tower::buffer::Buffer;
use tower::load::Constant;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service, service_fn};

use super::{Tls, other};

/// Requests to etcd that wait for a connection.
const WAITING: usize = 1024;

type Connected = TokioIo<TlsStream<TcpStream>>;
type Connecting = Pin<Box<dyn Future<Output = io::Result<Connected>> + Send>>;

/// Connects by TLS, to a peer of this name, or else of the name that its address has.
pub(super) fn connector(
    tls: Arc<Tls>,
    name: Option<ServerName<'static>>,
) -> impl Service<Uri, Response = Connected, Error = io::Error, Future = Connecting> + Send + Clone
{
    service_fn(move |uri: Uri| -> Connecting {
        let (tls, name) = (tls.clone(), name.clone());
        Box::pin(async move {
            let peer = uri.authority().map(ToString::to_string).unwrap_or_default();
            let stream = open(&tls, &uri, name).await;
            tls.trouble(&peer, stream.as_ref().err().map(ToString::to_string));
            stream.map(TokioIo::new)
        })
    })
}

async fn open(
    tls: &Tls,
    uri: &Uri,
    name: Option<ServerName<'static>>,
) -> io::Result<TlsStream<TcpStream>> {
    let host = uri.host().ok_or_else(|| other("the address names no host"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = match name {
        Some(name) => name,
        None => ServerName::try_from(host.to_owned()).map_err(other)?,
    };
    let port = uri.port_u16().ok_or_else(|| other("the address names no port"))?;
    let stream = TcpStream::connect((host, port)).await?;
    // Without this a small message waits for the acknowledgement of the one before: 40 ms.
    stream.set_nodelay(true)?;
    TlsConnector::from(tls.client()).connect(name, stream).await
}

/// Makes etcd's client reach its members by TLS, whichever certificates are there at the time.
pub(crate) struct Balanced(pub(crate) Arc<Tls>);

impl BalancedChannelBuilder for Balanced {
    type Error = Error;

    fn balanced_channel(
        self,
        buffer_size: usize,
    ) -> Result<(Channel, mpsc::Sender<Change<Uri, Endpoint>>), Error> {
        let (sender, mut changes) = mpsc::channel(buffer_size);
        let members = poll_fn(move |context| changes.poll_recv(context)).map(move |change| {
            Ok::<_, BoxError>(match change {
                Change::Insert(uri, endpoint) => {
                    let connector = connector(self.0.clone(), None);
                    let channel = Endpoint::connect_with_connector_lazy(&endpoint, connector);
                    tower::discover::Change::Insert(uri, Constant::new(channel, 0_u8))
                }
                Change::Remove(uri) => tower::discover::Change::Remove(uri),
            })
        });
        let channel = BoxCloneSyncService::new(Buffer::new(Balance::new(members), WAITING));
        Ok((Channel::Custom(channel), sender))
    }
}
