//! A run on its way out into a file, and in from one.

use super::definitions::hash_of;
use crate::{
    Error, Result,
    archive::{Archive, Checkpoint, Deployed, FORMAT, Former, Header, Run},
    definition::Bundle,
    ids::{DefinitionHash, RunId},
    view::RunStatus,
};
use serde_json::Value;
use sqlx::{PgConnection, Row, types::Json};

/// History rows of one statement. Chosen: some hundred kilobytes each at most.
const BATCH: usize = 100;
/// Checkpoints of one statement: each may have 8 MiB.
const CHECKPOINTS: usize = 8;

pub(crate) async fn header(conn: &mut PgConnection, run: RunId) -> Result<Header> {
    let row = sqlx::query(
        "select r.workflow, r.workflow_id, r.status, r.seq, r.queue, r.attributes, r.inputs, r.output, r.failure, r.depth,
                r.parent_run_id, r.started_at, r.closed_at, engine_now() as now,
                -- An imported fork has the shared rows itself; where they end stands in its history.
                coalesce(r.forked_seq, case when r.imported_at is not null then
                  (select max(h.seq) - 1 from history h where h.shard = r.shard and h.run_id = r.run_id
                     and h.events @> '[{\"type\": \"run_forked\"}]') end, 0) as forked_seq,
                r.definition
         from runs r where r.shard = $1 and r.run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| Error::RunNotFound(run.to_string()))?;
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    let small = |n: i32| u32::try_from(n).unwrap_or(0);
    let hash = hash_of(row.try_get("definition")?).ok_or_else(|| Error::Invariant("a definition's hash".into()))?;
    let mut former = Vec::new();
    for (until, hash) in super::migrations::former(&mut *conn, run).await? {
        former.push(Former { until, definition: deployed(&mut *conn, hash).await? });
    }
    Ok(Header {
        format: FORMAT,
        exported_at: row.try_get("now")?,
        definition: deployed(&mut *conn, hash).await?,
        former,
        run: Run {
            run_id: run,
            workflow: row.try_get("workflow")?,
            workflow_id: row.try_get("workflow_id")?,
            status: super::runs::status(&row)?,
            seq: number(row.try_get("seq")?),
            queue: row.try_get("queue")?,
            attributes: row.try_get("attributes")?,
            inputs: row.try_get("inputs")?,
            output: row.try_get("output")?,
            failure: row.try_get("failure")?,
            depth: small(row.try_get("depth")?),
            parent: row.try_get::<Option<uuid::Uuid>, _>("parent_run_id")?.map(RunId),
            forked_seq: number(row.try_get("forked_seq")?),
            started_at: row.try_get("started_at")?,
            closed_at: row.try_get("closed_at")?,
        },
    })
}

async fn deployed(conn: &mut PgConnection, hash: DefinitionHash) -> Result<Deployed> {
    let row = sqlx::query("select name, version, source, bundle, ir, author, message from definitions where hash = $1")
        .bind(&hash.0[..])
        .fetch_one(conn)
        .await?;
    let Json(bundle) = row.try_get::<Json<Bundle>, _>("bundle")?;
    Ok(Deployed {
        hash,
        name: row.try_get("name")?,
        version: u32::try_from(row.try_get::<i32, _>("version")?).unwrap_or(0),
        source: row.try_get("source")?,
        bundle,
        ir: row.try_get("ir")?,
        author: row.try_get("author")?,
        message: row.try_get("message")?,
    })
}

/// Checkpoints after (path, key), in order.
pub(crate) async fn checkpoints(
    conn: &mut PgConnection,
    run: RunId,
    after: (&str, &str),
    limit: i64,
) -> Result<Vec<Checkpoint>> {
    let rows = sqlx::query(
        "select path, key, value, created_at from checkpoints
         where shard = $1 and run_id = $2 and (path, key) > ($3, $4) order by path, key limit $5",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(after.0)
    .bind(after.1)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Checkpoint {
                path: row.try_get("path")?,
                key: row.try_get("key")?,
                value: row.try_get("value")?,
                created_at: row.try_get("created_at")?,
            })
        })
        .collect()
}

