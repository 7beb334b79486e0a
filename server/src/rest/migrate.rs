//! A run in flight that goes on under another version of its workflow. Nobody is paused here, and nothing is waited for: a run that
//! works is the caller's to pause first.

use super::{
    Error,
    begin::{reason_of, version_of},
    call::{Call, Need, json},
    runs::owned,
};
use crate::app;
use loopwright_engine::{client::Migrate, ids::RunId};
use serde::Deserialize;
use std::collections::BTreeMap;
use uuid::Uuid;
use warp::reply::Response;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewVersion {
    to: String,
    #[serde(default)]
    map: BTreeMap<String, String>,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    reason: Option<String>,
}

/// `POST /v1/runs/{id}/migrate` `{to, map, dry_run, reason}`: 200 with the report; `to` as `definition` of a fork. Twice is once.
pub(super) async fn migrate(id: Uuid, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let view = owned(&call, caller, id).await?;
    let new: NewVersion = call.json()?;
    let asked = Migrate {
        to: version_of(&call.state, &view.workflow, &new.to).await?,
        map: new.map,
        reason: reason_of(new.reason)?,
        by: Some(format!("user:{}", caller.user)),
        dry_run: new.dry_run,
        catalog: app::catalog(),
    };
    json(200, &call.state.client.migrate(RunId(id), asked).await?)
}
