use super::*;
use crate::{MIGRATIONS, embedded::testing::database};
use std::collections::{BTreeMap, BTreeSet};

/// What the statement is told of a run.
#[derive(Clone, Copy, Debug)]
struct Made {
    parent: Option<RunId>,
    origin: Option<RunId>,
    open: bool,
    /// Days since its end.
    ended: i64,
    /// Days since its import.
    imported: Option<i64>,
}

const KEEP: i64 = 90;

impl Made {
    fn is_old(&self) -> bool {
        match (self.imported, self.open) {
            (Some(days), _) => days > KEEP,
            (None, open) => !open && self.ended > KEEP,
        }
    }
}

async fn insert(conn: &mut PgConnection, run: RunId, made: &Made) {
    let status = match (made.open, made.imported) {
        (true, Some(_)) => "quarantined",
        (true, None) => "running",
        (false, _) => "completed",
    };
    sqlx::query(
        "insert into runs (shard, run_id, workflow, definition, status, parked, inputs, closed_at, parent_shard, parent_run_id, parent_path,
                           forked_shard, forked_from, forked_seq, imported_at)
         values ($1, $2, 'w', '\\x00', $3, true, '{}', case when $4 then null else engine_now() - $5 * interval '1 day' end,
                 $6, $7, case when $7::uuid is null then null else 'c' end, $8, $9, case when $9::uuid is null then null else 1 end,
                 engine_now() - $10 * interval '1 day')",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(status)
    .bind(made.open)
    .bind(made.ended as f64)
    .bind(made.parent.map(|p| p.shard()))
    .bind(made.parent.map(|p| p.0))
    .bind(made.origin.map(|p| p.shard()))
    .bind(made.origin.map(|p| p.0))
    .bind(made.imported.map(|days| days as f64))
    .execute(conn)
    .await
    .expect("run");
}

/// Who leaves, by the rule as people say it. `only`: nobody else may.
fn oracle(runs: &BTreeMap<RunId, Made>, asked: &BTreeSet<RunId>, only: bool) -> BTreeSet<RunId> {
    let stays = |run: &RunId, made: &Made| !made.is_old() || (only && !asked.contains(run));
    let mut kept: BTreeSet<RunId> = runs.iter().filter(|(run, made)| stays(run, made)).map(|(run, _)| *run).collect();
    loop {
        let before = kept.len();
        for (run, made) in runs {
            let mut needed = Vec::new();
            if kept.contains(run) {
                needed.extend(made.parent);
                needed.extend(made.origin);
            }
            if made.parent.is_some_and(|parent| kept.contains(&parent)) {
                needed.push(*run);
            }
            kept.extend(needed);
        }
        if kept.len() == before {
            break;
        }
    }
    // Who was not asked for leaves with those it would keep, and only with those.
    let mut reached = asked.clone();
    loop {
        let before = reached.len();
        for (run, made) in runs {
            let relatives: Vec<RunId> = made.parent.iter().chain(&made.origin).copied().collect();
            if relatives.iter().any(|r| reached.contains(r)) {
                reached.insert(*run);
            }
            if reached.contains(run) {
                reached.extend(made.parent);
            }
        }
        if reached.len() == before {
            break;
        }
    }
    reached.difference(&kept).copied().collect()
}

