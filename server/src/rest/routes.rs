//! The table of routes.

use super::{
    State, begin,
    call::{Call, call, respond},
    credits,
    error::{Code, Error},
    events, export, health, keys, loop_run, migrate, projects, quotes, runs, schedules, updates,
};
use std::convert::Infallible;
use uuid::Uuid;
use warp::{
    Filter, Rejection,
    filters::BoxedFilter,
    http::{HeaderValue, header},
    reply::{Reply, Response},
};

/// Method and path of every route; `{}` stands for one segment, `{*}` for the rest.
pub const ROUTES: &[(&str, &str)] = &[
    ("POST", "/orchestrate/run-loop"),
    ("GET", "/v1/projects"),
    ("POST", "/v1/projects"),
    ("GET", "/v1/projects/{}"),
    ("GET", "/v1/projects/{}/files"),
    ("GET", "/v1/projects/{}/files/{*}"),
    ("GET", "/v1/projects/{}/archive"),
    ("GET", "/v1/runs"),
    ("POST", "/v1/runs"),
    ("GET", "/v1/runs/{}"),
    ("GET", "/v1/runs/{}/history"),
    ("GET", "/v1/runs/{}/events"),
    ("GET", "/v1/runs/{}/export"),
    ("POST", "/v1/runs/{}/signals"),
    ("POST", "/v1/runs/{}/updates"),
    ("GET", "/v1/runs/{}/updates/{}"),
    ("GET", "/v1/runs/{}/queries/{}"),
    ("POST", "/v1/runs/{}/approvals/{}"),
    ("POST", "/v1/runs/{}/cancel"),
    ("POST", "/v1/runs/{}/terminate"),
    ("POST", "/v1/runs/{}/fork"),
    ("POST", "/v1/runs/{}/reset"),
    ("POST", "/v1/runs/{}/migrate"),
    ("POST", "/v1/runs/{}/pause"),
    ("POST", "/v1/runs/{}/resume"),
    ("GET", "/v1/runs/{}/forecast"),
    ("POST", "/v1/runs/{}/limit"),
    ("GET", "/v1/schedules"),
    ("POST", "/v1/schedules"),
    ("GET", "/v1/schedules/{}"),
    ("DELETE", "/v1/schedules/{}"),
    ("POST", "/v1/schedules/{}/pause"),
    ("POST", "/v1/schedules/{}/resume"),
    ("POST", "/v1/schedules/{}/trigger"),
    ("POST", "/v1/schedules/{}/backfill"),
    ("GET", "/v1/credits"),
    ("GET", "/v1/credits/transactions"),
    ("GET", "/v1/credits/report"),
    ("GET", "/v1/keys"),
    ("PUT", "/v1/keys"),
    ("GET", "/v1/keys/{}"),
    ("DELETE", "/v1/keys/{}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
];

/// Every route, with what routing itself refuses turned into problem documents.
pub fn routes(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let trigger = warp::path!("orchestrate" / "run-loop")
        .and(warp::post())
        .and(c())
        .then(|call: Call| respond("/orchestrate/run-loop", loop_run::run(call)))
        .boxed();
    let v1 = warp::path("v1")
        .and(
            projects(state)
                .or(runs(state))
                .unify()
                .or(begun(state))
                .unify()
                .or(scheduled(state))
                .unify()
                .or(credits(state))
                .unify()
                .or(own_keys(state))
                .unify(),
        )
        .boxed();
    trigger.or(v1).unify().or(operations(state)).unify().recover(recover).unify().boxed()
}

fn projects(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let list = warp::path!("projects")
        .and(warp::get())
        .and(c())
        .then(|call| respond("/v1/projects", projects::list(call)))
        .boxed();
    let create = warp::path!("projects")
        .and(warp::post())
        .and(c())
        .then(|call| respond("/v1/projects", projects::create(call)))
        .boxed();
    let show = warp::path!("projects" / Uuid)
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/projects/{id}", projects::show(id, call)))
        .boxed();
    let files = warp::path!("projects" / Uuid / "files")
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/projects/{id}/files", projects::files(id, call)))
        .boxed();
    let file = warp::path!("projects" / Uuid / "files" / ..)
        .and(warp::path::tail())
        .and(warp::get())
        .and(c())
        .then(|id, tail: warp::path::Tail, call| {
            let path = tail.as_str().to_owned();
            respond("/v1/projects/{id}/files/{path}", projects::file(id, path, call))
        })
        .boxed();
    let archive = warp::path!("projects" / Uuid / "archive")
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/projects/{id}/archive", projects::archive(id, call)))
        .boxed();
    list.or(create).unify().or(show).unify().or(files).unify().or(file).unify().or(archive).unify().boxed()
}

fn runs(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let list = warp::path!("runs").and(warp::get()).and(c()).then(|call| respond("/v1/runs", runs::list(call))).boxed();
    let show = warp::path!("runs" / Uuid)
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}", runs::show(id, call)))
        .boxed();
    let history = warp::path!("runs" / Uuid / "history")
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/history", runs::history(id, call)))
        .boxed();
    let live = warp::path!("runs" / Uuid / "events")
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/events", events::stream(id, call)))
        .boxed();
    let export = warp::path!("runs" / Uuid / "export")
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/export", export::export(id, call)))
        .boxed();
    let signal = warp::path!("runs" / Uuid / "signals")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/signals", runs::signal(id, call)))
        .boxed();
    let update = warp::path!("runs" / Uuid / "updates")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/updates", updates::send(id, call)))
        .boxed();
    let updated = warp::path!("runs" / Uuid / "updates" / String)
        .and(warp::get())
        .and(c())
        .then(|id, update, call| respond("/v1/runs/{id}/updates/{update}", updates::show(id, update, call)))
        .boxed();
    let query = warp::path!("runs" / Uuid / "queries" / String)
        .and(warp::get())
        .and(c())
        .then(|id, name, call| respond("/v1/runs/{id}/queries/{name}", updates::query(id, name, call)))
        .boxed();
    let approve = warp::path!("runs" / Uuid / "approvals" / String)
        .and(warp::post())
        .and(c())
        .then(|id, step, call| respond("/v1/runs/{id}/approvals/{step}", runs::approve(id, step, call)))
        .boxed();
    let cancel = warp::path!("runs" / Uuid / "cancel")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/cancel", runs::cancel(id, call)))
        .boxed();
    let pause = warp::path!("runs" / Uuid / "pause")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/pause", runs::pause_or_resume(id, true, call)))
        .boxed();
    let resume = warp::path!("runs" / Uuid / "resume")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/resume", runs::pause_or_resume(id, false, call)))
        .boxed();
    let forecast = warp::path!("runs" / Uuid / "forecast")
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/forecast", quotes::forecast(id, call)))
        .boxed();
    let allow = warp::path!("runs" / Uuid / "limit")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/limit", quotes::allow(id, call)))
        .boxed();
    list.or(show)
        .unify()
        .or(forecast)
        .unify()
        .or(allow)
        .unify()
        .or(pause)
        .unify()
        .or(resume)
        .unify()
        .or(history)
        .unify()
        .or(live)
        .unify()
        .or(export)
        .unify()
        .or(signal)
        .unify()
        .or(update)
        .unify()
        .or(updated)
        .unify()
        .or(query)
        .unify()
        .or(approve)
        .unify()
        .or(cancel)
        .unify()
        .boxed()
}

