//! What a run was expected to cost, what it has cost, and what it may cost.

use super::{Error, Store, credits::decimal};
use loopwright_activities::billing::{
    MicroCredits,
    forecast::{self, Paid, Quality},
    limit::{self, Limit},
};
use loopwright_engine::{client::Client, ids::RunId, transaction};
use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

/// Most credits that are allowed at once. Chosen: more is a slip of the keyboard.
pub const MORE_MAX: MicroCredits = MicroCredits(1_000_000_000_000);

/// One part of the work.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// Id of an item, or an activity's name.
    pub part: String,
    pub activity: String,
    pub low_credits: String,
    pub high_credits: String,
    pub spent_credits: String,
}

/// Forecast, costs and limit of a run. Amounts are exact decimal text.
#[derive(Clone, Debug, Serialize)]
pub struct Quote {
    /// Empty before the plan is made.
    pub parts: Vec<Part>,
    pub low_credits: String,
    pub high_credits: String,
    /// Of the parts; what came before the forecast is not in it.
    pub spent_credits: String,
    /// `null` where nobody set a limit.
    pub limit: Option<Allowed>,
}

/// A limit as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Allowed {
    /// What the run may spend in all, from its beginning.
    pub limit_credits: String,
    /// What is left of it.
    pub left_credits: String,
}

impl From<Limit> for Allowed {
    fn from(limit: Limit) -> Self {
        Self { limit_credits: limit.cap.to_string(), left_credits: limit.left.to_string() }
    }
}

impl Store {
    /// Forecast, costs and limit of a run.
    pub async fn quote(&self, run: RunId) -> Result<Quote, Error> {
        let mut conn = self.pool.acquire().await?;
        let paid = forecast::of_run(&mut conn, run.0).await?;
        let limit = limit::in_force(&mut conn, run.0).await?;
        let sum = |of: fn(&Paid) -> i64| decimal(paid.iter().map(of).sum());
        Ok(Quote {
            low_credits: sum(|p| p.low_ucr),
            high_credits: sum(|p| p.high_ucr),
            spent_credits: sum(|p| p.spent_ucr),
            limit: limit.map(Allowed::from),
            parts: paid
                .into_iter()
                .map(|p| Part {
                    low_credits: decimal(p.low_ucr),
                    high_credits: decimal(p.high_ucr),
                    spent_credits: decimal(p.spent_ucr),
                    part: p.part,
                    activity: p.activity,
                })
                .collect(),
        })
    }

    /// How good the forecasts of the newest `days` were.
    pub async fn forecast_quality(&self, days: i32) -> Result<Vec<Quality>, Error> {
        let mut conn = self.pool.acquire().await?;
        Ok(forecast::quality(&mut conn, days).await?)
    }

    /// Allows a run so much more than its limit, once per `key`, and wakes it. `None` where it has no limit.
    pub async fn allow_more(&self, client: &Client, more: &More<'_>) -> Result<Option<Limit>, Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        let limit = allow_more(&mut tx, client, more).await?;
        tx.commit().await?;
        client.wake().await;
        Ok(limit)
    }
}

/// More credits for a run.
#[derive(Clone, Debug)]
pub struct More<'a> {
    /// Whose credits they are.
    pub user: Uuid,
    pub run: RunId,
    pub credits: MicroCredits,
    /// Of the request.
    pub key: &'a str,
    /// `user:<id>` or `operator`.
    pub by: &'a str,
}

/// [`Store::allow_more`] in the caller's transaction; wake the workers after the commit.
///
/// # Transaction
/// Locks the user's waiting runs, then the account.
pub async fn allow_more(conn: &mut PgConnection, client: &Client, more: &More<'_>) -> Result<Option<Limit>, Error> {
    client.unblock_in(conn, &json!({ "user_id": more.user.to_string() })).await.map_err(|error| match error {
        loopwright_engine::Error::Sql(error) => error.into(),
        other => Error::Broken(other.to_string()),
    })?;
    Ok(limit::raise(conn, more.user, more.run.0, more.key, more.credits, more.by).await?)
}
