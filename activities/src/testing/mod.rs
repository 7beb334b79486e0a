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

mod act;
mod dialect;
mod fault;
mod journal;
mod reply;
mod route;
mod server;
mod strict;

pub use act::{Act, answer, answer_json, chunk, end, frames, gzip, stream, stream_head};
pub use dialect::Dialect;
pub use fault::{Fault, When};
pub use journal::{End, Entry, Stage};
pub use reply::{Answer, Reply, Told};
pub use route::{Endpoint, Seen};
pub use server::FakeProvider;
