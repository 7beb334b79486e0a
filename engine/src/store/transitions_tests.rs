use super::*;
use crate::{
    MIGRATIONS,
    admission::OnConflict,
    committer::Committer,
    definition::{Concurrency, Data},
    embedded::testing::database,
    hook::NoHook,
    store::{
        groups,
        ready::tests::{all_dead, only_by_key},
    },
    transaction::{ANSWER_MAX, Session, Transaction, begin},
};
use sqlx::PgPool;
use std::sync::Arc;

/// Two runs, parent and child, each driven by somebody.
async fn family(pool: &PgPool) -> (RunId, RunId) {
    let (parent, child) = (RunId::new(), RunId::new());
    runs(pool, [parent, child]).await;
    (parent, child)
}

async fn runs(pool: &PgPool, both: [RunId; 2]) {
    sqlx::query("insert into definitions (hash, name, version, format, source, bundle, ir) values ($1, 'w', 1, 1, '', '{}', '{}')")
        .bind([7_u8; 32])
        .execute(pool)
        .await
        .expect("definition");
    for run in both {
        sqlx::query("insert into runs (shard, run_id, workflow, definition, status, inputs) values ($1, $2, 'w', $3, 'running', '{}')")
            .bind(run.shard())
            .bind(run.0)
            .bind([7_u8; 32])
            .execute(pool)
            .await
            .expect("run");
    }
}

fn item(run_id: RunId, status: &'static str, effects: Effects) -> Item {
    Item {
        run_id,
        epoch: 0,
        seq: 0,
        status,
        parked: false,
        due: None,
        waiting: None,
        inbox_seen: 0,
        queue: "default".into(),
        topic: Some("topic".into()),
        cursor: None,
        format: 1,
        events: text(&json!([{ "type": "x" }])).expect("JSON"),
        output: None,
        failure: None,
        effects,
    }
}

/// What the committer does with a batch, up to its messages.
async fn written(pool: &PgPool, items: &[Item]) -> (Transaction, Vec<Verdict>) {
    let mut tx = begin(pool).await.expect("begin");
    lock(&mut tx, Some(Spread::Together), items).await.expect("locked");
    let verdicts = send(&mut tx, None, items).await.expect("sent");
    (tx, verdicts)
}

/// Two workers: the parent's stops the child, the child's tells the parent of its end, at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_ends_while_its_parent_stops_it_is_no_deadlock() {
    let pool = database(MIGRATIONS).await;
    let (parent, child) = family(&pool).await;
    let stops = [item(parent, "cancelling", Effects { cancelled_children: vec![(child, None)], ..Effects::default() })];
    let ends = [item(child, "completed", Effects { parent: Some((parent, json!({}))), ..Effects::default() })];
    let (mut first, verdicts) = written(&pool, &stops).await;
    let other = {
        let pool = pool.clone();
        tokio::spawn(async move {
            let (mut tx, verdicts) = written(&pool, &ends).await;
            apply_effects(&mut tx, &ends, &verdicts, &NoHook).await.expect("told");
            tx.commit().await.expect("commit");
        })
    };
    let waiting = "select exists (select from pg_locks where not granted)";
    while !sqlx::query_scalar::<_, bool>(waiting).fetch_one(&pool).await.expect("sql") {
        assert!(!other.is_finished(), "it waits for the parent's row");
    }
    apply_effects(&mut first, &stops, &verdicts, &NoHook).await.expect("told");
    first.commit().await.expect("commit");
    other.await.expect("the other");
    let told: i64 = sqlx::query_scalar("select count(*) from inbox").fetch_one(&pool).await.expect("sql");
    assert_eq!(told, 2);
}

