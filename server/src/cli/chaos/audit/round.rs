//! Checks of the round itself: its processes, its faults, its requests.

use super::{Check, Evidence};
use crate::cli::chaos::{report::Finding, traffic::Ask};
use std::time::Duration;

/// A round of that length has every fault and every request several times.
pub(super) const COVERAGE_AFTER: Duration = Duration::from_secs(120);
/// What a log must not say.
const BROKEN: [&str; 2] = ["panicked at", "run is quarantined"];

pub(super) fn findings(evidence: &Evidence) -> Vec<Finding> {
    let mut found: Vec<Finding> = evidence.left.iter().map(|left| Check::Settle.finds(left)).collect();
    for process in &evidence.processes {
        if !process.in_order {
            found.push(Check::Drain.finds(&process.name));
        }
        found.extend(process.signals.iter().map(|n| Check::Process.finds(format!("{}: signal {n}", process.name))));
        let broken = process.log.lines().filter(|line| BROKEN.iter().any(|words| line.contains(words)));
        found.extend(broken.map(|line| Check::Log.finds(line)));
    }
    if evidence.time >= COVERAGE_AFTER {
        for (fault, strikes) in evidence.faults.iter().filter(|(_, strikes)| strikes.struck == 0) {
            found.push(Check::Fault.finds(format!("{}, tried {} times", fault.text(), strikes.tried)));
        }
        let unheard = evidence.requests.iter().filter(|(_, said)| said.acknowledged == 0);
        found.extend(unheard.map(|(ask, _)| Check::Coverage.finds(*ask)));
        // Otherwise it is not seen that a start which is sent again is one start.
        if evidence.requests.get(Ask::Start.text()).is_none_or(|said| said.found == 0) {
            found.push(Check::Coverage.finds("a start whose answer was lost"));
        }
    }
    found.extend(evidence.declined.iter().map(|declined| Check::Request.finds(declined)));
    found
}
