//! Schedules on a real Postgres, with a clock that stands still until the test moves it. Workers are stepped by hand.

use crate::bench::{Bench, definition, step, work};
use chrono::{DateTime, Duration, Utc};
use loopwright_engine::{
    Error,
    client::{At, Filter, Fork},
    definition::{Input, Kind, WaitUntil},
    ids::RunId,
    schedule::{
        ActionKind as K, ActionState as A, Overlap, Spec, When,
        door::{NewSchedule, Schedules},
        run_id,
    },
    view::RunStatus,
};
use serde_json::{Map, json};
use std::{collections::BTreeSet, time::Duration as StdDuration};

const GRACE: StdDuration = StdDuration::from_secs(10);

fn at(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).expect("instant").with_timezone(&Utc)
}

/// A database whose time is what the test says, with a workflow `w` whose runs stay open.
struct Stage {
    bench: Bench,
    schedules: Schedules,
}

impl Stage {
    async fn at(now: &str) -> Self {
        let bench = Bench::new().await;
        for sql in [
            "create table test_clock (at timestamptz)",
            "insert into test_clock values (now())",
            "create or replace function engine_now() returns timestamptz language sql stable as $$ select at from test_clock $$",
        ] {
            sqlx::query(sql).execute(&bench.pool).await.expect("clock");
        }
        bench.deploy(definition("w", vec![step("w", Kind::Wait { until: WaitUntil::For(3_600_000) })])).await;
        let stage = Self { schedules: bench.client.schedules(), bench };
        stage.set(at(now)).await;
        stage
    }

    async fn set(&self, now: DateTime<Utc>) {
        sqlx::query("update test_clock set at = $1").bind(now).execute(&self.bench.pool).await.expect("clock");
    }

    async fn set_and_fire(&self, now: &str) -> usize {
        self.set(at(now)).await;
        self.schedules.fire_due().await.expect("fire")
    }

    async fn create(&self, name: &str, spec: Spec) {
        let new = NewSchedule { name: name.into(), spec, paused: false, note: None, owner: Some("user:1".into()) };
        self.schedules.create(new).await.expect("schedule");
    }

    /// What became of the actions, by number.
    async fn states(&self, name: &str) -> Vec<A> {
        let mut recent = self.schedules.describe(name).await.expect("schedule").recent;
        recent.reverse();
        recent.into_iter().map(|a| a.state).collect()
    }

    /// Open runs of the schedule, by the instant that they were scheduled for.
    async fn open(&self, name: &str) -> Vec<(String, RunId)> {
        let filter =
            Filter { attributes: Some(json!({"schedule": name})), open_only: true, limit: 200, ..Filter::default() };
        let mut open: Vec<_> = (self.bench.client.list(filter).await.expect("list").into_iter())
            .map(|r| (r.attributes["scheduled_at"].as_str().expect("text").to_owned(), r.run_id))
            .collect();
        open.sort();
        let told: BTreeSet<RunId> = self.schedules.describe(name).await.expect("schedule").open.into_iter().collect();
        assert_eq!(told, open.iter().map(|(_, id)| *id).collect(), "describe tells the same");
        open
    }

    async fn close(&self, run: RunId) {
        self.bench.client.terminate(run, "the test").await.expect("terminate");
    }

    async fn cancels(&self, run: RunId) -> i64 {
        sqlx::query_scalar("select count(*) from inbox where run_id = $1 and kind = 'cancel'")
            .bind(run.0)
            .fetch_one(&self.bench.pool)
            .await
            .expect("count")
    }
}

fn cron(expression: &str, timezone: &str) -> Spec {
    Spec::new("w", When::Cron { expression: expression.into(), timezone: timezone.into() })
}

