//! What a process asks for when it dies, and what whoever asks again is told.

use super::scenes::{asked, longer};
use crate::bench::{Bench, PATIENCE};
use chrono::{DateTime, Utc};
use loopwright_engine::{
    Error, Result,
    admission::{Admission, IdConflict, OnConflict, Place, Rate},
    client::{At, Decision, Fork, Migrate, MigrationOutcome, Signal, Start, Update, Why},
    ids::{DefinitionHash, RunId},
    schedule::{Overlap, Spec, When, door::NewSchedule},
    view::{RunStatus, Waiting},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

/// A question to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    Signal,
    Approve,
    Pause,
    Release,
    Update,
    Cancel,
    Unblock,
    Terminate,
    /// In the place of the open run.
    Start,
    /// In the group of the open run, to which it gives way.
    GiveWay,
    Fork,
    Reset,
    Migrate,
    Trigger,
    Backfill,
    Change,
}

/// The call that meets a point of the client.
pub fn of(point: &str) -> Option<Call> {
    Some(match (point, point.split('.').next().unwrap_or_default()) {
        ("terminate.before_end", _) | (_, "start" | "group" | "rate") => Call::Start,
        (_, "turned") => Call::GiveWay,
        (_, "send" | "inbox" | "transaction") => Call::Signal,
        (_, "approve") => Call::Approve,
        (_, "tell") => Call::Pause,
        (_, "release") => Call::Release,
        (_, "updating") => Call::Update,
        (_, "cancel") => Call::Cancel,
        (_, "unblock") => Call::Unblock,
        (_, "terminate" | "keys") => Call::Terminate,
        (_, "fork" | "arrive") => Call::Fork,
        (_, "reset") => Call::Reset,
        (_, "migrate") => Call::Migrate,
        (_, "trigger") => Call::Trigger,
        (_, "backfill") => Call::Backfill,
        (_, "change") => Call::Change,
        _ => return None,
    })
}

/// An id that is made of a run's: each sender of one request names the same.
fn beside(run: RunId, n: u128) -> RunId {
    RunId(uuid::Uuid::from_u128(run.0.as_u128() ^ n))
}

/// The business key of a run that is asked for something; its group and its rate have the same name.
fn key(run: RunId) -> String {
    format!("key-{run}")
}

/// Starts a run that has a key, a group for itself and a rate.
fn start(definition: DefinitionHash, run: RunId, key: &str) -> Start {
    let place = Place { group: key.to_owned(), limit: 1, on_conflict: OnConflict::Queue };
    let rate = Rate { key: key.to_owned(), starts: 100, per_ms: 1_000 };
    Start {
        run_id: Some(run),
        definition,
        inputs: json!({}),
        workflow_id: Some(key.to_owned()),
        attributes: json!({"user_id": "u1"}),
        queue: String::new(),
        topic: None,
        admission: Admission { place: Some(place), rate: Some(rate), ..Admission::default() },
    }
}

