//! What the loop has established about a project, and what was said: rows of `project_records` and `conversations`.
//!
//! Records are facts that later steps read instead of passing documents through the workflow. A step writes each fact
//! under its own identity, so a second execution writes nothing.

use crate::{fact::Outcome, todo::State};
use loopwright_engine::{Failure, activity::AttemptInfo, transaction};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::collections::BTreeMap;
use uuid::Uuid;

/// Turns of the conversation that are read: a loop asks at most eight questions a run.
const TURNS_MAX: i64 = 60;
/// Longest text of one turn, in bytes.
pub const TURN_BYTES_MAX: usize = 20_000;

/// Which fact a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Requirements,
    Plan,
    Outcome,
    Verdict,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Requirements => "requirements",
            Self::Plan => "plan",
            Self::Outcome => "outcome",
            Self::Verdict => "verdict",
        }
    }
}

/// Who said something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    User,
    Model,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Turn {
    /// `user` or `model`.
    pub who: String,
    pub text: String,
}

fn store(error: &sqlx::Error) -> Failure {
    Failure::retryable("transient.store", format!("the database did not answer: {error}"))
}

/// Writes a fact once per (project, kind, step).
///
/// # Errors
/// `transient.store`; `internal.output` for a body without a JSON form.
/// # Transaction
/// One statement; the first body stays.
pub async fn put<T: Serialize + Sync>(
    pool: &PgPool,
    project: Uuid,
    kind: Kind,
    info: &AttemptInfo,
    body: &T,
) -> Result<(), Failure> {
    let body = serde_json::to_value(body).map_err(|e| Failure::permanent("internal.output", e.to_string()))?;
    sqlx::query(
        "insert into project_records (project_id, kind, key, run_id, body) values ($1, $2, $3, $4, $5)
         on conflict (project_id, kind, key) do nothing",
    )
    .bind(project)
    .bind(kind.as_str())
    .bind(&info.idempotency_key)
    .bind(info.run_id.0)
    .bind(body)
    .execute(pool)
    .await
    .map_err(|e| store(&e))?;
    Ok(())
}

/// The newest fact of a kind that another step than the asking one has written.
///
/// A step that is done again after a crash must see what it saw the first time, so its own record does not count.
/// # Errors
/// `transient.store`; `record.unreadable` when another release wrote it in another shape.
pub async fn newest<T: DeserializeOwned>(
    pool: &PgPool,
    project: Uuid,
    kind: Kind,
    info: &AttemptInfo,
) -> Result<Option<T>, Failure> {
    let body: Option<Value> = sqlx::query_scalar(
        "select body from project_records where project_id = $1 and kind = $2 and key <> $3 order by n desc limit 1",
    )
    .bind(project)
    .bind(kind.as_str())
    .bind(&info.idempotency_key)
    .fetch_optional(pool)
    .await
    .map_err(|e| store(&e))?;
    body.map(read).transpose()
}

/// All facts of a kind that other steps have written, oldest first.
///
/// # Errors
/// As [`newest`].
pub async fn all<T: DeserializeOwned>(
    pool: &PgPool,
    project: Uuid,
    kind: Kind,
    info: &AttemptInfo,
) -> Result<Vec<T>, Failure> {
    let bodies: Vec<Value> = sqlx::query_scalar(
        "select body from project_records where project_id = $1 and kind = $2 and key <> $3 order by n",
    )
    .bind(project)
    .bind(kind.as_str())
    .bind(&info.idempotency_key)
    .fetch_all(pool)
    .await
    .map_err(|e| store(&e))?;
    bodies.into_iter().map(read).collect()
}

/// How far each item of the project is, by the newest outcome that other steps have written.
///
/// # Errors
/// As [`newest`].
pub async fn states(pool: &PgPool, project: Uuid, info: &AttemptInfo) -> Result<BTreeMap<String, State>, Failure> {
    let outcomes: Vec<Outcome> = all(pool, project, Kind::Outcome, info).await?;
    Ok(outcomes.into_iter().map(|outcome| (outcome.item, outcome.state)).collect())
}

