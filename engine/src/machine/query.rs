//! Queries: what a definition lets people ask of a run. They read the state and change nothing.

use super::{Illegal, Moment, Refusals, RunState, scope::Place};
use crate::{definition::Definition, failure::Failure, signature::Catalog};
use serde_json::{Value, json};
use std::{cell::Cell, collections::BTreeMap};

/// Evaluates a query over a state. `None` if the definition has none of that name. Beside what every expression sees,
/// `run.status` is the run's.
///
/// # Errors
/// [`Illegal`] for a state that is not of this definition.
pub fn query(definition: &Definition, state: &RunState, name: &str) -> Result<Option<Result<Value, Failure>>, Illegal> {
    let Some(data) = definition.queries.get(name) else { return Ok(None) };
    let (catalog, calls, refused) = (Catalog::default(), BTreeMap::new(), Refusals::default());
    let moment = Moment {
        now: state.started_at,
        draw: 0,
        permits: Cell::new(0),
        refused: &refused,
        catalog: &catalog,
        calls: &calls,
        current: None,
        depth: 0,
        bounds_calls: true,
        workflow: &definition.name,
    };
    let mut place = Place::inside(definition, state, &moment, "")?;
    let run = json!({
        "id": state.run_id,
        "workflow": definition.name,
        "started_at": state.started_at,
        "status": state.status.as_str(),
    });
    place.extra.insert("run".into(), run);
    Ok(Some(place.resolve(data)))
}
