//! Token counts where nobody counted: from bytes, and marked as estimated.

use crate::{
    orchestrator::{Message, Request},
    usage::{Usage, UsageSource},
};

/// Bytes per token of an average estimate, used where a provider reports no usage. Chosen: English prose has 4 to 5,
/// code about 3.5.
pub const BYTES_PER_TOKEN: usize = 4;
/// Bytes per token of a worst-case estimate, used before a call.
pub const BYTES_PER_TOKEN_WORST: usize = 3;
/// Smallest estimate that is held against a server's count, in tokens. Chosen: below every window, so that nothing smaller is cut.
const JUDGED_TOKENS_MIN: u64 = 1_000;
/// What a turn, a tool or a schema costs beyond its text, in bytes: role markers and braces.
const OVERHEAD_BYTES: usize = 16;

/// Size of everything in a request that may become tokens, in bytes. A turn of a model counts as its text and calls, or as its own
/// content that is sent back verbatim (signatures and reasoning in it), whichever is more: which of them is sent depends on the
/// provider.
#[must_use]
pub fn request_bytes(request: &Request) -> usize {
    sized(request, message_bytes)
}

fn sized(request: &Request, message_bytes: fn(&Message) -> usize) -> usize {
    let messages: usize = request.messages.iter().map(message_bytes).sum();
    let tools: usize = request
        .tools
        .iter()
        .map(|tool| tool.name.len() + tool.description.len() + tool.parameters.to_string().len() + OVERHEAD_BYTES)
        .sum();
    let schema = request.output_schema.as_ref().map_or(0, |schema| schema.to_string().len() + OVERHEAD_BYTES);
    messages + tools + schema
}

/// Most bytes of one message.
#[must_use]
pub fn message_bytes(message: &Message) -> usize {
    let verbatim = match message {
        Message::Model { parts, .. } if !parts.is_null() => parts.to_string().len() + OVERHEAD_BYTES,
        _ => 0,
    };
    verbatim.max(plain_bytes(message))
}

/// Size of what a message says.
fn plain_bytes(message: &Message) -> usize {
    let bytes = match message {
        Message::System { text } | Message::User { text } => text.len(),
        Message::Model { text, tool_calls, .. } => {
            text.len()
                + tool_calls
                    .iter()
                    .map(|call| call.name.len() + call.arguments.to_string().len() + OVERHEAD_BYTES)
                    .sum::<usize>()
        }
        Message::Tool { name, output, .. } => name.len() + output.len(),
    };
    bytes + OVERHEAD_BYTES
}

/// Most tokens that a request may be counted as.
#[must_use]
pub fn request_tokens_max(request: &Request) -> u64 {
    tokens(request_bytes(request), BYTES_PER_TOKEN_WORST)
}

/// The likely usage of a call whose server reports none. Such servers are not those that get their own content back.
#[must_use]
pub fn usage(request: &Request, output_bytes: usize, max_output_tokens: u32) -> Usage {
    Usage {
        tokens_prompt: tokens(sized(request, plain_bytes), BYTES_PER_TOKEN),
        tokens_output: tokens(output_bytes, BYTES_PER_TOKEN).min(u64::from(max_output_tokens.max(1))),
        source: UsageSource::Estimated,
        ..Usage::default()
    }
}

/// What a request should have been counted as, where a server reports less than half of it: some cut a prompt to their window without
/// a word. `None`: its count may be right, or says nothing.
#[must_use]
pub fn seems_cut(request: &Request, usage: &Usage) -> Option<u64> {
    let expected = tokens(sized(request, plain_bytes), BYTES_PER_TOKEN);
    let told = usage.tokens_prompt;
    let judged = usage.source == UsageSource::Provider && told > 0 && expected >= JUDGED_TOKENS_MIN;
    (judged && told.saturating_mul(2) < expected).then_some(expected)
}

/// Tokens of `bytes`, rounded up, at least 1.
#[must_use]
pub fn tokens(bytes: usize, bytes_per_token: usize) -> u64 {
    u64::try_from(bytes.div_ceil(bytes_per_token)).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestrator::Role;

    #[test]
    fn only_far_fewer_tokens_than_were_sent_are_a_sign_of_a_cut() {
        let request = |bytes: usize| Request {
            role: Role::Architect,
            purpose: "test".into(),
            messages: vec![Message::User { text: "x".repeat(bytes - OVERHEAD_BYTES) }],
            tools: vec![],
            output_schema: None,
            max_output_tokens: 100,
        };
        let told = |tokens_prompt, source| Usage { tokens_prompt, source, ..Usage::default() };
        let large = request(4 * 16_000);
        for (tokens, source, expected) in [
            (4_096, UsageSource::Provider, Some(16_000)),
            (7_999, UsageSource::Provider, Some(16_000)),
            // Text of long words and much indentation takes so few.
            (8_000, UsageSource::Provider, None),
            (30_000, UsageSource::Provider, None),
            (0, UsageSource::Provider, None),
            (4_096, UsageSource::Estimated, None),
        ] {
            assert_eq!(seems_cut(&large, &told(tokens, source)), expected, "{tokens} {source:?}");
        }
        assert_eq!(seems_cut(&request(4 * 999), &told(1, UsageSource::Provider)), None, "too small to tell");
    }
}
