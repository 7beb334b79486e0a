//! Code for a prompt, within a budget: what was asked for by name, something of each of the best files, then the best units.

use super::{
    Pack, Packed, budget,
    catalog::Record,
    search::{Gathered, gather},
    store::{Lines, Loaded},
    tokenize::tokens,
    unit::Unit,
};
use std::collections::{BTreeMap, HashMap, HashSet};
use tantivy::TantivyError;

/// Units that may enter a pack.
const CANDIDATES_MAX: usize = 800;
/// Best files of which every unit may enter, whether the unit itself fits or not.
const WHOLE_FILES_MAX: usize = 12;
/// Weights of the best file's and an exact name's part beside the unit's own; measured, see the design.
const FILE_WEIGHT: f64 = 1.5;
const EXACT_WEIGHT: f64 = 1.0;
/// Definitions asked for by name that are put first, and the part of the budget for one and for all, in percent.
const EXACT_MAX: usize = 8;
const EXACT_EACH: usize = 30;
const EXACT_ALL: usize = 60;
/// The same for the pass over files.
const BREADTH_EACH: usize = 12;
const BREADTH_ALL: usize = 45;
/// Size below which a unit is not preferred for being small, in tokens, and the power of size; best for symbol recall.
const SMALL_TOKENS: usize = 80;
const SIZE_POWER: f64 = 0.2;
/// Lines between two pieces that are shown rather than a second heading.
const GAP_LINES: u32 = 2;
/// Candidates that are named as omitted.
const OMITTED_MAX: usize = 10;
/// Names in a heading.
const NAMES_MAX: usize = 4;

/// A unit with its worth.
struct Candidate<'l> {
    record: &'l Record,
    unit: usize,
    score: f64,
}

impl<'l> Candidate<'l> {
    fn unit(&self) -> &'l Unit {
        &self.record.units[self.unit]
    }

    fn tokens(&self) -> usize {
        budget::tokens(self.unit().bytes)
    }
}

/// What is chosen of a file.
struct Chosen<'l> {
    record: &'l Record,
    lines: Vec<(u32, u32)>,
    /// Rendered, with the heading of every piece.
    pieces: Vec<(Packed, String)>,
    bytes: usize,
}

struct Packing<'l> {
    loaded: &'l Loaded,
    room: usize,
    used: usize,
    chosen: Vec<Chosen<'l>>,
    texts: HashMap<&'l str, String>,
}

/// Packs code for a question; never above the budget.
pub(super) fn pack(loaded: &Loaded, query: &str, budget_tokens: usize) -> Result<Pack, TantivyError> {
    let gathered = gather(loaded, query)?;
    let mut packing =
        Packing { loaded, room: budget::bytes(budget_tokens), used: 0, chosen: Vec::new(), texts: HashMap::new() };
    let candidates = packing.candidates(&gathered);
    packing.exact(&gathered)?;
    packing.breadth(&gathered, &candidates, budget_tokens)?;
    let omitted = packing.fill(&candidates)?;

    let mut pack = Pack { text: String::with_capacity(packing.used), tokens: 0, items: Vec::new(), omitted };
    for (item, text) in packing.chosen.into_iter().flat_map(|chosen| chosen.pieces) {
        pack.text.push_str(&text);
        pack.items.push(item);
    }
    pack.tokens = budget::tokens(pack.text.len());
    debug_assert!(pack.tokens <= budget_tokens);
    Ok(pack)
}

impl<'l> Packing<'l> {
    fn text(&mut self, record: &'l Record) -> Result<&str, TantivyError> {
        let path = record.path.as_str();
        if !self.texts.contains_key(path) {
            let text = self.loaded.text(record.id)?;
            self.texts.insert(path, text);
        }
        Ok(self.texts.get(path).map(String::as_str).unwrap_or_default())
    }

