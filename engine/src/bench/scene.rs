//! The definitions and activities that are measured, and runs of them in bulk.

use super::{Result, host::Host};
use crate::{
    activity::{Activity, Context, Registry},
    admission::Admission,
    client::{Deploy, Start},
    definition::{
        Await, Bundle, Data, Definition, Expr, FORMAT, Input, Kind, OnItemFailure, OnTimeout, RetryPolicy, Step,
        Timeouts, WaitUntil,
    },
    failure::Failure,
    ids::{DefinitionHash, RunId},
    signature::Signature,
    transaction,
};
use futures_util::future::{BoxFuture, try_join_all};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

/// Runs that one transaction starts.
const START_BATCH: usize = 200;
/// Transactions that start runs side by side.
const START_LANES: usize = 4;

fn signature(name: &str) -> Signature {
    Signature {
        name: name.into(),
        summary: String::new(),
        input_schema: json!({"type": "object"}),
        output_schema: json!({}),
        run_timeout_ms: 60_000,
        heartbeat_timeout_ms: None,
        metered: false,
        idempotent: true,
        failure_codes: Vec::new(),
    }
}

/// `noop@1`: nothing, at once.
struct Noop;

impl Activity for Noop {
    fn signature(&self) -> Signature {
        signature("noop@1")
    }
    fn run(&self, _ctx: Context, _input: Value) -> BoxFuture<'static, std::result::Result<Value, Failure>> {
        Box::pin(async { Ok(json!(1)) })
    }
}

/// `nap@1`: takes `ms` milliseconds, as work does.
struct Nap;

impl Activity for Nap {
    fn signature(&self) -> Signature {
        signature("nap@1")
    }
    fn run(&self, _ctx: Context, input: Value) -> BoxFuture<'static, std::result::Result<Value, Failure>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(input["ms"].as_u64().unwrap_or(0))).await;
            Ok(json!(1))
        })
    }
}

/// What the workers offer.
pub(super) fn registry() -> Registry {
    Registry::new().with(Noop).with(Nap)
}

/// A registry whose `noop@1` is the caller's.
pub(super) fn registry_of(work: impl Fn(RunId) + Send + Sync + 'static) -> Registry {
    struct Told<F>(F);
    impl<F: Fn(RunId) + Send + Sync + 'static> Activity for Told<F> {
        fn signature(&self) -> Signature {
            signature("noop@1")
        }
        fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, std::result::Result<Value, Failure>> {
            (self.0)(ctx.info().run_id);
            Box::pin(async { Ok(json!(1)) })
        }
    }
    Registry::new().with(Told(work))
}

pub(super) fn step(id: impl Into<String>, kind: Kind) -> Step {
    Step {
        id: id.into(),
        condition: None,
        kind,
        retry: RetryPolicy::default(),
        timeouts: Timeouts::default(),
        catch: Vec::new(),
        continue_on_error: false,
    }
}

fn activity(id: impl Into<String>, name: &str, with: &[(&str, Value)]) -> Step {
    let with = with.iter().map(|(k, v)| ((*k).to_owned(), Data::Literal(v.clone()))).collect();
    step(id, Kind::Activity { name: name.into(), with })
}

pub(super) fn noop(id: impl Into<String>) -> Step {
    activity(id, "noop@1", &[])
}

pub(super) fn definition(name: &str, steps: Vec<Step>) -> Definition {
    Definition {
        format: FORMAT,
        name: name.into(),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        timeout_ms: 24 * 3_600_000,
        budget: Value::Null,
        concurrency: None,
        executions_max: 100_000,
        steps,
        finally: Vec::new(),
        outputs: BTreeMap::new(),
        runs_on: Vec::new(),
        queries: BTreeMap::new(),
        extras: Value::Null,
    }
}

fn with_input(mut definition: Definition, name: &str) -> Definition {
    definition.inputs.insert(name.into(), Input { schema: json!({}), required: true, default: None });
    definition
}

/// So many no-op steps, one after the other.
pub(super) fn chain(name: &str, steps: usize) -> Definition {
    definition(name, (0..steps).map(|i| noop(format!("s{i}"))).collect())
}

/// So many steps of so many milliseconds.
pub(super) fn naps(steps: usize, ms: u64) -> Definition {
    definition("naps", (0..steps).map(|i| activity(format!("s{i}"), "nap@1", &[("ms", json!(ms))])).collect())
}

/// One step for each of the input `items`, all side by side.
pub(super) fn fan_out(width: u32) -> Definition {
    let each = Kind::Foreach {
        list: Expr("inputs.items".into()),
        key: None,
        max_items: width,
        concurrency: width,
        on_item_failure: OnItemFailure::FailFast,
        steps: vec![noop("one")],
        outputs: None,
    };
    with_input(definition("fan_out", vec![step("each", each)]), "items")
}

/// Waits for the instant of the input `at`.
pub(super) fn sleeper() -> Definition {
    let until = WaitUntil::Instant { at: Expr("inputs.at".into()), max_ms: 7 * 86_400_000 };
    with_input(definition("sleeper", vec![step("sleep", Kind::Wait { until })]), "at")
}

/// Waits for the signal `go`, then takes one step.
pub(super) fn listener() -> Definition {
    let wait = Await {
        signal: "go".into(),
        timeout_ms: 3_600_000,
        form: None,
        show: None,
        to: Vec::new(),
        filter: None,
        remind_ms: Vec::new(),
        on_timeout: OnTimeout::Fail,
        default: None,
        approval: None,
        reply: None,
    };
    definition("listener", vec![step("wait", Kind::Await(Box::new(wait))), noop("resumed")])
}

pub(super) async fn deploy(host: &Host, definition: Definition) -> Result<DefinitionHash> {
    let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
    Ok(host.client.deploy(deploy).await?.hash)
}

/// Starts `n` runs in a task queue, many a transaction.
pub(super) async fn start(
    host: &Host,
    definition: DefinitionHash,
    inputs: &Value,
    queue: &str,
    n: usize,
) -> Result<Vec<RunId>> {
    let lane = |mut left: usize| async move {
        let mut started = Vec::with_capacity(left);
        while left > 0 {
            let mut tx = transaction::begin(&host.pool).await?;
            for _ in 0..left.min(START_BATCH) {
                let start = Start {
                    run_id: None,
                    definition,
                    inputs: inputs.clone(),
                    workflow_id: None,
                    attributes: json!({}),
                    queue: queue.to_owned(),
                    topic: None,
                    admission: Admission::default(),
                };
                started.push(host.client.start_in(&mut tx, start).await?.run_id);
            }
            tx.commit().await?;
            left -= left.min(START_BATCH);
        }
        Ok::<_, super::Error>(started)
    };
    let share = |i: usize| n / START_LANES + usize::from(i < n % START_LANES);
    let started = try_join_all((0..START_LANES).map(|i| lane(share(i)))).await?;
    host.client.wake().await;
    Ok(started.into_iter().flatten().collect())
}

/// Runs that have not ended.
pub(super) const OPEN: &str = "select count(*) from runs where closed_at is null and queue = 'default'";

/// Forgets everything, so that one measurement does not weigh on the next.
pub(super) async fn reset(host: &Host) -> Result<()> {
    sqlx::query("truncate runs, ready, history, inbox, checkpoints, attempt_progress, workers, dead_workers, outbox, workflow_ids, blobs, former_definitions")
        .execute(&host.pool)
        .await?;
    sqlx::query("vacuum analyze runs").execute(&host.pool).await?;
    Ok(())
}
