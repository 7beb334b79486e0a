//! Table `outbox`: the transitions of runs that have a topic, written with them, for whoever reads along.

use super::spread::{Forms, Spread, bind_shard};
use crate::{Result, ids::RunId};
use sqlx::PgConnection;
use std::collections::BTreeSet;
use uuid::Uuid;

/// Rows that somebody else is taking are passed over.
static TAKE: Forms = Forms::new(
    "delete from outbox o where (o.shard, o.id) in
       (select s.shard, s.id from outbox s where s.topic = $1/*at s*/ order by s.id limit $2 for update skip locked)/*at o*/
     returning o.run_id",
    "$3",
);

/// Takes the oldest rows of a topic, at most `limit`. Returns whose they are, each run once.
///
/// # Transaction
/// The caller's: rolled back, they are there again.
pub(crate) async fn take(conn: &mut PgConnection, topic: &str, limit: u32) -> Result<BTreeSet<RunId>> {
    // Where runs are spread, a look that locks nothing may go everywhere.
    let found: Vec<Uuid> = sqlx::query_scalar("select run_id from outbox where topic = $1 order by id limit $2")
        .bind(topic)
        .bind(i64::from(limit))
        .fetch_all(&mut *conn)
        .await?;
    let found: Vec<RunId> = found.into_iter().map(RunId).collect();
    let mut runs = BTreeSet::new();
    for (shard, part) in Spread::among(conn, &found).await?.divide(found, |run| run.shard()) {
        let most = i64::try_from(part.len()).unwrap_or(i64::MAX);
        let query = sqlx::query_scalar(TAKE.text(shard)).bind(topic).bind(most);
        let taken: Vec<Uuid> = bind_shard!(query, shard).fetch_all(&mut *conn).await?;
        runs.extend(taken.into_iter().map(RunId));
    }
    Ok(runs)
}
