//! What a caller is told when something is not done: RFC 9457 problem documents with stable codes.

use crate::store;
use warp::http::{HeaderValue, StatusCode, header};
use warp::reply::{Reply, Response};

/// When a group without a place is asked again, in seconds. Chosen: runs take minutes, and asking costs one statement.
const CONCURRENCY_RETRY_S: u64 = 30;
/// When a rate that is planned for 30 days is asked again, in seconds. Chosen: its next start may be days away.
const RATE_RETRY_S: u64 = 3_600;

/// A refusal or a failure, as the caller sees it.
///
/// Never carries SQL, paths of the machine, or what an upstream said.
#[derive(Debug)]
pub struct Error {
    pub code: Code,
    /// One sentence for a person.
    pub detail: String,
    /// What is wrong with which part of the body, as (JSON pointer, sentence).
    pub pointers: Vec<(String, String)>,
    /// Seconds after which another try makes sense.
    pub retry_after_s: Option<u64>,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $status:ident, $title:literal;)*) => {
        /// Why; listed with cause and remedy in the crate's README.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code { $($(#[$doc])* $name,)* }
        impl Code {
            /// All of them, in the README's order.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];
            /// The stable text for programs.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }
            #[must_use]
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)* }
            }
            fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }
        }
    };
}

codes! {
    BodyInvalid = "body_invalid", BAD_REQUEST, "The body is not what this route takes";
    QueryInvalid = "query_invalid", BAD_REQUEST, "A query parameter is not valid";
    HeaderInvalid = "header_invalid", BAD_REQUEST, "A header is not valid";
    ProjectInvalid = "project_invalid", BAD_REQUEST, "Missing or invalid project_id";
    TokenMissing = "token_missing", UNAUTHORIZED, "A bearer token is needed";
    TokenInvalid = "token_invalid", UNAUTHORIZED, "The token is not valid";
    ScopeInsufficient = "scope_insufficient", FORBIDDEN, "The token lacks a scope";
    UserBlocked = "user_blocked", FORBIDDEN, "The user is blocked";
    NotFound = "not_found", NOT_FOUND, "There is nothing here";
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED, "Another method is needed";
    RunClosed = "run_closed", CONFLICT, "The run is closed";
    RunQuarantined = "run_quarantined", CONFLICT, "The run is halted";
    ApprovalNotWaiting = "approval_not_waiting", CONFLICT, "No such approval waits";
    LimitMissing = "limit_missing", CONFLICT, "The run has no limit";
    QueryFailed = "query_failed", CONFLICT, "The query has no answer now";
    WorkflowIdOpen = "workflow_id_open", CONFLICT, "An open run has the id";
    WorkflowIdUsed = "workflow_id_used", CONFLICT, "The id was used before";
    MigrationBusy = "migration_busy", CONFLICT, "Attempts of the run are under way";
    ScheduleExists = "schedule_exists", CONFLICT, "There is a schedule of that name";
    SchedulesFull = "schedules_full", CONFLICT, "There is no room for another schedule";
    KeysFull = "keys_full", CONFLICT, "There is no room for another key";
    RequestInProgress = "request_in_progress", CONFLICT, "The same request is being worked on";
    BodyTooLarge = "body_too_large", PAYLOAD_TOO_LARGE, "The body is too large";
    MediaTypeUnsupported = "media_type_unsupported", UNSUPPORTED_MEDIA_TYPE, "The body must be JSON";
    InputInvalid = "input_invalid", UNPROCESSABLE_ENTITY, "The values do not fit";
    MigrationInvalid = "migration_invalid", UNPROCESSABLE_ENTITY, "The run cannot go on under that version";
    AddressRefused = "address_refused", UNPROCESSABLE_ENTITY, "The address is not one that keys are sent to";
    IdempotencyKeyReused = "idempotency_key_reused", UNPROCESSABLE_ENTITY, "The idempotency key belongs to another request";
    RateLimited = "rate_limited", TOO_MANY_REQUESTS, "Too many requests";
    ConcurrencyFull = "concurrency_full", TOO_MANY_REQUESTS, "Too many runs of the group are under way";
    RateFull = "rate_full", TOO_MANY_REQUESTS, "Too many starts are planned already";
    StreamsExhausted = "streams_exhausted", SERVICE_UNAVAILABLE, "Too many open event streams";
    KeysUnavailable = "keys_unavailable", SERVICE_UNAVAILABLE, "Keys cannot be kept here";
    Unavailable = "unavailable", SERVICE_UNAVAILABLE, "Not available now";
    Internal = "internal", INTERNAL_SERVER_ERROR, "Something broke on our side";
    LoopFailed = "loop_failed", INTERNAL_SERVER_ERROR, "Failed to run autonomous loop";
}

