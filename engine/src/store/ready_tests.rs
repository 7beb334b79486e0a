use super::*;
use crate::{MIGRATIONS, admission::lane, embedded::testing::database, store::turns::Turns};
use serde_json::Value;
use sqlx::PgPool;
use std::collections::BTreeMap;

/// `n` runs of a key in the queue, due `ago` seconds ago.
async fn queue(pool: &PgPool, key: &str, n: i32, priority: i16, timed: bool, ago: i32) {
    sqlx::query(
        "insert into ready (shard, run_id, queue, priority, lane, timed, due_at)
         select 0, gen_random_uuid(), 'default', $3, $2, $4, engine_now() - $5 * interval '1 second' + i * interval '1 microsecond'
         from generate_series(1, $1) i",
    )
    .bind(n)
    .bind(lane(key))
    .bind(priority)
    .bind(timed)
    .bind(ago)
    .execute(pool)
    .await
    .expect("test");
}

fn by_key(due: &[Due], keys: &[&str]) -> BTreeMap<String, usize> {
    keys.iter().map(|key| ((*key).to_owned(), due.iter().filter(|d| d.lane == lane(key)).count())).collect()
}

/// Pages that a statement touches.
async fn pages(pool: &PgPool, sql: &str, since: Option<DateTime<Utc>>, more: &[i64]) -> i64 {
    let explain = format!("explain (analyze, buffers, format json) {sql}");
    let mut query = sqlx::query_scalar(sqlx::AssertSqlSafe(explain)).bind(vec!["default".to_owned()]).bind(since);
    for n in more {
        query = query.bind(*n);
    }
    let plan: Value = query.fetch_one(pool).await.expect("sql");
    let plan = &plan[0]["Plan"];
    plan["Shared Hit Blocks"].as_i64().expect("pages") + plan["Shared Read Blocks"].as_i64().expect("pages")
}

#[tokio::test]
async fn a_key_with_100_000_runs_does_not_hide_a_key_with_one() {
    let pool = database(MIGRATIONS).await;
    queue(&pool, "big", 100_000, 3, false, 100).await;
    // Parked runs of others, whose instants lie ahead, are not in the way.
    for n in 0..100 {
        queue(&pool, &format!("parked-{n}"), 200, 3, true, -3_600).await;
    }
    queue(&pool, "small", 1, 3, false, 1).await;
    sqlx::query("analyze ready").execute(&pool).await.expect("sql");
    let queues = ["default".to_owned()];
    for limit in [1, 256] {
        let look = due(&mut Session::like(&pool), Spread::Together, &queues, None, limit).await.expect("sql");
        assert!(!look.all);
        assert_eq!(by_key(&look.due, &["small", "big"])["small"], 1, "limit {limit}");
        let order = Turns::default().order(look.due);
        assert!(order.iter().take(2).any(|d| d.lane == lane("small")), "limit {limit}: in the first two turns");
    }
    // Whoever has much here already comes later, also when there is one place only.
    let mut turns = Turns::default();
    turns.took(lane("big"));
    let look = due(&mut Session::like(&pool), Spread::Together, &queues, None, 1).await.expect("sql");
    assert_eq!(turns.order(look.due)[0].lane, lane("small"));

    // Bounded: 513 rows in the window; a few descents and rows for each of five priorities. The table has 120,001 rows.
    let window = pages(&pool, WINDOW_SQL.text(None), None, &[513]).await;
    assert!(window < 1_000, "the window touches {window} pages");
    let lanes = pages(
        &pool,
        &BY_LANE_SQL.text(None).replace("$3::int", "$3::int8::int").replace("$3 - 1", "$3::int8::int - 1"),
        None,
        &[0, LANES, 256],
    )
    .await;
    assert!(lanes < 1_500, "from lane to lane touches {lanes} pages");
}

