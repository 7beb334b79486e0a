//! Chooses a model for a role, keeps within budget and limits, and makes sure that no finished call is bought twice.
//!
//! ```text
//! call(key, question)
//!   checkpoint `call:<key>`? ── yes ─▶ the recorded Reply
//!   for each candidate of the role (route, own), at most two tries
//!     pack the question for its window (budget) ─▶ take a key (service: standing, breaker) and a part of its budget per
//!     minute (keys::Rates) ─▶ meter_open ─▶ Provider::complete ─▶ judge the answer (structured)
//!     ─▶ meter_close with the Reply as checkpoint, one transaction ─▶ Reply
//! ```
//!
//! It does not know prices, credits or Postgres: readings carry what billing needs, `keys` keeps what workers share. This file holds the types that
//! activities see; start reading at [`Orchestrator::call`].

pub mod breaker;
pub mod budget;
mod call;
mod own;
mod platform;
mod question;
pub mod route;
mod service;
pub mod structured;

pub use call::{Orchestrator, Pace};
pub use question::{Opening, Question};
pub use route::{Candidate, Routing, RoutingError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The large model: asks, plans, verifies, writes the README.
    Architect,
    /// The smaller one that edits code.
    Implementer,
    /// The cheap one: summaries, subjects.
    Utility,
}

/// A model as metrics name it. What users call the models of their own keys makes no series.
pub(crate) fn model_label(model: &str, own: bool) -> &str {
    if own { "own" } else { model }
}

/// One turn of a conversation with a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum Message {
    System {
        text: String,
    },
    User {
        text: String,
    },
    /// What a model answered. `parts` is the provider's own content, verbatim, replayed to the same provider
    /// (thought signatures live there); another provider gets `text` and `tool_calls`.
    Model {
        text: String,
        tool_calls: Vec<ToolCall>,
        #[serde(default)]
        parts: Value,
        #[serde(default)]
        provider: String,
    },
    /// The result of one tool call; results of one turn follow each other.
    Tool {
        call_id: String,
        name: String,
        output: String,
    },
}

/// A tool that a model may call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolSpec {
    pub name: String,
    pub description: String,
    /// JSON Schema of the arguments object.
    pub parameters: Value,
}

/// A call that a model asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// An object; arguments that were not valid JSON arrive as `{"_invalid": "<text>"}`.
    pub arguments: Value,
}

/// What an activity asks of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub role: Role,
    /// `gather`, `plan`, `implement`, `verify`, `readme`, `agent`, …: for routing and the usage row.
    pub purpose: String,
    /// Stable prefix first (system, rules, map), then history, then the turn.
    pub messages: Vec<Message>,
    #[serde(default)]
    pub tools: Vec<ToolSpec>,
    /// The answer must be JSON that satisfies this schema.
    #[serde(default)]
    pub output_schema: Option<Value>,
    pub max_output_tokens: u32,
}

/// A model's answer, recorded before anything uses it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub text: String,
    /// Present iff the request had an `output_schema`: parsed and valid.
    #[serde(default)]
    pub json: Option<Value>,
    #[serde(default)]
    pub tool_calls: Vec<ToolCall>,
    /// To be sent back verbatim in `Message::Model`.
    #[serde(default)]
    pub parts: Value,
    /// Provider that served it: `gemini`, `openrouter`, `openai_compatible`, `rehearsed`.
    pub provider: String,
    /// Model that served it. A rehearsed one is called `rehearsed/<name>`.
    pub model: String,
    /// Served by a key of the user's, so that `model` is a name of his.
    #[serde(default)]
    pub own: bool,
    pub tokens_prompt: u64,
    pub tokens_output: u64,
}

impl Reply {
    /// The model as metrics name it.
    #[must_use]
    pub fn model_label(&self) -> &str {
        model_label(&self.model, self.own)
    }

    /// This answer as a turn of the conversation that goes on.
    #[must_use]
    pub fn to_message(&self) -> Message {
        Message::Model {
            text: self.text.clone(),
            tool_calls: self.tool_calls.clone(),
            parts: self.parts.clone(),
            provider: self.provider.clone(),
        }
    }
}
