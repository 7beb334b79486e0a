//! Errors of the engine's public boundary: values for the caller now, as opposed to failures, which are data.

/// What the engine's functions return to their callers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no run {0}: check the id; `run list` shows which there are")]
    RunNotFound(String),
    #[error(
        "run {run} was retired; it is in the archive {file}, and `loopwright retention import` brings it back to be read"
    )]
    RunArchived { run: String, file: String },
    #[error("run {0} is closed: it takes nothing more; fork it, or start another")]
    RunClosed(String),
    #[error("run {0} is quarantined: an operator has to look at it first")]
    RunQuarantined(String),
    #[error("run {0} came from a file: it can be read and forked, nothing else")]
    RunImported(String),
    #[error("concurrency group `{0}` has no place: wait for one of its runs, or cancel it")]
    ConcurrencyFull(String),
    #[error("so many starts wait under the rate `{0}` that the next would be in more than 30 days; start it later")]
    RateFull(String),
    #[error(
        "run {run} is open under the id `{id}`: wait for its end, or ask for `use_existing` or `terminate_existing`"
    )]
    WorkflowIdOpen { id: String, run: String },
    #[error(
        "run {run} under the id `{id}` has ended as {status}, and the start asks for no run after that: choose another id, or allow the duplicate"
    )]
    WorkflowIdUsed { id: String, run: String, status: &'static str },
    #[error("there is a run {0} in this database already: look at that one, or import into another database")]
    RunExists(String),
    #[error("the run cannot be forked there: {}", .0.join("; "))]
    ForkInvalid(Vec<String>),
    #[error("the run cannot go on under that definition: {}", .0.join("; "))]
    MigrationInvalid(Vec<String>),
    #[error("attempts of run {run} are under way at {}: pause the run, and migrate it when they have ended", .running.join(", "))]
    MigrationBusy { run: String, running: Vec<String> },
    #[error("line {line} of the archive: {why}")]
    ArchiveInvalid { line: u64, why: String },
    #[error("the archive cannot be written: {0}")]
    ArchiveUnwritable(String),
    #[error("no definition {0}: deploy it, or see which there are by `workflow versions`")]
    DefinitionNotFound(String),
    #[error("several definitions begin with {digits}: write more digits; they are {}", .candidates.join(", "))]
    DefinitionAmbiguous { digits: String, candidates: Vec<String> },
    #[error("the definition is not valid: {0}")]
    DefinitionInvalid(String),
    #[error("the inputs are not valid: {}", .0.join("; "))]
    InputInvalid(Vec<String>),
    #[error("the signal is not valid: {}", .0.join("; "))]
    SignalInvalid(Vec<String>),
    #[error("{limit} {what} wait at run {run} already: see what it waits for, and send this one again later")]
    InboxFull { run: String, what: &'static str, limit: i64 },
    #[error("no update `{1}` was sent to run {0}: send it first")]
    UpdateNotFound(String, String),
    #[error("run {run} has not answered update `{id}` yet: {why}; ask again with the same id")]
    UpdatePending { run: String, id: String, why: &'static str },
    #[error("the run's workflow has no query `{name}`; {}", listed(.names))]
    QueryNotFound { name: String, names: Vec<String> },
    #[error("query `{name}` cannot be answered now: {}: {}", .failure.code, .failure.message)]
    QueryFailed { name: String, failure: crate::Failure },
    #[error("run {0} does not wait for an approval `{1}`: `run show` says what it waits for")]
    ApprovalNotWaiting(String, String),
    #[error("no schedule `{0}`: `schedule list` shows which there are")]
    ScheduleNotFound(String),
    #[error("there is a schedule `{0}` already: choose another name, or update that one")]
    ScheduleExists(String),
    #[error("the schedule is not valid: {}", .0.join("; "))]
    ScheduleInvalid(Vec<String>),
    #[error("the filter is not valid: {0}")]
    FilterInvalid(#[from] crate::filter::FilterError),
    #[error("{what} is {actual} bytes; the limit is {limit}")]
    TooLarge { what: &'static str, actual: usize, limit: usize },
    #[error("{what} is nested deeper than {limit} levels: flatten it, or give it as a text")]
    TooDeep { what: &'static str, limit: usize },
    #[error("another worker owns the run now")]
    LeaseLost,
    #[error("the run was refused: {reason}: {message}")]
    Refused { reason: String, message: String },
    /// Nothing is wrong with it: a worker of that release goes on with it.
    #[error("{0} was written by a newer release: bring this program up to it")]
    NewerRelease(String),
    /// Nothing is wrong with it: who has the key can read it.
    #[error(
        "payload key `{0}` is not in this program's ring: put it back into LOOPWRIGHT_PAYLOAD_KEYS, behind the first"
    )]
    PayloadKeyMissing(String),
    #[error("a payload is not what was stored: {0}; restore it from a backup")]
    PayloadCorrupt(String),
    #[error("invariant broken: {0}")]
    Invariant(String),
    #[error("expression: {0}")]
    Expression(String),
    /// Of a thing that is done once: everything else is sent again, or was not done.
    #[error(
        "Postgres gave no answer to the COMMIT, so it may have been done or not: {0}; see whether it was, or ask for it again under the \
         same id (of the run, the message, the update), under which it is done once"
    )]
    InDoubt(String),
    #[cfg(feature = "runtime")]
    #[error("database: {}{}", .0, remedy(.0))]
    Sql(#[from] sqlx::Error),
}

impl Error {
    /// A stable code for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::RunNotFound(_) => "run_not_found",
            Self::RunArchived { .. } => "run_archived",
            Self::RunClosed(_) => "run_closed",
            Self::RunQuarantined(_) => "run_quarantined",
            Self::RunImported(_) => "run_imported",
            Self::ConcurrencyFull(_) => "concurrency_full",
            Self::RateFull(_) => "rate_full",
            Self::WorkflowIdOpen { .. } => "workflow_id_open",
            Self::WorkflowIdUsed { .. } => "workflow_id_used",
            Self::RunExists(_) => "run_exists",
            Self::ForkInvalid(_) => "fork_invalid",
            Self::MigrationInvalid(_) => "migration_invalid",
            Self::MigrationBusy { .. } => "migration_busy",
            Self::ArchiveInvalid { .. } => "archive_invalid",
            Self::ArchiveUnwritable(_) => "archive_unwritable",
            Self::DefinitionNotFound(_) => "definition_not_found",
            Self::DefinitionAmbiguous { .. } => "definition_ambiguous",
            Self::DefinitionInvalid(_) => "definition_invalid",
            Self::InputInvalid(_) => "input_invalid",
            Self::SignalInvalid(_) => "signal_invalid",
            Self::InboxFull { .. } => "inbox_full",
            Self::UpdateNotFound(..) => "update_not_found",
            Self::UpdatePending { .. } => "update_pending",
            Self::QueryNotFound { .. } => "query_not_found",
            Self::QueryFailed { .. } => "query_failed",
            Self::ApprovalNotWaiting(..) => "approval_not_waiting",
            Self::ScheduleNotFound(_) => "schedule_not_found",
            Self::ScheduleExists(_) => "schedule_exists",
            Self::ScheduleInvalid(_) => "schedule_invalid",
            Self::FilterInvalid(_) => "filter_invalid",
            Self::TooLarge { .. } => "too_large",
            Self::TooDeep { .. } => "too_deep",
            Self::LeaseLost => "lease_lost",
            Self::Refused { .. } => "refused",
            Self::NewerRelease(_) => "newer_release",
            Self::PayloadKeyMissing(_) => "payload_key_missing",
            Self::PayloadCorrupt(_) => "payload_corrupt",
            Self::Invariant(_) => "invariant",
            Self::Expression(_) => "expression",
            Self::InDoubt(_) => "in_doubt",
            #[cfg(feature = "runtime")]
            Self::Sql(_) => "database",
        }
    }
}

