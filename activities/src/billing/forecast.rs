//! What work is likely to cost, as an interval, before it is done; and how wrong that was afterwards.
//!
//! A forecast is made of *parts*: an item of the plan, or what is done once. Its measure is the cost of the part if every call
//! that is expected uses all of its limits. The interval around it is what earlier parts of the same activity have cost in this
//! installation, as shares of that measure; with too few of them it is a rule of thumb.

use super::{MicroCredits, Rate, price};
use crate::usage::PlannedCall;
use loopwright_engine::ids::RunId;
use serde::Serialize;
use sqlx::PgConnection;
use uuid::Uuid;

/// Parts that have to be over before what they cost says more than the rule of thumb.
const LEARNED_MIN: usize = 20;
/// Newest parts of an activity that are asked.
const LEARNED_MAX: i64 = 200;
/// Between these shares of the earlier parts lies the interval, in percent.
const LOW_PERCENT: usize = 10;
const HIGH_PERCENT: usize = 90;
/// The rule of thumb: each of the fewest calls uses a quarter of its limits. Chosen, not measured.
const THUMB: u64 = 4;

/// An interval of credits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    pub low: MicroCredits,
    pub high: MicroCredits,
}

impl std::ops::Add for Forecast {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let sum = |a: MicroCredits, b: MicroCredits| MicroCredits(a.0.saturating_add(b.0));
        Self { low: sum(self.low, other.low), high: sum(self.high, other.high) }
    }
}

/// What a part is expected to ask for.
#[derive(Clone, Debug)]
pub struct Work {
    /// Id of an item, or the activity's name for what is done once.
    pub part: String,
    /// For example `implement@1`.
    pub activity: &'static str,
    /// At most.
    pub calls: PlannedCall,
    /// Calls that it takes at least.
    pub fewest: u32,
}

/// A part with its interval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub part: String,
    pub activity: &'static str,
    pub forecast: Forecast,
    /// If every call uses all of its limits.
    pub limits: MicroCredits,
    /// What its dearest call may cost: so much must be free for it to begin.
    pub call: MicroCredits,
}

/// Prices work by the first candidate that has a price, none above its ceiling. Parts without one are left out: they cannot be done
/// either. What `user` has brought keys for costs nothing; who lets the platform serve what they cannot pays for that.
///
/// # Transaction
/// Reads only.
pub async fn price(
    conn: &mut PgConnection,
    rate: Rate,
    user: Option<Uuid>,
    work: &[Work],
) -> Result<Vec<Part>, sqlx::Error> {
    let own = match user {
        Some(user) => own_keys(conn, user).await?,
        None => Vec::new(),
    };
    let mut parts = Vec::with_capacity(work.len());
    let mut learned: Vec<(&str, Option<(i64, i64)>)> = Vec::new();
    for work in work {
        let planned = &work.calls;
        if is_free(&own, &planned.candidates) {
            let nothing = MicroCredits(0);
            let (part, activity) = (work.part.clone(), work.activity);
            parts.push(Part { part, activity, forecast: Forecast::default(), limits: nothing, call: nothing });
            continue;
        }
        let mut found = None;
        for (provider, model, (input_max, output_max)) in planned.offered() {
            found = price::find(conn, provider, model, planned.input_tokens, None).await?;
            found = found.filter(|price| !price.exceeds(input_max, output_max));
            if found.is_some() {
                break;
            }
        }
        let Some(price) = found else { continue };
        let whole = i128::from(price.worst(planned.input_tokens, planned.output_tokens).0);
        let little = i128::from(price.worst(planned.input_tokens / THUMB, planned.output_tokens / THUMB).0);
        let limits = rate.credits(whole * i128::from(planned.count));
        let shares = match learned.iter().find(|(activity, _)| *activity == work.activity) {
            Some((_, shares)) => *shares,
            None => {
                let shares = shares(conn, work.activity).await?;
                learned.push((work.activity, shares));
                shares
            }
        };
        let forecast = match shares {
            Some((low, high)) => Forecast { low: share(limits, low), high: share(limits, high) },
            None => {
                let low = rate.credits(little * i128::from(work.fewest.min(planned.count)));
                Forecast { low: low.min(limits), high: limits }
            }
        };
        let call = rate.credits(whole);
        parts.push(Part { part: work.part.clone(), activity: work.activity, forecast, limits, call });
    }
    Ok(parts)
}

