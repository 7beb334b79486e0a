//! What must hold when everything is quiet. Reads rows and JSON, shares no code with the engine, and believes only the
//! recorder, the answers that were given, and Postgres.

use super::{
    recorder::Shown,
    report::{Finding, Sights},
    traffic::Promises,
    work::{ANSWER, Answer},
};
use loopwright_activities::billing::audit;
use sqlx::{PgConnection, PgPool};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// Name, what a row means, and a query that yields what is at fault as text.
const CHECKS: &[(&str, &str, &str)] = &[
    (
        "open_run",
        "an open run neither waits for a signal nor may anybody claim it",
        "select r.run_id || ' ' || r.status || ', waiting ' || coalesce(r.waiting, 'for nothing') from runs r where r.closed_at is null
           and not (r.status = 'running' and r.parked and r.owner is null and r.waiting = 'signal' and r.inbox_n = r.inbox_seen
                    and exists (select from ready q where q.run_id = r.run_id))",
    ),
    (
        "closed_run",
        "a closed run has an owner, a place in the queue or a business key",
        "select r.run_id::text from runs r where r.closed_at is not null and (r.owner is not null
            or exists (select from ready q where q.run_id = r.run_id) or exists (select from workflow_ids w where w.run_id = r.run_id))",
    ),
    (
        "failed_run",
        "a run failed although each of its steps may be tried again",
        "select run_id || ' ' || coalesce(failure::text, '') from runs where status = 'failed'",
    ),
    (
        "history_gap",
        "a history is not numbered from its beginning to the run's seq",
        "select r.run_id::text from runs r
           left join (select run_id, count(*) n, min(seq) low, max(seq) high from history group by 1) h on h.run_id = r.run_id
         where coalesce(h.n, 0) <> r.seq - coalesce(r.forked_seq, 0) or coalesce(h.high, r.seq) <> r.seq
            or coalesce(h.low, 1) <> coalesce(r.forked_seq, 0) + 1",
    ),
    (
        "history_epoch",
        "an epoch fell within a history",
        "select distinct run_id::text from (select run_id, epoch, lag(epoch) over (partition by run_id order by seq) before from history) h
         where epoch < before",
    ),
    (
        "history_end",
        "a closed run's history does not end with the one event that closes it, or an open one's has it",
        "select r.run_id::text from runs r
           left join (select h.run_id, count(*) n, max(h.seq) seq from history h, jsonb_array_elements(h.events) e
                      where e->>'type' = 'run_closed' group by 1) c on c.run_id = r.run_id
         where coalesce(c.n, 0) <> (r.closed_at is not null)::int or c.seq <> r.seq",
    ),
    (
        "attempt",
        "an attempt was not started once and ended once",
        "select coalesce(e->>'attempt_id', '?') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('attempt_started', 'attempt_ended') group by 1
         having count(*) filter (where e->>'type' = 'attempt_started') <> 1 or count(*) filter (where e->>'type' = 'attempt_ended') <> 1",
    ),
    (
        "step",
        "a step of a run began or ended twice",
        "select h.run_id || ' ' || (e->>'path') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('step_started', 'step_ended') group by h.run_id, e->>'path', e->>'type' having count(*) > 1",
    ),
    (
        "signal",
        "a message was received or consumed twice",
        "select h.run_id || ' ' || (e->>'n') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('signal_received', 'signal_consumed') group by h.run_id, e->>'n', e->>'type' having count(*) > 1",
    ),
    (
        "update",
        "an update was answered twice",
        "select h.run_id || ' ' || (e->>'id') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('update_completed', 'update_rejected') group by h.run_id, e->>'id' having count(*) > 1",
    ),
    (
        "group",
        "more runs of a concurrency group were under way than its limit of 2",
        "with parts as (select r.run_id, r.inputs->>'stumble' as name, h.at as began, r.closed_at from runs r
                          join history h on h.run_id = r.run_id cross join jsonb_array_elements(h.events) e
                        where r.workflow = 'chaos-part' and e->>'type' = 'run_started')
         select p.run_id || ' part-' || p.name from parts p
         where (select count(*) from parts o where o.name = p.name and o.began <= p.began
                  and coalesce(o.closed_at, 'infinity') > p.began) > 2",
    ),
    (
        "child",
        "a step has several children, or none of the outcome that it recorded",
        "select parent_run_id || ' ' || parent_path from runs where parent_run_id is not null and first_run_id is null group by parent_run_id, parent_path having count(*) > 1
         union all
         select h.run_id || ' ' || (e->>'path') from history h cross join jsonb_array_elements(h.events) e
           join runs c on c.parent_run_id = h.run_id and c.parent_path = e->>'path' and c.continued_as is null
         where e->>'type' = 'step_ended' and e->>'status' = 'succeeded' and (c.status <> 'completed' or c.output is distinct from e->'output')",
    ),
    (
        "chain",
        "a run that continued as new has not one run in its place, or two runs of a chain are open",
        "select r.run_id::text from runs r where (r.status = 'continued') <> (r.continued_as is not null)
            or r.continued_as is not null and (select count(*) from runs n where n.continued_from = r.run_id and n.run_id = r.continued_as) <> 1
         union all
         select coalesce(first_run_id, run_id)::text from runs where closed_at is null group by 1 having count(*) > 1",
    ),
    (
        "dead_worker",
        "a dead worker's runs were not taken over",
        "select id::text from dead_workers where not runs_taken",
    ),
    (
        "settled",
        "an attempt that is paid for is unknown to the ledger, still open there, or only known there",
        "select coalesce(a.id::text, h.id) from
           (select e->>'attempt_id' id from history, jsonb_array_elements(events) e where e->>'type' = 'attempt_started' and e->>'activity' = 'paid@1') h
           full join activity_attempts a on a.id::text = h.id
         where h.id is null or a.id is null or a.state = 'running'",
    ),
    (
        "charged",
        "a saved answer was not charged exactly once",
        "select c.run_id || ' ' || c.path from checkpoints c where c.key = 'answer' and
           (select count(*) from activity_attempts a join api_key_usage k on k.attempt_id = a.id
            where a.run_id = c.run_id and a.path = c.path and k.state = 'succeeded' and k.cost_pusd > 0) <> 1",
    ),
];