/// A run for each of these points that waits to be asked, in nobody's memory; of those of a schedule, its schedule too.
pub async fn arrange(bench: &Bench, points: &[&'static str]) -> Vec<RunId> {
    let definition = bench.deploy(asked()).await;
    let mut runs = Vec::new();
    for point in points {
        let run = RunId(uuid::Uuid::now_v7());
        bench.client.start(start(definition, run, &key(run))).await.expect("started");
        if of(point) == Some(Call::Approve) {
            let signal = Signal { name: "go".into(), ..Signal::default() };
            bench.client.signal(run, signal).await.expect("early");
        }
        let spec =
            Spec { overlap: Overlap::AllowAll, ..Spec::new("quick", When::Every { ms: 3_600_000, offset_ms: 0 }) };
        let new = NewSchedule { name: run.to_string(), spec, paused: false, note: None, owner: None };
        bench.client.schedules().create(new).await.expect("schedule");
        runs.push(run);
    }
    let worker = bench.worker().await;
    for (run, point) in runs.iter().zip(points) {
        let approval = of(point) == Some(Call::Approve);
        let asks = |w: &Waiting| match w {
            Waiting::Approval { .. } => approval,
            Waiting::Signal { .. } => !approval,
            _ => false,
        };
        bench.until(*run, "it asks", |view| view.waiting.iter().any(asks)).await;
    }
    worker.drain(PATIENCE).await;
    for (run, point) in runs.iter().zip(points) {
        // Who sends to a run that was sent much looks first whether there is room.
        for _ in 0..if ["send.after_lock", "send.after_room"].contains(point) { 25 } else { 0 } {
            bench.client.pause(*run, Why::default()).await.expect("an order");
            bench.client.resume(*run, Why::default()).await.expect("an order");
        }
        if of(point) == Some(Call::Release) {
            sqlx::query("update runs set status = 'quarantined' where run_id = $1")
                .bind(run.0)
                .execute(&bench.pool)
                .await
                .expect("quarantined");
            sqlx::query("delete from ready where run_id = $1").bind(run.0).execute(&bench.pool).await.expect("aside");
        }
    }
    runs
}

/// Asks for it, in words that are the same each time. The answer says what was done now.
pub async fn ask(bench: &Bench, call: Call, run: RunId) -> Result<Value> {
    let client = &bench.client;
    let id = Some("once".to_owned());
    Ok(match call {
        Call::Signal => {
            let signal = Signal { name: "go".into(), dedupe_id: id, ..Signal::default() };
            json!(client.signal(run, signal).await?)
        }
        Call::Approve => json!(client.approve(run, "review", Decision::Approved, None, id, None).await?),
        Call::Pause => json!(client.pause(run, Why { dedupe_id: id, ..Why::default() }).await?),
        Call::Release => json!(client.unquarantine(run, Why::default()).await?),
        Call::Update => {
            let update = Update { name: "go".into(), payload: json!({}), id, sender: None };
            match client.update(run, update, Duration::ZERO).await {
                Err(Error::UpdatePending { .. }) => Value::Null,
                other => panic!("nobody works: {other:?}"),
            }
        }
        Call::Cancel => json!(client.cancel(run, "enough").await?),
        Call::Unblock => json!(client.unblock_waiting(&json!({"user_id": "u1"}), &["signal"], 100).await? > 0),
        Call::Terminate => json!(client.terminate(run, "enough").await?),
        Call::Start => {
            let definition = client.describe(run).await?.definition;
            let mut start = start(definition, beside(run, 1), &key(run));
            start.admission.id_conflict = IdConflict::TerminateExisting;
            json!(client.start(start).await?.created)
        }
        Call::GiveWay => {
            let definition = client.describe(run).await?.definition;
            let mut start = Start { workflow_id: None, ..start(definition, beside(run, 4), &key(run)) };
            let place = Place { group: key(run), limit: 1, on_conflict: OnConflict::CancelNew };
            start.admission = Admission { place: Some(place), ..Admission::default() };
            json!(client.start(start).await?.created)
        }
        Call::Fork => json!(client.fork(run, fork(run, 2)).await?.created),
        Call::Reset => json!(client.reset(run, fork(run, 3)).await?.terminated),
        Call::Migrate => {
            let to = bench.deploy(longer()).await;
            let (map, catalog) = (BTreeMap::new(), Default::default());
            let asked = Migrate { to, map, reason: "one more".into(), by: None, dry_run: false, catalog };
            json!(client.migrate(run, asked).await?.outcome == MigrationOutcome::Migrated)
        }
        Call::Trigger => json!(client.schedules().trigger(&run.to_string(), None).await?.run_id.is_some()),
        Call::Backfill => {
            let at: DateTime<Utc> = "2026-01-01T00:00:00Z".parse().expect("instant");
            json!(client.schedules().backfill(&run.to_string(), at, at, None).await?.added == 1)
        }
        Call::Change => json!(client.schedules().pause(&run.to_string(), None).await?.paused_at.is_some()),
    })
}

/// From its first transition on.
fn fork(run: RunId, n: u128) -> Fork {
    Fork {
        run_id: Some(beside(run, n)),
        at: At::Seq(1),
        inputs: Default::default(),
        definition: None,
        attributes: None,
        reason: "again".into(),
    }
}

/// Asks again after a process has died of it at `point`, and looks at what has become of it. Returns the runs that there are now, with
/// how each is to end.
pub async fn again(bench: &Bench, point: &str, run: RunId) -> Vec<(RunId, RunStatus)> {
    let call = of(point).expect("of the client");
    // What is one statement is done behind it.
    let done = [".after_commit", ".after_send", ".before_wake"].iter().any(|end| point.ends_with(end));
    let answer = ask(bench, call, run).await;
    let client = &bench.client;
    let status = async |run| client.describe(run).await.expect("run").status;
    if call == Call::Terminate {
        assert_eq!(status(run).await, RunStatus::Terminated, "{point}: {answer:?}");
        return vec![(run, RunStatus::Terminated)];
    }
    let answer = answer.unwrap_or_else(|error| panic!("{point}: {error}"));
    match call {
        // Asked again, it is done again or says nothing of it.
        Call::Update | Call::Cancel | Call::Unblock | Call::Trigger | Call::Change | Call::Reset => {
            assert_ne!(answer, json!(false), "{point}");
        }
        _ => assert_eq!(answer, json!(!done), "{point}: done once"),
    }
    let completes = RunStatus::Completed;
    match call {
        Call::Cancel => vec![(run, RunStatus::Cancelled)],
        Call::Start | Call::Reset => {
            let new = beside(run, if call == Call::Start { 1 } else { 3 });
            assert_eq!(client.open_run(&key(run)).await.expect("asked"), Some(new), "{point}");
            assert_eq!(status(run).await, RunStatus::Terminated, "{point}");
            vec![(run, RunStatus::Terminated), (new, completes)]
        }
        Call::GiveWay => vec![(run, completes), (beside(run, 4), RunStatus::Cancelled)],
        Call::Fork => vec![(run, completes), (beside(run, 2), completes)],
        _ => vec![(run, completes)],
    }
}

/// What must hold of the answers when all is over.
pub async fn answered(bench: &Bench, point: &str, run: RunId) {
    if of(point) == Some(Call::Update) {
        let answer = bench.client.updated(run, "once", Duration::ZERO).await.expect("answered").answer;
        assert_eq!(serde_json::to_value(answer).expect("answer")["result"], json!("heard"), "{point}");
    }
}