/// Stores an archive as a run that nobody will execute. `state` is the fold of its history, `messages` the number of its newest
/// message: those that a fork is sent are counted on from there. False if there is such a run.
///
/// # Transaction
/// The caller's. No place in the queue, no business key, no parent, no outbox topic; `current` of the definition stays.
pub(crate) async fn insert(conn: &mut PgConnection, archive: &Archive, state: &Value, messages: u64) -> Result<bool> {
    let (run, definition) = (&archive.header.run, &archive.header.definition);
    sqlx::query("select pg_advisory_xact_lock(hashtext($1))").bind(&definition.name).execute(&mut *conn).await?;
    for deployed in archive.header.former.iter().map(|former| &former.definition).chain([definition]) {
        let format = archive.definitions.get(&deployed.hash).map_or(u32::MAX, |compiled| compiled.format);
        sqlx::query(
            "insert into definitions (hash, name, version, format, source, bundle, ir, author, message)
             select $1, $2, coalesce(max(version), 0) + 1, $3, $4, $5, $6, $7, $8 from definitions where name = $2
             on conflict (hash) do nothing",
        )
        .bind(&deployed.hash.0[..])
        .bind(&deployed.name)
        .bind(i32::try_from(format).unwrap_or(i32::MAX))
        .bind(&deployed.source)
        .bind(Json(&deployed.bundle))
        .bind(&deployed.ir)
        .bind(&deployed.author)
        .bind(&deployed.message)
        .execute(&mut *conn)
        .await?;
    }
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let status = if run.closed_at.is_some() { run.status } else { RunStatus::Quarantined };
    let inserted = sqlx::query(
        "insert into runs (shard, run_id, workflow, definition, workflow_id, status, parked, seq, queue, attributes, inputs, depth,
                           cursor, cursor_seq, waiting, output, failure, started_at, closed_at, imported_at, inbox_n, inbox_seen)
         values ($1, $2, $3, $4, $5, $6, true, $7, $8, $9, $10, $11, $12, $7, 'imported', $13, $14, $15, $16, engine_now(), $17, $17)
         on conflict do nothing",
    )
    .bind(run.run_id.shard())
    .bind(run.run_id.0)
    .bind(&run.workflow)
    .bind(&definition.hash.0[..])
    .bind(&run.workflow_id)
    .bind(status.as_str())
    .bind(number(run.seq))
    .bind(&run.queue)
    .bind(&run.attributes)
    .bind(&run.inputs)
    .bind(i32::try_from(run.depth).unwrap_or(i32::MAX))
    .bind(state)
    .bind(&run.output)
    .bind(&run.failure)
    .bind(run.started_at)
    .bind(run.closed_at)
    .bind(number(messages))
    .execute(&mut *conn)
    .await?;
    if inserted.rows_affected() == 0 {
        return Ok(false);
    }
    for former in &archive.header.former {
        super::migrations::note(&mut *conn, run.run_id, former.until, former.definition.hash).await?;
    }
    for rows in archive.history.chunks(BATCH) {
        sqlx::query(
            "insert into history (shard, run_id, seq, epoch, format, events, at)
             select $1, $2, * from unnest($3::bigint[], $4::bigint[], $5::smallint[], $6::jsonb[], $7::timestamptz[])",
        )
        .bind(run.run_id.shard())
        .bind(run.run_id.0)
        .bind(rows.iter().map(|r| number(r.seq)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| number(r.epoch)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| i16::try_from(r.format).unwrap_or(i16::MAX)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| Value::Array(r.events.clone())).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.at).collect::<Vec<_>>())
        .execute(&mut *conn)
        .await?;
    }
    for some in archive.checkpoints.chunks(CHECKPOINTS) {
        sqlx::query(
            "insert into checkpoints (shard, run_id, path, key, value, created_at)
             select $1, $2, * from unnest($3::text[], $4::text[], $5::jsonb[], $6::timestamptz[])",
        )
        .bind(run.run_id.shard())
        .bind(run.run_id.0)
        .bind(some.iter().map(|c| c.path.as_str()).collect::<Vec<_>>())
        .bind(some.iter().map(|c| c.key.as_str()).collect::<Vec<_>>())
        .bind(some.iter().map(|c| Json(&c.value)).collect::<Vec<_>>())
        .bind(some.iter().map(|c| c.created_at).collect::<Vec<_>>())
        .execute(&mut *conn)
        .await?;
    }
    Ok(true)
}
