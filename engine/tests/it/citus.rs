//! The path to Citus: every statement that a run's steps send reaches its tables by `shard`, which they are distributed by. See
//! `deploy/citus.sql`.
//!
//! The statements are those that were really sent: a process of its own listens to sqlx while runs do everything, and asks Postgres
//! for the generic plan of each. There is no Citus here; that it takes them as they are is not claimed.

mod runs;

use crate::{bench::Bench, faults::DATABASE};
use loopwright_engine::{
    embedded::testing::{database, url},
    testing::routes::{DISTRIBUTED, Judged, REFERENCE, fill, heard, judge, listen, unbound},
};
use runs::everything_happens;
use sqlx::{AssertSqlSafe, PgPool, postgres::PgConnectOptions};
use std::process::{Command, Stdio};

/// Statements that go to all nodes, by what stands in them; how often, and why that is bearable.
const EVERYWHERE: &[(&str, &str)] = &[
    (
        "from unnest($1::text[]) s(queue)",
        "claim: a look at the queue, for all runs that a worker takes at once, at most 4 times a second when idle",
    ),
    (
        "q.queue = any(",
        "claim: the same, for timers that are over in a long queue, and for runs with a message while a worker has no room",
    ),
    ("where r.owner = $1 and not exists", "strays: one look of a worker every 2 s, for all its runs"),
    ("where r.owner = any($1::uuid[])", "takeover: only after a worker has died, until all of its runs are free"),
    ("first_run_id = ", "chains: whoever stops a child asks for the run that is open in its place"),
    (
        "where workflow_id = $1 and closed_at is not null",
        "starts that ask how the last run under their id ended: none under the default policy",
    ),
    ("where parent_run_id = $2 and closed_at is null", "starts that end the open run under their id: its children"),
    ("keys (queue, n)", "claim: which keys there are, at most 20 times a second, by workers that have labels"),
    ("names (queue, n)", "depth of the queues: for people, every 10 s"),
    (
        "from admissions",
        "groups: whoever may come in, 4 times a second for all groups; only runs that are held back have rows",
    ),
    ("where attributes @> $1", "unblock: which runs a user has, when credits come in"),
    ("from outbox where topic", "who reads along: a look, as often as it wants"),
    ("delete from outbox o", "who reads along: what the look has found"),
];

