//! One effect for each idempotency key: what the recorder saw, key by key, beside what the histories say.
//!
//! A key is one step's and asks for one thing. Each attempt shows it at most once and was recorded as started; none shows it that
//! came after the one whose result was committed. Every attempt that succeeded has committed a sight of its key, with the
//! effect that the first sight made.
//!
//! A sight by an attempt *before* the committed one is no repetition: it was replaced, froze before it showed the key, and could
//! not know. That is what the key is for.

use super::{Check, Sight};
use crate::cli::chaos::{
    report::{Finding, Sights},
    work::{ANSWER, Answer},
};
use serde_json::{Value, json};
use sqlx::{PgConnection, types::Json};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// A step of a run.
type Place = (Uuid, String);

/// What the histories say about effects.
struct Recorded {
    /// Attempts that began.
    started: BTreeSet<(Uuid, String, u32)>,
    /// What each step asks for, of the run in which it began.
    asks: BTreeMap<Place, Value>,
    /// Of a fork: whose steps it goes on with.
    forked_from: BTreeMap<Uuid, Uuid>,
    /// Attempts that succeeded, and what their step gave back.
    succeeded: Vec<(Place, u32, Option<Answer>)>,
    /// Answers that were saved before the step's end, by that attempt or an earlier one.
    saved: BTreeMap<Place, Answer>,
}

impl Recorded {
    async fn read(conn: &mut PgConnection) -> anyhow::Result<Self> {
        let started: Vec<(Uuid, String, i32)> = sqlx::query_as(
            "select h.run_id, e->>'path', (e->>'attempt')::int from history h, jsonb_array_elements(h.events) e
             where e->>'type' = 'attempt_started'",
        )
        .fetch_all(&mut *conn)
        .await?;
        let asks: Vec<(Uuid, String, Value, Value)> = sqlx::query_as(
            "select h.run_id, e->>'path', e->'opened'->'activity', e->'opened'->'input' from history h, jsonb_array_elements(h.events) e
             where e->>'type' = 'step_started' and e->'opened'->>'kind' = 'activity'",
        )
        .fetch_all(&mut *conn)
        .await?;
        let forked_from: Vec<(Uuid, Uuid)> =
            sqlx::query_as("select run_id, forked_from from runs where forked_from is not null")
                .fetch_all(&mut *conn)
                .await?;
        // The step ends with the attempt, in one transition. An attempt that succeeded under a cancel may end no step.
        let succeeded: Vec<(Uuid, String, i32, Option<Json<Answer>>)> = sqlx::query_as(
            "select h.run_id, e->>'path', (e->>'attempt')::int,
                    (select x->'output' from jsonb_array_elements(h.events) x
                     where x->>'type' = 'step_ended' and x->>'status' = 'succeeded' and x->>'path' = e->>'path' limit 1)
             from history h cross join jsonb_array_elements(h.events) e
             where e->>'type' = 'attempt_ended' and e->>'outcome' = 'succeeded'",
        )
        .fetch_all(&mut *conn)
        .await?;
        let saved: Vec<(Uuid, String, Json<Answer>)> =
            sqlx::query_as("select run_id, path, value from checkpoints where key = $1")
                .bind(ANSWER)
                .fetch_all(conn)
                .await?;
        Ok(Self {
            started: started.into_iter().map(|(run, path, n)| (run, path, n.unsigned_abs())).collect(),
            asks: asks
                .into_iter()
                .map(|(run, path, activity, input)| ((run, path), json!({ "activity": activity, "input": input })))
                .collect(),
            forked_from: forked_from.into_iter().collect(),
            succeeded: succeeded
                .into_iter()
                .map(|(run, path, n, answer)| ((run, path), n.unsigned_abs(), answer.map(|answer| answer.0)))
                .collect(),
            saved: saved.into_iter().map(|(run, path, answer)| ((run, path), answer.0)).collect(),
        })
    }

    /// What a step asks for: it may have begun before its run was forked off.
    fn ask(&self, place: &Place) -> Option<&Value> {
        let (mut run, path) = place.clone();
        loop {
            if let Some(ask) = self.asks.get(&(run, path.clone())) {
                return Some(ask);
            }
            run = *self.forked_from.get(&run)?;
        }
    }