#[tokio::test]
async fn who_leaves_is_who_the_rule_names_in_random_families() {
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query("insert into definitions (hash, name, version, format, source, bundle, ir) values (sha256('x'), 'w', 1, 1, '', '{}', '{}')")
        .execute(&mut *conn)
        .await
        .unwrap();
    // The families matter here, not the definitions.
    sqlx::query("alter table runs drop constraint runs_definition_fkey").execute(&mut *conn).await.unwrap();
    let (mut left, mut kept_old) = (0, 0);
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        sqlx::query("delete from runs").execute(&mut *conn).await.unwrap();
        let mut runs: BTreeMap<RunId, Made> = BTreeMap::new();
        for _ in 0..random.usize(1..40) {
            let others: Vec<RunId> = runs.keys().copied().collect();
            let some = |random: &mut fastrand::Rng, of: f64| {
                (random.f64() < of && !others.is_empty()).then(|| others[random.usize(..others.len())])
            };
            let made = Made {
                parent: some(&mut random, 0.3),
                origin: some(&mut random, 0.2),
                open: random.f64() < 0.06,
                ended: if random.f64() < 0.06 { random.i64(0..KEEP) } else { random.i64(KEEP + 1..400) },
                imported: (random.f64() < 0.1).then(|| random.i64(0..200)).filter(|days| *days != KEEP),
            };
            let run = RunId::new();
            insert(&mut conn, run, &made).await;
            runs.insert(run, made);
        }
        let before = crate::store::runs::now(&mut conn).await.unwrap() - chrono::Duration::days(KEEP);
        let all: Vec<RunId> = runs.keys().copied().collect();
        let some: Vec<RunId> = all.iter().copied().filter(|_| random.f64() < 0.5).collect();
        for (asked, only) in [(&all, false), (&all, true), (&some, false), (&some, true)] {
            let set: BTreeSet<RunId> = asked.iter().copied().collect();
            let found: BTreeSet<RunId> = judge(&mut conn, asked, before, only).await.unwrap().into_iter().collect();
            assert_eq!(found, oracle(&runs, &set, only), "seed {seed}, only {only}: {runs:#?} asked {set:?}");
            assert!(!only || found.is_subset(&set), "seed {seed}");
            left += found.len();
        }
        kept_old +=
            runs.values().filter(|m| m.is_old()).count() - oracle(&runs, &all.iter().copied().collect(), false).len();
        // The look at old runs gives each of them once, in whatever portions.
        let (mut old, mut seen) = (Old::new(Uuid::nil()..Uuid::max(), before), Vec::new());
        loop {
            let page = old.next(&mut conn, 3).await.unwrap();
            let last = page.len() < 3;
            seen.extend(page);
            if last {
                break;
            }
        }
        let expected: BTreeSet<RunId> = runs.iter().filter(|(_, m)| m.is_old()).map(|(run, _)| *run).collect();
        assert_eq!((seen.len(), seen.into_iter().collect::<BTreeSet<_>>()), (expected.len(), expected), "seed {seed}");
    }
    // Both happen.
    assert!(left > 100 && kept_old > 20, "{left} {kept_old}");
}

