//! OpenRouter: the chat-completions dialect with prices in the answer, an id in the headers, and its own errors.

use super::{
    Call, Completion, KeyIdentity, Provider, ProviderError, Timeouts,
    address::{Trust, join},
    chat::{self, ServedModel},
    http::{Http, header, secret_header},
    retry::Names,
    shape::{STEP_DOWNS_MAX, Shape, Shapes, TokenLimit, names_its_part},
};
use crate::decimal::usd_from_pusd;
use futures_util::future::BoxFuture;
use reqwest::{
    Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue},
};
use secrecy::SecretString;
use serde_json::{Map, Value, json};

/// Where OpenRouter lives.
pub const BASE_URL: &str = "https://openrouter.ai/api/v1";

/// The OpenRouter API.
#[derive(Debug)]
pub struct OpenRouter {
    http: Http,
    base: Url,
    headers: HeaderMap,
    names: Names,
    key: KeyIdentity,
    shapes: Shapes,
}

impl OpenRouter {
    /// A client for the API at `base` (an empty path becomes `/api/v1`).
    ///
    /// # Errors
    /// A sentence that names what cannot be used.
    pub fn new(mut base: Url, key: &SecretString, timeouts: Timeouts, trust: Trust) -> Result<Self, String> {
        if base.path() == "/" || base.path().is_empty() {
            base.set_path("/api/v1");
        }
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, secret_header("Bearer ", key)?);
        header(&mut headers, "x-openrouter-title", HeaderValue::from_static("Loopwright"));
        Ok(Self {
            http: Http::new(&base, timeouts, trust)?,
            base,
            headers,
            names: Names { title: "OpenRouter", key_setting: "OPENROUTER_API_KEY", key_is_set: true },
            key: KeyIdentity::of("openrouter", Some(key)),
            shapes: Shapes::default(),
        })
    }

    async fn complete(&self, call: Call<'_>) -> Result<Completion, ProviderError> {
        let with_schema = call.request.output_schema.is_some();
        let before = self.shapes.get(call.model);
        let known = before.map_or(call.structured_output, |known| known.structured_output);
        let mut shape = Shape {
            structured_output: known.max(call.structured_output),
            token_limit: TokenLimit::MaxCompletionTokens,
            token_limit_changed: true,
            // Usage always comes; the option has no effect there.
            include_usage: false,
            strict: before.is_none_or(|known| known.strict),
        };
        for step in 0..=STEP_DOWNS_MAX {
            let url = join(&self.base, &["chat", "completions"]);
            let body = body(&call, shape);
            let answer = self.http.post(&self.names, &call, url, self.headers.clone(), body).await?;
            let request_id = answer.header("x-generation-id");
            if answer.status.is_success() {
                call.request_id.offer(&request_id);
                if step > 0 {
                    self.shapes.remember(call.model, shape);
                }
                return chat::read(answer, &call, &self.names, ServedModel::Reported).await;
            }
            let (error, report) = answer.into_error().await;
            // With `require_parameters`, "no endpoint" may only mean: none that takes a schema, tools or an effort.
            let form_refused = match error.http_status {
                Some(400 | 422) => error.failure.code == "provider.bad_request",
                Some(404) => true,
                _ => false,
            };
            let simpler =
                shape.step_down(&report, with_schema).filter(|next| has_options(&call) || next.strict == shape.strict);
            match simpler.filter(|_| form_refused) {
                Some(simpler) if step < STEP_DOWNS_MAX => {
                    shape = simpler;
                    if names_its_part(&report) {
                        self.shapes.remember(call.model, shape);
                    }
                }
                _ => {
                    if form_refused && step > 0 {
                        self.shapes.restore(call.model, before);
                    }
                    call.request_id.offer(&request_id);
                    return Err(error);
                }
            }
        }
        Err(ProviderError::unusable(&self.names, "request_form"))
    }
}

/// Whether it has parts beside a schema that some servers do not know.
fn has_options(call: &Call<'_>) -> bool {
    !call.request.tools.is_empty() || call.thinking.is_some()
}

fn body(call: &Call<'_>, shape: Shape) -> Vec<u8> {
    let mut body = json!({
        "model": call.model,
        "messages": chat::messages(call.request, "openrouter", shape.structured_output),
        "max_completion_tokens": call.max_output_tokens,
        "stream": true,
    });
    if let Some(tools) = chat::tools(call.request) {
        body["tools"] = tools;
    }
    if let Some(effort) = call.thinking {
        body["reasoning"] = json!({ "effort": effort });
    }
    let structured = shape.structured_output;
    let format = call.request.output_schema.as_ref().and_then(|schema| chat::response_format(schema, structured));
    let mut routing = Map::new();
    // Without this, servers that do not know a parameter ignore it silently.
    if format.is_some() || shape.strict && has_options(call) {
        routing.insert("require_parameters".into(), true.into());
    }
    if let Some(format) = format {
        body["response_format"] = format;
    }
    let (input_max, output_max) = call.price_max;
    let parts = [("prompt", input_max), ("completion", output_max)];
    let price_max: Map<String, Value> =
        parts.into_iter().filter_map(|(part, max)| Some((part.to_owned(), usd(max?).into()))).collect();
    if !price_max.is_empty() {
        routing.insert("max_price".into(), price_max.into());
    }
    if !routing.is_empty() {
        body["provider"] = routing.into();
    }
    body.to_string().into_bytes()
}

/// Micro-USD as decimal text in USD.
fn usd(micro: u64) -> String {
    usd_from_pusd(i128::from(micro) * 1_000_000)
}

impl Provider for OpenRouter {
    fn name(&self) -> &'static str {
        "openrouter"
    }
    fn key(&self) -> KeyIdentity {
        self.key.clone()
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(self.complete(call))
    }
}
