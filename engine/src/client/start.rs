//! Starting a run, and what becomes of the start if its id was used before.

use super::{ATTRIBUTES_BYTES_MAX, Client, Start, Started, json_len, shallow, short_id};
use crate::{
    Error, Result,
    admission::{IdConflict, Place},
    definition::{Definition, inputs::prepare},
    ids::RunId,
    labels,
    store::{
        self,
        groups::{self, Arrival, Guest},
        starts,
    },
};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;

/// Open runs that one start finds under its id and ends, or finds ended, before it gives up. Chosen: each is another start that
/// was faster in the same milliseconds.
const TAKE_TRIES: u32 = 32;

impl Client {
    /// Starts a run, unless its id (the business key) or its run id say otherwise: see [`IdConflict`] and
    /// [`IdReuse`](crate::admission::IdReuse). A start that is sent again under its run id finds its run, whatever the policies
    /// say, and ends nobody. One that finds its group full and gives way to those who are there (`cancel-new`) starts as well, and is
    /// cancelled before it begins anything.
    ///
    /// The run's attributes are those of the start and the labels of its definition.
    ///
    /// # Errors
    /// `input_invalid`, `definition_not_found`, `too_large`, `too_deep`, `concurrency_full`, `rate_full`, `workflow_id_open`,
    /// `workflow_id_used`; with `terminate_existing` also what [`Self::terminate`] says of the run that is open.
    /// # Transaction
    /// One: the end of the open run, id, run, queue row or place in its group.
    pub async fn start(&self, start: Start) -> Result<Started> {
        let started = self.once(|conn| {
            let start = start.clone();
            let client = self.clone();
            Box::pin(async move {
                let started = client.start_in(conn, start).await;
                crate::committer::crash_point("start.before_commit");
                started
            })
        });
        let started = started.await?;
        crate::committer::crash_point("start.after_commit");
        self.wake().await;
        Ok(started)
    }

    /// [`Self::start`] inside the caller's transaction; call [`Self::wake`] after the commit. What is refused was never there.
    pub async fn start_in(&self, conn: &mut PgConnection, start: Start) -> Result<Started> {
        let pinned = store::definitions::load(conn, start.definition).await?;
        self.start_pinned(conn, start, &pinned.definition).await
    }

    /// [`Self::start_in`] of a definition that was loaded before.
    pub(crate) async fn start_pinned(
        &self,
        conn: &mut PgConnection,
        start: Start,
        definition: &Definition,
    ) -> Result<Started> {
        let attributes = labels::labelled(start.attributes, &definition.extras);
        let start = Start { attributes, ..start };
        let size = json_len(&start.attributes);
        if size > ATTRIBUTES_BYTES_MAX {
            return Err(Error::TooLarge { what: "attributes", actual: size, limit: ATTRIBUTES_BYTES_MAX });
        }
        shallow("attributes", &start.attributes)?;
        short_id("the workflow id", start.workflow_id.as_deref())?;
        short_id("the topic", start.topic.as_deref())?;
        short_id("the queue", Some(&start.queue))?;
        start.admission.check(&start.attributes)?;
        if start.workflow_id.is_none() && start.admission.speaks_of_an_id() {
            let why = "a policy for an id that was used before needs an id: give the start one";
            return Err(Error::InputInvalid(vec![why.into()]));
        }
        if let Some(violation) = labels::queue_violation(&start.queue) {
            return Err(Error::InputInvalid(vec![violation]));
        }
        let inputs = prepare(definition, &start.inputs).map_err(Error::InputInvalid)?;
        let place = start.admission.place(definition, &inputs)?;
        let held = place.is_some() || start.admission.rate.is_some();
        let run = start.run_id.unwrap_or_default();
        starts::begin(conn).await?;
        if !starts::insert(conn, run, &start, definition, &inputs, held).await? {
            // Started before, and perhaps closed since: its id, if it had one, is none of our business.
            starts::keep(conn).await?;
            return Ok(Started { run_id: run, created: false });
        }
        crate::committer::crash_point("start.after_row");
        // Only who is given his id may have been here before.
        if start.run_id.is_some() && starts::has_left(conn, run).await? {
            starts::undo(conn).await?;
            return Ok(Started { run_id: run, created: false });
        }
        match self.admit(conn, run, &start, place.as_ref()).await {
            Ok(None) => {
                starts::keep(conn).await?;
                Ok(Started { run_id: run, created: true })
            }
            Ok(Some(open)) => {
                starts::undo(conn).await?;
                Ok(Started { run_id: open, created: false })
            }
            // Nothing more can be said in this transaction.
            Err(error @ Error::Sql(_)) => Err(error),
            Err(error) => {
                starts::undo(conn).await?;
                Err(error)
            }
        }
    }