/// A key that a user has brought: its provider, and whether the platform may serve what it cannot.
type OwnKey = (String, bool);

async fn own_keys(conn: &mut PgConnection, user: Uuid) -> Result<Vec<OwnKey>, sqlx::Error> {
    sqlx::query_as(
        "select provider, platform_fallback from api_keys where user_id = $1 and source = 'sealed' and status <> 'revoked'",
    )
    .bind(user)
    .fetch_all(conn)
    .await
}

/// Whether calls to these candidates go to nobody but the user's own keys: he has some, and either none lets the platform serve what
/// they cannot, or one of them can. A server of his own serves every role.
fn is_free(own: &[OwnKey], candidates: &[(String, String)]) -> bool {
    let serves = |(provider, _): &OwnKey| {
        provider == "openai_compatible" || candidates.iter().any(|(listed, _)| listed == provider)
    };
    !own.is_empty() && (own.iter().all(|(_, fallback)| !fallback) || own.iter().any(serves))
}

/// A share in millionths, rounded up.
fn share(of: MicroCredits, millionths: i64) -> MicroCredits {
    let scaled = i128::from(of.0) * i128::from(millionths);
    MicroCredits(i64::try_from(scaled / 1_000_000 + i128::from(scaled % 1_000_000 > 0)).unwrap_or(i64::MAX))
}

/// What the newest parts of an activity have cost, as millionths of their limits: the lower and the upper end.
async fn shares(conn: &mut PgConnection, activity: &str) -> Result<Option<(i64, i64)>, sqlx::Error> {
    let mut shares: Vec<i64> = sqlx::query_scalar(
        // The runs first: the view adds up what each of their parts has cost.
        "with newest as (select run_id from forecasts where activity = $1 order by stated_at desc limit $2)
         select (spent_ucr::numeric * 1000000 / limits_ucr)::bigint from forecast_errors
         where run_id = any(array(select distinct run_id from newest)) and activity = $1 and over and spent_ucr > 0
         order by stated_at desc limit $2",
    )
    .bind(activity)
    .bind(LEARNED_MAX)
    .fetch_all(conn)
    .await?;
    if shares.len() < LEARNED_MIN {
        return Ok(None);
    }
    shares.sort_unstable();
    let at = |percent: usize| shares[(shares.len() * percent / 100).min(shares.len() - 1)];
    Ok(Some((at(LOW_PERCENT), at(HIGH_PERCENT))))
}

/// The sum of all parts.
#[must_use]
pub fn sum(parts: &[Part]) -> Forecast {
    parts.iter().fold(Forecast::default(), |sum, part| sum + part.forecast)
}

/// The sum that is offered for approval as not to be exceeded: the upper end of the interval, and room for the dearest call,
/// because a call only begins where its worst case fits.
#[must_use]
pub fn limit(parts: &[Part]) -> MicroCredits {
    let call = parts.iter().map(|part| part.call.0).max().unwrap_or_default();
    MicroCredits(sum(parts).high.0.saturating_add(call))
}

/// Keeps a forecast, once per step.
///
/// # Transaction
/// One statement.
pub async fn keep(
    conn: &mut PgConnection,
    run: Uuid,
    path: &str,
    project: Uuid,
    parts: &[Part],
) -> Result<(), sqlx::Error> {
    let of = |amount: fn(&Part) -> i64| parts.iter().map(amount).collect::<Vec<i64>>();
    sqlx::query(
        "insert into forecasts (shard, run_id, path, part, activity, project_id, low_ucr, high_ucr, limits_ucr)
         select $9, $1, $2, part, activity, $3, low, high, greatest(limits, 1)
         from unnest($4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::bigint[]) t(part, activity, low, high, limits)
         on conflict (shard, run_id, path, part) do nothing",
    )
    .bind(run)
    .bind(path)
    .bind(project)
    .bind(parts.iter().map(|part| part.part.as_str()).collect::<Vec<_>>())
    .bind(parts.iter().map(|part| part.activity).collect::<Vec<_>>())
    .bind(of(|part| part.forecast.low.0))
    .bind(of(|part| part.forecast.high.0))
    .bind(of(|part| part.limits.0))
    .bind(RunId(run).shard())
    .execute(conn)
    .await?;
    Ok(())
}

