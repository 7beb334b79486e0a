//! Chains: runs of which each continues as new and the next goes on in its place.

use super::{
    blobs, definitions,
    groups::{self, Guest},
    inbox::{self, Outgoing, Sent},
    schedules, starts,
    transitions::Text,
};
use crate::{
    Error, Result,
    admission::{Named, Place, Rate},
    event::Ending,
    ids::{DefinitionHash, RunId},
    labels,
    machine::{CONTINUE_EVERY_MS, Message, RunState},
    payload::{self, Slot},
    view::RunStatus,
};
use chrono::{DateTime, Duration, Utc};
use serde_json::Value;
use sqlx::{PgConnection, Row, types::Json};
use std::collections::BTreeSet;

/// Ids of messages that a run had read, and that the next run of its chain knows: the newest ones. Chosen: a sender that asks
/// again does so within the next thousand messages.
pub(crate) const KNOWN_MAX: i64 = 1_000;

/// Messages handed on at once: each has 256 KiB at most, and all of a run may be many.
const PAGE: i64 = 64;

/// The next run of a chain. It has everything else of the one before: workflow, queue, attributes, outbox topic, business key,
/// parent, depth, priority, fairness key, group and rate that the start named, the deadline of the chain.
#[derive(Clone, Debug)]
pub(crate) struct Successor {
    pub(crate) run_id: RunId,
    /// Another than the one before has.
    pub(crate) definition: Option<DefinitionHash>,
    pub(crate) inputs: Value,
    /// It starts no earlier: see [`CONTINUE_EVERY_MS`].
    pub(crate) not_before: DateTime<Utc>,
    /// Messages that the run before has read and no step has taken, oldest first.
    pub(crate) kept: Vec<Message>,
}

impl Successor {
    /// Of a state that has closed as continued.
    pub(crate) fn of(state: &RunState) -> Option<Self> {
        match (state.status, &state.ending) {
            (RunStatus::Continued, Some(Ending::Continued { run, inputs, definition })) => Some(Self {
                run_id: *run,
                definition: *definition,
                inputs: inputs.clone(),
                not_before: state.started_at + Duration::milliseconds(CONTINUE_EVERY_MS),
                kept: state.mailbox.clone(),
            }),
            _ => None,
        }
    }
}

/// Workflow, definition, the instant that it waits for, messages ever sent to the run before, what the first start named, business key.
type StartedRow = (String, Vec<u8>, Option<DateTime<Utc>>, i64, Option<Json<Named>>, Option<String>);

/// What a run waits for that is no start of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrives {
    place: Option<Place>,
    rate: Option<Rate>,
    not_before: Option<DateTime<Utc>>,
    is_child: bool,
}

impl Arrives {
    /// At a place only, as soon as there is one.
    pub(super) fn of_child(place: Place) -> Self {
        Self { place: Some(place), is_child: true, ..Self::default() }
    }

    /// At the group that a start has named, otherwise at its definition's, and at the rate of the start. `None`: it waits for nothing.
    pub(crate) async fn by(
        conn: &mut PgConnection,
        named: Named,
        definition: DefinitionHash,
        workflow: &str,
        inputs: &Value,
    ) -> Result<Option<Self>> {
        let place = match named.place {
            Some(place) => Some(place),
            None => {
                let group = definitions::concurrency(conn, definition).await?;
                group.map(|group| group.place(inputs).unwrap_or_else(|_| group.fallback(workflow)))
            }
        };
        let rate = named.rate;
        Ok((place.is_some() || rate.is_some()).then_some(Self { place, rate, ..Self::default() }))
    }

    /// Plans the start under the rate, once. Returns the instant that is waited for.
    ///
    /// # Transaction
    /// Locks the rate.
    pub(crate) async fn plan(&mut self, conn: &mut PgConnection) -> Result<Option<DateTime<Utc>>> {
        if let Some(rate) = self.rate.take() {
            // Later than the chain's own pause, or at its instant.
            let begins = groups::next_start(conn, &rate, false).await?;
            self.not_before = self.not_before.max(begins);
        }
        Ok(self.not_before)
    }

    /// Locks what [`arrive`] locks, for a transaction that locks accounts before: see [`groups::reserve`].
    pub(crate) async fn reserve(&self, conn: &mut PgConnection) -> Result<()> {
        let (rate, place) = (self.rate.as_ref(), self.place.as_ref());
        groups::reserve(conn, rate.map(|rate| rate.key.as_str()), place.map(|place| place.group.as_str())).await
    }
}

