//! Time limits, each by itself, cancellation, and addresses that are not connected to.

use super::{LOST, PATIENT, ask_with, client, client_of, request, verdict};
use loopwright_activities::{
    provider::{Advice, Timeouts, address::Trust},
    testing::{Dialect, End, FakeProvider, Fault, Reply, Stage, When},
    usage::CallState,
};
use loopwright_engine::FailureKind;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// Long enough for a busy machine to get as far as it should, short enough to wait for.
const SHORT: Duration = Duration::from_millis(700);

/// With `fault`, a client with these limits gives up after `limit` and before the patient ones; it has closed its
/// connection.
async fn gives_up(fault: Fault, timeouts: Timeouts, limit: Duration, stage: Stage) {
    let cases = Dialect::ALL.map(|dialect| {
        let fault = fault.clone();
        async move {
            let server = FakeProvider::saying(Reply::text("a text that is never finished")).await;
            server.inject(When::Every(dialect), fault);
            let provider = client(dialect, &server.base_of(dialect), timeouts);
            let started = Instant::now();
            let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
            let elapsed = started.elapsed();
            assert_eq!(verdict(&error), LOST, "{dialect:?}");
            assert!(elapsed >= limit && elapsed < PATIENT.connect, "{dialect:?}: {elapsed:?}");
            assert!(error.unwell, "silence is a sign of illness");
            let journal = server.journal_when(|all| all.iter().all(|entry| entry.end == End::Client)).await;
            assert_eq!((journal.len(), journal[0].stage), (1, stage), "{dialect:?}");
        }
    });
    futures_util::future::join_all(cases).await;
}

#[tokio::test]
async fn headers_that_do_not_come_end_a_call() {
    let timeouts = Timeouts { connect: SHORT, first_byte: SHORT, ..PATIENT };
    gives_up(Fault::StallBeforeHeaders, timeouts, SHORT, Stage::Received).await;
}

#[tokio::test]
async fn a_body_that_does_not_begin_ends_a_call() {
    gives_up(Fault::StallAfterHeaders, Timeouts { first_byte: SHORT, ..PATIENT }, SHORT, Stage::Headers).await;
}

#[tokio::test]
async fn silence_in_mid_answer_ends_a_call() {
    gives_up(Fault::StallMidBody, Timeouts { idle: SHORT, ..PATIENT }, SHORT, Stage::Body).await;
}

#[tokio::test]
async fn a_lively_stream_of_comments_ends_with_the_total_limit() {
    let timeouts = Timeouts { total: 2 * SHORT, ..PATIENT };
    gives_up(Fault::CommentsForever, timeouts, 2 * SHORT, Stage::Body).await;
}

/// A listener that accepts nobody, and whose queue is full: connections to it hang.
async fn deaf() -> (tokio::net::TcpListener, Vec<TcpStream>, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = timeout(SHORT, TcpStream::connect(address)).await {
        queued.push(stream.unwrap());
        assert!(queued.len() < 100, "the queue has an end");
    }
    (listener, queued, address)
}

#[tokio::test]
async fn a_server_that_accepts_nobody_was_never_sent_anything() {
    let (_listener, _queued, address) = deaf().await;
    for dialect in Dialect::ALL {
        let provider = client(dialect, &format!("http://{address}"), Timeouts { connect: SHORT, ..PATIENT });
        let started = Instant::now();
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        let expected = ("transient.network", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
        assert_eq!(verdict(&error), expected, "{dialect:?}");
        assert!((SHORT..PATIENT.connect).contains(&started.elapsed()));
    }
}

/// The stages in which a call is given up.
const STAGES: [(Fault, Stage); 3] = [
    (Fault::StallBeforeHeaders, Stage::Received),
    (Fault::StallAfterHeaders, Stage::Headers),
    (Fault::StallMidBody, Stage::Body),
];

#[tokio::test]
async fn a_cancelled_call_closes_its_connection_and_is_unknown() {
    for dialect in Dialect::ALL {
        for (fault, stage) in STAGES {
            let server = FakeProvider::saying(Reply::text("a text that is never finished")).await;
            server.inject(When::Every(dialect), fault);
            let provider = client(dialect, &server.base_of(dialect), PATIENT);
            let (request, cancellation) = (request(), CancellationToken::new());
            let (asked, _) = tokio::join!(ask_with(provider.as_ref(), &request, &cancellation), async {
                server.journal_when(|all| all.iter().any(|entry| entry.stage == stage)).await;
                cancellation.cancel();
            });
            let error = asked.error();
            let verdict = (error.failure.kind, error.state, error.advice);
            assert_eq!(verdict, (FailureKind::Cancelled, CallState::Unknown, Advice::Stop), "{dialect:?} {stage:?}");
            assert!(!error.unwell, "the provider is not to blame");
            server.journal_when(|all| all[0].end == End::Client).await;
        }
    }
}

#[tokio::test]
async fn a_dropped_call_closes_its_connection() {
    for dialect in Dialect::ALL {
        for (fault, stage) in STAGES {
            let server = FakeProvider::saying(Reply::text("a text that is never finished")).await;
            server.inject(When::Every(dialect), fault);
            let provider = client(dialect, &server.base_of(dialect), PATIENT);
            let (request, cancellation) = (request(), CancellationToken::new());
            tokio::select! {
                _ = ask_with(provider.as_ref(), &request, &cancellation) => panic!("{dialect:?}: nothing was answered"),
                _ = server.journal_when(|all| all.iter().any(|entry| entry.stage == stage)) => {}
            }
            let journal = server.journal_when(|all| all[0].end == End::Client).await;
            assert_eq!(journal.len(), 1, "{dialect:?} {stage:?}");
        }
    }
}

#[tokio::test]
async fn a_name_that_leads_inside_is_not_connected_to_by_any_client() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let inside = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    for dialect in Dialect::ALL {
        // As if its host had led outside when the address was stored.
        let provider = client_of(dialect, &inside, PATIENT, Trust::User);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        let expected = ("provider.address_refused", FailureKind::Permanent, CallState::Failed, Advice::OtherProvider);
        assert_eq!((verdict(&error), error.unwell), (expected, false), "{dialect:?}");
        assert!(!error.failure.message.contains("localhost"), "{dialect:?}: {}", error.failure.message);
        // The kernel greets whoever connects: nobody has.
        let came = listener.accept().map_err(|error| error.kind());
        assert_eq!(came.map(|_| ()), Err(std::io::ErrorKind::WouldBlock), "{dialect:?}");
        // Where the operator lets users name this machine the same name is answered.
        let server = FakeProvider::saying(Reply::text("hi")).await;
        let base = server.base_of(dialect).replace("127.0.0.1", "localhost");
        let provider = client_of(dialect, &base, PATIENT, Trust::UserOrLoopback);
        let answer = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.completion();
        assert_eq!((answer.text.as_str(), server.seen().len()), ("hi", 1), "{dialect:?}");
        let refused = client_of(dialect, &base, PATIENT, Trust::User);
        let error = ask_with(refused.as_ref(), &request(), &CancellationToken::new()).await.error();
        assert_eq!((verdict(&error), server.seen().len()), (expected, 1), "{dialect:?}");
    }
}
