//! Cron expressions as people know them, over the `cron` crate, which reads them differently.
//!
//! The crate wants seconds, counts weekdays from 1 = Sunday, joins day of month and weekday by "and", and at the change of
//! clocks fires twice or not at all. Here an expression is read into plain sets of numbers, the crate walks the calendar of
//! *wall times* (handed to it as UTC, so that it sees no change of clocks), and wall times become instants at the end.
//!
//! Pure: no clock. Start reading at [`Cron::parse`] and [`Cron::next_after`].

use chrono::{DateTime, Duration, LocalResult, NaiveDateTime, TimeZone, Utc};
use chrono_tz::{GapInfo, Tz};
use std::{collections::BTreeSet, fmt, iter::Peekable, str::FromStr};

/// Longest expression, in bytes. Chosen: sixty minutes written out are 170.
const TEXT_BYTES_MAX: usize = 256;
/// A change of clocks moves them by less than that. Source: the zone database; the largest known fold since 1970 has 3 hours
/// (Antarctica/Casey, 2010).
const CHANGE_MAX: Duration = Duration::hours(4);
/// How alike two names must be for one to be suggested. Chosen.
const ALIKE: f64 = 0.8;

/// Why an expression or a time zone cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CronError {
    /// Of the first wrong character in the expression, from 1; 0 if the time zone is wrong.
    pub column: usize,
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl fmt::Display for CronError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.column > 0 {
            write!(f, "at column {}: ", self.column)?;
        }
        write!(f, "{}; {}", self.message, self.help)
    }
}
impl std::error::Error for CronError {}

/// A field of an expression.
struct Field {
    name: &'static str,
    min: u8,
    max: u8,
    /// Names of the values from `min` on.
    names: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", min: 0, max: 59, names: &[] },
    Field { name: "hour", min: 0, max: 23, names: &[] },
    Field { name: "day of month", min: 1, max: 31, names: &[] },
    Field {
        name: "month",
        min: 1,
        max: 12,
        names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    },
    // 7 is Sunday as well.
    Field { name: "weekday", min: 0, max: 7, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] },
];

/// A recurring wall time in a time zone.
///
/// # Shape
/// Five fields: minute, hour, day of month, month, weekday (0 and 7 are Sunday); `*`, numbers, names, ranges, lists, steps; or
/// `@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly`, `@yearly`, `@annually`. If neither day field begins with `*`, a
/// day that satisfies one of them counts. Source: crontab(5).
///
/// # Units
/// Instants are UTC and whole minutes. Where the clocks go forward, a time that does not exist is the first instant after
/// the gap; where they go back, a time that comes twice is the first of the two. An expression that admits every hour runs
/// with the elapsed time instead: what does not exist is left out, what comes twice fires twice, so that "every ten minutes"
/// is never an hour.
#[derive(Clone, Debug)]
pub struct Cron {
    text: String,
    zone: Tz,
    days: cron::Schedule,
    /// The other half of "day of month or weekday".
    weekdays: Option<cron::Schedule>,
    every_hour: bool,
}

impl Cron {
    /// Reads an expression and the name of a time zone.
    ///
    /// # Errors
    /// What is wrong, where, and what to write instead; also for an expression that names no day of any year.
    pub fn parse(text: &str, zone: &str) -> Result<Self, CronError> {
        let zone = parse_zone(zone)?;
        if text.len() > TEXT_BYTES_MAX {
            return Err(CronError {
                column: 1,
                message: format!("the expression has {} bytes", text.len()),
                help: format!("at most {TEXT_BYTES_MAX}; use ranges and steps"),
            });
        }
        let expanded = alias(text.trim())?.unwrap_or(text);
        let words = words(expanded);
        if words.len() != FIELDS.len() {
            return Err(wrong_count(&words));
        }
        let mut sets = Vec::with_capacity(FIELDS.len());
        for ((column, word), field) in words.iter().zip(&FIELDS) {
            sets.push(field.read(word, *column)?);
        }
        let [minutes, hours, days, months, weekdays] = <[BTreeSet<u8>; 5]>::try_from(sets).expect("five fields");
        let starred = |i: usize| words[i].1.starts_with('*');
        let calendar = |days: &str, weekdays: &str| {
            let text = format!("0 {} {} {days} {} {weekdays}", list(&minutes, 0), list(&hours, 0), list(&months, 0));
            cron::Schedule::from_str(&text).map_err(|e| CronError {
                column: 1,
                message: format!("`{}` cannot be used: {e}", text.trim()),
                help: "write five fields: minute hour day month weekday".into(),
            })
        };
        // The crate counts weekdays from 1.
        let (all, on_days, on_weekdays) = ("*", list(&days, 0), list(&weekdays, 1));
        let (on_days, on_weekdays) = (on_days.as_str(), on_weekdays.as_str());
        let (days, weekdays) = if starred(2) || starred(4) {
            (
                calendar(
                    if days.len() == 31 { all } else { on_days },
                    if weekdays.len() == 7 { all } else { on_weekdays },
                )?,
                None,
            )
        } else {
            (calendar(on_days, all)?, Some(calendar(all, on_weekdays)?))
        };
        let read = Self { text: text.trim().to_owned(), zone, days, weekdays, every_hour: hours.len() == 24 };
        // Every combination of day, month and weekday that exists at all comes within 28 years.
        let start = DateTime::<Utc>::from_timestamp(946_684_800, 0).expect("the year 2000");
        match read.next_after(start) {
            Some(_) => Ok(read),
            None => Err(CronError {
                column: words[2].0,
                message: "no month that is named has such a day".into(),
                help: "correct the day of month or the month".into(),
            }),
        }
    }

