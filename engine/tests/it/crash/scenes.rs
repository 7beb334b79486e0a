//! What is going on when a process dies: definitions, who dies, and what is rare and has to be made.

use super::callers;
use crate::{
    bench::{Bench, PATIENCE, definition, e, step, waits_for, work},
    faults::{long_work, several},
};
use loopwright_engine::{
    activity::Context,
    admission::{Admission, OnConflict, Place, Rate},
    client::{Signal, Start},
    definition::{Approval, CallVersion, Data, Definition, Input, Kind, ParentClose, WaitUntil},
    ids::{DefinitionHash, RunId},
    schedule::{Overlap, Spec, When, door::NewSchedule, run_id},
    view::{RunStatus, Waiting},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use std::{collections::BTreeMap, time::Duration};

/// Runs of [`Scene::Crowded`]: four more than a worker with one slot takes.
const CROWD: usize = 21;

/// Who dies, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scene {
    /// A worker that does a bit of everything.
    Works,
    /// A worker whose hook refuses every start.
    Refuses,
    /// A worker whose hook is broken.
    Breaks,
    /// A worker that has more to do than it may take.
    Crowded,
    /// A worker that is told to stop in the middle of its work.
    Drains,
    /// A worker that looks after groups and rates.
    Groups,
    /// A worker whose runs go on as others and hand on what was sent to them.
    Relays,
    /// A worker whose run is told to stop while a chain works for it.
    Stops,
    /// A worker whose run was told to stop, and whose child hears nothing of that in time.
    Overdue,
    Schedules,
    /// A program that asks something of the client.
    Calls,
}

impl Scene {
    pub fn of(point: &str) -> Self {
        match (point, point.split('.').next().unwrap_or_default()) {
            ("commit.before_rollback" | "commit.after_rollback" | "commit.before_rest" | "step.after_refusal", _) => {
                Self::Refuses
            }
            ("commit.between_halves", _) | (_, "quarantine") => Self::Breaks,
            ("settle.after_open_run", _) => Self::Stops,
            (_, "crowded") => Self::Crowded,
            (_, "drain") => Self::Drains,
            (_, "admit" | "vain" | "room") => Self::Groups,
            (_, "hand") | ("load.after_pointer", _) => Self::Relays,
            (_, "overdue") => Self::Overdue,
            (_, "schedule") => Self::Schedules,
            _ if callers::of(point).is_some() => Self::Calls,
            _ => Self::Works,
        }
    }
}

/// A wait, what [`several`] does, a question, a call: every path through the committer and out of memory.
fn everything() -> Definition {
    let mut all = several("points");
    all.steps.insert(0, step("nap", Kind::Wait { until: WaitUntil::For(200) }));
    all.steps.push(step("question", Kind::Await(Box::new(waits_for("go")))));
    all.steps.push(step("call", call("inner")));
    all
}

fn call(workflow: &str) -> Kind {
    calls(workflow, ParentClose::Cancel)
}

fn calls(workflow: &str, parent_close: ParentClose) -> Kind {
    let (workflow, with) = (workflow.to_owned(), BTreeMap::new());
    Kind::Call { workflow, version: CallVersion::Latest, with, parent_close }
}

/// A chain of two, the second of which goes on with `then`.
fn chain(name: &str, then: loopwright_engine::definition::Step) -> Definition {
    let with = BTreeMap::from([("n".to_owned(), Data::Literal(json!(1)))]);
    let mut again = step("again", Kind::ContinueAsNew { with, current: true });
    again.condition = Some(e("inputs.n < 1"));
    let mut chain = definition(name, vec![again, then]);
    let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
    chain.inputs.insert("n".into(), n);
    chain
}

/// Works, asks whether it may go on, and wants that approved.
pub fn asked() -> Definition {
    let mut question = waits_for("go");
    question.reply = Some(Data::Literal(json!("heard")));
    let mut review = waits_for("review");
    review.approval = Some(Approval { quorum: 1, fail_on_reject: true });
    let steps = vec![
        work("first", &[]),
        step("question", Kind::Await(Box::new(question))),
        step("review", Kind::Await(Box::new(review))),
    ];
    definition("asked", steps)
}

/// [`asked`] and one step more.
pub fn longer() -> Definition {
    let mut longer = asked();
    longer.steps.push(step("added", Kind::Set { values: BTreeMap::new() }));
    longer
}

/// The definitions that are there in every scene.
pub struct Known {
    everything: DefinitionHash,
    quick: DefinitionHash,
    crowd: DefinitionHash,
    relay: DefinitionHash,
    stops: DefinitionHash,
    overdue: DefinitionHash,
}