#[tokio::test]
async fn what_waits_already_is_not_read_to_find_what_has_just_come_due() {
    let pool = database(MIGRATIONS).await;
    queue(&pool, "waits", 50_000, 3, false, 100).await;
    queue(&pool, "came", 10, 3, true, 1).await;
    queue(&pool, "comes", 5_000, 3, true, -3_600).await;
    sqlx::query("analyze ready").execute(&pool).await.expect("sql");
    let explain = format!("explain (analyze, buffers, format json) {}", NOTE_SQL.text(None));
    let plan: Value = sqlx::query_scalar(sqlx::AssertSqlSafe(explain))
        .bind(["default".to_owned()])
        .bind(NOTED)
        .fetch_one(&pool)
        .await
        .expect("sql");
    let pages = plan[0]["Plan"]["Shared Hit Blocks"].as_i64().expect("pages")
        + plan[0]["Plan"]["Shared Read Blocks"].as_i64().expect("pages");
    assert!(pages < 300, "ten runs of 55,010 are found in {pages} pages");
    let timed: i64 = sqlx::query_scalar("select count(*) from ready where timed").fetch_one(&pool).await.expect("sql");
    assert_eq!(timed, 5_000, "the ten are noted");
}

/// An old snapshot keeps what was claimed, and more than a window is due: the next look begins at the oldest run that is left.
#[tokio::test]
async fn a_long_queue_behind_dead_rows_is_looked_at_from_its_oldest_run_on() {
    let pool = database(MIGRATIONS).await;
    queue(&pool, "claimed", 50_000, 3, false, 600).await;
    let mut pinned = pool.begin().await.expect("transaction");
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *pinned).await.expect("sql");
    sqlx::query("select count(*) from ready").execute(&mut *pinned).await.expect("sql");
    sqlx::query("delete from ready").execute(&pool).await.expect("sql");
    queue(&pool, "waiting", 2_000, 3, false, 60).await;
    sqlx::query("analyze ready").execute(&pool).await.expect("sql");
    let queues = ["default".to_owned()];
    let mut session = Session::like(&pool);
    let look = due(&mut session, Spread::Together, &queues, None, 256).await.expect("sql");
    assert!(!look.all && look.oldest == look.due.iter().map(|due| due.due_at).min(), "{:?}", look.oldest);
    let again = due(&mut session, Spread::Together, &queues, look.oldest, 256).await.expect("sql");
    assert!(!again.all && again.oldest == look.oldest && again.due.len() == look.due.len(), "nothing is left out");
    let lanes = BY_LANE_SQL.text(None).replace("$3::int", "$3::int8::int").replace("$3 - 1", "$3::int8::int - 1");
    for (sql, more) in [(WINDOW_SQL.text(None).to_owned(), &[513][..]), (lanes, &[0, LANES, 256])] {
        let whole = pages(&pool, &sql, None, more).await;
        let from = pages(&pool, &sql, look.oldest, more).await;
        assert!(whole > 2 * from, "{whole} pages, from the oldest on {from}");
    }
}

#[tokio::test]
async fn a_look_at_many_lanes_begins_anywhere_and_leaves_nobody_out() {
    let pool = database(MIGRATIONS).await;
    let keys: Vec<String> = (0..600).map(|n| format!("key-{n}")).collect();
    for key in &keys {
        queue(&pool, key, 2, 3, false, 10).await;
    }
    let queues = ["default".to_owned()];
    let mut seen = std::collections::BTreeSet::new();
    for first in (i32::MIN..=i32::MAX).step_by(1 << 25) {
        let found =
            by_lane(&mut pool.acquire().await.expect("connection"), None, &queues, None, 8, first).await.expect("sql");
        let lanes: std::collections::BTreeSet<i32> = found.iter().map(|d| d.lane).collect();
        assert!(lanes.len() >= 64 && lanes.len() <= 128, "{}", lanes.len());
        seen.extend(lanes);
    }
    assert_eq!(seen.len(), 600);
}

#[tokio::test]
async fn priorities_go_first_and_timers_that_are_over_wait_like_the_rest() {
    let pool = database(MIGRATIONS).await;
    queue(&pool, "big", 2_000, 3, false, 100).await;
    queue(&pool, "late", 1, 3, true, 1).await;
    queue(&pool, "urgent", 3, 1, false, 0).await;
    let queues = ["default".to_owned()];
    let look = due(&mut Session::like(&pool), Spread::Together, &queues, None, 16).await.expect("sql");
    let found = by_key(&look.due, &["late", "urgent", "big"]);
    assert_eq!((found["late"], found["urgent"]), (1, 3), "{found:?}");
    let order = Turns::default().order(look.due);
    assert!(order[..3].iter().all(|d| d.priority == 1) && order[3..].iter().all(|d| d.priority == 3));
    assert!(order[3..5].iter().any(|d| d.lane == lane("late")));
}