impl Error {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), pointers: Vec::new(), retry_after_s: None }
    }
    #[must_use]
    pub fn at(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        self.pointers.push((pointer.into(), detail.into()));
        self
    }
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds.max(1));
        self
    }
    pub fn not_found(what: &str) -> Self {
        Self::new(Code::NotFound, format!("No such {what}."))
    }
    /// An error of our own: logged once, here, and told without detail.
    pub fn internal(error: impl std::fmt::Display) -> Self {
        tracing::error!(%error, "a request failed");
        Self::new(
            Code::Internal,
            "The request was not carried out; trying again later is safe with an Idempotency-Key.",
        )
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Unavailable(_) => {
                tracing::error!(%error, "the database cannot be reached");
                Self::new(Code::Unavailable, "The database cannot be reached now.").retry_after(5)
            }
            store::Error::Broken(_) => Self::internal(error),
        }
    }
}

impl From<loopwright_activities::keys::Error> for Error {
    fn from(error: loopwright_activities::keys::Error) -> Self {
        use loopwright_activities::keys::Error as E;
        match error {
            E::Unavailable => Self::new(Code::KeysUnavailable, "The operator of this service keeps no keys of users."),
            E::Invalid(_) => Self::new(Code::InputInvalid, format!("{error}.")),
            E::TooMany => Self::new(Code::KeysFull, format!("{error}.")),
            E::Address(why) => Self::new(Code::AddressRefused, format!("{error}.")).at("/base_url", why.to_string()),
            E::NotFound => Self::not_found("key"),
            E::Sql(error) => store::Error::from(error).into(),
            E::Corrupt { .. } | E::KekMissing { .. } => Self::internal(error),
        }
    }
}

impl From<loopwright_engine::Error> for Error {
    fn from(error: loopwright_engine::Error) -> Self {
        use loopwright_engine::Error as E;
        match error {
            // Which file it is in is the operator's to know.
            E::RunNotFound(_) | E::RunArchived { .. } => Self::not_found("run"),
            // The id, and the run that goes on in its place, if there is one.
            E::RunClosed(which) => {
                Self::new(Code::RunClosed, format!("Run {which} has ended and takes no more messages."))
            }
            E::RunQuarantined(_) => {
                Self::new(Code::RunQuarantined, "Something broke in the run; an operator has to look at it.")
            }
            E::ApprovalNotWaiting(_, step) => {
                Self::new(Code::ApprovalNotWaiting, format!("The run does not wait for an approval `{step}` now."))
            }
            E::QueryNotFound { .. } => Self::new(Code::NotFound, format!("{error}.")),
            E::QueryFailed { .. } => Self::new(Code::QueryFailed, format!("{error}.")),
            E::UpdateNotFound(..) => Self::not_found("update"),
            E::InboxFull { .. } => Self::new(Code::RateLimited, format!("{error}.")).retry_after(30),
            E::UpdatePending { .. } => Self::new(Code::RequestInProgress, format!("{error}.")).retry_after(5),
            E::InputInvalid(list) | E::SignalInvalid(list) => {
                let error = Self::new(Code::InputInvalid, list.join("; "));
                list.into_iter().fold(error, |e, text| e.at("/payload", text))
            }
            E::ScheduleNotFound(_) => Self::not_found("schedule"),
            E::ScheduleInvalid(list) | E::ForkInvalid(list) => Self::new(Code::InputInvalid, list.join("; ")),
            E::DefinitionAmbiguous { .. } | E::TooDeep { .. } => Self::new(Code::InputInvalid, format!("{error}.")),
            // Nothing is wrong with what was asked; something else is in its way.
            E::ScheduleExists(_) => Self::new(Code::ScheduleExists, "You have a schedule of that name already."),
            E::WorkflowIdOpen { run, .. } => {
                Self::new(Code::WorkflowIdOpen, format!("Run {run} is open under this id."))
            }
            E::WorkflowIdUsed { run, status, .. } => {
                Self::new(Code::WorkflowIdUsed, format!("Run {run} under this id has ended as {status}."))
            }
            E::MigrationInvalid(list) => {
                let error = Self::new(Code::MigrationInvalid, list.join("; "));
                list.into_iter().fold(error, |e, text| e.at("/to", text))
            }
            E::MigrationBusy { .. } => Self::new(Code::MigrationBusy, format!("{error}.")),
            E::ConcurrencyFull(_) => {
                Self::new(Code::ConcurrencyFull, format!("{error}.")).retry_after(CONCURRENCY_RETRY_S)
            }
            E::RateFull(_) => Self::new(Code::RateFull, format!("{error}.")).retry_after(RATE_RETRY_S),
            E::FilterInvalid(error) => Self::new(Code::QueryInvalid, error.to_string()),
            E::TooLarge { what, actual, limit } => {
                Self::new(Code::BodyTooLarge, format!("{what} is {actual} bytes; the limit is {limit}."))
            }
            E::Sql(error) => store::Error::from(error).into(),
            E::InDoubt(_) => {
                tracing::error!(%error, "the database went away during a commit");
                let text = "It may have been done or not: look, or send it again with the same Idempotency-Key.";
                Self::new(Code::Unavailable, text).retry_after(5)
            }
            E::NewerRelease(_) => {
                tracing::error!(%error, "this process is older than the data");
                Self::new(Code::Unavailable, "A newer release works on this; this server is being brought up.")
                    .retry_after(30)
            }
            E::PayloadKeyMissing(_) => {
                tracing::error!(%error, "a key is not in this process's ring");
                Self::new(Code::Unavailable, "This server lacks the key that the run is sealed with.").retry_after(30)
            }
            E::RunImported(_) => Self::new(Code::RunClosed, "The run was imported and can only be read."),
            E::LeaseLost => {
                Self::new(Code::RequestInProgress, "The run went on meanwhile; ask once more.").retry_after(1)
            }
            other @ (E::DefinitionNotFound(_)
            | E::RunExists(_)
            | E::ArchiveInvalid { .. }
            | E::ArchiveUnwritable(_)
            | E::DefinitionInvalid(_)
            | E::Refused { .. }
            | E::PayloadCorrupt(_)
            | E::Invariant(_)
            | E::Expression(_)) => Self::internal(other),
        }
    }
}

