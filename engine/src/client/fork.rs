//! New runs that begin where another one was: fork and reset.

use super::{Client, Started, pause::checked};
use crate::{
    Error, Result,
    admission::Named,
    archive::check,
    definition::inputs::prepare,
    event::{Event, TERMS},
    hook::TransitionHook,
    ids::{DefinitionHash, RunId},
    machine::{self, Moment, RunState, fold},
    signature::Catalog,
    store::{
        self,
        chain::{self, Arrives},
        definitions::Pinned,
        forks::{Maker, Terms},
    },
};
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use std::{cell::Cell, sync::Arc};

/// History rows read at once.
pub(super) const ROWS: u32 = 500;

/// Where a run branches off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// After that transition.
    Seq(u64),
    /// Where the step at this path began (the last time, if several): it begins anew, with those after it in its block.
    Step(String),
}

/// A request to fork a run.
#[derive(Clone, Debug)]
pub struct Fork {
    /// Given by callers who must name the new run themselves. An existing run with this id is returned.
    pub run_id: Option<RunId>,
    pub at: At,
    /// Replace the inputs of the same names; what the shared part made of the former ones stays.
    pub inputs: Map<String, Value>,
    /// Another definition: one that has a place for every block that is open at the fork. Its inputs are the run's from then on:
    /// of those that the run had, the ones that it declares, and its defaults for what it adds.
    pub definition: Option<DefinitionHash>,
    /// Instead of the run's: whose the new run is. A fork of a run that came from a file needs them, because whoever is named
    /// there has not asked for it. A flat JSON object, at most 8 KiB.
    pub attributes: Option<Value>,
    /// At most 4 KiB.
    pub reason: String,
}

/// What a reset came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    pub run_id: RunId,
    /// False when the old run had ended before the reset.
    pub terminated: bool,
}

/// A fork that has been decided.
struct Decided {
    run: RunId,
    like: RunId,
    maker: Maker,
    seq: i64,
    definition: DefinitionHash,
    workflow: String,
    /// Instead of those of `like`.
    attributes: Option<Value>,
    /// Those of the start of `like`; the deadline only of a reset.
    terms: Terms,
    /// As it sees them.
    inputs: Value,
    /// The shared part.
    before: RunState,
    event: Event,
}

/// A reset that has been decided.
struct DecidedReset {
    old: RunId,
    /// The business key that goes to the new run.
    key: Option<String>,
    reason: String,
    fork: Decided,
}

/// What a fork is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Itself,
    /// It takes the run's place, in its chain's time as well.
    Reset,
}

impl Client {
    /// Starts a run whose state is that of another after one of its transitions. Both share the history up to there by
    /// reference; steps that had ended keep their outputs, attempts, checkpoints and cost under the old run and are not done
    /// again. Steps that were under way begin anew, with attempts and children of their own; the old run ends and settles
    /// its own. The new run has the old one's queue, attributes (unless others are given), outbox topic, priority and fairness key,
    /// neither its business key nor its parent, and its whole timeout from now on, or from the instant that the rate gives it. Signals
    /// that waited at the fork wait in both.
    ///
    /// It waits for a place in the old run's group and counts under its rate, whoever named them, and is never turned away. It is in
    /// no chain: the time of the old run's does not bound it.
    ///
    /// A fork before a former fork is one of the run that made that transition.
    ///
    /// # Errors
    /// `run_not_found`, `definition_not_found`, `input_invalid`, `too_large`; `fork_invalid` with every reason.
    /// # Transaction
    /// One: run, first transition, queue row. Idempotent by `run_id`.
    pub async fn fork(&self, run: RunId, asked: Fork) -> Result<Started> {
        let decided = Arc::new(self.decide_fork(run, &asked, For::Itself).await?);
        let created = self.once(|conn| {
            let decided = decided.clone();
            Box::pin(async move {
                let inserted = decided.insert(conn).await?;
                if inserted {
                    crate::committer::crash_point("fork.after_insert");
                    decided.begin(conn).await?;
                }
                crate::committer::crash_point("fork.before_commit");
                Ok(inserted)
            })
        });
        let created = created.await?;
        crate::committer::crash_point("fork.after_commit");
        self.wake().await;
        Ok(Started { run_id: decided.run, created })
    }

