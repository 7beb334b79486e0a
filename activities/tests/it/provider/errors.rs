//! The error tables of the reference, row by row, over a socket.

use super::{KEY, PATIENT, ask_with, client, request, verdict};
use loopwright_activities::{
    provider::{
        Advice::{self, DisableKey, OtherKey, OtherModel, OtherProvider, SameModel},
        Gemini, OpenAiCompatible, OpenRouter, ProviderError,
        address::{Trust, parse_base_url},
    },
    testing::{Answer, Dialect, FakeProvider, answer_json, frames, stream},
    usage::CallState,
};
use loopwright_engine::FailureKind;
use secrecy::SecretString;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Status, further header, body; code, advice and wait in milliseconds that follow.
struct Row(u16, Option<(&'static str, &'static str)>, Value, &'static str, Advice, Option<u64>);

/// Whether a code says that trying again may help.
fn kind(code: &str) -> FailureKind {
    if code.starts_with("transient.") { FailureKind::Retryable } else { FailureKind::Permanent }
}

async fn check(dialect: Dialect, rows: Vec<Row>) {
    for Row(status, header, body, code, advice, wait) in rows {
        let what = format!("{dialect:?} {status} {header:?} {body}");
        let server = FakeProvider::serve(move |_, _| Answer::Refused {
            status,
            headers: header.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
            body: body.clone(),
        })
        .await;
        let provider = client(dialect, &server.base_of(dialect), PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        // A time-out at the server leaves open what it did until then.
        let state = if matches!(status, 408 | 499 | 504 | 524) { CallState::Unknown } else { CallState::Failed };
        assert_eq!(verdict(&error), (code, kind(code), state, advice), "{what}");
        assert_eq!(error.failure.retry_after_ms, wait, "{what}");
        // A refusal is never billed.
        assert_eq!((error.usage.clone(), error.http_status), (None, Some(status)), "{what}");
        assert!(!error.failure.message.contains("upstream"), "{what}: {}", error.failure.message);
        if matches!(code, "provider.key_invalid" | "provider.no_balance") {
            assert!(error.failure.message.contains(dialect.key_setting()), "{what}: the message names the setting");
        }
        // The form of a request may be what was refused, so 400 may be asked once more in another form.
        if code != "provider.bad_request" {
            assert_eq!(server.seen().len(), 1, "{what}: asked once");
        }
    }
}

#[tokio::test]
async fn the_table_of_gemini_holds() {
    let rpc = |code: u16, status: &str, details: Value| json!({"error": {"code": code, "status": status, "message": "upstream text", "details": details}});
    let plain = |code: u16, status: &str| rpc(code, status, json!([]));
    let said = |status: &str, message: &str| json!({"error": {"code": 400, "status": status, "message": message}});
    const QUOTED: &str =
        "Unknown name \"api key expired\" at 'generation_config.response_schema.properties[api key not valid]'";
    let bad_key = json!([{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]);
    let disabled = json!([{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "SERVICE_DISABLED"}]);
    let delay = |delay: &str| json!([{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]);
    let quota = |id: &str, value: &str| {
        json!([{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": id, "quotaValue": value}]}])
    };
    let limit = |rest: &str, details: Value| {
        json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED",
        "message": format!("You exceeded your current quota: upstream requests, limit: {rest}"), "details": details}})
    };
    let empty = |details: Value| rpc(402, "RESOURCE_EXHAUSTED", details);
    let per_minute = quota("GenerateRequestsPerMinutePerProjectPerModel-FreeTier", "5");
    let per_day = quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "50");
    check(
        Dialect::Gemini,
        vec![
            Row(400, None, plain(400, "INVALID_ARGUMENT"), "provider.bad_request", OtherModel, None),
            Row(400, None, rpc(400, "INVALID_ARGUMENT", bad_key), "provider.key_invalid", DisableKey, None),
            // Its words where no reason came along. Names of a request that it quotes are no words of its.
            Row(
                400,
                None,
                said("INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
                "provider.key_invalid",
                DisableKey,
                None,
            ),
            Row(400, None, said("INVALID_ARGUMENT", QUOTED), "provider.bad_request", OtherModel, None),
            Row(400, None, said("FAILED_PRECONDITION", "API key expired."), "provider.bad_request", OtherModel, None),
            Row(400, None, plain(400, "FAILED_PRECONDITION"), "provider.bad_request", OtherModel, None),
            Row(401, None, plain(401, "UNAUTHENTICATED"), "provider.key_invalid", DisableKey, None),
            // The reference says "disable", but the same status refuses one model to a key that serves the others: what
            // disables is a reason that is about the key.
            Row(403, None, plain(403, "PERMISSION_DENIED"), "model.unavailable", OtherKey, None),
            Row(403, None, rpc(403, "PERMISSION_DENIED", disabled), "provider.key_invalid", DisableKey, None),
            // Never again, whatever wait comes along.
            Row(402, None, empty(json!([])), "provider.no_balance", DisableKey, None),
            Row(402, Some(("retry-after", "2")), empty(json!([])), "provider.no_balance", DisableKey, None),
            Row(402, None, empty(delay("26s")), "provider.no_balance", DisableKey, None),
            Row(404, None, plain(404, "NOT_FOUND"), "model.unavailable", OtherModel, None),
            Row(429, None, plain(429, "RESOURCE_EXHAUSTED"), "transient.rate_limited", SameModel, None),
            Row(
                429,
                None,
                rpc(429, "RESOURCE_EXHAUSTED", delay("26s")),
                "transient.rate_limited",
                SameModel,
                Some(26_000),
            ),
            // Fractions of a second; and the list of one that some endpoints wrap around it.
            Row(
                429,
                None,
                json!([rpc(429, "RESOURCE_EXHAUSTED", delay("53.01s"))]),
                "transient.rate_limited",
                SameModel,
                Some(53_010),
            ),
            Row(429, None, rpc(429, "RESOURCE_EXHAUSTED", per_minute), "transient.rate_limited", SameModel, None),
            Row(429, None, rpc(429, "RESOURCE_EXHAUSTED", per_day), "transient.rate_limited", OtherKey, None),
            // No quota at all: no wait brings one, named or not. In the middle of a message, at the end of a sentence or a line.
            Row(429, None, limit("0", json!([])), "model.unavailable", OtherKey, None),
            Row(429, None, limit("0, model: gemini-3.8-flash", json!([])), "model.unavailable", OtherKey, None),
            Row(429, None, limit("0\nPlease retry in 26.4s.", delay("26s")), "model.unavailable", OtherKey, None),
            Row(429, None, limit("0. Please retry in 26.4s.", delay("26s")), "model.unavailable", OtherKey, None),
            Row(429, Some(("retry-after", "26")), limit("0 Please", json!([])), "model.unavailable", OtherKey, None),
            Row(429, None, rpc(429, "RESOURCE_EXHAUSTED", quota("x", "0")), "model.unavailable", OtherKey, None),
            // A proxy that asks for another try brings no quota either.
            Row(429, Some(("x-should-retry", "true")), limit("0", json!([])), "model.unavailable", OtherKey, None),
            Row(
                429,
                None,
                rpc(429, "RESOURCE_EXHAUSTED", quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "0")),
                "model.unavailable",
                OtherKey,
                None,
            ),
            // A limit that only begins so.
            Row(429, None, limit("0.5 a second", json!([])), "transient.rate_limited", SameModel, None),
            Row(429, None, limit("05\nPlease", delay("26s")), "transient.rate_limited", SameModel, Some(26_000)),
            Row(499, None, plain(499, "CANCELLED"), "transient.http", SameModel, None),
            Row(500, None, plain(500, "INTERNAL"), "transient.http", SameModel, None),
            Row(503, None, plain(503, "UNAVAILABLE"), "transient.http", SameModel, None),
            Row(504, None, plain(504, "DEADLINE_EXCEEDED"), "transient.http", SameModel, None),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_table_of_openrouter_holds() {
    let error = |code: Value, metadata: Value| json!({"error": {"code": code, "message": "upstream text", "metadata": metadata}});
    let typed = |code: u16, kind: &str| error(json!(code), json!({"error_type": kind}));
    let source = |code: u16, source: &str| error(json!(code), json!({"limit_source": source}));
    let available = |code: u16, retryable: bool| {
        json!({"error": {"code": code, "message": "upstream text",
            "availability": {"code": "x", "retryable": retryable, "retry_after": 3, "fallback_models": []}}})
    };
    check(
        Dialect::OpenRouter,
        vec![
            Row(400, None, typed(400, "invalid_request"), "provider.bad_request", OtherModel, None),
            Row(400, None, typed(400, "context_length_exceeded"), "model.context_overflow", OtherModel, None),
            // Words of the request that a message quotes are no finding of a moderator.
            Row(
                400,
                None,
                json!({"error": {"code": 400, "message": "upstream: tools[0].name 'moderation.flagged_refusal' is too long"}}),
                "provider.bad_request",
                OtherModel,
                None,
            ),
            Row(400, None, typed(400, "content_policy_violation"), "model.refused", OtherModel, None),
            Row(400, None, typed(400, "refusal"), "model.refused", OtherModel, None),
            Row(401, None, typed(401, "authentication"), "provider.key_invalid", DisableKey, None),
            // The reference: "permission", which may be for one model.
            Row(403, None, typed(403, "permission_denied"), "model.unavailable", OtherKey, None),
            Row(
                403,
                None,
                json!({"error": {"code": 403, "message": "upstream: Key limit exceeded (daily limit)"}}),
                "provider.no_balance",
                OtherKey,
                None,
            ),
            Row(403, None, typed(403, "guardrail"), "model.refused", OtherModel, None),
            Row(403, None, typed(403, "moderation"), "model.refused", OtherModel, None),
            Row(
                403,
                None,
                error(json!(403), json!({"reasons": ["violence"], "flagged_input": "x", "provider_name": "p"})),
                "model.refused",
                OtherModel,
                None,
            ),
            Row(403, None, source(403, "key"), "provider.no_balance", OtherKey, None),
            Row(402, None, source(402, "openrouter_credits"), "provider.no_balance", OtherKey, None),
            Row(
                402,
                Some(("retry-after", "2")),
                source(402, "openrouter_in_flight_budget"),
                "transient.rate_limited",
                SameModel,
                Some(2000),
            ),
            // One of the three says that it passes: the header, the source, or its own word.
            Row(
                402,
                None,
                source(402, "openrouter_in_flight_budget"),
                "transient.rate_limited",
                SameModel,
                None,
            ),
            Row(402, Some(("retry-after", "2")), typed(402, "x"), "transient.rate_limited", SameModel, Some(2000)),
            Row(402, None, available(402, true), "transient.rate_limited", SameModel, Some(3000)),
            Row(402, None, available(402, false), "provider.no_balance", OtherKey, None),
            Row(402, None, typed(402, "insufficient_credits"), "provider.no_balance", OtherKey, None),
            // Credits do not come back by themselves, whatever comes along.
            Row(
                402,
                Some(("retry-after", "2")),
                source(402, "openrouter_credits"),
                "provider.no_balance",
                OtherKey,
                None,
            ),
            Row(
                402,
                None,
                json!({"error": {"code": 402, "message": "upstream", "metadata": {"limit_source": "openrouter_credits"},
                    "availability": {"retryable": true, "retry_after": 3}}}),
                "provider.no_balance",
                OtherKey,
                None,
            ),
            Row(404, None, typed(404, "not_found"), "model.unavailable", OtherModel, None),
            Row(413, None, typed(413, "payload_too_large"), "model.context_overflow", OtherModel, None),
            Row(422, None, typed(422, "unprocessable"), "provider.bad_request", OtherModel, None),
            Row(408, None, typed(408, "timeout"), "transient.http", SameModel, None),
            Row(504, None, typed(504, "timeout"), "transient.http", SameModel, None),
            Row(524, None, typed(524, "timeout"), "transient.http", SameModel, None),
            Row(
                429,
                Some(("retry-after", "7")),
                typed(429, "rate_limited"),
                "transient.rate_limited",
                SameModel,
                Some(7000),
            ),
            Row(429, None, typed(429, "rate_limited"), "transient.rate_limited", SameModel, None),
            Row(500, None, typed(500, "server_error"), "transient.http", SameModel, None),
            Row(500, None, error(json!("server_error"), json!({})), "transient.http", SameModel, None),
            Row(502, None, typed(502, "provider_unavailable"), "transient.http", SameModel, None),
            Row(503, None, typed(503, "no_provider"), "transient.http", SameModel, None),
            Row(529, None, typed(529, "overloaded"), "transient.http", SameModel, None),
            // What it says of itself counts more than the status.
            Row(503, None, available(503, false), "transient.http", OtherModel, Some(3000)),
            Row(404, None, available(404, true), "transient.http", SameModel, Some(3000)),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_errors_of_servers_with_the_openai_dialect_hold() {
    let error = |kind: &str, code: Value| json!({"error": {"message": "upstream text", "type": kind, "param": null, "code": code}});
    let plain = || error("invalid_request_error", Value::Null);
    let n_ctx = json!({"error": {"code": 400, "type": "exceed_context_size_error", "message": "upstream text",
        "n_prompt_tokens": 9000, "n_ctx": 4096}});
    let old_vllm = json!({"object": "error", "code": 400,
        "message": "upstream: this model's maximum context length is 4096 tokens"});
    let jinja = json!({"error": {"code": 500, "message": "upstream: tools param requires --jinja flag"}});
    check(
        Dialect::OpenAi,
        vec![
            Row(400, None, plain(), "provider.bad_request", OtherModel, None),
            // A number as code, and a body that is not under `error`.
            Row(400, None, json!({"error": {"code": 400, "message": "m"}}), "provider.bad_request", OtherModel, None),
            Row(400, None, n_ctx, "model.context_overflow", OtherModel, None),
            Row(400, None, old_vllm, "model.context_overflow", OtherModel, None),
            Row(
                400,
                None,
                error("invalid_request_error", json!("context_length_exceeded")),
                "model.context_overflow",
                OtherModel,
                None,
            ),
            Row(
                401,
                None,
                error("invalid_request_error", json!("invalid_api_key")),
                "provider.key_invalid",
                DisableKey,
                None,
            ),
            Row(401, None, json!("no"), "provider.key_invalid", DisableKey, None),
            // The reference says nothing of 403; OpenAI refuses a project one of its models so.
            Row(403, None, error("permission_error", Value::Null), "model.unavailable", OtherKey, None),
            Row(
                403,
                None,
                error("invalid_request_error", json!("model_not_found")),
                "model.unavailable",
                OtherKey,
                None,
            ),
            // No word of the API: a proxy knows nothing of the key.
            Row(403, None, json!("forbidden"), "model.unavailable", OtherKey, None),
            Row(
                404,
                None,
                error("invalid_request_error", json!("model_not_found")),
                "model.unavailable",
                OtherModel,
                None,
            ),
            Row(
                429,
                None,
                error("insufficient_quota", json!("insufficient_quota")),
                "provider.no_balance",
                OtherKey,
                None,
            ),
            Row(408, None, plain(), "transient.http", SameModel, None),
            Row(409, None, plain(), "transient.http", SameModel, None),
            Row(
                429,
                Some(("retry-after-ms", "1500")),
                error("tokens", json!("rate_limit_exceeded")),
                "transient.rate_limited",
                SameModel,
                Some(1500),
            ),
            Row(500, Some(("x-should-retry", "true")), plain(), "transient.http", SameModel, None),
            Row(500, Some(("x-should-retry", "false")), plain(), "transient.http", OtherModel, None),
            Row(400, Some(("x-should-retry", "true")), plain(), "transient.http", SameModel, None),
            Row(500, None, jinja, "provider.bad_request", OtherModel, None),
            Row(418, None, json!("teapot"), "provider.bad_request", OtherModel, None),
            Row(307, None, json!({}), "provider.bad_request", OtherProvider, None),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_limit_of_requests_says_when_its_day_ends() {
    let at = 1_798_761_600_000_i64;
    for (message, advice) in [("Rate limit exceeded: free-models-per-day", OtherKey), ("limit_rpm/some", SameModel)] {
        let headers =
            json!({"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": at.to_string()});
        let body = json!({"error": {"code": 429, "message": message, "metadata": {"headers": headers}}});
        let server = FakeProvider::always(answer_json(429, "", &body)).await;
        let provider = client(Dialect::OpenRouter, &server.base(), PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        assert_eq!((error.failure.code.as_str(), error.advice), ("transient.rate_limited", advice), "{message}");
        assert_eq!(error.key_rests_until.unwrap().timestamp_millis(), at);
    }
}

#[tokio::test]
async fn a_bad_gateway_is_unknown_where_its_server_may_have_worked() {
    for (thinks, state) in [(Duration::ZERO, CallState::Failed), (Duration::from_millis(1_100), CallState::Unknown)] {
        let cases = Dialect::ALL.map(|dialect| async move {
            let server = FakeProvider::serve(move |_, _| Answer::Refused {
                status: 502,
                headers: Vec::new(),
                body: dialect.error(502, "server_error"),
            })
            .await;
            server.think(move || thinks);
            let provider = client(dialect, &server.base_of(dialect), PATIENT);
            let started = Instant::now();
            let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
            // A machine that is too busy for an answer at once proves nothing.
            if state == CallState::Unknown || started.elapsed() < Duration::from_millis(900) {
                let expected = ("transient.http", FailureKind::Retryable, state, SameModel);
                assert_eq!((verdict(&error), error.unwell), (expected, true), "{dialect:?}");
            }
        });
        futures_util::future::join_all(cases).await;
    }
}

#[tokio::test]
async fn a_spent_key_says_until_when_it_rests() {
    let body = json!({"error": {"code": 403, "message": "m",
        "metadata": {"limit_source": "key", "resets_at": "2026-11-27T00:00:00Z"}}});
    let server = FakeProvider::always(answer_json(403, "", &body)).await;
    let provider = client(Dialect::OpenRouter, &server.base(), PATIENT);
    let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
    assert_eq!(error.key_rests_until.unwrap().to_rfc3339(), "2026-11-27T00:00:00+00:00");
}

#[tokio::test]
async fn a_time_out_that_a_stream_tells_of_leaves_open_what_was_done_and_billed() {
    let inside = |dialect: Dialect, code: u16| match dialect {
        Dialect::Gemini => dialect.error(code, "DEADLINE_EXCEEDED"),
        _ => {
            json!({"id": "gen-7", "error": {"code": code, "message": "upstream text", "metadata": {"error_type": "timeout"}},
            "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]})
        }
    };
    for dialect in Dialect::ALL {
        for code in [408, 499, 504, 524] {
            for begun in [vec![], vec![dialect.text("half an ")]] {
                let what = format!("{dialect:?} {code} after {} events", begun.len());
                let body = frames(&[begun, vec![inside(dialect, code)]].concat());
                let server = FakeProvider::always(stream(&body)).await;
                let provider = client(dialect, &server.base(), PATIENT);
                let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
                let expected = ("transient.http", FailureKind::Retryable, CallState::Unknown, SameModel);
                assert_eq!(verdict(&error), expected, "{what}");
                // An estimate would keep the books from asking what it was.
                assert_eq!((error.http_status, error.usage.is_none()), (Some(code), true), "{what}");
                assert_eq!(server.seen().len(), 1, "{what}: asked once");
            }
        }
    }
}

/// Every field that any dialect reads of an error, with the key in it.
fn echoing(status: u16) -> Value {
    let said = format!("bad key {KEY}");
    json!({"id": KEY, "model": KEY, "error": {"message": said, "code": KEY, "type": KEY, "status": KEY, "param": KEY,
        "metadata": {"error_type": KEY, "reason": KEY, "limit_source": KEY, "raw": said},
        "availability": {"code": KEY, "retryable": status == 503},
        "details": [{"@type": KEY, "reason": KEY, "violations": [{"quotaId": KEY, "quotaValue": KEY}]}]}})
}

/// Everything that an error carries on shows neither the key nor a piece of it that could be told from chance.
fn shows_nothing(error: &ProviderError, what: &str) {
    let shown = format!("{error:?} {} {}", error.failure.message, json!(error.failure)).to_lowercase();
    for piece in [KEY, "secret", "key-0123", "0123456789"] {
        assert!(!shown.contains(piece), "{what}: {piece} in {shown}");
    }
}

#[tokio::test]
async fn no_error_shows_the_key_or_the_words_of_the_server() {
    for dialect in Dialect::ALL {
        for status in [400, 401, 402, 403, 404, 413, 422, 429, 500, 503] {
            let headers = format!("x-request-note: {KEY}\r\n");
            let server = FakeProvider::always(answer_json(status, &headers, &echoing(status))).await;
            let provider = client(dialect, &server.base(), PATIENT);
            let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
            shows_nothing(&error, &format!("{dialect:?} {status}"));
            let identity = format!("{:?}", provider.key());
            assert!(!identity.contains(KEY), "{identity}");
        }
        // In the middle of a stream, and as the reason of its end.
        let mut ends =
            vec![frames(&[dialect.text("a"), echoing(500)]), frames(&[dialect.text("a"), dialect.finish(KEY, None)])];
        if dialect == Dialect::Gemini {
            ends.push(frames(&[json!({"promptFeedback": {"blockReason": KEY}})]));
        } else {
            let choice = json!({"index": 0, "delta": {}, "finish_reason": KEY, "error": {"code": KEY, "message": KEY}});
            ends.push(frames(&[dialect.text("a"), json!({"choices": [choice]})]));
        }
        for body in ends {
            let server = FakeProvider::always(stream(&body)).await;
            let provider = client(dialect, &server.base(), PATIENT);
            let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
            shows_nothing(&error, &format!("{dialect:?} {}", String::from_utf8_lossy(&body)));
        }
    }
}

#[test]
fn no_client_that_is_shown_shows_its_key() {
    let (key, base) = (SecretString::from(KEY), parse_base_url("http://127.0.0.1/v1", Trust::Operator).unwrap());
    for shown in [
        format!("{:?}", Gemini::new(base.clone(), "v1beta", &key, PATIENT, Trust::Operator).unwrap()),
        format!("{:?}", OpenRouter::new(base.clone(), &key, PATIENT, Trust::Operator).unwrap()),
        format!("{:?}", OpenAiCompatible::new(base, Some(&key), PATIENT, Trust::Operator).unwrap()),
    ] {
        assert!(!shown.contains(KEY), "{shown}");
    }
}
