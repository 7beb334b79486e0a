//! Sockets: our own accept loop, because it bounds what the framework's does not — how long headers may take, how many
//! connections there are, how long a shutdown lasts.

use super::{
    Code, Error, Peer, State,
    routes::{allow, routes},
};
use crate::config::Http;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use std::{any::Any, convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_http::{
    catch_panic::CatchPanicLayer,
    compression::CompressionLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer},
    set_header::SetResponseHeaderLayer,
    trace::TraceLayer,
};
use warp::{
    http::{HeaderName, HeaderValue, Request, header},
    hyper::body::Incoming,
    reply::{Reply, Response},
};

/// Largest head of a request, in bytes. Source: an 8 kB token and as much again.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Requests at the same time on one HTTP/2 connection. Chosen, not measured.
const STREAMS_PER_CONNECTION: u32 = 100;
/// Pause after a failed accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
#[error("{address} cannot be listened on: {reason}; choose another address with --listen or LOOPWRIGHT_LISTEN")]
pub struct BindError {
    address: SocketAddr,
    reason: String,
}

/// Opens the listener.
///
/// # Errors
/// The address is taken, not ours, or needs privileges: one sentence with the remedy.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|e| BindError {
        address,
        reason: match e.kind() {
            io::ErrorKind::AddrInUse => "another program uses the port".into(),
            io::ErrorKind::PermissionDenied => "ports below 1024 need privileges".into(),
            io::ErrorKind::AddrNotAvailable => "it is not an address of this machine".into(),
            _ => e.to_string(),
        },
    })
}

/// Serves until `stop` turns true, then lets open requests finish for at most `http.drain_ms`.
pub async fn serve(listener: TcpListener, http: &Http, state: State, mut stop: watch::Receiver<bool>) {
    let inner = warp::service(routes(&state));
    let routed = tower::service_fn(move |request: Request<Incoming>| {
        let mut inner = inner.clone();
        async move {
            let path = request.uri().path().to_owned();
            let mut response = inner.call(request).await?;
            allow(&path, &mut response);
            Ok::<_, Infallible>(response)
        }
    });
    let header = |name, value| SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value));
    let service = ServiceBuilder::new()
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .layer(TraceLayer::new_for_http().make_span_with(|request: &Request<Incoming>| {
            // Without the query, which may carry what does not belong into a log.
            let id = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
            tracing::info_span!("http", method = %request.method(), path = request.uri().path(), id)
        }))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(header(header::CACHE_CONTROL, "no-store"))
        .layer(CompressionLayer::new().gzip(true))
        .layer(CatchPanicLayer::custom(panicked))
        .service(routed);
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(http.connections_max));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(http.header_timeout_ms))
        .max_buf_size(HEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX));
    loop {
        // No permit, no accept: more connections wait in the kernel's queue.
        let permit = tokio::select! {
            permit = permits.clone().acquire_owned() => permit,
            () = stopped(&mut stop) => break,
        };
        let Ok(permit) = permit else { break };
        let (socket, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = stopped(&mut stop) => break,
        };
        // Small answers should not wait for more; a socket that refuses works all the same.
        let _ = socket.set_nodelay(true);
        let service = service.clone();
        let service = tower::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            service.clone().oneshot(request)
        });
        let connection = builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(service));
        let watched = graceful.watch(connection.into_owned());
        tokio::spawn(async move {
            // A broken connection is the client's business.
            if let Err(error) = watched.await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(permit);
        });
    }
    drop(listener);
    let drain = Duration::from_millis(http.drain_ms);
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(after_ms = http.drain_ms, "open connections were cut");
    }
}

/// Returns once the process is to stop, or nobody is left who could say so.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Both outcomes mean the same here.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The reply after a panic in a handler; the panic itself is in the log.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    Error::new(Code::Internal, "The request was not carried out.").into_response()
}
