//! Forms of a request that a server refuses: simplified within the call, remembered, and bounded.

use super::{PATIENT, ask, ask_with, client, request};
use loopwright_activities::{
    orchestrator::Request,
    provider::{
        Advice, OpenAiCompatible, RequestIdSlot,
        address::{Trust, parse_base_url},
    },
    testing::{Dialect, FakeProvider, answer_json, stream},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

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
async fn a_form_that_was_refused_by_its_name_is_not_sent_again_although_the_simpler_one_was_not_answered() {
    let request = Request { output_schema: Some(json!({"type": "object"})), ..request() };
    for dialect in Dialect::ALL {
        let server = FakeProvider::start(move |seen, _| {
            let gemini = &seen.body["generationConfig"];
            if seen.body["response_format"]["type"] == "json_schema" || gemini.get("responseJsonSchema").is_some() {
                answer_json(
                    400,
                    "",
                    &json!({"error": {"status": "INVALID_ARGUMENT", "message": "response schema is not supported"}}),
                )
            } else {
                answer_json(429, "", &dialect.error(429, "RESOURCE_EXHAUSTED"))
            }
        })
        .await;
        let provider = client(dialect, &server.base(), PATIENT);
        for requests in [2, 3, 4] {
            let error = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.error();
            assert_eq!(error.failure.code, "transient.rate_limited", "{dialect:?}");
            assert_eq!(server.seen().len(), requests, "{dialect:?}: refused once");
        }
    }
}

#[tokio::test]
async fn what_is_refused_in_every_form_has_taught_nothing_of_forms() {
    // A tool is wrong, and the server speaks of its schema.
    for dialect in Dialect::ALL {
        let server = FakeProvider::start(move |seen, _| match seen.body.to_string().contains("wrong") {
            true => {
                answer_json(400, "", &json!({"error": {"message": "the schema of a tool is wrong, so is thinking"}}))
            }
            false => stream(&dialect.good("{}")),
        })
        .await;
        let provider = client(dialect, &server.base(), PATIENT);
        let good = Request { output_schema: Some(json!({"type": "object"})), ..request() };
        let mut bad = good.clone();
        bad.messages.push(loopwright_activities::orchestrator::Message::User { text: "wrong".into() });
        let ask = async |request: &Request| {
            let (cancellation, request_id) = (CancellationToken::new(), RequestIdSlot::default());
            let mut call = super::call(request, "some/model", &cancellation, &request_id);
            call.thinking = Some("low");
            provider.complete(call).await
        };
        assert_eq!(ask(&bad).await.unwrap_err().failure.code, "provider.bad_request", "{dialect:?}");
        assert!(server.seen().len() > 2, "{dialect:?}: simpler forms were tried");
        ask(&good).await.unwrap();
        let last = server.seen().pop().unwrap().body;
        let config = &last["generationConfig"];
        match dialect {
            Dialect::Gemini => assert!(config.get("responseJsonSchema").is_some(), "{config}"),
            _ => assert_eq!(last["response_format"]["type"], "json_schema", "{dialect:?}"),
        }
        assert_eq!(config.get("thinkingConfig").is_some(), dialect == Dialect::Gemini, "{config}");
    }
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
async fn openrouter_and_gemini_step_down_to_the_prompt() {
    let request = Request { output_schema: Some(json!({"type": "object"})), ..request() };
    for dialect in [Dialect::OpenRouter, Dialect::Gemini] {
        // Neither schemas nor JSON mode.
        let server = FakeProvider::start(move |seen, _| match dialect {
            Dialect::Gemini if seen.body["generationConfig"].get("responseJsonSchema").is_some() => {
                let body =
                    json!({"error": {"status": "INVALID_ARGUMENT", "message": "Unknown name responseJsonSchema"}});
                answer_json(400, "", &body)
            }
            Dialect::Gemini if seen.body["generationConfig"].get("responseMimeType").is_some() => {
                let body =
                    json!({"error": {"status": "INVALID_ARGUMENT", "message": "response_mime_type is not supported"}});
                answer_json(400, "", &body)
            }
            Dialect::OpenRouter if seen.body.get("response_format").is_some() => {
                answer_json(404, "", &json!({"error": {"code": 404, "message": "No endpoints found"}}))
            }
            _ => stream(&dialect.good("{\"a\":1}")),
        })
        .await;
        let provider = client(dialect, &server.base(), PATIENT);
        for requests in [3, 4] {
            let completion = ask_with(provider.as_ref(), &request, &CancellationToken::new()).await.completion();
            assert_eq!(completion.text, "{\"a\":1}", "{dialect:?}");
            assert_eq!(server.seen().len(), requests, "{dialect:?}: two refusals, then none ever again");
        }
        let seen = server.seen();
        let (first, second, last) = (&seen[0].body, &seen[1].body, &seen[3].body);
        let told = |body: &Value| match dialect {
            Dialect::Gemini => body["systemInstruction"].to_string(),
            _ => body["messages"][0]["content"].to_string(),
        };
        match dialect {
            Dialect::Gemini => {
                assert_eq!(first["generationConfig"]["responseJsonSchema"], json!({"type": "object"}));
                assert_eq!(second["generationConfig"]["responseMimeType"], "application/json");
                assert!(second["generationConfig"].get("responseJsonSchema").is_none());
                assert!(last["generationConfig"].get("responseMimeType").is_none());
            }
            _ => {
                assert_eq!(first["response_format"]["type"], "json_schema");
                assert_eq!(second["response_format"], json!({"type": "json_object"}));
                // Without a parameter that an endpoint could ignore, all of them may serve.
                assert!(last.get("response_format").is_none() && last.get("provider").is_none(), "{last}");
            }
        }
        assert!(!told(first).contains("JSON Schema"), "{dialect:?}");
        assert!(
            told(second).contains("JSON Schema") && told(last).contains("JSON Schema"),
            "{dialect:?}: the prompt says it"
        );
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
        let mut call = super::call(&request, "m", &cancellation, &request_id);
        call.thinking = Some("low");
        assert_eq!(provider.complete(call).await.unwrap().text, "ok");
        assert_eq!(server.seen().len(), requests);
    }
    assert_eq!(server.seen()[0].body["generationConfig"]["thinkingConfig"], json!({"thinkingLevel": "low"}));
}

#[tokio::test]
async fn a_model_that_counts_its_thinking_in_tokens_is_given_a_budget() {
    let server = FakeProvider::always(stream(&Dialect::Gemini.good("ok"))).await;
    let provider = client(Dialect::Gemini, &server.base(), PATIENT);
    let expected = [
        ("gemini-2.5-flash", "low", 65_536, json!({"thinkingBudget": 1_024})),
        ("models/gemini-2.5-pro", "medium", 65_536, json!({"thinkingBudget": 8_192})),
        ("gemini-2.5-pro", "high", 65_536, json!({"thinkingBudget": 24_576})),
        ("gemini-2.5-pro", "high", 2_000, json!({"thinkingBudget": 1_000})),
        ("gemini-2.5-flash-lite", "low", 1_000, Value::Null),
        ("gemini-3.8-flash", "high", 65_536, json!({"thinkingLevel": "high"})),
    ];
    for (n, (model, level, limit, config)) in expected.into_iter().enumerate() {
        let (request, cancellation, request_id) = (request(), CancellationToken::new(), RequestIdSlot::default());
        let mut call = super::call(&request, model, &cancellation, &request_id);
        (call.thinking, call.max_output_tokens) = (Some(level), limit);
        assert_eq!(provider.complete(call).await.unwrap().text, "ok");
        assert_eq!(server.seen()[n].body["generationConfig"]["thinkingConfig"], config, "{model} {level}");
    }
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
