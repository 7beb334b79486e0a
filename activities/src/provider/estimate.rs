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

/// Tokens of `bytes`, rounded up, at least 1.
#[must_use]
pub fn tokens(bytes: usize, bytes_per_token: usize) -> u64 {
    u64::try_from(bytes.div_ceil(bytes_per_token)).unwrap_or(u64::MAX).max(1)
}
