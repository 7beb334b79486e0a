//! Queries: read-only views of a run, as its definition declares them.

use super::{Client, fork::ROWS};
use crate::{
    Error, Result,
    event::Event,
    ids::RunId,
    machine::{self, RunState, fold},
    store,
    view::Queried,
};
use sqlx::PgConnection;

impl Client {
    /// Evaluates a query of the run's definition over the state that its history gives. Nothing is written, nobody is woken;
    /// a run that is open may have moved on meanwhile. Of a run that has closed it is the state before its last event,
    /// which holds what the steps had come to.
    ///
    /// # Errors
    /// `query_not_found` (the names that there are), `query_failed` when it cannot be evaluated in this state,
    /// `run_not_found`.
    /// # Transaction
    /// Reads only. An open run is folded from its cursor, a closed one from its whole history.
    pub async fn query(&self, run: RunId, name: &str) -> Result<Queried> {
        let asked = async |conn: &mut PgConnection| {
            let loaded = store::runs::load(conn, run).await?;
            let pinned = store::definitions::load(conn, loaded.definition).await?;
            Ok((loaded, pinned))
        };
        let (loaded, pinned) = self.ask(asked).await?;
        let seq = u64::try_from(loaded.seq).unwrap_or(0);
        let known = pinned.definition.queries.contains_key(name);
        let mut state = if known && loaded.state.status.is_closed() {
            self.state_before_end(run, seq).await?
        } else {
            loaded.state
        };
        if state.inputs.is_null() {
            state.inputs = loaded.inputs;
        }
        let status = loaded.status;
        state.status = status;
        let (asked, definition) = (name.to_owned(), pinned.definition);
        // An expression may take a while, and nothing can interrupt it.
        let (answer, definition) = tokio::task::spawn_blocking(move || {
            let answer = machine::query(&definition, &state, &asked);
            (answer, definition)
        })
        .await
        .map_err(|e| Error::Invariant(format!("query `{name}` of run {run}: {e}")))?;
        let answer = answer.map_err(|e| Error::Invariant(format!("query `{name}` of run {run}: {e}")))?;
        let Some(answer) = answer else {
            let names = definition.queries.into_keys().collect();
            return Err(Error::QueryNotFound { name: name.to_owned(), names });
        };
        let result = answer.map_err(|failure| Error::QueryFailed { name: name.to_owned(), failure })?;
        Ok(Queried { name: name.to_owned(), result, status, seq })
    }

    /// A closed run's state with everything but its last event, which empties it.
    async fn state_before_end(&self, run: RunId, seq: u64) -> Result<RunState> {
        let (mut state, mut after) = (RunState::new(run), 0);
        while after < seq {
            let rows = self.history(run, after, ROWS).await?;
            let Some(last) = rows.last() else {
                return Err(Error::Invariant(format!("the history of run {run} ends at {after}")));
            };
            after = last.seq;
            for row in rows {
                let broken = |e: String| Error::Invariant(format!("history row {} of run {run}: {e}", row.seq));
                for event in row.events {
                    let event: Event = serde_json::from_value(event).map_err(|e| broken(e.to_string()))?;
                    if !matches!(event, Event::RunClosed { .. }) {
                        fold(&mut state, &event).map_err(|e| broken(e.to_string()))?;
                    }
                }
            }
        }
        Ok(state)
    }
}
