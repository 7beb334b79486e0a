//! Invariants of money, each a query that must return no row. They ship as `loopwright credits audit` and run after every
//! fault test.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, Row};
use std::collections::BTreeMap;
use uuid::Uuid;

/// One broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Violation {
    pub invariant: &'static str,
    /// What is broken about it.
    pub meaning: &'static str,
    /// Id of the row at fault.
    pub subject: String,
    /// Whose money it is about.
    pub user: Option<Uuid>,
}

/// What one look at all money has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// By the database's clock, when it began.
    pub at: DateTime<Utc>,
    pub violations: Vec<Violation>,
}

/// Name, meaning, query. Each query yields the ids of the rows at fault as text, and their users.
pub const INVARIANTS: &[(&str, &str, &str)] = &[
    (
        "I1",
        "a user's balance is not the sum of the ledger",
        "select u.id::text, u.id from users u
           left join (select user_id, sum(amount_ucr) a, sum(held_delta_ucr) h, count(*) n, max(seq) m from credit_transactions group by 1) t on t.user_id = u.id
         where u.credit_balance_ucr <> coalesce(a, 0) or u.credit_held_ucr <> coalesce(h, 0) or u.ledger_seq <> coalesce(n, 0) or coalesce(m, 0) <> coalesce(n, 0)",
    ),
    (
        "I2",
        "a running balance in the ledger is wrong",
        "select id::text, user_id from (select *, sum(amount_ucr) over w b, sum(held_delta_ucr) over w h from credit_transactions window w as (partition by user_id order by seq)) x
         where b <> balance_after_ucr or h <> held_after_ucr or h < 0 or h > b",
    ),
    (
        "I3",
        "a capture does not resolve its hold",
        "select r.id::text, r.user_id from credit_transactions r join credit_transactions h on h.id = r.hold_txn_id
         where h.kind <> 'hold' or h.user_id <> r.user_id or h.attempt_id <> r.attempt_id or r.held_delta_ucr <> -h.held_delta_ucr or r.seq <= h.seq",
    ),
    (
        "I4",
        "a running attempt's hold is resolved, or an ended one's is not",
        "select distinct a.id::text, a.user_id from activity_attempts a join credit_transactions h on h.attempt_id = a.id and h.kind = 'hold'
           left join credit_transactions r on r.hold_txn_id = h.id
         where case a.state when 'running' then r.id is not null else r.id is null end",
    ),
    (
        "I5",
        "what is left of a grant is not what was given less what was taken",
        "select g.id::text, g.user_id from credit_grants g
           left join (select grant_id, sum(captured_ucr) c, sum(held_ucr) filter (where captured_ucr is null) o from credit_allocations group by 1) a on a.grant_id = g.id
           left join (select grant_id, -sum(amount_ucr) x from credit_transactions where kind in ('expire','refund','adjustment') group by 1) t on t.grant_id = g.id
         where g.remaining_ucr <> g.amount_ucr - coalesce(c, 0) - coalesce(x, 0) or g.held_ucr <> coalesce(o, 0)",
    ),
    (
        "I6",
        "a user's grants do not add up to the balance",
        "select u.id::text, u.id from users u left join (select user_id, sum(remaining_ucr) r, sum(held_ucr) h from credit_grants group by 1) g on g.user_id = u.id
         where u.credit_balance_ucr <> coalesce(r, 0) or u.credit_held_ucr <> coalesce(h, 0)",
    ),
    (
        "I7",
        "a hold's allocations do not add up to it",
        "select h.id::text, h.user_id from credit_transactions h
           left join (select hold_txn_id, sum(held_ucr) s, sum(captured_ucr) c, bool_or(captured_ucr is null) open from credit_allocations group by 1) a on a.hold_txn_id = h.id
           left join credit_transactions r on r.hold_txn_id = h.id
         where h.kind = 'hold' and (h.held_delta_ucr <> coalesce(s, 0) or (r.id is not null and -r.amount_ucr <> coalesce(c, 0)) or (r.id is null) <> coalesce(open, false))",
    ),
    (
        "I8",
        "a call on a key of the platform was made without a hold",
        "select k.id::text, k.user_id from api_key_usage k join api_keys y on y.id = k.api_key_id and y.user_id is null
         where not exists (select 1 from credit_transactions h where h.attempt_id = k.attempt_id and h.kind = 'hold' and h.user_id = k.user_id and h.created_at <= k.started_at)",
    ),
    (
        "I9",
        "an attempt's captures are not the price of its calls, or more than was held",
        "select a.id::text, a.user_id from activity_attempts a
           join (select h.attempt_id, sum(h.held_delta_ucr) held, sum(c.actual_ucr) actual, sum(-c.amount_ucr) taken,
                        (array_agg(h.rate_credits_per_usd order by h.hold_no))[1] rate, (array_agg(h.markup_bps order by h.hold_no))[1] markup
                 from credit_transactions h join credit_transactions c on c.hold_txn_id = h.id group by 1) s on s.attempt_id = a.id
           left join (select attempt_id, sum(cost_pusd) p from api_key_usage group by 1) k on k.attempt_id = a.id
         where s.actual <> ceil(coalesce(p, 0) * s.rate * (10000 + s.markup) / 1e10) or s.taken <> least(s.actual, s.held)",
    ),
    (
        "I10",
        "a call is open although its attempt has ended",
        "select k.id::text, k.user_id from api_key_usage k join activity_attempts a on a.id = k.attempt_id where k.state = 'started' and a.state <> 'running'",
    ),
    (
        "I11",
        "a payment without its grant, or a grant without its payment",
        "select coalesce(p.charge_id, g.source_ref), coalesce(p.user_id, g.user_id) from payments p
           full join (select * from credit_grants where source = 'purchase') g on g.source_ref = p.charge_id and g.user_id = p.user_id
         where p.charge_id is null or g.id is null",
    ),
    (
        "I12",
        "a refund without its ledger row, or the reverse, or a payment was taken back and its credits go on",
        // Where nothing was free there is no row: what is held then expires once it is released. Neither a purchase nor what is given again
        // for a refund that was refused expires otherwise.
        "select p.charge_id, p.user_id from payments p left join credit_transactions t on t.idempotency_key = 'refund:' || p.charge_id
         where (p.refund_state in ('requested','done','refused')) <> (t.id is not null)
           or ((p.refund_state = 'chargeback' or t.kind = 'adjustment')
               and exists (select 1 from credit_grants g where g.source = 'purchase' and g.source_ref = p.charge_id and g.user_id = p.user_id
                             and g.remaining_ucr > 0 and g.expires_at is null))
           or (p.refund_state = 'done'
               and exists (select 1 from credit_grants g where g.source = 'adjustment' and g.source_ref = 'refund-refused:' || p.charge_id
                             and g.user_id = p.user_id and g.remaining_ucr > 0 and g.expires_at is null))",
    ),
    (
        "I13",
        "a call was priced by the wrong row",
        // By the model that was asked for: the call was announced, held and is charged at its price (`call::close`). Which one served it
        // is what the provider says, and may have no price here or a dearer one than the user agreed to.
        "select k.id::text, k.user_id from api_key_usage k join model_pricing m on m.id = k.pricing_id
         -- What is unknown was never priced: a look-up says how large its prompt was, and it is free whatever was announced.
         where k.state <> 'unknown' and (m.provider <> k.provider or m.model_id not in (k.model_requested, '*') or m.effective_from > k.started_at
            or (m.model_id = '*' and exists (select 1 from model_pricing o where o.provider = k.provider and o.model_id = k.model_requested
                  and o.service_tier = m.service_tier and o.effective_from <= k.started_at))
            or exists (select 1 from model_pricing n where n.provider = m.provider and n.model_id = m.model_id and n.service_tier = m.service_tier
                 and n.effective_from <= k.started_at and k.tokens_prompt is not null and (n.effective_from > m.effective_from
                   or (n.effective_from = m.effective_from and n.min_prompt_tokens > m.min_prompt_tokens and k.tokens_prompt > n.min_prompt_tokens)))
            or (m.min_prompt_tokens > 0 and k.tokens_prompt <= m.min_prompt_tokens))",
    ),
    (
        "I14",
        "a call's cost is not its tokens times their prices",
        "select k.id::text, k.user_id from api_key_usage k join model_pricing m on m.id = k.pricing_id
         where k.provider_cost_pusd is null and (k.state = 'succeeded' or (k.state = 'failed' and k.cost_pusd > 0)) and not k.late
           and not exists (select from api_keys y where y.id = k.api_key_id and y.user_id is not null) and k.cost_pusd <> m.per_request_pusd
           + (k.tokens_prompt - coalesce(k.tokens_cached, 0) - coalesce(k.tokens_cache_write, 0))::numeric * m.input_umtok
           + coalesce(k.tokens_cached, 0)::numeric * coalesce(m.cached_input_umtok, m.input_umtok)
           + coalesce(k.tokens_cache_write, 0)::numeric * coalesce(m.cache_write_umtok, m.input_umtok)
           + (k.tokens_output - coalesce(k.tokens_reasoning, 0))::numeric * m.output_umtok
           + coalesce(k.tokens_reasoning, 0)::numeric * coalesce(m.reasoning_umtok, m.output_umtok)",
    ),
    (
        "I15",
        "a hold outlived its attempt's deadline by more than ten minutes: no worker took the run over",
        "select h.id::text, h.user_id from credit_transactions h join activity_attempts a on a.id = h.attempt_id
         where h.kind = 'hold' and a.state = 'running' and a.lease_expires_at < engine_now() - interval '10 minutes'",
    ),
    (
        "I16",
        "an attempt runs although its run is closed",
        "select a.id::text, a.user_id from activity_attempts a join runs r on r.run_id = a.run_id where a.state = 'running' and r.closed_at is not null",
    ),
    (
        "I17",
        "a call was charged that came late, or whose answer is unknown, was spoiled by its provider or is not reported",
        "select id::text, user_id from api_key_usage where cost_pusd > 0 and (late or not (state = 'succeeded'
           or (state = 'failed' and coalesce(error_class, '') like 'model.%' and usage_source = 'provider' and tokens_output > 0)))",
    ),
    (
        "I18",
        "a call on a user's own key was charged, or is booked to another user or provider",
        "select k.id::text, k.user_id from api_key_usage k join api_keys y on y.id = k.api_key_id
         where y.provider <> k.provider or (y.user_id is not null and (k.cost_pusd <> 0 or k.worst_pusd <> 0 or y.user_id <> k.user_id))",
    ),
];