/// What is left of them where runs are said shard by shard, and what names two. Off the path of a step, but that a call starts its child
/// and a chain its next run.
const ONE_BY_ONE: &[(&str, &str)] = &[
    ("first_run_id = ", "chains: as above"),
    (
        "where workflow_id = $1 and closed_at is not null",
        "starts that ask how the last run under their id ended: none under the default policy",
    ),
    ("where parent_run_id = $2 and closed_at is null", "starts that end the open run under their id: its children"),
    ("from admissions", "groups: as above"),
    (
        "with recursive line",
        "history of a fork: its parents' rows lie where they lie; for people, and for a fork's first load",
    ),
    ("where attributes @> $1", "unblock: as above"),
    (
        "from runs where shard = $9 and run_id = $10 on conflict do nothing",
        "a child: lies where its id says, and takes what it inherits from its parent's row; once a call",
    ),
    (
        "set continued_as = $2 where shard = $5",
        "the next run of a chain: the same, and the row of the run before says so in one with it; once a continuation",
    ),
    ("with known as (select i.n", "the ids of senders that the next run of a chain knows: the same"),
    ("from outbox where topic", "who reads along: a look that locks nothing; what it finds is taken shard by shard"),
    ("from runs where shard = $11 and run_id = $12", "a fork: the same, of the run that it is like; for people"),
];
/// Tells the child process that runs are said shard by shard.
const BY_SHARD: &str = "LOOPWRIGHT_TEST_BY_SHARD";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other test of this file in a process of its own: it listens to all statements"]
async fn child_process() {
    let Ok(address) = std::env::var(DATABASE) else { return };
    let one = std::env::var(BY_SHARD).is_ok();
    let everywhere = if one { ONE_BY_ONE } else { EVERYWHERE };
    // The ordinary pool of tests says nothing.
    let options: PgConnectOptions = address.parse().expect("address");
    let pool = PgPool::connect_with(options).await.expect("database");
    listen();
    everything_happens(&pool).await;
    let statements = heard();
    fill(&pool).await;

    let Judged { routed, excused, problems } = judge(&pool, &statements, one, everywhere).await;
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n---\n"));
    // What must have been heard, by its words: otherwise nothing was proved.
    for (what, words) in [
        ("commit of a batch", "update runs r set seq = r.seq + 1"),
        ("load", "join history h on h.shard = k.shard"),
        ("claim, by the keys that a look has found", "update runs r set owner"),
        ("release without a transition, or park", "insert into ready"),
        ("signal", "seen as (select 1 from inbox"),
        ("reading the inbox", "n > $3 and n <= $4 order by n limit $5"),
        ("checkpoint", "insert into checkpoints"),
        ("fence of a reading", "for share"),
        ("progress", "insert into attempt_progress"),
        ("history", "with recursive line"),
        ("messages to driven runs", "r.inbox_n > r.inbox_seen"),
        ("waking all runs of a user", "inbox_n, 'unblock', payload, seq"),
        ("locking a run with its kin", "order by r.shard, r.run_id for no key update of r"),
        ("looking whether a large value is there", "join blobs b on b.shard"),
        ("a large value", "insert into blobs"),
        ("reading a large value", "select hash, key, bytes from blobs"),
        ("which large values a run has", "select hash from blobs where shard"),
        ("the next run of a chain", "continued_as = $2"),
        ("handing on the ids of senders", "with known as (select i.n"),
        ("looking for messages to hand on", "(i.n > r.inbox_seen and i.kind <> 'child')"),
        ("handing on messages", "with base as (select inbox_n"),
        ("holding a run back", "waiting = 'concurrency'"),
        ("arriving at a group", "insert into admissions"),
        ("locking a run that waits", "for no key update skip locked"),
        ("letting a run in", "admitted = true, waiting = 'worker'"),
        ("taking a place", "update admissions set place = $3"),
        ("leaving who waited for its time", "delete from admissions where shard"),
        ("telling who reads along", "insert into outbox (topic, shard, run_id, seq) select $12"),
        ("taking out of the outbox", "delete from outbox o"),
        ("giving the next run of a reset its key", "update runs set workflow_id = $1"),
        ("whose schedule a run is of", "select attributes ->> 'schedule' from runs"),
        ("whether a run is due for whom nobody is there", "select exists (select from ready where shard"),
        ("a run that is gone", "from archived_runs r join archives"),
        ("migration", "insert into former_definitions"),
        ("former definitions", "definition from former_definitions where shard"),
    ] {
        // A fork's is its parents' as well, and the next run of a chain is made of the one before: not of one shard.
        if one && ["history", "the next run of a chain", "handing on the ids of senders"].contains(&what) {
            continue;
        }
        // On one server it deletes by ranges of keys, or of all shards.
        if !one && ["claim, by the keys that a look has found", "taking out of the outbox"].contains(&what) {
            continue;
        }
        assert!(
            routed.iter().any(|sql| sql.contains(words)),
            "{what} was not among the {} routed statements",
            routed.len()
        );
    }

    // The check would notice: the same statements without their shards.
    let mut noticed = 0;
    let changes: &[(&str, &str)] = if one {
        // A parameter that nothing names any more would have no type.
        &[
            (" and r.shard = $18", ""),
            (" and q.shard = $5 and r.shard = $5", ""),
            (" and h.shard = $5", " and $5::smallint is not null"),
            (" and r.shard = $3", " and $3::smallint is not null"),
            ("on b.shard = $4 and", "on $4::smallint is not null and"),
        ]
    } else {
        &[
            ("h.shard = k.shard and ", ""),
            ("r.shard = b.shard and ", ""),
            ("r.shard = k.shard and ", ""),
            ("where shard = $1 and run_id = $2", "where $1::smallint is not null and run_id = $2"),
        ]
    };
    for sql in &routed {
        for (with, without) in changes {
            let changed = sql.replacen(with, without, 1);
            // A statement of one run says its shard twice.
            let again = format!("{}.shard = $", with.split('.').next().unwrap_or_default());
            if changed == *sql || (!one && changed.contains(&again)) {
                continue;
            }
            match unbound(&pool, &changed, one).await {
                Ok(found) => {
                    assert!(!found.is_empty(), "not noticed:\n{changed}");
                    noticed += 1;
                }
                Err(error) => panic!("no plan of what was changed: {error}\n{changed}"),
            }
        }
    }
    assert!(noticed >= if one { 6 } else { 24 }, "{noticed}");
    println!(
        "{} statements, {} by shard, {} exceptions, {noticed} changes noticed",
        statements.len(),
        routed.len(),
        excused.len()
    );
}

