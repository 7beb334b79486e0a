//! A call that was told to stop: how long it waits for its child.
//!
//! ```text
//! stop ──▶ stopped, until … ──child hears nothing──▶ overdue: the child is ended ──▶ … ──▶ given up: `call.abandoned`
//!              └──▶ the child has ended: the step ends                    └──▶ the child has ended
//! ```
//!
//! A child that has read that it is to stop may have children of its own, each of which has its hour: it is spared once for every run
//! that can stand below. One that reads nothing (it was set aside, no worker serves it) is not.

use super::{Progress, Walk};
use crate::{
    definition::Step,
    event::{Event, StepStatus},
    failure::Failure,
    machine::{
        CALL_DEPTH_MAX, CALL_END_MS, CALL_ENDS_MAX, CALL_STOP_MS, Command,
        react::step_ended,
        state::{Live, Node},
    },
};
use chrono::{DateTime, Duration, Utc};

impl Walk<'_> {
    pub(super) fn calling(
        &self,
        step: &Step,
        node: &Node,
        live: &Live,
        path: &str,
        commands: &mut Vec<Command>,
    ) -> Progress {
        let Live::Call { child, propagate, terminate, stopped, .. } = live else { return Progress::Idle };
        let (now, run_id) = (self.moment.now, *child);
        if !node.stopping {
            return Progress::Idle;
        }
        if !propagate {
            return self.cancelled(step, path);
        }
        let Some(stopped) = stopped else {
            if !self.moment.bounds_calls {
                return Progress::Idle;
            }
            let until = self.until(now + Duration::milliseconds(if *terminate { CALL_END_MS } else { CALL_STOP_MS }));
            return Progress::Emit(vec![Event::CallStopped { path: path.to_owned(), at: now, until }]);
        };
        let until = self.until(stopped.until);
        if stopped.ended == 0 && until < stopped.until {
            // Cancelled again, with less time.
            if !terminate {
                let until = self.state.cleanup.map(|cleanup| cleanup.of_child());
                commands.push(Command::CancelChild { run_id, until });
            }
            return Progress::Emit(vec![Event::CallStopped { path: path.to_owned(), at: now, until }]);
        }
        if now < stopped.until {
            return Progress::Idle;
        }
        if stopped.ended >= CALL_ENDS_MAX {
            let text = format!(
                "run {run_id} was told to end and has not: it is left to itself. See what keeps it, and terminate it"
            );
            // Nothing follows this one: whoever keeps the child from ending may have gone by now.
            commands.push(Command::EndChild { run_id, spares: false });
            let failure = Failure { path: Some(path.to_owned()), ..Failure::permanent("call.abandoned", text) };
            return Progress::Emit(vec![step_ended(path, StepStatus::Cancelled, None, Some(failure), now)]);
        }
        let below = CALL_DEPTH_MAX.saturating_sub(self.moment.depth.saturating_add(1));
        let in_time = self.state.cleanup.is_none_or(|cleanup| now < cleanup.ends_child());
        let spares = !terminate && in_time && stopped.times < below;
        commands.push(Command::EndChild { run_id, spares });
        let until = match spares {
            true => self.until(now + Duration::milliseconds(CALL_STOP_MS)),
            false => now + Duration::milliseconds(CALL_END_MS),
        };
        let times = stopped.times + 1;
        Progress::Emit(vec![Event::CallOverdue { path: path.to_owned(), times, spares, at: now, until }])
    }

    /// That instant, or an earlier one if the run has not so much time to stop.
    fn until(&self, until: DateTime<Utc>) -> DateTime<Utc> {
        self.state.cleanup.map_or(until, |cleanup| until.min(cleanup.ends_child()))
    }
}
