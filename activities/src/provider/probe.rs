//! Whether a key works: its provider is asked, with it, the cheapest thing that costs nothing.
//!
//! OpenRouter is asked about the key itself, the others for their list of models. A local server that looks at no key says the
//! same to all of them. Nothing is retried, nothing is written: what a probe finds changes no key's standing.

use super::{
    ProviderError, Settings, Timeouts,
    address::{Trust, join, parse_base_url},
    gemini,
    http::{Http, header, secret_header},
    retry::Names,
};
use crate::decimal::pusd_from_decimal;
use reqwest::{
    Url,
    header::{AUTHORIZATION, HeaderMap},
};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::time::Duration;

/// Longest wait to reach a server, and for its answer: an operator waits for it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a provider says of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Works,
    /// The provider said no; the code says why.
    Refused,
    /// Nothing was learned of the key: no connection, no answer in time, or the server failed.
    Unreachable,
}

/// What was found, fit for screens: it holds nothing of the key or of what the server wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    pub verdict: Verdict,
    /// A failure code, unless it works.
    pub code: Option<String>,
    /// One line.
    pub message: String,
}

impl Probe {
    fn works() -> Self {
        Self { verdict: Verdict::Works, code: None, message: String::new() }
    }

    fn refused(code: &str, message: impl Into<String>) -> Self {
        Self { verdict: Verdict::Refused, code: Some(code.to_owned()), message: message.into() }
    }

    fn of(error: &ProviderError) -> Self {
        let failure = &error.failure;
        let verdict = match failure.code.as_str() {
            "transient.network" | "transient.http" => Verdict::Unreachable,
            _ => Verdict::Refused,
        };
        Self { verdict, code: Some(failure.code.clone()), message: failure.message.clone() }
    }
}

/// Where a key is asked about.
pub struct Target<'a> {
    pub provider: &'a str,
    /// In full; `None`: the provider's own, or the configured one of a key of the platform.
    pub address: Option<&'a str>,
    /// Who chose the address.
    pub trust: Trust,
}

/// Asks about one key. Ten seconds at most.
///
/// # Errors
/// None: what cannot be asked is refused, with the reason.
pub async fn probe(settings: &Settings, target: &Target<'_>, key: Option<&SecretString>) -> Probe {
    match Asked::new(settings, target, key) {
        Ok(asked) => asked.ask().await,
        Err(why) => Probe::refused("provider.bad_request", why),
    }
}

/// A question, ready to be sent.
struct Asked {
    http: Http,
    url: Url,
    headers: HeaderMap,
    names: Names,
    openrouter: bool,
}

impl Asked {
    fn new(settings: &Settings, target: &Target<'_>, key: Option<&SecretString>) -> Result<Self, String> {
        let mut base = match (target.address, target.trust) {
            (Some(text), trust) => parse_base_url(text, trust).map_err(|e| e.to_string())?,
            (None, Trust::Operator) => settings.address(target.provider)?,
            // A user's key is for the provider itself, whatever the operator has configured for his own.
            (None, _) => Settings::default().address(target.provider)?,
        };
        let mut headers = HeaderMap::new();
        let (title, setting, path) = match target.provider {
            "gemini" => {
                let last = base.path_segments().and_then(|mut segments| segments.next_back().map(str::to_owned));
                if !last.is_some_and(|last| last.starts_with("v1")) {
                    let version = settings.gemini_version.as_str();
                    base = join(&base, &[if version.is_empty() { gemini::VERSION_DEFAULT } else { version }]);
                }
                ("Gemini", "GEMINI_API_KEY", "models")
            }
            "openrouter" => ("OpenRouter", "OPENROUTER_API_KEY", "key"),
            "openai_compatible" => ("The OpenAI-compatible server", "OPENAI_API_KEY", "models"),
            _ => return Err("the provider is gemini, openrouter or openai_compatible".to_owned()),
        };
        if base.path().is_empty() || base.path() == "/" {
            base.set_path(if target.provider == "openrouter" { "/api/v1" } else { "/v1" });
        }
        match (target.provider, key) {
            ("gemini", Some(key)) => header(&mut headers, "x-goog-api-key", secret_header("", key)?),
            (_, Some(key)) => drop(headers.insert(AUTHORIZATION, secret_header("Bearer ", key)?)),
            (_, None) => {}
        }
        let mut url = join(&base, &[path]);
        if target.provider == "gemini" {
            url.set_query(Some("pageSize=1"));
        }
        // A sealed key is in no setting.
        let key_setting = if target.address.is_some() { "the key itself" } else { setting };
        let timeouts = Timeouts {
            connect: PROBE_TIMEOUT,
            first_byte: PROBE_TIMEOUT,
            idle: PROBE_TIMEOUT,
            total: 2 * PROBE_TIMEOUT,
        };
        Ok(Self {
            http: Http::new(&base, timeouts, target.trust)?,
            url,
            headers,
            names: Names { title, key_setting, key_is_set: key.is_some() },
            openrouter: target.provider == "openrouter",
        })
    }

    async fn ask(self) -> Probe {
        let text = match self.http.get_text(&self.names, self.url, self.headers).await {
            Ok(text) => text,
            Err(error) => return Probe::of(&error),
        };
        if self.openrouter {
            return spent(&text).unwrap_or_else(Probe::works);
        }
        // A list of models, not the page of whoever lives at that address.
        match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(list) if list.get("data").or(list.get("models")).is_some_and(serde_json::Value::is_array) => {
                Probe::works()
            }
            // Gemini leaves an empty list out.
            Ok(serde_json::Value::Object(_)) if self.names.title == "Gemini" => Probe::works(),
            _ => {
                let message = format!("{}: the answer is no list of models", self.names.title);
                Probe { verdict: Verdict::Unreachable, code: Some("transient.http".to_owned()), message }
            }
        }
    }
}

/// OpenRouter answers for a key whose limit is used up; calls with it are refused.
fn spent(text: &str) -> Option<Probe> {
    #[derive(Deserialize)]
    struct Answer {
        data: Key,
    }
    #[derive(Deserialize)]
    struct Key {
        #[serde(default)]
        limit_remaining: Option<Box<RawValue>>,
    }
    let Ok(answer) = serde_json::from_str::<Answer>(text) else {
        let message = "OpenRouter: the answer has not the known shape".to_owned();
        return Some(Probe { verdict: Verdict::Unreachable, code: Some("transient.http".to_owned()), message });
    };
    let left = answer.data.limit_remaining.as_deref().map(RawValue::get).filter(|text| *text != "null")?;
    let is_spent = left.starts_with('-') || pusd_from_decimal(left) == Some(0);
    is_spent.then(|| Probe::refused("provider.no_balance", "OpenRouter: the limit of the key is used up"))
}
