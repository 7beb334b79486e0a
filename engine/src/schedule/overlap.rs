//! What an instant comes to while earlier runs of its schedule are open. Pure.

use super::text_enum;
use serde::{Deserialize, Serialize};

/// Most actions of the calendar that wait at a time. Chosen: sixteen hours of minutes; beyond it the schedule is too fast for
/// its workflow, and later ones are skipped.
pub const WAITING_MAX: i64 = 1_000;

/// What to do when a run of the schedule is still open. Source: Temporal's overlap policies, by their names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Start nothing.
    #[default]
    Skip,
    /// Start when it closes; at most one waits, later ones are skipped.
    BufferOne,
    /// Start one after the other, all of them.
    BufferAll,
    /// Cancel what is open, start when it has closed. Of several that wait, the newest.
    CancelOther,
    /// Terminate what is open, start when it has closed. Of several that wait, the newest.
    TerminateOther,
    /// Start at once, whatever is open.
    AllowAll,
}

text_enum!(Overlap {
    Skip = "skip",
    BufferOne = "buffer_one",
    BufferAll = "buffer_all",
    CancelOther = "cancel_other",
    TerminateOther = "terminate_other",
    AllowAll = "allow_all",
});

/// What an action comes to now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    Start,
    Wait,
    Skip(&'static str),
    /// Wait; the open runs are to be ended.
    Replace,
}

/// Judges one action. Those that need not wait for their turn ([`Overlap::queues`]) are judged before the others, both in the
/// order of their numbers.
///
/// # Shape
/// `open`: runs of the schedule that are not closed, those started a moment ago included. `waiting`: earlier actions that wait.
#[must_use]
pub fn judge(policy: Overlap, open: usize, waiting: usize) -> Judgement {
    match policy {
        Overlap::AllowAll => Judgement::Start,
        _ if open == 0 && waiting == 0 => Judgement::Start,
        Overlap::Skip => Judgement::Skip("an earlier run was open"),
        Overlap::BufferOne if waiting > 0 => Judgement::Skip("another one waited already"),
        Overlap::BufferOne | Overlap::BufferAll => Judgement::Wait,
        Overlap::CancelOther | Overlap::TerminateOther => Judgement::Replace,
    }
}

impl Overlap {
    /// Whether its actions take their turn behind each other.
    #[must_use]
    pub fn queues(self) -> bool {
        matches!(self, Self::Skip | Self::BufferOne | Self::BufferAll)
    }

    /// Whether it ends what is open. Of several such actions only the newest is done.
    #[must_use]
    pub fn replaces(self) -> bool {
        matches!(self, Self::CancelOther | Self::TerminateOther)
    }
}

#[cfg(test)]
mod tests {
    use super::{Judgement::*, *};

    #[test]
    fn every_policy_over_every_situation() {
        let open = Skip("an earlier run was open");
        for (policy, free, one_open, one_waits) in [
            (Overlap::Skip, Start, open, open),
            (Overlap::BufferOne, Start, Wait, Skip("another one waited already")),
            (Overlap::BufferAll, Start, Wait, Wait),
            (Overlap::CancelOther, Start, Replace, Replace),
            (Overlap::TerminateOther, Start, Replace, Replace),
            (Overlap::AllowAll, Start, Start, Start),
        ] {
            let judged = [judge(policy, 0, 0), judge(policy, 1, 0), judge(policy, 1, 1)];
            assert_eq!(judged, [free, one_open, one_waits], "{policy:?}");
            assert_eq!(Overlap::parse(policy.as_str()), Some(policy));
            assert_eq!(serde_json::to_value(policy).expect("json"), policy.as_str());
        }
        assert_eq!(Overlap::ALL.len(), 6);
    }
}
