//! Tables `checkpoints` and `attempt_progress`: what a running attempt leaves behind.

use super::{
    blobs,
    spread::{Forms, Spread, bind_shard},
    transitions::Text,
};
use crate::{
    Result,
    hook::AtOnce,
    ids::RunId,
    payload::{self, Slot},
};
use serde_json::Value;
use sqlx::{Arguments, AssertSqlSafe, PgConnection, PgPool, Row, types::Json};

/// A step's value under `key`, and the keys of all that it has, if they are `keys_max` at most.
pub(crate) async fn get_with_keys(
    pool: &PgPool,
    run: RunId,
    path: &str,
    key: &str,
    keys_max: usize,
) -> Result<(Option<Value>, Option<Vec<String>>)> {
    let mut conn = pool.acquire().await?;
    let rows = sqlx::query(
        "select key, case when key = $4 then value end as value from checkpoints where shard = $1 and run_id = $2 and path = $3
         order by key = $4 desc limit $5",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(path)
    .bind(key)
    .bind(i64::try_from(keys_max).unwrap_or(i64::MAX).saturating_add(1))
    .fetch_all(&mut *conn)
    .await?;
    let stored = match rows.first() {
        Some(row) => row.try_get::<Option<payload::Stored<'_>>, _>("value")?,
        None => None,
    };
    let value = payload::read_some(&mut conn, run, Slot::Checkpoint { path, key }, stored).await?;
    if rows.len() > keys_max {
        return Ok((value, None));
    }
    let keys = rows.iter().map(|row| row.try_get("key")).collect::<sqlx::Result<_>>()?;
    Ok((value, Some(keys)))
}

pub(crate) async fn get(pool: &PgPool, run: RunId, path: &str, key: &str) -> Result<Option<Value>> {
    let mut conn = pool.acquire().await?;
    let row = sqlx::query("select value from checkpoints where shard = $1 and run_id = $2 and path = $3 and key = $4")
        .bind(run.shard())
        .bind(run.0)
        .bind(path)
        .bind(key)
        .fetch_optional(&mut *conn)
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(payload::read(&mut conn, run, Slot::Checkpoint { path, key }, row.try_get("value")?).await?))
}

/// Whether `epoch` still owns the run. Holds the row for share: a takeover waits until the caller commits, so everything
/// that a fenced writer stored is there before the next owner looks.
pub(crate) async fn fence(conn: &mut PgConnection, run: RunId, epoch: i64) -> Result<bool> {
    let held: Option<i32> = sqlx::query_scalar(
        "select 1 from runs where shard = $1 and run_id = $2 and epoch = $3 and closed_at is null for share",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(epoch)
    .fetch_optional(conn)
    .await?;
    Ok(held.is_some())
}

/// Stores a value; the first one stays.
pub(crate) async fn put(conn: &mut PgConnection, run: RunId, path: &str, key: &str, value: &Value) -> Result<()> {
    let mut blobs = Vec::new();
    let value = payload::pack(run, Slot::Checkpoint { path, key }, value, &mut blobs)?;
    blobs::put(conn, &blobs).await?;
    crate::committer::crash_point("save.after_blobs");
    sqlx::query(
        "insert into checkpoints (shard, run_id, path, key, value) values ($1, $2, $3, $4, $5) on conflict do nothing",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(path)
    .bind(key)
    .bind(Json(&*value))
    .execute(conn)
    .await?;
    Ok(())
}

/// A checkpoint that is a row of its own.
pub(crate) struct Small<'a> {
    path: &'a str,
    key: &'a str,
    text: Text,
}

/// `None` for a value of which something is to lie apart.
pub(crate) fn small<'a>(run: RunId, path: &'a str, key: &'a str, value: &Value) -> Result<Option<Small<'a>>> {
    let text = payload::pack_small(run, Slot::Checkpoint { path, key }, value)?;
    Ok(text.map(|text| Small { path, key, text }))
}

/// Evaluates what a hook says of a reading behind the fence, and stores a checkpoint if that is true. False if it is not, or if
/// `epoch` does not own the run: then nothing is written.
///
/// # Transaction
/// One statement, without one around it. Holds the run's row for share, as [`fence`].
pub(crate) async fn at_once(
    conn: &mut PgConnection,
    run: RunId,
    epoch: i64,
    hook: AtOnce,
    checkpoint: Option<&Small<'_>>,
) -> Result<bool> {
    let AtOnce { sql, mut arguments } = hook;
    let first = arguments.len();
    let encoded = |error| crate::Error::Sql(sqlx::Error::Encode(error));
    arguments.add(run.shard()).map_err(encoded)?;
    arguments.add(run.0).map_err(encoded)?;
    arguments.add(epoch).map_err(encoded)?;
    let [shard, id, owner, path, key, value] = [1, 2, 3, 4, 5, 6].map(|n| first + n);
    let mut kept = String::new();
    if let Some(small) = checkpoint {
        arguments.add(small.path).map_err(encoded)?;
        arguments.add(small.key).map_err(encoded)?;
        arguments.add(Json(&*small.text)).map_err(encoded)?;
        kept = format!(
            ", kept as (insert into checkpoints (shard, run_id, path, key, value)
                        select ${shard}, ${id}, ${path}, ${key}, ${value} from told where done on conflict do nothing)"
        );
    }
    let statement = format!(
        "with owned as materialized (select from runs where shard = ${shard} and run_id = ${id} and epoch = ${owner} and closed_at is null for share),
              told as materialized (select {sql} as done from owned){kept}
         select coalesce(bool_or(done), false) from told"
    );
    Ok(sqlx::query_scalar_with(AssertSqlSafe(statement), arguments).fetch_one(conn).await?)
}