/// Checks that are made in Rust, over what the recorder saw and what was acknowledged.
const OTHERS: &[&str] =
    &["effect", "effect_key", "promise", "request", "coverage", "log", "process", "drain", "ledger", "settle"];

/// Names of all checks.
pub(super) fn names() -> Vec<&'static str> {
    CHECKS.iter().map(|(name, ..)| *name).chain(OTHERS.iter().copied()).collect()
}

/// Looks for whatever must not be.
///
/// # Errors
/// The database cannot be asked.
pub(super) async fn run(pool: &PgPool, seen: &[Shown], promises: &Promises) -> anyhow::Result<(Sights, Vec<Finding>)> {
    let mut conn = pool.acquire().await?;
    let mut found = Vec::new();
    for (check, meaning, query) in CHECKS {
        let subjects: Vec<String> = sqlx::query_scalar(*query).fetch_all(&mut *conn).await?;
        found.extend(subjects.into_iter().map(|subject| Finding::new(check, meaning, subject)));
    }
    for broken in audit::run(&mut conn).await? {
        found.push(Finding::new("ledger", broken.meaning, format!("{} {}", broken.invariant, broken.subject)));
    }
    kept(&mut conn, promises, &mut found).await?;
    let sights = effects(&mut conn, seen, &mut found).await?;
    Ok((sights, found))
}

