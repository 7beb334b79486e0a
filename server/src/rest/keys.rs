//! The keys of providers that the caller has brought. A key goes in and never comes out.

use super::{
    Code, Error,
    call::{Call, Need, json},
};
use loopwright_activities::keys::{KeyView, NewKey};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use warp::{
    http::StatusCode,
    reply::{Reply, Response},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    provider: String,
    key: SecretString,
    #[serde(default)]
    label: String,
    base_url: Option<String>,
    model: Option<String>,
    #[serde(default)]
    platform_fallback: bool,
}

/// A key as its owner sees it.
#[derive(Serialize)]
struct Shown {
    id: Uuid,
    provider: String,
    label: String,
    last4: String,
    status: String,
    reason: Option<String>,
    cooldown_until: Option<chrono::DateTime<chrono::Utc>>,
    base_url: Option<String>,
    model: Option<String>,
    platform_fallback: bool,
    created_at: chrono::DateTime<chrono::Utc>,
}

impl From<KeyView> for Shown {
    fn from(key: KeyView) -> Self {
        Self {
            id: key.id,
            provider: key.provider,
            label: key.label,
            last4: key.last4,
            status: key.status,
            reason: key.reason,
            cooldown_until: key.cooldown_until,
            base_url: key.base_url,
            model: key.model,
            platform_fallback: key.platform_fallback,
            created_at: key.created_at,
        }
    }
}

/// `PUT /v1/keys` `{provider, key, label, base_url, model, platform_fallback}`: stores a key, or the same one with new terms.
pub(super) async fn put(mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    // Where the parser stopped is enough: its words may hold a part of the key.
    let body: Body = call.json().map_err(|error| match error.code {
        Code::BodyInvalid => Error::new(
            Code::BodyInvalid,
            "The body is {\"provider\", \"key\"} with \"label\", \"base_url\", \"model\" and \"platform_fallback\".",
        ),
        _ => error,
    })?;
    let new = NewKey {
        provider: body.provider,
        key: body.key,
        label: body.label,
        base_url: body.base_url,
        model: body.model,
        platform_fallback: body.platform_fallback,
    };
    json(200, &Shown::from(call.state.keys.put(caller.user, &new).await?))
}

/// `GET /v1/keys`: newest first.
pub(super) async fn list(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let items: Vec<Shown> = call.state.keys.list(Some(caller.user)).await?.into_iter().map(Shown::from).collect();
    json(200, &serde_json::json!({ "items": items }))
}

/// `GET /v1/keys/{id}`.
pub(super) async fn show(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    json(200, &Shown::from(call.state.keys.show(Some(caller.user), id).await?))
}

/// `DELETE /v1/keys/{id}`: destroys it.
pub(super) async fn delete(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    call.state.keys.revoke(Some(caller.user), id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
