//! Amounts. Integers in three units, each a type of its own; nothing here is ever a float.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

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

/// Decimals of a credit.
const DECIMALS: usize = 6;

impl FromStr for MicroCredits {
    type Err = String;

    /// Credits as decimal text, exactly: `12.5`. Nothing negative, no exponent, at most six decimals.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > DECIMALS || text.ends_with('.') {
            return Err(format!(
                "`{text}` is not a number of credits such as 50 or 12.5, with up to {DECIMALS} decimals"
            ));
        }
        // Too long to be a number is too much for everybody.
        Ok(Self(format!("{whole}{part:0<DECIMALS$}").parse().unwrap_or(i64::MAX)))
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