/// Progress of one attempt.
pub(crate) struct Progress {
    pub(crate) run: RunId,
    pub(crate) path: String,
    pub(crate) attempt: i32,
    pub(crate) value: Value,
}

/// Stores the newest progress of many attempts in one statement; where runs are spread, in one a shard.
pub(crate) async fn put_progress(conn: &mut PgConnection, spread: Spread, progress: &[Progress]) -> Result<()> {
    for (shard, part) in spread.divide(progress.iter().collect(), |p| p.run.shard()) {
        put_progress_in(conn, shard, &part).await?;
    }
    Ok(())
}

/// Which shard new rows are of, Citus reads from the statement as well.
static PUT_PROGRESS: Forms = Forms::new(
    "insert into attempt_progress (shard, run_id, path, attempt, progress)
         select p.shard, p.run_id, p.path, p.attempt, p.progress
         from unnest($1::smallint[], $2::uuid[], $3::text[], $4::int[], $5::jsonb[]) p(shard, run_id, path, attempt, progress)
         where true/*at p*/
         on conflict (shard, run_id, path) do update set attempt = excluded.attempt, progress = excluded.progress, at = engine_now()",
    "$6",
);

async fn put_progress_in(conn: &mut PgConnection, shard: Option<i16>, progress: &[&Progress]) -> Result<()> {
    let shards: Vec<i16> = progress.iter().map(|p| p.run.shard()).collect();
    let runs: Vec<uuid::Uuid> = progress.iter().map(|p| p.run.0).collect();
    let paths: Vec<&str> = progress.iter().map(|p| p.path.as_str()).collect();
    let attempts: Vec<i32> = progress.iter().map(|p| p.attempt).collect();
    let sealed = |p: &&Progress| payload::pack_whole(p.run.0, Slot::Progress { path: &p.path }, &p.value);
    let values: Vec<Text> = progress.iter().map(sealed).collect::<Result<_>>()?;
    let query = sqlx::query(PUT_PROGRESS.text(shard))
        .bind(shards)
        .bind(runs)
        .bind(paths)
        .bind(attempts)
        .bind(values.iter().map(|value| Json(&**value)).collect::<Vec<_>>());
    bind_shard!(query, shard).execute(conn).await?;
    Ok(())
}

/// Newest progress of a run's attempts: path, attempt, value.
pub(crate) async fn progress_of(conn: &mut PgConnection, run: RunId) -> Result<Vec<(String, i32, Value)>> {
    let rows = sqlx::query("select path, attempt, progress from attempt_progress where shard = $1 and run_id = $2")
        .bind(run.shard())
        .bind(run.0)
        .fetch_all(conn)
        .await?;
    rows.iter()
        .map(|row| {
            let path: String = row.try_get("path")?;
            let value = payload::read_whole(run.0, Slot::Progress { path: &path }, row.try_get("progress")?)?;
            Ok((path, row.try_get("attempt")?, value))
        })
        .collect()
}
