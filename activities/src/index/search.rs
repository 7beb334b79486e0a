//! Places for a question: lanes that each rank files, joined by their ranks.

use super::{
    Hit, Symbol,
    catalog::{Place, Record},
    extract::Def,
    lookup::{self, Fit},
    query::Query,
    score::{self, Scored},
    store::{Lines, Loaded},
};
use std::collections::{BTreeMap, HashMap};
use tantivy::TantivyError;

/// Reciprocal rank fusion: weight / (K + rank). 60 as in the paper; other values hardly matter.
const K: f64 = 60.0;
/// Files of a lane that count.
const LANE_MAX: usize = 200;
/// Definitions of the exact lane.
const EXACT_MAX: usize = 50;
/// Weight of the lanes that found what was asked for by name.
const EXACT_WEIGHT: f64 = 1.5;
/// The same for words of prose that happen to be the name of something.
const WORD_WEIGHT: f64 = 0.4;
/// Definitions of a word of prose above which it is no name.
const PROSE_DEFINERS_MAX: u32 = 5;
/// Lines and bytes of a hit's snippet.
const SNIPPET_LINES: usize = 3;
const SNIPPET_BYTES: usize = 240;
/// Lines of a place in a file of which no part stands out.
const HEAD_LINES: u32 = 50;

/// What the lanes found.
pub(super) struct Gathered<'l> {
    pub(super) query: Query,
    /// Best first.
    pub(super) files: Vec<Scored<'l>>,
    pub(super) units: Vec<Scored<'l>>,
    /// Definitions that were asked for by name, best first, and whether surely so.
    pub(super) exact: Vec<(bool, Place)>,
    /// Files that were asked for by path.
    pub(super) paths: Vec<&'l Record>,
}

pub(super) fn gather<'l>(loaded: &'l Loaded, query: &str) -> Result<Gathered<'l>, TantivyError> {
    let query = Query::of(query);
    let files = score::files(loaded, &query.terms)?;
    let units = score::units(loaded, &query.terms, query.about)?;
    let exact = exact(loaded, &query);
    let mut paths = Vec::new();
    for asked in &query.paths {
        let found = loaded.catalog.files.values().filter(|record| is_end_of(asked, &record.path));
        let mut found: Vec<&Record> = found.take(EXACT_MAX).collect();
        // The whole path before paths that only end so.
        found.sort_by_key(|record| (record.path.len(), record.path.as_str()));
        paths.extend(found);
    }
    Ok(Gathered { query, files, units, exact, paths })
}

/// Whether a path is, or ends at a folder's border with, what was asked.
fn is_end_of(asked: &str, path: &str) -> bool {
    path.strip_suffix(asked).is_some_and(|before| before.is_empty() || before.ends_with('/'))
}

fn exact(loaded: &Loaded, query: &Query) -> Vec<(bool, Place)> {
    let catalog = &loaded.catalog;
    // Sure names by their fit, then words of prose that are a name as they stand, rare ones first.
    let mut ranked: Vec<((u8, u32, usize), bool, Place)> = Vec::new();
    for name in &query.names {
        let definers = catalog.definers(&name.text);
        if !name.sure && definers > PROSE_DEFINERS_MAX {
            continue;
        }
        let worst = if name.sure { Fit::Start } else { Fit::Exact };
        for (order, (fit, place)) in
            lookup::find(catalog, &name.text, name.parent.as_deref(), worst, EXACT_MAX).into_iter().enumerate()
        {
            let class = match (name.sure, fit) {
                (true, Fit::Exact) => 0,
                (true, Fit::AnyCase) => 1,
                (false, _) => 2,
                (true, _) => 3,
            };
            ranked.push(((class, definers, order), class < 2, place));
        }
    }
    ranked.sort();
    let mut seen = std::collections::HashSet::new();
    ranked.retain(|(_, _, place)| seen.insert(place.clone()));
    ranked.truncate(EXACT_MAX);
    ranked.into_iter().map(|(_, sure, place)| (sure, place)).collect()
}

/// A file with what the lanes say of it.
struct Ranked<'l> {
    record: &'l Record,
    score: f64,
    why: Vec<String>,
    /// The definition or unit that found it.
    def: Option<u32>,
    unit: Option<usize>,
    named: bool,
}

