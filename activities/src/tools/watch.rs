//! When an agent gets nowhere.
//!
//! A call counts together with the state of the tree it is made on: the same test command after another edit is
//! progress, the same edit back and forth is not.

use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fmt};

/// Identical calls on an unchanged tree after which the model is warned.
pub const IDENTICAL_WARN: u32 = 3;
/// Identical calls on an unchanged tree after which it is stopped.
pub const IDENTICAL_STOP: u32 = 5;
/// Turns without a change of the tree after which it is warned.
pub const IDLE_WARN: u32 = 4;
/// Turns without a change of the tree after which it is stopped.
pub const IDLE_STOP: u32 = 6;

/// Which rule stopped a loop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum Rule {
    /// The same call on the same tree.
    IdenticalCalls { tool: String, times: u32 },
    /// Two calls in turns, A-B-A-B.
    Alternation { tools: [String; 2] },
    /// Turns in which no file changed.
    NoChange { turns: u32 },
    /// The model answered without a tool call, also after it was reminded.
    NoCalls,
    /// All turns used, no file changed.
    Turns { turns: u32 },
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdenticalCalls { tool, times } => {
                write!(f, "the same `{tool}` call was made {times} times on an unchanged tree")
            }
            Self::Alternation { tools: [a, b] } => write!(f, "the same `{a}` and `{b}` calls alternated"),
            Self::NoChange { turns } => write!(f, "no file changed in {turns} turns"),
            Self::NoCalls => f.write_str("the model answered without using a tool, also after it was reminded"),
            Self::Turns { turns } => write!(f, "no file changed in all {turns} turns"),
        }
    }
}

/// What a call means for the loop.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Fine,
    Warn(String),
    Stop(Rule),
}

/// Watches the calls of one loop.
#[derive(Default)]
pub(super) struct Watch {
    seen: HashMap<(String, String), u32>,
    /// The last four calls with the tree they were made on, oldest first.
    recent: Vec<(String, String, String)>,
    idle: u32,
}

impl Watch {
    /// A call is about to be executed on the tree `state`; `signature` is its name and arguments.
    pub(super) fn call(&mut self, tool: &str, signature: &str, state: &str) -> Verdict {
        let times = self.seen.entry((signature.to_owned(), state.to_owned())).or_default();
        *times += 1;
        let times = *times;
        self.recent.push((signature.to_owned(), state.to_owned(), tool.to_owned()));
        if self.recent.len() > 4 {
            self.recent.remove(0);
        }
        if times >= IDENTICAL_STOP {
            return Verdict::Stop(Rule::IdenticalCalls { tool: tool.to_owned(), times });
        }
        if let [a, b, c, d] = self.recent.as_slice()
            && (&a.0, &a.1) == (&c.0, &c.1)
            && (&b.0, &b.1) == (&d.0, &d.1)
            && a.0 != b.0
        {
            return Verdict::Stop(Rule::Alternation { tools: [a.2.clone(), b.2.clone()] });
        }
        if times >= IDENTICAL_WARN {
            let text = format!(
                "This exact call was made {times} times and no file changed in between; at {IDENTICAL_STOP} the work is \
                 stopped. Do something else."
            );
            return Verdict::Warn(text);
        }
        Verdict::Fine
    }

    /// A turn ended; `changed` says whether the tree did.
    pub(super) fn turn(&mut self, changed: bool) -> Verdict {
        self.idle = if changed { 0 } else { self.idle + 1 };
        match self.idle {
            turns if turns >= IDLE_STOP => Verdict::Stop(Rule::NoChange { turns }),
            turns if turns >= IDLE_WARN => Verdict::Warn(format!(
                "No file changed in {turns} turns; at {IDLE_STOP} the work is stopped. Edit, or call `done`."
            )),
            _ => Verdict::Fine,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identical_calls_are_warned_then_stopped_but_not_across_changes() {
        let mut watch = Watch::default();
        let verdicts: Vec<_> = (0..5).map(|_| watch.call("read", "read a", "s")).collect();
        assert_eq!(verdicts[0..2], [Verdict::Fine, Verdict::Fine]);
        assert!(matches!(verdicts[2], Verdict::Warn(_)) && matches!(verdicts[3], Verdict::Warn(_)));
        assert_eq!(verdicts[4], Verdict::Stop(Rule::IdenticalCalls { tool: "read".into(), times: 5 }));

        let mut watch = Watch::default();
        for state in 0..20 {
            assert_eq!(watch.call("edit", &format!("edit {state}"), &format!("s{state}")), Verdict::Fine);
            assert_eq!(watch.call("run", "run test", &format!("s{}", state + 1)), Verdict::Fine);
        }
    }

    #[test]
    fn alternation_on_recurring_trees_is_stopped() {
        let mut watch = Watch::default();
        for (call, state) in [("edit there", "a"), ("edit back", "b"), ("edit there", "a")] {
            assert_eq!(watch.call("edit", call, state), Verdict::Fine);
        }
        let stop = watch.call("edit", "edit back", "b");
        assert_eq!(stop, Verdict::Stop(Rule::Alternation { tools: ["edit".into(), "edit".into()] }));
    }

    #[test]
    fn idle_turns_are_warned_then_stopped() {
        let mut watch = Watch::default();
        assert_eq!(watch.turn(false), Verdict::Fine);
        assert_eq!(watch.turn(true), Verdict::Fine);
        let verdicts: Vec<_> = (0..6).map(|_| watch.turn(false)).collect();
        assert!(matches!(verdicts[3], Verdict::Warn(_)));
        assert_eq!(verdicts[5], Verdict::Stop(Rule::NoChange { turns: 6 }));
    }
}