#[tokio::test]
async fn every_table_with_rows_of_runs_is_listed_or_known_to_stay() {
    let pool = database(MIGRATIONS).await;
    let tables: Vec<String> = sqlx::query_scalar(
        "select c.table_name::text from information_schema.columns c
         join pg_class p on p.relname = c.table_name and not p.relispartition
         where c.table_schema = 'public' and c.column_name in ('shard', 'run_id') group by 1 having count(*) = 2 order by 1",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let mut known: Vec<&str> = OF_A_RUN.to_vec();
    known.extend(["archived_runs", "history", "runs", "schedule_actions"]);
    known.sort_unstable();
    assert_eq!(tables, known, "rows of a retired run must go, or it is said here that they stay");
}

/// A run that ended long ago, of that parent.
fn old(parent: Option<RunId>) -> Made {
    Made { parent, origin: None, open: false, ended: KEEP + 10, imported: None }
}

#[tokio::test]
async fn a_family_that_is_too_large_keeps_nobody_else_and_is_walked_once() {
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query("alter table runs drop constraint runs_definition_fkey").execute(&mut *conn).await.unwrap();
    let parent = RunId::new();
    let children: Vec<RunId> = (0..6).map(|_| RunId::new()).collect();
    let alone: Vec<RunId> = (0..5).map(|_| RunId::new()).collect();
    insert(&mut conn, parent, &old(None)).await;
    for child in &children {
        insert(&mut conn, *child, &old(Some(parent))).await;
    }
    for run in &alone {
        insert(&mut conn, *run, &old(None)).await;
    }
    let before: DateTime<Utc> =
        sqlx::query_scalar("select engine_now() - interval '90 days'").fetch_one(&mut *conn).await.unwrap();
    let all = |runs: &[RunId]| runs.iter().copied().collect::<BTreeSet<_>>();
    // Six may leave together; there are seven. Those who stand beside it leave.
    let mut families = Families::new();
    families.most = 6;
    let page = [&children[..3], &alone[..3]].concat();
    let left = families.judge(&mut conn, page, before).await.unwrap();
    assert_eq!(all(&left), all(&alone[..3]));
    // Of the page, of one child, and of those who stand beside it; whoever else is of the family is known then.
    assert!(families.read <= 7 + 10 + 3 * 2, "{}", families.read);
    // On the next page it is known.
    let page = [&children[3..], &alone[3..]].concat();
    let left = families.judge(&mut conn, page, before).await.unwrap();
    assert_eq!(all(&left), all(&alone[3..]));
    assert_eq!(families.read, 2);
    // One that fits leaves whole with its first, and is not judged again.
    let mut families = Families::new();
    families.most = 7;
    let left = families.judge(&mut conn, children[..1].to_vec(), before).await.unwrap();
    assert_eq!(all(&left), all(&[&children[..], &[parent]].concat()));
    let left = families.judge(&mut conn, children[1..].to_vec(), before).await.unwrap();
    assert_eq!((left.len(), families.read), (0, 0));
}

#[tokio::test]
async fn many_families_that_are_too_large_keep_nobody_else_of_their_page() {
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query("alter table runs drop constraint runs_definition_fkey").execute(&mut *conn).await.unwrap();
    let (mut page, mut free) = (Vec::new(), BTreeSet::new());
    for n in 0..40 {
        let parent = RunId::new();
        insert(&mut conn, parent, &old(None)).await;
        let children: Vec<RunId> = (0..5).map(|_| RunId::new()).collect();
        for child in &children {
            insert(&mut conn, *child, &old(Some(parent))).await;
        }
        // Needed by nobody: it shares rows of a child of the family, which is therefore its kin, but it is none of the family's.
        let fork = RunId::new();
        insert(&mut conn, fork, &Made { origin: Some(children[n % 5]), ..old(None) }).await;
        let alone = RunId::new();
        insert(&mut conn, alone, &old(None)).await;
        free.extend([fork, alone]);
        page.extend([children[0], alone, children[1], parent, fork, children[2]]);
    }
    let before: DateTime<Utc> =
        sqlx::query_scalar("select engine_now() - interval '90 days'").fetch_one(&mut *conn).await.unwrap();
    let mut families = Families::new();
    families.most = 5;
    let left = families.judge(&mut conn, page.clone(), before).await.unwrap();
    assert_eq!((left.len(), left.into_iter().collect::<BTreeSet<_>>()), (free.len(), free), "each once");
    // Of those who stay, nobody is walked again in this look.
    let left = families.judge(&mut conn, page, before).await.unwrap();
    assert_eq!((left.len(), families.read), (0, 0));
}

/// A page of many large families is not read to its end at once; what is left over has its turn.
#[tokio::test]
async fn of_one_page_no_more_is_read_than_the_limit_and_the_rest_is_judged_later() {
    const READ_MAX: usize = 30;
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    sqlx::query("alter table runs drop constraint runs_definition_fkey").execute(&mut *conn).await.unwrap();
    let (mut page, mut free) = (Vec::new(), BTreeSet::new());
    for _ in 0..12 {
        let (parent, alone) = (RunId::new(), RunId::new());
        insert(&mut conn, parent, &old(None)).await;
        for _ in 0..6 {
            insert(&mut conn, RunId::new(), &old(Some(parent))).await;
        }
        insert(&mut conn, alone, &old(None)).await;
        free.insert(alone);
        page.extend([parent, alone]);
    }
    let before: DateTime<Utc> =
        sqlx::query_scalar("select engine_now() - interval '90 days'").fetch_one(&mut *conn).await.unwrap();
    let mut families = Families::new();
    (families.most, families.read_max) = (5, READ_MAX);
    let (mut left, mut looks) = (Vec::new(), 0);
    while left.len() < free.len() {
        left.extend(families.judge(&mut conn, page.clone(), before).await.unwrap());
        // The last family begins below the limit, and is read up to its own.
        assert!(families.read <= READ_MAX + 8, "{}", families.read);
        looks += 1;
        assert!(looks <= page.len(), "{} of {} have left", left.len(), free.len());
    }
    assert!(looks > 2, "{looks}: it was more than one look could read");
    assert_eq!((left.len(), left.into_iter().collect::<BTreeSet<_>>()), (free.len(), free), "each once");
}
