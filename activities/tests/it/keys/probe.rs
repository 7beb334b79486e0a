//! What providers say of keys when they are asked something that costs nothing.

use crate::fake_provider::{Act, Dialect, FakeProvider, answer_json};
use loopwright_activities::{
    provider::{
        Settings,
        address::Trust,
        probe::{Probe, Target, Verdict, probe},
    },
    testing::{ClosedPort, Reply},
};
use serde_json::json;

const KEY: &str = "sk-probed-0123456789abcd";

fn settings() -> Settings {
    Settings::from_lookup(&|_| None).unwrap()
}

async fn asked(dialect: Dialect, address: &str, key: Option<&str>) -> Probe {
    let target = Target { provider: dialect.name(), address: Some(address), trust: Trust::Operator };
    probe(&settings(), &target, key.map(Into::into).as_ref()).await
}

#[tokio::test]
async fn a_key_that_works_is_asked_about_once_and_nothing_is_generated() {
    let server = FakeProvider::saying(Reply::text("nobody asks for this")).await;
    for (dialect, path) in [
        (Dialect::Gemini, "/gemini/v1beta/models?pageSize=1"),
        (Dialect::OpenRouter, "/openrouter/api/v1/key"),
        (Dialect::OpenAi, "/openai/v1/models"),
    ] {
        let found = asked(dialect, &server.base_of(dialect), Some(KEY)).await;
        assert_eq!((found.verdict, found.code.as_deref()), (Verdict::Works, None), "{dialect:?}");
        let seen = server.seen().pop().unwrap();
        assert_eq!((seen.method.as_str(), seen.path.as_str(), seen.key()), ("GET", path, Some(KEY)));
    }
    assert_eq!(server.seen().len(), 3);
    // The version and the path that are missing are added as for calls.
    let server = FakeProvider::saying(Reply::text("x")).await;
    asked(Dialect::OpenAi, &server.base(), None).await;
    asked(Dialect::OpenRouter, &server.base(), Some(KEY)).await;
    asked(Dialect::Gemini, &format!("{}/v1", server.base()), Some(KEY)).await;
    let paths: Vec<_> = server.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, ["/v1/models", "/api/v1/key", "/v1/models?pageSize=1"]);
    assert!(!server.seen()[0].headers.contains_key("authorization"), "a server that wants none");
}

/// A page of somebody else.
fn page(status: u16) -> Vec<Act> {
    let body = "<html>upstream text</html>";
    let text = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: text/html\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    vec![Act::Bytes(text.into_bytes())]
}

#[tokio::test]
async fn what_a_provider_says_of_a_key_is_told_in_our_words() {
    use Verdict::{Refused, Unreachable, Works};
    let key = |left: serde_json::Value| {
        answer_json(200, "", &json!({"data": {"label": "x", "usage": 1, "limit_remaining": left}}))
    };
    let invalid = json!({"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "upstream text",
        "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}});
    for (name, dialect, answer, verdict, code) in [
        (
            "401",
            Dialect::OpenAi,
            answer_json(401, "", &Dialect::OpenAi.error(401, "x")),
            Refused,
            "provider.key_invalid",
        ),
        ("bad key", Dialect::Gemini, answer_json(400, "", &invalid), Refused, "provider.key_invalid"),
        (
            "401",
            Dialect::OpenRouter,
            answer_json(401, "", &Dialect::OpenRouter.error(401, "x")),
            Refused,
            "provider.key_invalid",
        ),
        (
            "too busy",
            Dialect::OpenAi,
            answer_json(429, "", &Dialect::OpenAi.error(429, "x")),
            Refused,
            "transient.rate_limited",
        ),
        ("used up", Dialect::OpenRouter, key(json!(0)), Refused, "provider.no_balance"),
        ("in debt", Dialect::OpenRouter, key(json!(-0.5)), Refused, "provider.no_balance"),
        ("little left", Dialect::OpenRouter, key(json!(0.000_1)), Works, ""),
        ("no limit", Dialect::OpenRouter, key(json!(null)), Works, ""),
        (
            "broken",
            Dialect::OpenAi,
            answer_json(500, "", &Dialect::OpenAi.error(500, "x")),
            Unreachable,
            "transient.http",
        ),
        ("a page", Dialect::OpenAi, page(200), Unreachable, "transient.http"),
        ("a page", Dialect::OpenRouter, page(200), Unreachable, "transient.http"),
        ("a page", Dialect::Gemini, page(200), Unreachable, "transient.http"),
        ("a page", Dialect::OpenAi, page(502), Unreachable, "transient.http"),
        ("no words", Dialect::OpenAi, vec![Act::Reset], Unreachable, "transient.network"),
        ("a list", Dialect::OpenAi, answer_json(200, "", &json!({"object": "list", "data": []})), Works, ""),
        ("an empty list", Dialect::Gemini, answer_json(200, "", &json!({})), Works, ""),
    ] {
        let server = FakeProvider::always(answer).await;
        let found = asked(dialect, &server.base_of(dialect), Some(KEY)).await;
        assert_eq!((found.verdict, found.code.as_deref().unwrap_or_default()), (verdict, code), "{name} {dialect:?}");
        assert_eq!(server.seen().len(), 1, "{name} {dialect:?}: nothing is repeated");
        let shown = format!("{found:?}");
        assert!(!shown.contains("upstream") && !shown.contains("0123456789"), "{shown}");
    }
}

#[tokio::test]
async fn an_address_that_is_not_reached_or_not_allowed_is_told_apart() {
    let gone = ClosedPort::new();
    let found = asked(Dialect::OpenAi, &format!("http://{}/v1", gone.address()), Some(KEY)).await;
    assert_eq!((found.verdict, found.code.as_deref()), (Verdict::Unreachable, Some("transient.network")));
    let server = FakeProvider::saying(Reply::text("x")).await;
    for address in [server.base().as_str(), "https://10.0.0.1", "https://169.254.169.254", "https://me:x@example.com"] {
        let target = Target { provider: "openai_compatible", address: Some(address), trust: Trust::User };
        let found = probe(&settings(), &target, Some(&KEY.into())).await;
        assert_eq!(found.verdict, Verdict::Refused, "{address}");
    }
    assert!(server.seen().is_empty());
    let target = Target { provider: "mistral", address: None, trust: Trust::Operator };
    assert_eq!(probe(&settings(), &target, Some(&KEY.into())).await.verdict, Verdict::Refused);
}
