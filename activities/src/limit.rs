//! `limit@1`: what was approved becomes what the run may spend from here on. Beyond it the run waits for its owner.

use crate::{
    billing::{MicroCredits, ledger::LedgerError, limit},
    contract,
    toolbox::Toolbox,
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context},
    signature::Signature,
    transaction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;
use uuid::Uuid;

/// What `limit@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    /// From this step on, as decimal text with up to six places: `12.5`.
    pub credits: String,
}

/// What `limit@1` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// What the run may spend from here on.
    pub left_credits: String,
    /// What it may have spent in all by its end.
    pub limit_credits: String,
}

/// The activity.
pub struct SetLimit(Arc<Toolbox>);

impl SetLimit {
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
        ..contract::signature::<Input, Output>("limit@1", "Limits what the run may spend from here on", &[])
    }
}

impl Activity for SetLimit {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let info = ctx.info();
    let credits: MicroCredits =
        input.credits.parse().map_err(|e| Failure::permanent("input.invalid", format!("`credits`: {e}")))?;
    let user = info.attributes["user_id"].as_str().and_then(|id| Uuid::parse_str(id).ok());
    let user =
        user.ok_or_else(|| Failure::permanent("input.invalid", "the run has no user whose credits could be limited"))?;
    let mut tx = transaction::begin(&toolbox.pool).await.map_err(|e| store(&e))?;
    let limit = limit::set(&mut tx, user, info.run_id.0, &info.path, credits, "workflow").await;
    let limit = limit.map_err(|e| match e {
        LedgerError::Sql(e) => store(&e),
        other => Failure::permanent("input.invalid", other.to_string()),
    })?;
    tx.commit().await.map_err(|e| store(&e))?;
    Ok(Output { left_credits: limit.left.to_string(), limit_credits: limit.cap.to_string() })
}

fn store(error: &dyn std::fmt::Display) -> Failure {
    Failure::retryable("transient.store", format!("the database did not answer: {error}"))
}
