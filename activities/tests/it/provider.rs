//! One suite over all providers that speak HTTP: whatever a server does, the verdict is the same.

use loopwright_activities::testing::{
    Act, Dialect, FakeProvider, answer, answer_json, chunk, end, frames, gzip, stream, stream_head,
};
use loopwright_activities::{
    orchestrator::{Message, Request, Role, ToolSpec},
    provider::{
        Advice, Call, Completion, Gemini, OpenAiCompatible, OpenRouter, Provider, ProviderError, RequestIdSlot,
        StructuredOutput, Timeouts,
        address::{Trust, parse_base_url},
    },
    usage::{CallState, UsageSource},
};
use loopwright_engine::FailureKind;
use secrecy::SecretString;
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

const KEY: &str = "secret-key-0123456789";

/// Longer than any test should take: only the limit under test is short.
const PATIENT: Timeouts = Timeouts {
    connect: Duration::from_secs(30),
    first_byte: Duration::from_secs(60),
    idle: Duration::from_secs(60),
    total: Duration::from_secs(60),
};

pub fn client(dialect: Dialect, base: &str, timeouts: Timeouts) -> Arc<dyn Provider> {
    let key = SecretString::from(KEY);
    let base = parse_base_url(base, Trust::Operator).unwrap();
    match dialect {
        Dialect::Gemini => Arc::new(Gemini::new(base, "v1beta", &key, timeouts, Trust::Operator).unwrap()),
        Dialect::OpenRouter => Arc::new(OpenRouter::new(base, &key, timeouts, Trust::Operator).unwrap()),
        Dialect::OpenAi => Arc::new(OpenAiCompatible::new(base, Some(&key), timeouts, Trust::Operator).unwrap()),
    }
}

fn request() -> Request {
    Request {
        role: Role::Implementer,
        purpose: "test".into(),
        messages: vec![Message::System { text: "Be terse.".into() }, Message::User { text: "Hello?".into() }],
        tools: vec![],
        output_schema: None,
        max_output_tokens: 500,
    }
}

struct Asked {
    result: Result<Completion, ProviderError>,
    request_id: Option<String>,
}

impl Asked {
    fn error(self) -> ProviderError {
        self.result.expect_err("the call fails")
    }
    fn completion(self) -> Completion {
        self.result.expect("the call succeeds")
    }
}

async fn ask_with(provider: &dyn Provider, request: &Request, cancellation: &CancellationToken) -> Asked {
    let request_id = RequestIdSlot::default();
    let result = provider
        .complete(Call {
            request,
            model: "some/model",
            path: "step",
            key: "turn-1",
            max_output_tokens: request.max_output_tokens,
            structured_output: StructuredOutput::JsonSchema,
            thinking: None,
            cancellation,
            request_id: &request_id,
        })
        .await;
    Asked { result, request_id: request_id.get() }
}

async fn ask(dialect: Dialect, server: &FakeProvider, timeouts: Timeouts) -> Asked {
    let provider = client(dialect, &server.base(), timeouts);
    ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await
}

/// Asks a server that does `acts`, in each dialect.
async fn each(acts: impl Fn(Dialect) -> Vec<Act>, check: impl Fn(Dialect, Asked)) {
    for dialect in Dialect::ALL {
        let server = FakeProvider::always(acts(dialect)).await;
        check(dialect, ask(dialect, &server, PATIENT).await);
        assert_eq!(server.seen().len(), 1, "{dialect:?}: one request, no hidden repetition");
    }
}

/// (code, kind, state, advice) of an error, to be compared at once.
fn verdict(error: &ProviderError) -> (&str, FailureKind, CallState, Advice) {
    (error.failure.code.as_str(), error.failure.kind, error.state, error.advice)
}
const LOST: (&str, FailureKind, CallState, Advice) =
    ("transient.network", FailureKind::Retryable, CallState::Unknown, Advice::SameModel);

