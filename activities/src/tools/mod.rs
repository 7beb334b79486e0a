//! The tools of an agent, and the loop in which a model uses them.
//!
//! ```text
//! AgentLoop::run ──▶ Orchestrator::call("turn-n")      reply is checkpointed before it is used
//!      │                    │
//!      │              call::parse ──▶ execute ──▶ Bench   read, search, symbols, edit, run
//!      │                                │
//!      ├── watch: warned, stopped       ▼
//!      └──────────────▶ ctx.save("turn:n", results + changed files)
//! ```
//!
//! A later attempt replays the saved turns into its own worktree, byte for byte, and goes on with the next: no
//! finished call is bought again and no finished command runs again. Start reading at [`AgentLoop`].

mod bench;
mod call;
mod execute;
pub mod prompt;
mod record;
#[cfg(test)]
mod tests;
mod turn;
mod watch;

pub use bench::{Bench, Ran, Worktree};
pub use turn::{AgentLoop, Ending, Goal, Outcome};
pub use watch::Rule;

use crate::orchestrator::ToolSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Most bytes of a file that one `read` returns: about 10,000 tokens.
pub const READ_BYTES_MAX: usize = 32 << 10;
/// Most bytes of the end of a command's output that `run` returns.
pub const RUN_TAIL_BYTES_MAX: usize = 8 << 10;
/// Most bytes that `search` or `symbols` return.
pub const FIND_BYTES_MAX: usize = 16 << 10;
/// Most hits that `search` or `symbols` list.
pub const HITS_MAX: usize = 20;
/// Longest command, in bytes. Longer texts belong into a file.
pub const COMMAND_BYTES_MAX: usize = 8 << 10;
/// Most tool calls that one turn may make; the rest are answered with an error.
pub const CALLS_PER_TURN_MAX: usize = 16;
/// Turns of a loop unless its caller says otherwise.
pub const TURNS_MAX: u32 = 24;
/// Most files and bytes that one command may change; more is undone. A dependency folder that is not ignored has
/// thousands.
pub const RUN_FILES_MAX: usize = 200;
/// See [`RUN_FILES_MAX`]; 4 MiB.
pub const RUN_BYTES_MAX: usize = 4 << 20;
/// Most bytes that the files changed in one turn may have as JSON: they are one checkpoint, which holds 8 MiB.
pub const TURN_BYTES_MAX: usize = 6 << 20;
/// Tool outputs and texts kept in the conversation, in bytes; beyond it the oldest outputs are left out.
pub const HISTORY_BYTES_MAX: usize = 192 << 10;

/// What a model may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    /// Part of a file.
    Read,
    /// Full text of the code index.
    Search,
    /// Definitions by name.
    Symbols,
    /// Changes of files, all or none.
    Edit,
    /// A command in the sandbox, without network.
    Run,
    /// The end of the work.
    Done,
}

impl Tool {
    /// All of them, in the order in which they are shown to models.
    pub const ALL: [Self; 6] = [Self::Read, Self::Search, Self::Symbols, Self::Edit, Self::Run, Self::Done];

    /// The name that models use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Search => "search",
            Self::Symbols => "symbols",
            Self::Edit => "edit",
            Self::Run => "run",
            Self::Done => "done",
        }
    }

    /// The tool with the given name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tool| tool.name() == name)
    }

    /// What a model is told of it; `done` takes what the goal asks for.
    #[must_use]
    pub fn spec(self, goal: &Goal) -> ToolSpec {
        let (description, parameters) = match self {
            Self::Read => (
                "Read a file of the project. Lines are 1-based and inclusive; without them the file from its start.",
                object(
                    &["path"],
                    json!({
                        "path": {"type": "string", "description": "relative to the root of the project"},
                        "start_line": {"type": "integer", "minimum": 1},
                        "end_line": {"type": "integer", "minimum": 1}
                    }),
                ),
            ),
            Self::Search => (
                "Full-text search over the project's code: words, identifiers, paths. Returns places with lines.",
                object(&["query"], json!({"query": {"type": "string"}})),
            ),
            Self::Symbols => (
                "Find where a function, type, method or constant is defined, by its name.",
                object(&["name"], json!({"name": {"type": "string"}})),
            ),
            Self::Edit => (
                "Change files, all edits of a call or none. op \"write\": the whole file in `content` (new and small \
                 files). op \"replace\": `search` is copied exactly from the file, occurs once, and becomes \
                 `replace`. op \"delete\". A result that no longer parses is refused.",
                object(
                    &["edits"],
                    json!({"edits": {"type": "array", "minItems": 1, "items": object(&["op", "path"], json!({
                        "op": {"type": "string", "enum": ["write", "replace", "delete"]},
                        "path": {"type": "string"},
                        "content": {"type": "string"},
                        "search": {"type": "string"},
                        "replace": {"type": "string"}
                    }))}}),
                ),
            ),
            Self::Run => (
                "Run a shell command in the root of the project, in a sandbox without network. Returns the exit code \
                 and the end of the output.",
                object(&["command"], json!({"command": {"type": "string"}})),
            ),
            Self::Done => {
                let text = |description| json!({"type": "string", "description": description});
                match goal {
                    Goal::Change => (
                        "Say that the work is finished. The checks decide whether it is.",
                        object(&["summary"], json!({"summary": text("what was done, in one or two sentences")})),
                    ),
                    Goal::Answer { schema: None } => (
                        "Hand over the answer. The work ends with it.",
                        object(&["summary"], json!({"summary": text("the whole answer")})),
                    ),
                    Goal::Answer { schema: Some(schema) } => (
                        "Hand over the result. The work ends with it.",
                        object(&["result"], json!({"result": schema, "summary": text("a remark, if one is needed")})),
                    ),
                }
            }
        };
        ToolSpec { name: self.name().to_owned(), description: description.to_owned(), parameters }
    }
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({"type": "object", "properties": properties, "required": required})
}
