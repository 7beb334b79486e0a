//! Runs that need each other, and of which therefore all leave or none: found page by page, within bounds.

use super::judge;
use crate::{Result, ids::RunId};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use std::collections::HashMap;
use uuid::Uuid;

/// Most runs that are judged together: they leave in one file and one transaction.
const KIN_MAX: usize = 20_000;
/// Runs that are read for one page, beyond which the rest of it waits for the next look. Chosen: some two hundred families
/// that are too large, each read once.
const READ_MAX: usize = 200 * KIN_MAX;
/// Runs that a look remembers, some 20 bytes each. Beyond that it forgets, and judges some again.
const SEEN_MAX: usize = 1_000_000;

/// The runs that [`super::JUDGE`] would look at, up to one more than `most`.
async fn kin(conn: &mut PgConnection, asked: &[RunId], most: usize) -> Result<Vec<RunId>> {
    let found: Vec<Uuid> = sqlx::query_scalar(
        "with recursive reach as (
           select r.shard, r.run_id from unnest((select $1::smallint[]), (select $2::uuid[])) a(shard, run_id) join runs r using (shard, run_id)
           union
           select n.shard, n.run_id from reach k cross join lateral (
             select p.shard, p.run_id from runs c join runs p on p.shard = c.parent_shard and p.run_id = c.parent_run_id
             where c.shard = k.shard and c.run_id = k.run_id
             union all select c.shard, c.run_id from runs c where c.parent_run_id = k.run_id
             union all select f.shard, f.run_id from runs f where f.forked_from = k.run_id) n)
         select run_id from reach limit $3",
    )
    .bind(asked.iter().map(RunId::shard).collect::<Vec<i16>>())
    .bind(asked.iter().map(|run| run.0).collect::<Vec<Uuid>>())
    .bind(i64::try_from(most.saturating_add(1)).unwrap_or(i64::MAX))
    .fetch_all(conn)
    .await?;
    Ok(found.into_iter().map(RunId).collect())
}

/// Parents, children and forks of some runs, at most `most` of them. Of each run it is said whether it is of the house of the one asked
/// for, that is, reached by parents and children alone; and so of each answer.
async fn relatives(conn: &mut PgConnection, runs: &[(RunId, bool)], most: usize) -> Result<Vec<(RunId, bool)>> {
    let found: Vec<(Uuid, bool)> = sqlx::query_as(
        "select n.run_id, bool_or(k.house and n.kin)
         from unnest((select $1::smallint[]), (select $2::uuid[]), (select $3::bool[])) k(shard, run_id, house) cross join lateral (
           select p.run_id, true as kin from runs c join runs p on p.shard = c.parent_shard and p.run_id = c.parent_run_id
           where c.shard = k.shard and c.run_id = k.run_id
           union all (select c.run_id, true from runs c where c.parent_run_id = k.run_id limit $4)
           union all (select f.run_id, false from runs f where f.forked_from = k.run_id limit $4)) n
         group by n.run_id limit $4",
    )
    .bind(runs.iter().map(|(run, _)| run.shard()).collect::<Vec<i16>>())
    .bind(runs.iter().map(|(run, _)| run.0).collect::<Vec<Uuid>>())
    .bind(runs.iter().map(|(_, house)| *house).collect::<Vec<bool>>())
    .bind(i64::try_from(most).unwrap_or(i64::MAX))
    .fetch_all(conn)
    .await?;
    Ok(found.into_iter().map(|(run, house)| (RunId(run), house)).collect())
}

/// Whom a run would take with it.
struct Walked {
    /// Those among them who would take the same.
    house: Vec<RunId>,
    family: Vec<RunId>,
    /// They are too many, and not all of them are here.
    large: bool,
}

/// Judges page after page of one look. Who was judged with a page before is not judged again, and a family that is too large to
/// leave together keeps nobody but itself.
pub(crate) struct Families {
    pub(super) most: usize,
    /// [`READ_MAX`].
    pub(super) read_max: usize,
    /// Runs that were looked at, and whether they belong to a family that is too large.
    seen: HashMap<RunId, bool>,
    /// Runs that were read for the page.
    pub(super) read: usize,
}

impl Families {
    pub(crate) fn new() -> Self {
        Self { most: KIN_MAX, read_max: READ_MAX, seen: HashMap::new(), read: 0 }
    }

    /// The runs that leave if those of a page are to: see [`super::JUDGE`].
    pub(crate) async fn judge(
        &mut self,
        conn: &mut PgConnection,
        mut asked: Vec<RunId>,
        before: DateTime<Utc>,
    ) -> Result<Vec<RunId>> {
        self.read = 0;
        asked.retain(|run| !self.seen.contains_key(run));
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        let reached = kin(conn, &asked, self.most).await?;
        self.read += reached.len();
        if reached.len() <= self.most {
            let leaving = judge(conn, &asked, before, false).await?;
            // Those of the page are not asked for again.
            self.see(reached.into_iter().chain(asked), false);
            return Ok(leaving);
        }
        // Somebody's family is too large: one after the other, by chance, so that what is left over is not the same each time.
        fastrand::shuffle(&mut asked);
        let (mut leaving, mut fit, mut fitting) = (Vec::new(), Vec::new(), 0);
        for (n, run) in asked.iter().enumerate() {
            if self.seen.contains_key(run) {
                continue;
            }
            if self.read >= self.read_max {
                tracing::warn!(
                    runs = asked.len() - n,
                    "runs among too many large families are looked at again at the next look"
                );
                break;
            }
            let Walked { house, family, large } = self.walk(conn, *run).await?;
            if large {
                tracing::warn!(run_id = %run, most = self.most, "a run with too many children, parents and forks to leave in one file stays, and they with it");
                // A fork may leave without the run that it began from.
                self.see(house.into_iter(), true);
                continue;
            }
            if fitting + family.len() > self.most {
                leaving.extend(judge(conn, &fit, before, false).await?);
                (fit, fitting) = (Vec::new(), 0);
            }
            fitting += family.len();
            fit.push(*run);
            self.see(family.into_iter(), false);
        }
        if !fit.is_empty() {
            leaving.extend(judge(conn, &fit, before, false).await?);
        }
        Ok(leaving)
    }

    /// Looks at those who need a run, or whom it needs, until they are too many. It ends where it meets somebody who is known to have
    /// too many: of a parent with a million children each but the first costs one statement.
    async fn walk(&mut self, conn: &mut PgConnection, run: RunId) -> Result<Walked> {
        let (mut family, mut edge) = (HashMap::from([(run, true)]), vec![(run, true)]);
        let mut large = false;
        while !edge.is_empty() && !large {
            let next = relatives(conn, &edge, self.most + 1 + family.len()).await?;
            self.read += next.len() + 1;
            large = next.iter().any(|(run, _)| self.seen.get(run) == Some(&true));
            edge.clear();
            for (run, house) in next {
                if family.get(&run).is_none_or(|known| house && !known) {
                    family.insert(run, house);
                    edge.push((run, house));
                }
            }
            large |= family.len() > self.most;
        }
        let house = family.iter().filter(|(_, house)| **house).map(|(run, _)| *run).collect();
        Ok(Walked { house, family: family.into_keys().collect(), large })
    }

    fn see(&mut self, runs: impl Iterator<Item = RunId>, large: bool) {
        if self.seen.len() > SEEN_MAX {
            self.seen.clear();
        }
        self.seen.extend(runs.map(|run| (run, large)));
    }
}