#[tokio::test]
async fn a_good_answer_is_read_with_its_usage() {
    each(
        |d| stream(&d.good("h\u{e4}llo \u{1f980}")),
        |d, asked| {
            assert_eq!(asked.request_id.as_deref(), Some("gen-7"), "{d:?}");
            let completion = asked.completion();
            assert_eq!(completion.text, "h\u{e4}llo \u{1f980}", "{d:?}");
            let usage = &completion.usage;
            assert_eq!((usage.tokens_prompt, usage.tokens_output, usage.source), (11, 7, UsageSource::Provider));
            let cost = (d == Dialect::OpenRouter).then_some(310_000_000);
            assert_eq!(usage.provider_cost_pusd, cost, "{d:?}");
            // A local server may call its model by a file name, which has no price.
            let served = if d == Dialect::OpenAi { "some/model" } else { "served-model" };
            assert_eq!(completion.model_served, served);
            assert_eq!(completion.http_status, Some(200));
        },
    )
    .await;
}

#[tokio::test]
async fn cut_characters_line_ends_and_single_bytes_do_not_matter() {
    let crlf = |d: Dialect| {
        let text = String::from_utf8(d.good("\u{1f980}\u{e4}")).unwrap();
        format!(": hi\r\n\r\n{}", text.replace("\n", "\r\n").replace("data: ", "data:")).into_bytes()
    };
    each(
        |d| {
            let bytes: Vec<u8> = crlf(d).iter().flat_map(|byte| chunk(&[*byte])).collect();
            vec![Act::Bytes(stream_head("")), Act::Trickle(bytes), Act::Bytes(end())]
        },
        |d, asked| assert_eq!(asked.completion().text, "\u{1f980}\u{e4}", "{d:?}"),
    )
    .await;
    each(|d| stream(&crlf(d)), |d, asked| assert_eq!(asked.completion().text, "\u{1f980}\u{e4}", "{d:?}")).await;
}

