//! What was spent, added up: by user, project, model, activity or day.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

/// Most rows of a report. Chosen: more than a person reads; the last one says that there are more.
pub const ROWS_MAX: i64 = 1_000;

/// What a report is grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    User,
    Project,
    Model,
    Activity,
    /// UTC.
    Day,
}

impl By {
    pub const ALL: [Self; 5] = [Self::User, Self::Project, Self::Model, Self::Activity, Self::Day];

    /// As people write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Project => "project",
            Self::Model => "model",
            Self::Activity => "activity",
            Self::Day => "day",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|by| by.as_str() == text)
    }
}

/// One group.
///
/// # Units
/// `credits` is exact decimal text. By model it is the models' shares before the one rounding per attempt and before what an
/// attempt could not pay, everywhere else what was captured. `cost_usd` is what calls cost, before rate and markup. By model
/// `attempts` counts those that used it, so that an attempt with two models is counted at both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spent {
    pub key: String,
    pub attempts: i64,
    pub calls: i64,
    pub tokens_prompt: i64,
    pub tokens_output: i64,
    pub cost_usd: String,
    pub credits: String,
    /// Credits that attempts cost above their holds: the platform's loss.
    pub uncollected: String,
    /// Credits given back by the refund policy for attempts of this group.
    pub given_back: String,
}

/// What a report covers: attempts that ended in `from <= t < to`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    pub from: Option<DateTime<Utc>>,
    pub to: Option<DateTime<Utc>>,
    /// Of one user only.
    pub user: Option<Uuid>,
}

/// Attempts of a [`Span`]. Bounds that are there whatever was asked, so that an index serves them: of a user's attempts, or of all.
const ENDED: &str = "a.ended_at is not null and a.ended_at >= coalesce($1::timestamptz, '-infinity')
           and a.ended_at < coalesce($2::timestamptz, 'infinity') and ($3::uuid is null or a.user_id = $3)";

/// The groups, dearest first; days in their order.
///
/// # Transaction
/// Reads only, one statement.
pub async fn spent(conn: &mut PgConnection, by: By, span: Span) -> Result<Vec<Spent>, sqlx::Error> {
    // Names of groups are ours, never a caller's text.
    let key = match by {
        By::User => "a.user_id::text",
        By::Project => "coalesce(a.project_id::text, 'none')",
        By::Activity => "a.activity",
        By::Day => "to_char(a.ended_at at time zone 'UTC', 'YYYY-MM-DD')",
        By::Model => return by_model(conn, span).await,
    };
    let order = if by == By::Day { "1" } else { "sum(s.taken) desc nulls last, 1" };
    let sql = format!(
        "select {key}, count(*), coalesce(sum(k.calls), 0)::bigint, least(coalesce(sum(k.prompt), 0), 9e18)::bigint, least(coalesce(sum(k.output), 0), 9e18)::bigint,
                trim_scale(coalesce(sum(k.cost), 0) * 1e-12)::text, trim_scale(coalesce(sum(s.taken), 0) * 1e-6)::text,
                trim_scale(coalesce(sum(s.uncollected), 0) * 1e-6)::text, trim_scale(coalesce(sum(g.amount_ucr), 0) * 1e-6)::text
         from activity_attempts a
         left join lateral (select -sum(amount_ucr) taken, sum(uncollected_ucr) uncollected from credit_transactions
                            where attempt_id = a.id and kind = 'capture') s on true
         left join lateral (select count(*) calls, sum(tokens_prompt) prompt, sum(tokens_output) output, sum(cost_pusd) cost
                            from api_key_usage where attempt_id = a.id) k on true
         left join lateral (select sum(amount_ucr) amount_ucr from credit_grants where source = 'adjustment'
                              and source_ref in ('refund-policy:' || a.id, 'refund-policy:' || a.id || ':step')) g on true
         where {ENDED}
         group by 1 order by {order} limit {ROWS_MAX}"
    );
    rows(conn, sql, span).await
}

/// An attempt may use several models, and be settled and refunded as one: what it could not pay and what it got back is shared by
/// what each of them cost. The shares are whole micro-credits and add up (each is the growth of a rounded running sum).
async fn by_model(conn: &mut PgConnection, span: Span) -> Result<Vec<Spent>, sqlx::Error> {
    let share = |amount: &str| {
        format!(
            "trim_scale(coalesce(sum(case when total > 0 then div({amount} * upto, total) - div({amount} * (upto - cost), total) end), 0) * 1e-6)::text"
        )
    };
    let (uncollected, given_back) = (share("uncollected"), share("given"));
    let sql = format!(
        "with used as (
           select a.id, k.provider || '/' || k.model_requested as model, count(*) as calls, sum(k.tokens_prompt) as prompt,
                  sum(k.tokens_output) as output, sum(k.cost_pusd) as cost
           from activity_attempts a join api_key_usage k on k.attempt_id = a.id
           where {ENDED}
           group by 1, 2),
         shared as (
           select u.*, h.rate_credits_per_usd as rate, h.markup_bps as markup, s.uncollected, g.amount_ucr::numeric as given,
                  sum(u.cost) over (partition by u.id) as total, sum(u.cost) over (partition by u.id order by u.model) as upto
           from used u
           -- Calls on a user's own key have no hold and cost nothing here; they are counted all the same.
           left join credit_transactions h on h.attempt_id = u.id and h.kind = 'hold' and h.hold_no = 1
           left join lateral (select sum(uncollected_ucr) as uncollected from credit_transactions
                              where attempt_id = u.id and kind = 'capture') s on true
           left join lateral (select sum(amount_ucr) as amount_ucr from credit_grants where source = 'adjustment'
                              and source_ref in ('refund-policy:' || u.id, 'refund-policy:' || u.id || ':step')) g on true)
         select model, count(*), sum(calls)::bigint, least(coalesce(sum(prompt), 0), 9e18)::bigint,
                least(coalesce(sum(output), 0), 9e18)::bigint, trim_scale(sum(cost) * 1e-12)::text,
                trim_scale(coalesce(sum(cost * rate * (10000 + markup)), 0) * 1e-16)::text, {uncollected}, {given_back}
         from shared group by 1 order by sum(cost) desc, 1 limit {ROWS_MAX}"
    );
    rows(conn, sql, span).await
}

async fn rows(conn: &mut PgConnection, sql: String, span: Span) -> Result<Vec<Spent>, sqlx::Error> {
    type Row = (String, i64, i64, i64, i64, String, String, String, String);
    let found: Vec<Row> =
        sqlx::query_as(AssertSqlSafe(sql)).bind(span.from).bind(span.to).bind(span.user).fetch_all(conn).await?;
    let spent =
        |(key, attempts, calls, tokens_prompt, tokens_output, cost_usd, credits, uncollected, given_back): Row| Spent {
            key,
            attempts,
            calls,
            tokens_prompt,
            tokens_output,
            cost_usd,
            credits,
            uncollected,
            given_back,
        };
    Ok(found.into_iter().map(spent).collect())
}
