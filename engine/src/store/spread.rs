//! Where the rows of runs lie: together on one server, or spread over nodes by `shard`, as Citus does it.
//!
//! Citus takes a statement that changes rows inside `with`, or that locks rows and skips others, only if it goes to one shard, and that
//! must stand in it as one value. So there what concerns many runs is said shard by shard. On one server nothing is divided: no
//! statement more, no batch smaller, and the texts are the same.

use crate::{
    Result,
    ids::{RunId, SHARDS},
};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use std::{collections::BTreeMap, sync::OnceLock};

/// A setting of the database, so that all of its workers agree: `on` and `off` say it, otherwise Citus is asked.
/// `alter database … set loopwright.shard_batches = 'on'`; read when a worker starts.
pub(crate) const SETTING: &str = "loopwright.shard_batches";

/// Whether one statement may touch runs of several shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    Together,
    ByShard,
}

impl Spread {
    /// What the database of this pool wants. On a session of its own: a pool's may be older than the setting.
    pub(crate) async fn of(pool: &PgPool) -> Result<Self> {
        let mut conn = pool.connect_options().connect().await?;
        let spread = Self::here(&mut conn).await?;
        conn.close().await?;
        Ok(spread)
    }

    /// What the database of this session wants.
    async fn here(conn: &mut PgConnection) -> Result<Self> {
        let asked: Option<String> =
            sqlx::query_scalar("select current_setting($1, true)").bind(SETTING).fetch_one(&mut *conn).await?;
        let by_shard = match asked.as_deref() {
            Some("on") => true,
            Some("off") => false,
            _ => {
                let citus = "select exists (select from pg_extension where extname = 'citus')";
                let runs = "select exists (select from pg_dist_partition where logicalrelid = 'runs'::regclass)";
                // The second table is the extension's.
                sqlx::query_scalar(citus).fetch_one(&mut *conn).await?
                    && sqlx::query_scalar(runs).fetch_one(&mut *conn).await?
            }
        };
        Ok(if by_shard { Self::ByShard } else { Self::Together })
    }

    /// How to speak of these runs, for who is no worker and has not asked at its start. Runs of one shard are spoken of as such
    /// anywhere, so only for several the database is asked.
    pub(crate) async fn among(conn: &mut PgConnection, runs: &[RunId]) -> Result<Self> {
        match runs.split_first() {
            Some((first, others)) if others.iter().any(|run| run.shard() != first.shard()) => Self::here(conn).await,
            _ => Ok(Self::ByShard),
        }
    }

    /// What a look at all runs goes through: everything at once, or every shard, beginning at `first`.
    pub(crate) fn parts(self, first: i16) -> impl Iterator<Item = Option<i16>> {
        let parts = if self == Self::Together { 1 } else { SHARDS };
        (0..parts).map(move |n| (self == Self::ByShard).then(|| (first + n) % SHARDS))
    }

    /// What concerns these runs, as it may be said in one statement each. By ascending shards: who locks runs does it in
    /// the order of their shards first and then of their ids.
    pub(crate) fn divide<T>(self, all: Vec<T>, shard: impl Fn(&T) -> i16) -> Vec<(Option<i16>, Vec<T>)> {
        if all.is_empty() {
            return Vec::new();
        }
        if self == Self::Together {
            return vec![(None, all)];
        }
        let mut parts: BTreeMap<i16, Vec<T>> = BTreeMap::new();
        for one in all {
            parts.entry(shard(&one)).or_default().push(one);
        }
        parts.into_iter().map(|(shard, part)| (Some(shard), part)).collect()
    }
}

/// Binds the shard of a statement's second form, behind everything else.
macro_rules! bind_shard {
    ($query:expr, $shard:expr) => {{
        let (query, shard) = ($query, $shard);
        if let Some(shard) = shard { query.bind(shard) } else { query }
    }};
}
pub(crate) use bind_shard;

/// A statement in both forms. Where its text says `/*at r*/`, the one for a single shard compares `r.shard` with its last parameter;
/// what stands between two `/*together*/` it leaves out.
pub(crate) struct Forms {
    text: &'static str,
    /// The last parameter of the second form.
    shard: &'static str,
    both: OnceLock<[String; 2]>,
}

impl Forms {
    pub(crate) const fn new(text: &'static str, shard: &'static str) -> Self {
        Self { text, shard, both: OnceLock::new() }
    }

    /// The statement for whatever shards, or for one.
    pub(crate) fn text(&'static self, shard: Option<i16>) -> &'static str {
        let [all, one] = self.both.get_or_init(|| {
            let (mut all, mut one) = (String::new(), String::new());
            for (n, part) in self.text.split("/*at ").enumerate() {
                let (alias, rest) = if n == 0 { ("", part) } else { part.split_once("*/").unwrap_or((part, "")) };
                if n > 0 {
                    one += &format!(" and {alias}.shard = {}", self.shard);
                }
                all += rest;
                one += rest;
            }
            let one = one.split("/*together*/").step_by(2).collect();
            [all.replace("/*together*/", ""), one]
        });
        if shard.is_none() { all } else { one }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_one_shard_names_it_and_the_rest_is_the_same() {
        static FORMS: Forms =
            Forms::new("select 1/*together*/, 2/*together*/ from a join b on b.x = a.x/*at a*//*at b*/ where $1", "$2");
        assert_eq!(FORMS.text(None), "select 1, 2 from a join b on b.x = a.x where $1");
        let one = "select 1 from a join b on b.x = a.x and a.shard = $2 and b.shard = $2 where $1";
        assert_eq!(FORMS.text(Some(7)), one);
    }

    #[test]
    fn every_shard_has_its_turn_and_what_lies_together_is_not_divided() {
        let parts: Vec<_> = Spread::ByShard.parts(126).collect();
        assert_eq!(parts.len(), 128);
        assert_eq!(parts[..3], [Some(126), Some(127), Some(0)]);
        assert_eq!(Spread::Together.parts(5).collect::<Vec<_>>(), [None]);
        assert_eq!(Spread::ByShard.divide(vec![3, 1, 3], |n| *n), [(Some(1), vec![1]), (Some(3), vec![3, 3])]);
        assert_eq!(Spread::Together.divide(vec![3, 1, 3], |n| *n), [(None, vec![3, 1, 3])]);
        assert_eq!(Spread::Together.divide(Vec::<i16>::new(), |n| *n), []);
    }
}