#[tokio::test]
async fn a_refused_connection_was_never_sent() {
    for dialect in Dialect::ALL {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let provider = client(dialect, &base, PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        assert_eq!(
            verdict(&error),
            ("transient.network", FailureKind::Retryable, CallState::Failed, Advice::SameModel),
            "{dialect:?}"
        );
        assert!(error.unwell);
    }
}

#[tokio::test]
async fn a_connection_lost_after_sending_leaves_the_outcome_unknown() {
    // Before headers, by FIN and by RST.
    each(|_| vec![], |d, asked| assert_eq!(verdict(&asked.error()), LOST, "{d:?}")).await;
    each(|_| vec![Act::Reset], |d, asked| assert_eq!(verdict(&asked.error()), LOST, "{d:?}")).await;
    // After headers: the id that they carry is kept.
    each(
        |_| vec![Act::Bytes(stream_head("X-Generation-Id: gen-9\r\nx-request-id: gen-9\r\n"))],
        |d, asked| {
            let expected = (d != Dialect::Gemini).then_some("gen-9");
            assert_eq!(asked.request_id.as_deref(), expected, "{d:?}");
            let error = asked.error();
            assert_eq!(verdict(&error), LOST, "{d:?}");
            assert_eq!(error.http_status, Some(200));
        },
    )
    .await;
    // In mid-stream, by FIN and by RST.
    for last in [None, Some(Act::Reset)] {
        each(
            |d| {
                let begun = [stream_head(""), chunk(&frames(&[d.text("half a")]))].concat();
                std::iter::once(Act::Bytes(begun)).chain(last.clone()).collect()
            },
            |d, asked| assert_eq!(verdict(&asked.error()), LOST, "{d:?}"),
        )
        .await;
    }
}

#[tokio::test]
async fn an_answer_that_was_finished_before_the_connection_broke_is_kept() {
    each(
        |d| {
            vec![Act::Bytes(
                [stream_head(""), chunk(&frames(&[d.text("all"), d.finish("stop", Some((3, 2)))]))].concat(),
            )]
        },
        |d, asked| {
            let completion = asked.completion();
            assert_eq!((completion.text.as_str(), completion.usage.tokens_prompt), ("all", 3), "{d:?}");
        },
    )
    .await;
}

#[tokio::test]
async fn a_clean_end_without_a_finish_reason_is_truncated() {
    each(
        |d| stream(&frames(&[d.text("half a")])),
        |d, asked| {
            let error = asked.error();
            let expected = ("model.truncated", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
            assert_eq!(verdict(&error), expected, "{d:?}");
            assert!(!error.stream_completed);
            assert_eq!(error.usage.unwrap().source, UsageSource::Estimated);
        },
    )
    .await;
    // Comments only: nothing was generated, nothing is charged.
    each(
        |_| stream(b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"),
        |d, asked| {
            let error = asked.error();
            assert_eq!((error.failure.code.as_str(), error.usage), ("model.truncated", None), "{d:?}");
        },
    )
    .await;
}

#[tokio::test]
async fn silence_and_endlessness_have_limits() {
    // Long enough for a busy machine to get as far as it should, short enough to wait for.
    let short = Duration::from_millis(700);
    let mut cases = Vec::new();
    for dialect in Dialect::ALL {
        let begun = [stream_head(""), chunk(&frames(&[dialect.text("a")]))].concat();
        for (acts, timeouts) in [
            (vec![Act::Stall], Timeouts { connect: short, first_byte: short, ..PATIENT }),
            (vec![Act::Bytes(stream_head("")), Act::Stall], Timeouts { connect: short, first_byte: short, ..PATIENT }),
            (vec![Act::Bytes(begun), Act::Stall], Timeouts { idle: short, ..PATIENT }),
            (vec![Act::Bytes(stream_head("")), Act::CommentsForever], Timeouts { total: 2 * short, ..PATIENT }),
        ] {
            cases.push(async move {
                let server = FakeProvider::always(acts).await;
                let error = ask(dialect, &server, timeouts).await.error();
                assert_eq!(verdict(&error), LOST, "{dialect:?} {timeouts:?}");
                server.left().await;
            });
        }
    }
    futures_util::future::join_all(cases).await;
}

#[tokio::test]
async fn a_cancelled_call_closes_its_connection() {
    for dialect in Dialect::ALL {
        let begun = [stream_head(""), chunk(&frames(&[dialect.text("a")]))].concat();
        for acts in [vec![Act::Stall], vec![Act::Bytes(begun), Act::Stall]] {
            let server = FakeProvider::always(acts).await;
            let provider = client(dialect, &server.base(), PATIENT);
            let cancellation = CancellationToken::new();
            let (request, cancel) = (request(), cancellation.clone());
            let (asked, ()) = tokio::join!(ask_with(provider.as_ref(), &request, &cancellation), async {
                server.arrived().await;
                cancel.cancel();
            });
            let error = asked.error();
            assert_eq!((error.failure.kind, error.advice), (FailureKind::Cancelled, Advice::Stop), "{dialect:?}");
            server.left().await;
        }
    }
}

#[tokio::test]
async fn an_error_in_mid_stream_is_read_as_what_it_is() {
    each(
        |d| stream(&[frames(&[d.text("half a")]), d.error_in_stream()].concat()),
        |d, asked| {
            let error = asked.error();
            let expected = ("transient.http", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
            assert_eq!(verdict(&error), expected, "{d:?}");
            assert!(error.unwell && !error.failure.message.contains("upstream"));
        },
    )
    .await;
}

#[tokio::test]
async fn an_error_inside_an_answer_with_200_is_an_error() {
    each(
        |d| answer_json(200, "", &d.error(429, "RESOURCE_EXHAUSTED")),
        |d, asked| {
            let expected = if d == Dialect::OpenAi { "transient.http" } else { "transient.rate_limited" };
            assert_eq!(asked.error().failure.code, expected, "{d:?}");
        },
    )
    .await;
    let choice_error = json!({"id": "x", "choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "error",
        "error": {"code": 502, "message": "m"}}]});
    let server = FakeProvider::always(answer_json(200, "", &choice_error)).await;
    assert_eq!(ask(Dialect::OpenRouter, &server, PATIENT).await.error().failure.code, "transient.http");
}

#[tokio::test]
async fn rate_limits_carry_the_wait_that_was_asked_for() {
    each(
        |d| answer_json(429, "Retry-After: 7\r\n", &d.error(429, "RESOURCE_EXHAUSTED")),
        |d, asked| {
            let error = asked.error();
            let expected = ("transient.rate_limited", FailureKind::Retryable, CallState::Failed, Advice::SameModel);
            assert_eq!(verdict(&error), expected, "{d:?}");
            assert_eq!(error.failure.retry_after_ms, Some(7000));
            assert!(!error.unwell, "a busy provider is not an ill one");
        },
    )
    .await;
    each(
        |d| answer_json(429, "", &d.error(429, "RESOURCE_EXHAUSTED")),
        |d, asked| assert_eq!(asked.error().failure.retry_after_ms, None, "{d:?}"),
    )
    .await;
    let info = json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m", "details": [
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "26s"}]}});
    let server = FakeProvider::always(answer_json(429, "", &json!([info]))).await;
    assert_eq!(ask(Dialect::Gemini, &server, PATIENT).await.error().failure.retry_after_ms, Some(26_000));
}

