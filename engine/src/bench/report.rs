//! What was measured, for people and for machines.

use serde::Serialize;

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version and settings of the server that matter, one line.
    pub server: String,
    /// Share of the ordinary amounts of work that was done.
    pub percent: u32,
    /// Why no goal counts in this run, whatever was measured ([`unfit`]); empty if they do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub void: Vec<String>,
    pub figures: Vec<Figure>,
}

/// One figure with what it is to be compared to.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub name: &'static str,
    pub value: f64,
    pub unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<Detail>,
}

/// What the same Postgres and the same driver do without the engine, in the figure's unit, measured in the same run.
#[derive(Clone, Debug, Serialize)]
pub struct Limit {
    pub what: &'static str,
    pub value: f64,
    /// The figure divided by the limit; of a limit of nothing there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

impl Limit {
    /// The limit of a figure of that value.
    #[must_use]
    pub fn of(figure: f64, what: &'static str, value: f64) -> Self {
        Self { what, value, ratio: (value != 0.0).then_some(figure / value) }
    }
}

/// A goal of the engine's design.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    pub text: &'static str,
    /// It was measured in this run, as the goal says, and met. Never of what is void.
    pub reached: bool,
    /// Why this run says nothing about it; empty if it does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub void: Vec<String>,
}

/// Why figures of such a server, such a build and such an amount of work are no answer to a goal. Empty: they are.
#[must_use]
pub fn unfit(fsync: &str, synchronous_commit: &str, percent: u32) -> Vec<String> {
    let mut why = Vec::new();
    if cfg!(debug_assertions) {
        why.push("a debug build".to_owned());
    }
    for (setting, value) in [("fsync", fsync), ("synchronous_commit", synchronous_commit)] {
        if value != "on" {
            why.push(format!("{setting} is {value}"));
        }
    }
    if percent < 100 {
        why.push(format!("{percent} % of the ordinary amounts"));
    }
    why
}

/// A number that explains a figure.
#[derive(Clone, Debug, Serialize)]
pub struct Detail {
    pub name: &'static str,
    pub value: f64,
    pub unit: &'static str,
}

impl Figure {
    pub(super) fn new(name: &'static str, value: f64, unit: &'static str) -> Self {
        Self { name, value, unit, limit: None, goal: None, details: Vec::new() }
    }
    pub(super) fn limit(mut self, what: &'static str, value: f64) -> Self {
        self.limit = Some(Limit::of(self.value, what, value));
        self
    }
    pub(super) fn goal(mut self, text: &'static str, reached: bool) -> Self {
        self.goal = Some(Goal { text, reached, void: Vec::new() });
        self
    }
    /// What this run must have done for the goal to count.
    pub(super) fn counts_if(mut self, done: bool, otherwise: impl Into<String>) -> Self {
        if let Some(goal) = self.goal.as_mut().filter(|_| !done) {
            goal.void.push(otherwise.into());
        }
        self
    }
    pub(super) fn detail(mut self, name: &'static str, value: f64, unit: &'static str) -> Self {
        self.details.push(Detail { name, value, unit });
        self
    }
}

impl Report {
    /// What is void is not reached: nothing counts that was not measured in this run and as it must be.
    #[must_use]
    pub fn judged(mut self) -> Self {
        for figure in &mut self.figures {
            let known = figure.value.is_finite() && figure.limit.as_ref().is_none_or(|limit| limit.value.is_finite());
            let Some(goal) = &mut figure.goal else { continue };
            if !known {
                goal.void.push("it could not be measured here".to_owned());
            }
            goal.reached &= self.void.is_empty() && goal.void.is_empty();
        }
        self
    }

    /// Whether every goal was measured as it must be, and reached. Of a report that was [judged](Self::judged).
    #[must_use]
    pub fn all_reached(&self) -> bool {
        self.figures.iter().filter_map(|f| f.goal.as_ref()).all(|g| g.reached)
    }

