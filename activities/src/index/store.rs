//! The folder of an index: a tantivy index that holds everything, so that one commit changes everything or nothing.
//!
//! Nothing in it is the only copy of anything: whatever is damaged or of another format is thrown away and built anew.

use super::{
    IndexError,
    catalog::{Catalog, Record},
    extract,
    tokenize::CodeTokenizer,
};
use std::path::{Path, PathBuf};
use tantivy::{
    IndexReader, IndexWriter, ReloadPolicy, Searcher, TantivyDocument, TantivyError, Term,
    directory::error::LockError,
    indexer::LogMergePolicy,
    schema::{FAST, Field, INDEXED, IndexRecordOption, STORED, Schema, TextFieldIndexing, TextOptions, Value as _},
};
use uuid::Uuid;

/// The format of records and documents. Raise it when a change of any of this folder's files (extraction, tokens, units,
/// path kinds, schema) makes old entries differ from what a fresh index would hold.
const FORMAT: &str = "loopwright-index-1";
/// The folder inside the caller's that is ours to delete.
const FOLDER: &str = "text";
/// Memory of a writing thread; tantivy asks for at least 15 MB.
const WRITER_BYTES: usize = 32 << 20;
/// Changed files from which a second writing thread is worth its segment.
const MANY_FILES: usize = 300;
/// Part of deleted documents from which a segment is rewritten.
const DELETED_MAX: f32 = 0.3;

/// The fields of a document.
#[derive(Clone, Copy)]
pub(super) struct Fields {
    /// The file's number, on all of its documents.
    pub(super) id: Field,
    /// 0 on the document of the file, n on that of its n-th unit.
    pub(super) unit: Field,
    pub(super) body: Field,
    pub(super) path: Field,
    pub(super) defs: Field,
    pub(super) code: Field,
    pub(super) sig: Field,
    pub(super) text: Field,
    pub(super) record: Field,
}

impl Fields {
    /// The fields that are scored, in the order of [`Loaded::totals`].
    pub(super) fn ranked(&self) -> [Field; 5] {
        [self.body, self.path, self.defs, self.code, self.sig]
    }
}

fn schema() -> (Schema, Fields) {
    let mut schema = Schema::builder();
    let words = TextOptions::default().set_indexing_options(
        TextFieldIndexing::default().set_tokenizer("code").set_index_option(IndexRecordOption::WithFreqs),
    );
    let fields = Fields {
        id: schema.add_u64_field("id", INDEXED | FAST),
        unit: schema.add_u64_field("unit", FAST),
        body: schema.add_text_field("body", words.clone()),
        path: schema.add_text_field("path", words.clone()),
        defs: schema.add_text_field("defs", words.clone()),
        code: schema.add_text_field("code", words.clone()),
        sig: schema.add_text_field("sig", words),
        text: schema.add_text_field("text", STORED),
        record: schema.add_bytes_field("record", STORED),
    };
    (schema.build(), fields)
}

/// An open index as of one commit.
pub(super) struct Loaded {
    index: tantivy::Index,
    reader: IndexReader,
    pub(super) fields: Fields,
    pub(super) searcher: Searcher,
    pub(super) catalog: Catalog,
    /// Words in all files or units, by field: body, path, defs, code, sig.
    pub(super) totals: [u64; 5],
    /// The mark of the commit; another one on disk means that somebody else wrote.
    generation: Option<String>,
}

fn damaged(what: impl Into<String>) -> TantivyError {
    TantivyError::InternalError(what.into())
}

impl Loaded {
    /// Opens what is in the folder `dir`, or begins anew if that is nothing, damaged or of another format.
    ///
    /// # Errors
    /// `index.disk`, `index.full_text`: not even an empty index can be made.
    pub(super) fn open(dir: &Path) -> Result<Self, IndexError> {
        let folder = dir.join(FOLDER);
        if folder.exists() {
            match Self::read(&folder) {
                Ok(loaded) => return Ok(loaded),
                Err(error) => tracing::warn!(%error, "the code index cannot be read and is built anew"),
            }
        }
        Self::create(dir)
    }