/// Where runs begin, go on otherwise, and end at once.
fn begun(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let start =
        warp::path!("runs").and(warp::post()).and(c()).then(|call| respond("/v1/runs", begin::start(call))).boxed();
    let terminate = warp::path!("runs" / Uuid / "terminate")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/terminate", runs::terminate(id, call)))
        .boxed();
    let fork = warp::path!("runs" / Uuid / "fork")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/fork", begin::fork_or_reset(id, false, call)))
        .boxed();
    let reset = warp::path!("runs" / Uuid / "reset")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/reset", begin::fork_or_reset(id, true, call)))
        .boxed();
    let migrate = warp::path!("runs" / Uuid / "migrate")
        .and(warp::post())
        .and(c())
        .then(|id, call| respond("/v1/runs/{id}/migrate", migrate::migrate(id, call)))
        .boxed();
    start.or(terminate).unify().or(fork).unify().or(reset).unify().or(migrate).unify().boxed()
}

fn scheduled(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let list = warp::path!("schedules")
        .and(warp::get())
        .and(c())
        .then(|call| respond("/v1/schedules", schedules::list(call)))
        .boxed();
    let create = warp::path!("schedules")
        .and(warp::post())
        .and(c())
        .then(|call| respond("/v1/schedules", schedules::create(call)))
        .boxed();
    let show = warp::path!("schedules" / String)
        .and(warp::get())
        .and(c())
        .then(|name, call| respond("/v1/schedules/{name}", schedules::show(name, call)))
        .boxed();
    let delete = warp::path!("schedules" / String)
        .and(warp::delete())
        .and(c())
        .then(|name, call| respond("/v1/schedules/{name}", schedules::delete(name, call)))
        .boxed();
    let pause = warp::path!("schedules" / String / "pause")
        .and(warp::post())
        .and(c())
        .then(|name, call| respond("/v1/schedules/{name}/pause", schedules::pause_or_resume(name, true, call)))
        .boxed();
    let resume = warp::path!("schedules" / String / "resume")
        .and(warp::post())
        .and(c())
        .then(|name, call| respond("/v1/schedules/{name}/resume", schedules::pause_or_resume(name, false, call)))
        .boxed();
    let trigger = warp::path!("schedules" / String / "trigger")
        .and(warp::post())
        .and(c())
        .then(|name, call| respond("/v1/schedules/{name}/trigger", schedules::trigger(name, call)))
        .boxed();
    let backfill = warp::path!("schedules" / String / "backfill")
        .and(warp::post())
        .and(c())
        .then(|name, call| respond("/v1/schedules/{name}/backfill", schedules::backfill(name, call)))
        .boxed();
    let by_name = show.or(delete).unify().or(pause).unify().or(resume).unify().or(trigger).unify().or(backfill).unify();
    list.or(create).unify().or(by_name).unify().boxed()
}