    /// As written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Name of the time zone.
    #[must_use]
    pub fn zone(&self) -> &'static str {
        self.zone.name()
    }

    /// The first instant after the given one. `None` after the year 2100, where the crate's calendar ends.
    #[must_use]
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let wall = |instant: DateTime<Utc>| instant.with_timezone(&self.zone).naive_local();
        let mut from = wall(after);
        // While an hour comes twice, a time that is past on the clock may be yet to come.
        let offset = |by: Duration| wall(after + by) - (after + by).naive_utc();
        if self.every_hour && (offset(-CHANGE_MAX) != offset(CHANGE_MAX)) {
            from -= CHANGE_MAX;
        }
        let mut best: Option<DateTime<Utc>> = None;
        for candidate in self.walls(from) {
            let (first, second) = self.instants(candidate);
            if let (Some(first), Some(best)) = (first, best)
                && first >= best
            {
                break;
            }
            for instant in [first, second].into_iter().flatten().filter(|i| *i > after) {
                best = Some(best.map_or(instant, |b| b.min(instant)));
            }
            // Without doubled times, instants follow each other as wall times do.
            if best.is_some() && !self.every_hour {
                break;
            }
        }
        best
    }

    /// Wall times after the given one, in order.
    fn walls(&self, from: NaiveDateTime) -> impl Iterator<Item = NaiveDateTime> {
        let from = from.and_utc();
        let of = |calendar: &cron::Schedule| calendar.after_owned(from).map(|t| t.naive_utc());
        Merged(of(&self.days).peekable(), self.weekdays.as_ref().map(of).map(Iterator::peekable))
    }

    /// The instants at which a clock on the wall shows this time; see [`Cron`].
    fn instants(&self, wall: NaiveDateTime) -> (Option<DateTime<Utc>>, Option<DateTime<Utc>>) {
        let utc = |t: DateTime<Tz>| t.with_timezone(&Utc);
        match self.zone.from_local_datetime(&wall) {
            LocalResult::Single(one) => (Some(utc(one)), None),
            LocalResult::Ambiguous(first, second) if self.every_hour => (Some(utc(first)), Some(utc(second))),
            LocalResult::Ambiguous(first, _) => (Some(utc(first)), None),
            LocalResult::None if self.every_hour => (None, None),
            LocalResult::None => (GapInfo::new(&wall, &self.zone).and_then(|gap| gap.end).map(utc), None),
        }
    }
}

/// Two ascending sequences as one, without repetition.
struct Merged<I: Iterator>(Peekable<I>, Option<Peekable<I>>);

impl<I: Iterator<Item = NaiveDateTime>> Iterator for Merged<I> {
    type Item = NaiveDateTime;
    fn next(&mut self) -> Option<NaiveDateTime> {
        let Some(other) = &mut self.1 else { return self.0.next() };
        let next = match (self.0.peek(), other.peek()) {
            (Some(a), Some(b)) => *a.min(b),
            (a, b) => *a.or(b)?,
        };
        self.0.next_if_eq(&next);
        other.next_if_eq(&next);
        Some(next)
    }
}

impl Field {
    /// The numbers that a field's text names. 7 is given back as 0 for weekdays.
    fn read(&self, text: &str, column: usize) -> Result<BTreeSet<u8>, CronError> {
        let mut set = BTreeSet::new();
        let mut at = column;
        for item in text.split(',') {
            let (range, step) = match item.split_once('/') {
                Some((range, step)) => (range, Some((step, at + range.chars().count() + 1))),
                None => (item, None),
            };
            let (low, high) = if range == "*" {
                (self.min, if self.names.len() == 7 { 6 } else { self.max })
            } else if let Some((low, high)) = range.split_once('-').filter(|(low, _)| !low.is_empty()) {
                let high_at = at + low.chars().count() + 1;
                let (first, mut last) = (self.value(low, at)?, self.value(high, high_at)?);
                if self.names.len() == 7 && last == 0 && first > 0 {
                    last = 7;
                }
                if first > last {
                    return Err(self.error(
                        at,
                        format!("the range `{range}` of the {} runs backwards", self.name),
                        format!(
                            "write two ranges: `{low}-{},{}-{high}`",
                            self.spelled(self.max),
                            self.spelled(self.min)
                        ),
                    ));
                }
                (first, last)
            } else {
                let one = self.value(range, at)?;
                // `5/10` is "from 5 on, every 10".
                (one, if step.is_some() { self.max } else { one })
            };
            let step = match step {
                None => 1,
                Some((step, step_at)) => match step.parse::<u8>() {
                    Ok(n) if n >= 1 && n <= self.max.max(1) => n,
                    _ => {
                        return Err(self.error(
                            step_at,
                            format!("the step `{step}` of the {} is not a number from 1 to {}", self.name, self.max),
                            "write for example `*/5`".into(),
                        ));
                    }
                },
            };
            set.extend((low..=high).step_by(step.into()).map(|n| if self.names.len() == 7 { n % 7 } else { n }));
            at += item.chars().count() + 1;
        }
        Ok(set)
    }