    /// Forks a run and ends the old one, if it is still open, as terminated: its attempts are closed and settled, its
    /// business key goes to the new run. If a schedule had started it, the new run is in its place there as well: as long as it
    /// is open, the overlap policy counts it. If the first start of its chain has bounded that (`chain_timeout`), the new run ends
    /// by then too.
    ///
    /// # Errors
    /// Those of [`Self::fork`]; `fork_invalid` also for a child run, whose parent waits for it, for a run that has continued as new,
    /// for one whose chain's time is over, and for a closed run whose business key another open run has; `run_exists` if
    /// `run_id` is taken; `run_imported`.
    /// # Transaction
    /// One: everything or nothing. Lock order: the old run; if it is open, the rate, the group and what the hook locks; the key, the
    /// schedule's action, the rate and the group. Idempotent by `run_id`: a second request finds the old run closed and its fork there.
    pub async fn reset(&self, run: RunId, asked: Fork) -> Result<Reset> {
        let decided = Arc::new(self.decide_reset(run, &asked).await?);
        let terminated = self.once(|conn| {
            let (decided, hook) = (decided.clone(), self.hook.clone());
            Box::pin(async move {
                let terminated = decided.reset(conn, hook.as_ref()).await?;
                crate::committer::crash_point("reset.before_commit");
                Ok(terminated)
            })
        });
        let terminated = terminated.await?;
        crate::committer::crash_point("reset.after_commit");
        self.wake().await;
        Ok(Reset { run_id: decided.fork.run, terminated })
    }

    /// [`Self::reset`] inside the caller's transaction; call [`Self::wake`] after the commit. Where to branch off is read before, on
    /// another connection.
    ///
    /// # Errors
    /// Those of [`Self::reset`]. Behind one of the database's the transaction can only be rolled back.
    /// # Transaction
    /// The caller's, in a savepoint: what is refused was never there.
    pub async fn reset_in(&self, conn: &mut PgConnection, run: RunId, asked: Fork) -> Result<Reset> {
        let decided = self.decide_reset(run, &asked).await?;
        store::starts::begin(conn).await?;
        match decided.reset(conn, self.hook.as_ref()).await {
            Ok(terminated) => {
                store::starts::keep(conn).await?;
                Ok(Reset { run_id: decided.fork.run, terminated })
            }
            // Nothing more can be said in this transaction.
            Err(error @ Error::Sql(_)) => Err(error),
            Err(error) => {
                store::starts::undo(conn).await?;
                Err(error)
            }
        }
    }

    async fn decide_reset(&self, run: RunId, asked: &Fork) -> Result<DecidedReset> {
        let old = async |conn: &mut PgConnection| {
            if store::runs::standing(conn, run).await?.imported {
                return Err(Error::RunImported(run.to_string()));
            }
            store::runs::load(conn, run).await
        };
        let old = self.ask(old).await?;
        if let Some(next) = old.chain.continued_as {
            return Err(Error::ForkInvalid(vec![went_on(next)]));
        }
        if let Some((parent, path)) = &old.parent {
            let why = format!("run {parent} waits for this run at `{path}`: reset that one, or fork this one");
            return Err(Error::ForkInvalid(vec![why]));
        }
        let fork = self.decide_fork(run, asked, For::Reset).await?;
        Ok(DecidedReset { old: run, key: old.workflow_id, reason: checked(&asked.reason)?, fork })
    }

