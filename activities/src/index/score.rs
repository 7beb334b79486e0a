//! BM25 over tantivy's postings.
//!
//! The sums are our own and not those of tantivy's queries because an answer must be the same for the same files: its
//! statistics count deleted documents until a merge, its sums depend on the order of segments, and its ties on document
//! numbers. What a query says never meets a query syntax.

use super::{catalog::Record, kind::About, store::Loaded};
use std::collections::HashMap;
use tantivy::{DocSet as _, TERMINATED, TantivyError, Term, postings::Postings as _, schema::IndexRecordOption};

/// The usual constants of BM25.
const K1: f64 = 1.2;
const B: f64 = 0.75;

/// A field of [`super::store::Fields::ranked`] by its place, and its weight in a sum.
type Weighted = (usize, f64);
/// Files: body, path, names of definitions. Measured, see the design.
const FILE: &[Weighted] = &[(0, 1.0), (1, 0.75), (2, 0.4)];
/// Units: text, name and signature.
const UNIT: &[Weighted] = &[(3, 1.0), (4, 0.5)];

/// A scored place.
pub(super) struct Scored<'l> {
    pub(super) record: &'l Record,
    /// The place of a unit in [`Record::units`]; 0 for files.
    pub(super) unit: usize,
    pub(super) score: f64,
}

/// Every file that has one of the terms, best first.
pub(super) fn files<'l>(loaded: &'l Loaded, terms: &[String]) -> Result<Vec<Scored<'l>>, TantivyError> {
    scores(loaded, terms, FILE, loaded.catalog.files.len(), false)
}

/// Every unit that has one of the terms, best first.
///
/// Tests that stand beside the source count for less, as files of tests do; see [`Record::unit_weight`].
pub(super) fn units<'l>(loaded: &'l Loaded, terms: &[String], about: About) -> Result<Vec<Scored<'l>>, TantivyError> {
    let mut scored = scores(loaded, terms, UNIT, loaded.catalog.units, true)?;
    for one in &mut scored {
        let file = one.record.kind.weight(about);
        one.score *= one.record.unit_weight(one.unit, about) / file;
    }
    sort(&mut scored);
    Ok(scored)
}

fn scores<'l>(
    loaded: &'l Loaded,
    terms: &[String],
    fields: &[Weighted],
    count: usize,
    of_units: bool,
) -> Result<Vec<Scored<'l>>, TantivyError> {
    let segments = loaded.searcher.segment_readers();
    let mut sums: Vec<HashMap<u32, f64>> = vec![HashMap::new(); segments.len()];
    // Sums are taken in the order of fields and terms, so that they are the same to the last bit.
    for (place, weight) in fields {
        let field = loaded.fields.ranked()[*place];
        let average = (loaded.totals[*place] as f64 / count.max(1) as f64).max(f64::MIN_POSITIVE);
        for text in terms {
            let term = Term::from_field_text(field, text);
            let mut found: Vec<(usize, u32, u32, u32)> = Vec::new();
            for (number, segment) in segments.iter().enumerate() {
                let postings = segment.inverted_index(field)?.read_postings(&term, IndexRecordOption::WithFreqs)?;
                let Some(mut postings) = postings else { continue };
                let norms = segment.get_fieldnorms_reader(field)?;
                while postings.doc() != TERMINATED {
                    let document = postings.doc();
                    if !segment.is_deleted(document) {
                        found.push((number, document, postings.term_freq(), norms.fieldnorm(document)));
                    }
                    postings.advance();
                }
            }
            let (all, having) = (count as f64, found.len() as f64);
            let rarity = (1.0 + ((all - having).max(0.0) + 0.5) / (having + 0.5)).ln();
            for (number, document, frequency, length) in found {
                let frequency = f64::from(frequency);
                let part = frequency * (K1 + 1.0) / (frequency + K1 * (1.0 - B + B * f64::from(length) / average));
                *sums[number].entry(document).or_default() += weight * rarity * part;
            }
        }
    }
    let mut scored = Vec::new();
    for (segment, sums) in segments.iter().zip(sums) {
        let (ids, numbers) = (segment.fast_fields().u64("id")?, segment.fast_fields().u64("unit")?);
        for (document, score) in sums {
            let record = ids.first(document).and_then(|id| loaded.catalog.by_id(id));
            let number = numbers.first(document).and_then(|number| usize::try_from(number).ok());
            if let (Some(record), Some(number)) = (record, number)
                && (number > 0) == of_units
            {
                scored.push(Scored { record, unit: number.saturating_sub(1), score });
            }
        }
    }
    sort(&mut scored);
    Ok(scored)
}

fn sort(scored: &mut [Scored<'_>]) {
    scored.sort_by(|a, b| {
        let by_place = || (&a.record.path, a.unit).cmp(&(&b.record.path, b.unit));
        b.score.total_cmp(&a.score).then_with(by_place)
    });
}
