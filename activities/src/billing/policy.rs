//! The refund policy: which failures give credits back. The rules are rows of `refund_rules`; what they give is a new grant under
//! `adjust:refund-policy:<attempt>`, once per attempt, and `…:step` for what an earlier attempt of a failed step paid.

use super::{
    ledger::{self, GrantSource, LedgerError},
    money::{MicroCredits, Rate},
};
use chrono::{DateTime, Utc};
use loopwright_engine::ids::RunId;
use sqlx::PgConnection;
use uuid::Uuid;

/// Failure class of a call whose answer had not the required shape.
const UNUSABLE: &str = "model.output_invalid";
/// A provider that is out of service, and what that was called before 2026-11-26: rules of then mean it.
const UNAVAILABLE: &str = "transient.unavailable";
const UNAVAILABLE_BEFORE: &str = "model.unavailable";
/// The rule that gives back what a provider spoiled. A user's own key and his own server are not the platform's provider: who
/// could make them fail would have the platform's calls for nothing. Whose fault it was the attempt's last call tells if it is the
/// one that failed. Without such a row, because nobody was asked, only an attempt that the platform alone could serve counts, from
/// its start to its end: whoever brings keys holds nothing at the start.
const PROVIDER_FAULT: &str = "provider_fault";

/// Asks the policy about an attempt that has just been settled with a failure. Of several rules that fit the most generous one
/// is taken.
///
/// # Transaction
/// The settlement's; the user row is locked.
pub(super) async fn attempt_ended(conn: &mut PgConnection, attempt: Uuid) -> Result<(), LedgerError> {
    // User, what gives, share, of the last attempt only, captured, rate, markup, cost of the unusable answers.
    type Row = (Uuid, String, i32, bool, i64, i64, i32, String);
    let rules: Vec<Row> = sqlx::query_as(
        "with inforce as (
           select distinct on (r.rule) r.* from refund_rules r, activity_attempts a
           where a.id = $1 and r.effective_from <= a.ended_at order by r.rule, r.effective_from desc)
         select a.user_id, r.gives, r.share_bps, r.final_only, s.taken, s.rate, s.markup,
                (select coalesce(sum(cost_pusd), 0)::text from api_key_usage where attempt_id = a.id and error_class = $2)
         from activity_attempts a
         cross join lateral (select coalesce(sum(-c.amount_ucr), 0)::bigint taken,
                                    coalesce((array_agg(h.rate_credits_per_usd order by h.hold_no))[1], 0) rate,
                                    coalesce((array_agg(h.markup_bps order by h.hold_no))[1], 0) markup
                             from credit_transactions h join credit_transactions c on c.hold_txn_id = h.id where h.attempt_id = a.id) s
         join inforce r on (a.failure_code = any(r.failures) or (a.failure_code = $4 and $5 = any(r.failures)))
           and (r.activity is null or r.activity = a.activity)
           and not (r.final_only and a.again) and r.gives in ('unusable_calls', 'attempt') and r.share_bps > 0
           and (r.rule <> $3 or coalesce(
             (select case when k.state in ('failed', 'unknown') then y.user_id is null end
              from api_key_usage k join api_keys y on y.id = k.api_key_id where k.attempt_id = a.id order by k.call_no desc limit 1),
             exists (select from credit_transactions h where h.attempt_id = a.id and h.kind = 'hold')
             and not exists (select from api_keys y where y.user_id = a.user_id and y.source = 'sealed'
                               and (y.status <> 'revoked' or y.sealed_at >= a.started_at))
             and not exists (select from api_key_usage k join api_keys y on y.id = k.api_key_id
                             where k.attempt_id = a.id and y.user_id is not null)))
         where a.id = $1",
    )
    .bind(attempt)
    .bind(UNUSABLE)
    .bind(PROVIDER_FAULT)
    .bind(UNAVAILABLE)
    .bind(UNAVAILABLE_BEFORE)
    .fetch_all(&mut *conn)
    .await?;
    let given = rules.iter().map(|(user, gives, share, _, taken, credits_per_usd, markup_bps, cost)| {
        let rate = Rate { credits_per_usd: *credits_per_usd, markup_bps: *markup_bps };
        let basis = match gives.as_str() {
            "unusable_calls" => rate.credits(cost.parse().unwrap_or(i128::MAX)).0.min(*taken),
            _ => *taken,
        };
        (part(basis, *share), *user)
    });
    let Some((amount, user)) = given.max() else { return Ok(()) };
    give(conn, user, &reference(attempt), amount).await?;
    crate::crash_point("refund.after_attempt");
    // The step has failed for good: what its earlier attempts bought is as useless as what the last one did.
    let of_step = rules.iter().filter(|(_, gives, _, final_only, ..)| gives == "attempt" && *final_only);
    match of_step.map(|(_, _, share, ..)| *share).max() {
        Some(share) => earlier_attempts(conn, user, attempt, share).await,
        None => Ok(()),
    }
}