/// Holds back runs that were started in this transaction until there is a place for them and their time has come. Never turned
/// away: a parent waits for its child, a chain would end, and a fork is just this one that somebody has asked for. Only a child whose
/// group wants it so (`cancel-new`) is cancelled, which its parent hears.
///
/// # Transaction
/// Locks rates, then groups, by their names.
pub(crate) async fn arrive(conn: &mut PgConnection, mut arrivals: Vec<(Arrives, RunId)>) -> Result<()> {
    arrivals.sort_by(|(a, _), (b, _)| a.rate.as_ref().map(|r| &r.key).cmp(&b.rate.as_ref().map(|r| &r.key)));
    for (arrives, _) in &mut arrivals {
        arrives.plan(conn).await?;
        crate::committer::crash_point("arrive.after_plan");
    }
    arrivals.sort_by(|(a, _), (b, _)| a.place.as_ref().map(|p| &p.group).cmp(&b.place.as_ref().map(|p| &p.group)));
    for (Arrives { place, not_before, is_child, .. }, run) in &arrivals {
        let guest = if *is_child { Guest::Child } else { Guest::Stays };
        groups::hold_back(conn, *run).await?;
        crate::committer::crash_point("arrive.after_hold");
        groups::arrive(conn, *run, place.as_ref(), *not_before, guest).await?;
        crate::committer::crash_point("arrive.after_place");
    }
    Ok(())
}

/// Starts the next run of a chain. Returns what it must wait for, if its definition has a group or the first start named one or a
/// rate.
///
/// # Transaction
/// Must be the one that closes the run before, whose row it has locked: nobody can send to that any more, and its business key
/// is free for nobody else. Locks the schedule's action.
/// # Errors
/// `invariant` if the run before is not there or the next one is.
pub(super) async fn start(conn: &mut PgConnection, old: RunId, next: &Successor) -> Result<Option<Arrives>> {
    let definition = next.definition.map(|hash| hash.0.to_vec());
    let labels = match next.definition {
        Some(hash) => Some(labels::suffix(&definitions::terms(conn, hash).await?.runs_on)),
        None => None,
    };
    let mut large = Vec::new();
    let inputs = payload::pack(next.run_id, Slot::Inputs, &next.inputs, &mut large)?;
    let with_terms = starts::with_terms(next.run_id)?;
    let started: Option<StartedRow> = sqlx::query_as(
        "with o as (update runs set continued_as = $2 where shard = $5 and run_id = $6 and status = 'continued' returning *),
              r as (insert into runs (shard, run_id, workflow, definition, workflow_id, status, parked, queue, attributes, topic, inputs,
                                      parent_shard, parent_run_id, parent_path, depth, priority, fairness_key, lane,
                                      first_run_id, continued_from, admission, chain_deadline, cursor)
                    select $1, $2, workflow, coalesce($3, definition), workflow_id, 'pending', true, coalesce(split_part(queue, '[', 1) || $9::text, queue),
                           attributes, topic, $4,
                           parent_shard, parent_run_id, parent_path, depth, priority, fairness_key, lane,
                           coalesce(first_run_id, run_id), run_id, admission, chain_deadline,
                           case when admission is not null or chain_deadline is not null then $10::jsonb end
                    from o
                    returning shard, run_id, workflow, definition, workflow_id, queue, priority, lane, admission),
              -- The instant is a worker's: it may be wrong, and is no reason to wait for longer.
              d as (select least($7, engine_now() + $8::bigint * interval '1 millisecond') as due, engine_now() as now),
              q as (insert into ready (shard, run_id, queue, priority, lane, timed, due_at)
                    select shard, run_id, queue, priority, lane, due > now, greatest(due, now) from r, d)
         select r.workflow, r.definition, case when due > now then due end, o.inbox_n, r.admission, r.workflow_id from r, d, o",
    )
    .bind(next.run_id.shard())
    .bind(next.run_id.0)
    .bind(definition)
    .bind(Json(&*inputs))
    .bind(old.shard())
    .bind(old.0)
    .bind(next.not_before)
    .bind(CONTINUE_EVERY_MS)
    .bind(labels)
    .bind(Json(&*with_terms))
    .fetch_optional(&mut *conn)
    .await?;
    let Some((workflow, definition, not_before, messages, named, key)) = started else {
        return Err(Error::Invariant(format!("run {old} is not there to be continued")));
    };
    crate::committer::crash_point("chain.after_row");
    if let Some(key) = key {
        // By itself: keys are not where their runs are.
        sqlx::query("insert into workflow_ids (workflow_id, shard, run_id) values ($1, $2, $3)")
            .bind(key)
            .bind(next.run_id.shard())
            .bind(next.run_id.0)
            .execute(&mut *conn)
            .await?;
    }
    crate::committer::crash_point("chain.after_key");
    blobs::put(conn, &large).await?;
    crate::committer::crash_point("chain.after_inputs");
    if messages > 0 {
        hand_on(conn, old, next).await?;
    }
    crate::committer::crash_point("chain.after_messages");
    let hash = definitions::hash_of(definition).ok_or_else(|| Error::Invariant("a definition's hash".into()))?;
    schedules::hand_over(conn, old, next.run_id, &format!("run {old} continued as new")).await?;
    crate::committer::crash_point("chain.after_schedule");
    let named = named.map(|named| named.0).unwrap_or_default();
    let arrives = Arrives::by(conn, named, hash, &workflow, &next.inputs).await?;
    Ok(arrives.map(|arrives| Arrives { not_before, ..arrives }))
}

