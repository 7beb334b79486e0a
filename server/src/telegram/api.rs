//! The wire: teloxide's requests over bodies that were written down before, and what its errors mean here.

use crate::config;
use secrecy::ExposeSecret;
use serde::Serialize;
use serde_json::Value;
use std::time::Duration;
use teloxide::{
    ApiError, Bot, RequestError,
    requests::{JsonRequest, Payload, Request},
};

/// Longest a request may take: above the long poll and the upload of an archive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(75);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a request did not do what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Too many requests: be quiet for so long.
    Quiet(Duration),
    /// The user cannot be written to.
    Blocked(String),
    /// Somebody else polls, or a webhook is set.
    Conflict(String),
    /// The token is refused.
    Token,
    /// The text is there already.
    NotModified,
    /// The message that was to be edited or deleted is gone.
    Gone,
    /// The formatting was not understood.
    Entities,
    /// It came too late to matter.
    Late,
    /// Certainly not done: no connection.
    NotSent(String),
    /// It may have been done.
    Unknown(String),
    /// Refused for good.
    Refused(String),
}

/// The bot of this configuration; `None` without a token.
///
/// # Errors
/// The HTTP client cannot be built.
pub fn bot(settings: &config::Telegram) -> anyhow::Result<Option<Bot>> {
    let Some(token) = &settings.token else { return Ok(None) };
    let client =
        teloxide::net::default_reqwest_settings().connect_timeout(CONNECT_TIMEOUT).timeout(REQUEST_TIMEOUT).build()?;
    let bot = Bot::with_client(token.expose_secret(), client);
    Ok(Some(match &settings.api_url {
        Some(url) => {
            let mut url = url.clone();
            if let Ok(mut segments) = url.path_segments_mut() {
                segments.pop_if_empty();
            }
            bot.set_api_url(url)
        }
        None => bot,
    }))
}

macro_rules! methods {
    ($($name:ident),* $(,)?) => {
        mod raw {
            $(
                #[derive(Clone, super::Serialize)]
                #[serde(transparent)]
                pub(super) struct $name(pub(super) super::Value);
                impl super::Payload for $name {
                    type Output = super::Value;
                    const NAME: &'static str = stringify!($name);
                }
            )*
        }

        /// Calls a method by its name with a body as it is.
        ///
        /// # Errors
        /// See [`Fault`]. An answer of 5xx is held back for ten seconds, which is the library's back-off.
        pub async fn call(bot: &Bot, method: &str, body: Value) -> Result<Value, Fault> {
            let done = match method {
                $(stringify!($name) => JsonRequest::new(bot.clone(), raw::$name(body)).send().await,)*
                other => return Err(Fault::Refused(format!("there is no method {other}"))),
            };
            done.map_err(|error| fault(&error))
        }
    };
}

methods!(
    GetMe,
    GetUpdates,
    SetMyCommands,
    SendMessage,
    EditMessageText,
    EditMessageReplyMarkup,
    DeleteMessage,
    AnswerCallbackQuery,
    AnswerPreCheckoutQuery,
    SendInvoice,
    RefundStarPayment,
    GetStarTransactions,
);

/// What an error of the library means.
#[must_use]
pub fn fault(error: &RequestError) -> Fault {
    let text = error.to_string();
    match error {
        RequestError::RetryAfter(seconds) => Fault::Quiet(seconds.duration()),
        RequestError::MigrateToChatId(_) => Fault::Refused(text),
        RequestError::Network(source) if source.is_connect() => Fault::NotSent(text),
        RequestError::Network(_) => Fault::Unknown(text),
        RequestError::InvalidJson { raw, .. } => unread(raw),
        RequestError::Io(_) => Fault::NotSent(text),
        RequestError::Api(error) => api_fault(error),
    }
}

/// An answer that the library cannot read: a refusal with fields of a newer API, or a proxy's page.
fn unread(raw: &str) -> Fault {
    let answer: Value = serde_json::from_str(raw).unwrap_or_default();
    match (answer["ok"].as_bool(), answer["description"].as_str()) {
        (Some(false), Some(description)) => by_description(description),
        _ => Fault::Unknown("the answer is not one of the Bot API".to_owned()),
    }
}

fn api_fault(error: &ApiError) -> Fault {
    let text = error.to_string();
    match error {
        ApiError::MessageNotModified => Fault::NotModified,
        ApiError::MessageToEditNotFound
        | ApiError::MessageCantBeEdited
        | ApiError::MessageIdInvalid
        | ApiError::MessageToDeleteNotFound
        | ApiError::MessageCantBeDeleted => Fault::Gone,
        ApiError::CantParseEntities(_) => Fault::Entities,
        ApiError::InvalidQueryId => Fault::Late,
        ApiError::InvalidToken => Fault::Token,
        ApiError::TerminatedByOtherGetUpdates | ApiError::CantGetUpdates => Fault::Conflict(text),
        ApiError::BotBlocked
        | ApiError::BotKicked
        | ApiError::BotKickedFromSupergroup
        | ApiError::BotKickedFromChannel
        | ApiError::UserDeactivated
        | ApiError::CantInitiateConversation
        | ApiError::CantTalkWithBots => Fault::Blocked(text),
        ApiError::Unknown(description) => by_description(description),
        _ => Fault::Refused(text),
    }
}

/// The library keeps the text of what it does not know, not the status.
fn by_description(text: &str) -> Fault {
    const REFUSED: &[&str] = &["Bad Request", "Unauthorized", "Not Found", "Request Entity Too Large", "Method Not"];
    let has = |part: &str| text.contains(part);
    if has("message is not modified") {
        Fault::NotModified
    } else if has("can't parse entities") {
        Fault::Entities
    } else if has("query is too old") {
        Fault::Late
    } else if has("message to edit not found") || has("message to delete not found") {
        Fault::Gone
    } else if text.starts_with("Conflict") {
        Fault::Conflict(text.to_owned())
    } else if text.starts_with("Forbidden") {
        Fault::Blocked(text.to_owned())
    } else if REFUSED.iter().any(|known| text.starts_with(known)) {
        Fault::Refused(text.to_owned())
    } else {
        // Internal errors and bad gateways: nobody knows.
        Fault::Unknown(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_library_does_not_know_is_told_by_its_text() {
        for (text, fault) in [
            ("Bad Request: something new", Fault::Refused("Bad Request: something new".into())),
            (
                "Forbidden: bot was kicked from somewhere",
                Fault::Blocked("Forbidden: bot was kicked from somewhere".into()),
            ),
            ("Internal Server Error", Fault::Unknown("Internal Server Error".into())),
            ("Bad Request: message is not modified", Fault::NotModified),
            ("Conflict: x", Fault::Conflict("Conflict: x".into())),
        ] {
            assert_eq!(api_fault(&ApiError::Unknown(text.into())), fault);
            let raw = serde_json::json!({"ok": false, "description": text, "parameters": {"new": 1}}).to_string();
            assert_eq!(unread(&raw), fault);
        }
    }
}