#[tokio::test]
async fn an_empty_account_and_a_full_budget_are_told_apart() {
    each(
        |d| answer_json(402, "", &d.error(402, "RESOURCE_EXHAUSTED")),
        |d, asked| {
            let error = asked.error();
            let expected = ("provider.no_balance", FailureKind::Permanent, CallState::Failed, Advice::OtherProvider);
            assert_eq!(verdict(&error), expected, "{d:?}");
            assert!(error.failure.message.contains(d.key_setting()));
        },
    )
    .await;
    let in_flight = json!({"error": {"code": 402, "metadata": {"limit_source": "openrouter_in_flight_budget"}}});
    let server = FakeProvider::always(answer_json(402, "Retry-After: 2\r\n", &in_flight)).await;
    let error = ask(Dialect::OpenRouter, &server, PATIENT).await.error();
    assert_eq!((error.failure.code.as_str(), error.failure.retry_after_ms), ("transient.rate_limited", Some(2000)));
}

#[tokio::test]
async fn a_wrong_key_names_provider_and_setting_and_never_the_key() {
    each(
        |d| answer_json(401, "", &json!({"error": {"message": format!("bad key {KEY} at {d:?}"), "code": 401}})),
        |d, asked| {
            let error = asked.error();
            let expected = ("provider.key_invalid", FailureKind::Permanent, CallState::Failed, Advice::OtherProvider);
            assert_eq!(verdict(&error), expected, "{d:?}");
            assert!(error.failure.message.contains(d.key_setting()), "{}", error.failure.message);
            let everything = format!("{error:?} {error}");
            assert!(!everything.contains(KEY), "{everything}");
        },
    )
    .await;
}

#[tokio::test]
async fn error_pages_and_redirects_are_not_followed_or_shown() {
    each(
        |_| answer(500, "", "text/html", b"<html><h1>It broke</h1></html>"),
        |d, asked| {
            let error = asked.error();
            assert_eq!(error.failure.code, "transient.http", "{d:?}");
            assert!(!error.failure.message.contains("html"));
        },
    )
    .await;
    each(
        |_| answer(200, "", "text/html", b"<html>please log in</html>"),
        |d, asked| assert_eq!(asked.error().failure.code, "transient.http", "{d:?}"),
    )
    .await;
    each(
        |_| answer(307, "Location: http://127.0.0.1:1/steal\r\n", "text/plain", b""),
        |d, asked| {
            let error = asked.error();
            assert_eq!((error.failure.code.as_str(), error.http_status), ("provider.bad_request", Some(307)), "{d:?}");
        },
    )
    .await;
}

#[tokio::test]
async fn ten_megabytes_are_enough() {
    let huge = vec![b'x'; 11 * 1024 * 1024];
    each(
        |_| vec![Act::Bytes([stream_head(""), chunk(&[b"data: ".as_slice(), &huge].concat()), end()].concat())],
        |d, asked| assert_eq!(asked.error().failure.code, "transient.http", "{d:?}"),
    )
    .await;
    each(
        |_| answer(503, "", "application/json", &huge),
        |d, asked| assert_eq!(asked.error().http_status, Some(503), "{d:?}"),
    )
    .await;
}

#[tokio::test]
async fn a_compressed_answer_is_read_and_a_damaged_one_is_not() {
    let compressed = |body: &[u8]| {
        let head = stream_head("content-encoding: gzip\r\n");
        vec![Act::Bytes([head, chunk(body), end()].concat())]
    };
    each(
        |d| compressed(&gzip(&d.good("squeezed"))),
        |d, asked| assert_eq!(asked.completion().text, "squeezed", "{d:?}"),
    )
    .await;
    each(|_| compressed(b"this is not gzip"), |d, asked| assert_eq!(verdict(&asked.error()), LOST, "{d:?}")).await;
    // Unpacked, the limit counts.
    let bomb = gzip(&[b": ".as_slice(), &vec![b'x'; 11 * 1024 * 1024]].concat());
    each(|_| compressed(&bomb), |d, asked| assert_eq!(asked.error().failure.code, "transient.http", "{d:?}")).await;
}