/// Listens to runs in a process of its own.
async fn listens(bench: &Bench, more: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().expect("this binary"))
        .args(["citus::child_process", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .envs(more.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("child");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("exceptions"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_run_sends_goes_to_the_shards_of_its_runs() {
    listens(&Bench::new().await, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_shard_batches_every_statement_of_the_hot_path_goes_to_one_shard() {
    let bench = Bench::new().await;
    bench.by_shard().await;
    listens(&bench, &[(BY_SHARD, "1")]).await;
}

// --- the plan ---

/// What Citus offers, for a server without it: each call is written down, and what Citus says in its documentation that it refuses is
/// refused when it is asked for.
const STUBS: &str = include_str!("citus_stubs.sql");
/// The one statement of the plan that a server without Citus cannot execute.
const EXTENSION: &str = "create extension if not exists citus;";

/// Executes `deploy/citus.sql` in a migrated database, with stubs of what Citus offers.
async fn planned(pool: &PgPool, plan: &str) -> Result<(), sqlx::Error> {
    assert_eq!(plan.matches(EXTENSION).count(), 1);
    sqlx::raw_sql(STUBS).execute(pool).await?;
    sqlx::raw_sql(AssertSqlSafe(plan.replace(EXTENSION, ""))).execute(pool).await?;
    Ok(())
}

/// The tables that a call was made for, by name, with the column.
async fn called(pool: &PgPool, function: &str) -> Vec<(String, Option<String>)> {
    sqlx::query_as("select what::text, by from stub.calls where made = $1 and what is not null order by 1")
        .bind(function)
        .fetch_all(pool)
        .await
        .expect("calls")
}

/// `deploy/citus.sql`, executed: it says of every table of the engine what becomes of it, once, and of none that is not there; what it
/// drops is there; nothing is distributed against a constraint. And runs do everything under what is left of the constraints.
#[tokio::test(flavor = "multi_thread")]
async fn the_plan_for_citus_can_be_executed_and_names_every_table_once() {
    let bench = Bench::new().await;
    let pool = &bench.pool;
    let tables: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition
           and relname not like '\\_sqlx%' and relname not like 'test\\_%' order by 1",
    )
    .fetch_all(pool)
    .await
    .expect("tables");
    planned(pool, include_str!("../../../deploy/citus.sql")).await.expect("the plan fits the migrations");

    let distributed = called(pool, "create_distributed_table").await;
    assert_eq!(distributed.iter().map(|(table, _)| table.as_str()).collect::<Vec<_>>(), DISTRIBUTED);
    assert!(distributed.iter().all(|(_, column)| column.as_deref() == Some("shard")), "{distributed:?}");
    let everywhere = called(pool, "create_reference_table").await;
    assert_eq!(everywhere.iter().map(|(table, _)| table.as_str()).collect::<Vec<_>>(), REFERENCE);
    let mut named: Vec<String> = distributed.into_iter().map(|(table, _)| table).collect();
    for function in ["create_reference_table", "citus_add_local_table_to_metadata"] {
        named.extend(called(pool, function).await.into_iter().map(|(table, _)| table));
    }
    named.sort();
    assert_eq!(named, tables, "each table of the migrations, once");
    let apart: Vec<String> = sqlx::query_scalar(
        "select what::text from stub.calls
         where made = 'create_distributed_table' and what <> 'runs'::regclass and beside <> 'runs'",
    )
    .fetch_all(pool)
    .await
    .expect("calls");
    assert_eq!(apart, Vec::<String>::new(), "not beside their runs");
    // Whoever refers to rows that lie on the nodes lies there as well.
    let outside: Vec<String> = sqlx::query_scalar(
        "select c.conrelid::regclass || ' to ' || c.confrelid::regclass from pg_constraint c join stub.calls t on t.what = c.confrelid
         where c.contype = 'f' and c.conparentid = 0 and t.made = 'create_distributed_table'
           and not exists (select from stub.calls f where f.what = c.conrelid and f.made = 'create_distributed_table')",
    )
    .fetch_all(pool)
    .await
    .expect("constraints");
    assert_eq!(outside, Vec::<String>::new(), "a foreign key leads to a distributed table from one that is none");

    everything_happens(pool).await;
    bench.audit().await;
}

/// The stubs refuse what they are there to refuse: otherwise that the plan was executed would say nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_citus_would_refuse_is_refused() {
    let plan = include_str!("../../../deploy/citus.sql");
    for (what, with, without, says) in [
        ("a unique index without the column", "drop index runs_chain_open;", "", "runs_chain_open"),
        (
            "a table twice",
            "select create_reference_table('archives');",
            "select create_reference_table('archives'); select create_reference_table('archives');",
            "twice",
        ),
        ("a table that is not there", "'workflow_ids'", "'workflow_idents'", "workflow_idents"),
        ("another column", "table('inbox', 'shard'", "table('inbox', 'run_id'", "run_id"),
        (
            "what others refer to, too late",
            "select create_reference_table('definitions');",
            "",
            "refers to definitions",
        ),
        ("not beside its run", "'blobs', 'shard', colocate_with := 'runs'", "'blobs', 'shard'", "not beside"),
    ] {
        let pool = database(loopwright_engine::MIGRATIONS).await;
        let changed = plan.replacen(with, without, 1);
        assert_ne!(changed, plan, "{what}: the plan has changed");
        // The index is made again under its name: that alone would be an error.
        let changed = if what.starts_with("a unique index") {
            changed.replacen("create index runs_chain_open", "create index runs_chain_open_too", 1)
        } else {
            changed
        };
        let error = planned(&pool, &changed).await.expect_err(what).to_string();
        assert!(error.contains(says), "{what}: {error}");
    }
}
