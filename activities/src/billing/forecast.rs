//! What work is likely to cost, as an interval, before it is done.

use super::{MicroCredits, Rate, price};
use crate::usage::PlannedCall;
use sqlx::PgConnection;

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

/// Cost of the calls if each takes a quarter of its limits (low) or all of them (high), by the first candidate with a
/// price. Chosen, not measured: forecast errors will tell. `None` when no candidate has a price.
///
/// # Transaction
/// Reads only.
pub async fn calls(
    conn: &mut PgConnection,
    rate: Rate,
    planned: &PlannedCall,
    fewest: u32,
) -> Result<Option<Forecast>, sqlx::Error> {
    for (provider, model) in &planned.candidates {
        let Some(price) = price::find(conn, provider, model, planned.input_tokens, None).await? else { continue };
        let whole = price.worst(planned.input_tokens, planned.output_tokens).0;
        let part = price.worst(planned.input_tokens / 4, planned.output_tokens / 4).0;
        return Ok(Some(Forecast {
            low: rate.credits(i128::from(part) * i128::from(fewest)),
            high: rate.credits(i128::from(whole) * i128::from(planned.count)),
        }));
    }
    Ok(None)
}
