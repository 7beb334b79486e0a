//! Decimal text of money to integer pico-USD, for providers and prices alike. No float takes part.

/// Decimal places of a pico-USD amount.
const PUSD_PLACES: i64 = 12;
/// Longest number that is read, in characters: a price never needs more, and the loop stays bounded.
const DIGITS_MAX: usize = 64;

/// Pico-USD of a JSON number (or a JSON string holding one) in its original spelling, rounded up to a whole one.
///
/// Returns `None` for what is negative, not a number, or beyond 9.2 million USD.
#[must_use]
pub fn pusd_from_decimal(text: &str) -> Option<i64> {
    let text = text.trim().trim_matches('"').trim();
    if text.is_empty() || text.len() > DIGITS_MAX {
        return None;
    }
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.strip_prefix('+').unwrap_or(exponent).parse::<i64>().ok()?),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    if !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
    // Digits in front of the decimal point, once it is moved to pico-USD.
    let point = i64::try_from(whole.len()).ok()?.checked_add(exponent)?.checked_add(PUSD_PLACES)?;
    let mut amount: i64 = 0;
    let mut remainder = false;
    for (position, digit) in digits.iter().enumerate() {
        let value = i64::from(digit - b'0');
        if i64::try_from(position).ok()? < point {
            amount = amount.checked_mul(10)?.checked_add(value)?;
        } else {
            remainder |= value != 0;
        }
    }
    for _ in i64::try_from(digits.len()).ok()?..point {
        if amount == 0 {
            break;
        }
        amount = amount.checked_mul(10)?;
    }
    if remainder { amount.checked_add(1) } else { Some(amount) }
}

/// Pico-USD as USD, exact decimal text without trailing zeros.
#[must_use]
pub fn usd_from_pusd(pusd: i128) -> String {
    const SCALE: u128 = 1_000_000_000_000;
    let sign = if pusd < 0 { "-" } else { "" };
    let (whole, rest) = (pusd.unsigned_abs() / SCALE, pusd.unsigned_abs() % SCALE);
    if rest == 0 {
        return format!("{sign}{whole}");
    }
    format!("{sign}{whole}.{}", format!("{rest:012}").trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::{pusd_from_decimal as pusd, usd_from_pusd};

    #[test]
    fn decimal_text_becomes_exact_integers() {
        for (text, expected) in [
            ("0.00031", Some(310_000_000)),
            ("0.0000002", Some(200_000)),
            ("\"0.0000002\"", Some(200_000)),
            ("3.1e-4", Some(310_000_000)),
            ("1E-7", Some(100_000)),
            ("2e0", Some(2_000_000_000_000)),
            ("0", Some(0)),
            ("0.0", Some(0)),
            ("0e99", Some(0)),
            ("1", Some(1_000_000_000_000)),
            ("0.1", Some(100_000_000_000)),
            // Below a pico-USD: up, never free.
            ("1e-13", Some(1)),
            ("0.0000000000011", Some(2)),
            ("9223372.036854775807", Some(i64::MAX)),
            ("9223372.036854775808", None),
            ("1e999", None),
            ("-0.1", None),
            ("null", None),
            ("", None),
            (".", None),
            ("1.2.3", None),
            ("NaN", None),
        ] {
            assert_eq!(pusd(text), expected, "{text}");
        }
    }

    #[test]
    fn pico_usd_are_shown_exactly() {
        for (pusd, text) in [(0, "0"), (1, "0.000000000001"), (1_500_000_000_000, "1.5"), (-310_000_000, "-0.00031")] {
            assert_eq!(usd_from_pusd(pusd), text);
        }
    }
}