/// What to do about the conditions of the server that somebody can mend.
#[cfg(feature = "runtime")]
fn remedy(error: &sqlx::Error) -> &'static str {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    match (error, code.as_deref()) {
        (sqlx::Error::PoolTimedOut, _) => {
            "; all connections of this process are in use, or Postgres cannot be reached or gives no more: try again, and look \
             into pg_stat_activity for who holds them"
        }
        (_, Some("53100")) => {
            "; free space on the disk of Postgres, and try again: what was under way goes on by itself"
        }
        (_, Some("53300")) => {
            "; Postgres gives no more connections: run fewer processes, or raise max_connections or the limit of the role or \
             database, and try again"
        }
        (sqlx::Error::Io(error), _) if error.kind() == std::io::ErrorKind::TimedOut => {
            "; Postgres gave no answer in time, and what was asked for was not done: see that it runs and what holds it up \
             (pg_stat_activity), and try again"
        }
        (_, Some("57014")) => {
            "; Postgres ended it because it took too long, and nothing was done: see what holds it up (pg_stat_activity), and try again"
        }
        (sqlx::Error::Io(_), _) | (_, Some("57P01" | "57P02" | "57P03")) => {
            "; Postgres is away: see that it runs and has space on its disk, and try again"
        }
        (_, Some("42501")) => {
            "; the role of the database URL lacks the right: give it again (deploy/roles.sql after `loopwright migrate`)"
        }
        (_, Some("28000" | "28P01" | "3D000")) => {
            "; see the user, the password and the database's name in the database URL"
        }
        (sqlx::Error::ColumnNotFound(_), _) | (_, Some("42703" | "42P01" | "42883")) => {
            "; the schema is of another release than this program: bring both to the same one (`loopwright migrate`)"
        }
        _ => "",
    }
}