impl Known {
    pub async fn deployed(bench: &Bench) -> Self {
        let crowd = vec![work("one", &[]), step("question", Kind::Await(Box::new(waits_for("go"))))];
        bench.deploy(chain("inner", work("inner", &[]))).await;
        let mut unserved = definition("unserved", vec![work("one", &[])]);
        unserved.runs_on = vec!["nowhere".into()];
        bench.deploy(unserved).await;
        let overdue = vec![step("call", calls("unserved", ParentClose::Terminate))];
        Self {
            everything: bench.deploy(everything()).await,
            quick: bench.deploy(definition("quick", vec![work("one", &[])])).await,
            crowd: bench.deploy(definition("crowd", crowd)).await,
            relay: bench.deploy(chain("relay", step("question", Kind::Await(Box::new(waits_for("go")))))).await,
            stops: bench.deploy(definition("stops", vec![step("call", call("relay"))])).await,
            overdue: bench.deploy(definition("overdue", overdue)).await,
        }
    }
}

/// A run and how it may end.
pub type Ends = (RunId, &'static [RunStatus]);

const COMPLETED: &[RunStatus] = &[RunStatus::Completed];
const STOPPED: &[RunStatus] = &[RunStatus::Completed, RunStatus::Cancelled, RunStatus::Terminated];

/// Sends what the run asks for, before it does.
async fn early(bench: &Bench, run: RunId, id: &str) {
    let signal = Signal { name: "go".into(), dedupe_id: Some(id.into()), ..Signal::default() };
    bench.client.signal(run, signal).await.expect("early");
}

/// Makes the rows that lead a worker to `point`. `first`: it is the first of its database.
pub async fn arrange(bench: &Bench, known: &Known, scene: Scene, point: &str, first: bool) -> Vec<Ends> {
    let mut runs: Vec<Ends> = Vec::new();
    match scene {
        Scene::Works | Scene::Refuses => {
            if point.starts_with("takeover") {
                // Somebody to bury.
                let dead = "insert into workers (id, host, pid, version, queues, lease_ms, heartbeat_at)
                            values (gen_random_uuid(), '', 0, '', '{}', 1, now() - interval '1 hour')";
                sqlx::query(dead).execute(&bench.pool).await.expect("worker");
            }
            for _ in 0..2 {
                let run = bench.start_as(known.everything, json!({}), None).await.run_id;
                early(bench, run, "once").await;
                runs.push((run, COMPLETED));
            }
            if point.starts_with("takeover") {
                let theirs = "with q as (delete from ready q using runs r where r.run_id = q.run_id and r.owner is null returning q.run_id)
                    update runs r set owner = (select id from workers order by heartbeat_at limit 1), epoch = epoch + 1, parked = false
                    from q where r.run_id = q.run_id";
                sqlx::query(theirs).execute(&bench.pool).await.expect("owned");
            }
        }
        Scene::Breaks | Scene::Drains => {
            for _ in 0..6 {
                runs.push((bench.start_as(known.quick, json!({}), None).await.run_id, COMPLETED));
            }
        }
        Scene::Crowded => {
            for _ in 0..if first { CROWD } else { 1 } {
                let run = bench.start_as(known.crowd, json!({}), None).await.run_id;
                early(bench, run, "once").await;
                runs.push((run, COMPLETED));
            }
        }
        Scene::Groups => {
            let place = |group: &str, on_conflict| Place { group: format!("{group}-{point}"), limit: 1, on_conflict };
            let queue = || Admission { place: Some(place("queue", OnConflict::Queue)), ..Admission::default() };
            for _ in 0..3 {
                runs.push((start(bench, known.quick, queue()).await, STOPPED));
            }
            // Cancelled while it waits.
            let last = runs.last().expect("three").0;
            bench.client.cancel(last, "not any more").await.expect("cancelled");
            // The older one waits for an answer, so that it is there when its place is wanted.
            for definition in [known.crowd, known.quick] {
                let place = Some(place("newest", OnConflict::CancelRunning));
                runs.push((start(bench, definition, Admission { place, ..Admission::default() }).await, STOPPED));
            }
            for _ in 0..3 {
                let rate = Some(Rate { key: point.to_owned(), starts: 1, per_ms: 200 });
                runs.push((start(bench, known.quick, Admission { rate, ..Admission::default() }).await, COMPLETED));
            }
        }
        Scene::Relays => {
            let run = bench.start_as(known.relay, json!({}), None).await.run_id;
            early(bench, run, "once").await;
            early(bench, run, "twice").await;
            runs.push((run, &[RunStatus::Continued]));
        }
        Scene::Stops => {
            let run = bench.start_as(known.stops, json!({}), None).await.run_id;
            let worker = bench.worker().await;
            crate::faults::reaches(
                &bench.pool,
                "select count(*) from runs where continued_from is not null and parked",
                1,
            )
            .await;
            worker.drain(PATIENCE).await;
            bench.client.cancel(run, "enough").await.expect("cancelled");
            runs.push((run, &[RunStatus::Cancelled]));
        }
        Scene::Overdue => {
            let run = bench.start_as(known.overdue, json!({}), None).await.run_id;
            let worker = bench.worker().await;
            let child = |w: &Waiting| if let Waiting::Child { run_id, .. } = w { Some(*run_id) } else { None };
            let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| child(w).is_some())).await;
            runs.extend(view.waiting.iter().filter_map(child).map(|child| (child, &[RunStatus::Terminated][..])));
            bench.client.cancel(run, "enough").await.expect("cancelled");
            let told = format!(
                "select count(*) from history where run_id = '{run}' and events @> '[{{\"type\": \"call_stopped\"}}]'"
            );
            crate::faults::reaches(&bench.pool, &told, 1).await;
            worker.drain(PATIENCE).await;
            later(&bench.pool).await;
            runs.push((run, &[RunStatus::Cancelled]));
        }
        Scene::Schedules => {
            let replaces = point == "schedule.after_cancel";
            let overlap = if replaces { Overlap::CancelOther } else { Overlap::AllowAll };
            let when = When::Every { ms: 3_600_000, offset_ms: 0 };
            // Who is to be cancelled must be open still.
            let workflow = if replaces { "crowd" } else { "quick" };
            let spec = Spec { run_limit: Some(1), overlap, ..Spec::new(workflow, when) };
            let new = NewSchedule { name: point.to_owned(), spec, paused: false, note: None, owner: None };
            let id = bench.client.schedules().create(new).await.expect("schedule").id;
            if replaces {
                let run = bench.client.schedules().trigger(point, None).await.expect("triggered").run_id;
                runs.push((run.expect("started"), STOPPED));
            }
            let due = "update schedules set next_at = date_trunc('second', engine_now()), wake_at = engine_now() where id = $1 returning next_at";
            let instant = sqlx::query_scalar(due).bind(id).fetch_one(&bench.pool).await.expect("due");
            runs.push((run_id(id, instant, None), COMPLETED));
        }
        Scene::Calls => unreachable!("arranged by the callers"),
    }
    runs
}

