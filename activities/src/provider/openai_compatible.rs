//! Any server that speaks the chat-completions dialect of OpenAI: the original, and the many that resemble it.
//!
//! A refused form of request (HTTP 400) is simplified step by step: JSON Schema, JSON mode, prompt only; the name of the
//! output limit; the usage option. What worked is remembered per model. A refusal is never billed, so the
//! steps belong to one call.

use super::{
    Call, Completion, KeyIdentity, Provider, ProviderError, Timeouts,
    address::{Trust, is_local, join},
    chat::{self, ServedModel},
    http::{Http, secret_header},
    retry::{Names, Report},
    shape::{STEP_DOWNS_MAX, Shape, Shapes, TokenLimit, names_its_part},
};
use futures_util::future::BoxFuture;
use reqwest::{
    Url,
    header::{AUTHORIZATION, HeaderMap},
};
use secrecy::SecretString;
use serde_json::{Value, json};

/// The host that knows `max_completion_tokens` and wants it.
const ORIGINAL_HOST: &str = "api.openai.com";
/// Context window assumed for a model whose server names none, in tokens. Chosen: most local servers serve this much.
const CONTEXT_TOKENS_DEFAULT: u64 = 16_384;

/// A server with the OpenAI dialect.
#[derive(Debug)]
pub struct OpenAiCompatible {
    http: Http,
    base: Url,
    headers: HeaderMap,
    names: Names,
    key: KeyIdentity,
    shapes: Shapes,
}

/// A model that a server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedModel {
    pub id: String,
    /// Its context window as far as the server says, otherwise a careful guess.
    pub context_tokens: u64,
}

impl OpenAiCompatible {
    /// A client for the server at `base` (with its `/v1`; an empty path becomes `/v1`).
    ///
    /// # Errors
    /// A sentence that names what cannot be used.
    pub fn new(mut base: Url, key: Option<&SecretString>, timeouts: Timeouts, trust: Trust) -> Result<Self, String> {
        if base.path() == "/" || base.path().is_empty() {
            base.set_path("/v1");
        }
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            headers.insert(AUTHORIZATION, secret_header("Bearer ", key)?);
        }
        Ok(Self {
            http: Http::new(&base, timeouts, trust)?,
            base,
            headers,
            names: Names {
                title: "The OpenAI-compatible server",
                key_setting: "OPENAI_API_KEY",
                key_is_set: key.is_some(),
            },
            key: KeyIdentity::of("openai_compatible", key),
            shapes: Shapes::default(),
        })
    }

    /// The models that the server lists.
    ///
    /// # Errors
    /// The server is not there, refuses the key, or answers something else.
    pub async fn models(&self) -> Result<Vec<OfferedModel>, ProviderError> {
        let document = self.http.get_json(&self.names, join(&self.base, &["models"]), self.headers.clone()).await?;
        let list = document.get("data").or_else(|| document.get("models")).and_then(Value::as_array);
        let context = |model: &Value| {
            ["/max_model_len", "/meta/n_ctx", "/context_length", "/max_context_length"]
                .iter()
                .find_map(|pointer| model.pointer(pointer))
                .and_then(Value::as_u64)
                .filter(|n| *n > 0)
                .unwrap_or(CONTEXT_TOKENS_DEFAULT)
        };
        Ok(list
            .into_iter()
            .flatten()
            .filter_map(|model| {
                let id = model.get("id").or_else(|| model.get("name")).and_then(Value::as_str)?;
                Some(OfferedModel { id: id.to_owned(), context_tokens: context(model) })
            })
            .collect())
    }

    fn first_shape(&self, call: &Call<'_>) -> Shape {
        let known = self.shapes.get(call.model);
        let token_limit = match self.base.host_str() {
            Some(ORIGINAL_HOST) => TokenLimit::MaxCompletionTokens,
            // The older name is the one that all of them know; some ignore the newer without a word.
            _ => TokenLimit::MaxTokens,
        };
        known.map_or(
            Shape {
                structured_output: call.structured_output,
                token_limit,
                token_limit_changed: false,
                include_usage: true,
                strict: false,
            },
            |known| Shape { structured_output: known.structured_output.max(call.structured_output), ..known },
        )
    }

    async fn complete(&self, call: Call<'_>) -> Result<Completion, ProviderError> {
        let with_schema = call.request.output_schema.is_some();
        let before = self.shapes.get(call.model);
        let mut shape = self.first_shape(&call);
        let mut steps = 0;
        loop {
            let body = body(&call, shape);
            let url = join(&self.base, &["chat", "completions"]);
            let answer = self.http.post(&self.names, &call, url, self.headers.clone(), body).await?;
            let request_id = answer.header("x-request-id");
            if answer.status.is_success() {
                call.request_id.offer(&request_id);
                if steps > 0 {
                    self.shapes.remember(call.model, shape);
                }
                return chat::read(answer, &call, &self.names, ServedModel::Requested).await;
            }
            let (error, report) = answer.into_error().await;
            let refused = form_refused(&error, &report);
            let next = if steps < STEP_DOWNS_MAX && refused { shape.step_down(&report, with_schema) } else { None };
            match next {
                Some(simpler) => {
                    shape = simpler;
                    if names_its_part(&report) {
                        self.shapes.remember(call.model, shape);
                    }
                }
                None => {
                    if refused && steps > 0 {
                        self.shapes.restore(call.model, before);
                    }
                    call.request_id.offer(&request_id);
                    return Err(error);
                }
            }
            steps += 1;
        }
    }
}

/// Whether the form of the request may be what the server refused.
fn form_refused(error: &ProviderError, report: &Report) -> bool {
    match error.http_status {
        Some(400 | 422) => error.failure.code == "provider.bad_request",
        Some(500 | 501) => ["response_format", "json_schema", "grammar"].iter().any(|word| report.mentions(word)),
        _ => false,
    }
}

fn body(call: &Call<'_>, shape: Shape) -> Vec<u8> {
    let mut body = json!({
        "model": call.model,
        "messages": chat::messages(call.request, "openai_compatible", shape.structured_output),
        "stream": true,
    });
    body[shape.token_limit.field()] = json!(call.max_output_tokens);
    if shape.include_usage {
        body["stream_options"] = json!({ "include_usage": true });
    }
    if let Some(tools) = chat::tools(call.request) {
        body["tools"] = tools;
    }
    let format =
        call.request.output_schema.as_ref().and_then(|schema| chat::response_format(schema, shape.structured_output));
    if let Some(format) = format {
        body["response_format"] = format;
    }
    body.to_string().into_bytes()
}

impl Provider for OpenAiCompatible {
    fn name(&self) -> &'static str {
        "openai_compatible"
    }
    fn key(&self) -> KeyIdentity {
        self.key.clone()
    }
    fn is_local(&self) -> bool {
        is_local(&self.base)
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(self.complete(call))
    }
}