#[tokio::test]
async fn usage_is_the_last_snapshot_or_an_estimate() {
    each(
        |d| stream(&frames(&[d.text("a"), d.usage(5, 1), d.finish("stop", Some((11, 7)))])),
        |d, asked| {
            let usage = asked.completion().usage;
            assert_eq!((usage.tokens_prompt, usage.tokens_output), (11, 7), "{d:?}: snapshots are not added");
        },
    )
    .await;
    each(
        |d| stream(&frames(&[d.text("twelve chars"), d.finish("stop", None)])),
        |d, asked| {
            let usage = asked.completion().usage;
            assert_eq!((usage.source, usage.tokens_output), (UsageSource::Estimated, 3), "{d:?}");
            assert!(usage.tokens_prompt > 0);
        },
    )
    .await;
}

#[tokio::test]
async fn every_finish_reason_has_a_verdict() {
    for (reason, code, kind, advice) in [
        ("length", "model.truncated", FailureKind::Retryable, Advice::SameModel),
        ("content_filter", "model.refused", FailureKind::Permanent, Advice::OtherModel),
        ("some_new_reason", "model.output_invalid", FailureKind::Retryable, Advice::SameModel),
    ] {
        each(
            |d| stream(&frames(&[d.text("a"), d.finish(reason, Some((11, 7)))])),
            |d, asked| {
                let error = asked.error();
                assert_eq!(verdict(&error), (code, kind, CallState::Failed, advice), "{d:?} {reason}");
                assert!(error.stream_completed);
                assert_eq!(error.finish_reason, Some(d.reason(reason)), "the raw reason is kept");
                assert_eq!(error.usage.unwrap().tokens_output, 7, "what was generated is billed");
            },
        )
        .await;
    }
    let blocked =
        json!({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 4}});
    let server = FakeProvider::always(stream(&frames(&[blocked]))).await;
    let error = ask(Dialect::Gemini, &server, PATIENT).await.error();
    assert_eq!((error.failure.code.as_str(), error.usage.unwrap().tokens_prompt), ("model.refused", 4));
}

#[tokio::test]
async fn a_whole_document_instead_of_a_stream_is_read() {
    let document = json!({"id": "gen-7", "object": "chat.completion", "model": "/models/tiny.gguf",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 1}});
    let server = FakeProvider::always(answer_json(200, "", &document)).await;
    assert_eq!(ask(Dialect::OpenAi, &server, PATIENT).await.completion().text, "hi");
    let list = json!([Dialect::Gemini.text("h"), Dialect::Gemini.text("i"), Dialect::Gemini.finish("stop", None)]);
    let server = FakeProvider::always(answer_json(200, "", &list)).await;
    assert_eq!(ask(Dialect::Gemini, &server, PATIENT).await.completion().text, "hi");
}

