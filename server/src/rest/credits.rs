//! The caller's credits.

use super::{
    Error,
    call::{Call, Need, PageQuery, json, parse},
};
use warp::reply::Response;

/// `GET /v1/credits`.
pub(super) async fn balance(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let balance = call.state.store.balance(caller.user).await?.ok_or_else(|| Error::not_found("user"))?;
    json(200, &balance)
}

/// `GET /v1/credits/transactions?cursor=&limit=`: newest first.
pub(super) async fn transactions(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let page: PageQuery = call.query()?;
    let before = parse("cursor", page.cursor.as_deref())?;
    json(200, &call.state.store.transactions(caller.user, before, page.limit()?).await?)
}