/// What was acknowledged is there, once.
async fn kept(conn: &mut PgConnection, promises: &Promises, found: &mut Vec<Finding>) -> anyhow::Result<()> {
    let mut broken = |meaning, subject: String| found.push(Finding::new("promise", meaning, subject));
    let runs: BTreeMap<Uuid, String> =
        sqlx::query_as("select run_id, status from runs").fetch_all(&mut *conn).await?.into_iter().collect();
    for run in promises.runs.iter().filter(|run| !runs.contains_key(&run.0)) {
        broken("an acknowledged start or fork is not there", run.to_string());
    }
    for run in promises.terminated.iter().filter(|run| runs.get(&run.0).map(String::as_str) != Some("terminated")) {
        broken("an acknowledged termination did not happen", run.to_string());
    }
    let answered: Vec<(Uuid, String)> = sqlx::query_as(
        "select h.run_id, e->>'id' from history h, jsonb_array_elements(h.events) e where e->>'type' = 'update_completed'",
    )
    .fetch_all(&mut *conn)
    .await?;
    for (run, id) in promises.updates.iter().filter(|(run, id)| !answered.contains(&(run.0, id.clone()))) {
        broken("the answer of an update is not in the history", format!("{run} {id}"));
    }
    // A message counts as read once when the run has seen it; a run that closed first has not.
    let messages: Vec<(Uuid, Option<String>, String, i64, bool, i64)> = sqlx::query_as(
        "select i.run_id, i.dedupe_id, i.kind, i.n, i.n <= r.inbox_seen and r.status not in ('terminated', 'quarantined'),
                (select count(*) from history h, jsonb_array_elements(h.events) e where h.run_id = i.run_id
                   and e->>'type' in ('signal_received', 'signal_dropped') and (e->>'n')::bigint = i.n)
         from inbox i join runs r on r.shard = i.shard and r.run_id = i.run_id where i.run_seq >= 0",
    )
    .fetch_all(conn)
    .await?;
    let stored: BTreeSet<(Uuid, &str)> =
        messages.iter().filter_map(|(run, id, ..)| Some((*run, id.as_deref()?))).collect();
    for (run, id) in promises.messages.iter().filter(|(run, id)| !stored.contains(&(run.0, id))) {
        broken("an acknowledged message is not there", format!("{run} {id}"));
    }
    for run in &promises.cancelled {
        if !messages.iter().any(|(of, _, kind, ..)| *of == run.0 && kind == "cancel") {
            broken("an acknowledged cancel is not there", run.to_string());
        }
    }
    for (run, _, kind, n, read, recorded) in &messages {
        if kind == "signal" && *read && *recorded != 1 {
            broken("a signal that was read is not in the history once", format!("{run} {n}: {recorded} times"));
        }
    }
    Ok(())
}

/// What a step has committed: the attempt that succeeded or saved its answer, and the answer.
struct Committed {
    attempt: u32,
    answer: Answer,
}

