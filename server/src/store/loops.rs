//! What a loop has come to: its calls, its costs, its items, its verdict. Read only.

use super::{Error, Store};
use loopwright_engine::ids::RunId;
use serde::Serialize;
use uuid::Uuid;

/// Calls of models by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// Succeeded or failed.
    pub finished: i64,
    /// Under way.
    pub open: i64,
    /// Their answer was lost.
    pub unknown: i64,
}

/// What was consumed for one purpose by one model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spend {
    pub purpose: String,
    pub model: String,
    pub calls: i64,
    pub tokens_prompt: i64,
    pub tokens_output: i64,
}

impl Store {
    /// Calls of a run.
    pub async fn calls(&self, run: RunId) -> Result<Calls, Error> {
        let (finished, open, unknown) = sqlx::query_as(
            "select count(*) filter (where u.state in ('succeeded', 'failed')), count(*) filter (where u.state = 'started'),
                    count(*) filter (where u.state = 'unknown')
             from api_key_usage u join activity_attempts a on a.id = u.attempt_id where a.run_id = $1",
        )
        .bind(run.0)
        .fetch_one(&self.pool)
        .await?;
        Ok(Calls { finished, open, unknown })
    }

    /// Finished calls of a run by purpose and model, in the order in which the purposes came.
    pub async fn spend(&self, run: RunId) -> Result<Vec<Spend>, Error> {
        let rows: Vec<(String, String, i64, i64, i64)> = sqlx::query_as(
            "select u.purpose, coalesce(u.model_served, u.model_requested), count(*),
                    least(coalesce(sum(u.tokens_prompt), 0), 9e18)::bigint, least(coalesce(sum(u.tokens_output), 0), 9e18)::bigint
             from api_key_usage u join activity_attempts a on a.id = u.attempt_id
             where a.run_id = $1 and u.state in ('succeeded', 'failed') group by 1, 2 order by min(u.id)",
        )
        .bind(run.0)
        .fetch_all(&self.pool)
        .await?;
        let spend = |(purpose, model, calls, tokens_prompt, tokens_output)| Spend {
            purpose,
            model,
            calls,
            tokens_prompt,
            tokens_output,
        };
        Ok(rows.into_iter().map(spend).collect())
    }

    /// Micro-credits that the user's attempts have been charged.
    pub async fn charged(&self, user: Uuid) -> Result<i64, Error> {
        let sum = "select coalesce(-sum(amount_ucr), 0)::bigint from credit_transactions where user_id = $1 and kind = 'capture'";
        Ok(sqlx::query_scalar(sum).bind(user).fetch_one(&self.pool).await?)
    }

    /// Micro-credits that the user has been given or has bought.
    pub async fn granted(&self, user: Uuid) -> Result<i64, Error> {
        let sum = "select coalesce(sum(amount_ucr), 0)::bigint from credit_transactions where user_id = $1 and amount_ucr > 0";
        Ok(sqlx::query_scalar(sum).bind(user).fetch_one(&self.pool).await?)
    }

    /// Items of the project's plan: done, and all.
    pub async fn todo(&self, project: Uuid) -> Result<(i64, i64), Error> {
        Ok(sqlx::query_as(
            "with plan as (select body->'items' as items from project_records where project_id = $1 and kind = 'plan' order by n desc limit 1),
                  item as (select jsonb_array_elements(items)->>'id' as id from plan),
                  outcome as (select distinct on (body->>'item') body->>'item' as id, body->>'state' as state from project_records
                              where project_id = $1 and kind = 'outcome' order by body->>'item', n desc)
             select count(*) filter (where o.state = 'done'), count(*) from item left join outcome o using (id)",
        )
        .bind(project)
        .fetch_one(&self.pool)
        .await?)
    }

    /// The newest verdict over the project: `accept` or `reject`.
    pub async fn verdict(&self, project: Uuid) -> Result<Option<String>, Error> {
        let newest = "select body->>'verdict' from project_records where project_id = $1 and kind = 'verdict' order by n desc limit 1";
        Ok(sqlx::query_scalar(newest).bind(project).fetch_optional(&self.pool).await?)
    }
}
