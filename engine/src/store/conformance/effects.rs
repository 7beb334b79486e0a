//! What a transition does beside its own run's rows: children, messages to children and parents, and the hook, which may refuse all of it.

use super::{Pair, RUNS};
use crate::{
    hook::{
        AttemptEnd, AttemptRef, AttemptStart, HookError, Outcome, Reading, Refusal, Transition, TransitionHook, Verdict,
    },
    ids::{AttemptId, RunId},
    store::{
        inbox,
        spread::Spread,
        transitions::{self, Child, Effects, Item, child_result},
    },
    transaction::begin,
};
use chrono::DateTime;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use sqlx::PgConnection;
use std::{collections::BTreeSet, sync::Arc};
use uuid::Uuid;

/// Most runs that things happen to; children are among them.
const RUNS_MAX: usize = RUNS + 4;

/// What a hook has written, as [`super::super::memory::Accounts`] has it.
pub(super) const TABLE: &str = "create table test_hook (attempt_id uuid not null, started bool not null)";

/// Writes down what it hears, and refuses to let these attempts start.
struct Refuses(BTreeSet<AttemptId>);

impl TransitionHook for Refuses {
    fn apply<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        batch: &'a [Transition],
    ) -> BoxFuture<'a, Result<Vec<Refusal>, HookError>> {
        Box::pin(async move {
            let mut refusals = Vec::new();
            for transition in batch {
                let ended = transition.ended.iter().map(|end| (end.attempt.attempt_id, false));
                let started = transition.started.iter().map(|start| (start.attempt.attempt_id, true));
                for (attempt, starts) in ended.chain(started) {
                    sqlx::query("insert into test_hook values ($1, $2)")
                        .bind(attempt.0)
                        .bind(starts)
                        .execute(&mut *conn)
                        .await?;
                }
                if transition.started.iter().any(|start| self.0.contains(&start.attempt.attempt_id)) {
                    refusals.push(Refusal { ord: transition.ord, reason: "quota".into(), message: "none".into() });
                }
            }
            Ok(refusals)
        })
    }

    fn meter<'a>(
        &'a self,
        _conn: &'a mut PgConnection,
        _attempt: &'a AttemptRef,
        _reading: Reading<'a>,
    ) -> BoxFuture<'a, Result<Verdict, HookError>> {
        Box::pin(async { Ok(Verdict::Accepted) })
    }
}

impl Pair {
    /// A batch of transitions that do more than move their runs. Returns what it was and what each store answered.
    pub(super) async fn commit_with_effects(&mut self, run: RunId) -> (String, String, String) {
        let mut pairs = vec![self.pair(run)];
        let other = self.run();
        if other != run && self.random.bool() {
            pairs.push(self.pair(other));
        }
        pairs.sort_by_key(|(there, _)| (there.run_id.shard(), there.run_id));
        let what: Vec<Effects> = pairs.iter().map(|(there, _)| there.effects.clone()).collect();
        let starts = pairs.iter().flat_map(|(there, _)| &there.effects.started).map(|start| start.attempt.attempt_id);
        let starts: Vec<AttemptId> = starts.collect();
        let refused: BTreeSet<AttemptId> = starts.into_iter().filter(|_| self.random.u8(0..3) == 0).collect();
        let hook = Refuses(refused);
        let (mut there, mut here) = (Vec::new(), Vec::new());
        // As the committer does: a transaction for each shard where they are spread.
        for (shard, part) in self.spread.divide(pairs, |(there, _)| there.run_id.shard()) {
            let (items, same): (Vec<Item>, Vec<Item>) = part.into_iter().unzip();
            let spread = if shard.is_none() { Spread::Together } else { Spread::ByShard };
            let mut tx = begin(&self.pool).await.expect("begin");
            transitions::lock(&mut tx, Some(spread), &items).await.expect("locked");
            let verdicts = transitions::send(&mut tx, shard, &items).await.expect("written");
            let refusals = transitions::apply_effects(&mut tx, &items, &verdicts, &hook).await.expect("effects");
            if refusals.is_empty() {
                tx.commit().await.expect("commit");
                there.push(Ok(verdicts));
            } else {
                tx.rollback().await.expect("rollback");
                there.push(Err(refusals.iter().map(|refusal| refusal.ord).collect::<Vec<_>>()));
            }
            here.push(self.memory.commit_with_effects(&same, &|attempt| hook.0.contains(&attempt.attempt_id)));
        }
        // Those that are there now are among whom things happen to.
        let children: Vec<RunId> = what.iter().flat_map(|e| &e.children).map(|child| child.run_id).collect();
        for child in children.into_iter().filter(|child| self.memory.runs.contains_key(child)) {
            let closed = |known: &RunId| self.memory.runs.get(known).is_some_and(|row| row.closed);
            match self.runs.iter().position(closed) {
                Some(at) if self.runs.len() >= RUNS_MAX => self.runs[at] = child,
                None if self.runs.len() >= RUNS_MAX => {}
                _ => self.runs.push(child),
            }
        }
        let words = what.iter().flat_map(told).collect::<BTreeSet<_>>();
        let refused = if here.iter().any(Result::is_err) { " Refused" } else { "" };
        (format!("effects {words:?}{refused} {run}"), format!("{there:?}"), format!("{here:?}"))
    }