/// Each attempt showed its key at most once and was recorded as started; no attempt showed it that came after the one whose
/// result was committed; what was committed is a sight of that key.
///
/// A sight by an attempt *before* the committed one is none: it was replaced, froze before it showed the key, and could not
/// know. That is what the key is for.
async fn effects(conn: &mut PgConnection, seen: &[Shown], found: &mut Vec<Finding>) -> anyhow::Result<Sights> {
    let started: Vec<(Uuid, String, i32)> = sqlx::query_as(
        "select h.run_id, e->>'path', (e->>'attempt')::int from history h, jsonb_array_elements(h.events) e where e->>'type' = 'attempt_started'",
    )
    .fetch_all(&mut *conn)
    .await?;
    let started: BTreeSet<(Uuid, String, u32)> =
        started.into_iter().map(|(run, path, n)| (run, path, n.unsigned_abs())).collect();
    // A saved answer is committed before the step's end, by another attempt perhaps: it comes last and stays.
    let committed: Vec<(Uuid, String, i32, sqlx::types::Json<Answer>)> = sqlx::query_as(
        "select h.run_id, e->>'path', (e->>'attempt')::int, x->'output' from history h
           cross join jsonb_array_elements(h.events) e cross join jsonb_array_elements(h.events) x
         where e->>'type' = 'attempt_ended' and e->>'outcome' = 'succeeded' and e->>'activity' = 'effect@1'
           and x->>'type' = 'step_ended' and x->>'status' = 'succeeded' and x->>'path' = e->>'path'
         union all select run_id, path, (value->>'attempt')::int, value from checkpoints where key = $1",
    )
    .bind(ANSWER)
    .fetch_all(conn)
    .await?;
    let committed: BTreeMap<(Uuid, String), Committed> = committed
        .into_iter()
        .map(|(run, path, n, answer)| ((run, path), Committed { attempt: n.unsigned_abs(), answer: answer.0 }))
        .collect();

    let mut sights = Sights { sights: seen.len(), ..Sights::default() };
    let mut by_key: BTreeMap<&str, Vec<&Shown>> = BTreeMap::new();
    for shown in seen {
        by_key.entry(&shown.key).or_default().push(shown);
    }
    sights.keys = by_key.len();
    let mut places: BTreeSet<(Uuid, &str)> = BTreeSet::new();
    for (key, sights_of_key) in by_key {
        let first = sights_of_key[0];
        if sights_of_key.iter().any(|s| (s.run, &s.path) != (first.run, &first.path))
            || !places.insert((first.run, &first.path))
        {
            found.push(Finding::new("effect_key", "an idempotency key is not one step's, or a step has several", key));
        }
        let committed = committed.get(&(first.run, first.path.clone()));
        let mut attempts = BTreeSet::new();
        for (n, s) in sights_of_key.iter().enumerate() {
            let subject = || format!("{} {} attempt {}", s.run, s.path, s.attempt);
            sights.again += usize::from(n > 0);
            if !attempts.insert(s.attempt) {
                found.push(Finding::new("effect", "an attempt's effect was seen twice", subject()));
            }
            if !started.contains(&(s.run, s.path.clone(), s.attempt)) {
                found.push(Finding::new(
                    "effect",
                    "an effect was seen of an attempt that no history starts",
                    subject(),
                ));
            }
            if let Some(committed) = committed {
                if s.attempt > committed.attempt {
                    found.push(Finding::new(
                        "effect",
                        "an effect was repeated after its result was committed",
                        subject(),
                    ));
                }
                sights.late += usize::from(s.attempt < committed.attempt && n > 0);
            }
        }
    }
    for ((run, path), Committed { attempt, answer }) in &committed {
        let sight = usize::try_from(answer.n).ok().and_then(|n| seen.get(n.checked_sub(1)?));
        if sight.is_none_or(|s| (s.run, &s.path, s.attempt) != (*run, path, *attempt)) || answer.attempt != *attempt {
            found.push(Finding::new(
                "effect",
                "what was committed is no sight of the recorder",
                format!("{run} {path}"),
            ));
        }
    }
    Ok(sights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::chaos::{deploy, recorder::Recorder};
    use loopwright_engine::{client::Client, embedded::testing::database, hook::NoHook, ids::RunId};
    use serde_json::json;
    use std::sync::Arc;

    fn shown(run: RunId, key: &str, path: &str, attempt: u32) -> Shown {
        Shown { key: key.into(), run: run.0, path: path.into(), attempt }
    }

    async fn found(pool: &PgPool, seen: &[Shown], promises: &Promises) -> BTreeSet<&'static str> {
        let (_, found) = run(pool, seen, promises).await.expect("audit");
        found.into_iter().map(|finding| finding.check).collect()
    }

    /// A run and its history as no engine would write them.
    async fn write(pool: &PgPool, run: RunId, status: &str, seq: i64, rows: &[(i64, i64, serde_json::Value)]) {
        sqlx::query(
            "insert into runs (shard, run_id, workflow, definition, status, seq, inputs, closed_at, inbox_n, inbox_seen)
             select $1, $2, name, hash, $3, $4, '{}', case when $3 <> 'running' then now() end, 1, 1 from definitions limit 1",
        )
        .bind(run.shard())
        .bind(run.0)
        .bind(status)
        .bind(seq)
        .execute(pool)
        .await
        .expect("run");
        for (seq, epoch, events) in rows {
            sqlx::query(
                "insert into history (shard, run_id, seq, epoch, format, events) values ($1, $2, $3, $4, 1, $5)",
            )
            .bind(run.shard())
            .bind(run.0)
            .bind(seq)
            .bind(epoch)
            .bind(events)
            .execute(pool)
            .await
            .expect("history");
        }
        sqlx::query("insert into inbox (shard, run_id, n, kind, name) values ($1, $2, 1, 'signal', 'go')")
            .bind(run.shard())
            .bind(run.0)
            .execute(pool)
            .await
            .expect("message");
    }

    #[tokio::test]
    async fn every_kind_of_broken_promise_is_found() {
        let pool = database(loopwright_activities::MIGRATIONS).await;
        let folder = tempfile::tempdir().expect("folder");
        let recorder = Recorder::start(folder.path()).expect("recorder");
        deploy(&Client::new(pool.clone(), Arc::new(NoHook)), &recorder).await.expect("deployed");
        assert_eq!(found(&pool, &[], &Promises::default()).await, BTreeSet::new(), "nothing happened");

        let started = |path: &str, attempt: u32, activity: &str| json!({"type": "attempt_started", "path": path, "attempt": attempt, "activity": activity, "attempt_id": format!("{path}{attempt}")});
        let twice = json!([
            {"type": "step_started", "path": "a"}, {"type": "step_started", "path": "a"},
            {"type": "signal_received", "n": 1}, {"type": "signal_received", "n": 1},
            {"type": "update_completed", "id": "u", "n": 1}, {"type": "update_completed", "id": "u", "n": 1},
            started("a", 1, "paid@1"), started("a", 2, "effect@1"),
        ]);
        let end = json!([
            {"type": "attempt_ended", "path": "a", "attempt": 1, "activity": "effect@1", "outcome": "succeeded", "attempt_id": "a1"},
            {"type": "step_ended", "path": "a", "status": "succeeded", "output": {"n": 1, "attempt": 1}},
        ]);
        let one = RunId::new();
        // Its second row is missing, its epoch falls, nothing closes it, its second attempt never ends.
        write(&pool, one, "failed", 3, &[(1, 2, twice), (3, 1, end)]).await;
        let two = RunId::new();
        write(&pool, two, "running", 0, &[]).await;
        for _ in 0..3 {
            write(&pool, RunId::new(), "running", 1, &[(1, 0, json!([{"type": "run_started"}]))]).await;
        }
        let parts =
            "update runs set workflow = 'chaos-part', inputs = '{\"stumble\": 0}' where status = 'running' and seq = 1";
        sqlx::query(parts).execute(&pool).await.expect("parts");
        let seen = [shown(one, "k", "a", 1), shown(one, "k", "a", 2), shown(one, "k", "a", 2), shown(two, "k", "b", 1)];
        let promises = Promises { terminated: vec![one], ..Promises::default() };
        let expected = [
            "attempt",
            "effect",
            "effect_key",
            "failed_run",
            "group",
            "history_end",
            "history_epoch",
            "history_gap",
            "open_run",
            "promise",
            "settled",
            "signal",
            "step",
            "update",
        ];
        assert_eq!(found(&pool, &seen, &promises).await, BTreeSet::from(expected));

        let meanings = |found: Vec<Finding>| found.into_iter().map(|f| f.meaning).collect::<BTreeSet<_>>();
        let (sights, all) = run(&pool, &seen, &promises).await.expect("audit");
        assert_eq!((sights.sights, sights.keys, sights.again), (4, 1, 3));
        for meaning in [
            "an attempt's effect was seen twice",
            "an effect was seen of an attempt that no history starts",
            "an effect was repeated after its result was committed",
            "a signal that was read is not in the history once",
        ] {
            assert!(meanings(all.clone()).contains(meaning), "{meaning}");
        }
        let lost = Promises {
            runs: vec![RunId::new()],
            messages: vec![(one, "rest:lost".into())],
            cancelled: vec![one],
            ..Promises::default()
        };
        let (_, all) = run(&pool, &[], &lost).await.expect("audit");
        for meaning in [
            "an acknowledged start or fork is not there",
            "an acknowledged message is not there",
            "an acknowledged cancel is not there",
            "what was committed is no sight of the recorder",
        ] {
            assert!(meanings(all.clone()).contains(meaning), "{meaning}");
        }
    }
}