/// Runs all invariants in one snapshot. Empty if money is in order.
///
/// # Transaction
/// The caller's; use `repeatable read` for one snapshot while work goes on.
pub async fn run(conn: &mut PgConnection) -> Result<Vec<Violation>, sqlx::Error> {
    let mut found = Vec::new();
    for (invariant, meaning, query) in INVARIANTS {
        for row in sqlx::query(*query).fetch_all(&mut *conn).await? {
            found.push(Violation {
                invariant,
                meaning,
                subject: row.try_get::<Option<String>, _>(0)?.unwrap_or_default(),
                user: row.try_get(1)?,
            });
        }
    }
    Ok(found)
}

/// [`run`], with the transaction made one snapshot: work that goes on does not look like a difference.
///
/// # Transaction
/// Must be the first in it; it is read only from then on.
pub async fn snapshot(conn: &mut PgConnection) -> Result<Audit, sqlx::Error> {
    sqlx::query("set transaction isolation level repeatable read, read only").execute(&mut *conn).await?;
    let at = sqlx::query_scalar("select engine_now()").fetch_one(&mut *conn).await?;
    Ok(Audit { at, violations: run(conn).await? })
}

/// The job whose findings the invariants are.
pub const JOB: &str = "reconcile-ledger";

/// Invariants of liveness: a late worker broke them, no sum is wrong. They are told and stop nobody.
const LIVENESS: [&str; 2] = ["I15", "I16"];

