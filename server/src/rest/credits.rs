//! The caller's credits.

use super::{
    Error,
    call::{Call, Need, PageQuery, json, parse},
    error::Code,
};
use chrono::{DateTime, Utc};
use loopwright_activities::billing::report::{By, Span};
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

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct ReportQuery {
    by: Option<String>,
    from: Option<DateTime<Utc>>,
    to: Option<DateTime<Utc>>,
}

/// `GET /v1/credits/report?by=&from=&to=`: what the caller has spent, by `project`, `model`, `activity` (default) or `day`.
pub(super) async fn report(call: Call) -> Result<Response, Error> {
    let caller = call.principal(Need::Read).await?;
    let query: ReportQuery = call.query()?;
    let by = match query.by.as_deref() {
        None => By::Activity,
        Some(text) => By::parse(text)
            .ok_or_else(|| Error::new(Code::QueryInvalid, "`by` is one of project, model, activity, day."))?,
    };
    let span = Span { from: query.from, to: query.to, user: Some(caller.user) };
    json(200, &call.state.store.spent_by(by, span).await?)
}
