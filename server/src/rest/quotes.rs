//! What a run was expected to cost, what it cost, and what it may cost.

use super::{
    Code, Error,
    call::{Call, Need, json},
    runs::owned,
};
use crate::store::quotes::{Allowed, MORE_MAX, More};
use loopwright_activities::billing::MicroCredits;
use loopwright_engine::ids::RunId;
use serde::Deserialize;
use uuid::Uuid;
use warp::reply::Response;

/// `GET /v1/runs/{id}/forecast`: part by part, beside what was spent, and the limit.
pub(super) async fn forecast(id: Uuid, call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    owned(&call, caller, id).await?;
    json(200, &call.state.store.quote(RunId(id)).await?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewLimit {
    credits: String,
}

/// `POST /v1/runs/{id}/limit` `{credits}`: so many more than were approved. The `Idempotency-Key` drops repeats.
pub(super) async fn allow(id: Uuid, mut call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Run).await?;
    let key = call.idempotency_key()?;
    let view = owned(&call, caller, id).await?;
    let new: NewLimit = call.json()?;
    let credits = new.credits.parse::<MicroCredits>().ok().filter(|c| c.0 > 0 && *c <= MORE_MAX).ok_or_else(|| {
        Error::new(Code::InputInvalid, "That is no number of credits.")
            .at("/credits", format!("must be decimal text above 0 and up to {MORE_MAX}, with at most six decimals"))
    })?;
    if view.status.is_closed() {
        return Err(Error::new(Code::RunClosed, "The run has ended and spends nothing any more."));
    }
    let key = format!("rest:{}", key.unwrap_or_else(|| Uuid::now_v7().to_string()));
    let by = format!("user:{}", caller.user);
    let more = More { user: caller.user, run: RunId(id), credits, key: &key, by: &by };
    match call.state.store.allow_more(&call.state.client, &more).await? {
        Some(limit) => json(200, &Allowed::from(limit)),
        None => {
            Err(Error::new(Code::LimitMissing, "Nobody approved a sum for this run; its budget is in its definition."))
        }
    }
}
