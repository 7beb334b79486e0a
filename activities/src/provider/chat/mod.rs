//! The chat-completions dialect that OpenRouter and OpenAI-compatible servers share: how a request is written
//! (`request`), and how an answer is put together from whatever pieces it comes in (`answer`).

mod answer;
mod request;

pub(super) use answer::{ServedModel, TOKENS_MAX, read};
pub(super) use request::{messages, response_format, schema_instruction, tools};

/// Most calls of tools in one answer: more is a model gone wild.
pub(super) const TOOL_CALLS_MAX: usize = 128;