    /// An empty index in place of whatever is there.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn create(dir: &Path) -> Result<Self, IndexError> {
        let folder = dir.join(FOLDER);
        let disk = |source| IndexError::Disk { path: folder.clone(), source };
        match std::fs::symlink_metadata(&folder) {
            Ok(about) if about.is_dir() => std::fs::remove_dir_all(&folder).map_err(disk)?,
            Ok(_) => std::fs::remove_file(&folder).map_err(disk)?,
            Err(_) => {}
        }
        std::fs::create_dir_all(&folder).map_err(disk)?;
        tantivy::Index::create_in_dir(&folder, schema().0)?;
        Ok(Self::read(&folder)?)
    }

    fn read(folder: &PathBuf) -> Result<Self, TantivyError> {
        let index = tantivy::Index::open_in_dir(folder)?;
        let (schema, fields) = schema();
        if index.schema() != schema {
            return Err(damaged("it has another schema"));
        }
        let damage = index.validate_checksum()?;
        if !damage.is_empty() {
            return Err(damaged(format!("{} files are damaged", damage.len())));
        }
        // The check above goes by a list of files that may itself be damaged and still be readable.
        for file in index.load_metas()?.list_segment_files() {
            if folder.join(&file).exists() && !index.directory().validate_checksum(&file)? {
                return Err(damaged(format!("{} is damaged", file.display())));
            }
        }
        // Tokenizers are not stored.
        index.tokenizers().register("code", CodeTokenizer);
        let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).num_warming_threads(0).try_into()?;
        let searcher = reader.searcher();
        let mut loaded =
            Self { index, reader, fields, searcher, catalog: Catalog::default(), totals: [0; 5], generation: None };
        loaded.load()?;
        Ok(loaded)
    }

    /// Reads the catalog of the last commit.
    fn load(&mut self) -> Result<(), TantivyError> {
        self.reader.reload()?;
        self.searcher = self.reader.searcher();
        self.generation = self.on_disk()?;
        match &self.generation {
            Some(generation) if generation.starts_with(&format!("{FORMAT} ")) => {}
            None if self.searcher.num_docs() == 0 => {}
            _ => return Err(damaged("it has another format")),
        }
        let mut catalog = Catalog::default();
        for segment in self.searcher.segment_readers() {
            let store = segment.get_store_reader(1)?;
            for document in store.iter::<TantivyDocument>(segment.alive_bitset()) {
                let document = document?;
                if let Some(record) = document.get_first(self.fields.record).and_then(|value| value.as_bytes()) {
                    let mut record: Record = serde_json::from_slice(record)
                        .map_err(|error| damaged(format!("a record is unreadable: {error}")))?;
                    let text =
                        document.get_first(self.fields.text).and_then(|value| value.as_str()).unwrap_or_default();
                    record.uses =
                        record.lang.filter(|lang| lang.is_code()).map(|_| extract::uses(text)).unwrap_or_default();
                    if catalog.files.contains_key(record.path.as_str()) || catalog.by_id(record.id).is_some() {
                        return Err(damaged("a file is in it twice"));
                    }
                    catalog.insert(record);
                }
            }
        }
        if self.searcher.num_docs() != (catalog.files.len() + catalog.units) as u64 {
            return Err(damaged("documents are missing"));
        }
        self.catalog = catalog;
        self.count()
    }

    fn on_disk(&self) -> Result<Option<String>, TantivyError> {
        Ok(self.index.load_metas()?.payload)
    }

    /// Whether the folder still holds the commit that is open here.
    pub(super) fn is_current(&self) -> Result<bool, TantivyError> {
        Ok(self.on_disk()? == self.generation)
    }

    pub(super) fn segments(&self) -> usize {
        self.searcher.segment_readers().len()
    }

    /// The text of a file; empty if it has none.
    pub(super) fn text(&self, id: u64) -> Result<String, TantivyError> {
        let term = Term::from_field_u64(self.fields.id, id);
        for segment in self.searcher.segment_readers() {
            let Some(mut postings) =
                segment.inverted_index(self.fields.id)?.read_postings(&term, IndexRecordOption::Basic)?
            else {
                continue;
            };
            let unit = segment.fast_fields().u64("unit")?;
            use tantivy::{DocSet as _, TERMINATED};
            while postings.doc() != TERMINATED {
                if unit.first(postings.doc()) == Some(0) && !segment.is_deleted(postings.doc()) {
                    let document: TantivyDocument = segment.get_store_reader(1)?.get(postings.doc())?;
                    let text = document.get_first(self.fields.text).and_then(|value| value.as_str());
                    return Ok(text.unwrap_or_default().to_owned());
                }
                postings.advance();
            }
        }
        Ok(String::new())
    }

    /// Begins a change. Nothing of it is seen before [`Change::commit`], by anybody.
    ///
    /// # Errors
    /// `index.busy`: another process writes, or has written since this one read.
    pub(super) fn change(&self, files: usize) -> Result<Change, IndexError> {
        let threads = if files >= MANY_FILES { 2 } else { 1 };
        let writer = match self.index.writer_with_num_threads(threads, WRITER_BYTES * threads) {
            Err(TantivyError::LockFailure(LockError::LockBusy, _)) => return Err(IndexError::Busy),
            writer => writer?,
        };
        // Under the lock: nobody can write between this look and the commit.
        if !self.is_current()? {
            return Err(IndexError::Busy);
        }
        let mut policy = LogMergePolicy::default();
        policy.set_del_docs_ratio_before_merge(DELETED_MAX);
        writer.set_merge_policy(Box::new(policy));
        Ok(Change { writer, fields: self.fields })
    }

    /// Makes a commit visible here.
    pub(super) fn follow(&mut self, generation: String) -> Result<(), TantivyError> {
        self.reader.reload()?;
        self.searcher = self.reader.searcher();
        self.generation = Some(generation);
        self.count()
    }

    /// Counts the words of what is there. What tantivy counts includes what was deleted, so that the same files would score
    /// differently by their history.
    fn count(&mut self) -> Result<(), TantivyError> {
        self.totals = [0; 5];
        for segment in self.searcher.segment_readers() {
            for (total, field) in self.totals.iter_mut().zip(self.fields.ranked()) {
                let norms = segment.get_fieldnorms_reader(field)?;
                *total += segment.doc_ids_alive().map(|document| u64::from(norms.fieldnorm(document))).sum::<u64>();
            }
        }
        Ok(())
    }
}