/// Stops new holds of the users that `found` names, and of nobody else. What is held already pays for its attempts. Returns the
/// users that were not stopped before. [`super::ledger::resume_holds`] undoes it: what stood open then does not stop its user
/// again, for somebody has looked; nor does what an audit has seen that began before: it may have been mended since.
///
/// # Transaction
/// Locks users in ascending order. Notes in the findings what it has seen, not yet as told.
pub async fn stop_affected(conn: &mut PgConnection, found: &Audit) -> Result<Vec<Uuid>, sqlx::Error> {
    let mut affected: BTreeMap<Uuid, Vec<&Violation>> = BTreeMap::new();
    for violation in found.violations.iter().filter(|violation| !LIVENESS.contains(&violation.invariant)) {
        if let Some(user) = violation.user {
            affected.entry(user).or_default().push(violation);
        }
    }
    let mut stopped = Vec::new();
    for (user, violations) in affected {
        let kinds: Vec<&str> = violations.iter().map(|violation| violation.invariant).collect();
        let subjects: Vec<&str> = violations.iter().map(|violation| violation.subject.as_str()).collect();
        let done = sqlx::query(
            "with new as (
               select s.kind from unnest($2::text[], $3::text[]) as s(kind, subject)
               where not exists (select from reconcile_findings f join users r on r.id = $1 and f.first_seen_at <= r.holds_released_at
                                 where f.job = $4 and f.kind = s.kind and f.subject = s.subject and f.resolved_at is null))
             update users set holds_stopped_at = engine_now(), holds_stopped_why = (select string_agg(distinct kind, ', ') from new)
             where id = $1 and holds_stopped_at is null and (holds_released_at is null or holds_released_at <= $5)
               and exists (select from new)",
        )
        .bind(user)
        .bind(&kinds)
        .bind(&subjects)
        .bind(JOB)
        .bind(found.at)
        .execute(&mut *conn)
        .await?;
        if done.rows_affected() > 0 {
            stopped.push(user);
        }
        let messages: Vec<&str> = violations.iter().map(|violation| violation.meaning).collect();
        // A release is compared with these, also if it was a person who ran the audit and no job has reported yet.
        sqlx::query(
            "insert into reconcile_findings (job, kind, subject, message, user_id, seen)
             select distinct on (s.kind, s.subject) $4::text, s.kind, s.subject, s.message, $1::uuid, 0
             from unnest($2::text[], $3::text[], $5::text[]) as s(kind, subject, message)
             on conflict (job, kind, subject) do update set resolved_at = null, seen = 0, first_seen_at = engine_now(), last_seen_at = engine_now()
             where reconcile_findings.resolved_at is not null",
        )
        .bind(user)
        .bind(&kinds)
        .bind(&subjects)
        .bind(JOB)
        .bind(&messages)
        .execute(&mut *conn)
        .await?;
    }
    Ok(stopped)
}
