//! Why every run ends: the number of executions that a definition can make at most.

use crate::diagnostic::{Sink, Span};
use loopwright_engine::definition::{Definition, Kind, Step};

/// Refuses a definition that can execute more than its limit.
pub(crate) fn check(definition: &Definition, limit: u32, span: Span, sink: &mut Sink) {
    let bound = of(&definition.steps).saturating_add(of(&definition.finally));
    if bound > u64::from(limit) {
        let mut factors = Vec::new();
        definition.walk(&mut |step| {
            let n = match &step.kind {
                Kind::Foreach { max_items, .. } => u64::from(*max_items),
                Kind::Repeat { max_rounds, .. } => u64::from(*max_rounds),
                Kind::Activity { .. } => u64::from(step.retry.attempts),
                _ => 1,
            };
            factors.push((n, step.id.clone()));
        });
        factors.sort_by(|a, b| b.cmp(a));
        let largest: Vec<String> = factors.iter().take(3).map(|(n, id)| format!("`{id}` ×{n}")).collect();
        sink.error_help(
            "WF401",
            span,
            "/steps",
            format!("execution bound {bound} exceeds {limit}; largest factors: {}", largest.join(", ")),
            "lower a bound, or raise `limits: { executions: … }` (at most 100000)",
        );
    }
}

/// Executions of a sequence, at most.
fn of(steps: &[Step]) -> u64 {
    steps.iter().map(of_step).fold(0, u64::saturating_add)
}

fn of_step(step: &Step) -> u64 {
    let own = match &step.kind {
        Kind::Activity { .. } => u64::from(step.retry.attempts).saturating_add(1),
        Kind::Group { steps, .. } => 1 + of(steps),
        Kind::Parallel { branches, .. } => 1 + branches.iter().map(|b| of(&b.steps)).fold(0, u64::saturating_add),
        Kind::Foreach { max_items, steps, .. } => u64::from(*max_items).saturating_mul(of(steps)).saturating_add(1),
        Kind::Repeat { max_rounds, steps, .. } => u64::from(*max_rounds).saturating_mul(of(steps)).saturating_add(1),
        Kind::Switch { cases } => 1 + cases.iter().map(|c| of(&c.steps)).max().unwrap_or(0),
        Kind::Set { .. }
        | Kind::Wait { .. }
        | Kind::Await(_)
        | Kind::Call { .. }
        | Kind::Fail { .. }
        | Kind::Finish { .. }
        | Kind::ContinueAsNew { .. } => 1,
    };
    step.catch.iter().map(|c| of(&c.steps)).fold(own, u64::saturating_add)
}