#[tokio::test]
async fn the_depth_of_a_queue_is_what_is_due_and_for_how_long() {
    let pool = database(MIGRATIONS).await;
    assert_eq!(depths(&mut Session::like(&pool), Spread::Together).await.expect("test"), []);
    queue(&pool, "a", 3, 3, false, 60).await;
    queue(&pool, "b", 5, 3, true, -60).await;
    sqlx::query("insert into ready (shard, run_id, queue, timed, due_at) values (0, gen_random_uuid(), 'gpu', true, engine_now() + interval '1 hour')")
        .execute(&pool)
        .await
        .expect("test");
    let found = depths(&mut Session::like(&pool), Spread::Together).await.expect("sql");
    let seen: Vec<(&str, i64)> = found.iter().map(|d| (d.queue.as_str(), d.due)).collect();
    assert_eq!(seen, [("default", 3), ("gpu", 0)]);
    assert!((59.0..120.0).contains(&found[0].oldest_s) && found[1].oldest_s == 0.0, "{found:?}");
    // What asks for labels is another queue.
    sqlx::query("insert into ready (shard, run_id, queue) values (0, gen_random_uuid(), 'default[gpu,linux]'), (0, gen_random_uuid(), 'default[gpu,linux]')")
        .execute(&pool)
        .await
        .expect("test");
    let found = depths(&mut Session::like(&pool), Spread::Together).await.expect("sql");
    let labelled: Vec<i64> = found.iter().filter(|d| d.queue == "default[gpu,linux]").map(|d| d.due).collect();
    assert_eq!((labelled, found.len()), (vec![2], 3));
    let mut there = keys(&mut Session::like(&pool), Spread::Together, None).await.expect("sql");
    assert_eq!(keys(&mut Session::like(&pool), Spread::Together, Some(&there[0])).await.expect("sql"), there[1..]);
    assert!(keys(&mut Session::like(&pool), Spread::Together, Some(&there[2])).await.expect("sql").is_empty());
    there.sort();
    assert_eq!(there, ["default", "default[gpu,linux]", "gpu"]);
    // Deep is deep enough.
    queue(&pool, "a", 11_000, 3, false, 10).await;
    assert_eq!(depths(&mut Session::like(&pool), Spread::Together).await.expect("test")[0].due, DEPTH_MAX);
}

#[tokio::test]
async fn a_claim_finds_its_runs_by_their_keys_although_it_was_planned_before_there_were_any() {
    let pool = database(MIGRATIONS).await;
    let plan = Session::like(&pool).plan(TAKE.text(None), 4).await;
    assert!(!plan.contains("Seq Scan"), "{plan}");
    let pinned = all_dead(&pool).await;
    let plan = Session::like(&pool).plan(TAKE.text(None), 4).await;
    assert!(only_by_key(&plan, "ready", &["ready_pkey"]), "{plan}");
    let plan = Session::like(&pool).plan(TAKE_MESSAGED.text(None), 3).await;
    let delete = plan.split_once("Delete on ready").expect("delete").1;
    assert!(only_by_key(delete, "ready", &["ready_pkey"]), "{plan}");
    drop(pinned);
}

/// A descent by a comparison of rows goes on to the end of the first column: a third of this index.
#[tokio::test]
async fn a_claim_reads_nothing_of_the_runs_that_stand_behind_its_own() {
    let pool = database(MIGRATIONS).await;
    queue(&pool, "parked", 50_000, 3, true, -3_600).await;
    sqlx::query("insert into definitions (hash, name, version, format, source, bundle, ir) values (decode(repeat('07', 32), 'hex'), 'w', 1, 1, '', '{}', '{}')")
        .execute(&pool)
        .await
        .expect("definition");
    let due: Vec<uuid::Uuid> = sqlx::query_scalar(
        "with due as (update ready set due_at = engine_now() - interval '1 second'
                      where run_id in (select run_id from ready order by run_id limit 10) returning shard, run_id)
         insert into runs (shard, run_id, workflow, definition, status, inputs, parked)
         select shard, run_id, 'w', decode(repeat('07', 32), 'hex'), 'running', '{}', true from due returning run_id",
    )
    .fetch_all(&pool)
    .await
    .expect("runs");
    sqlx::query("analyze ready").execute(&pool).await.expect("sql");
    let explain = format!("explain (analyze, buffers, format json) {}", TAKE.text(None));
    let plan: Value = sqlx::query_scalar(sqlx::AssertSqlSafe(explain))
        .bind(uuid::Uuid::now_v7())
        .bind(vec![0_i16; due.len()])
        .bind(&due)
        .bind(10_i64)
        .fetch_one(&pool)
        .await
        .expect("plan");
    let plan = &plan[0]["Plan"];
    assert_eq!(plan["Actual Rows"], 10, "{plan:#}");
    let pages = plan["Shared Hit Blocks"].as_i64().expect("pages");
    assert!(pages < 400, "{pages} pages: {plan:#}");
}