/// A part beside what it has cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Paid {
    /// Id of an item, or the activity's name.
    pub part: String,
    pub activity: String,
    pub low_ucr: i64,
    pub high_ucr: i64,
    pub spent_ucr: i64,
}

/// The forecast of a run beside what was paid so far, in the order in which it was stated.
///
/// # Transaction
/// Reads only.
pub async fn of_run(conn: &mut PgConnection, run: Uuid) -> Result<Vec<Paid>, sqlx::Error> {
    let rows: Vec<(String, String, i64, i64, i64)> = sqlx::query_as(
        "select part, activity, low_ucr, high_ucr, spent_ucr from forecast_errors where run_id = $1
         order by activity, stated_at, part",
    )
    .bind(run)
    .fetch_all(conn)
    .await?;
    let paid = |(part, activity, low_ucr, high_ucr, spent_ucr)| Paid { part, activity, low_ucr, high_ucr, spent_ucr };
    Ok(rows.into_iter().map(paid).collect())
}

/// How good the forecasts of an activity were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quality {
    pub activity: String,
    /// Parts of closed runs that cost something.
    pub parts: i64,
    /// Of them within their interval.
    pub within: i64,
    pub below: i64,
    pub above: i64,
    /// What was spent, in percent of the upper ends of the intervals.
    pub spent_percent: i64,
}

/// How good the forecasts of the newest `days` were, per activity.
///
/// # Transaction
/// Reads only.
pub async fn quality(conn: &mut PgConnection, days: i32) -> Result<Vec<Quality>, sqlx::Error> {
    let rows: Vec<(String, i64, i64, i64, i64, i64)> = sqlx::query_as(
        "select activity, count(*) parts, count(*) filter (where spent_ucr between low_ucr and high_ucr) as within,
                count(*) filter (where spent_ucr < low_ucr) as below, count(*) filter (where spent_ucr > high_ucr) as above,
                (sum(spent_ucr) * 100 / greatest(sum(high_ucr), 1))::bigint spent_percent
         from forecast_errors where over and spent_ucr > 0 and stated_at > engine_now() - make_interval(days => $1)
         group by activity order by activity",
    )
    .bind(days)
    .fetch_all(conn)
    .await?;
    let judged = |(activity, parts, within, below, above, spent_percent)| Quality {
        activity,
        parts,
        within,
        below,
        above,
        spent_percent,
    };
    Ok(rows.into_iter().map(judged).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_that_is_approved_leaves_room_for_the_dearest_call() {
        let part = |high: i64, call: i64| Part {
            part: "a".into(),
            activity: "implement@1",
            forecast: Forecast { low: MicroCredits(1), high: MicroCredits(high) },
            limits: MicroCredits(100),
            call: MicroCredits(call),
        };
        assert_eq!(limit(&[part(10, 3), part(20, 7), part(5, 2)]), MicroCredits(42));
        assert_eq!(limit(&[]), MicroCredits(0));
        assert_eq!(limit(&[part(i64::MAX, 1), part(1, 1)]), MicroCredits(i64::MAX));
    }

    #[test]
    fn what_goes_to_own_keys_alone_is_free() {
        let asked = [("gemini".to_owned(), "g".to_owned()), ("openrouter".to_owned(), "o".to_owned())];
        let key = |provider: &str, fallback| (provider.to_owned(), fallback);
        for (own, free) in [
            (vec![], false),
            (vec![key("gemini", false)], true),
            (vec![key("gemini", true)], true),
            (vec![key("openai_compatible", true)], true),
            // What it cannot serve fails, and costs nothing; with the platform behind it that is paid for.
            (vec![key("other", false)], true),
            (vec![key("other", true)], false),
            (vec![key("other", true), key("openrouter", false)], true),
        ] {
            assert_eq!(is_free(&own, &asked), free, "{own:?}");
        }
    }

    #[test]
    fn a_share_is_rounded_up() {
        assert_eq!(share(MicroCredits(10), 250_000), MicroCredits(3));
        assert_eq!(share(MicroCredits(i64::MAX), 3_000_000), MicroCredits(i64::MAX));
    }
}