/// A batch that tells nobody takes no locks beforehand; who wakes many runs at once goes by shards.
#[tokio::test]
async fn a_batch_locks_its_runs_in_the_order_of_their_shards() {
    let pool = database(MIGRATIONS).await;
    // The one that is first by its id is second by its shard.
    let (second, first) = loop {
        let (earlier, later) = (RunId::new(), RunId::new());
        if earlier < later && earlier.shard() > later.shard() {
            break (earlier, later);
        }
    };
    runs(&pool, [second, first]).await;
    let lock = "select from runs where shard = $1 and run_id = $2 for no key update nowait";
    let mut other = begin(&pool).await.expect("begin");
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *other).await.expect("pid");
    sqlx::query(lock).bind(first.shard()).bind(first.0).execute(&mut *other).await.expect("locked");
    let hook: Arc<dyn TransitionHook> = Arc::new(NoHook);
    let committer = Committer::start(&pool, Spread::Together, &hook, ANSWER_MAX);
    // Both are queued before the lane has its turn: one batch.
    let batch = async {
        let of = |run| committer.commit(Arc::new(item(run, "running", Effects::default())));
        tokio::join!(of(second), of(first))
    };
    let waits = async {
        let waiting = "select exists (select from pg_stat_activity where $1 = any(pg_blocking_pids(pid)))";
        while !sqlx::query_scalar::<_, bool>(waiting).bind(pid).fetch_one(&pool).await.expect("sql") {}
        let mut third = begin(&pool).await.expect("begin");
        let free = sqlx::query(lock).bind(second.shard()).bind(second.0).execute(&mut *third).await;
        free.expect("it waits for the first and does not have the second");
        third.rollback().await.expect("rollback");
        other.rollback().await.expect("rollback");
    };
    let (answers, ()) = tokio::join!(batch, waits);
    for answer in [answers.0, answers.1] {
        assert_eq!(answer.expect("committed"), Verdict::Accepted { inbox_n: 0 });
    }
}

/// A pass that lets runs into a group, between a batch's lock on a run that waits there and its start of another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_stops_who_waits_in_a_group_and_starts_another_there_is_no_deadlock() {
    let pool = database(MIGRATIONS).await;
    let (parent, waits) = family(&pool).await;
    let group = Concurrency { group: Data::Literal(json!("g")), limit: 1, on_conflict: OnConflict::Queue };
    let ir = json!({ "concurrency": group });
    sqlx::query("update definitions set ir = $1").bind(ir).execute(&pool).await.expect("definition");
    let arrived = "insert into concurrency_groups (name, arrivals) values ('g', 1)";
    sqlx::query(arrived).execute(&pool).await.expect("group");
    sqlx::query("update runs set admitted = false, parked = true where run_id = $1")
        .bind(waits.0)
        .execute(&pool)
        .await
        .expect("held");
    sqlx::query("insert into admissions (shard, run_id, group_name, n, places, on_conflict) values ($1, $2, 'g', 1, 1, 'queue')")
        .bind(waits.shard())
        .bind(waits.0)
        .execute(&pool)
        .await
        .expect("waits");
    let child = Child {
        run_id: RunId::new(),
        workflow: "w".into(),
        definition: DefinitionHash([7; 32]),
        path: "p".into(),
        depth: 1,
        queue: "default".into(),
        attributes: json!({}),
        inputs: json!({}),
    };
    let another = child.run_id;
    let effects = Effects { cancelled_children: vec![(waits, None)], children: vec![child], ..Effects::default() };
    let items = [item(parent, "running", effects)];
    let (mut batch, verdicts) = written(&pool, &items).await;
    let mut pass = begin(&pool).await.expect("begin");
    // A pass that waits for the run here would hold the group until the batch has ended, which waits for the group.
    let let_in = tokio::time::timeout(std::time::Duration::from_secs(20), groups::let_in(&mut pass, "g"));
    assert_eq!(let_in.await.expect("it does not wait").expect("pass"), 0);
    let applied = tokio::spawn(async move {
        apply_effects(&mut batch, &items, &verdicts, &NoHook).await.expect("told");
        batch.commit().await.expect("commit");
    });
    let waiting = "select exists (select from pg_locks where not granted)";
    while !sqlx::query_scalar::<_, bool>(waiting).fetch_one(&pool).await.expect("sql") {
        assert!(!applied.is_finished(), "it waits for the group");
    }
    pass.commit().await.expect("commit");
    applied.await.expect("the batch");
    let mut pass = begin(&pool).await.expect("begin");
    assert_eq!(groups::let_in(&mut pass, "g").await.expect("pass"), 1, "who is stopped came first");
    pass.commit().await.expect("commit");
    let waiting: Vec<uuid::Uuid> =
        sqlx::query_scalar("select run_id from admissions where place is null").fetch_all(&pool).await.expect("sql");
    assert_eq!(waiting, [another.0]);
}

/// One alone and the same in a batch, whether somebody reads along or not.
#[tokio::test]
async fn a_run_alone_is_written_as_it_is_in_a_batch() {
    for topic in [Some("topic"), None] {
        is_written_alike(topic).await;
    }
}