impl Reply for Error {
    fn into_response(self) -> Response {
        let status = self.code.status();
        let mut body = serde_json::json!({
            "type": format!("urn:loopwright:error:{}", self.code.as_str()),
            "title": self.code.title(),
            "status": status.as_u16(),
            "code": self.code.as_str(),
            "detail": self.detail,
        });
        if !self.pointers.is_empty() {
            body["errors"] = self
                .pointers
                .iter()
                .map(|(pointer, detail)| serde_json::json!({"pointer": pointer, "detail": detail}))
                .collect();
        }
        let mut response = warp::reply::with_status(body.to_string(), status).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        let challenge = match self.code {
            Code::TokenMissing => Some(r#"Bearer realm="loopwright""#),
            Code::TokenInvalid => Some(r#"Bearer realm="loopwright", error="invalid_token""#),
            Code::ScopeInsufficient => {
                Some(r#"Bearer realm="loopwright", error="insufficient_scope", scope="loop:run""#)
            }
            _ => None,
        };
        if let Some(challenge) = challenge {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_lists_every_code() {
        let readme = include_str!("../../README.md");
        for code in Code::ALL {
            assert!(readme.contains(&format!("`{}`", code.as_str())), "{} is not in the README", code.as_str());
        }
    }

    #[test]
    fn what_is_in_the_way_of_a_right_request_is_no_fault_of_its_values() {
        use loopwright_engine::Error as E;
        let (id, run) = ("user:7:x".to_owned(), "r".to_owned());
        for (error, status, retry) in [
            (E::WorkflowIdOpen { id: id.clone(), run: run.clone() }, 409, false),
            (E::WorkflowIdUsed { id: id.clone(), run, status: "completed" }, 409, false),
            (E::ScheduleExists(id.clone()), 409, false),
            (E::ConcurrencyFull("g".into()), 429, true),
            (E::RateFull("r".into()), 429, true),
        ] {
            let code = error.code();
            let told = Error::from(error);
            assert_eq!((told.code.as_str(), told.code.status().as_u16()), (code, status));
            assert_eq!(told.retry_after_s.is_some(), retry, "{code}");
            // Ids are of all users together: the room that each has is nobody's business.
            assert!(!told.detail.contains(&id), "{}", told.detail);
        }
    }

    #[test]
    fn a_problem_names_its_code_and_its_pointers() {
        let error = Error::new(Code::InputInvalid, "bad").at("/name", "is missing").retry_after(0);
        let response = error.into_response();
        assert_eq!(response.status(), 422);
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        assert_eq!(response.headers()["retry-after"], "1");
    }
}