/// Gives back what the other attempts of a step paid, less what they have got back already. A key for each attempt.
async fn earlier_attempts(conn: &mut PgConnection, user: Uuid, last: Uuid, share: i32) -> Result<(), LedgerError> {
    let paid: Vec<(Uuid, i64, i64)> = sqlx::query_as(
        "select b.id, sum(-t.amount_ucr)::bigint,
                (select coalesce(sum(g.amount_ucr), 0)::bigint from credit_grants g
                 where g.source = 'adjustment' and g.source_ref in ('refund-policy:' || b.id, 'refund-policy:' || b.id || ':step'))
         from activity_attempts a
         join activity_attempts b on b.run_id = a.run_id and b.path = a.path and b.user_id = a.user_id and b.id <> a.id
         join credit_transactions t on t.attempt_id = b.id and t.kind = 'capture'
         where a.id = $1 group by b.id, b.attempt_no having sum(-t.amount_ucr) > 0 order by b.attempt_no",
    )
    .bind(last)
    .fetch_all(&mut *conn)
    .await?;
    for (attempt, taken, given) in paid {
        let rest = MicroCredits(part(taken, share).0 - given);
        give(conn, user, &format!("{}:step", reference(attempt)), rest).await?;
        crate::crash_point("refund.after_earlier");
    }
    Ok(())
}

/// Gives back, at most for `limit` attempts, what the rules say of runs that completed with a rejected verdict. A run that its
/// user cancelled after the verdict gives nothing. Returns the user of each grant; wake their runs afterwards.
///
/// # Transaction
/// The caller's, one for all of them: users are locked in ascending order.
pub async fn rejected_runs(conn: &mut PgConnection, limit: i64) -> Result<Vec<Uuid>, LedgerError> {
    /// Runs that closed longer ago are over. Chosen.
    const DAYS: i32 = 30;
    /// Older verdicts are not looked at: an owner has two weeks to decide about one, and his run closes then. Chosen.
    const VERDICT_DAYS: i32 = 60;
    let rejected: Vec<Uuid> = sqlx::query_scalar(
        "select v.run_id from project_records v
         where v.kind = 'verdict' and v.body->>'verdict' = 'reject' and v.created_at > engine_now() - make_interval(days => $1)
           and not exists (select from project_records w where w.kind = 'verdict' and w.run_id = v.run_id and w.n > v.n)",
    )
    .bind(VERDICT_DAYS)
    .fetch_all(&mut *conn)
    .await?;
    if rejected.is_empty() {
        return Ok(Vec::new());
    }
    // By itself: runs are not where the ledger is. The key of `runs` begins with the shard.
    let shards: Vec<i16> = rejected.iter().map(|run| RunId(*run).shard()).collect();
    let completed: Vec<(Uuid, DateTime<Utc>)> = sqlx::query_as(
        "select n.run_id, n.closed_at from unnest($1::smallint[], $2::uuid[]) as v(shard, run_id)
         join runs n on n.shard = v.shard and n.run_id = v.run_id
         where n.status = 'completed' and n.closed_at > engine_now() - make_interval(days => $3)",
    )
    .bind(shards)
    .bind(rejected)
    .bind(DAYS)
    .fetch_all(&mut *conn)
    .await?;
    let (runs, closed): (Vec<Uuid>, Vec<DateTime<Utc>>) = completed.into_iter().unzip();
    let due: Vec<(Uuid, Uuid, i64, i32)> = sqlx::query_as(
        "select a.id, a.user_id, sum(-t.amount_ucr)::bigint, r.share_bps
         from unnest($2::uuid[], $3::timestamptz[]) as n(run_id, closed_at)
         join activity_attempts a on a.run_id = n.run_id and a.state = 'completed'
         join lateral (select distinct on (q.rule) q.* from refund_rules q where q.gives = 'rejected_run' and q.activity = a.activity
                         and q.effective_from <= n.closed_at order by q.rule, q.effective_from desc) r on r.share_bps > 0
         join credit_transactions t on t.attempt_id = a.id and t.kind = 'capture'
         where not exists (select from credit_grants g where g.source = 'adjustment' and g.source_ref = 'refund-policy:' || a.id)
         group by a.id, a.user_id, r.rule, r.share_bps having sum(-t.amount_ucr) > 0
         order by a.user_id, a.id, r.share_bps desc limit $1",
    )
    .bind(limit)
    .bind(runs)
    .bind(closed)
    .fetch_all(&mut *conn)
    .await?;
    let mut given = Vec::new();
    for (attempt, user, taken, share) in due {
        if give(conn, user, &reference(attempt), part(taken, share)).await? {
            given.push(user);
        }
    }
    Ok(given)
}

/// Rounded up: in the user's favor.
fn part(amount: i64, share_bps: i32) -> MicroCredits {
    let scaled = i128::from(amount) * i128::from(share_bps);
    MicroCredits(i64::try_from(scaled / 10_000 + i128::from(scaled % 10_000 > 0)).unwrap_or(amount))
}

fn reference(attempt: Uuid) -> String {
    format!("refund-policy:{attempt}")
}

async fn give(conn: &mut PgConnection, user: Uuid, reference: &str, amount: MicroCredits) -> Result<bool, LedgerError> {
    if amount.0 <= 0 {
        return Ok(false);
    }
    ledger::grant(conn, user, GrantSource::Adjustment, reference, amount, None).await
}
