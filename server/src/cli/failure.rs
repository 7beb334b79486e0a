//! What a command that could not be done says: one sentence with the remedy, a code for programs, an exit code.

use super::{EXIT_FAILED, EXIT_MACHINE, EXIT_USAGE};
use crate::{app::Lacks, config, postgres, rest, telemetry};
use loopwright_activities::{
    billing::ledger::LedgerError, index::IndexError, keys, provider::settings::SettingsError, sandbox::SandboxError,
};
use loopwright_engine::{embedded, migrate};
use serde_json::json;
use std::error::Error;

/// The exit code, and what goes to standard error: `loopwright: SENTENCE [CODE]`, or with `json`
/// `{"error": {"code", "message"}}`. Secrets are redacted.
pub(super) fn tell(error: &anyhow::Error, json: bool) -> (u8, String) {
    // Causes that the sentence does not name yet follow it.
    let text = telemetry::redact(&format!("{error:#}")).into_owned();
    let (exit, code) = error.chain().find_map(classify).unwrap_or((EXIT_FAILED, None));
    let text = match (json, code) {
        (true, code) => json!({ "error": { "code": code.unwrap_or("failed"), "message": text } }).to_string(),
        (false, Some(code)) => format!("loopwright: {text} [{code}]"),
        (false, None) => format!("loopwright: {text}"),
    };
    (exit, text)
}

/// Exit code and code of a cause, if it has any.
fn classify(cause: &(dyn Error + 'static)) -> Option<(u8, Option<&'static str>)> {
    if cause.is::<config::Error>() || cause.is::<SettingsError>() {
        return Some((EXIT_USAGE, Some("configuration_invalid")));
    }
    if let Some(error) = cause.downcast_ref::<postgres::Error>() {
        return Some((EXIT_MACHINE, Some(error.code())));
    }
    if cause.is::<rest::serve::BindError>() {
        return Some((EXIT_MACHINE, Some("listen_failed")));
    }
    if cause.is::<SandboxError>() || cause.is::<Lacks>() {
        return Some((EXIT_MACHINE, Some("machine_lacks")));
    }
    let code = None
        .or_else(|| cause.downcast_ref().map(loopwright_engine::Error::code))
        .or_else(|| cause.downcast_ref().map(migrate::Error::code))
        .or_else(|| cause.downcast_ref().map(embedded::Error::code))
        .or_else(|| cause.downcast_ref().map(LedgerError::code))
        .or_else(|| cause.downcast_ref().map(IndexError::code))
        .or_else(|| cause.downcast_ref().map(keys::Error::code));
    code.map(|code| (EXIT_FAILED, Some(code)))
}

#[cfg(test)]
mod tests {
    use super::tell;
    use crate::{config, postgres};
    use anyhow::Context as _;

    #[test]
    fn an_error_tells_its_code_under_whatever_context() {
        let closed = || anyhow::Error::new(loopwright_engine::Error::RunClosed("r".into())).context("the signal");
        assert_eq!(tell(&closed(), false), (1, "loopwright: the signal: run r is closed [run_closed]".into()));
        let (exit, text) = tell(&closed(), true);
        let text: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (exit, text),
            (1, serde_json::json!({"error": {"code": "run_closed", "message": "the signal: run r is closed"}}))
        );
        let newer = loopwright_engine::migrate::Error::DatabaseNewer { version: 9, known: 1 };
        let (exit, text) = tell(&Err::<(), _>(postgres::Error::from(newer)).context("opening").unwrap_err(), false);
        assert!(exit == 3 && text.ends_with("[database_newer]"), "{exit} {text}");
        let (exit, text) = tell(&config::Error::value("http.listen", "no port").into(), false);
        assert_eq!((exit, text.as_str()), (2, "loopwright: http.listen: no port [configuration_invalid]"));
        assert_eq!(tell(&anyhow::anyhow!("no"), false), (1, "loopwright: no".into()));
    }
}