    fn value(&self, text: &str, at: usize) -> Result<u8, CronError> {
        let lower = text.to_lowercase();
        if let Some(i) = self.names.iter().position(|name| *name == lower) {
            return Ok(self.min + u8::try_from(i).unwrap_or(0));
        }
        if let Ok(n) = text.parse::<u8>()
            && text.bytes().all(|b| b.is_ascii_digit())
            && (self.min..=self.max).contains(&n)
        {
            return Ok(n);
        }
        let allowed = format!("{} to {}", self.spelled(self.min), self.spelled(self.max));
        let message = format!("`{text}` is no {}", self.name);
        let help = if text.is_empty() {
            "something is missing beside a `,`, `-` or `/`".to_owned()
        } else if text == "?" {
            "write `*`".to_owned()
        } else if text.contains(['L', 'l', 'W', 'w', '#'])
            && text.bytes().any(|b| b.is_ascii_digit() || text.len() == 1)
        {
            "`L`, `W` and `#` are not supported: list the days, and let the definition decide".to_owned()
        } else if let Some(name) = self.names.iter().find(|name| lower.starts_with(**name)) {
            format!("write `{name}`")
        } else {
            format!("write {allowed}")
        };
        Err(self.error(at, message, help))
    }

    fn spelled(&self, value: u8) -> String {
        if self.names.len() == 7 && value == 7 { "6".into() } else { value.to_string() }
    }

    fn error(&self, column: usize, message: String, help: String) -> CronError {
        CronError { column, message, help }
    }
}

/// Ascending numbers as the crate reads them.
fn list(set: &BTreeSet<u8>, add: u8) -> String {
    set.iter().map(|n| (n + add).to_string()).collect::<Vec<_>>().join(",")
}

/// Words with their columns, from 1.
fn words(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut column = 1;
    while let Some(start) = rest.find(|c: char| !c.is_whitespace()) {
        column += rest[..start].chars().count();
        rest = &rest[start..];
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        found.push((column, &rest[..end]));
        column += rest[..end].chars().count();
        rest = &rest[end..];
    }
    found
}

fn wrong_count(words: &[(usize, &str)]) -> CronError {
    let order = "minute hour day month weekday";
    let help = match words.len() {
        6 | 7 => format!("leave out the seconds and the year: {order}"),
        n if n < FIELDS.len() => format!("write five: {order}; `*` for any {}", FIELDS[n].name),
        _ => format!("write five: {order}"),
    };
    let column = match words.len() {
        6 | 7 => words[0].0,
        n if n > FIELDS.len() => words[FIELDS.len()].0,
        _ => words.last().map_or(1, |(column, word)| column + word.chars().count()),
    };
    let fields = if words.len() == 1 { "field" } else { "fields" };
    CronError { column, message: format!("{} {fields}", words.len()), help }
}

/// What a word with `@` stands for.
fn alias(text: &str) -> Result<Option<&'static str>, CronError> {
    Ok(Some(match text {
        "@hourly" => "0 * * * *",
        "@daily" | "@midnight" => "0 0 * * *",
        "@weekly" => "0 0 * * 0",
        "@monthly" => "0 0 1 * *",
        "@yearly" | "@annually" => "0 0 1 1 *",
        other if other.starts_with('@') => {
            return Err(CronError {
                column: 1,
                message: format!("`{other}` is not known"),
                help: "write @hourly, @daily, @weekly, @monthly or @yearly, or five fields".into(),
            });
        }
        _ => return Ok(None),
    }))
}

/// A time zone by its IANA name.
///
/// # Errors
/// With the nearest name.
pub fn parse_zone(name: &str) -> Result<Tz, CronError> {
    name.parse::<Tz>().map_err(|_| {
        let lower = name.to_lowercase().replace(' ', "_");
        let alike = |zone: &Tz| {
            let known = zone.name().to_lowercase();
            let city = known.rsplit('/').next().unwrap_or(&known).to_owned();
            strsim::jaro_winkler(&known, &lower).max(strsim::jaro_winkler(&city, &lower))
        };
        let nearest = chrono_tz::TZ_VARIANTS.iter().map(|zone| (alike(zone), zone)).max_by(|a, b| a.0.total_cmp(&b.0));
        let help = match nearest {
            Some((score, zone)) if score >= ALIKE => format!("did you mean `{}`?", zone.name()),
            _ => "write a name of the IANA database, such as Europe/Berlin or UTC".to_owned(),
        };
        let shown: String = name.chars().take(64).collect();
        CronError { column: 0, message: format!("there is no time zone `{shown}`"), help }
    })
}

#[cfg(test)]
#[path = "cron_tests.rs"]
mod tests;
