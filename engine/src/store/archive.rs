//! A run on its way out into a file, and in from one.

use super::{blobs, definitions::hash_of, history::events_of, transitions::Text};
use crate::{
    Error, Result,
    archive::{Archive, Checkpoint, Deployed, FORMAT, Former, Header, Run},
    definition::Bundle,
    ids::{DefinitionHash, RunId},
    payload::{self, Slot},
    view::{HistoryRow, RunStatus},
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
                r.parent_run_id, r.started_at, r.closed_at, r.first_run_id, r.continued_from, r.continued_as, engine_now() as now,
                r.forked_seq, r.imported_at is not null as imported, r.definition
         from runs r where r.shard = $1 and r.run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else { return Err(super::retention::absent(conn, run).await) };
    let forked_seq = match row.try_get("forked_seq")? {
        // An imported fork has the shared rows itself; where they end stands in its history.
        None if row.try_get("imported")? => forked_within(conn, run).await?,
        seq => seq.unwrap_or(0),
    };
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    let small = |n: i32| u32::try_from(n).unwrap_or(0);
    let hash = hash_of(row.try_get("definition")?).ok_or_else(|| Error::Invariant("a definition's hash".into()))?;
    let mut former = Vec::new();
    let seq: i64 = row.try_get("seq")?;
    // One that came since the row was read ends where this history ends, whose definition it is.
    let before = |until: &u64| i64::try_from(*until).is_ok_and(|until| until < seq);
    for (until, hash) in super::migrations::former(&mut *conn, run).await?.into_iter().filter(|f| before(&f.0)) {
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
            inputs: payload::read(conn, run, Slot::Inputs, row.try_get("inputs")?).await?,
            output: payload::read_some(conn, run, Slot::Output, row.try_get("output")?).await?,
            failure: payload::read_some(conn, run, Slot::Failure, row.try_get("failure")?).await?,
            depth: small(row.try_get("depth")?),
            parent: row.try_get::<Option<uuid::Uuid>, _>("parent_run_id")?.map(RunId),
            forked_seq: number(forked_seq),
            chain: super::runs::chain(&row)?,
            started_at: row.try_get("started_at")?,
            closed_at: row.try_get("closed_at")?,
        },
    })
}