/// The queries that there are.
fn listed(names: &[String]) -> String {
    if names.is_empty() {
        return "it has none".into();
    }
    let names: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
    format!("it has {}", names.join(", "))
}

/// Shorthand for the engine's results.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    const README: &str = include_str!("../README.md");

    /// Codes in the first column of a section's table.
    fn listed(section: &str) -> BTreeSet<String> {
        let (_, rest) = README.split_once(&format!("\n## {section}\n")).expect("section");
        let body = rest.split("\n## ").next().expect("body");
        let cells = body.lines().filter(|l| l.starts_with("| `")).filter_map(|l| l.split('|').nth(1));
        cells.flat_map(|c| c.split(',')).map(|c| c.trim().trim_matches('`').to_owned()).collect()
    }

    #[test]
    fn every_error_code_is_in_the_readme_with_cause_and_remedy() {
        let (_, code) = include_str!("error.rs").split_once("pub fn code(&self)").expect("code()");
        let body = code.split("\n    }\n").next().expect("body");
        let codes: BTreeSet<String> = body
            .lines()
            .filter_map(|l| l.split_once("=> \""))
            .filter_map(|(_, r)| r.split('"').next())
            .map(str::to_owned)
            .collect();
        assert_eq!(codes.len(), 41, "{codes:?}");
        assert_eq!(listed("Errors"), codes);
    }

    #[test]
    fn every_failure_code_that_the_engine_gives_is_in_the_readme() {
        const FAMILIES: &[&str] = &[
            "transient.",
            "timeout.",
            "limit.",
            "expr.",
            "template.",
            "input.",
            "output.",
            "signal.",
            "update.",
            "approval.",
            "join.",
            "call.",
            "internal.",
        ];
        fn visit(folder: &Path, found: &mut BTreeSet<String>) {
            for entry in fs::read_dir(folder).expect("folder") {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    if !path.ends_with("tests") {
                        visit(&path, found);
                    }
                    continue;
                }
                let text = fs::read_to_string(&path).expect("text");
                let code = text.split("#[cfg(test)]").next().expect("code");
                for (at, _) in code.match_indices('"') {
                    let literal = code[at + 1..].split('"').next().unwrap_or_default();
                    let word = literal.chars().all(|c| c.is_ascii_lowercase() || matches!(c, '_' | '.'));
                    if word && FAMILIES.iter().any(|f| literal.len() > f.len() && literal.starts_with(f)) {
                        found.insert(literal.to_owned());
                    }
                }
            }
        }
        let mut found = BTreeSet::new();
        visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        assert!(found.contains("timeout.run_total") && found.len() > 20, "{found:?}");
        assert_eq!(listed("Failure codes"), found);
    }
}
