//! The map of a repository: the signatures that the rest of the code uses most, under their files.

use super::{
    budget,
    catalog::{Catalog, Record},
    extract::Def,
    kind::{About, PathKind},
    store::Loaded,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Signatures that may enter a map; no budget has room for more.
const CANDIDATES_MAX: usize = 5000;

/// Definitions of one name above which it says nothing in particular.
const DEFINERS_MAX: u32 = 5;

/// A definition as a candidate of the map.
struct Candidate<'l> {
    record: &'l Record,
    ord: usize,
    weight: f64,
}

/// Signatures by falling use, as many as fit, in files by their most used, in the order of their lines.
pub(super) fn map(loaded: &Loaded, budget_tokens: usize) -> String {
    let room = budget::bytes(budget_tokens);
    let mut known = HashMap::new();
    let mut candidates: Vec<Candidate<'_>> = Vec::new();
    for record in loaded.catalog.files.values() {
        // Data, prose and what others made are not what a program is made of.
        if !record.lang.is_some_and(super::lang::Lang::is_code)
            || matches!(record.kind, PathKind::Generated | PathKind::Vendored)
        {
            continue;
        }
        for (ord, def) in record.defs.iter().enumerate().filter(|(_, def)| is_shown(def) && def.kind != "impl") {
            if u32::try_from(ord).is_ok_and(|ord| record.is_in_tests(ord)) {
                continue;
            }
            candidates.push(Candidate { record, ord, weight: weight(loaded, record, def, &mut known) });
        }
    }
    candidates.sort_by(|a, b| {
        b.weight.total_cmp(&a.weight).then_with(|| (&a.record.path, a.ord).cmp(&(&b.record.path, b.ord)))
    });
    candidates.truncate(CANDIDATES_MAX);

    // Files in the order of their best definition; entries are added while the exact count allows.
    let mut order: Vec<&Record> = Vec::new();
    let mut chosen: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    let mut used = 0;
    for candidate in &candidates {
        let record = candidate.record;
        let have = chosen.get(record.path.as_str());
        let mut cost = if have.is_none() { record.path.len() + 2 } else { 0 };
        let mut more = Vec::new();
        let mut next = Some(candidate.ord);
        // A signature stands under those around it.
        while let Some(ord) = next {
            let def = &record.defs[ord];
            if is_shown(def) && have.is_none_or(|have| !have.contains(&ord)) {
                cost += entry(record, ord).len();
                more.push(ord);
            }
            next = def.outer.map(|outer| outer as usize);
        }
        if used + cost > room || more.is_empty() {
            continue;
        }
        used += cost;
        if have.is_none() {
            order.push(record);
        }
        chosen.entry(record.path.as_str()).or_default().extend(more);
    }
    let mut out = String::with_capacity(used);
    for record in order {
        out.push_str(&record.path);
        out.push_str(":\n");
        for ord in chosen.get(record.path.as_str()).into_iter().flatten() {
            out.push_str(&entry(record, *ord));
        }
    }
    debug_assert_eq!(out.len(), used);
    out
}

fn is_shown(def: &Def) -> bool {
    !matches!(
        def.kind.as_str(),
        "variant" | "field" | "key" | "section" | "id" | "variable" | "prototype" | "keyframes"
    ) && !def.signature.is_empty()
}

/// How much the rest of the code leans on a definition: files that use the name, shared among those who have it.
fn weight<'l>(loaded: &'l Loaded, record: &Record, def: &'l Def, known: &mut HashMap<&'l str, f64>) -> f64 {
    let name = *known.entry(&def.name).or_insert_with(|| of_name(&loaded.catalog, &def.name));
    // Types say more of a program than functions.
    let kind = if def.is_container() { 3.0 } else { 1.0 };
    name * kind * record.kind.weight(About::default())
}

fn of_name(catalog: &Catalog, name: &str) -> f64 {
    let mut files = HashSet::new();
    let mut definers = 0u32;
    for place in catalog.names.get(&name.to_lowercase()).into_iter().flatten() {
        if let Some((_, def)) = catalog.def(place)
            && def.name == name
        {
            files.insert(&place.0);
            // An `impl` or a prototype is the same thing once more.
            definers += u32::from(!matches!(def.kind.as_str(), "impl" | "prototype"));
        }
    }
    let uses = catalog.uses(name).saturating_sub(u32::try_from(files.len()).unwrap_or(u32::MAX));
    // A plain word (`get`, `push`) is mostly somebody else's.
    let plain = !name.contains(|c: char| c.is_uppercase() || c == '_');
    let common = if plain || definers > DEFINERS_MAX { 0.1 } else { 1.0 };
    // Half a use, so that a program without any still has a map.
    (f64::from(uses) + 0.5) / f64::from(definers.max(1)) * common
}

/// A line of the map, indented by what is shown around it.
fn entry(record: &Record, ord: usize) -> String {
    let def = &record.defs[ord];
    let mut depth = 1;
    let mut outer = def.outer;
    while let Some(around) = outer.map(|ord| &record.defs[ord as usize]) {
        depth += usize::from(is_shown(around));
        outer = around.outer;
    }
    format!("{}{}\n", "  ".repeat(depth.min(8)), def.signature)
}
