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
use futures_util::future::BoxFuture;
use reqwest::{
    Url,
    header::{AUTHORIZATION, HeaderMap},
};
use secrecy::SecretString;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};
use std::sync::Arc;

/// Most pages of a list. Chosen: ten times what the list would have today with fifty models a page.
const PAGES_MAX: usize = 100;

/// A call as its provider remembers it.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub usage: Usage,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
}

/// Keys that are kept elsewhere than in the environment.
pub trait MoreKeys: Send + Sync + 'static {
    /// Those of `provider` that open here, are in service, and may be sent to `address`.
    fn at<'a>(&'a self, provider: &'a str, address: &'a str) -> BoxFuture<'a, Vec<SecretString>>;
}

/// OpenRouter's account interface, for each of the platform's keys. Keys may belong to several accounts.
pub struct OpenRouterAccount {
    http: Http,
    /// As it is configured; sealed keys are bound to it.
    address: Url,
    base: Url,
    names: Names,
    configured: Vec<AccountKey>,
    more: Option<Arc<dyn MoreKeys>>,
}

/// A key that the account interface is asked with.
#[derive(Clone)]
pub struct AccountKey {
    headers: HeaderMap,
    identity: KeyIdentity,
}

impl AccountKey {
    pub(crate) fn of(key: &SecretString) -> Result<Self, String> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, secret_header("Bearer ", key)?);
        Ok(Self { headers, identity: KeyIdentity::of("openrouter", Some(key)) })
    }

    /// Keyed hash of the key, as calls record it.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.identity.fingerprint
    }

    /// Its last four characters, as far as they may be shown.
    #[must_use]
    pub fn last4(&self) -> &str {
        &self.identity.last4
    }
}

#[derive(Deserialize)]
struct Data<T> {
    data: T,
}

impl OpenRouterAccount {
    /// The account of the configured keys; `None` if OpenRouter is not configured.
    ///
    /// # Errors
    /// A sentence that names what cannot be used.
    pub fn configured(settings: &Settings) -> Result<Option<Self>, String> {
        let account = Self::with_more(settings, None)?;
        Ok(Some(account).filter(|account| !account.configured.is_empty()))
    }

    /// The same with keys of another place beside those that are configured, also where none is.
    ///
    /// # Errors
    /// A sentence that names what cannot be used.
    pub fn with_more(settings: &Settings, more: Option<Arc<dyn MoreKeys>>) -> Result<Self, String> {
        let address = settings.address("openrouter")?;
        let mut base = address.clone();
        if base.path() == "/" || base.path().is_empty() {
            base.set_path("/api/v1");
        }
        let keys = settings.openrouter.iter().flat_map(|endpoint| &endpoint.keys);
        Ok(Self {
            http: Http::new(&base, settings.timeouts, Trust::Operator)?,
            address,
            base,
            names: Names { title: "OpenRouter", key_setting: "OPENROUTER_API_KEY", key_is_set: true },
            configured: keys.map(AccountKey::of).collect::<Result<_, _>>()?,
            more,
        })
    }

    /// The keys as they are now, each once: those of the environment first.
    pub async fn keys(&self) -> Vec<AccountKey> {
        let mut keys = self.configured.clone();
        let more = match &self.more {
            Some(more) => more.at("openrouter", self.address.as_str()).await,
            None => Vec::new(),
        };
        for key in more.iter().filter_map(|key| AccountKey::of(key).ok()) {
            if keys.iter().all(|known| known.fingerprint() != key.fingerprint()) {
                keys.push(key);
            }
        }
        keys
    }

