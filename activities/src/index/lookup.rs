//! Definitions by name.

use super::{
    catalog::{Catalog, Place},
    extract::Def,
    kind::{About, PathKind},
};

/// How well a definition's name fits, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fit {
    Exact,
    /// But for upper and lower case.
    AnyCase,
    Start,
    Within,
}

/// Names that are looked at for a part of a name.
const NAMES_MAX: usize = 2000;
/// Shortest part of a name that is looked up, in bytes.
const PART_BYTES_MIN: usize = 3;

/// Definitions of `name`, best first: by fit, by `parent` where one is given, by kind, by what the file is for, by place.
///
/// `worst` is the loosest fit that counts. Looser fits are only looked for while fewer than `limit` are found.
pub(super) fn find(catalog: &Catalog, name: &str, parent: Option<&str>, worst: Fit, limit: usize) -> Vec<(Fit, Place)> {
    let lower = name.to_lowercase();
    let mut found: Vec<(Fit, Place)> = Vec::new();
    if let Some(places) = catalog.names.get(&lower) {
        for place in places {
            let exact = catalog.def(place).is_some_and(|(_, def)| def.name == name);
            let fit = if exact { Fit::Exact } else { Fit::AnyCase };
            if fit <= worst {
                found.push((fit, place.clone()));
            }
        }
    }
    if lower.len() >= PART_BYTES_MIN && found.len() < limit && worst >= Fit::Start {
        let starting = catalog.names.range(lower.clone()..).take_while(|(known, _)| known.starts_with(&lower));
        for (_, places) in starting.filter(|(known, _)| **known != lower).take(NAMES_MAX) {
            found.extend(places.iter().map(|place| (Fit::Start, place.clone())));
        }
    }
    if lower.len() >= PART_BYTES_MIN && found.len() < limit && worst >= Fit::Within {
        let within = catalog.names.iter().filter(|(known, _)| known.contains(&lower) && !known.starts_with(&lower));
        for (_, places) in within.take(NAMES_MAX) {
            found.extend(places.iter().map(|place| (Fit::Within, place.clone())));
        }
    }
    found.sort_by_cached_key(|(fit, place)| {
        let (kind, path_kind, elsewhere, length) = match catalog.def(place) {
            Some((record, def)) => (kind_rank(def), record.kind, !has_parent(def, parent), def.name.len()),
            None => (u8::MAX, PathKind::Vendored, true, usize::MAX),
        };
        // Weights are between 0 and 1: as whole numbers they can be compared.
        let prior = (path_kind.weight(About::default()) * 100.0) as u32;
        let length = if *fit > Fit::AnyCase { length } else { 0 };
        (*fit, elsewhere, length, kind, std::cmp::Reverse(prior), place.clone())
    });
    found.truncate(limit);
    found
}

fn has_parent(def: &Def, parent: Option<&str>) -> bool {
    let Some(parent) = parent else { return true };
    def.parent.as_deref().is_some_and(|known| known == parent || known.rsplit("::").next() == Some(parent))
}

/// What a reader means by a name, before what is merely called so.
fn kind_rank(def: &Def) -> u8 {
    match def.kind.as_str() {
        "const" | "static" | "variable" | "prototype" | "constructor" => 1,
        "impl" | "variant" | "field" => 2,
        "key" | "section" | "id" | "keyframes" => 3,
        _ => 0,
    }
}

/// Parts `Type::name`, `type.name`, `Type#name` and `type->name` into parent and name; a call's parentheses go.
pub(super) fn qualified(word: &str) -> (Option<&str>, &str) {
    let word = word.trim().trim_end_matches("()");
    let cut = ["::", "->", ".", "#"].iter().filter_map(|mark| word.rfind(mark).map(|at| (at, mark.len()))).max();
    match cut {
        Some((at, length)) if at > 0 && at + length < word.len() => {
            let before = &word[..at];
            let parent =
                before.rsplit(|c: char| !super::tokenize::in_word(c)).next().filter(|parent| !parent.is_empty());
            (parent, &word[at + length..])
        }
        _ => (None, word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualified_names_are_parted() {
        for (word, parent, name) in [
            ("open", None, "open"),
            ("Index::open", Some("Index"), "open"),
            ("crate::index::Index::open()", Some("Index"), "open"),
            ("cart.total", Some("cart"), "total"),
            ("Cart#total", Some("Cart"), "total"),
            ("self->next", Some("self"), "next"),
            ("#id", None, "#id"),
            ("a.", None, "a."),
            ("", None, ""),
        ] {
            assert_eq!(qualified(word), (parent, name), "{word}");
        }
    }
}