    /// Units by falling score.
    fn candidates(&self, gathered: &Gathered<'l>) -> Vec<Candidate<'l>> {
        let best_file = gathered.files.first().map_or(1.0, |best| best.score);
        let best_unit = gathered.units.first().map_or(1.0, |best| best.score);
        let file: HashMap<&str, f64> =
            gathered.files.iter().map(|f| (f.record.path.as_str(), f.score / best_file)).collect();
        let asked: HashSet<(&str, u32)> =
            gathered.exact.iter().filter(|(sure, _)| *sure).map(|(_, p)| (&*p.0, p.1)).collect();
        let named: HashSet<&str> = gathered.paths.iter().map(|record| record.path.as_str()).collect();
        let mut own: BTreeMap<(&str, usize), (&'l Record, f64)> = BTreeMap::new();
        for scored in &gathered.units {
            own.insert((scored.record.path.as_str(), scored.unit), (scored.record, scored.score / best_unit));
        }
        for record in
            gathered.files.iter().take(WHOLE_FILES_MAX).map(|f| f.record).chain(gathered.paths.iter().copied())
        {
            for unit in 0..record.units.len() {
                own.entry((record.path.as_str(), unit)).or_insert((record, 0.0));
            }
        }
        let mut candidates: Vec<Candidate<'l>> = own
            .into_iter()
            .map(|((path, unit), (record, score))| {
                let exact = record.units[unit].def.is_some_and(|ord| asked.contains(&(path, ord)));
                let is_named = named.contains(path);
                let of_file = if is_named { 1.0 } else { file.get(path).copied().unwrap_or(0.0) };
                let about = gathered.query.about;
                let prior = record.unit_weight(unit, about) / if is_named { record.kind.weight(about) } else { 1.0 };
                let score = (score + FILE_WEIGHT * of_file + if exact { EXACT_WEIGHT } else { 0.0 }) * prior;
                Candidate { record, unit, score }
            })
            .collect();
        candidates.sort_by(|a, b| {
            b.score.total_cmp(&a.score).then_with(|| (&a.record.path, a.unit).cmp(&(&b.record.path, b.unit)))
        });
        candidates.truncate(CANDIDATES_MAX);
        candidates
    }

    /// The definitions that were asked for by name: whole, or the head with as much of the body as there is room for.
    fn exact(&mut self, gathered: &Gathered<'l>) -> Result<(), TantivyError> {
        let (each, all) = (self.room * EXACT_EACH / 100, self.room * EXACT_ALL / 100);
        for (_, place) in gathered.exact.iter().filter(|(sure, _)| *sure).take(EXACT_MAX) {
            let Some((record, def)) = self.loaded.catalog.def(place) else { continue };
            // With the comments above it, if it is a unit.
            let unit = record.units.iter().find(|unit| unit.def == Some(place.1) && unit.head.is_none());
            let start = unit.map_or(def.start, |unit| unit.start.min(def.start));
            let text = self.text(record)?;
            let lines = Lines::of(text);
            let mut end = def.end;
            if lines.text(start, end).len() > each {
                end = def.start.max(start);
                while end < def.end && lines.text(start, end + 1).len() <= each {
                    end += 1;
                }
            }
            self.add(record, &[(start, end)], all)?;
        }
        Ok(())
    }

    /// The best unit of each of the best files, or the part of it that the question hits.
    fn breadth(
        &mut self,
        gathered: &Gathered<'l>,
        candidates: &[Candidate<'l>],
        budget: usize,
    ) -> Result<(), TantivyError> {
        let files = match budget {
            0..6000 => 5,
            6000..12_000 => 8,
            _ => 12,
        };
        let each = self.room * BREADTH_EACH / 100;
        let all = self.used + self.room * BREADTH_ALL / 100;
        let mut seen = HashSet::new();
        for candidate in candidates {
            if seen.len() == files {
                break;
            }
            if !seen.insert(candidate.record.path.as_str()) {
                continue;
            }
            let lines = self.window(candidate, &gathered.query.terms, each)?;
            self.add(candidate.record, &lines, all.min(self.room))?;
        }
        Ok(())
    }

    /// A unit's lines, or its head and the lines around the one that has most of the words.
    fn window(
        &mut self,
        candidate: &Candidate<'l>,
        terms: &[String],
        bytes_max: usize,
    ) -> Result<Vec<(u32, u32)>, TantivyError> {
        let unit = candidate.unit();
        let text = self.text(candidate.record)?;
        let lines = Lines::of(text);
        if lines.text(unit.start, unit.end).len() <= bytes_max {
            return Ok(whole(unit));
        }
        let hits = |line: u32| {
            let mut words = HashSet::new();
            tokens(lines.text(line, line), &mut |token| {
                if terms.contains(&token) {
                    words.insert(token);
                }
            });
            words.len()
        };
        let best = (unit.start..=unit.end)
            .map(|line| (hits(line), std::cmp::Reverse(line)))
            .max()
            .map_or(unit.start, |best| best.1.0);
        let (mut start, mut end) = (best, best);
        loop {
            let before = (start, end);
            if end < unit.end && lines.text(start, end + 1).len() <= bytes_max {
                end += 1;
            }
            if start > unit.start && lines.text(start - 1, end).len() <= bytes_max {
                start -= 1;
            }
            if before == (start, end) {
                break;
            }
        }
        let def = unit.def.and_then(|ord| candidate.record.defs.get(ord as usize));
        let head = unit.head.or(def.map(|def| (def.start, def.head_end)));
        let mut all: Vec<(u32, u32)> = head.filter(|head| head.1 < start || head.0 > end).into_iter().collect();
        all.push((start, end));
        Ok(all)
    }

    /// The rest by worth for its size; gives the best of what did not fit.
    fn fill(&mut self, candidates: &[Candidate<'l>]) -> Result<Vec<Packed>, TantivyError> {
        let worth = |c: &Candidate<'_>| c.score * c.score / (c.tokens().max(SMALL_TOKENS) as f64).powf(SIZE_POWER);
        let mut order: Vec<&Candidate<'l>> = candidates.iter().filter(|candidate| candidate.score > 0.0).collect();
        // Stable: equal worth stays in the order of candidates.
        order.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
        let mut omitted = Vec::new();
        for candidate in order {
            let unit = candidate.unit();
            // Of a file that is not in yet the unit's own bytes are needed at least: no need to read it to see that.
            let is_in = self.chosen.iter().any(|chosen| chosen.record.path == candidate.record.path);
            let fits = is_in || self.used + unit.bytes <= self.room;
            if !(fits && self.add(candidate.record, &whole(unit), self.room)?) && omitted.len() < OMITTED_MAX {
                omitted.push(Packed {
                    path: candidate.record.path.clone(),
                    start_line: unit.start,
                    end_line: unit.end,
                    symbol: unit
                        .def
                        .and_then(|ord| candidate.record.defs.get(ord as usize))
                        .map(|def| def.name.clone()),
                    tokens: candidate.tokens(),
                });
            }
        }
        Ok(omitted)
    }

    /// Takes lines of a file in, if the pack stays below `room` with them; what is in already costs nothing.
    fn add(&mut self, record: &'l Record, more: &[(u32, u32)], room: usize) -> Result<bool, TantivyError> {
        let at = self.chosen.iter().position(|chosen| chosen.record.path == record.path);
        let (mut lines, before) =
            at.map_or((Vec::new(), 0), |at| (self.chosen[at].lines.clone(), self.chosen[at].bytes));
        if more.iter().all(|more| lines.iter().any(|have| have.0 <= more.0 && more.1 <= have.1)) {
            return Ok(true);
        }
        lines.extend_from_slice(more);
        let mut lines = merge(lines);
        let text = Lines::of(self.text(record)?);
        lines.iter_mut().for_each(|range| close(record, &text, range));
        let lines = merge(lines);
        let pieces = render(record, self.text(record)?, &lines);
        let bytes = pieces.iter().map(|(_, text)| text.len()).sum::<usize>();
        // Two pieces that become one may cost less than before.
        if self.used - before + bytes > room {
            return Ok(false);
        }
        self.used = self.used - before + bytes;
        let chosen = Chosen { record, lines, pieces, bytes };
        match at {
            Some(at) => self.chosen[at] = chosen,
            None => self.chosen.push(chosen),
        }
        Ok(true)
    }
}

fn whole(unit: &Unit) -> Vec<(u32, u32)> {
    unit.head.into_iter().chain([(unit.start, unit.end)]).collect()
}

/// Ranges in order, those that touch or nearly do joined.
fn merge(mut lines: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    lines.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(lines.len());
    for (start, end) in lines {
        match merged.last_mut() {
            Some(last) if start <= last.1.saturating_add(1 + GAP_LINES) => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// Takes in the brackets that end what begins in a range: no unit holds those of a type whose parts are units.
fn close(record: &Record, text: &Lines<'_>, range: &mut (u32, u32)) {
    // What it reaches over is short, or it holds words.
    let open = record.defs.iter().filter(|def| (range.0..=range.1).contains(&def.start) && def.end > range.1);
    if let Some(end) = open.map(|def| def.end).min()
        && !text.text(range.1 + 1, end).contains(char::is_alphanumeric)
    {
        range.1 = end;
    }
}

/// Every range under its heading: `### path:start-end names`.
fn render(record: &Record, text: &str, lines: &[(u32, u32)]) -> Vec<(Packed, String)> {
    let all = Lines::of(text);
    let piece = |&(start, end): &(u32, u32)| {
        let end = end.min(all.count().max(start));
        let inside = record.units.iter().filter(|unit| unit.start <= end && unit.end >= start);
        let mut names: Vec<String> = Vec::new();
        let mut symbols: Vec<&str> = Vec::new();
        for def in inside.filter_map(|unit| record.defs.get(unit.def? as usize)) {
            let name = def.parent.as_ref().map_or_else(|| def.name.clone(), |parent| format!("{parent}::{}", def.name));
            if !names.contains(&name) {
                names.push(name);
                symbols.push(&def.name);
            }
        }
        if names.len() > NAMES_MAX {
            names.truncate(NAMES_MAX);
            names.push("…".to_owned());
        }
        let mut out = format!("### {}:{start}-{end}", record.path);
        if !names.is_empty() {
            out.push(' ');
            out.push_str(&names.join(", "));
        }
        out.push('\n');
        out.push_str(all.text(start, end));
        if !out.ends_with('\n') {
            out.push('\n');
        }
        out.push('\n');
        let packed = Packed {
            path: record.path.clone(),
            start_line: start,
            end_line: end,
            symbol: symbols.first().map(|name| (*name).to_owned()),
            tokens: budget::tokens(out.len()),
        };
        (packed, out)
    };
    lines.iter().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_nearly_touch_are_one() {
        assert_eq!(merge(vec![(20, 30), (1, 5), (6, 9), (12, 14), (25, 40), (44, 45)]), [(1, 14), (20, 40), (44, 45)]);
        assert_eq!(merge(vec![(1, u32::MAX), (5, 6)]), [(1, u32::MAX)]);
        assert_eq!(merge(Vec::new()), []);
    }
}
