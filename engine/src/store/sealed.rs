//! Which key sealed what, and sealing it under another: for operators who rotate the ring.
//!
//! Everything belongs to a run but the inputs of schedules, so a pass goes from run to run. It changes no content: a document is
//! opened and sealed as it is, with its references, and a blob keeps the name that they use. Nothing is locked longer than a
//! statement; a row that somebody writes meanwhile is theirs, sealed by the ring's first key already.

use super::{blobs::hash_of, transitions::Text};
use crate::{
    Result,
    ids::RunId,
    payload::{self, Hash, Slot, Stored},
};
use sqlx::{AssertSqlSafe, PgConnection, Row, postgres::PgRow, types::Json};
use uuid::Uuid;

/// Rows of one statement. A document has a mebibyte or eight at most.
const BATCH: i64 = 16;
/// Runs of one page.
const RUNS: i64 = 100;

/// What of a run is sealed, and how a row of it is found again: table, column, and what else of its key there is, as text.
const COLUMNS: [(&str, &str, &str, &str); 8] = [
    ("runs", "inputs", "''", "''"),
    ("runs", "output", "''", "''"),
    ("runs", "failure", "''", "''"),
    ("runs", "cursor", "cursor_seq::text", "''"),
    ("history", "events", "seq::text", "''"),
    ("checkpoints", "value", "path", "key"),
    ("inbox", "payload", "n::text", "''"),
    ("attempt_progress", "progress", "path", "''"),
];

/// How many rows a key has sealed, or, without a key, are plain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) table: &'static str,
    pub(crate) key: Option<String>,
    pub(crate) rows: i64,
}

/// Rows by table and key. Reads everything that there is.
///
/// # Transaction
/// Must be inside one: it rightly takes longer than other statements may.
pub(crate) async fn count(conn: &mut PgConnection) -> Result<Vec<Count>> {
    sqlx::query("set local statement_timeout = 0").execute(&mut *conn).await?;
    let mut counts: Vec<Count> = Vec::new();
    let documents = COLUMNS.iter().map(|(table, column, ..)| (*table, *column)).chain([("schedules", "inputs")]);
    let mut statements: Vec<(&'static str, String)> = documents
        .map(|(table, column)| {
            let key = format!("{column}->'$sealed'->>'key'");
            (table, format!("select {key}, count(*) from {table} where {column} <> 'null' group by 1"))
        })
        .collect();
    statements.push(("blobs", "select key, count(*) from blobs group by 1".into()));
    for (table, sql) in statements {
        // Made of the constants above.
        let rows: Vec<(Option<String>, i64)> = sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut *conn).await?;
        for (key, rows) in rows {
            match counts.iter_mut().find(|c| c.table == table && c.key == key) {
                Some(count) => count.rows += rows,
                None => counts.push(Count { table, key, rows }),
            }
        }
    }
    Ok(counts)
}

/// Runs after that one, in the order of their keys.
pub(crate) async fn runs(conn: &mut PgConnection, after: Option<RunId>) -> Result<Vec<RunId>> {
    let runs: Vec<Uuid> = sqlx::query_scalar(
        "select run_id from runs where $1::smallint is null or (shard, run_id) > ($1, $2) order by shard, run_id limit $3",
    )
    .bind(after.map(|run| run.shard()))
    .bind(after.map(|run| run.0))
    .bind(RUNS)
    .fetch_all(conn)
    .await?;
    Ok(runs.into_iter().map(RunId).collect())
}