/// What no step of the old run has taken is the next run's, in order: what it had read, then what it had not. Of what was taken
/// only the senders' ids go along, as messages that are read: whoever sends one again is not heard twice.
async fn hand_on(conn: &mut PgConnection, old: RunId, next: &Successor) -> Result<()> {
    let kept: Vec<i64> = next.kept.iter().filter_map(|m| i64::try_from(m.n).ok()).collect();
    sqlx::query(
        "with known as (select i.n, i.kind, i.dedupe_id, i.sender, i.sent_at
                        from inbox i join runs r on r.shard = i.shard and r.run_id = i.run_id
                        where i.shard = $1 and i.run_id = $2 and i.n <= r.inbox_seen and i.n <> all($5)
                          and i.dedupe_id is not null and i.kind in ('signal', 'update') order by i.n desc limit $6),
              m as (insert into inbox (shard, run_id, n, kind, payload, dedupe_id, sender, sent_at, run_seq)
                    select $3, $4, row_number() over (order by n), kind, 'null', dedupe_id, sender, sent_at, $7 from known returning n)
         update runs set inbox_n = (select count(*) from m), inbox_seen = (select count(*) from m) where shard = $3 and run_id = $4",
    )
    .bind(old.shard())
    .bind(old.0)
    .bind(next.run_id.shard())
    .bind(next.run_id.0)
    .bind(&kept)
    .bind(KNOWN_MAX)
    .bind(inbox::BEFORE)
    .execute(&mut *conn)
    .await?;
    crate::committer::crash_point("hand.after_known");
    let here: BTreeSet<i64> =
        sqlx::query_scalar("select n from inbox where shard = $1 and run_id = $2 and n = any($3)")
            .bind(old.shard())
            .bind(old.0)
            .bind(&kept)
            .fetch_all(&mut *conn)
            .await?
            .into_iter()
            .collect();
    // A fork keeps messages whose rows are its parent's. They are its oldest, and it answers no update of its parent's.
    let inherited = next.kept.iter().filter(|message| !i64::try_from(message.n).is_ok_and(|n| here.contains(&n)));
    let inherited = inherited.map(|message| Handed {
        kind: "signal".to_owned(),
        name: message.name.clone(),
        payload: message.payload.clone(),
        dedupe_id: None,
        sender: message.sender.clone(),
        sent_at: message.at,
    });
    append(conn, next.run_id, &inherited.collect::<Vec<_>>()).await?;
    crate::committer::crash_point("hand.after_inherited");
    let mut after = 0_i64;
    loop {
        let rows = sqlx::query(
            "select i.n, i.kind, i.name, i.payload, i.dedupe_id, i.sender, i.sent_at
             from inbox i join runs r on r.shard = i.shard and r.run_id = i.run_id
             where i.shard = $1 and i.run_id = $2 and i.n > $4 and (i.n = any($3) or (i.n > r.inbox_seen and i.kind <> 'child'))
             order by i.n limit $5",
        )
        .bind(old.shard())
        .bind(old.0)
        .bind(&kept)
        .bind(after)
        .bind(PAGE)
        .fetch_all(&mut *conn)
        .await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = last.try_get("n")?;
        let mut handed = Vec::with_capacity(rows.len());
        for row in &rows {
            let slot = Slot::Message { kind: row.try_get("kind")?, name: row.try_get("name")? };
            handed.push(Handed {
                kind: row.try_get("kind")?,
                name: row.try_get("name")?,
                payload: payload::read(conn, old, slot, row.try_get("payload")?).await?,
                dedupe_id: row.try_get("dedupe_id")?,
                sender: row.try_get("sender")?,
                sent_at: row.try_get("sent_at")?,
            });
        }
        append(conn, next.run_id, &handed).await?;
        crate::committer::crash_point("hand.after_page");
    }
}