/// Tables that are mostly empty, full of dead rows that a snapshot pins, and statistics by which they are empty.
pub(crate) async fn all_dead(pool: &PgPool) -> sqlx::Transaction<'static, sqlx::Postgres> {
    queue(pool, "claimed", 5_000, 3, false, 600).await;
    for fill in [
        "insert into admissions (shard, run_id, not_before) select shard, run_id, now() from ready",
        "insert into attempt_progress (shard, run_id, path, attempt, progress) select shard, run_id, 'a', 1, '1' from ready",
        "insert into workflow_ids (workflow_id, shard, run_id) select run_id, shard, run_id from ready",
    ] {
        sqlx::query(fill).execute(pool).await.expect("rows");
    }
    let mut pinned = pool.begin().await.expect("transaction");
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *pinned).await.expect("sql");
    sqlx::query("select count(*) from ready").execute(&mut *pinned).await.expect("sql");
    for table in ["ready", "admissions", "attempt_progress", "workflow_ids"] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("delete from {table}"))).execute(pool).await.expect("deleted");
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("vacuum analyze {table}"))).execute(pool).await.expect("analyzed");
    }
    pinned
}

/// Whether a plan reads a table by these indexes only, and each by a condition on it.
pub(crate) fn only_by_key(plan: &str, table: &str, indexes: &[&str]) -> bool {
    let lines: Vec<&str> = plan.lines().map(str::trim).collect();
    let scans = lines.iter().zip(&lines[1..]).filter(|(line, _)| {
        line.contains(&format!("Scan using {table}_")) || line.contains(&format!("Index Scan on {table}_"))
    });
    let mut seen = 0;
    let all = scans.inspect(|_| seen += 1).all(|(line, next)| {
        indexes.iter().any(|index| line.contains(&format!(" {index} "))) && next.starts_with("Index Cond: ")
    });
    all && seen > 0 && !plan.contains(&format!("Seq Scan on {table}"))
}

/// 5,000 runs that one worker owns stand in the index of owners; a takeover of another does not walk over them.
#[tokio::test]
async fn a_takeover_does_not_read_what_the_living_own() {
    let pool = database(MIGRATIONS).await;
    sqlx::query("insert into definitions (hash, name, version, format, source, bundle, ir) values (decode(repeat('07', 32), 'hex'), 'w', 1, 1, '', '{}', '{}')")
        .execute(&pool)
        .await
        .expect("definition");
    sqlx::query(
        "insert into runs (shard, run_id, workflow, definition, status, inputs, owner)
         select 0, gen_random_uuid(), 'w', decode(repeat('07', 32), 'hex'), 'running', '{}', $1 from generate_series(1, 5000)",
    )
    .bind(uuid::Uuid::now_v7())
    .execute(&pool)
    .await
    .expect("runs");
    let explain = format!("explain (analyze, buffers, format json) {}", crate::store::workers::TAKE_OVER.text(None));
    let plan: Value = sqlx::query_scalar(sqlx::AssertSqlSafe(explain))
        .bind(vec![uuid::Uuid::now_v7()])
        .bind(100_i64)
        .fetch_one(&pool)
        .await
        .expect("plan");
    let pages = plan[0]["Plan"]["Shared Hit Blocks"].as_i64().expect("pages");
    assert!(pages < 20, "{pages} pages: {plan:#}");
}