    /// By step, the attempt whose result was committed, or whose answer was saved: none may show its key after that.
    fn committed(&self) -> BTreeMap<&Place, u32> {
        let mut committed: BTreeMap<&Place, u32> = self.succeeded.iter().map(|(place, n, _)| (place, *n)).collect();
        // It comes before the step's end, by another attempt perhaps.
        committed.extend(self.saved.iter().map(|(place, answer)| (place, answer.attempt)));
        committed
    }
}

pub(super) async fn findings(
    conn: &mut PgConnection,
    seen: &[Sight],
    found: &mut Vec<Finding>,
) -> anyhow::Result<Sights> {
    let recorded = Recorded::read(conn).await?;
    let committed = recorded.committed();
    let mut sights = Sights { sights: seen.len(), ..Sights::default() };
    let (mut by_key, mut by_place) = (BTreeMap::<&str, Vec<&Sight>>::new(), BTreeMap::<Place, Vec<&Sight>>::new());
    for sight in seen {
        by_key.entry(&sight.shown.key).or_default().push(sight);
        by_place.entry(place(sight)).or_default().push(sight);
    }
    sights.keys = by_key.len();
    for (key, of_key) in &by_key {
        let first = of_key[0];
        if of_key.iter().any(|sight| place(sight) != place(first))
            || by_place[&place(first)].iter().any(|sight| sight.shown.key != **key)
        {
            found.push(Check::EffectKey.finds(*key));
        }
        // What the step says is the content; a step that no history has is somebody else's finding.
        let asked = recorded.ask(&place(first)).unwrap_or(&first.shown.content);
        if of_key.iter().any(|sight| sight.shown.content != *asked) {
            found.push(Check::EffectContent.finds(*key));
        }
    }
    for (place, of_place) in &by_place {
        let (mut attempts, committed) = (BTreeSet::new(), committed.get(place));
        for (n, sight) in of_place.iter().enumerate() {
            let attempt = sight.shown.attempt;
            let subject = || format!("{} {} attempt {attempt}", place.0, place.1);
            sights.again += usize::from(n > 0);
            if !attempts.insert(attempt) {
                found.push(Check::EffectTwice.finds(subject()));
            }
            if !recorded.started.contains(&(place.0, place.1.clone(), attempt)) {
                found.push(Check::EffectUnstarted.finds(subject()));
            }
            if committed.is_some_and(|committed| attempt > *committed) {
                found.push(Check::EffectRepeated.finds(subject()));
            }
            sights.late += usize::from(n > 0 && committed.is_some_and(|committed| attempt < *committed));
        }
    }
    // Whatever was committed is a sight of that step, by that attempt, and the effect that the first sight made.
    let is_seen = |place: &Place, answer: &Answer| {
        by_place.get(place).is_some_and(|of_place| {
            of_place.iter().any(|sight| {
                (sight.receipt.n, sight.receipt.effect, sight.shown.attempt)
                    == (answer.n, answer.effect, answer.attempt)
                    && sight.receipt.effect == of_place[0].receipt.n
            })
        })
    };
    for (place, attempt, answer) in &recorded.succeeded {
        let own = || by_place.get(place).is_some_and(|of_place| of_place.iter().any(|s| s.shown.attempt == *attempt));
        let right = match (answer, recorded.saved.get(place)) {
            (Some(answer), Some(saved)) => answer == saved && is_seen(place, answer),
            (Some(answer), None) => answer.attempt == *attempt && is_seen(place, answer),
            (None, Some(saved)) => is_seen(place, saved),
            (None, None) => own(),
        };
        if !right {
            found.push(Check::EffectMissing.finds(format!("{} {} attempt {attempt}", place.0, place.1)));
        }
    }
    for (place, answer) in recorded.saved.iter().filter(|(place, answer)| !is_seen(place, answer)) {
        // A step that succeeded with it has been told of.
        if !recorded.succeeded.iter().any(|(of, ..)| of == place) {
            found.push(
                Check::EffectMissing.finds(format!("{} {}, saved by attempt {}", place.0, place.1, answer.attempt)),
            );
        }
    }
    Ok(sights)
}

fn place(sight: &Sight) -> Place {
    (sight.shown.run, sight.shown.path.clone())
}