    async fn decide_fork(&self, run: RunId, asked: &Fork, wanted: For) -> Result<Decided> {
        let reason = checked(&asked.reason)?;
        let (seq, again) = match &asked.at {
            At::Seq(seq) => (*seq, None),
            At::Step(path) => (self.began(run, path).await?, Some(path.clone())),
        };
        let new = asked.run_id.unwrap_or_default();
        let found = async |conn: &mut PgConnection| {
            let maker = store::forks::maker(conn, run, i64::try_from(seq).unwrap_or(i64::MAX)).await?;
            match &asked.attributes {
                Some(attributes) => check::attributes(attributes).map_err(|error| {
                    error.unwrap_or_else(|| Error::ForkInvalid(vec!["the attributes are no JSON object".into()]))
                })?,
                // Whoever a file names has not asked for the fork and would pay for it.
                None if store::runs::standing(conn, run).await?.imported => {
                    let why = "the run came from a file: say whose the fork is, by its attributes";
                    return Err(Error::ForkInvalid(vec![why.into()]));
                }
                None => {}
            }
            let definition = asked.definition.unwrap_or(maker.definition);
            let pinned: Pinned = store::definitions::load(conn, definition).await?;
            let calls = store::definitions::resolve_calls(conn, &pinned.definition).await?;
            let now = store::runs::now(conn).await?;
            let terms = store::forks::terms(conn, run).await?;
            Ok((maker, definition, pinned, calls, now, terms))
        };
        let (maker, definition, pinned, calls, now, mut terms) = self.ask(found).await?;
        if wanted == For::Itself {
            terms.deadline = None;
        }
        if let Some(over) = terms.deadline.filter(|deadline| *deadline <= now) {
            return Err(Error::ForkInvalid(vec![format!(
                "the time of its chain was over at {}: fork it, a fork is in no chain, or start another",
                over.to_rfc3339()
            )]));
        }
        let before = self.state_at(run, new, seq).await?;
        let migrated = definition != maker.definition;
        let inputs = match (asked.inputs.is_empty() && !migrated, before.inputs.clone()) {
            (true, _) => None,
            (false, Value::Object(mut map)) => {
                // What only the former definition asked for is not this one's; what is asked for now is.
                map.retain(|name, _| !migrated || pinned.definition.inputs.contains_key(name));
                map.extend(asked.inputs.clone());
                Some(prepare(&pinned.definition, &Value::Object(map)).map_err(Error::InputInvalid)?)
            }
            // Nothing had begun: said below.
            (false, _) => None,
        };
        let catalog = Catalog::default();
        let moment = Moment {
            now,
            draw: 0,
            permits: Cell::new(0),
            refused: &machine::Refusals::default(),
            catalog: &catalog,
            calls: &calls,
            current: None,
            depth: u32::try_from(maker.depth).unwrap_or(u32::MAX),
            bounds_calls: true,
            workflow: &pinned.definition.name,
        };
        let fork = machine::Fork {
            parent: maker.run,
            seq,
            reason,
            definition,
            inputs,
            migrated,
            again,
            until: terms.deadline,
        };
        let event = machine::fork(&pinned.definition, &before, fork, &moment).map_err(Error::ForkInvalid)?;
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        let (workflow, attributes) = (pinned.definition.name, asked.attributes.clone());
        let inputs = Value::Null;
        let mut decided =
            Decided { run: new, like: run, maker, seq, definition, workflow, attributes, terms, inputs, before, event };
        decided.inputs = decided.first(None)?.1.inputs;
        Ok(decided)
    }

    /// The fold of a run's first `seq` rows, under another id.
    async fn state_at(&self, run: RunId, as_run: RunId, seq: u64) -> Result<RunState> {
        let (mut state, mut after) = (RunState::new(as_run), 0);
        while after < seq {
            let rows = self.history(run, after, ROWS).await?;
            if rows.is_empty() {
                let ends = Error::Invariant(format!("the history of run {run} ends at {after}"));
                return Err(self.unless_gone(run, ends).await);
            }
            for row in rows.into_iter().filter(|row| row.seq <= seq) {
                let broken = |e: String| Error::Invariant(format!("history row {} of run {run}: {e}", row.seq));
                for event in row.events {
                    let event: Event = serde_json::from_value(event).map_err(|e| broken(e.to_string()))?;
                    fold(&mut state, &event).map_err(|e| broken(e.to_string()))?;
                }
                after = row.seq;
            }
        }
        Ok(state)
    }

    /// The transition in which a step began last.
    async fn began(&self, run: RunId, path: &str) -> Result<u64> {
        let (mut found, mut after) = (None, 0);
        loop {
            let rows = self.history(run, after, ROWS).await?;
            let Some(last) = rows.last() else { break };
            after = last.seq;
            let begins = |e: &Value| e["path"] == path && (e["type"] == "step_started" || e["type"] == "step_skipped");
            found = rows.iter().rev().find(|r| r.events.iter().any(begins)).map(|r| r.seq).or(found);
        }
        // Distinguishes a run that is not there from a step that did not begin.
        self.ask(async |conn| store::runs::standing(conn, run).await).await?;
        found.ok_or_else(|| Error::ForkInvalid(vec![format!("no step `{path}` has begun in this run")]))
    }
}

fn went_on(next: RunId) -> String {
    format!("run {next} goes on in the place of this run: reset that one, or fork this one")
}