/// The transition before the last fork that a history tells of, or 0.
async fn forked_within(conn: &mut PgConnection, run: RunId) -> Result<i64> {
    let mut before = i64::MAX;
    loop {
        // Into what is sealed only we can look.
        let rows = sqlx::query(
            "select seq, events from history where shard = $1 and run_id = $2 and seq < $3
               and (jsonb_typeof(events) <> 'array' or events @> '[{\"type\": \"run_forked\"}]') order by seq desc limit $4",
        )
        .bind(run.shard())
        .bind(run.0)
        .bind(before)
        .bind(i64::try_from(BATCH).unwrap_or(i64::MAX))
        .fetch_all(&mut *conn)
        .await?;
        for row in &rows {
            before = row.try_get("seq")?;
            if events_of(conn, run, before, row).await?.iter().any(|e| e["type"] == "run_forked") {
                return Ok(before - 1);
            }
        }
        if rows.is_empty() {
            return Ok(0);
        }
    }
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
    .fetch_all(&mut *conn)
    .await?;
    let mut found = Vec::with_capacity(rows.len());
    for row in &rows {
        let (path, key): (String, String) = (row.try_get("path")?, row.try_get("key")?);
        let slot = Slot::Checkpoint { path: &path, key: &key };
        let value = payload::read(conn, run, slot, row.try_get("value")?).await?;
        found.push(Checkpoint { path, key, value, created_at: row.try_get("created_at")? });
    }
    Ok(found)
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
    let (id, mut large) = (run.run_id, Vec::new());
    let inputs = payload::pack(id, Slot::Inputs, &run.inputs, &mut large)?;
    let state = payload::pack(id, Slot::Cursor { seq: number(run.seq) }, state, &mut large)?;
    let output = run.output.as_ref().map(|o| payload::pack(id, Slot::Output, o, &mut large)).transpose()?;
    let failure = run.failure.as_ref().map(|f| payload::pack(id, Slot::Failure, f, &mut large)).transpose()?;
    let inserted = sqlx::query(
        "insert into runs (shard, run_id, workflow, definition, workflow_id, status, parked, seq, queue, attributes, inputs, depth,
                           cursor, cursor_seq, waiting, output, failure, started_at, closed_at, imported_at, inbox_n, inbox_seen,
                           first_run_id, continued_from, continued_as)
         values ($1, $2, $3, $4, $5, $6, true, $7, $8, $9, $10, $11, $12, $7, 'imported', $13, $14, $15, $16, engine_now(), $17, $17, $18, $19, $20)
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
    .bind(Json(&*inputs))
    .bind(i32::try_from(run.depth).unwrap_or(i32::MAX))
    .bind(Json(&*state))
    .bind(output.as_deref().map(Json))
    .bind(failure.as_deref().map(Json))
    .bind(run.started_at)
    .bind(run.closed_at)
    .bind(number(messages))
    .bind(run.chain.first.map(|run| run.0))
    .bind(run.chain.continued_from.map(|run| run.0))
    .bind(run.chain.continued_as.map(|run| run.0))
    .execute(&mut *conn)
    .await?;
    if inserted.rows_affected() == 0 {
        return Ok(false);
    }
    // What retention has left behind of this run, until its partition is dropped.
    sqlx::query("delete from history where shard = $1 and run_id = $2")
        .bind(run.run_id.shard())
        .bind(run.run_id.0)
        .execute(&mut *conn)
        .await?;
    blobs::put(conn, &large).await?;
    for former in &archive.header.former {
        super::migrations::note(&mut *conn, run.run_id, former.until, former.definition.hash).await?;
    }
    for rows in archive.history.chunks(BATCH) {
        let mut large = Vec::new();
        let mut events = |r: &HistoryRow| payload::pack(id, Slot::Events { seq: number(r.seq) }, &r.events, &mut large);
        let events: Vec<Text> = rows.iter().map(&mut events).collect::<Result<_>>()?;
        blobs::put(conn, &large).await?;
        let formats = rows.iter().zip(&events).map(|(r, text)| payload::format(text, r.format));
        let formats = formats.map(|format| i16::try_from(format).unwrap_or(i16::MAX));
        sqlx::query(
            "insert into history (shard, run_id, seq, epoch, format, events, at)
             select $1, $2, * from unnest($3::bigint[], $4::bigint[], $5::smallint[], $6::jsonb[], $7::timestamptz[])",
        )
        .bind(run.run_id.shard())
        .bind(run.run_id.0)
        .bind(rows.iter().map(|r| number(r.seq)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| number(r.epoch)).collect::<Vec<_>>())
        .bind(formats.collect::<Vec<_>>())
        .bind(events.iter().map(|events| Json(&**events)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.at).collect::<Vec<_>>())
        .execute(&mut *conn)
        .await?;
    }
    for some in archive.checkpoints.chunks(CHECKPOINTS) {
        let mut large = Vec::new();
        let mut value =
            |c: &Checkpoint| payload::pack(id, Slot::Checkpoint { path: &c.path, key: &c.key }, &c.value, &mut large);
        let values: Vec<Text> = some.iter().map(&mut value).collect::<Result<_>>()?;
        blobs::put(conn, &large).await?;
        sqlx::query(
            "insert into checkpoints (shard, run_id, path, key, value, created_at)
             select $1, $2, * from unnest($3::text[], $4::text[], $5::jsonb[], $6::timestamptz[])",
        )
        .bind(run.run_id.shard())
        .bind(run.run_id.0)
        .bind(some.iter().map(|c| c.path.as_str()).collect::<Vec<_>>())
        .bind(some.iter().map(|c| c.key.as_str()).collect::<Vec<_>>())
        .bind(values.iter().map(|value| Json(&**value)).collect::<Vec<_>>())
        .bind(some.iter().map(|c| c.created_at).collect::<Vec<_>>())
        .execute(&mut *conn)
        .await?;
    }
    Ok(true)
}
