//! What a request asks for, and the server's own answers to what is no question: models, keys, credits, generations.

use super::{dialect::Dialect, journal::Entry, journal::Stage, reply::Answer, reply::refusal};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A question to a model.
    Generate {
        stream: bool,
    },
    Models,
    Model(String),
    /// OpenRouter's `/key`.
    Key,
    /// OpenRouter's `/credits`.
    Credits,
    /// OpenRouter's `/generation?id=`.
    Generation(String),
    Unknown,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// With its query.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    /// `null` where it is no JSON.
    pub body: Value,
    pub dialect: Dialect,
    pub endpoint: Endpoint,
    /// 64 hex digits.
    pub body_sha256: String,
}

impl Seen {
    /// The key that came with it.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        match self.dialect {
            Dialect::Gemini => self.headers.get("x-goog-api-key").map(String::as_str),
            Dialect::OpenRouter | Dialect::OpenAi => self.headers.get("authorization")?.strip_prefix("Bearer "),
        }
    }
    /// The model that is asked.
    #[must_use]
    pub fn model(&self) -> Option<String> {
        match self.dialect {
            Dialect::Gemini => {
                let last = self.path.split('?').next()?.split("/models/").nth(1)?;
                let name = last.rsplit_once(':').map_or(last, |(name, _)| name);
                Some(decoded(name))
            }
            Dialect::OpenRouter | Dialect::OpenAi => self.body["model"].as_str().map(str::to_owned),
        }
    }
    /// Whether its answer is a stream of events.
    #[must_use]
    pub fn wants_stream(&self) -> bool {
        self.endpoint == Endpoint::Generate { stream: true }
    }
}

/// The dialect of a path and what it asks for.
pub(super) fn route(path: &str, headers: &BTreeMap<String, String>, body: &Value) -> (Dialect, Endpoint) {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let mut segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let named = match segments.first() {
        Some(&"gemini") => Some(Dialect::Gemini),
        Some(&"openrouter") => Some(Dialect::OpenRouter),
        Some(&"openai") => Some(Dialect::OpenAi),
        _ => None,
    };
    if named.is_some() {
        segments.remove(0);
    }
    let dialect = named.unwrap_or(match segments.as_slice() {
        ["api", "v1", ..] => Dialect::OpenRouter,
        ["v1beta", ..] => Dialect::Gemini,
        ["v1", "models", ..] if headers.contains_key("x-goog-api-key") => Dialect::Gemini,
        ["v1", "models", last] if last.contains(':') => Dialect::Gemini,
        _ => Dialect::OpenAi,
    });
    let versionless: Vec<&str> =
        segments.iter().copied().skip_while(|s| matches!(*s, "api" | "v1" | "v1beta" | "v1alpha")).collect();
    let endpoint = match (dialect, versionless.as_slice()) {
        (_, ["models"]) => Endpoint::Models,
        (Dialect::Gemini, ["models", name]) => match name.rsplit_once(':') {
            Some((_, "generateContent")) => Endpoint::Generate { stream: false },
            Some((_, "streamGenerateContent")) => Endpoint::Generate { stream: true },
            Some(_) => Endpoint::Unknown,
            None => Endpoint::Model(decoded(name)),
        },
        (Dialect::OpenRouter | Dialect::OpenAi, ["models", name @ ..]) => Endpoint::Model(decoded(&name.join("/"))),
        (Dialect::OpenRouter | Dialect::OpenAi, ["chat", "completions"]) => {
            Endpoint::Generate { stream: body["stream"] == true }
        }
        (Dialect::OpenRouter, ["key"]) => Endpoint::Key,
        (Dialect::OpenRouter, ["credits"]) => Endpoint::Credits,
        (Dialect::OpenRouter, ["generation"]) => {
            Endpoint::Generation(query.strip_prefix("id=").unwrap_or_default().to_owned())
        }
        _ => Endpoint::Unknown,
    };
    (dialect, endpoint)
}

fn decoded(segment: &str) -> String {
    segment.replace("%2F", "/").replace("%2f", "/").replace("%3A", ":")
}

/// The models that every dialect lists.
const MODELS: [&str; 2] = ["fake-large", "fake-small"];

/// The server's own answer to what is no question.
pub(super) fn catalog(seen: &Seen, journal: &[Entry]) -> Answer {
    let ok = |body: Value| Answer::Refused { status: 200, headers: Vec::new(), body };
    let not_found = || refusal(seen.dialect, 404, "NOT_FOUND", "there is no such thing");
    match (&seen.endpoint, seen.dialect) {
        (Endpoint::Models, Dialect::Gemini) => {
            ok(json!({"models": MODELS.iter().map(|name| gemini_model(name)).collect::<Vec<_>>()}))
        }
        (Endpoint::Models, Dialect::OpenRouter) => {
            let data: Vec<Value> = MODELS.iter().map(|name| openrouter_model(name)).collect();
            ok(json!({"data": data, "total_count": MODELS.len(), "links": {"next": null}}))
        }
        (Endpoint::Models, Dialect::OpenAi) => {
            let data: Vec<Value> = MODELS.iter().map(|name| openai_model(name)).collect();
            ok(json!({"object": "list", "data": data}))
        }
        (Endpoint::Model(name), dialect) if MODELS.contains(&name.as_str()) => ok(match dialect {
            Dialect::Gemini => gemini_model(name),
            Dialect::OpenRouter => json!({"data": openrouter_model(name)}),
            Dialect::OpenAi => openai_model(name),
        }),
        (Endpoint::Key, _) => ok(json!({"data": {"label": "sk-or-v1-fake", "limit": 50, "limit_remaining": 12.5,
            "usage": 37.5, "is_free_tier": false}})),
        (Endpoint::Credits, _) => ok(json!({"data": {"total_credits": 100.0, "total_usage": 37.5}})),
        (Endpoint::Generation(id), _) => journal
            .iter()
            .find(|entry| {
                entry.dialect == Dialect::OpenRouter && entry.provider_request_id.as_deref() == Some(id.as_str())
            })
            .map_or_else(not_found, |entry| ok(generation(id, entry))),
        _ => not_found(),
    }
}

fn generation(id: &str, entry: &Entry) -> Value {
    let told = entry.usage.clone().unwrap_or_default();
    let cost: Value = serde_json::from_str(&told.cost).unwrap_or(Value::Null);
    json!({"data": {"id": id, "model": entry.model, "total_cost": cost, "usage": cost,
        "cancelled": entry.stage != Stage::Finished, "streamed": entry.endpoint == Endpoint::Generate { stream: true },
        "finish_reason": "stop", "native_tokens_prompt": told.prompt, "native_tokens_completion": told.output,
        "native_tokens_reasoning": told.reasoning, "native_tokens_cached": told.cached, "request_id": id}})
}

fn gemini_model(name: &str) -> Value {
    json!({"name": format!("models/{name}"), "displayName": name, "version": "1", "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536, "supportedGenerationMethods": ["generateContent"], "thinking": true})
}

fn openrouter_model(name: &str) -> Value {
    json!({"id": name, "canonical_slug": name, "name": name, "created": 1_790_000_000_u64, "context_length": 1_048_576,
        "supported_parameters": ["tools", "response_format"], "pricing": {"prompt": "0.000002",
        "completion": "0.000012", "request": "0"}, "top_provider": {"max_completion_tokens": 65_536}})
}

fn openai_model(name: &str) -> Value {
    json!({"id": name, "object": "model", "created": 1_790_000_000_u64, "owned_by": "fake", "max_model_len": 32_768})
}
