//! Facts of the reference that are neither faults nor errors: shapes, round trips, ends, usage, oddities of streams.

use super::{KEY, PATIENT, ask_with, client, each, request, verdict};
use loopwright_activities::{
    orchestrator::{Message, Request, ToolSpec},
    provider::{
        Advice, Call, Continuation, Gemini, Provider, RequestIdSlot, StructuredOutput,
        address::{Trust, parse_base_url},
        estimate::{self, request_bytes},
    },
    testing::{Answer, Dialect, FakeProvider, Reply, Told, answer_json, chunk, end, frames, stream, stream_head},
    usage::{CallState, UsageSource},
};
use loopwright_engine::FailureKind;
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_good_answer_is_read_with_its_usage_to_the_token() {
    let told = Told { prompt: 194, cached: 100, output: 12, reasoning: 5, cost: "0.000310000001".to_owned() };
    for dialect in Dialect::ALL {
        let mut reply = Reply::text("h\u{e4}llo \u{1f980}").with_usage(Some(told.clone()));
        reply.thought = "hm".to_owned();
        reply.model_served = Some("served-model".to_owned());
        let server = FakeProvider::saying(reply).await;
        let provider = client(dialect, &server.base_of(dialect), PATIENT);
        let asked = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await;
        assert_eq!(asked.request_id.as_deref(), Some("gen-1"), "{dialect:?}");
        let completion = asked.completion();
        assert_eq!(completion.text, "h\u{e4}llo \u{1f980}", "{dialect:?}: without its thoughts");
        let usage = &completion.usage;
        let counts = (usage.tokens_prompt, usage.tokens_cached, usage.tokens_output, usage.tokens_reasoning);
        assert_eq!((counts, usage.source), ((194, 100, 12, 5), UsageSource::Provider), "{dialect:?}");
        let cost = (dialect == Dialect::OpenRouter).then_some(310_000_001);
        assert_eq!(usage.provider_cost_pusd, cost, "{dialect:?}");
        // A local server may call its model by a file name, which has no price.
        let served = if dialect == Dialect::OpenAi { "some/model" } else { "served-model" };
        assert_eq!((completion.model_served.as_str(), completion.http_status), (served, Some(200)));
        let entry = &server.journal()[0];
        assert_eq!(entry.provider_request_id, completion.provider_request_id);
        assert_eq!(entry.usage, Some(told.clone()));
    }
}

#[tokio::test]
async fn both_versions_of_gemini_are_spoken() {
    for (version, path) in [("v1", "/v1/models/m"), ("v1beta", "/v1beta/models/m")] {
        let server = FakeProvider::saying(Reply::text("hi")).await;
        let base = parse_base_url(&server.base(), Trust::Operator).unwrap();
        let provider = Gemini::new(base, version, &SecretString::from(KEY), PATIENT, Trust::Operator).unwrap();
        let mut call_request = request();
        call_request.purpose = version.to_owned();
        // The name of a model may carry its collection.
        for model in ["m", "models/m"] {
            let (cancellation, request_id) = (CancellationToken::new(), Default::default());
            let call = super::call(&call_request, model, &cancellation, &request_id);
            assert_eq!(provider.complete(call).await.unwrap().text, "hi");
        }
        for seen in server.seen() {
            assert_eq!(seen.path, format!("{path}:streamGenerateContent?alt=sse"));
            assert_eq!((seen.dialect, seen.key()), (Dialect::Gemini, Some(KEY)), "the key is in one place only");
            assert!(!seen.path.contains(KEY) && !seen.headers.contains_key("authorization"));
        }
    }
}