async fn is_written_alike(topic: Option<&str>) {
    let pool = database(MIGRATIONS).await;
    let (one, other) = family(&pool).await;
    let of = |run: RunId| {
        let mut item = item(run, "running", Effects::default());
        (item.cursor, item.output) = (text(&json!({ "n": 1 })).ok(), text(&json!("out")).ok());
        (item.failure, item.inbox_seen) = (text(&json!({ "code": "x" })).ok(), 0);
        item.topic = topic.map(str::to_owned);
        item
    };
    let mut conn = pool.acquire().await.expect("connection");
    let accepted = Verdict::Accepted { inbox_n: 0 };
    assert_eq!(send(&mut conn, None, &[of(one)]).await.expect("sent"), std::slice::from_ref(&accepted));
    let stale = [of(one), of(other)];
    assert_eq!(send(&mut conn, None, &stale).await.expect("sent"), [Verdict::Stale { epoch: 0, seq: 1 }, accepted]);
    assert_eq!(send(&mut conn, None, &[of(one)]).await.expect("sent"), [Verdict::Stale { epoch: 0, seq: 1 }]);
    let alike = "select count(*) from (
           select status, parked, waiting, inbox_seen, owner, cursor, cursor_seq, output, failure, closed_at, seq,
                  (select jsonb_agg(jsonb_build_array(h.seq, h.epoch, h.format, h.events)) from history h where h.run_id = r.run_id) as history,
                  (select jsonb_agg(jsonb_build_array(o.topic, o.seq)) from outbox o where o.run_id = r.run_id) as outbox
           from runs r group by 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13) kinds";
    let kinds: i64 = sqlx::query_scalar(alike).fetch_one(&pool).await.expect("sql");
    assert_eq!(kinds, 1);
}

/// Of many runs, those that a batch locks are found by their keys.
#[tokio::test]
async fn what_a_batch_locks_is_found_by_indexes() {
    let pool = database(MIGRATIONS).await;
    let (one, other) = family(&pool).await;
    let many = "insert into runs (shard, run_id, workflow, definition, status, inputs, first_run_id, continued_from)
                select 1, gen_random_uuid(), 'w', r.definition, 'running', '{}',
                       case when i % 3 = 0 then gen_random_uuid() end, case when i % 3 = 0 then gen_random_uuid() end
                from runs r, generate_series(1, 5000) i where r.run_id = $1";
    sqlx::query(many).bind(one.0).execute(&pool).await.expect("runs");
    sqlx::query("analyze runs").execute(&pool).await.expect("analyze");
    let (shards, runs) = (vec![one.shard(), other.shard()], vec![one.0, other.0]);
    let explain = |sql: &str| sqlx::AssertSqlSafe(format!("explain (analyze, buffers, format json) {sql}"));
    let lock: Value =
        sqlx::query_scalar(explain(LOCK.text(None))).bind(&shards).bind(&runs).fetch_one(&pool).await.expect("sql");
    let open: Value = sqlx::query_scalar(explain(chain::OPEN_RUNS)).bind(&runs).fetch_one(&pool).await.expect("sql");
    for plan in [lock, open] {
        let pages = |kind: &str| plan[0]["Plan"][kind].as_i64().expect("pages");
        let pages = pages("Shared Hit Blocks") + pages("Shared Read Blocks");
        assert!(pages < 60, "{pages} pages: {plan:#}");
    }
}

/// A worker comes up on a new database and keeps its plans: they must not be those for a table without runs.
#[tokio::test]
async fn a_batch_finds_its_runs_by_their_keys_although_it_was_planned_before_there_were_any() {
    let pool = database(MIGRATIONS).await;
    let plan = Session::like(&pool).plan(SEND.text(None), 17).await;
    assert!(plan.contains("Index Scan using runs_pkey on runs r") && !plan.contains("Seq Scan"), "{plan}");
    let pinned = all_dead(&pool).await;
    let plan = Session::like(&pool).plan(SEND.text(None), 17).await;
    for table in ["ready", "admissions", "attempt_progress", "workflow_ids"] {
        assert!(only_by_key(&plan, table, &[&format!("{table}_pkey")]), "{table}: {plan}");
    }
    assert!(!plan.contains("ROW("), "a descent by rows reads what is behind them: {plan}");
    drop(pinned);
}