fn hourly(overlap: Overlap) -> Spec {
    Spec { overlap, ..cron("0 * * * *", "UTC") }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instant_starts_one_run_with_the_attributes_of_its_schedule() {
    let stage = Stage::at("2026-11-25T09:59:00Z").await;
    let spec = Spec { attributes: json!({"user_id": "u1"}), ..hourly(Overlap::AllowAll) };
    stage.create("s", spec).await;
    assert_eq!(stage.set_and_fire("2026-11-25T09:59:59Z").await, 0);
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:30Z").await, 0, "once");
    let detail = stage.schedules.describe("s").await.expect("schedule");
    let view = &detail.schedule;
    assert_eq!((view.next_at, view.started), (Some(at("2026-11-25T11:00:00Z")), 1));
    assert_eq!(detail.upcoming.len(), 5);
    let run = run_id(view.id, at("2026-11-25T10:00:00Z"), None);
    assert_eq!(detail.recent[0].run_id, Some(run));
    let run = stage.bench.client.describe(run).await.expect("run");
    assert_eq!(run.attributes, json!({"user_id": "u1", "schedule": "s", "scheduled_at": "2026-11-25T10:00:00Z"}));
    assert_eq!(run.workflow, "w");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_overlap_policy_does_what_its_name_says() {
    let (ten, eleven, twelve) = ("2026-11-25T10:00:00Z", "2026-11-25T11:00:00Z", "2026-11-25T12:00:00Z");
    let later = "2026-11-25T12:10:00Z";
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    for overlap in Overlap::ALL {
        stage.create(overlap.as_str(), hourly(*overlap)).await;
    }
    assert_eq!(stage.set_and_fire(ten).await, 6);
    let mut first = std::collections::BTreeMap::new();
    for overlap in Overlap::ALL {
        first.insert(overlap.as_str(), stage.open(overlap.as_str()).await[0].1);
    }
    // allow_all starts beside it; terminate_other ends it and starts.
    assert_eq!(stage.set_and_fire(eleven).await, 2);
    assert_eq!(stage.set_and_fire(twelve).await, 2);
    let open = |name: &'static str| {
        let stage = &stage;
        async move { stage.open(name).await.into_iter().map(|(at, _)| at).collect::<Vec<_>>() }
    };
    assert_eq!(open("skip").await, [ten]);
    assert_eq!(stage.states("skip").await, [A::Started, A::Skipped, A::Skipped]);
    assert_eq!(open("buffer_one").await, [ten]);
    assert_eq!(stage.states("buffer_one").await, [A::Started, A::Pending, A::Skipped]);
    assert_eq!(open("buffer_all").await, [ten]);
    assert_eq!(stage.states("buffer_all").await, [A::Started, A::Pending, A::Pending]);
    assert_eq!(open("cancel_other").await, [ten]);
    assert_eq!(stage.states("cancel_other").await, [A::Started, A::Skipped, A::Pending]);
    assert_eq!(stage.cancels(first["cancel_other"]).await, 1, "asked once, however often it is looked at");
    assert_eq!(open("terminate_other").await, [twelve]);
    assert_eq!(stage.states("terminate_other").await, [A::Started, A::Started, A::Started]);
    assert_eq!(open("allow_all").await, [ten, eleven, twelve]);
    for name in ["skip", "buffer_one", "buffer_all", "allow_all"] {
        assert_eq!(stage.cancels(first[name]).await, 0, "{name}");
    }

    // The first runs close: what waited starts, one at a time.
    for name in ["skip", "buffer_one", "buffer_all", "cancel_other"] {
        stage.close(first[name]).await;
    }
    assert_eq!(stage.set_and_fire(later).await, 3);
    assert_eq!(open("skip").await, [] as [&str; 0], "a skipped instant is gone");
    assert_eq!(open("buffer_one").await, [eleven]);
    assert_eq!(open("buffer_all").await, [eleven]);
    assert_eq!(open("cancel_other").await, [twelve], "the newest");
    assert_eq!(stage.set_and_fire("2026-11-25T12:20:00Z").await, 0);
    stage.close(stage.open("buffer_all").await[0].1).await;
    assert_eq!(stage.set_and_fire("2026-11-25T12:30:00Z").await, 1);
    assert_eq!(open("buffer_all").await, [twelve]);
    let skipped = &stage.schedules.describe("skip").await.expect("schedule").recent[0];
    assert!(skipped.note.as_deref().is_some_and(|n| n.contains(&first["skip"].to_string())), "{skipped:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_termination_that_was_committed_and_not_done_is_done_by_whoever_looks_next() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::TerminateOther)).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    let first = stage.open("s").await[0].1;
    // What a worker leaves that commits the turn of eleven o'clock and dies before it terminates.
    for sql in [
        "insert into schedule_actions (schedule_id, n, instant, kind, state) select id, action_n + 1, next_at, 'scheduled', 'pending' from schedules",
        "update schedules set action_n = action_n + 1, next_at = next_at + interval '1 hour', wake_at = next_at + interval '2 seconds'",
    ] {
        sqlx::query(sql).execute(&stage.bench.pool).await.expect("left");
    }
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:01Z").await, 0);
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:02Z").await, 1);
    assert_eq!(stage.bench.client.describe(first).await.expect("run").status, RunStatus::Terminated);
    assert_eq!(stage.open("s").await[0].0, "2026-11-25T11:00:00Z");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_terminated_is_tried_once_a_look() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::TerminateOther)).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    let broken = stage.open("s").await[0].1;
    for sql in [
        "create function test_refuse() returns trigger language plpgsql as $$ begin raise exception 'it stays'; end $$",
        "create trigger test_refuse before update on runs for each row when (new.status = 'terminated') execute function test_refuse()",
    ] {
        sqlx::query(sql).execute(&stage.bench.pool).await.expect("broken");
    }
    let epoch = async || -> i64 {
        sqlx::query_scalar("select epoch from runs where run_id = $1")
            .bind(broken.0)
            .fetch_one(&stage.bench.pool)
            .await
            .expect("epoch")
    };
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:00Z").await, 0);
    assert_eq!(epoch().await, 1, "its worker is told once that it is taken away");
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:01Z").await, 0);
    assert_eq!(epoch().await, 1);
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:02Z").await, 0);
    assert_eq!(epoch().await, 2, "and again when the schedule is looked at again");
    sqlx::query("drop trigger test_refuse on runs").execute(&stage.bench.pool).await.expect("mended");
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:04Z").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_reset_is_in_the_way_of_the_next_one_as_before() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::Skip)).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    let run = stage.open("s").await[0].1;
    let worker = stage.bench.worker().await;
    stage.bench.until(run, "waits", |v| !v.waiting.is_empty()).await;
    let asked = Fork {
        run_id: None,
        at: At::Seq(1),
        inputs: Map::new(),
        definition: None,
        attributes: None,
        reason: "again".into(),
    };
    let reset = stage.bench.client.reset(run, asked).await.expect("reset");
    // Its wait is over when the clock moves, and nobody is to see that.
    worker.drain(GRACE).await;
    assert_eq!(stage.open("s").await, [("2026-11-25T10:00:00Z".to_owned(), reset.run_id)]);
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:00Z").await, 0);
    assert_eq!(stage.states("s").await, [A::Started, A::Skipped]);
    stage.close(reset.run_id).await;
    assert_eq!(stage.set_and_fire("2026-11-25T12:00:00Z").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wanted_by_hand_is_bounded_too() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::BufferAll)).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    for sql in [
        "insert into schedule_actions (schedule_id, n, instant, kind, state)
         select id, action_n + g, now(), 'manual', 'pending' from schedules, generate_series(1, 9999) g",
        "update schedules set action_n = action_n + 9999",
    ] {
        sqlx::query(sql).execute(&stage.bench.pool).await.expect("wait");
    }
    assert_eq!(stage.schedules.trigger("s", None).await.expect("one more").state, A::Pending);
    let error = stage.schedules.trigger("s", None).await.expect_err("refused");
    assert_eq!(error.code(), "schedule_invalid");
    assert!(error.to_string().contains("10000 actions wait"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_downtime_the_window_is_caught_up_and_the_rest_is_missed_in_one_jump() {
    let stage = Stage::at("2025-11-25T09:30:00Z").await;
    let wide = Spec { catchup_ms: 3 * 3_600_000, ..hourly(Overlap::AllowAll) };
    stage.create("wide", wide).await;
    stage.create("none", Spec { catchup_ms: 0, ..hourly(Overlap::AllowAll) }).await;
    stage.create("skip", Spec { catchup_ms: 3 * 3_600_000, ..hourly(Overlap::Skip) }).await;
    stage.create("newest", Spec { catchup_ms: 500 * 3_600_000, ..hourly(Overlap::CancelOther) }).await;
    // A year later.
    assert_eq!(stage.set_and_fire("2026-11-25T10:30:00Z").await, 3 + 1 + 1);
    let hours: Vec<String> = stage.open("wide").await.into_iter().map(|(at, _)| at).collect();
    assert_eq!(hours, ["2026-11-25T08:00:00Z", "2026-11-25T09:00:00Z", "2026-11-25T10:00:00Z"]);
    assert_eq!(stage.states("wide").await, [A::Missed, A::Started, A::Started, A::Started]);
    assert_eq!(stage.states("none").await, [A::Missed]);
    assert_eq!(stage.states("skip").await, [A::Missed, A::Started, A::Skipped, A::Skipped]);
    assert_eq!(stage.open("skip").await[0].0, "2026-11-25T08:00:00Z");
    // Of five hundred that replace each other, only the newest.
    assert_eq!(stage.open("newest").await.len(), 1);
    assert_eq!(stage.open("newest").await[0].0, "2026-11-25T10:00:00Z");
    let view = stage.schedules.describe("newest").await.expect("schedule").schedule;
    assert_eq!((view.started, view.skipped, view.missed), (1, 499, 1));
    // What is late by less than a minute is on time without a window as well.
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:59Z").await, 2, "wide and none; skip skips, newest waits");
    assert_eq!(stage.states("none").await, [A::Missed, A::Started]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_bounded() {
    let stage = Stage::at("2026-11-20T00:00:30Z").await;
    let spec = Spec { overlap: Overlap::BufferAll, catchup_ms: 86_400_000, ..cron("* * * * *", "UTC") };
    stage.create("s", spec).await;
    assert_eq!(stage.set_and_fire("2026-11-21T00:00:00Z").await, 1);
    let view = stage.schedules.describe("s").await.expect("schedule").schedule;
    assert_eq!((view.started, view.skipped), (1, 1440 - 1 - 1000));
    let kept: i64 = sqlx::query_scalar("select count(*) from schedule_actions where state <> 'pending'")
        .fetch_one(&stage.bench.pool)
        .await
        .expect("count");
    assert!(kept <= 101, "{kept} decided actions are kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_fills_in_what_has_no_run_however_often_it_is_sent() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::Skip)).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:00Z").await, 0, "skipped");
    stage.set(at("2026-11-25T11:30:00Z")).await;
    let (from, to) = (at("2026-11-25T08:00:00Z"), at("2026-11-25T11:00:00Z"));
    let filled = stage.schedules.backfill("s", from, to, Some(Overlap::AllowAll)).await.expect("backfill");
    assert_eq!((filled.instants, filled.added), (4, 3), "ten o'clock has its run");
    assert_eq!(stage.schedules.fire_due().await.expect("fire"), 3);
    let filled = stage.schedules.backfill("s", from, to, Some(Overlap::AllowAll)).await.expect("backfill");
    assert_eq!((filled.instants, filled.added), (4, 0));
    assert_eq!(stage.schedules.fire_due().await.expect("fire"), 0);
    let hours: Vec<String> = stage.open("s").await.into_iter().map(|(at, _)| at[11..13].to_owned()).collect();
    assert_eq!(hours, ["08", "09", "10", "11"]);
    // Also when nobody remembers what was done: the runs' ids do.
    for (_, run) in stage.open("s").await {
        stage.close(run).await;
    }
    sqlx::query("delete from schedule_actions").execute(&stage.bench.pool).await.expect("forgotten");
    let filled = stage.schedules.backfill("s", from, to, Some(Overlap::BufferAll)).await.expect("backfill");
    assert_eq!(filled.added, 4);
    assert_eq!(stage.schedules.fire_due().await.expect("fire"), 0);
    assert_eq!(stage.states("s").await, [A::Skipped; 4]);
    // Of a range whose runs replace each other, the newest is left.
    let (from, to) = (at("2026-10-01T00:00:00Z"), at("2026-10-20T23:00:00Z"));
    let filled = stage.schedules.backfill("s", from, to, Some(Overlap::TerminateOther)).await.expect("backfill");
    assert_eq!(filled.added, 480);
    assert_eq!(stage.schedules.fire_due().await.expect("fire"), 1);
    assert_eq!(stage.open("s").await[0].0, "2026-10-20T23:00:00Z");
    // It does not count against the calendar, and its own order is that of the instants.
    assert_eq!(
        stage.schedules.describe("s").await.expect("schedule").schedule.next_at,
        Some(at("2026-11-25T12:00:00Z"))
    );
    let (from, to) = (at("2026-11-01T10:00:00.0005Z"), at("2026-11-01T11:00:00Z"));
    let filled = stage.schedules.backfill("s", from, to, Some(Overlap::Skip)).await.expect("backfill");
    assert_eq!(filled.instants, 1, "ten o'clock lies before the range");
    for (from, to, word) in [
        ("2026-11-25T11:00:00Z", "2026-11-25T10:00:00Z", "before it begins"),
        ("2026-11-25T11:00:00Z", "2026-11-25T13:00:00Z", "now"),
        ("2024-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "10000"),
    ] {
        let error = stage.schedules.backfill("s", at(from), at(to), None).await.expect_err("refused");
        assert_eq!(error.code(), "schedule_invalid");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_workers_at_once_one_starts_each_run() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    for n in 0..20 {
        stage.create(&format!("s{n}"), hourly(Overlap::AllowAll)).await;
    }
    stage.set(at("2026-11-25T10:00:10Z")).await;
    let fired = futures_util::future::join_all((0..8).map(|_| stage.schedules.fire_due())).await;
    let started: usize = fired.into_iter().map(|n| n.expect("fire")).sum();
    assert_eq!(started, 20);
    let runs: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&stage.bench.pool).await.expect("count");
    assert_eq!(runs, 20);
    for n in 0..20 {
        let view = stage.schedules.describe(&format!("s{n}")).await.expect("schedule").schedule;
        assert_eq!((view.started, view.next_at), (1, Some(at("2026-11-25T11:00:00Z"))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_fails_leaves_nothing_and_lets_the_others_go_first() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("poison", hourly(Overlap::AllowAll)).await;
    stage.create("well", hourly(Overlap::AllowAll)).await;
    for sql in [
        "create function test_refuse() returns trigger language plpgsql as $$ begin raise exception 'no run'; end $$",
        "create trigger test_refuse before insert on runs for each row when (new.attributes->>'schedule' = 'poison') execute function test_refuse()",
    ] {
        sqlx::query(sql).execute(&stage.bench.pool).await.expect("fault");
    }
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    let poison = stage.schedules.describe("poison").await.expect("schedule");
    assert_eq!(
        (poison.schedule.next_at, poison.recent.len()),
        (Some(at("2026-11-25T10:00:00Z")), 0),
        "nothing happened"
    );
    sqlx::query("drop trigger test_refuse on runs").execute(&stage.bench.pool).await.expect("passed");
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:29Z").await, 0, "it rests");
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:31Z").await, 1);
    assert_eq!(stage.states("poison").await, [A::Started]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_schedule_does_nothing_by_itself() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::BufferAll)).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 1);
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:00Z").await, 0, "waits");
    let view = stage.schedules.pause("s", Some("too much".into())).await.expect("pause");
    assert_eq!((view.note.as_deref(), view.next_at, view.skipped), (Some("too much"), None, 1));
    assert_eq!(view.paused_at, Some(at("2026-11-25T11:00:00Z")));
    stage.close(stage.open("s").await[0].1).await;
    assert_eq!(stage.set_and_fire("2026-11-25T14:00:00Z").await, 0);
    // By hand and by range it acts.
    let action = stage.schedules.trigger("s", None).await.expect("trigger");
    assert_eq!((action.state, action.kind, action.instant), (A::Started, K::Manual, at("2026-11-25T14:00:00Z")));
    let again = stage.schedules.trigger("s", Some(Overlap::AllowAll)).await.expect("trigger");
    assert_eq!(again.state, A::Started);
    assert_ne!(action.run_id, again.run_id, "two by hand are two");
    let skipped = stage.schedules.trigger("s", Some(Overlap::Skip)).await.expect("trigger");
    assert_eq!(skipped.state, A::Skipped);
    let replaced = stage.schedules.trigger("s", Some(Overlap::TerminateOther)).await.expect("trigger");
    assert_eq!(replaced.state, A::Pending);
    assert_eq!(stage.schedules.fire_due().await.expect("fire"), 1, "as soon as the others are ended");
    assert_eq!(stage.open("s").await.len(), 1);
    stage.set(at("2026-11-25T14:30:00Z")).await;
    let view = stage.schedules.resume("s", Some("fixed".into())).await.expect("resume");
    assert_eq!((view.paused_at, view.next_at), (None, Some(at("2026-11-25T15:00:00Z"))), "nothing is caught up");
    assert_eq!(stage.schedules.resume("s", Some("again".into())).await.expect("resume").note.as_deref(), Some("fixed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn jitter_moves_an_instant_within_its_bound_and_the_same_way_for_everybody() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    let ten = at("2026-11-25T10:00:00Z");
    for n in 0..12 {
        stage.create(&format!("s{n}"), Spec { jitter_ms: 600_000, ..hourly(Overlap::AllowAll) }).await;
    }
    let dues: Vec<DateTime<Utc>> = sqlx::query_scalar("select wake_at from schedules order by 1")
        .fetch_all(&stage.bench.pool)
        .await
        .expect("dues");
    assert!(dues.iter().all(|due| *due >= ten && *due < ten + Duration::minutes(10)), "{dues:?}");
    let spread: BTreeSet<_> = dues.iter().collect();
    assert!(spread.len() > 8, "{spread:?}");
    let mut started = 0;
    for due in &dues {
        stage.set(*due - Duration::milliseconds(1)).await;
        assert_eq!(stage.schedules.fire_due().await.expect("fire"), 0);
        stage.set(*due).await;
        started += stage.schedules.fire_due().await.expect("fire");
    }
    assert_eq!(started, 12);
    // The instant is the calendar's all the same.
    assert_eq!(stage.open("s3").await[0].0, "2026-11-25T10:00:00Z");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_change_of_clocks_neither_loses_nor_doubles_a_nightly_run() {
    let stage = Stage::at("2026-03-28T12:00:00Z").await;
    stage.create("s", Spec { overlap: Overlap::AllowAll, ..cron("30 2 * * *", "Europe/Berlin") }).await;
    // 02:30 does not exist on the 29th: the first instant after the gap.
    assert_eq!(stage.set_and_fire("2026-03-29T00:59:59Z").await, 0);
    assert_eq!(stage.set_and_fire("2026-03-29T01:00:00Z").await, 1);
    assert_eq!(stage.set_and_fire("2026-03-30T00:29:00Z").await, 0);
    assert_eq!(stage.set_and_fire("2026-03-30T00:30:00Z").await, 1);
    stage.schedules.delete("s").await.expect("delete");
    stage.set(at("2026-10-24T12:00:00Z")).await;
    stage.create("s", Spec { overlap: Overlap::AllowAll, ..cron("30 2 * * *", "Europe/Berlin") }).await;
    assert_eq!(stage.set_and_fire("2026-10-25T00:30:00Z").await, 1);
    assert_eq!(stage.set_and_fire("2026-10-25T01:30:30Z").await, 0, "the second 02:30");
    assert_eq!(stage.set_and_fire("2026-10-26T01:30:00Z").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_limit_ends_the_calendar_and_another_one_starts_it_again() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    let spec = Spec { run_limit: Some(2), catchup_ms: 86_400_000, ..hourly(Overlap::AllowAll) };
    stage.create("s", spec.clone()).await;
    assert_eq!(stage.schedules.trigger("s", None).await.expect("trigger").state, A::Started, "does not count");
    assert_eq!(stage.set_and_fire("2026-11-25T13:30:00Z").await, 2);
    let view = stage.schedules.describe("s").await.expect("schedule").schedule;
    assert_eq!((view.runs_left, view.next_at), (Some(0), None));
    assert_eq!(stage.set_and_fire("2026-11-25T15:30:00Z").await, 0);
    let view = stage.schedules.update("s", Spec { run_limit: None, ..spec.clone() }).await.expect("update");
    assert_eq!((view.runs_left, view.next_at), (None, Some(at("2026-11-25T16:00:00Z"))));
    assert_eq!(stage.set_and_fire("2026-11-25T16:00:00Z").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_somebody_else_under_the_same_business_key_is_in_the_way() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", Spec { workflow_id: Some("project:1".into()), ..hourly(Overlap::AllowAll) }).await;
    let definition = stage.bench.client.pointer("w", "current").await.expect("deployed");
    let other = stage.bench.start_as(definition, json!({}), Some("project:1")).await.run_id;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 0);
    let recent = &stage.schedules.describe("s").await.expect("schedule").recent[0];
    assert_eq!(recent.state, A::Skipped);
    assert!(recent.note.as_deref().is_some_and(|n| n.contains(&other.to_string())), "{recent:?}");
    stage.close(other).await;
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:00Z").await, 1);
    assert_eq!(stage.bench.client.open_run("project:1").await.expect("key"), Some(stage.open("s").await[0].1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_that_no_longer_takes_the_inputs_fails_the_action_and_not_the_schedule() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    stage.create("s", hourly(Overlap::Skip)).await;
    let mut stricter = definition("w", vec![work("a", &[])]);
    stricter.inputs.insert("n".into(), Input { schema: json!({"type": "integer"}), required: true, default: None });
    stage.bench.deploy(stricter).await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 0);
    let recent = &stage.schedules.describe("s").await.expect("schedule").recent[0];
    assert_eq!(recent.state, A::Failed);
    assert!(recent.note.as_deref().is_some_and(|n| n.starts_with("input_invalid: ")), "{recent:?}");
    let error = stage.schedules.update("s", hourly(Overlap::Skip)).await.expect_err("refused");
    assert_eq!(error.code(), "input_invalid");
    let spec = Spec { inputs: json!({"n": 3}), ..hourly(Overlap::Skip) };
    let view = stage.schedules.update("s", spec).await.expect("update");
    assert_eq!((view.failed, view.next_at), (1, Some(at("2026-11-25T11:00:00Z"))));
    assert_eq!(stage.set_and_fire("2026-11-25T11:00:00Z").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_name() {
    let stage = Stage::at("2026-11-25T09:30:00Z").await;
    let new = |name: &str, spec: Spec| NewSchedule { name: name.into(), spec, paused: false, note: None, owner: None };
    let good = || hourly(Overlap::Skip);
    let schedules = &stage.schedules;
    for (what, code, words) in [
        (
            new("a b", Spec { jitter_ms: u64::MAX, ..cron("61 * * * *", "Mars/Base") }),
            "schedule_invalid",
            "cannot be a name",
        ),
        (new("s", cron("61 * * * *", "UTC")), "schedule_invalid", "at column 1"),
        (new("s", cron("* * * * *", "Mars/Base")), "schedule_invalid", "no time zone"),
        (new("s", Spec { workflow: "nobody".into(), ..good() }), "definition_not_found", "nobody@current"),
        (new("s", Spec { pointer: "canary".into(), ..good() }), "definition_not_found", "w@canary"),
        (new("s", Spec { inputs: json!({"x": 1}), ..good() }), "input_invalid", "x"),
        (new("s", Spec { attributes: json!({"x": "y".repeat(9000)}), ..good() }), "too_large", "attributes"),
        (NewSchedule { note: Some("n".repeat(501)), ..new("s", good()) }, "schedule_invalid", "note"),
    ] {
        let error = schedules.create(what).await.expect_err(words);
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    stage.create("s", good()).await;
    assert!(matches!(schedules.create(new("s", good())).await, Err(Error::ScheduleExists(_))));
    for result in [
        schedules.pause("x", None).await.err(),
        schedules.resume("x", None).await.err(),
        schedules.update("x", good()).await.err(),
        schedules.delete("x").await.err(),
        schedules.trigger("x", None).await.err(),
        schedules.describe("x").await.err(),
        schedules.backfill("x", at("2026-11-25T00:00:00Z"), at("2026-11-25T01:00:00Z"), None).await.err(),
    ] {
        assert!(matches!(result, Some(Error::ScheduleNotFound(_))), "{result:?}");
    }
    for name in ["t", "u", "v"] {
        stage.create(name, good()).await;
    }
    let names =
        |page: Vec<loopwright_engine::schedule::ScheduleView>| page.into_iter().map(|s| s.name).collect::<Vec<_>>();
    assert_eq!(names(schedules.list(None, 3).await.expect("list")), ["s", "t", "u"]);
    assert_eq!(names(schedules.list(Some("u"), 3).await.expect("list")), ["v"]);
    schedules.delete("s").await.expect("delete");
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_look_after_schedules_by_themselves() {
    let bench = Bench::new().await;
    bench.deploy(definition("w", vec![work("a", &[])])).await;
    let schedules = bench.client.schedules();
    let spec = Spec { run_limit: Some(2), ..Spec::new("w", When::Every { ms: 1000, offset_ms: 0 }) };
    let new = NewSchedule { name: "s".into(), spec, paused: false, note: None, owner: None };
    schedules.create(new).await.expect("schedule");
    let (one, two) = (bench.worker().await, bench.worker().await);
    crate::faults::reaches(&bench.pool, "select count(*) from runs where closed_at is not null", 2).await;
    let detail = schedules.describe("s").await.expect("schedule");
    assert_eq!(detail.schedule.runs_left, Some(0));
    for action in detail.recent.iter().filter(|a| a.state == A::Started) {
        let run = bench.closed(action.run_id.expect("a run")).await;
        assert_eq!(run.status, RunStatus::Completed);
    }
    one.drain(GRACE).await;
    two.drain(GRACE).await;
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_too_old_for_the_workflow_loses_no_instant() {
    let stage = Stage::at("2026-11-25T09:59:00Z").await;
    stage.create("s", hourly(Overlap::AllowAll)).await;
    let sets = async |sql: &'static str| {
        sqlx::query(sql).execute(&stage.bench.pool).await.expect("sql");
    };
    sets("update definitions set format = 900, ir = ir || '{\"format\": 900}'").await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:00:00Z").await, 0);
    assert_eq!(stage.schedules.describe("s").await.expect("schedule").schedule.failed, 0);
    sets("update definitions set format = 1, ir = ir || '{\"format\": 1}'").await;
    assert_eq!(stage.set_and_fire("2026-11-25T10:01:00Z").await, 1);
    assert_eq!(stage.open("s").await[0].0, "2026-11-25T10:00:00Z");
}
