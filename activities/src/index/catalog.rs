//! What the index knows of every file, in memory: the directory to the full text.

use super::{
    extract::{Def, USE_BYTES_MIN, mark},
    kind::{About, PathKind},
    lang::Lang,
    unit::Unit,
    walk::Stamp,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

/// A file, as it is kept beside its text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Numbers the file's documents; never used twice in one index. No answer depends on it.
    pub(super) id: u64,
    pub(super) path: String,
    pub(super) stamp: Stamp,
    pub(super) beyond: bool,
    /// SHA-256 of the text, in hex; the reason where there is none.
    pub(super) content: String,
    /// Why it is findable by path only, or has no definitions.
    pub(super) skipped: Option<String>,
    pub(super) lang: Option<Lang>,
    pub(super) kind: PathKind,
    pub(super) lines: u32,
    pub(super) defs: Vec<Def>,
    pub(super) units: Vec<Unit>,
    /// Marks of the names that it uses; taken from the text again when an index is opened, which costs less than their bytes.
    #[serde(skip)]
    pub(super) uses: Vec<u32>,
}

impl Record {
    /// The factor of a unit in an answer: that of its file, or of a test if it stands in a module of tests.
    pub(super) fn unit_weight(&self, unit: usize, about: About) -> f64 {
        let def = self.units.get(unit).and_then(|unit| unit.def);
        let kind = if def.is_some_and(|def| self.is_in_tests(def)) && self.kind == PathKind::Source {
            PathKind::Test
        } else {
            self.kind
        };
        kind.weight(about)
    }

    /// Whether a definition is, or is in, a module of tests beside the source, as in Rust.
    pub(super) fn is_in_tests(&self, def: u32) -> bool {
        let mut next = Some(def);
        while let Some(def) = next.and_then(|ord| self.defs.get(ord as usize)) {
            if def.kind == "module" && matches!(def.name.as_str(), "tests" | "test") {
                return true;
            }
            next = def.outer;
        }
        false
    }
}

/// A definition by its file and its place there.
pub(super) type Place = (Arc<str>, u32);

/// All files of an index.
#[derive(Default)]
pub(super) struct Catalog {
    pub(super) files: BTreeMap<Arc<str>, Record>,
    by_id: HashMap<u64, Arc<str>>,
    /// Definitions by lower-cased name.
    pub(super) names: BTreeMap<String, BTreeSet<Place>>,
    /// In how many files a name is used, by its mark.
    uses: HashMap<u32, u32>,
    pub(super) units: usize,
    last_id: u64,
}

impl Catalog {
    /// The highest id that a file has: a new one takes the next.
    pub(super) fn last_id(&self) -> u64 {
        self.last_id
    }

    /// Puts a file in, in place of what was at its path.
    pub(super) fn insert(&mut self, record: Record) {
        self.remove(&record.path);
        let path: Arc<str> = record.path.as_str().into();
        self.last_id = self.last_id.max(record.id);
        self.by_id.insert(record.id, path.clone());
        self.units += record.units.len();
        for (ord, def) in (0u32..).zip(&record.defs) {
            self.names.entry(def.name.to_lowercase()).or_default().insert((path.clone(), ord));
        }
        for mark in &record.uses {
            *self.uses.entry(*mark).or_default() += 1;
        }
        self.files.insert(path, record);
    }

    pub(super) fn remove(&mut self, path: &str) -> Option<Record> {
        let (path, record) = self.files.remove_entry(path)?;
        self.by_id.remove(&record.id);
        self.units -= record.units.len();
        for (ord, def) in (0u32..).zip(&record.defs) {
            let name = def.name.to_lowercase();
            if let Some(places) = self.names.get_mut(&name) {
                places.remove(&(path.clone(), ord));
                if places.is_empty() {
                    self.names.remove(&name);
                }
            }
        }
        for mark in &record.uses {
            if let Some(count) = self.uses.get_mut(mark) {
                *count -= 1;
                if *count == 0 {
                    self.uses.remove(mark);
                }
            }
        }
        Some(record)
    }

    pub(super) fn by_id(&self, id: u64) -> Option<&Record> {
        self.files.get(self.by_id.get(&id)?)
    }

    pub(super) fn def(&self, place: &Place) -> Option<(&Record, &Def)> {
        let record = self.files.get(&place.0)?;
        Some((record, record.defs.get(place.1 as usize)?))
    }

    /// In how many files a name is used, those that define it included; short names mean too many things to count.
    pub(super) fn uses(&self, name: &str) -> u32 {
        if name.len() < USE_BYTES_MIN { 0 } else { self.uses.get(&mark(name)).copied().unwrap_or(0) }
    }

    /// How many definitions have a name, whatever its case.
    pub(super) fn definers(&self, name: &str) -> u32 {
        self.names.get(&name.to_lowercase()).map_or(0, |places| u32::try_from(places.len()).unwrap_or(u32::MAX))
    }
}
