use super::*;
use crate::{MIGRATIONS, embedded::testing::database, ids::RunId, migrate};

async fn name_of(conn: &mut PgConnection, run: Uuid) -> Option<String> {
    sqlx::query_scalar("select tableoid::regclass::text from history where run_id = $1")
        .bind(run)
        .fetch_optional(conn)
        .await
        .expect("test")
}

async fn row(conn: &mut PgConnection, run: Uuid, seq: i64) {
    sqlx::query("insert into history (shard, run_id, seq, epoch, format, events) values ($1, $2, $3, 1, 1, '[]')")
        .bind(RunId(run).shard())
        .bind(run)
        .bind(seq)
        .execute(conn)
        .await
        .expect("test");
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("test")
}

/// An id of an instant, with something random behind.
fn id(text: &str) -> Uuid {
    Uuid::from_u128(first_id(at(text)).as_u128() | (0x7u128 << 76) | u128::from(fastrand::u32(..)))
}

#[test]
fn months_are_bounded_by_the_first_ids_of_their_first_instants() {
    let first = month(at("2026-12-31T23:59:59.999Z"), 0).unwrap();
    assert_eq!(first, at("2026-12-01T00:00:00Z"));
    assert_eq!(month(first, 1).unwrap(), at("2027-01-01T00:00:00Z"));
    assert!(id("2026-12-31T23:59:59.999Z") < first_id(at("2027-01-01T00:00:00Z")));
    assert!(id("2027-01-01T00:00:00Z") >= first_id(at("2027-01-01T00:00:00Z")));
    // As the ids of runs say it.
    let now = Utc::now();
    let run = RunId::new();
    assert!(run.0 >= first_id(now) && run.0 < first_id(now + chrono::Duration::seconds(60)));
}

#[tokio::test]
async fn a_new_database_has_the_month_and_those_ahead_and_they_are_made_once_whoever_asks() {
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    let there = list(&mut conn).await.unwrap();
    assert_eq!(there.len(), 3, "{there:?}");
    assert_eq!(there[0].upto, there[1].from);
    let now = Utc::now();
    assert_eq!(there[0].from, Some(first_id(month(now, 0).unwrap())));
    assert_eq!(ahead(&pool, now).await.unwrap(), 0);
    let later = now + chrono::Duration::days(300);
    let made = futures_util::future::join_all((0..4).map(|_| ahead(&pool, later))).await;
    assert!(made.iter().all(Result::is_ok), "{made:?}");
    ahead(&pool, later).await.unwrap();
    assert_eq!(list(&mut conn).await.unwrap().len(), 6);
    // A month whose partition is missing lies in the default one, and in its own from then on.
    let run = id("2031-05-05T00:00:00Z");
    row(&mut conn, run, 1).await;
    assert_eq!(name_of(&mut conn, run).await.unwrap(), "history_default");
    assert_eq!(ahead(&pool, at("2031-05-09T00:00:00Z")).await.unwrap(), 3);
    assert_eq!(name_of(&mut conn, run).await.unwrap(), "history_2031_05");
    // Too much of it: it stays where it is.
    let run = id("2033-05-05T00:00:00Z");
    for seq in 1..=MOVED_ROWS_MAX + 1 {
        row(&mut conn, run, seq).await;
    }
    assert_eq!(ahead(&pool, at("2033-05-09T00:00:00Z")).await.unwrap(), 2, "the months after it");
    let counted: i64 = sqlx::query_scalar("select count(*) from history_default").fetch_one(&mut *conn).await.unwrap();
    assert_eq!(counted, MOVED_ROWS_MAX + 1);
}

#[tokio::test]
async fn who_holds_the_table_is_not_waited_for() {
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    let partition = list(&mut conn).await.unwrap().remove(0);
    let mut reader = transaction::begin(&pool).await.unwrap();
    sqlx::query("select count(*) from history").execute(&mut *reader).await.unwrap();
    let began = std::time::Instant::now();
    assert_eq!(ahead(&pool, at("2031-05-09T00:00:00Z")).await.unwrap(), 0);
    assert_eq!(drop(&pool, &partition).await.unwrap(), Dropped::NotNow);
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    reader.rollback().await.unwrap();
    assert_eq!(drop(&pool, &partition).await.unwrap(), Dropped::Yes { moved: 0 });
    assert_eq!(drop(&pool, &partition).await.unwrap(), Dropped::NotNow, "somebody else was faster");
    assert_eq!(ahead(&pool, at("2031-05-09T00:00:00Z")).await.unwrap(), 3);
}

