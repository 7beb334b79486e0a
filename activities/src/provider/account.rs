//! What an account says about itself: OpenRouter's look-up of a call, its sums, its list of prices. Money stays decimal text.

use super::{
    KeyIdentity, ProviderError, Settings,
    address::{Trust, join},
    http::{Http, secret_header},
    retry::Names,
};
use crate::{
    decimal::pusd_from_decimal,
    usage::{CallState, Usage, UsageSource},
};
use reqwest::{
    Url,
    header::{AUTHORIZATION, HeaderMap},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};

/// A call as its provider remembers it.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub usage: Usage,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
}

/// OpenRouter's account interface.
#[derive(Debug)]
pub struct OpenRouterAccount {
    http: Http,
    base: Url,
    headers: HeaderMap,
    names: Names,
    key: KeyIdentity,
}

#[derive(Deserialize)]
struct Data<T> {
    data: T,
}

impl OpenRouterAccount {
    /// The account of the configured key; `None` if OpenRouter is not configured.
    ///
    /// # Errors
    /// A sentence that names what cannot be used.
    pub fn configured(settings: &Settings) -> Result<Option<Self>, String> {
        let Some(endpoint) = &settings.openrouter else { return Ok(None) };
        // Of several keys the first: they share the account, and what the others used is in its sum.
        let Some(key) = endpoint.keys.first() else { return Ok(None) };
        let mut base = endpoint.base.clone();
        if base.path() == "/" || base.path().is_empty() {
            base.set_path("/api/v1");
        }
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, secret_header("Bearer ", key)?);
        Ok(Some(Self {
            http: Http::new(&base, settings.timeouts, Trust::Operator)?,
            base,
            headers,
            names: Names { title: "OpenRouter", key_setting: "OPENROUTER_API_KEY", key_is_set: true },
            key: KeyIdentity::of("openrouter", Some(key)),
        }))
    }

    /// Keyed hash of the key, as calls record it.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.key.fingerprint
    }

    async fn text(&self, path: &[&str], query: Option<(&str, &str)>) -> Result<String, ProviderError> {
        let mut url = join(&self.base, path);
        if let Some((name, value)) = query {
            url.query_pairs_mut().append_pair(name, value);
        }
        self.http.get_text(&self.names, url, self.headers.clone()).await
    }

    fn read<T: DeserializeOwned>(&self, text: &str) -> Result<T, ProviderError> {
        serde_json::from_str(text)
            .map_err(|_| ProviderError::broken(&self.names, "the answer has not the known shape", CallState::Failed))
    }

    fn money(&self, raw: &RawValue) -> Result<i64, ProviderError> {
        let broken = || ProviderError::broken(&self.names, "an amount is no decimal number", CallState::Failed);
        pusd_from_decimal(raw.get()).ok_or_else(broken)
    }

    /// What became of a call; `None` while the provider does not know it (it may later).
    ///
    /// # Errors
    /// As every request.
    pub async fn generation(&self, id: &str) -> Result<Option<Generation>, ProviderError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            model: Option<String>,
            total_cost: Box<RawValue>,
            #[serde(default)]
            finish_reason: Option<String>,
            #[serde(default)]
            native_tokens_prompt: Option<u64>,
            #[serde(default)]
            native_tokens_completion: Option<u64>,
            #[serde(default)]
            native_tokens_reasoning: Option<u64>,
            #[serde(default)]
            native_tokens_cached: Option<u64>,
        }
        let text = match self.text(&["generation"], Some(("id", id))).await {
            Ok(text) => text,
            Err(error) if error.http_status == Some(404) => return Ok(None),
            Err(error) => return Err(error),
        };
        let raw: Data<Box<RawValue>> = self.read(&text)?;
        let answer: Answer = self.read(raw.data.get())?;
        let usage = Usage {
            tokens_prompt: answer.native_tokens_prompt.unwrap_or(0),
            tokens_cached: answer.native_tokens_cached.unwrap_or(0),
            tokens_cache_write: 0,
            tokens_output: answer.native_tokens_completion.unwrap_or(0),
            tokens_reasoning: answer.native_tokens_reasoning.unwrap_or(0),
            source: UsageSource::Lookup,
            provider_cost_pusd: Some(self.money(&answer.total_cost)?),
            upstream_key: false,
            upstream_cost_pusd: None,
            raw: self.read::<Value>(raw.data.get())?,
        };
        Ok(Some(Generation { usage, model: answer.model, finish_reason: answer.finish_reason }))
    }

    /// What the key has used in all, and the whole account, in pico-USD.
    ///
    /// # Errors
    /// As every request.
    pub async fn totals(&self) -> Result<(i64, i64), ProviderError> {
        #[derive(Deserialize)]
        struct Key {
            usage: Box<RawValue>,
        }
        #[derive(Deserialize)]
        struct Credits {
            total_usage: Box<RawValue>,
        }
        let key: Data<Key> = self.read(&self.text(&["key"], None).await?)?;
        let credits: Data<Credits> = self.read(&self.text(&["credits"], None).await?)?;
        Ok((self.money(&key.data.usage)?, self.money(&credits.data.total_usage)?))
    }

    /// The list of models with their prices, as it came.
    ///
    /// # Errors
    /// As every request.
    pub async fn models(&self) -> Result<String, ProviderError> {
        self.text(&["models"], None).await
    }
}