    /// Gives a run that was inserted its id and its place. `Some`: an open run is the answer, and this one is to be undone.
    async fn admit(
        &self,
        conn: &mut PgConnection,
        run: RunId,
        start: &Start,
        place: Option<&Place>,
    ) -> Result<Option<RunId>> {
        let Start { workflow_id, admission, .. } = start;
        let ends = workflow_id.is_some() && admission.id_conflict == IdConflict::TerminateExisting;
        if let Some(id) = workflow_id {
            if ends {
                let rate = admission.rate.as_ref().map(|rate| rate.key.as_str());
                self.end_and_take(conn, id, run, (rate, place.map(|place| place.group.as_str()))).await?;
            } else if let Some(open) = starts::take_id(conn, id, run).await? {
                return match admission.id_conflict {
                    IdConflict::UseExisting => Ok(Some(open)),
                    IdConflict::Fail | IdConflict::TerminateExisting => {
                        Err(Error::WorkflowIdOpen { id: id.clone(), run: open.to_string() })
                    }
                };
            }
            if admission.id_reuse != crate::admission::IdReuse::AllowDuplicate
                && let Some((last, status)) = starts::last_closed(conn, id).await?
                && !admission.id_reuse.allows(status)
            {
                let (id, run) = (id.clone(), last.to_string());
                return Err(Error::WorkflowIdUsed { id, run, status: status.as_str() });
            }
        }
        crate::committer::crash_point("start.after_id");
        // Behind all runs and the id, before accounts: see `store::starts`.
        let not_before = next_start(conn, start).await?;
        if place.is_some() || admission.rate.is_some() {
            crate::committer::crash_point("start.after_rate");
            let arrival = groups::arrive(conn, run, place, not_before, Guest::Start).await?;
            if arrival == Arrival::Refused {
                return Err(Error::ConcurrencyFull(place.map(|p| p.group.clone()).unwrap_or_default()));
            }
        }
        Ok(None)
    }

    /// Terminates the open run under an id, and gives the id to another. Two who do so at once do it one after the other: the
    /// second ends the run of the first.
    /// `waits`: the rate and the group at which the new run arrives.
    async fn end_and_take(
        &self,
        conn: &mut PgConnection,
        id: &str,
        run: RunId,
        waits: (Option<&str>, Option<&str>),
    ) -> Result<()> {
        for _ in 0..TAKE_TRIES {
            // If it has closed meanwhile, its id is perhaps another start's, who arrives at the group next: the id comes first then.
            if let Some(open) = starts::holder(conn, id).await?
                && starts::lock_to_end(conn, open).await?
            {
                crate::committer::crash_point("start.after_lock");
                groups::reserve(conn, waits.0, waits.1).await?;
                crate::committer::crash_point("start.after_reserve");
                let why = format!("run {run} was started in its place, under the id `{id}`");
                crate::worker::terminate_in(conn, self.hook.as_ref(), open, &why).await?;
                crate::committer::crash_point("start.after_terminate");
            }
            if starts::take_free_id(conn, id, run).await? {
                return Ok(());
            }
        }
        Err(Error::LeaseLost)
    }
}

/// When the rate of a start lets it begin; `None` is now.
async fn next_start(conn: &mut PgConnection, start: &Start) -> Result<Option<DateTime<Utc>>> {
    match &start.admission.rate {
        Some(rate) => groups::next_start(conn, rate, true).await,
        None => Ok(None),
    }
}
