//! What a command that could not be done says: one sentence with the remedy, a code for programs, an exit code.

use super::{EXIT_FAILED, EXIT_MACHINE, EXIT_USAGE};
use crate::{app::Lacks, config, postgres, rest, store, telemetry};
use loopwright_activities::{
    billing::ledger::LedgerError, index::IndexError, keys, provider::settings::SettingsError, sandbox::SandboxError,
};
use loopwright_engine::{embedded, filter::FilterError, migrate};
use serde_json::json;
use std::error::Error;

/// A refusal of the command line's own: what is wrong, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Refusal {
    code: &'static str,
    text: String,
}

/// A [`Refusal`] with exit code 1, of `usage_invalid` 2. Codes are listed in the crate's README.
pub(crate) fn refuse(code: &'static str, text: impl Into<String>) -> anyhow::Error {
    Refusal { code, text: text.into() }.into()
}

/// Said where a database is not as this program needs it, and somebody else is to migrate.
pub(super) fn behind() -> anyhow::Error {
    refuse("database_behind", "the database is behind this program; run `loopwright migrate`")
}

/// What a command line that cannot be understood is answered, or one that asks for help: prints it and gives the exit code.
/// `clap`'s words with a code behind the first line; with `--json` the sentence in the shape of all errors.
#[must_use]
pub fn usage(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        // Help or the version; a reader that has seen enough closes the pipe.
        drop(error.print());
        return 0;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        drop(error.print());
        return EXIT_USAGE;
    }
    let code = error.source().and_then(classify).and_then(|(_, code)| code).unwrap_or("usage_invalid");
    let text = telemetry::redact(&error.render().to_string()).into_owned();
    if std::env::args_os().any(|arg| arg == "--json") {
        let said = text.trim_start_matches("error: ").split("\n\nUsage:").next().unwrap_or_default();
        let said = said.split("\n\nFor more").next().unwrap_or_default().trim();
        eprintln!("{}", json!({ "error": { "code": code, "message": said } }));
    } else {
        let (first, rest) = text.split_once('\n').unwrap_or((text.as_str(), ""));
        eprint!("{first} [{code}]\n{rest}");
    }
    EXIT_USAGE
}

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
    if cause.downcast_ref::<Refusal>().is_some_and(|refusal| refusal.code == "usage_invalid") {
        return Some((EXIT_USAGE, Some("usage_invalid")));
    }
    if cause.is::<FilterError>() {
        return Some((EXIT_USAGE, Some("filter_invalid")));
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
        .or_else(|| cause.downcast_ref().map(keys::Error::code))
        .or_else(|| cause.downcast_ref().map(|refusal: &Refusal| refusal.code))
        .or_else(|| cause.is::<store::Error>().then_some("database"))
        .or_else(|| cause.is::<serde_json::Error>().then_some("json_invalid"))
        .or_else(|| cause.is::<std::io::Error>().then_some("file_failed"));
    code.map(|code| (EXIT_FAILED, Some(code)))
}

#[cfg(test)]
mod tests {
    use super::{refuse, tell};
    use crate::{config, postgres};
    use anyhow::Context as _;

    #[test]
    fn an_error_tells_its_code_under_whatever_context() {
        let closed = || anyhow::Error::new(loopwright_engine::Error::RunClosed("r".into())).context("the signal");
        assert_eq!(tell(&closed(), false), (1, "loopwright: the signal: run r is closed: it takes nothing more; fork it, or start another [run_closed]".into()));
        let (exit, text) = tell(&closed(), true);
        let text: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (exit, text),
            (
                1,
                serde_json::json!({"error": {"code": "run_closed", "message": "the signal: run r is closed: it takes nothing more; fork it, or start another"}})
            )
        );
        let newer = loopwright_engine::migrate::Error::DatabaseNewer { version: 9, known: 1 };
        let (exit, text) = tell(&Err::<(), _>(postgres::Error::from(newer)).context("opening").unwrap_err(), false);
        assert!(exit == 3 && text.ends_with("[database_newer]"), "{exit} {text}");
        let (exit, text) = tell(&config::Error::value("http.listen", "no port").into(), false);
        assert_eq!((exit, text.as_str()), (2, "loopwright: http.listen: no port [configuration_invalid]"));
        assert_eq!(tell(&anyhow::anyhow!("no"), false), (1, "loopwright: no".into()));
        assert_eq!(tell(&refuse("why_not", "no"), false), (1, "loopwright: no [why_not]".into()));
        let unreadable = Err::<(), _>(std::io::Error::other("gone")).context("a.json cannot be read").unwrap_err();
        assert_eq!(tell(&unreadable, false), (1, "loopwright: a.json cannot be read: gone [file_failed]".into()));
    }
}
