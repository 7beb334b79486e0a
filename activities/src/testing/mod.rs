//! A provider server to test against (feature `test-util`). It speaks Gemini (v1, v1beta), OpenRouter and the OpenAI
//! dialect over a real socket, refuses what the originals refuse, breaks on demand, and keeps a journal.
//!
//! ```text
//! socket ─▶ hyper ─▶ Seen (route) ─▶ rule? ── yes ─▶ Fault ─▶ bytes, written by hand (act)
//!                                      └─ no ─▶ strict? ─▶ script ─▶ Reply ─▶ events or document (reply, dialect)
//!                    journal: what was asked with which key, what was answered, how far it got ◀─┘
//! ```
//!
//! Several dialects live at one address: `/v1beta`, `/api/v1` and `/v1`, or, without any doubt, below `/gemini`,
//! `/openrouter` and `/openai` ([`FakeProvider::base_of`]). It does **not** know models, prices or limits: what it
//! charges is what a [`Reply`] says. Start reading at [`FakeProvider`].
//!
//! Beside it: the crash points of the ledger, and the vendors' own clients ([`python`]).

mod act;
mod dialect;
mod fault;
mod journal;
mod port;
pub mod python;
mod reply;
mod route;
mod server;
mod strict;

pub use act::{Act, answer, answer_json, chunk, end, frames, gzip, stream, stream_head};
pub use dialect::Dialect;
pub use fault::{Fault, When};
pub use journal::{End, Entry, Stage};
pub use port::ClosedPort;
pub use reply::{Answer, Reply, Told};
pub use route::{Endpoint, Seen};
pub use server::FakeProvider;

/// Every crash point of the ledger's part in the engine's transactions and the file, below `src`, that has it; as
/// [`loopwright_engine::testing::CRASH_POINTS`].
pub const CRASH_POINTS: &[(&str, &str)] = &[
    ("bill.after_kin", "billing/hook.rs"),
    ("bill.after_attempt", "billing/hook.rs"),
    ("bill.after_account", "billing/hook.rs"),
    ("bill.after_caps", "billing/hook.rs"),
    ("call.after_account", "billing/hook.rs"),
    ("call.after_caps", "billing/hook.rs"),
    ("call.after_hold", "billing/hook.rs"),
    ("call.after_key", "billing/hook.rs"),
    ("close.after_account", "billing/call.rs"),
    ("close.after_call", "billing/call.rs"),
    ("doubt.after_row", "billing/doubt.rs"),
    ("bill.after_accounts", "billing/hook.rs"),
    ("bill.after_settled", "billing/hook.rs"),
    ("capture.after_attempt", "billing/hold.rs"),
    ("capture.after_calls", "billing/hold.rs"),
    ("capture.after_entry", "billing/hold.rs"),
    ("capture.after_capture", "billing/hold.rs"),
    ("capture.after_lock", "billing/hold.rs"),
    ("capture.after_allocation", "billing/hold.rs"),
    ("capture.after_grant", "billing/hold.rs"),
    ("refund.after_attempt", "billing/policy.rs"),
    ("refund.after_earlier", "billing/policy.rs"),
    ("grant.after_lock", "billing/ledger.rs"),
    ("grant.after_row", "billing/ledger.rs"),
];
