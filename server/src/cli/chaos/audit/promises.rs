//! What was acknowledged to somebody is there, once.

use super::{Check, Promises};
use crate::cli::chaos::report::Finding;
use sqlx::PgConnection;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

pub(super) async fn findings(
    conn: &mut PgConnection,
    promises: &Promises,
    found: &mut Vec<Finding>,
) -> anyhow::Result<()> {
    let mut broken = |check: Check, subject: String| found.push(check.finds(subject));
    let runs: BTreeMap<Uuid, (String, bool)> =
        sqlx::query_as::<_, (Uuid, String, bool)>("select run_id, status, closed_at is null from runs")
            .fetch_all(&mut *conn)
            .await?
            .into_iter()
            .map(|(run, status, open)| (run, (status, open)))
            .collect();
    for run in promises.runs.iter().filter(|run| !runs.contains_key(&run.0)) {
        broken(Check::PromiseRun, run.to_string());
    }
    let status = |run: &Uuid| runs.get(run).map(|(status, _)| status.as_str());
    for run in promises.terminated.iter().filter(|run| status(&run.0) != Some("terminated")) {
        broken(Check::PromiseTerminated, run.to_string());
    }
    for run in promises.reset.iter().filter(|run| runs.get(&run.0).is_none_or(|(_, open)| *open)) {
        broken(Check::PromiseReset, run.to_string());
    }
    let kept: BTreeSet<Uuid> = promises.kept.iter().map(|run| run.0).collect();
    for (run, (status, _)) in runs.iter().filter(|(run, (_, open))| *open && !kept.contains(run)) {
        broken(Check::PromiseKept, format!("{run} {status}"));
    }
    // Every request that makes a run is answered in the end: one that made two, or one of which nobody knows, shows here.
    let begun: Vec<Uuid> =
        sqlx::query_scalar("select run_id from runs where workflow = 'chaos' and parent_run_id is null")
            .fetch_all(&mut *conn)
            .await?;
    let mut told = BTreeSet::new();
    for run in promises.runs.iter().filter(|run| !told.insert(run.0)) {
        broken(Check::PromiseRun, format!("{run}, which two requests were answered with"));
    }
    for run in begun.iter().filter(|run| !told.contains(run)) {
        broken(Check::RunUnasked, run.to_string());
    }
    let answered: Vec<(Uuid, String)> = sqlx::query_as(
        "select h.run_id, e->>'id' from history h, jsonb_array_elements(h.events) e where e->>'type' = 'update_completed'",
    )
    .fetch_all(&mut *conn)
    .await?;
    for (run, id) in promises.updates.iter().filter(|(run, id)| !answered.contains(&(run.0, id.clone()))) {
        broken(Check::PromiseUpdate, format!("{run} {id}"));
    }
    // A message counts as read once the run has seen it; a run that closed first has not.
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
        broken(Check::PromiseMessage, format!("{run} {id}"));
    }
    for run in &promises.cancelled {
        if !messages.iter().any(|(of, _, kind, ..)| *of == run.0 && kind == "cancel") {
            broken(Check::PromiseCancel, run.to_string());
        }
    }
    for (run, _, kind, n, read, recorded) in &messages {
        if kind == "signal" && *read && *recorded != 1 {
            broken(Check::SignalRead, format!("{run} {n}: {recorded} times"));
        }
    }
    Ok(())
}