    /// A transition for both, with the same effects.
    fn pair(&mut self, run: RunId) -> (Item, Item) {
        let (mut there, mut here) = self.item(run);
        let effects = self.effects(run, &there);
        (there.effects, here.effects) = (effects.clone(), effects);
        (there, here)
    }

    fn effects(&mut self, run: RunId, item: &Item) -> Effects {
        let mut effects = Effects::default();
        if self.random.bool() {
            effects.children.push(Child {
                run_id: RunId(Uuid::from_u128(self.random.u128(..))),
                workflow: "conformance".into(),
                definition: self.hash,
                path: "c".into(),
                depth: 1,
                queue: ["default", "other"][usize::from(self.random.u8(0..4) == 0)].into(),
                attributes: json!({}),
                inputs: json!({}),
            });
        }
        // Its own children, or whoever else is there: what is asked for is the machine's to say.
        for _ in 0..self.random.u8(0..3) {
            let child = self.run();
            let first = self.memory.runs.get(&child).and_then(|row| row.first).unwrap_or(child);
            match (child == run, self.random.bool()) {
                (true, _) => {}
                (false, true) => {
                    let until = self.random.bool().then_some(DateTime::UNIX_EPOCH);
                    effects.cancelled_children.push((first, until));
                }
                (false, false) => effects.terminated_children.push(first),
            }
        }
        let row = self.memory.runs.get(&run);
        let known = row.and_then(|row| row.first).unwrap_or(run);
        if item.is_closed()
            && let Some(parent) = row.and_then(|row| row.parent)
        {
            effects.parent = Some((parent, child_result(known, item.status, Some(json!(1)), None)));
        }
        if self.random.bool() {
            let attempt = self.attempt(run);
            effects.started.push(AttemptStart { attempt, reserve: Value::Null });
        }
        if self.random.bool() {
            let (attempt, outcome) = (self.attempt(run), Outcome::Succeeded);
            effects.ended.push(AttemptEnd { attempt, outcome, failure: None, again: false });
        }
        effects
    }

    fn attempt(&mut self, run_id: RunId) -> AttemptRef {
        AttemptRef {
            run_id,
            attempt_id: AttemptId(Uuid::from_u128(self.random.u128(..))),
            activity: "work@1".into(),
            path: "a".into(),
            attempt: 1,
            attributes: Arc::new(Value::Null),
            budget: Arc::new(Value::Null),
            deadline: DateTime::UNIX_EPOCH,
        }
    }

    /// Everybody who is blocked may try again.
    pub(super) async fn unblock(&mut self) -> (String, String, String) {
        let mut tx = begin(&self.pool).await.expect("begin");
        let there = inbox::unblock(&mut tx, &json!({})).await.expect("unblocked");
        tx.commit().await.expect("commit");
        ("unblock".to_owned(), there.to_string(), self.memory.unblock().to_string())
    }

    /// What is told to whom, and what the hook has heard: on Postgres and in memory. What a run has inherited from the one before
    /// it is not compared: its numbers are.
    pub(super) async fn told(&self) -> (Vec<String>, Vec<String>) {
        let messages: Vec<(Uuid, i64, String, Value)> = sqlx::query_as(
            "select i.run_id, i.n, i.kind, i.payload from inbox i join runs r using (shard, run_id)
             where r.continued_from is null order by 1, 2",
        )
        .fetch_all(&self.pool)
        .await
        .expect("messages");
        let heard: Vec<(Uuid, bool)> = sqlx::query_as("select attempt_id, started from test_hook order by 2, 1")
            .fetch_all(&self.pool)
            .await
            .expect("hook");
        let mut there: Vec<String> =
            messages.into_iter().map(|(run, n, kind, said)| format!("{run} {n} {kind} {said}")).collect();
        there.extend(heard.into_iter().map(|(attempt, started)| format!("{attempt} {started}")));
        let memory = &self.memory;
        let inherits = |run: &RunId| memory.runs.get(run).is_some_and(|row| row.continued_from.is_some());
        let mut here = Vec::new();
        for (run, messages) in memory.inbox.iter().filter(|(run, _)| !inherits(run)) {
            here.extend(messages.iter().map(|m| format!("{run} {} {} {}", m.n, m.kind.as_str(), m.payload)));
        }
        for (started, attempts) in [(false, &memory.accounts.ended), (true, &memory.accounts.started)] {
            let attempts: BTreeSet<&AttemptId> = attempts.iter().collect();
            here.extend(attempts.into_iter().map(|attempt| format!("{attempt} {started}")));
        }
        (there, here)
    }
}

/// Words for what is among the effects: a suite that never came to one has not tried it.
fn told(effects: &Effects) -> Vec<&'static str> {
    let all = [
        ("starts-child", !effects.children.is_empty()),
        ("cancels-child", !effects.cancelled_children.is_empty()),
        ("terminates-child", !effects.terminated_children.is_empty()),
        ("tells-parent", effects.parent.is_some()),
        ("hooks", !effects.started.is_empty() || !effects.ended.is_empty()),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(word, _)| word).collect()
}