/// Messages behind those that a run has.
async fn append(conn: &mut PgConnection, run: RunId, handed: &[Handed]) -> Result<()> {
    if handed.is_empty() {
        return Ok(());
    }
    // What is sealed or lies apart is so for one run.
    let mut large = Vec::new();
    let payloads = handed.iter().map(|m| {
        let slot = Slot::Message { kind: &m.kind, name: &m.name };
        payload::pack(run, slot, &m.payload, &mut large)
    });
    let payloads: Vec<Text> = payloads.collect::<Result<_>>()?;
    blobs::put(conn, &large).await?;
    crate::committer::crash_point("hand.after_blobs");
    sqlx::query(
        "with base as (select inbox_n from runs where shard = $1 and run_id = $2),
              m as (insert into inbox (shard, run_id, n, kind, name, payload, dedupe_id, sender, sent_at)
                    select $1, $2, base.inbox_n + t.ord, t.kind, t.name, t.payload, t.dedupe_id, t.sender, t.sent_at
                    from base, unnest($3::text[], $4::text[], $5::jsonb[], $6::text[], $7::text[], $8::timestamptz[])
                      with ordinality as t(kind, name, payload, dedupe_id, sender, sent_at, ord)
                    returning n)
         update runs set inbox_n = inbox_n + (select count(*) from m) where shard = $1 and run_id = $2",
    )
    .bind(run.shard())
    .bind(run.0)
    .bind(handed.iter().map(|m| m.kind.as_str()).collect::<Vec<_>>())
    .bind(handed.iter().map(|m| m.name.as_str()).collect::<Vec<_>>())
    .bind(payloads.iter().map(|text| Json(&**text)).collect::<Vec<_>>())
    .bind(handed.iter().map(|m| m.dedupe_id.as_deref()).collect::<Vec<_>>())
    .bind(handed.iter().map(|m| m.sender.as_deref()).collect::<Vec<_>>())
    .bind(handed.iter().map(|m| m.sent_at).collect::<Vec<_>>())
    .execute(conn)
    .await?;
    Ok(())
}

/// A message on its way from one run to the next.
struct Handed {
    kind: String,
    name: String,
    payload: Value,
    dedupe_id: Option<String>,
    sender: Option<String>,
    sent_at: DateTime<Utc>,
}

/// The open run of the chain whose first run this is.
pub(crate) async fn open_run(conn: &mut PgConnection, first: RunId) -> Result<Option<RunId>> {
    let open: Option<uuid::Uuid> = sqlx::query_scalar(
        "select run_id from runs where first_run_id = $1 and first_run_id is not null and closed_at is null and imported_at is null",
    )
    .bind(first.0)
    .fetch_optional(conn)
    .await?;
    Ok(open.map(RunId))
}

/// The open runs of the chains whose first runs these are. By the index of open chains, so that nothing else is read.
pub(super) async fn open_runs(conn: &mut PgConnection, first: &[RunId]) -> Result<Vec<RunId>> {
    let open: Vec<uuid::Uuid> =
        sqlx::query_scalar(OPEN_RUNS).bind(first.iter().map(|run| run.0).collect::<Vec<_>>()).fetch_all(conn).await?;
    Ok(open.into_iter().map(RunId).collect())
}

pub(super) const OPEN_RUNS: &str = "select r.run_id from unnest((select $1::uuid[])) f(run_id)
     join runs r on r.first_run_id = f.run_id and r.first_run_id is not null and r.closed_at is null and r.imported_at is null";

/// [`inbox::send`] to the open run of the chain that begins with the message's run. Nothing happens if none is open.
pub(super) async fn send(conn: &mut PgConnection, message: &Outgoing<'_>) -> Result<()> {
    let mut last = None;
    while let Some(open) = open_run(conn, message.run).await? {
        crate::committer::crash_point("settle.after_open_run");
        // It may have gone on as another since; the same one twice is none that can be sent to.
        let sent = inbox::send(conn, &Outgoing { run: open, ..*message }).await?;
        if sent != Sent::NoOpenRun || last.replace(open) == Some(open) {
            return Ok(());
        }
    }
    Ok(())
}
