//! Tokens by a safe bound: no tokenizer of a model that we use makes more than one token of 3.2 bytes of code on average.

/// Tokens of so many bytes, rounded up.
pub(super) fn tokens(bytes: usize) -> usize {
    (bytes.saturating_mul(5)).div_ceil(16)
}

/// The most bytes that are at most so many tokens.
pub(super) fn bytes(tokens: usize) -> usize {
    tokens.saturating_mul(16) / 5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_budget_are_within_it() {
        for budget in 0..2000 {
            assert!(tokens(bytes(budget)) <= budget && tokens(bytes(budget) + 1) > budget, "{budget}");
        }
    }
}
