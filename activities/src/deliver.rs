//! `deliver@1`: hands the repository over: the project is marked as done, its owner is told, the commit is named.

use crate::{
    contract,
    record::{self, Speaker},
    toolbox::Toolbox,
    verify::Verdict,
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context},
    signature::Signature,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;
use uuid::Uuid;

/// What `deliver@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
    /// Of the last verification; a rejection that the owner has accepted stays a rejection here.
    pub verdict: Verdict,
}

/// What `deliver@1` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    pub commit: String,
    pub files: u32,
    pub bytes: u64,
    /// For people.
    pub summary: String,
}

/// The activity.
pub struct Deliver(Arc<Toolbox>);

impl Deliver {
    #[must_use]
    pub fn new(toolbox: Arc<Toolbox>) -> Self {
        Self(toolbox)
    }
}

/// The contract.
#[must_use]
pub fn signature() -> Signature {
    Signature {
        metered: false,
        ..contract::signature::<Input, Output>("deliver@1", "Hands the repository over", &["workspace.empty"])
    }
}

impl Activity for Deliver {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let (info, pool, project) = (ctx.info(), &toolbox.pool, input.project_id);
    let workspace = toolbox.workspaces.open(project, info.attempt_id, None).await?;
    let commit = workspace
        .head()
        .ok_or_else(|| Failure::permanent("workspace.empty", "the project has no commit yet"))?
        .to_owned();
    let files = workspace.files().await?;
    let bytes = files.iter().map(|(_, size)| size).sum();
    let name = record::project_name(pool, project).await?;
    let how = match input.verdict {
        Verdict::Accept => "accepted by the review",
        Verdict::Reject => "delivered as you decided, though the review rejected it",
    };
    let summary =
        format!("{name} is ready: {} files at commit {}, {how}.", files.len(), &commit[..12.min(commit.len())]);
    sqlx::query("update projects set status = 'done' where id = $1 and status in ('open', 'running')")
        .bind(project)
        .execute(pool)
        .await
        .map_err(|e| Failure::retryable("transient.store", format!("the database did not answer: {e}")))?;
    record::say(pool, project, Speaker::Model, &summary, &format!("delivered:{}", info.idempotency_key), info).await?;
    Ok(Output { commit, files: u32::try_from(files.len()).unwrap_or(u32::MAX), bytes, summary })
}