    async fn text(
        &self,
        key: &AccountKey,
        path: &[&str],
        query: Option<(&str, &str)>,
    ) -> Result<String, ProviderError> {
        let mut url = join(&self.base, path);
        if let Some((name, value)) = query {
            url.query_pairs_mut().append_pair(name, value);
        }
        self.http.get_text(&self.names, url, key.headers.clone()).await
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
    pub async fn generation(&self, key: &AccountKey, id: &str) -> Result<Option<Generation>, ProviderError> {
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
            #[serde(default)]
            is_byok: Option<Box<RawValue>>,
            /// Of the vendor behind it, where the call was served by a key that is deposited.
            #[serde(default)]
            upstream_inference_cost: Option<Box<RawValue>>,
        }
        let text = match self.text(key, &["generation"], Some(("id", id))).await {
            Ok(text) => text,
            Err(error) if error.http_status == Some(404) => return Ok(None),
            Err(error) => return Err(error),
        };
        let raw: Data<Box<RawValue>> = self.read(&text)?;
        let answer: Answer = self.read(raw.data.get())?;
        // One that cannot be read leaves the cost of the vendor unknown, and the call's with it.
        let upstream = answer.upstream_inference_cost.as_deref().and_then(|raw| pusd_from_decimal(raw.get()));
        // As in an answer: where nothing is said, a cost of the vendor tells.
        let upstream_key = match answer.is_byok.as_deref().map(RawValue::get) {
            Some("true") => true,
            Some("false") => false,
            _ => upstream.is_some_and(|cost| cost > 0),
        };
        let usage = Usage {
            tokens_prompt: answer.native_tokens_prompt.unwrap_or(0),
            tokens_cached: answer.native_tokens_cached.unwrap_or(0),
            tokens_cache_write: 0,
            tokens_output: answer.native_tokens_completion.unwrap_or(0),
            tokens_reasoning: answer.native_tokens_reasoning.unwrap_or(0),
            source: UsageSource::Lookup,
            provider_cost_pusd: Some(self.money(&answer.total_cost)?),
            upstream_key,
            upstream_cost_pusd: upstream.filter(|_| upstream_key),
            doubtful_cost: None,
            raw: Value::String(raw.data.get().to_owned()),
        };
        Ok(Some(Generation { usage, model: answer.model, finish_reason: answer.finish_reason }))
    }

    /// What the key has used in all, in pico-USD.
    ///
    /// # Errors
    /// As every request.
    pub async fn used_by_key(&self, key: &AccountKey) -> Result<i64, ProviderError> {
        #[derive(Deserialize)]
        struct Key {
            usage: Box<RawValue>,
        }
        let answer: Data<Key> = self.read(&self.text(key, &["key"], None).await?)?;
        self.money(&answer.data.usage)
    }

    /// What the key's whole account has used in all, in pico-USD.
    ///
    /// # Errors
    /// As every request.
    pub async fn used_by_account(&self, key: &AccountKey) -> Result<i64, ProviderError> {
        #[derive(Deserialize)]
        struct Credits {
            total_usage: Box<RawValue>,
        }
        let answer: Data<Credits> = self.read(&self.text(key, &["credits"], None).await?)?;
        self.money(&answer.data.total_usage)
    }

    /// The list of models with their prices, each as it came, from all its pages as one; `None` without a key.
    ///
    /// # Errors
    /// As every request; a list that leads elsewhere or has no end, or fewer models than it says.
    pub async fn models(&self) -> Result<Option<String>, ProviderError> {
        #[derive(Deserialize)]
        struct Page {
            data: Vec<Box<RawValue>>,
            #[serde(default)]
            total_count: Option<usize>,
            #[serde(default)]
            links: Links,
        }
        #[derive(Default, Deserialize)]
        struct Links {
            next: Option<String>,
        }
        #[derive(Serialize)]
        struct Whole {
            data: Vec<Box<RawValue>>,
        }
        let broken = |what| ProviderError::broken(&self.names, what, CallState::Failed);
        let Some(key) = self.keys().await.into_iter().next() else { return Ok(None) };
        let mut url = join(&self.base, &["models"]);
        let (mut models, mut said) = (Vec::new(), 0);
        for _ in 0..PAGES_MAX {
            let text = self.http.get_text(&self.names, url.clone(), key.headers.clone()).await?;
            let page: Page = self.read(&text)?;
            models.extend(page.data);
            said = page.total_count.unwrap_or(said);
            let Some(next) = page.links.next else {
                if models.len() < said {
                    return Err(broken("the list of models has fewer than it says"));
                }
                let whole = serde_json::to_string(&Whole { data: models });
                return whole.map(Some).map_err(|_| broken("the list of models cannot be written"));
            };
            // The key goes nowhere else.
            url = url
                .join(&next)
                .ok()
                .filter(|next| next.origin() == self.base.origin())
                .ok_or_else(|| broken("the next page of the list of models is at another address"))?;
        }
        Err(broken("the list of models has no end"))
    }
}