/// The database's clock goes on by two minutes, more than a call waits once more for a child that hears nothing. No worker may live
/// through that.
pub async fn later(pool: &PgPool) {
    let ahead = "select (extract(epoch from engine_now() - clock_timestamp()) / 60)::int + 2";
    let minutes: i32 = sqlx::query_scalar(ahead).fetch_one(pool).await.expect("clock");
    let clock = format!(
        "create or replace function engine_now() returns timestamptz language sql stable as
           $$ select clock_timestamp() + interval '{minutes} minutes' $$"
    );
    sqlx::query(AssertSqlSafe(clock)).execute(pool).await.expect("clock");
}

async fn start(bench: &Bench, definition: DefinitionHash, admission: Admission) -> RunId {
    let start = Start {
        run_id: None,
        definition,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({"user_id": "u1"}),
        queue: String::new(),
        topic: None,
        admission,
    };
    bench.client.start(start).await.expect("started").run_id
}

/// [`long_work`] that saves a value of its own first, and whose result is perhaps a large one.
pub async fn noted_work(pool: PgPool, ctx: Context, large: bool) -> Result<Value, loopwright_engine::Failure> {
    ctx.save("note", &json!(ctx.info().attempt)).await?;
    ctx.meter_note("call-0", &Value::Null).await?;
    let result = long_work(pool, ctx).await?;
    Ok(if large { json!({ "text": "much ".repeat(20_000) }) } else { result })
}

/// Makes happen what is rare, until it is dropped: runs woken for nothing, messages for runs in memory, runs without a driver.
pub async fn stir(pool: PgPool, point: &str) {
    let statement = match point.split('.').next() {
        Some("park") => "update ready set due_at = engine_now() where due_at > engine_now()",
        Some("messages") => {
            "with r as (update runs set inbox_n = inbox_n + 1 where owner is not null returning shard, run_id, inbox_n)
             insert into inbox (shard, run_id, n, kind) select shard, run_id, inbox_n, 'unblock' from r"
        }
        // As after a claim whose answer was lost: the worker owns it and does not know.
        Some("strays") => {
            "with q as (delete from ready where due_at > engine_now() returning shard, run_id)
             update runs r set owner = w.id, epoch = epoch + 1, parked = false, waiting = null
             from q, (select id from workers order by heartbeat_at desc limit 1) w where r.shard = q.shard and r.run_id = q.run_id and r.owner is null"
        }
        _ => return std::future::pending().await,
    };
    loop {
        sqlx::query(statement).execute(&pool).await.expect("stirred");
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
}
