//! What was measured, for people and for machines.

use serde::Serialize;

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version and settings of the server that matter, one line.
    pub server: String,
    /// Share of the ordinary amounts of work that was done.
    pub percent: u32,
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

/// What the same Postgres does without the engine, in the figure's unit.
#[derive(Clone, Debug, Serialize)]
pub struct Limit {
    pub what: &'static str,
    pub value: f64,
    /// The figure divided by the limit.
    pub ratio: f64,
}

/// A goal of the engine's design.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    pub text: &'static str,
    pub reached: bool,
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
        self.limit = Some(Limit { what, value, ratio: self.value / value });
        self
    }
    pub(super) fn goal(mut self, text: &'static str, reached: bool) -> Self {
        self.goal = Some(Goal { text, reached });
        self
    }
    pub(super) fn detail(mut self, name: &'static str, value: f64, unit: &'static str) -> Self {
        self.details.push(Detail { name, value, unit });
        self
    }
}

impl Report {
    /// Whether every goal that was measured is reached.
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
                limit.map_or_else(String::new, |l| format!("{:.2}", l.ratio)),
                figure.goal.as_ref().map_or_else(String::new, |g| {
                    format!("{} {}", if g.reached { "reached:" } else { "NOT REACHED:" }, g.text)
                }),
            ]);
            for detail in &figure.details {
                let name = format!("  {}", detail.name);
                rows.push([name, amount(detail.value, detail.unit), String::new(), String::new(), String::new()]);
            }
        }
        let widths: Vec<usize> = (0..5).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
        let mut out = format!("{}\n", self.server);
        if self.percent != 100 {
            out.push_str(&format!("{} % of the ordinary amounts: a trial, not to be quoted\n", self.percent));
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

    #[test]
    fn the_table_lines_up_and_says_which_goals_are_missed() {
        let report = Report {
            server: "PostgreSQL 15".into(),
            percent: 100,
            figures: vec![
                Figure::new("steps", 12_345.6, "/s").limit("batch alone", 20_000.0).goal("at least half", true),
                Figure::new("signal", 0.1234, "ms").goal("below 0.1 ms", false).detail("p50", 9.876, "ms"),
            ],
        };
        let expected = "\
PostgreSQL 15
figure  measured   limit of this Postgres   ratio  goal
steps   12,346 /s  20,000 /s (batch alone)  0.62   reached: at least half
signal  0.123 ms                                   NOT REACHED: below 0.1 ms
  p50   9.88 ms
";
        assert_eq!(report.table(), expected);
        assert!(!report.all_reached());
    }

    #[test]
    fn quantiles_of_few_and_many_values() {
        assert!(quantile(&[], 0.5).is_nan());
        assert!((quantile(&[7.0], 0.99) - 7.0).abs() < f64::EPSILON);
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        assert!((quantile(&hundred, 0.99) - 99.0).abs() < f64::EPSILON);
    }
}