fn credits(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let balance = warp::path!("credits")
        .and(warp::get())
        .and(c())
        .then(|call| respond("/v1/credits", credits::balance(call)))
        .boxed();
    let transactions = warp::path!("credits" / "transactions")
        .and(warp::get())
        .and(c())
        .then(|call| respond("/v1/credits/transactions", credits::transactions(call)))
        .boxed();
    let report = warp::path!("credits" / "report")
        .and(warp::get())
        .and(c())
        .then(|call| respond("/v1/credits/report", credits::report(call)))
        .boxed();
    balance.or(transactions).unify().or(report).unify().boxed()
}

fn own_keys(state: &State) -> BoxedFilter<(Response,)> {
    let c = || call(state);
    let list = warp::path!("keys").and(warp::get()).and(c()).then(|call| respond("/v1/keys", keys::list(call))).boxed();
    let put = warp::path!("keys").and(warp::put()).and(c()).then(|call| respond("/v1/keys", keys::put(call))).boxed();
    let show = warp::path!("keys" / Uuid)
        .and(warp::get())
        .and(c())
        .then(|id, call| respond("/v1/keys/{id}", keys::show(id, call)))
        .boxed();
    let delete = warp::path!("keys" / Uuid)
        .and(warp::delete())
        .and(c())
        .then(|id, call| respond("/v1/keys/{id}", keys::delete(id, call)))
        .boxed();
    list.or(put).unify().or(show).unify().or(delete).unify().boxed()
}

fn operations(state: &State) -> BoxedFilter<(Response,)> {
    let live = warp::path!("healthz").and(warp::get()).map(health::live).boxed();
    let ready = {
        let state = state.clone();
        warp::path!("readyz").and(warp::get()).then(move || health::ready(state.clone())).boxed()
    };
    let metrics = {
        let state = state.clone();
        warp::path!("metrics").and(warp::get()).map(move || health::metrics(&state)).boxed()
    };
    live.or(ready).unify().or(metrics).unify().boxed()
}

/// Serves what no route took. Handlers never get here.
async fn recover(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(if rejection.find::<warp::reject::MethodNotAllowed>().is_some() {
        Error::new(Code::MethodNotAllowed, "See the Allow header.").into_response()
    } else {
        // Not found, and path parameters that are not ids.
        Error::new(Code::NotFound, "No such route.").into_response()
    })
}

/// Adds `Allow` to a 405, from the table.
pub(super) fn allow(path: &str, response: &mut Response) {
    if response.status() != Code::MethodNotAllowed.status() {
        return;
    }
    let methods: Vec<&str> = ROUTES.iter().filter(|(_, pattern)| matches(pattern, path)).map(|(m, _)| *m).collect();
    if let Ok(value) = HeaderValue::from_str(&methods.join(", ")) {
        response.headers_mut().insert(header::ALLOW, value);
    }
}

fn matches(pattern: &str, path: &str) -> bool {
    let (mut pattern, mut path) = (pattern.split('/'), path.trim_end_matches('/').split('/'));
    loop {
        match (pattern.next(), path.next()) {
            (None, None) | (Some("{*}"), Some(_)) => return true,
            (Some("{}"), Some(segment)) if !segment.is_empty() => {}
            (Some(a), Some(b)) if a == b => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allow_comes_from_the_table() {
        let mut response = Error::new(Code::MethodNotAllowed, "").into_response();
        allow("/v1/projects", &mut response);
        assert_eq!(response.headers()["allow"], "GET, POST");
        assert!(
            matches("/v1/projects/{}/files/{*}", "/v1/projects/x/files/a/b") && !matches("/v1/runs/{}", "/v1/runs")
        );
    }
}