#[tokio::test]
async fn a_tool_call_makes_the_round_trip() {
    let tools = vec![ToolSpec {
        name: "read".into(),
        description: "reads".into(),
        parameters: json!({"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}),
    }];
    for dialect in Dialect::ALL {
        let server = FakeProvider::start(move |_, n| match n {
            0 => stream(&frames(&[dialect.tool_call(&json!({"path": "a.rs"})), dialect.finish("stop", Some((5, 5)))])),
            _ => stream(&dialect.good("done")),
        })
        .await;
        let provider = client(dialect, &server.base(), PATIENT);
        let mut request = Request { tools: tools.clone(), ..request() };
        let cancellation = CancellationToken::new();
        let first = ask_with(provider.as_ref(), &request, &cancellation).await.completion();
        assert_eq!(first.tool_calls.len(), 1, "{dialect:?}");
        let call = &first.tool_calls[0];
        assert_eq!((call.name.as_str(), &call.arguments), ("read", &json!({"path": "a.rs"})));
        request.messages.push(Message::Model {
            text: first.text.clone(),
            tool_calls: first.tool_calls.clone(),
            parts: first.parts.clone(),
            provider: dialect.name().into(),
        });
        request.messages.push(Message::Tool {
            call_id: call.id.clone(),
            name: "read".into(),
            output: "fn main".into(),
        });
        ask_with(provider.as_ref(), &request, &cancellation).await.completion();
        let sent = &server.seen()[1].body;
        if dialect == Dialect::Gemini {
            assert_eq!(sent["contents"][1]["parts"][0]["thoughtSignature"], "c2lnbmVk", "verbatim");
            let response = &sent["contents"][2]["parts"][0]["functionResponse"];
            assert_eq!(*response, json!({"name": "read", "response": {"output": "fn main"}}), "no id was given");
            assert_eq!(sent["tools"][0]["functionDeclarations"][0]["parametersJsonSchema"]["type"], "object");
        } else {
            assert_eq!(sent["messages"][2]["tool_calls"][0]["id"], "call_a");
            assert_eq!(sent["messages"][2]["tool_calls"][0]["function"]["arguments"], "{\"path\":\"a.rs\"}");
            assert_eq!(sent["messages"][3], json!({"role": "tool", "tool_call_id": "call_a", "content": "fn main"}));
            assert_eq!(sent["tools"][0]["function"]["name"], "read");
        }
    }
}

#[tokio::test]
async fn requests_have_the_shape_of_their_dialect() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false});
    let request = Request { output_schema: Some(schema.clone()), ..request() };
    for dialect in Dialect::ALL {
        let server = FakeProvider::always(stream(&dialect.good("{\"a\":1}"))).await;
        let provider = client(dialect, &server.base(), PATIENT);
        ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        let seen = server.seen().remove(0);
        let body = &seen.body;
        match dialect {
            Dialect::Gemini => {
                assert_eq!(seen.path, "/v1beta/models/some%2Fmodel:streamGenerateContent?alt=sse");
                assert_eq!(seen.headers["x-goog-api-key"], KEY);
                assert!(!seen.headers.contains_key("authorization"));
                assert_eq!(body["systemInstruction"]["parts"][0]["text"], "Be terse.");
                assert_eq!(body["generationConfig"]["responseMimeType"], "application/json");
                assert_eq!(body["generationConfig"]["responseJsonSchema"], schema);
                assert_eq!(body["generationConfig"]["maxOutputTokens"], 500);
            }
            Dialect::OpenRouter => {
                assert_eq!(seen.path, "/api/v1/chat/completions");
                assert_eq!(seen.headers["authorization"], format!("Bearer {KEY}"));
                assert_eq!(body["provider"]["require_parameters"], true);
                assert_eq!(body["max_completion_tokens"], 500);
                assert_eq!(body["response_format"]["json_schema"]["strict"], true);
            }
            Dialect::OpenAi => {
                assert_eq!(seen.path, "/v1/chat/completions");
                assert_eq!(body["stream_options"], json!({"include_usage": true}));
                assert_eq!((&body["max_tokens"], &body["max_completion_tokens"]), (&json!(500), &Value::Null));
                assert_eq!(body["response_format"]["json_schema"]["schema"], schema);
            }
        }
        if dialect != Dialect::Gemini {
            assert_eq!(body["messages"][0], json!({"role": "system", "content": "Be terse."}));
            assert_eq!(body["stream"], true);
        }
    }
}

