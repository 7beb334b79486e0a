//! What may be believed of an archive: its header is compared with what its history comes to, and what no table could hold is
//! refused by name. Pure.

use super::{
    Archive,
    instants::{of, sane},
};
use crate::{
    Error, Result,
    client::{ATTRIBUTES_BYTES_MAX, json_len},
    event::{self, Ending, Event},
    machine::{RunState, fold},
    view::RunStatus,
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;

/// Highest number of a message. Chosen: what JSON's numbers hold everywhere, and room in Postgres for those that follow.
const MESSAGE_MAX: u64 = 1 << 53;

/// What an archive's history comes to.
pub(crate) struct Checked {
    pub(crate) state: RunState,
    /// Number of the newest message in it; those of a fork are counted on from there.
    pub(crate) messages: u64,
}

/// # Errors
/// `archive_invalid` with the line, `too_large`.
pub(crate) fn check(archive: &Archive) -> Result<Checked> {
    let run = &archive.header.run;
    let at = |line: u64, why: String| Error::ArchiveInvalid { line, why };
    for (what, name) in [("definition", &archive.header.definition.name), ("run's workflow", &run.workflow)] {
        if *name != archive.definition.name {
            let why =
                format!("the {what} is `{name}` by the header and `{}` by the definition", archive.definition.name);
            return Err(at(1, why));
        }
    }
    migrated(archive).map_err(|why| at(1, why))?;
    attributes(&run.attributes).map_err(|e| e.unwrap_or_else(|| at(1, "the attributes are no JSON object".into())))?;
    let forked = archive.forked_seq();
    if run.forked_seq != forked {
        return Err(at(1, format!("forked after {} by the header, after {forked} by the history", run.forked_seq)));
    }
    storable(&archive.header, [run.started_at].into_iter().chain(run.closed_at)).map_err(|why| at(1, why))?;

    let (mut state, mut messages) = (RunState::new(run.run_id), 0);
    for (row, line) in archive.history.iter().zip(2..) {
        let invalid = |why: String| at(line, why);
        if row.format > event::FORMAT {
            return Err(invalid(format!("written by a newer release (format {}): use that", row.format)));
        }
        storable(&row.events, [row.at]).map_err(invalid)?;
        for event in &row.events {
            let event: Event = serde_json::from_value(event.clone()).map_err(|e| invalid(e.to_string()))?;
            sane(of(&event)).map_err(invalid)?;
            if let Event::SignalReceived { n, .. } | Event::SignalDropped { n, .. } = event {
                if n > MESSAGE_MAX {
                    return Err(invalid(format!("a signal has the number {n}; at most {MESSAGE_MAX}")));
                }
                messages = messages.max(n);
            }
            fold(&mut state, &event).map_err(|e| invalid(format!("row {} cannot follow: {e}", row.seq)))?;
        }
    }
    let says = (run.status.is_closed(), run.closed_at.is_some());
    if says != (state.status.is_closed(), state.status.is_closed()) || (says.0 && run.status != state.status) {
        let why = format!("the header says `{}`, the history says `{}`", run.status.as_str(), state.status.as_str());
        return Err(at(1, why));
    }
    let next = match (state.status, &state.ending) {
        (RunStatus::Continued, Some(Ending::Continued { run, .. })) => Some(*run),
        _ => None,
    };
    if run.chain.continued_as != next || run.chain.first.is_some() != run.chain.continued_from.is_some() {
        return Err(at(1, "the chain of runs is another one than that of the history".into()));
    }
    if run.output != state.output {
        return Err(at(1, "the output is another one than that of the history".into()));
    }
    if run.failure.clone().map(serde_json::from_value).transpose().ok() != Some(state.failure.clone()) {
        return Err(at(1, "the failure is another one than that of the history".into()));
    }

    let mut seen = BTreeSet::new();
    for (checkpoint, line) in archive.checkpoints.iter().zip(2 + archive.history.len() as u64..) {
        storable(checkpoint, [checkpoint.created_at]).map_err(|why| at(line, why))?;
        if !seen.insert((&checkpoint.path, &checkpoint.key)) {
            return Err(at(line, format!("checkpoint `{}` of `{}` is there twice", checkpoint.key, checkpoint.path)));
        }
    }
    Ok(Checked { state, messages })
}

/// Whether the definitions of the header are those between which the history says that the run was migrated.
fn migrated(archive: &Archive) -> std::result::Result<(), String> {
    let header = &archive.header;
    for former in &header.former {
        if former.definition.name != archive.definition.name {
            return Err(format!("a former definition is one of `{}`", former.definition.name));
        }
    }
    let mut said = Vec::new();
    for row in archive.history.iter().filter(|row| row.seq > archive.forked_seq()) {
        for event in row.events.iter().filter(|e| e["type"] == "run_migrated") {
            said.push((row.seq.saturating_sub(1), event["from"].clone(), event["to"].clone()));
        }
    }
    let hash = |deployed: &super::Deployed| Value::String(deployed.hash.to_string());
    let told: Vec<_> = header.former.iter().map(|former| (former.until, hash(&former.definition))).collect();
    let next = header.former.iter().skip(1).map(|former| &former.definition).chain([&header.definition]).map(hash);
    let told: Vec<_> = told.into_iter().zip(next).map(|((until, from), to)| (until, from, to)).collect();
    if said != told {
        return Err("the run was migrated otherwise by the header than by the history".into());
    }
    Ok(())
}

/// Whether these can be a run's attributes; `None`: they are no object.
pub(crate) fn attributes(attributes: &Value) -> std::result::Result<(), Option<Error>> {
    if !attributes.is_object() {
        return Err(None);
    }
    let size = json_len(attributes);
    if size > ATTRIBUTES_BYTES_MAX {
        return Err(Some(Error::TooLarge { what: "attributes", actual: size, limit: ATTRIBUTES_BYTES_MAX }));
    }
    crate::client::shallow("attributes", attributes).map_err(Some)
}

/// Whether Postgres can hold it.
fn storable(record: &impl Serialize, at: impl IntoIterator<Item = DateTime<Utc>>) -> std::result::Result<(), String> {
    sane(at)?;
    let value = serde_json::to_value(record).map_err(|e| e.to_string())?;
    if has_nul(&value) { Err("a text contains a NUL, which Postgres cannot hold".into()) } else { Ok(()) }
}

/// Whether a text in it holds a NUL, which no text of Postgres can.
pub(crate) fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(fields) => fields.iter().any(|(name, value)| name.contains('\0') || has_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