impl DecidedReset {
    /// Whether it has ended the old run, or an earlier sending has done all of it.
    async fn reset(&self, conn: &mut PgConnection, hook: &dyn TransitionHook) -> Result<bool> {
        let Self { old, key, reason, fork: decided } = self;
        let text = format!("reset to transition {} as run {}: {reason}", decided.seq, decided.run);
        let terminated = store::starts::lock_to_end(conn, *old).await?;
        crate::committer::crash_point("reset.after_lock");
        if terminated {
            // Before the hook locks accounts: whoever arrives at a group has locked it then. The key is the run's own.
            if let Some(arrives) = decided.arrives(conn).await? {
                arrives.reserve(conn).await?;
            }
            crate::committer::crash_point("reset.after_reserve");
            crate::worker::terminate_in(conn, hook, *old, &text).await?;
        } else if let Some(next) = store::runs::standing(conn, *old).await?.chain.continued_as {
            // It has gone on as another since it was looked at.
            return Err(Error::ForkInvalid(vec![went_on(next)]));
        }
        crate::committer::crash_point("reset.after_terminate");
        if !decided.insert(conn).await? {
            // The answer of an earlier sending was lost: then all of it was done.
            if !terminated && decided.is_there(conn).await? {
                return Ok(true);
            }
            return Err(Error::RunExists(decided.run.to_string()));
        }
        crate::committer::crash_point("reset.after_insert");
        if let Some(key) = key
            && !store::forks::take_key(conn, key, decided.run).await?
        {
            let why = format!("another open run has the business key `{key}`: end it first, or fork");
            return Err(Error::ForkInvalid(vec![why]));
        }
        crate::committer::crash_point("reset.after_key");
        let why = format!("a reset took the place of run {old}");
        store::schedules::hand_over(conn, *old, decided.run, &why).await?;
        crate::committer::crash_point("reset.after_schedule");
        // Last: another start under the key of a closed run would hold the key and wait for the group.
        decided.begin(conn).await?;
        Ok(terminated)
    }
}

impl Decided {
    async fn insert(&self, conn: &mut PgConnection) -> Result<bool> {
        store::forks::hold(conn, [self.maker.run, self.like]).await?;
        crate::committer::crash_point("fork.after_hold");
        let inserted = store::forks::insert(conn, &self.row()).await?;
        if inserted && store::starts::has_left(conn, self.run).await? {
            return Err(store::retention::absent(conn, self.run).await);
        }
        Ok(inserted)
    }

    /// Its first event and the state after it; if its rate holds it back, its time begins at `begins`.
    fn first(&self, begins: Option<DateTime<Utc>>) -> Result<(Event, RunState)> {
        let event = match begins {
            Some(begins) => machine::put_off(self.event.clone(), begins, self.terms.deadline),
            None => self.event.clone(),
        };
        let mut state = self.before.clone();
        fold(&mut state, &event).map_err(|e| Error::Invariant(format!("fork of run {}: {e}", self.like)))?;
        if self.terms.named != Named::default() || self.terms.deadline.is_some() {
            state.format = state.format.max(TERMS);
        }
        Ok((event, state))
    }

    /// What it waits for, like any other run of those terms and of its definition.
    async fn arrives(&self, conn: &mut PgConnection) -> Result<Option<Arrives>> {
        Arrives::by(conn, self.terms.named.clone(), self.definition, &self.workflow, &self.inputs).await
    }

    /// Holds it back as long as it must wait, once it is inserted, and writes its first transition.
    async fn begin(&self, conn: &mut PgConnection) -> Result<()> {
        let mut begins = None;
        if let Some(mut arrives) = self.arrives(conn).await? {
            begins = arrives.plan(conn).await?;
            crate::committer::crash_point("fork.after_plan");
            chain::arrive(conn, vec![(arrives, self.run)]).await?;
        }
        crate::committer::crash_point("fork.after_arrival");
        let (event, state) = self.first(begins)?;
        store::forks::begin(conn, self.run, self.seq + 1, &event, &state).await
    }

    async fn is_there(&self, conn: &mut PgConnection) -> Result<bool> {
        store::forks::is_there(conn, &self.row()).await
    }

    fn row(&self) -> store::forks::New<'_> {
        store::forks::New {
            run: self.run,
            maker: &self.maker,
            seq: self.seq,
            like: self.like,
            workflow: &self.workflow,
            definition: self.definition,
            attributes: self.attributes.as_ref(),
            chain_deadline: self.terms.deadline,
            inputs: &self.inputs,
        }
    }
}
