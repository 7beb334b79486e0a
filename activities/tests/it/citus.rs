//! The ledger on the path to Citus: whatever it says in the engine's transactions goes to the shard of one run, or to the coordinator,
//! where its tables are. See `deploy/citus.sql` and the engine's test of the same name.

use crate::{
    bench::{Bench, closing, one_call, opening},
    billing_parked::Surprised,
    billing_worker::{Calls, closed, signature},
};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    billing::{BillingSettings, LedgerHook, MicroCredits, limit},
    usage::CallState,
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::{At, Client, Deploy, Fork, Start},
    definition::{
        Bundle, CallVersion, Data, Definition, Expr, FORMAT, Input, Kind, OnItemFailure, ParentClose, RetryPolicy,
        Step, Timeouts,
    },
    embedded::testing::url,
    ids::{DefinitionHash, RunId},
    signature::Signature,
    testing::routes::{fill, heard, judge, listen, unbound},
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Map, Value, json};
use sqlx::{AssertSqlSafe, PgPool, postgres::PgConnectOptions};
use std::{collections::BTreeMap, process::Stdio, sync::Arc, time::Duration};
use tokio::process::Command;
use uuid::Uuid;

/// The child's database.
const DATABASE: &str = "LOOPWRIGHT_TEST_DATABASE";

/// What the engine says beside the ledger and says of two shards: its own test lists them, and why that is bearable.
const OF_THE_ENGINE: &[(&str, &str)] = &[
    ("from runs where shard = $9 and run_id = $10 on conflict do nothing", "a child"),
    ("set continued_as = $2 where shard = $5", "the next run of a chain"),
    ("from runs where shard = $11 and run_id = $12", "a fork"),
    ("with recursive line", "history of a fork"),
    ("with known as (select i.n", "the ids of senders that the next run of a chain knows"),
    ("from admissions", "groups"),
];

/// A call whose answer is of no use.
struct Fails;

impl Activity for Fails {
    fn signature(&self) -> Signature {
        Signature { name: "fails@1".into(), failure_codes: vec!["model.output_invalid".into()], ..signature() }
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        Box::pin(async move {
            ctx.meter_open("a.0", &opening(1_000)).await?;
            ctx.meter_close("a.0", &closing(CallState::Succeeded, 1_000, 100), None).await?;
            Err(Failure::permanent("model.output_invalid", "no use"))
        })
    }
    fn reserve(&self, _input: &Value, _extras: &Value) -> Value {
        serde_json::to_value(one_call()).expect("json")
    }
}

fn step(id: &str, kind: Kind) -> Step {
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry: RetryPolicy { attempts: 1, ..RetryPolicy::default() },
        timeouts: Timeouts::default(),
        catch: vec![],
        continue_on_error: false,
    }
}

fn activity(name: &str) -> Step {
    step(name.split('@').next().expect("a name"), Kind::Activity { name: name.into(), with: BTreeMap::new() })
}

/// Goes on once in a run of its own.
fn again() -> Step {
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
    let kind = Kind::ContinueAsNew { with, current: true };
    Step { condition: Some(Expr("inputs.n < 1".into())), ..step("again", kind) }
}

