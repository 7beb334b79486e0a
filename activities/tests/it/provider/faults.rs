//! The fault matrix: every fault of the reference, in each dialect, where a stream answers and where a document does.

use super::{KEY, LOST, PATIENT, Verdict, ask_with, client, request, verdict};
use loopwright_activities::{
    provider::Advice,
    testing::{ClosedPort, Dialect, End, FakeProvider, Fault, Reply, Stage, When},
    usage::{CallState, UsageSource},
};
use loopwright_engine::FailureKind;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const TEXT: &str = "h\u{e4}llo \u{1f980}, a text of some length";
/// No fault may cost longer than this, on however busy a machine.
const HANGS_AFTER: Duration = Duration::from_secs(50);
/// More than a client with a limit of 10 MB and the buffers of a kernel take; the server would send twice as much.
const TAKEN_MAX: u64 = 32 * 1024 * 1024;

/// How the server answers a request for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Stream,
    Document,
}

/// What the client makes of it.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// The text, whole, with usage from there.
    Read(UsageSource),
    /// A verdict, the wait in it, and the usage that is billed all the same.
    Error(Verdict, Option<u64>, Option<UsageSource>),
}
use Expected::{Error, Read};

const TOLD: Expected = Read(UsageSource::Provider);
const BROKEN: Verdict = ("transient.http", FailureKind::Retryable, CallState::Unknown, Advice::SameModel);
const FAILED: Verdict = ("transient.http", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
const LIMITED: Verdict = ("transient.rate_limited", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
const UNFINISHED: Verdict = ("transient.http", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
const UNUSABLE: Verdict = ("model.output_invalid", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
const BAD_KEY: Verdict = ("provider.key_invalid", FailureKind::Permanent, CallState::Failed, Advice::DisableKey);
const REDIRECTED: Verdict = ("provider.bad_request", FailureKind::Permanent, CallState::Failed, Advice::OtherProvider);

fn no_balance(dialect: Dialect) -> Verdict {
    let advice = if dialect == Dialect::Gemini { Advice::DisableKey } else { Advice::OtherKey };
    ("provider.no_balance", FailureKind::Permanent, CallState::Failed, advice)
}

/// The row of a fault; `None` where there is no such thing.
fn expected(fault: &Fault, dialect: Dialect, form: Form) -> Option<Expected> {
    let lost = Error(LOST, None, None);
    let stream = form == Form::Stream;
    Some(match fault {
        Fault::ResetBeforeHeaders
        | Fault::CloseBeforeHeaders
        | Fault::ResetAfterHeaders
        | Fault::ResetMidBody
        | Fault::CloseMidBody
        | Fault::GzipDamaged => lost,
        // A stream says when it is finished, a document only by its end.
        Fault::CloseAfterFinish => {
            if stream {
                TOLD
            } else {
                lost
            }
        }
        // A whole document without a reason is taken as finished, except from Gemini, whose documents always have one.
        Fault::NoFinishReason if !stream && dialect != Dialect::Gemini => Read(UsageSource::Estimated),
        Fault::NoFinishReason if stream && dialect == Dialect::Gemini => {
            Error(UNFINISHED, None, Some(UsageSource::Provider))
        }
        Fault::NoFinishReason => Error(UNFINISHED, None, Some(UsageSource::Estimated)),
        Fault::CommentsOnly if stream => Error(UNFINISHED, None, None),
        Fault::CommentsOnly => Error(BROKEN, None, None),
        Fault::NoDone | Fault::Split | Fault::OneByte | Fault::UsageTwice | Fault::Gzip => TOLD,
        Fault::UsageAbsent => Read(UsageSource::Estimated),
        Fault::ErrorMidStream if stream => Error(FAILED, None, Some(UsageSource::Estimated)),
        Fault::ErrorInside | Fault::HtmlError | Fault::HugeError => Error(FAILED, None, None),
        Fault::RateLimited(wait) => Error(LIMITED, wait.map(|seconds| u64::from(seconds) * 1000), None),
        Fault::BudgetInFlight => Error(LIMITED, Some(2000), None),
        Fault::NoBalance => Error(no_balance(dialect), None, None),
        Fault::BadKey => Error(BAD_KEY, None, None),
        Fault::HtmlPage | Fault::HugeBody | Fault::GzipBomb => Error(BROKEN, None, None),
        Fault::UnknownFinishReason => Error(UNUSABLE, None, Some(UsageSource::Provider)),
        Fault::Redirect(_) => Error(REDIRECTED, None, None),
        // They have tests of their own: they wait for limits.
        Fault::StallBeforeHeaders | Fault::StallAfterHeaders | Fault::StallMidBody | Fault::CommentsForever => {
            return None;
        }
        Fault::ErrorMidStream => return None,
    })
}

async fn check(fault: Fault, dialect: Dialect, form: Form, elsewhere: &FakeProvider) {
    let what = format!("{fault:?} {dialect:?} {form:?}");
    let Some(expected) = expected(&fault, dialect, form) else { return };
    let server = FakeProvider::saying(Reply::text(TEXT)).await;
    server.answer_documents(form == Form::Document);
    server.inject(When::Every(dialect), fault.clone());
    let provider = client(dialect, &server.base_of(dialect), PATIENT);
    let (request, cancellation) = (request(), CancellationToken::new());
    let asked = tokio::time::timeout(HANGS_AFTER, ask_with(provider.as_ref(), &request, &cancellation)).await;
    let asked = asked.unwrap_or_else(|_| panic!("{what}: it hangs"));
    match (expected, asked.result) {
        (Read(source), Ok(completion)) => {
            assert_eq!(completion.text, TEXT, "{what}");
            assert_eq!(completion.usage.source, source, "{what}");
            if source == UsageSource::Provider {
                let usage = &completion.usage;
                assert_eq!((usage.tokens_prompt, usage.tokens_output), (11, 7), "{what}");
            }
        }
        (Error(expected, wait, billed), Err(error)) => {
            assert_eq!(verdict(&error), expected, "{what}: {error:?}");
            assert_eq!(error.failure.retry_after_ms, wait, "{what}");
            assert_eq!(error.usage.as_ref().map(|usage| usage.source), billed, "{what}");
            // Only one that reached its limit is charged, and that one has a finish reason.
            assert!(error.failure.code != "model.truncated" || !error.stream_completed, "{what}: {error:?}");
            assert!(error.unwell || expected != UNFINISHED, "{what}: a provider that breaks answers off is not well");
            let everything = format!("{error:?} {error}");
            assert!(!everything.contains("upstream text") && !everything.contains(KEY), "{what}: {everything}");
        }
        (expected, got) => panic!("{what}: expected {expected:?}, got {got:?}"),
    }
    let journal = server.journal();
    assert_eq!(journal.len(), 1, "{what}: one request, no hidden repetition");
    assert!(journal[0].bytes_sent < TAKEN_MAX, "{what}: {} bytes taken", journal[0].bytes_sent);
    // What identifies the request survives every fault behind the headers, unless a reset took them along.
    let told = !matches!(fault, Fault::Redirect(_) | Fault::ResetAfterHeaders | Fault::ResetMidBody);
    if dialect != Dialect::Gemini && journal[0].stage >= Stage::Headers && told {
        assert_eq!(asked.request_id, journal[0].provider_request_id, "{what}");
    }
    assert!(elsewhere.seen().is_empty(), "{what}: the key went elsewhere");
}

/// All forms and dialects of one fault, at the same time.
async fn in_all_forms(faults: &[Fault]) {
    let elsewhere = FakeProvider::saying(Reply::text("thank you for the key")).await;
    for fault in faults {
        let fault = match fault {
            Fault::Redirect(_) => Fault::Redirect(elsewhere.base()),
            other => other.clone(),
        };
        let cases = Dialect::ALL.into_iter().flat_map(|dialect| {
            [Form::Stream, Form::Document].map(|form| check(fault.clone(), dialect, form, &elsewhere))
        });
        futures_util::future::join_all(cases).await;
    }
}

#[tokio::test]
async fn broken_connections_leave_the_outcome_unknown_unless_the_end_was_seen() {
    in_all_forms(&[
        Fault::ResetBeforeHeaders,
        Fault::CloseBeforeHeaders,
        Fault::ResetAfterHeaders,
        Fault::ResetMidBody,
        Fault::CloseMidBody,
        Fault::CloseAfterFinish,
    ])
    .await;
}

#[tokio::test]
async fn clean_ends_are_judged_by_what_was_said() {
    in_all_forms(&[Fault::NoFinishReason, Fault::NoDone, Fault::CommentsOnly, Fault::UnknownFinishReason]).await;
}

#[tokio::test]
async fn however_the_bytes_are_cut_the_text_is_the_same() {
    in_all_forms(&[Fault::Split, Fault::OneByte]).await;
}

#[tokio::test]
async fn errors_behind_a_good_status_are_errors() {
    in_all_forms(&[Fault::ErrorMidStream, Fault::ErrorInside, Fault::HtmlPage]).await;
}

#[tokio::test]
async fn refusals_are_told_apart_with_and_without_hints() {
    in_all_forms(&[
        Fault::RateLimited(Some(7)),
        Fault::RateLimited(None),
        Fault::NoBalance,
        Fault::BudgetInFlight,
        Fault::BadKey,
        Fault::HtmlError,
        Fault::Redirect(String::new()),
    ])
    .await;
}

#[tokio::test]
async fn usage_is_the_last_snapshot_and_estimated_where_there_is_none() {
    in_all_forms(&[Fault::UsageAbsent, Fault::UsageTwice]).await;
}

#[tokio::test]
async fn sixty_four_megabytes_are_not_taken() {
    in_all_forms(&[Fault::HugeBody, Fault::HugeError]).await;
}

#[tokio::test]
async fn compressed_answers_are_read_up_to_the_limit_of_what_they_unpack_to() {
    in_all_forms(&[Fault::Gzip, Fault::GzipDamaged, Fault::GzipBomb]).await;
}

#[tokio::test]
async fn a_refused_connection_was_never_sent() {
    for dialect in Dialect::ALL {
        let closed = ClosedPort::new();
        let base = format!("http://{}", closed.address());
        let provider = client(dialect, &base, PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        let expected = ("transient.network", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
        assert_eq!(verdict(&error), expected, "{dialect:?}");
        assert!(error.unwell && error.usage.is_none());
    }
}

#[tokio::test]
async fn a_connection_that_dies_when_it_is_used_again_is_not_a_second_request() {
    for dialect in Dialect::ALL {
        let server = FakeProvider::saying(Reply::text(TEXT)).await;
        server.inject(When::Nth(dialect, 1), Fault::ResetBeforeHeaders);
        let provider = client(dialect, &server.base_of(dialect), PATIENT);
        let (request, cancellation) = (request(), CancellationToken::new());
        ask_with(provider.as_ref(), &request, &cancellation).await.completion();
        let error = ask_with(provider.as_ref(), &request, &cancellation).await.error();
        assert_eq!(verdict(&error), LOST, "{dialect:?}");
        let journal = server.journal();
        assert_eq!(journal.len(), 2, "{dialect:?}");
        assert_eq!((journal[0].stage, journal[0].end), (Stage::Finished, End::Server));
        assert_eq!((journal[1].stage, journal[1].end), (Stage::Received, End::Server));
        // The journal and our rows speak of the same key.
        assert_eq!(journal[0].key_fingerprint, provider.key().fingerprint);
    }
}