#[tokio::test]
async fn a_month_with_rows_is_attached_under_the_lock_against_everybody_and_others_are_not() {
    let pool = database(MIGRATIONS).await;
    let mut conn = pool.acquire().await.unwrap();
    let run = id("2031-05-05T00:00:00Z");
    row(&mut conn, run, 1).await;
    // Somebody reads: rows that move from under him would be missing, or be written where they are refused.
    let mut reader = transaction::begin(&pool).await.unwrap();
    sqlx::query("lock table only history in access share mode").execute(&mut *reader).await.unwrap();
    assert_eq!(ahead(&pool, at("2031-05-09T00:00:00Z")).await.unwrap(), 2, "the months without rows");
    assert_eq!(name_of(&mut conn, run).await.unwrap(), "history_default");
    reader.rollback().await.unwrap();
    assert_eq!(ahead(&pool, at("2031-05-09T00:00:00Z")).await.unwrap(), 1);
    assert_eq!(name_of(&mut conn, run).await.unwrap(), "history_2031_05");
}

#[tokio::test]
async fn a_database_with_runs_keeps_them_and_gets_months_beside_them() {
    let older: Vec<_> = MIGRATIONS.iter().copied().filter(|m| m.version < migrate::RETENTION.version).collect();
    let pool = database(&older).await;
    let mut conn = pool.acquire().await.unwrap();
    let next = month(Utc::now(), 1).unwrap();
    let (odd, now, later) = (Uuid::from_u128(7), RunId::new().0, Uuid::from_u128(first_id(next).as_u128() + 5));
    let runs = [odd, now, later];
    for run in runs {
        row(&mut conn, run, 1).await;
    }
    // Workers of the release before go on meanwhile and afterwards.
    migrate::run(&pool, MIGRATIONS).await.unwrap();
    row(&mut conn, now, 2).await;
    row(&mut conn, RunId::new().0, 1).await;
    let mut names = Vec::new();
    for run in runs {
        names.push(name_of(&mut conn, run).await.unwrap());
    }
    assert_eq!(names, ["history_before", "history_before", "history_default"]);
    let there: Vec<_> = list(&mut conn).await.unwrap().into_iter().map(|p| (p.from, p.upto)).collect();
    assert_eq!(there[0], (None, Some(first_id(next))));
    // The row that is ahead moves into its month with the first look.
    assert_eq!(ahead(&pool, Utc::now()).await.unwrap(), 1);
    assert_ne!(name_of(&mut conn, later).await.unwrap(), "history_default");
    let rows: i64 = sqlx::query_scalar("select count(*) from history").fetch_one(&mut *conn).await.unwrap();
    assert_eq!(rows, 5);
}

/// Tables of `history` that a plan has really read.
fn read(node: &serde_json::Value, found: &mut Vec<String>) {
    let table = node["Relation Name"].as_str().unwrap_or_default();
    if table.starts_with("history") && node["Actual Loops"] != 0 {
        found.push(table.to_owned());
    }
    node["Plans"].as_array().into_iter().flatten().for_each(|child| read(child, found));
}

#[tokio::test]
async fn a_load_reads_the_partition_of_its_run_and_no_other() {
    let pool = database(MIGRATIONS).await;
    ahead(&pool, at("2031-05-05T00:00:00Z")).await.unwrap();
    let mut conn = pool.acquire().await.unwrap();
    let filled = "insert into history (shard, run_id, seq, epoch, format, events)
                  select n % 128, overlay(gen_random_uuid()::text placing $1 from 1 for 8)::uuid, 1, 1, 1, '[]' from generate_series(1, 5000) n";
    let (may, june, odd) = (id("2031-05-06T00:00:00Z"), id("2031-06-06T00:00:00Z"), id("2020-01-01T00:00:00Z"));
    for run in [may, june, odd] {
        sqlx::query(filled).bind(&run.to_string()[..8]).execute(&mut *conn).await.unwrap();
        row(&mut conn, run, 1).await;
    }
    for sql in ["analyze history", "set plan_cache_mode = force_generic_plan"] {
        sqlx::query(sql).execute(&mut *conn).await.unwrap();
    }
    execute(&mut conn, format!("prepare tail as {}", crate::store::runs::TAIL.text(None))).await.unwrap();
    for (run, table) in [(may, "history_2031_05"), (june, "history_2031_06"), (odd, "history_default")] {
        let sql = format!(
            "explain (analyze, format json) execute tail(array[{}], array['{run}'::uuid], array[0], array[9])",
            RunId(run).shard()
        );
        let plan: serde_json::Value =
            sqlx::query_scalar(AssertSqlSafe(sql)).persistent(false).fetch_one(&mut *conn).await.unwrap();
        let mut found = Vec::new();
        read(&plan[0]["Plan"], &mut found);
        assert_eq!(found, [table], "{plan:#}");
    }
}
