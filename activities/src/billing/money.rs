//! Amounts. Integers in three units, each a type of its own; nothing here is ever a float.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Micro-credits: the ledger's unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MicroCredits(pub i64);

/// Pico-USD: the unit of a call's cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PicoUsd(pub i64);

/// What turns cost into credits; frozen in each hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub credits_per_usd: i64,
    /// On top, in basis points.
    pub markup_bps: i32,
}

impl Rate {
    /// `ceil(cost × credits_per_usd × (10000 + markup) / 10^10)`: rounded up, once. What does not fit is the largest amount.
    #[must_use]
    pub fn credits(self, cost_pusd: i128) -> MicroCredits {
        const SCALE: i128 = 10_000_000_000;
        let scaled = cost_pusd
            .saturating_mul(i128::from(self.credits_per_usd))
            .saturating_mul(10_000 + i128::from(self.markup_bps));
        let up = scaled / SCALE + i128::from(scaled % SCALE > 0);
        MicroCredits(i64::try_from(up).unwrap_or(i64::MAX))
    }
}

impl MicroCredits {
    /// So many whole credits.
    #[must_use]
    pub fn from_credits(credits: i64) -> Self {
        Self(credits.saturating_mul(1_000_000))
    }
}

impl fmt::Display for MicroCredits {
    /// Credits with up to six decimals, trailing zeros cut: `12.5`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / 1_000_000, (self.0 % 1_000_000).abs());
        let sign = if self.0 < 0 && whole == 0 { "-" } else { "" };
        if part == 0 {
            return write!(f, "{sign}{whole}");
        }
        let digits = format!("{part:06}");
        write!(f, "{sign}{whole}.{}", digits.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_becomes_credits_rounded_up_once() {
        let rate = Rate { credits_per_usd: 100, markup_bps: 2_000 };
        assert_eq!(rate.credits(1_000_000_000_000), MicroCredits(120_000_000), "1 USD is 120 credits");
        assert_eq!(rate.credits(1), MicroCredits(1));
        assert_eq!(rate.credits(0), MicroCredits(0));
        assert_eq!(rate.credits(i128::MAX), MicroCredits(i64::MAX));
    }

    #[test]
    fn credits_are_shown_in_credits() {
        for (ucr, text) in [(12_500_000, "12.5"), (1, "0.000001"), (-1, "-0.000001"), (3_000_000, "3"), (0, "0")] {
            assert_eq!(MicroCredits(ucr).to_string(), text);
        }
    }
}