#[tokio::test]
async fn requests_have_the_shape_of_their_dialect() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false});
    let request = Request { output_schema: Some(schema.clone()), ..request() };
    for dialect in Dialect::ALL {
        let server = FakeProvider::saying(Reply::text("{\"a\":1}")).await;
        let provider = client(dialect, &server.base(), PATIENT);
        ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        let seen = server.seen().remove(0);
        let body = &seen.body;
        match dialect {
            Dialect::Gemini => {
                assert_eq!(seen.path, "/v1beta/models/some%2Fmodel:streamGenerateContent?alt=sse");
                assert_eq!(body["systemInstruction"]["parts"][0]["text"], "Be terse.");
                assert_eq!(body["contents"][0]["role"], "user");
                assert_eq!(body["generationConfig"]["responseMimeType"], "application/json");
                assert_eq!(body["generationConfig"]["responseJsonSchema"], schema);
                assert_eq!(body["generationConfig"]["maxOutputTokens"], 500);
            }
            Dialect::OpenRouter => {
                assert_eq!(seen.path, "/api/v1/chat/completions");
                assert_eq!(seen.headers["authorization"], format!("Bearer {KEY}"));
                assert!(seen.headers.contains_key("x-openrouter-title"));
                assert_eq!(body["provider"]["require_parameters"], true);
                assert_eq!(body["max_completion_tokens"], 500);
                assert_eq!(body["response_format"]["json_schema"]["strict"], true);
                assert_eq!((&body["usage"], &body["stream_options"]), (&Value::Null, &Value::Null), "deprecated there");
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
async fn a_router_asks_only_servers_that_know_every_parameter_and_cost_no_more_than_allowed() {
    let ask = async |request: &Request, thinking, price_max, server: &FakeProvider, provider: &dyn Provider| {
        let (cancellation, request_id) = (CancellationToken::new(), Default::default());
        let call = super::call(request, "some/model", &cancellation, &request_id);
        let before = server.seen().len();
        provider.complete(Call { thinking, price_max, ..call }).await.unwrap();
        let routed: Vec<Value> = server.seen().drain(before..).map(|seen| seen.body["provider"].clone()).collect();
        routed
    };
    let server = FakeProvider::saying(Reply::text("hi")).await;
    let provider = client(Dialect::OpenRouter, &server.base(), PATIENT);
    let (plain, with_tools) = (request(), Request { tools: tools(), ..request() });
    let none = (None, None);
    assert_eq!(ask(&plain, None, none, &server, &*provider).await, [Value::Null]);
    assert_eq!(ask(&with_tools, None, none, &server, &*provider).await, [json!({"require_parameters": true})]);
    assert_eq!(ask(&plain, Some("low"), none, &server, &*provider).await, [json!({"require_parameters": true})]);
    // USD per million tokens.
    let dear = (Some(1_250_000), Some(10_000_000));
    let expected = json!({"max_price": {"prompt": "1.25", "completion": "10"}});
    assert_eq!(ask(&plain, None, dear, &server, &*provider).await, [expected]);
    // No server that knows all of it: better one that does not, and that is remembered.
    let server = FakeProvider::serve(|seen, _| match &seen.body["provider"]["require_parameters"] {
        Value::Null => Answer::Reply(Reply::text("hi")),
        _ => Answer::Refused {
            status: 404,
            headers: vec![],
            body: json!({"error": {"code": 404, "message": "No endpoints found that support tool use"}}),
        },
    })
    .await;
    let provider = client(Dialect::OpenRouter, &server.base(), PATIENT);
    let routed = ask(&with_tools, None, none, &server, &*provider).await;
    assert_eq!(routed, [json!({"require_parameters": true}), Value::Null]);
    assert_eq!(ask(&with_tools, None, none, &server, &*provider).await, [Value::Null]);
}

fn tools() -> Vec<ToolSpec> {
    let parameters = json!({"type": "object", "properties": {"path": {"type": "string", "minLength": 1}},
        "required": ["path"], "additionalProperties": false});
    vec![ToolSpec { name: "read".into(), description: "reads".into(), parameters }]
}

fn turn(first: &loopwright_activities::provider::Completion, dialect: Dialect) -> Message {
    Message::Model {
        text: first.text.clone(),
        tool_calls: first.tool_calls.clone(),
        parts: first.parts.clone(),
        provider: dialect.name().into(),
    }
}

#[tokio::test]
async fn tool_calls_make_the_round_trip_past_a_strict_server() {
    for dialect in Dialect::ALL {
        for documents in [false, true] {
            // Parallel calls: of Gemini's only the first is signed; the strict server refuses a turn that lost it.
            let server = FakeProvider::serve(|_, n| match n {
                0 => {
                    let mut reply = Reply::tool_call("read", json!({"path": "a.rs"}));
                    reply.tool_calls.push(("read".to_owned(), json!({"path": "\u{e4} \"b\".rs"})));
                    reply.thought = "two files".to_owned();
                    reply
                }
                _ => Reply::text("done"),
            })
            .await;
            server.answer_documents(documents);
            let provider = client(dialect, &server.base_of(dialect), PATIENT);
            let mut request = Request { tools: tools(), ..request() };
            let cancellation = CancellationToken::new();
            let first = ask_with(provider.as_ref(), &request, &cancellation).await.completion();
            let arguments: Vec<&Value> = first.tool_calls.iter().map(|call| &call.arguments).collect();
            assert_eq!(arguments, [&json!({"path": "a.rs"}), &json!({"path": "\u{e4} \"b\".rs"})], "{dialect:?}");
            request.messages.push(turn(&first, dialect));
            for call in &first.tool_calls {
                let (call_id, name) = (call.id.clone(), call.name.clone());
                request.messages.push(Message::Tool { call_id, name, output: "fn main".into() });
            }
            let second = ask_with(provider.as_ref(), &request, &cancellation).await.completion();
            assert_eq!(second.text, "done", "{dialect:?}");
            let sent = &server.seen()[1].body;
            if dialect == Dialect::Gemini {
                let mut parts = vec![
                    json!({"text": "two files", "thought": true}),
                    json!({"functionCall": {"name": "read", "args": arguments[0]}, "thoughtSignature": "c2lnbmVk"}),
                    json!({"functionCall": {"name": "read", "args": arguments[1]}}),
                ];
                if !documents {
                    parts.push(json!({"text": "", "thoughtSignature": "bGFzdA=="}));
                }
                assert_eq!(sent["contents"][1], json!({"role": "model", "parts": parts}), "verbatim");
                let results = sent["contents"][2]["parts"].as_array().unwrap();
                assert_eq!(results.len(), 2, "all parallel results together");
                let expected = json!({"functionResponse": {"name": "read", "response": {"output": "fn main"}}});
                assert_eq!(results[0], expected, "no id was given");
                let declared = &sent["tools"][0]["functionDeclarations"][0]["parametersJsonSchema"];
                assert!(declared["properties"]["path"].get("minLength").is_none(), "unknown to the API");
            } else {
                assert_eq!(sent["messages"][2]["tool_calls"][0]["function"]["arguments"], "{\"path\":\"a.rs\"}");
                let expected = json!({"role": "tool", "tool_call_id": "call_2", "content": "fn main"});
                assert_eq!(sent["messages"][4], expected);
                let reasoning = json!([
                    {"type": "reasoning.text", "text": "two files", "signature": "c2lnbmVk",
                        "format": "anthropic-claude-v1", "index": 0},
                    {"type": "reasoning.encrypted", "data": "c2VjcmV0", "id": "rs_1",
                        "format": "anthropic-claude-v1", "index": 1},
                ]);
                let reasoning = (dialect == Dialect::OpenRouter).then_some(&reasoning);
                let returned = sent["messages"][2].get("reasoning_details");
                assert_eq!(returned, reasoning, "{dialect:?}, documents: {documents}");
                assert_eq!(sent["tools"][0]["function"]["name"], "read", "tools are sent again");
            }
        }
    }
}

#[tokio::test]
async fn parts_that_gemini_signed_are_neither_merged_nor_dropped() {
    let said = json!([
        {"text": "H", "thought": true},
        {"text": "m", "thought": true},
        {"text": ".", "thought": true, "thoughtSignature": "czE="},
        {"text": "It "},
        {"text": "is "},
        {"text": "cold", "thoughtSignature": "czI="},
        {"text": " and", "thoughtSignature": "czM="},
        {"text": " d"},
        {"text": "ry", "partMetadata": {"n": 1}},
        {"text": "."},
        {"inlineData": {"mimeType": "image/png", "data": "aQ=="}, "thoughtSignature": "czQ="},
        {"text": "", "thoughtSignature": "bGFzdA=="},
    ]);
    // Plain pieces of one text are one part; all others are as they came.
    let kept = json!([
        {"text": "Hm", "thought": true},
        {"text": ".", "thought": true, "thoughtSignature": "czE="},
        {"text": "It is "},
        {"text": "cold", "thoughtSignature": "czI="},
        {"text": " and", "thoughtSignature": "czM="},
        {"text": " d"},
        {"text": "ry", "partMetadata": {"n": 1}},
        {"text": "."},
        {"inlineData": {"mimeType": "image/png", "data": "aQ=="}, "thoughtSignature": "czQ="},
        {"text": "", "thoughtSignature": "bGFzdA=="},
    ]);
    let event = |parts: &[Value]| json!({"candidates": [{"content": {"role": "model", "parts": parts}}]});
    let mut events: Vec<Value> = said.as_array().unwrap().chunks(1).map(event).collect();
    events.last_mut().unwrap()["candidates"][0]["finishReason"] = json!("STOP");
    let mut document = event(said.as_array().unwrap());
    document["candidates"][0]["finishReason"] = json!("STOP");
    for acts in [stream(&frames(&events)), answer_json(200, "", &document)] {
        let server = FakeProvider::serve(move |_, n| match n {
            0 => Answer::from(acts.clone()),
            _ => Answer::from(Reply::text("done")),
        })
        .await;
        let provider = client(Dialect::Gemini, &server.base(), PATIENT);
        let mut request = request();
        let first = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        assert_eq!(first.text, "It is cold and dry.");
        request.messages.extend([turn(&first, Dialect::Gemini), Message::User { text: "Sure?".into() }]);
        ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        assert_eq!(server.seen()[1].body["contents"][1], json!({"role": "model", "parts": kept}));
    }
}

#[tokio::test]
async fn an_id_that_gemini_gave_is_echoed() {
    let server = FakeProvider::serve(|_, n| match n {
        0 => Answer::from(stream(&frames(&[
            json!({"candidates": [{"content": {"role": "model", "parts": [
                {"functionCall": {"id": "c1", "name": "read", "args": {"path": "a"}}, "thoughtSignature": "c2ln"}]}}]}),
            Dialect::Gemini.finish("stop", None),
        ]))),
        _ => Answer::from(Reply::text("done")),
    })
    .await;
    let provider = client(Dialect::Gemini, &server.base(), PATIENT);
    let mut request = Request { tools: tools(), ..request() };
    let first = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
    request.messages.push(turn(&first, Dialect::Gemini));
    request.messages.push(Message::Tool { call_id: "c1".into(), name: "read".into(), output: "x".into() });
    ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
    assert_eq!(server.seen()[1].body["contents"][2]["parts"][0]["functionResponse"]["id"], "c1");
}

#[tokio::test]
async fn a_turn_of_another_provider_is_accepted_by_each() {
    for (from, to) in [(Dialect::Gemini, Dialect::OpenRouter), (Dialect::OpenAi, Dialect::Gemini)] {
        let server = FakeProvider::serve(|_, n| match n {
            0 => Reply::tool_call("read", json!({"path": "a"})),
            _ => Reply::text("done"),
        })
        .await;
        let mut request = Request { tools: tools(), ..request() };
        let cancellation = CancellationToken::new();
        let first = ask_with(client(from, &server.base_of(from), PATIENT).as_ref(), &request, &cancellation).await;
        let first = first.completion();
        request.messages.push(turn(&first, from));
        let call_id = first.tool_calls[0].id.clone();
        request.messages.push(Message::Tool { call_id, name: "read".into(), output: "x".into() });
        let second = ask_with(client(to, &server.base_of(to), PATIENT).as_ref(), &request, &cancellation).await;
        assert_eq!(second.completion().text, "done", "{from:?} to {to:?}");
    }
}

#[tokio::test]
async fn what_is_sent_back_verbatim_is_counted_before_it_is_sent() {
    let noise = "0123456789abcdef".repeat(2_000);
    for dialect in [Dialect::Gemini, Dialect::OpenRouter] {
        let parts = match dialect {
            Dialect::Gemini => json!([{"text": "short", "thoughtSignature": noise}]),
            _ => json!({"role": "assistant", "content": "short",
                "reasoning_details": [{"type": "reasoning.encrypted", "data": noise, "index": 0}]}),
        };
        let (text, provider) = ("short".to_owned(), dialect.name().to_owned());
        let turn = Message::Model { text, tool_calls: vec![], parts: parts.clone(), provider };
        let plain = request();
        let mut long = plain.clone();
        long.messages.extend([turn, Message::User { text: "go on".into() }]);
        let server = FakeProvider::saying(Reply::text("done")).await;
        let provider = client(dialect, &server.base_of(dialect), PATIENT);
        for request in [&plain, &long] {
            ask_with(provider.as_ref(), request, &CancellationToken::new()).await.completion();
        }
        let sent = &server.seen()[1].body;
        let sent = if dialect == Dialect::Gemini { &sent["contents"][1]["parts"] } else { &sent["messages"][2] };
        assert!(sent == &parts, "{dialect:?}: not as it came");
        let sizes: Vec<usize> = server.seen().iter().map(|seen| seen.body.to_string().len()).collect();
        let counted = request_bytes(&long) - request_bytes(&plain);
        // The braces around a user's turn are more bytes than tokens; everything else is text.
        assert!(counted + 64 >= sizes[1] - sizes[0], "{dialect:?}: {counted} of {sizes:?}");
        // Where it is not sent (another provider, or no usage was reported) nobody pays for it.
        assert!(estimate::usage(&long, 4, 100).tokens_prompt < 100);
    }
}

#[tokio::test]
async fn every_finish_reason_has_a_verdict() {
    use Advice::{OtherModel, OtherProvider, SameModel};
    let retry = |code| (code, FailureKind::Retryable, CallState::Failed, SameModel);
    let refused = ("model.refused", FailureKind::Permanent, CallState::Failed, OtherModel);
    let bug = ("provider.bad_request", FailureKind::Permanent, CallState::Failed, OtherProvider);
    let mut rows = vec![
        (Dialect::Gemini, "MAX_TOKENS", retry("model.truncated")),
        (Dialect::Gemini, "MISSING_THOUGHT_SIGNATURE", bug),
        // Without the token that it should have brought.
        (Dialect::Gemini, "CONTINUATION", ("model.truncated", FailureKind::Retryable, CallState::Failed, OtherModel)),
    ];
    for reason in
        ["SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_X"]
    {
        rows.push((Dialect::Gemini, reason, refused));
    }
    for reason in [
        "MALFORMED_FUNCTION_CALL",
        "UNEXPECTED_TOOL_CALL",
        "TOO_MANY_TOOL_CALLS",
        "MALFORMED_RESPONSE",
        "NO_IMAGE",
        "OTHER",
        "SOMETHING_NEW",
    ] {
        rows.push((Dialect::Gemini, reason, retry("model.output_invalid")));
    }
    for dialect in [Dialect::OpenRouter, Dialect::OpenAi] {
        rows.push((dialect, "length", retry("model.truncated")));
        rows.push((dialect, "content_filter", refused));
        rows.push((dialect, "error", retry("transient.http")));
        rows.push((dialect, "something_new", retry("model.output_invalid")));
    }
    for (dialect, reason, expected) in rows {
        let server =
            FakeProvider::always(stream(&frames(&[dialect.text("a"), dialect.finish(reason, Some((11, 7)))]))).await;
        let provider = client(dialect, &server.base(), PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        assert_eq!(verdict(&error), expected, "{dialect:?} {reason}");
        assert_eq!(error.finish_reason.as_deref(), Some(reason), "the raw reason is kept");
        assert_eq!(error.usage.unwrap().tokens_output, 7, "{dialect:?} {reason}: what was generated is billed");
    }
}

#[tokio::test]
async fn the_rest_of_an_answer_is_asked_for_with_its_token_and_put_behind_its_beginning() {
    let told = |output| Some(Told { output, ..Told::default() });
    for documents in [false, true] {
        let server = FakeProvider::serve(move |seen, _| match seen.body["continuationToken"].as_str() {
            None => {
                let mut begun = Reply::text("It beg").continued("dG9rZW4=").with_usage(told(5));
                begun.tool_calls = vec![("read".to_owned(), json!({"path": "a"}))];
                begun
            }
            Some(_) => {
                let mut rest = Reply::text("ins.").with_usage(told(3));
                rest.tool_calls = vec![("read".to_owned(), json!({"path": "b"}))];
                rest
            }
        })
        .await;
        server.answer_documents(documents);
        let provider = client(Dialect::Gemini, &server.base_of(Dialect::Gemini), PATIENT);
        let request = Request { tools: tools(), ..request() };
        let cancellation = CancellationToken::new();
        let first = ask_with(provider.as_ref(), &request, &cancellation).await.completion();
        assert_eq!((first.text.as_str(), first.continuation_token.as_deref()), ("It beg", Some("dG9rZW4=")));
        let before = Continuation { token: "dG9rZW4=".into(), parts: first.parts.clone() };
        let request_id = RequestIdSlot::default();
        let hop = super::call(&request, "some/model", &cancellation, &request_id);
        let whole = provider.complete(Call { continuation: Some(&before), ..hop }).await.unwrap();
        assert_eq!((whole.text.as_str(), whole.continuation_token.as_deref()), ("It begins.", None));
        assert_eq!((first.usage.tokens_output, whole.usage.tokens_output), (5, 3), "each call by itself");
        let calls: Vec<_> = whole.tool_calls.iter().map(|call| (call.id.as_str(), &call.arguments["path"])).collect();
        assert_eq!(calls, [("own-1", &json!("a")), ("own-2", &json!("b"))]);
        let seen = server.seen();
        let mut again = seen[1].body.clone();
        again.as_object_mut().unwrap().remove("continuationToken");
        assert_eq!((&again, seen.len()), (&seen[0].body, 2), "the same request, and the token");
    }
}

#[tokio::test]
async fn a_token_that_nobody_can_send_is_none() {
    for token in [json!(""), json!("a\u{0}b"), json!(7), json!("x".repeat(65 * 1024))] {
        let mut end = Dialect::Gemini.finish("CONTINUATION", Some((11, 7)));
        end["candidates"][0]["continuationToken"] = token.clone();
        let server = FakeProvider::always(stream(&frames(&[Dialect::Gemini.text("a"), end]))).await;
        let error = super::ask(Dialect::Gemini, &server, PATIENT).await.error();
        assert_eq!((error.failure.code.as_str(), error.stream_completed), ("model.truncated", false), "{token:.20}");
        assert_eq!(error.advice, Advice::OtherModel);
    }
}

#[tokio::test]
async fn a_blocked_prompt_and_a_limit_without_text_are_what_they_are() {
    for reason in ["SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT", "IMAGE_SAFETY"] {
        let blocked = json!({"promptFeedback": {"blockReason": reason}, "usageMetadata": {"promptTokenCount": 4}});
        let server = FakeProvider::always(stream(&frames(&[blocked]))).await;
        let provider = client(Dialect::Gemini, &server.base(), PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        assert_eq!((error.failure.code.as_str(), error.finish_reason.as_deref()), ("model.refused", Some(reason)));
        assert_eq!(error.usage.unwrap().tokens_prompt, 4);
    }
    // Thinking counts against the limit and may use all of it.
    let server = FakeProvider::always(stream(&frames(&[json!({"candidates": [{"finishReason": "MAX_TOKENS"}],
        "usageMetadata": {"promptTokenCount": 4, "thoughtsTokenCount": 500, "totalTokenCount": 504}})])))
    .await;
    let provider = client(Dialect::Gemini, &server.base(), PATIENT);
    let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
    assert_eq!((error.failure.code.as_str(), error.usage.unwrap().tokens_output), ("model.truncated", 500));
}

#[tokio::test]
async fn what_openrouter_does_not_bill_is_not_counted() {
    let nothing = json!({"id": "g", "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}],
        "usage": {"prompt_tokens": 194, "completion_tokens": 0}});
    let inside = json!({"id": "g", "choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "error",
        "error": {"code": 502, "message": "m"}}], "usage": {"prompt_tokens": 194, "completion_tokens": 0}});
    for acts in [stream(&frames(&[nothing])), answer_json(200, "", &inside)] {
        let server = FakeProvider::always(acts).await;
        let provider = client(Dialect::OpenRouter, &server.base(), PATIENT);
        let error = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.error();
        assert_eq!((error.failure.code.as_str(), error.usage), ("transient.http", None));
    }
}

#[tokio::test]
async fn the_usage_of_gemini_adds_up_whether_thoughts_are_inside_or_not() {
    for (raw, expected) in [
        (
            json!({"promptTokenCount": 220, "cachedContentTokenCount": 128, "candidatesTokenCount": 5,
                "thoughtsTokenCount": 185, "toolUsePromptTokenCount": 0, "totalTokenCount": 410}),
            (220, 128, 190, 185),
        ),
        // Thoughts are inside of candidates.
        (
            json!({"promptTokenCount": 220, "candidatesTokenCount": 190, "thoughtsTokenCount": 185,
                "totalTokenCount": 410}),
            (220, 0, 190, 185),
        ),
        // Tool use belongs to the input.
        (
            json!({"promptTokenCount": 20, "candidatesTokenCount": 5, "toolUsePromptTokenCount": 30,
                "totalTokenCount": 55}),
            (50, 0, 5, 0),
        ),
        // Without a total, and with an absurd one.
        (json!({"promptTokenCount": 20, "candidatesTokenCount": 5, "thoughtsTokenCount": 2}), (20, 0, 7, 2)),
        (json!({"promptTokenCount": 20, "candidatesTokenCount": 5, "totalTokenCount": 1}), (20, 0, 5, 0)),
    ] {
        let mut last = Dialect::Gemini.finish("stop", None);
        last["usageMetadata"] = raw.clone();
        let server = FakeProvider::always(stream(&frames(&[Dialect::Gemini.text("a"), last]))).await;
        let provider = client(Dialect::Gemini, &server.base(), PATIENT);
        let usage = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.completion().usage;
        let got = (usage.tokens_prompt, usage.tokens_cached, usage.tokens_output, usage.tokens_reasoning);
        assert_eq!((got, &usage.raw), (expected, &raw));
    }
}

#[tokio::test]
async fn what_a_provider_says_of_its_usage_is_kept_to_the_letter() {
    let written =
        r#"{"prompt_tokens": 11,"completion_tokens":7, "cost": 0.000310000000, "later": 0.1000000000000000055511151}"#;
    let choice = r#"{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}"#;
    let event = format!("data: {{\"choices\":[{choice}], \"usage\" : {written} }}\n\ndata: [DONE]\n\n");
    for dialect in [Dialect::OpenRouter, Dialect::OpenAi] {
        let server = FakeProvider::always(stream(event.as_bytes())).await;
        let provider = client(dialect, &server.base_of(dialect), PATIENT);
        let usage = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.completion().usage;
        assert_eq!((usage.tokens_prompt, usage.provider_cost_pusd), (11, Some(310_000_000)), "{dialect:?}");
        assert_eq!(usage.raw_to_keep().get(), written, "{dialect:?}");
    }
}

#[tokio::test]
async fn snapshots_of_usage_are_not_added_and_null_is_none() {
    each(
        |d| {
            let mut null = d.text("");
            null[if d == Dialect::Gemini { "usageMetadata" } else { "usage" }] = Value::Null;
            stream(&frames(&[d.text("a"), d.usage(5, 1), d.finish("stop", Some((11, 7))), null]))
        },
        |d, asked| {
            let usage = asked.completion().usage;
            assert_eq!((usage.tokens_prompt, usage.tokens_output), (11, 7), "{d:?}");
        },
    )
    .await;
}

#[tokio::test]
async fn lines_and_events_may_be_put_together_in_any_way() {
    // Events without an empty line between them, and one event in several lines.
    each(
        |d| {
            let joined = String::from_utf8(d.good("ab")).unwrap().replace("\n\n", "\n");
            stream(format!("{joined}\n").as_bytes())
        },
        |d, asked| assert_eq!(asked.completion().text, "ab", "{d:?}"),
    )
    .await;
    each(
        |d| {
            let pretty = |event: &Value| {
                let text = serde_json::to_string_pretty(event).unwrap();
                text.lines().map(|line| format!("data: {line}\n")).collect::<String>() + "\n"
            };
            stream([pretty(&d.text("ab")), pretty(&d.finish("stop", Some((11, 7))))].concat().as_bytes())
        },
        |d, asked| assert_eq!(asked.completion().text, "ab", "{d:?}"),
    )
    .await;
    // Without `alt=sse`, or with a proxy in between, Gemini answers with one list.
    let g = Dialect::Gemini;
    let list = json!([g.text("h"), g.text("i"), g.finish("stop", None)]);
    let server = FakeProvider::always(answer_json(200, "", &list)).await;
    let provider = client(g, &server.base(), PATIENT);
    assert_eq!(ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.completion().text, "hi");
}

#[tokio::test]
async fn the_oddities_of_local_servers_are_tolerated() {
    let call = |piece: Value| json!({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]});
    let done = |reason: &str| json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]});
    let f = |arguments: Value| json!({"name": "read", "arguments": arguments});
    // As seen at llama.cpp, vLLM, Ollama and proxies: what they send, and what arrives.
    let one = json!({"path": "a"});
    let rows = [
        // No index, whole call in one chunk, an object as arguments, `stop` although there is a call.
        vec![call(json!({"function": f(one.clone())})), done("stop")],
        // An empty id in later chunks.
        vec![
            call(json!({"index": 0, "id": "a", "function": f(json!("{\"pa"))})),
            call(json!({"index": 0, "id": "", "function": {"arguments": "th\":\"a\"}"}})),
            done("tool_calls"),
        ],
        // Extra fields, a first delta without content, thoughts beside the text.
        vec![
            json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}], "timings": {}, "system_fingerprint": "x"}),
            json!({"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "content": ""}, "stop_reason": null}]}),
            call(json!({"index": 0, "id": "a", "function": f(json!("{\"path\":\"a\"}"))})),
            done("tool_calls"),
        ],
    ];
    for events in rows {
        let server = FakeProvider::always(stream(&frames(&events))).await;
        let provider = client(Dialect::OpenAi, &server.base(), PATIENT);
        let request = Request { tools: tools(), ..request() };
        let completion = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
        assert_eq!((completion.tool_calls.len(), completion.text.as_str()), (1, ""), "{events:?}");
        assert_eq!(completion.tool_calls[0].arguments, one, "{events:?}");
        assert_eq!(completion.usage.source, UsageSource::Estimated, "no usage at all");
    }
    // Index 0 for all.
    let events = [
        call(json!({"index": 0, "id": "a", "function": f(json!("{\"path\":\"a\"}"))})),
        call(json!({"index": 0, "id": "b", "function": f(json!("{\"path\":\"b\"}"))})),
        done("stop"),
    ];
    let server = FakeProvider::always(stream(&frames(&events))).await;
    let provider = client(Dialect::OpenAi, &server.base(), PATIENT);
    let completion = ask_with(provider.as_ref(), &request(), &CancellationToken::new()).await.completion();
    assert_eq!(completion.tool_calls.len(), 2);
}

