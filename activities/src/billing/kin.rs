//! Whose run is whose. The ledger keeps it in a table of its own, `run_kin`, so that what a family has spent is read beside the
//! ledger, wherever the rows of runs lie; what it has to know of `runs` it asks one row at a time, each by its shard.

use loopwright_engine::ids::RunId;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

/// A run, and whom it belongs to. Nothing of it changes but the budget.
#[derive(Clone, Debug)]
pub(super) struct Kin {
    pub run: Uuid,
    first: Option<Uuid>,
    pub forked_from: Option<Uuid>,
    parent: Option<Uuid>,
    path: Option<String>,
    /// Its definition's. Asked of the runs above an attempt's only: that brings its own.
    pub budget: Value,
}

/// Two, and no parameter that says which: Postgres would plan such a one anew each time.
const BARE: &str = "select r.first_run_id, r.forked_from, r.parent_run_id, r.parent_path, null::jsonb
     from runs r where r.shard = $1 and r.run_id = $2";
const WITH_BUDGET: &str = "select r.first_run_id, r.forked_from, r.parent_run_id, r.parent_path, d.ir->'budget'
     from runs r join definitions d on d.hash = r.definition where r.shard = $1 and r.run_id = $2";

impl Kin {
    /// # Transaction
    /// Reads one row. A run that is not there is alone.
    pub async fn of(conn: &mut PgConnection, run: Uuid) -> Result<Self, sqlx::Error> {
        let alone = Self { run, first: None, forked_from: None, parent: None, path: None, budget: Value::Null };
        Ok(Self::find(conn, BARE, run).await?.unwrap_or(alone))
    }

    /// By one of the two statements.
    async fn find(conn: &mut PgConnection, sql: &'static str, run: Uuid) -> Result<Option<Self>, sqlx::Error> {
        type Row = (Option<Uuid>, Option<Uuid>, Option<Uuid>, Option<String>, Option<Value>);
        let row: Option<Row> = sqlx::query_as(sql).bind(RunId(run).shard()).bind(run).fetch_optional(conn).await?;
        Ok(row.map(|(first, forked_from, parent, path, budget)| Self {
            run,
            first,
            forked_from,
            parent,
            path,
            budget: budget.unwrap_or_default(),
        }))
    }

    /// First run of its chain; the run itself if it is in none.
    pub fn first(&self) -> Uuid {
        self.first.unwrap_or(self.run)
    }

    /// The step of its parent that it is below.
    pub fn path(&self) -> &str {
        self.path.as_deref().unwrap_or_default()
    }

    fn is_alone(&self) -> bool {
        self.first.is_none() && self.parent.is_none()
    }
}

/// A run, its parent, and so on: who pays for what the run does. The engine bounds how many they are.
///
/// # Transaction
/// Reads a row for each.
pub(super) async fn line(conn: &mut PgConnection, run: RunId) -> Result<Vec<Kin>, sqlx::Error> {
    let mut line = vec![Kin::of(conn, run.0).await?];
    while let Some(parent) = line.last().and_then(|kin| kin.parent) {
        match Kin::find(conn, WITH_BUDGET, parent).await? {
            Some(kin) => line.push(kin),
            None => break,
        }
    }
    Ok(line)
}

/// Writes down the runs of a line that are not alone, so that the sums of [`super::spent`] find them. With the attempt that begins in the
/// first of them, which says so (`activity_attempts.kin_noted`).
///
/// # Transaction
/// One statement, or none. The user row must be locked: it is one for the whole family, so nobody writes the same rows meanwhile.
pub(super) async fn note(conn: &mut PgConnection, line: &[Kin]) -> Result<(), sqlx::Error> {
    let kin: Vec<&Kin> = line.iter().filter(|kin| !kin.is_alone()).collect();
    if kin.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "insert into run_kin (run_id, first_run_id, parent_run_id, parent_path)
         select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[]) on conflict do nothing",
    )
    .bind(kin.iter().map(|kin| kin.run).collect::<Vec<_>>())
    .bind(kin.iter().map(|kin| kin.first).collect::<Vec<_>>())
    .bind(kin.iter().map(|kin| kin.parent).collect::<Vec<_>>())
    .bind(kin.iter().map(|kin| kin.path.as_deref()).collect::<Vec<_>>())
    .execute(conn)
    .await
    .map(drop)
}
