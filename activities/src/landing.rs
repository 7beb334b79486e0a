//! A commit to `main` exactly once per step, with trailers that say who made it and what it cost.
//!
//! A step that is done again after a crash finds its commit by the trailers and makes no second one. Everything in a
//! commit comes from the history (contents, names, the run's start as date), so the same history gives the same ids.

use crate::{
    implement::instant,
    workspace::{Commit, NewCommit, Workspace, Workspaces},
};
use loopwright_engine::{
    Failure,
    activity::{AttemptInfo, Context},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

/// Trailer with the run's id.
pub const RUN: &str = "Loopwright-Run";
/// Trailer with the step's path.
pub const STEP: &str = "Loopwright-Step";
/// Checkpoint: where `main` stood when the step first looked.
const BASE: &str = "base";

/// What a step wants to have on `main`.
pub(crate) struct Landing<'a> {
    pub project: Uuid,
    /// The snapshot to take the files from; `main` as it is without one.
    pub work: Option<&'a str>,
    pub subject: String,
    pub body: String,
    /// Besides run and step.
    pub trailers: Vec<(String, String)>,
}

/// Commits the files of `work` with what `write` adds, unless an earlier execution of this step has.
///
/// # Errors
/// `workspace.conflict` when somebody else moved `main` meanwhile; those of `write` and of [`Workspaces::open`].
/// # Transaction
/// That of [`Workspace::commit`].
pub(crate) async fn land(
    ctx: &Context,
    workspaces: &Workspaces,
    landing: Landing<'_>,
    write: impl FnOnce(&Workspace) -> Result<(), Failure>,
) -> Result<Commit, Failure> {
    let info = ctx.info();
    let workspace = workspaces.open(landing.project, info.attempt_id, landing.work).await?;
    let head = workspace.head().map(str::to_owned);
    ctx.save(BASE, &json!(head)).await?;
    let base = ctx.checkpoint(BASE).await?.unwrap_or(Value::Null);
    if base.as_str() != head.as_deref() {
        let mine = [(RUN, info.run_id.to_string()), (STEP, info.path.clone())];
        return match workspace.landed(base.as_str(), &mine).await? {
            Some(commit) => Ok(commit),
            None => Err(Failure::permanent(
                "workspace.conflict",
                "the project's main branch moved while this step worked; let steps that commit run one after another",
            )),
        };
    }
    if let (Some(work), Some(base)) = (landing.work, head.as_deref())
        && workspace.parent_of(work).await?.as_deref() != Some(base)
    {
        return Err(Failure::permanent(
            "workspace.conflict",
            "the work was begun on an older state of main; let items that commit run one after another",
        ));
    }
    write(&workspace)?;
    let mut trailers = vec![(RUN.to_owned(), info.run_id.to_string()), (STEP.to_owned(), info.path.clone())];
    trailers.extend(landing.trailers);
    let new = NewCommit {
        subject: landing.subject,
        body: landing.body,
        trailers,
        at: instant(info),
        attempt_id: info.attempt_id,
    };
    workspace.commit(new).await
}

/// Trailers for the models that worked below the step path `prefix` and what they cost, in USD.
///
/// # Errors
/// `transient.store`.
pub(crate) async fn bill(pool: &PgPool, info: &AttemptInfo, prefix: &str) -> Result<Vec<(String, String)>, Failure> {
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "select coalesce(u.model_served, u.model_requested), sum(u.cost_pusd)::bigint
         from api_key_usage u join activity_attempts a on a.id = u.attempt_id
         where a.run_id = $1 and starts_with(a.path, $2) and u.state = 'succeeded' group by 1 order by 1",
    )
    .bind(info.run_id.0)
    .bind(prefix)
    .fetch_all(pool)
    .await
    .map_err(|e| Failure::retryable("transient.store", format!("the database did not answer: {e}")))?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let models: Vec<&str> = rows.iter().map(|(model, _)| model.as_str()).collect();
    let cost: i64 = rows.iter().map(|(_, cost)| cost).sum();
    Ok(vec![
        ("Loopwright-Model".to_owned(), models.join(", ")),
        ("Loopwright-Cost-USD".to_owned(), format!("{}.{:06}", cost / 1_000_000_000_000, cost / 1_000_000 % 1_000_000)),
    ])
}