/// A change that is not visible yet; dropping it undoes it.
pub(super) struct Change {
    writer: IndexWriter,
    fields: Fields,
}

impl Change {
    /// Takes a file's documents out.
    pub(super) fn remove(&self, id: u64) {
        self.writer.delete_term(Term::from_field_u64(self.fields.id, id));
    }

    /// Puts a file in.
    pub(super) fn add(&self, record: &Record, text: &str) -> Result<(), TantivyError> {
        let fields = self.fields;
        let mut file = TantivyDocument::default();
        file.add_u64(fields.id, record.id);
        file.add_u64(fields.unit, 0);
        file.add_text(fields.path, &record.path);
        file.add_text(fields.body, text);
        file.add_text(fields.defs, record.defs.iter().map(|def| def.name.as_str()).collect::<Vec<_>>().join(" "));
        file.add_text(fields.text, text);
        let json =
            serde_json::to_vec(record).map_err(|error| damaged(format!("a record cannot be written: {error}")))?;
        file.add_bytes(fields.record, &json);
        self.writer.add_document(file)?;

        let lines = Lines::of(text);
        for (number, unit) in (1u64..).zip(&record.units) {
            let mut document = TantivyDocument::default();
            document.add_u64(fields.id, record.id);
            document.add_u64(fields.unit, number);
            document.add_text(fields.code, lines.text(unit.start, unit.end));
            let sig = match unit.def.and_then(|ord| record.defs.get(ord as usize)) {
                Some(def) => format!("{} {} {}", def.name, def.parent.as_deref().unwrap_or_default(), def.signature),
                None => {
                    let within = record.defs.iter().filter(|def| (unit.start..=unit.end).contains(&def.start));
                    within.map(|def| def.name.as_str()).collect::<Vec<_>>().join(" ")
                }
            };
            document.add_text(fields.sig, sig);
            self.writer.add_document(document)?;
        }
        Ok(())
    }

    /// Makes the change durable, all of it at once, and gives its mark.
    pub(super) fn commit(mut self) -> Result<String, TantivyError> {
        let generation = format!("{FORMAT} {}", Uuid::new_v4());
        let mut prepared = self.writer.prepare_commit()?;
        prepared.set_payload(&generation);
        prepared.commit()?;
        // Merges go on in threads that a dropped writer would stop.
        self.writer.wait_merging_threads()?;
        Ok(generation)
    }
}

/// A text by lines.
pub(super) struct Lines<'t> {
    text: &'t str,
    /// Where each line starts, and the end.
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    pub(super) fn of(text: &'t str) -> Self {
        let mut starts = vec![0];
        starts.extend(text.match_indices('\n').map(|(at, _)| at + 1));
        if starts.last() != Some(&text.len()) {
            starts.push(text.len());
        }
        Self { text, starts }
    }

    /// Lines `start..=end`, 1-based, as far as there are any; with the last newline if there is one.
    pub(super) fn text(&self, start: u32, end: u32) -> &'t str {
        let at = |line: usize| self.starts.get(line).copied().unwrap_or(self.text.len());
        self.text.get(at((start as usize).saturating_sub(1))..at(end as usize)).unwrap_or_default()
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.starts.len() - 1).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_with_their_newlines() {
        let lines = Lines::of("a\nb\nc");
        assert_eq!((lines.count(), lines.text(1, 1), lines.text(2, 3), lines.text(3, 9)), (3, "a\n", "b\nc", "c"));
        assert_eq!((Lines::of("").count(), Lines::of("a\n").count(), Lines::of("").text(1, 5)), (0, 1, ""));
        assert_eq!(lines.text(4, 9), "");
    }
}