/// Seals everything of a run that `key`, which must be the ring's first, has not sealed. Returns how many rows it has written.
///
/// # Errors
/// `payload_key_missing` if something is sealed by a key that is not in the ring; what was done before is done.
/// # Transaction
/// One statement a row, each behind the value that was read. Twice is once.
pub(crate) async fn reseal(conn: &mut PgConnection, run: RunId, key: &str) -> Result<u64> {
    let mut written = 0;
    for (table, column, a, b) in COLUMNS {
        // Rows that somebody else has written meanwhile are not met again: each pass begins after the last.
        let (mut at_a, mut at_b): (Option<String>, String) = (None, String::new());
        loop {
            let extra = if table == "inbox" { "kind, name" } else { "'' as kind, '' as name" };
            let rows = sqlx::query(AssertSqlSafe(format!(
                "select {a} as a, {b} as b, {extra}, {column} as doc from {table}
                 where shard = $1 and run_id = $2 and {column} <> 'null' and {column}->'$sealed'->>'key' is distinct from $3
                   and ($4::text is null or ({a}, {b}) > ($4 collate \"C\", $5)) order by {a} collate \"C\", {b} collate \"C\" limit $6",
            )))
            .bind(run.shard())
            .bind(run.0)
            .bind(key)
            .bind(&at_a)
            .bind(&at_b)
            .bind(BATCH)
            .fetch_all(&mut *conn)
            .await?;
            let Some(last) = rows.last() else { break };
            (at_a, at_b) = (Some(last.try_get("a")?), last.try_get("b")?);
            for row in &rows {
                let (key_a, key_b): (&str, &str) = (row.try_get("a")?, row.try_get("b")?);
                let Stored(doc) = row.try_get("doc")?;
                let sealed = document(run, table, column, key_a, key_b, row, doc)?;
                // A release that cannot open it must not read it.
                let format = if table == "history" {
                    format!(", format = greatest(format, {})", crate::event::APART)
                } else {
                    String::new()
                };
                let done = sqlx::query(AssertSqlSafe(format!(
                    "update {table} set {column} = $5{format} where shard = $1 and run_id = $2 and {a} = $3 and {b} = $4 and {column} = $6::jsonb",
                )))
                .bind(run.shard())
                .bind(run.0)
                .bind(key_a)
                .bind(key_b)
                .bind(Json(&*sealed))
                .bind(doc)
                .execute(&mut *conn)
                .await?;
                written += done.rows_affected();
            }
        }
    }
    Ok(written + reseal_blobs(conn, run, key).await?)
}

fn document(run: RunId, table: &str, column: &str, a: &str, b: &str, row: &PgRow, doc: &str) -> Result<Text> {
    let number = || a.parse().unwrap_or_default();
    let slot = match (table, column) {
        ("runs", "inputs") => Slot::Inputs,
        ("runs", "output") => Slot::Output,
        ("runs", "failure") => Slot::Failure,
        ("runs", _) => Slot::Cursor { seq: number() },
        ("history", _) => Slot::Events { seq: number() },
        ("checkpoints", _) => Slot::Checkpoint { path: a, key: b },
        ("inbox", _) => Slot::Message { kind: row.try_get("kind")?, name: row.try_get("name")? },
        _ => Slot::Progress { path: a },
    };
    payload::resealed_document(run.0, slot, doc)
}

async fn reseal_blobs(conn: &mut PgConnection, run: RunId, key: &str) -> Result<u64> {
    let (mut written, mut after) = (0, Vec::new());
    loop {
        let rows: Vec<(Vec<u8>, Option<String>, Vec<u8>)> = sqlx::query_as(
            "select hash, key, bytes from blobs where shard = $1 and run_id = $2 and key is distinct from $3 and hash > $4
             order by hash limit $5",
        )
        .bind(run.shard())
        .bind(run.0)
        .bind(key)
        .bind(&after)
        .bind(BATCH)
        .fetch_all(&mut *conn)
        .await?;
        let Some((last, ..)) = rows.last() else { return Ok(written) };
        after.clone_from(last);
        for (hash, old, bytes) in rows {
            let name: Hash = hash_of(&hash)?;
            let sealed = payload::resealed(run, &name, old.as_deref(), &bytes)?;
            let done = sqlx::query(
                "update blobs set key = $4, bytes = $5 where shard = $1 and run_id = $2 and hash = $3 and key is not distinct from $6",
            )
            .bind(run.shard())
            .bind(run.0)
            .bind(&hash)
            .bind(sealed.key)
            .bind(sealed.bytes)
            .bind(old)
            .execute(&mut *conn)
            .await?;
            written += done.rows_affected();
        }
    }
}

/// [`reseal`] of the inputs of all schedules.
pub(crate) async fn reseal_schedules(conn: &mut PgConnection, key: &str) -> Result<u64> {
    let rows =
        sqlx::query("select id, inputs as doc from schedules where inputs->'$sealed'->>'key' is distinct from $1")
            .bind(key)
            .fetch_all(&mut *conn)
            .await?;
    let mut written = 0;
    for row in &rows {
        let (id, Stored(doc)): (Uuid, Stored<'_>) = (row.try_get("id")?, row.try_get("doc")?);
        let sealed = payload::resealed_document(id, Slot::Schedule, doc)?;
        let done = sqlx::query("update schedules set inputs = $2 where id = $1 and inputs = $3::jsonb")
            .bind(id)
            .bind(Json(&*sealed))
            .bind(doc)
            .execute(&mut *conn)
            .await?;
        written += done.rows_affected();
    }
    Ok(written)
}