/// The places that answer, best first, one a file.
pub(super) fn search<'l>(loaded: &'l Loaded, query: &str, limit: usize) -> Result<Vec<Hit>, TantivyError> {
    let gathered = gather(loaded, query)?;
    let mut ranked: BTreeMap<&str, Ranked<'l>> = BTreeMap::new();
    let mut add = |record: &'l Record, lane: &str, rank: usize, weight: f64, def: Option<u32>, named| {
        let new = Ranked { record, score: 0.0, why: Vec::new(), def: None, unit: None, named: false };
        let entry = ranked.entry(record.path.as_str()).or_insert(new);
        entry.score += weight / (K + rank as f64);
        entry.why.push(format!("{lane} {rank}"));
        entry.def = entry.def.or(def);
        entry.named |= named;
    };
    for (rank, scored) in (1..).zip(gathered.files.iter().take(LANE_MAX)) {
        add(scored.record, "file", rank, 1.0, None, false);
    }
    let mut best_unit: HashMap<&str, usize> = HashMap::new();
    let mut rank = 0;
    for scored in &gathered.units {
        let path = scored.record.path.as_str();
        if !best_unit.contains_key(path) {
            best_unit.insert(path, scored.unit);
            rank += 1;
            if rank <= LANE_MAX {
                add(scored.record, "unit", rank, 1.0, None, false);
            }
        }
    }
    let mut files = std::collections::HashSet::new();
    for (sure, place) in &gathered.exact {
        let Some((record, _)) = loaded.catalog.def(place) else { continue };
        if files.insert(record.path.as_str()) {
            // A name's place is shown; a word of prose only moves its file.
            let (lane, weight) = if *sure { ("symbol", EXACT_WEIGHT) } else { ("word", WORD_WEIGHT) };
            add(record, lane, files.len(), weight, sure.then_some(place.1), false);
        }
    }
    let mut files = std::collections::HashSet::new();
    for record in &gathered.paths {
        if files.insert(record.path.as_str()) {
            add(record, "path", files.len(), EXACT_WEIGHT, None, true);
        }
    }

    let mut ranked: Vec<Ranked<'_>> = ranked.into_values().collect();
    for entry in &mut ranked {
        entry.unit = best_unit.get(entry.record.path.as_str()).copied();
        if !entry.named {
            entry.score *= entry.record.kind.weight(gathered.query.about);
        }
    }
    ranked.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| a.record.path.cmp(&b.record.path)));
    ranked.truncate(limit);
    ranked.into_iter().map(|entry| hit(loaded, &entry)).collect()
}

fn hit(loaded: &Loaded, entry: &Ranked<'_>) -> Result<Hit, TantivyError> {
    let record = entry.record;
    let def = |ord: u32| record.defs.get(ord as usize);
    let unit = entry.unit.and_then(|unit| record.units.get(unit));
    let (start_line, end_line, symbol) = match (entry.def.and_then(def), unit) {
        (Some(def), _) => (def.start, def.end, Some(def.name.clone())),
        (None, Some(unit)) => (unit.start, unit.end, unit.def.and_then(def).map(|def| def.name.clone())),
        (None, None) => (1, record.lines.clamp(1, HEAD_LINES), None),
    };
    let snippet = match &record.skipped {
        Some(why) if record.units.is_empty() => format!("[{why}]"),
        _ => snippet(Lines::of(&loaded.text(record.id)?).text(start_line, end_line)),
    };
    Ok(Hit { path: record.path.clone(), start_line, end_line, symbol, snippet, why: entry.why.join(", ") })
}

fn snippet(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()).take(SNIPPET_LINES) {
        if !out.is_empty() {
            out.push('\n');
        }
        out.push_str(line.trim_end());
    }
    if out.len() > SNIPPET_BYTES {
        let mut end = SNIPPET_BYTES;
        while !out.is_char_boundary(end) {
            end -= 1;
        }
        out.truncate(end);
        out.push('…');
    }
    out
}

/// Definitions of a name, or of `Parent::name`, best fit first.
pub(super) fn symbols(loaded: &Loaded, name: &str, limit: usize) -> Vec<Symbol> {
    let (parent, last) = lookup::qualified(name);
    let find = |parent, name| lookup::find(&loaded.catalog, name, parent, Fit::Within, limit);
    let mut found = find(parent, last);
    if let Some(parent) = parent {
        // With its parent where there is one, else whatever has the name.
        let with = |place: &Place| {
            loaded
                .catalog
                .def(place)
                .is_some_and(|(_, def)| def.parent.as_deref().is_some_and(|p| p.rsplit("::").next() == Some(parent)))
        };
        if found.iter().any(|(fit, place)| *fit <= Fit::AnyCase && with(place)) {
            found.retain(|(fit, place)| *fit <= Fit::AnyCase && with(place));
        }
    }
    let exists = found.iter().any(|(fit, _)| *fit <= Fit::AnyCase);
    // Names that only contain it are a help where there is nothing better.
    found
        .iter()
        .filter(|(fit, _)| !exists || *fit < Fit::Within)
        .filter_map(|(_, place)| loaded.catalog.def(place))
        .map(symbol)
        .collect()
}

fn symbol((record, def): (&Record, &Def)) -> Symbol {
    Symbol {
        name: def.name.clone(),
        kind: def.kind.clone(),
        path: record.path.clone(),
        start_line: def.start,
        end_line: def.end,
        signature: def.signature.clone(),
        parent: def.parent.clone(),
    }
}
