//! Whom a server listens to: in plain text everybody, with TLS those who show a certificate of the
//! cluster.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::Either;
use futures::stream::poll_fn;
use futures::{Stream, StreamExt as _};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpIncoming};

use super::{CLUSTER, Tls, other};

/// Handshakes at a time, and how long one may take.
const MAX_HANDSHAKES: usize = 256;
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Connections that wait to be served.
const WAITING: usize = 16;
/// Wait after a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection of a caller.
#[derive(Debug)]
pub enum Link {
    /// In plain text.
    Plain(TcpStream),
    /// Of a caller that has shown its certificate.
    Tls(Box<TlsStream<TcpStream>>),
}

/// The connections of a listener. With an identity only those of the cluster, and a handshake that
/// takes long holds up no other.
pub fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<Link>> + Send {
    // Without this a small message waits for the acknowledgement of the one before: 40 ms.
    let plain = TcpIncoming::from(listener).with_nodelay(Some(true));
    let Some(cluster) = CLUSTER.get() else {
        return Either::Left(plain.map(|stream| stream.map(Link::Plain)));
    };
    let (ready, mut links) = mpsc::channel(WAITING);
    tokio::spawn(accept(plain, cluster.tls.clone(), ready));
    Either::Right(poll_fn(move |context| links.poll_recv(context)))
}

async fn accept(mut plain: TcpIncoming, tls: Arc<Tls>, ready: mpsc::Sender<io::Result<Link>>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let stream = tokio::select! {
            () = ready.closed() => return,
            stream = plain.next() => stream,
        };
        let stream = match stream {
            Some(Ok(stream)) => stream,
            Some(Err(_)) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            None => return,
        };
        let Ok(place) = handshakes.clone().acquire_owned().await else { return };
        let (tls, ready) = (tls.clone(), ready.clone());
        tokio::spawn(async move {
            let caller = stream.peer_addr().map(|it| it.to_string()).unwrap_or_default();
            let shaken = tokio::time::timeout(HANDSHAKE_WITHIN, shake(&tls, stream)).await;
            drop(place);
            match shaken.unwrap_or_else(|_| Err(other("no handshake in time"))) {
                Ok(Some(stream)) => {
                    let _ = ready.send(Ok(Link::Tls(Box::new(stream)))).await;
                }
                Ok(None) => {}
                Err(error) => tls.refused(&caller, &error.to_string()),
            }
        });
    }
}

/// `None` for a caller that leaves without a word, as a probe of the port does.
async fn shake(tls: &Tls, stream: TcpStream) -> io::Result<Option<TlsStream<TcpStream>>> {
    let config = tls.server().ok_or_else(|| other("there is no certificate to serve with"))?;
    if stream.peek(&mut [0]).await? == 0 {
        return Ok(None);
    }
    TlsAcceptor::from(config).accept(stream).await.map(Some)
}

impl Connected for Link {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Link {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Wants the cluster's name in a caller's certificate, beside a signature of the authority: the
/// authority may sign for others too.
#[derive(Debug)]
pub(super) struct Named {
    signed: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl Named {
    pub(super) fn new(signed: Arc<dyn ClientCertVerifier>, name: ServerName<'static>) -> Self {
        Self { signed, name }
    }
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.signed.verify_client_cert(certificate, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(certificate)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}