#[tokio::test]
async fn an_answer_that_was_finished_before_the_connection_broke_is_kept() {
    each(
        |d| {
            let events = frames(&[d.text("all"), d.finish("stop", Some((3, 2)))]);
            vec![super::Act::Bytes([stream_head(""), chunk(&events)].concat())]
        },
        |d, asked| {
            let completion = asked.completion();
            assert_eq!((completion.text.as_str(), completion.usage.tokens_prompt), ("all", 3), "{d:?}");
        },
    )
    .await;
    // An error that follows the end is still an error: the provider says that what it said is not to be used.
    let events = |d: Dialect| [frames(&[d.text("all"), d.finish("stop", None)]), d.error_in_stream()].concat();
    each(
        |d| vec![super::Act::Bytes([stream_head(""), chunk(&events(d)), end()].concat())],
        |d, asked| assert_eq!(asked.error().failure.code, "transient.http", "{d:?}"),
    )
    .await;
}

#[tokio::test]
async fn only_the_level_that_was_asked_for_is_sent() {
    let request = Request { output_schema: Some(json!({"type": "object"})), ..request() };
    for dialect in Dialect::ALL {
        for level in [StructuredOutput::JsonSchema, StructuredOutput::JsonObject, StructuredOutput::Prompt] {
            let server = FakeProvider::saying(Reply::text("{}")).await;
            let provider = client(dialect, &server.base_of(dialect), PATIENT);
            let (cancellation, request_id) = (CancellationToken::new(), Default::default());
            let mut call = super::call(&request, "some/model", &cancellation, &request_id);
            call.structured_output = level;
            provider.complete(call).await.unwrap();
            let body = server.seen().remove(0).body;
            let format = &body["response_format"]["type"];
            let config = &body["generationConfig"];
            match (dialect, level) {
                (Dialect::Gemini, StructuredOutput::JsonSchema) => assert!(config.get("responseJsonSchema").is_some()),
                (Dialect::Gemini, StructuredOutput::JsonObject) => {
                    assert_eq!(
                        (&config["responseMimeType"], &config["responseJsonSchema"]),
                        (&json!("application/json"), &Value::Null)
                    );
                }
                (Dialect::Gemini, StructuredOutput::Prompt) => assert!(config.get("responseMimeType").is_none()),
                (_, StructuredOutput::JsonSchema) => assert_eq!(format, "json_schema"),
                (_, StructuredOutput::JsonObject) => assert_eq!(format, "json_object"),
                (_, StructuredOutput::Prompt) => assert_eq!(body.get("response_format"), None),
            }
            let told = body.to_string().contains("JSON Schema");
            assert_eq!(
                told,
                level != StructuredOutput::JsonSchema,
                "{dialect:?} {level:?}: the prompt says it instead"
            );
        }
    }
}