fn definition(name: &str, budget: Value, steps: Vec<Step>) -> Definition {
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    Definition {
        format: FORMAT,
        name: name.into(),
        inputs: BTreeMap::from([("n".to_owned(), n)]),
        env: BTreeMap::new(),
        timeout_ms: 600_000,
        budget,
        concurrency: None,
        executions_max: 100,
        steps,
        finally: vec![],
        outputs: BTreeMap::new(),
        runs_on: vec![],
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

/// Items whose children are chains, each call within the shares of its run, its item and its project.
fn family() -> Definition {
    let inner = Kind::Call {
        workflow: "inner".into(),
        version: CallVersion::Latest,
        with: BTreeMap::new(),
        parent_close: ParentClose::Cancel,
    };
    let each = Kind::Foreach {
        list: Expr("[1, 2]".into()),
        key: None,
        max_items: 2,
        concurrency: 2,
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![step("inner", inner), activity("calls@1")],
        outputs: None,
    };
    let fails = Step { continue_on_error: true, ..activity("fails@1") };
    let budget = json!({"credits": 60, "credits-per-item": 20});
    definition("family", budget, vec![step("each", each), activity("surprised@1"), fails, again()])
}

/// Runs of one user: a family under an approved sum, a fork of it, and one that cannot pay.
async fn runs_are_paid(pool: &PgPool) {
    let (user, project): (Uuid, Uuid) =
        sqlx::query_as("update projects set budget_cap_ucr = 90000000 returning user_id, id")
            .fetch_one(pool)
            .await
            .expect("project");
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let client = Client::new(pool.clone(), hook.clone());
    let mut config = WorkerConfig::new(pool.clone(), Registry::new().with(Calls).with(Surprised).with(Fails));
    config.hook = hook;
    let worker = worker::start(config).await.expect("worker");
    let deploy = async |definition| {
        let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
        client.deploy(deploy).await.expect("deploy").hash
    };
    let start = async |definition: DefinitionHash, run: RunId| {
        let start = Start {
            run_id: Some(run),
            definition,
            inputs: json!({}),
            workflow_id: None,
            attributes: json!({"user_id": user.to_string(), "project_id": project.to_string()}),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        client.start(start).await.expect("start");
    };
    deploy(definition("inner", Value::Null, vec![activity("calls@1"), again()])).await;
    let run = RunId::new();
    let mut tx = pool.begin().await.expect("tx");
    limit::set(&mut tx, user, run.0, "approved", MicroCredits::from_credits(80), "its owner").await.expect("limit");
    tx.commit().await.expect("commit");
    start(deploy(family()).await, run).await;
    let ends = async |run: RunId| {
        assert_eq!(closed(&client, run).await, RunStatus::Continued);
        let next = client.describe(run).await.expect("run").chain.continued_as.expect("the next");
        assert_eq!(closed(&client, next).await, RunStatus::Completed);
    };
    ends(run).await;
    let fork = Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "again".into(),
    };
    ends(client.fork(run, fork).await.expect("fork").run_id).await;
    let poor = RunId::new();
    start(deploy(definition("poor", json!({"credits": 1}), vec![activity("calls@1")])).await, poor).await;
    assert_eq!(closed(&client, poor).await, RunStatus::Failed);
    let why = client.describe(poor).await.expect("run").failure.expect("why");
    assert_eq!(why.code, "budget.run");
    worker.drain(Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other test of this file in a process of its own: it listens to all statements"]
async fn child_process() {
    let Ok(address) = std::env::var(DATABASE) else { return };
    // The ordinary pool of tests says nothing.
    let options: PgConnectOptions = address.parse().expect("address");
    let pool = PgPool::connect_with(options).await.expect("database");
    listen();
    runs_are_paid(&pool).await;
    let statements = heard();
    fill(&pool).await;
    let judged = judge(&pool, &statements, true, OF_THE_ENGINE).await;
    let problems = judged.problems;
    assert!(problems.is_empty(), "{} that no router can serve:\n{}", problems.len(), problems.join("\n---\n"));
    for (what, words) in [
        ("an attempt", "insert into activity_attempts"),
        ("whose run it is", "r.parent_path, null::jsonb"),
        ("who is above it", "r.parent_path, d.ir->'budget'"),
        ("noting that", "insert into run_kin"),
        ("a chain and what is below it", "tree as (select run_id from chain"),
        ("an item", "mine as (select a.id from chain"),
        ("what counts against an approved sum", "select unnest($1::uuid[]) as run_id union all"),
        ("the approved sum", "from spending_limits"),
        ("a project", "select p.budget_cap_ucr"),
        ("others that work", "a.state = 'running' and a.id <> $2"),
        ("a hold", "'hold', 0, $3"),
        ("a call", "insert into api_key_usage"),
        ("an end", "update activity_attempts set state"),
        ("what is given back by rule", "with inforce as"),
    ] {
        assert!(judged.routed.iter().any(|sql| sql.contains(words)), "{what} was not heard");
    }
    // The check would notice: the walks as they were over `runs`, and runs beside what is on the coordinator.
    for before in [
        "with recursive tree as (select $1::uuid as run_id union all
           select r.run_id from tree join runs r on r.parent_run_id = tree.run_id)
         select count(*) from tree join activity_attempts a using (run_id)",
        "select a.id from runs r join activity_attempts a on a.run_id = r.run_id where r.shard = $1 and r.run_id = $2",
    ] {
        assert!(!unbound(&pool, before, true).await.expect("plan").is_empty(), "not noticed: {before}");
    }
    println!("{} statements, {} exceptions", statements.len(), judged.excused.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_ledger_says_of_a_family_of_runs_goes_to_one_shard_or_to_the_coordinator() {
    let bench = Bench::new(100).await;
    let name = bench.pool.connect_options().get_database().expect("database").to_owned();
    let by_shard = format!("alter database {name} set loopwright.shard_batches = 'on'");
    sqlx::query(AssertSqlSafe(by_shard)).execute(&bench.pool).await.expect("setting");
    let output = Command::new(std::env::current_exe().expect("this binary"))
        .args(["citus::child_process", "--exact", "--ignored", "--nocapture"])
        .env(DATABASE, url(&bench.pool))
        .stdin(Stdio::null())
        .output()
        .await
        .expect("child");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("exceptions"), "{text}");
}