    /// A table for a terminal: a line per figure, its details below it.
    #[must_use]
    pub fn table(&self) -> String {
        let head = ["figure", "measured", "limit of this Postgres", "ratio", "goal"].map(str::to_owned);
        let mut rows = vec![head];
        for figure in &self.figures {
            let limit = figure.limit.as_ref();
            rows.push([
                figure.name.to_owned(),
                amount(figure.value, figure.unit),
                limit.map_or_else(String::new, |l| format!("{} ({})", amount(l.value, figure.unit), l.what)),
                limit.and_then(|l| l.ratio).map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                figure.goal.as_ref().map_or_else(String::new, |goal| self.verdict(goal)),
            ]);
            for detail in &figure.details {
                let name = format!("  {}", detail.name);
                rows.push([name, amount(detail.value, detail.unit), String::new(), String::new(), String::new()]);
            }
        }
        let widths: Vec<usize> = (0..5).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
        let mut out = format!("{}\n", self.server);
        if !self.void.is_empty() {
            out.push_str(&format!("void, not to be quoted: {}\n", self.void.join(", ")));
        }
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

impl Report {
    fn verdict(&self, goal: &Goal) -> String {
        if !goal.void.is_empty() {
            return format!("void ({}): {}", goal.void.join(", "), goal.text);
        }
        let word = match goal.reached {
            // Said once, above the table.
            _ if !self.void.is_empty() => "void:",
            true => "reached:",
            false => "NOT REACHED:",
        };
        format!("{word} {}", goal.text)
    }
}

/// A number with three significant places, thousands apart.
fn amount(value: f64, unit: &str) -> String {
    let text = if !value.is_finite() {
        "?".to_owned()
    } else if value == 0.0 || value.abs() >= 100.0 {
        thousands(value.round())
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else if value.abs() >= 1.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    };
    format!("{text} {unit}").trim_end().to_owned()
}

fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    if value < 0.0 { format!("-{out}") } else { out }
}

/// The value below which that share of the sorted values lies; NaN of none.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    if sorted.is_empty() {
        return f64::NAN;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index below the length")]
    let at = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[at.min(sorted.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(void: Vec<String>, figures: Vec<Figure>) -> Report {
        Report { server: "PostgreSQL 15".into(), percent: 100, void, figures }.judged()
    }

    #[test]
    fn the_table_lines_up_and_says_which_goals_are_missed() {
        let report = report(
            Vec::new(),
            vec![
                Figure::new("steps", 12_345.6, "/s").limit("batch alone", 20_000.0).goal("at least half", true),
                Figure::new("signal", 0.1234, "ms").goal("below 0.1 ms", false).detail("p50", 9.876, "ms"),
                Figure::new("lost", 0.0, "").limit("rows", 0.0),
            ],
        );
        let expected = "\
PostgreSQL 15
figure  measured   limit of this Postgres   ratio  goal
steps   12,346 /s  20,000 /s (batch alone)  0.62   reached: at least half
signal  0.123 ms                                   NOT REACHED: below 0.1 ms
  p50   9.88 ms
lost    0          0 (rows)
";
        assert_eq!(report.table(), expected);
        assert!(!report.all_reached());
    }

    #[test]
    fn what_was_not_measured_as_it_must_be_is_void_and_not_reached() {
        let figures = || {
            vec![
                Figure::new("timers", 1.0, "s").goal("below 5 s", true).counts_if(false, "10 runs, not 100"),
                Figure::new("CPU", f64::NAN, "µs").goal("below 10 µs", true),
                Figure::new("rate", 1.0, "/s").limit("alone", f64::NAN).goal("half of it", true),
                Figure::new("steps", 3.0, "/s").goal("above 2", true).counts_if(true, "never"),
            ]
        };
        let fit = report(Vec::new(), figures());
        let goals = |report: &Report| {
            report.figures.iter().filter_map(|f| f.goal.as_ref()).map(|g| g.reached).collect::<Vec<_>>()
        };
        assert_eq!(goals(&fit), [false, false, false, true]);
        let table = fit.table();
        for line in [
            "void (10 runs, not 100): below 5 s",
            "void (it could not be measured here): below 10 µs",
            "void (it could not be measured here): half of it",
            "reached: above 2",
        ] {
            assert!(table.contains(line), "{line}\n{table}");
        }
        let unfit = report(vec!["fsync is off".into()], figures());
        assert_eq!(goals(&unfit), [false; 4]);
        let table = unfit.table();
        assert!(table.contains("void, not to be quoted: fsync is off\n") && table.contains("void: above 2"), "{table}");
        assert!(!table.contains("reached:") && !table.contains("NOT REACHED"), "{table}");
        assert!(!unfit.all_reached());
    }

    #[test]
    fn a_run_without_durability_or_of_a_trial_answers_no_goal() {
        let debug = usize::from(cfg!(debug_assertions));
        assert_eq!(unfit("on", "on", 100).len(), debug);
        for (fsync, commit, percent, says) in [
            ("off", "on", 100, "fsync is off"),
            ("on", "local", 100, "synchronous_commit is local"),
            ("on", "on", 99, "99 % of the ordinary amounts"),
        ] {
            let why = unfit(fsync, commit, percent);
            assert!(why.len() == 1 + debug && why.iter().any(|w| w == says), "{why:?}");
        }
    }

    #[test]
    fn quantiles_of_few_and_many_values() {
        assert!(quantile(&[], 0.5).is_nan());
        assert!((quantile(&[7.0], 0.99) - 7.0).abs() < f64::EPSILON);
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        assert!((quantile(&hundred, 0.99) - 99.0).abs() < f64::EPSILON);
    }
}