fn read<T: DeserializeOwned>(body: Value) -> Result<T, Failure> {
    serde_json::from_value(body).map_err(|e| {
        Failure::permanent(
            "record.unreadable",
            format!("a record of this project cannot be read: {e}; start a new run"),
        )
    })
}

/// The name of a project.
///
/// # Errors
/// `input.invalid` when there is none with this id; `transient.store`.
pub async fn project_name(pool: &PgPool, project: Uuid) -> Result<String, Failure> {
    sqlx::query_scalar("select name from projects where id = $1")
        .bind(project)
        .fetch_optional(pool)
        .await
        .map_err(|e| store(&e))?
        .ok_or_else(|| Failure::permanent("input.invalid", format!("there is no project {project}")))
}

/// Adds a turn to the project's conversation, once per `dedupe`.
///
/// # Errors
/// `transient.store`; `input.invalid` when the project does not exist.
/// # Transaction
/// One: the project's row is locked, so that turns are numbered without gaps.
pub async fn say(
    pool: &PgPool,
    project: Uuid,
    who: Speaker,
    text: &str,
    dedupe: &str,
    info: &AttemptInfo,
) -> Result<(), Failure> {
    let mut tx = transaction::begin(pool).await.map_err(|e| store(&e))?;
    let user: Option<Uuid> = sqlx::query_scalar("select user_id from projects where id = $1 for no key update")
        .bind(project)
        .fetch_optional(&mut *tx)
        .await
        .map_err(|e| store(&e))?;
    let user = user.ok_or_else(|| Failure::permanent("input.invalid", format!("there is no project {project}")))?;
    let who = match who {
        Speaker::User => "user",
        Speaker::Model => "model",
    };
    sqlx::query(
        "insert into conversations (project_id, user_id, seq, role, parts, dedupe_key, attempt_id)
         select $1, $2, coalesce(max(seq), 0) + 1, $3, $4, $5, $6 from conversations where project_id = $1 and thread = 'main'
         on conflict (project_id, thread, dedupe_key) do nothing",
    )
    .bind(project)
    .bind(user)
    .bind(who)
    // Postgres takes no NUL in JSON.
    .bind(json!([{ "text": text.replace('\0', "\u{2400}") }]))
    .bind(dedupe)
    .bind(info.attempt_id.0)
    .execute(&mut *tx)
    .await
    .map_err(|e| store(&e))?;
    tx.commit().await.map_err(|e| store(&e))
}

/// Turns of a project whose dedupe key begins with `prefix` and is not `except`.
///
/// # Errors
/// `transient.store`.
pub async fn turns(pool: &PgPool, project: Uuid, prefix: &str, except: &str) -> Result<usize, Failure> {
    let count: i64 = sqlx::query_scalar(
        "select count(*) from conversations
         where project_id = $1 and thread = 'main' and starts_with(dedupe_key, $2) and dedupe_key <> $3",
    )
    .bind(project)
    .bind(prefix)
    .bind(except)
    .fetch_one(pool)
    .await
    .map_err(|e| store(&e))?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// The conversation of a project, oldest first, without turns whose dedupe key is `except`.
///
/// # Errors
/// `transient.store`.
pub async fn conversation(pool: &PgPool, project: Uuid, except: &str) -> Result<Vec<Turn>, Failure> {
    let rows: Vec<(String, Value)> = sqlx::query_as(
        "select role, parts from (select role, parts, seq from conversations
           where project_id = $1 and thread = 'main' and role in ('user', 'model') and dedupe_key is distinct from $2
           order by seq desc limit $3) newest order by seq",
    )
    .bind(project)
    .bind(except)
    .bind(TURNS_MAX)
    .fetch_all(pool)
    .await
    .map_err(|e| store(&e))?;
    let text = |parts: &Value| {
        let texts = parts.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str());
        texts.collect::<Vec<_>>().join("\n")
    };
    Ok(rows.iter().map(|(who, parts)| Turn { who: who.clone(), text: text(parts) }).collect())
}