#[tokio::test]
async fn a_keyless_server_gets_no_authorization() {
    let server = FakeProvider::always(stream(&Dialect::OpenAi.good("hi"))).await;
    let base = parse_base_url(&format!("{}/v1", server.base()), Trust::Operator).unwrap();
    let provider = OpenAiCompatible::new(base, None, PATIENT, Trust::Operator).unwrap();
    ask_with(&provider, &request(), &CancellationToken::new()).await.completion();
    assert!(!server.seen()[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_form_that_is_refused_is_simplified_and_remembered() {
    // Knows neither schemas nor JSON mode, nor the older name of the limit, and says so one at a time.
    let server = FakeProvider::start(|seen, _| {
        let refuse = |message: &str| {
            answer_json(400, "", &json!({"error": {"message": message, "type": "invalid_request_error", "code": 400}}))
        };
        if seen.body.get("max_tokens").is_some() {
            refuse("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        } else if seen.body.get("response_format").is_some() {
            refuse("unknown field")
        } else {
            stream(&Dialect::OpenAi.good("{\"a\":1}"))
        }
    })
    .await;
    let provider = client(Dialect::OpenAi, &server.base(), PATIENT);
    let request = Request { output_schema: Some(json!({"type": "object"})), ..request() };
    for requests in [4, 5] {
        let completion = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        assert_eq!(completion.text, "{\"a\":1}");
        assert_eq!(server.seen().len(), requests, "three refusals, then none ever again");
    }
    let last = server.seen().pop().unwrap().body;
    assert!(last["messages"][0]["content"].as_str().unwrap().contains("JSON Schema"), "the prompt says it instead");

    // A server that refuses everything is not asked for ever.
    let server = FakeProvider::always(answer_json(400, "", &json!({"error": {"message": "no"}}))).await;
    let provider = client(Dialect::OpenAi, &server.base(), PATIENT);
    let error = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.error();
    assert_eq!((error.failure.code.as_str(), error.advice), ("provider.bad_request", Advice::OtherModel));
    assert!(server.seen().len() <= 6, "{}", server.seen().len());
}

#[tokio::test]
async fn openrouter_and_gemini_step_down_where_a_schema_is_not_taken() {
    let request = Request { output_schema: Some(json!({"type": "object"})), ..request() };
    let server = FakeProvider::start(|seen, _| match seen.body.get("response_format") {
        Some(format) if format["type"] == "json_schema" => {
            answer_json(404, "", &json!({"error": {"code": 404, "message": "No endpoints found"}}))
        }
        _ => stream(&Dialect::OpenRouter.good("{}")),
    })
    .await;
    let provider = client(Dialect::OpenRouter, &server.base(), PATIENT);
    ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
    assert_eq!(server.seen()[1].body["response_format"], json!({"type": "json_object"}));

    let server = FakeProvider::start(|seen, _| match seen.body["generationConfig"].get("responseJsonSchema") {
        Some(_) => {
            answer_json(400, "", &json!({"error": {"status": "INVALID_ARGUMENT", "message": "schema too deep"}}))
        }
        None => stream(&Dialect::Gemini.good("{}")),
    })
    .await;
    let provider = client(Dialect::Gemini, &server.base(), PATIENT);
    for requests in [2, 3] {
        ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        assert_eq!(server.seen().len(), requests);
    }
}

#[tokio::test]
async fn a_model_that_knows_no_thinking_level_is_asked_without_it() {
    let server = FakeProvider::start(|seen, _| match seen.body["generationConfig"].get("thinkingConfig") {
        Some(_) => {
            let body = json!({"error": {"status": "INVALID_ARGUMENT", "message": "Thinking level is not supported"}});
            answer_json(400, "", &body)
        }
        None => stream(&Dialect::Gemini.good("ok")),
    })
    .await;
    let provider = client(Dialect::Gemini, &server.base(), PATIENT);
    for requests in [2, 3] {
        let (request, cancellation, request_id) = (request(), CancellationToken::new(), RequestIdSlot::default());
        let call = Call {
            request: &request,
            model: "m",
            path: "step",
            key: "turn-1",
            max_output_tokens: 500,
            structured_output: StructuredOutput::JsonSchema,
            thinking: Some("low"),
            cancellation: &cancellation,
            request_id: &request_id,
        };
        assert_eq!(provider.complete(call).await.unwrap().text, "ok");
        assert_eq!(server.seen().len(), requests);
    }
    assert_eq!(server.seen()[0].body["generationConfig"]["thinkingConfig"], json!({"thinkingLevel": "low"}));
}

#[tokio::test]
async fn a_context_overflow_is_recognized_with_its_window() {
    let body = json!({"error": {"code": 400, "type": "exceed_context_size_error", "message": "the request exceeds the \
        available context size", "n_prompt_tokens": 9000, "n_ctx": 4096}});
    let server = FakeProvider::always(answer_json(400, "", &body)).await;
    let error = ask(Dialect::OpenAi, &server, PATIENT).await.error();
    assert_eq!(error.failure.code, "model.context_overflow");
    assert_eq!(error.context_tokens, Some(4096));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_server_says_which_models_it_has() {
    let list = json!({"object": "list", "data": [{"id": "tiny.gguf", "meta": {"n_ctx": 2048}}, {"id": "other"}]});
    let server = FakeProvider::always(answer_json(200, "", &list)).await;
    let base = parse_base_url(&server.base(), Trust::Operator).unwrap();
    let provider = OpenAiCompatible::new(base, None, PATIENT, Trust::Operator).unwrap();
    let models = provider.models().await.unwrap();
    assert_eq!((models[0].id.as_str(), models[0].context_tokens, models.len()), ("tiny.gguf", 2048, 2));
    assert_eq!(server.seen()[0].path, "/v1/models");
}
