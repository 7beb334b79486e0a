//! Applying a call's edits to a view in memory.

use super::{
    EDITS_MAX, Edit, EditError, FILE_BYTES_MAX, Frozen, Reason,
    matching::{self, Outcome},
    path, syntax,
};
use crate::workspace::FileChange;
use loopwright_engine::{Failure, FailureKind};
use std::collections::BTreeMap;

/// What a call of edits comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Files whose content would change, by path; each at most once.
    pub changes: Vec<FileChange>,
    /// 0-based positions of edits that the tree already reflected.
    pub already: Vec<usize>,
    /// What a rough grammar complained of and was let pass.
    pub doubts: Vec<String>,
}

/// Reads a file of the tree under edit: `None` where there is none.
pub type Read<'r> = dyn Fn(&str) -> Result<Option<String>, Failure> + 'r;

/// The changes that `edits` come to, all or none.
///
/// # Errors
/// The first edit that cannot be applied, as [`plan`].
pub fn apply(read: &Read<'_>, edits: &[Edit]) -> Result<Vec<FileChange>, EditError> {
    plan(read, edits, &Frozen::default(), &|_| false).map(|plan| plan.changes)
}

/// The changes that `edits` come to, all or none, applied in order to a view in memory.
///
/// `lenient` may let a path pass whose grammar is only [`syntax::Trust::Rough`]: a file that the grammar cannot read
/// for a reason of its own would otherwise be out of reach.
/// # Shape
/// Changes are ordered by path; an edit that is already in place causes none.
/// # Errors
/// The first edit that cannot be applied: unusable or frozen path, a block that is missing or ambiguous, a result
/// that is too large or does not parse where it parsed before. Nothing is written here in any case.
pub fn plan(
    read: &Read<'_>,
    edits: &[Edit],
    frozen: &Frozen,
    lenient: &dyn Fn(&str) -> bool,
) -> Result<Plan, EditError> {
    let whole = |reason| EditError { index: None, path: String::new(), reason };
    if edits.is_empty() {
        return Err(whole(Reason::NoEdits));
    }
    if edits.len() > EDITS_MAX {
        return Err(whole(Reason::TooMany(edits.len())));
    }
    let mut view = View { read, files: BTreeMap::new() };
    let mut already = Vec::new();
    for (index, edit) in edits.iter().enumerate() {
        let refuse = |reason| EditError { index: Some(index), path: edit.path().to_owned(), reason };
        let path = path::normal(edit.path()).map_err(|e| refuse(Reason::Path(e)))?;
        if frozen.contains(&path) {
            return Err(refuse(Reason::Frozen));
        }
        if !view.step(&path, edit, index).map_err(refuse)? {
            already.push(index);
        }
    }
    let doubts = view.gate(edits, lenient)?;
    Ok(Plan { changes: view.changes(), already, doubts })
}

struct File {
    before: Option<String>,
    now: Option<String>,
    /// The last edit that changed it.
    edit: usize,
}

struct View<'r> {
    read: &'r Read<'r>,
    files: BTreeMap<String, File>,
}

impl View<'_> {
    fn load(&mut self, path: &str) -> Result<&mut File, Reason> {
        if !self.files.contains_key(path) {
            let before = (self.read)(path).map_err(|failure| Reason::Read(Box::new(failure)))?;
            if let Some(bytes) = before.as_ref().map(String::len).filter(|bytes| *bytes > FILE_BYTES_MAX) {
                return Err(Reason::TooLarge(bytes));
            }
            self.files.insert(path.to_owned(), File { now: before.clone(), before, edit: 0 });
        }
        Ok(self.files.get_mut(path).expect("inserted above when it was missing"))
    }

    /// Applies one edit; `false` when the view already reflected it.
    fn step(&mut self, path: &str, edit: &Edit, index: usize) -> Result<bool, Reason> {
        let now = self.load(path)?.now.clone();
        let next = match (edit, now) {
            (Edit::Write { content, .. }, now) if now.as_deref() == Some(content) => return Ok(false),
            (Edit::Write { content, .. }, now) => {
                if now.is_none() {
                    self.room_for(path)?;
                }
                Some(content.clone())
            }
            (Edit::Delete { .. }, None) => return Ok(false),
            (Edit::Delete { .. }, Some(_)) => None,
            // An empty block into a new or empty file is the usual way to say "write".
            (Edit::Replace { search, replace, .. }, now)
                if search.trim().is_empty() && now.as_deref().unwrap_or_default().trim().is_empty() =>
            {
                if now.is_none() {
                    self.room_for(path)?;
                }
                Some(replace.clone())
            }
            (Edit::Replace { .. }, None) => return Err(Reason::Missing),
            (Edit::Replace { search, replace, .. }, Some(now)) => match matching::replace(&now, search, replace)? {
                Outcome::Replaced(text) => Some(text),
                Outcome::Already => return Ok(false),
            },
        };
        if let Some(bytes) = next.as_ref().map(String::len).filter(|bytes| *bytes > FILE_BYTES_MAX) {
            return Err(Reason::TooLarge(bytes));
        }
        if next.as_ref().is_some_and(|text| text.contains('\0')) {
            return Err(Reason::Binary);
        }
        let file = self.load(path)?;
        file.now = next;
        file.edit = index;
        Ok(true)
    }

    /// A new file needs folders above it, not files, and must not be a folder of this call's own files.
    fn room_for(&mut self, path: &str) -> Result<(), Reason> {
        for (at, _) in path.match_indices('/') {
            let above = &path[..at];
            match self.load(above) {
                Ok(file) if file.now.is_none() => {}
                Ok(_) | Err(Reason::TooLarge(_)) => return Err(Reason::Occupied(above.to_owned())),
                // A folder need not be readable as a file.
                Err(Reason::Read(failure)) if failure.kind == FailureKind::Permanent => {}
                Err(other) => return Err(other),
            }
        }
        let below = format!("{path}/");
        match self.files.iter().find(|(other, file)| other.starts_with(&below) && file.now.is_some()) {
            Some((other, _)) => Err(Reason::Occupied(other.clone())),
            None => Ok(()),
        }
    }

    /// Refuses results that do not parse where the file parsed before or is new.
    fn gate(&self, edits: &[Edit], lenient: &dyn Fn(&str) -> bool) -> Result<Vec<String>, EditError> {
        let mut doubts = Vec::new();
        for (path, file) in &self.files {
            let Some(now) = file.now.as_ref().filter(|now| file.before.as_ref() != Some(now)) else { continue };
            let Some(grammar) = syntax::grammar(path) else { continue };
            let Some(fault) = syntax::fault(&grammar, now) else { continue };
            if file.before.as_ref().is_some_and(|before| syntax::fault(&grammar, before).is_some()) {
                continue;
            }
            if grammar.trust == syntax::Trust::Rough && lenient(path) {
                doubts.push(format!("{path}, line {}: {}", fault.line, fault.what));
                continue;
            }
            let lines: Vec<&str> = now.lines().collect();
            let around = matching::numbered(&lines, fault.line.saturating_sub(4), (fault.line + 3).min(lines.len()));
            return Err(EditError {
                index: Some(file.edit),
                path: edits[file.edit].path().to_owned(),
                reason: Reason::Syntax { language: grammar.name, line: fault.line, what: fault.what, around },
            });
        }
        Ok(doubts)
    }

    fn changes(self) -> Vec<FileChange> {
        self.files
            .into_iter()
            .filter(|(_, file)| file.before != file.now)
            .map(|(path, file)| FileChange { path, content: file.now })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edit::path::PathError;
    use proptest::prelude::*;

    type Tree = BTreeMap<String, String>;

    fn tree(files: &[(&str, &str)]) -> Tree {
        files.iter().map(|(p, c)| ((*p).to_owned(), (*c).to_owned())).collect()
    }
    fn write(path: &str, content: &str) -> Edit {
        Edit::Write { path: path.into(), content: content.into() }
    }
    fn block(path: &str, search: &str, replace: &str) -> Edit {
        Edit::Replace { path: path.into(), search: search.into(), replace: replace.into() }
    }
    fn delete(path: &str) -> Edit {
        Edit::Delete { path: path.into() }
    }
    fn run(tree: &Tree, edits: &[Edit]) -> Result<Vec<(String, Option<String>)>, EditError> {
        let read = |path: &str| Ok(tree.get(path).cloned());
        apply(&read, edits).map(|changes| changes.into_iter().map(|c| (c.path, c.content)).collect())
    }
    fn reason(tree: &Tree, edits: &[Edit]) -> (Option<usize>, Reason) {
        let error = run(tree, edits).expect_err("refused");
        assert!(error.to_string().ends_with("Nothing was changed."), "{error}");
        (error.index, error.reason)
    }

    #[test]
    fn edits_of_one_call_see_each_other_and_come_out_once_per_file() {
        let tree = tree(&[("a.txt", "one\ntwo\n"), ("old.txt", "x")]);
        let changes = run(
            &tree,
            &[
                block("a.txt", "one\n", "ONE\n"),
                block("./a.txt", "ONE\n", "1\n"),
                write("new/b.txt", "b"),
                delete("old.txt"),
                write("back.txt", "y"),
                delete("back.txt"),
            ],
        );
        let expected = vec![
            ("a.txt".to_owned(), Some("1\ntwo\n".to_owned())),
            ("new/b.txt".to_owned(), Some("b".to_owned())),
            ("old.txt".to_owned(), None),
        ];
        assert_eq!(changes, Ok(expected));
    }

    #[test]
    fn what_is_already_so_is_success_without_a_change() {
        let tree = tree(&[("a.txt", "new line\n")]);
        let read = |path: &str| Ok(tree.get(path).cloned());
        let edits = [write("a.txt", "new line\n"), block("a.txt", "old line\n", "new line\n"), delete("gone.txt")];
        let plan = plan(&read, &edits, &Frozen::default(), &|_| false).expect("applies");
        assert_eq!((plan.changes.len(), plan.already), (0, vec![0, 1, 2]));
    }

    #[test]
    fn refusals_name_the_edit_and_the_cause() {
        let tree = tree(&[("a.py", "def f():\n    return 1\n"), ("dir", "file"), ("bad.py", "def f(:\n")]);
        let big = "x".repeat(FILE_BYTES_MAX + 1);
        assert_eq!(reason(&tree, &[]), (None, Reason::NoEdits));
        assert_eq!(reason(&tree, &vec![delete("z"); EDITS_MAX + 1]), (None, Reason::TooMany(EDITS_MAX + 1)));
        assert_eq!(reason(&tree, &[write("b", ""), write("../b", "")]), (Some(1), Reason::Path(PathError::Parent)));
        assert_eq!(reason(&tree, &[write("b", &big)]), (Some(0), Reason::TooLarge(FILE_BYTES_MAX + 1)));
        assert_eq!(reason(&tree, &[write("b", "\0")]), (Some(0), Reason::Binary));
        assert_eq!(reason(&tree, &[block("b", "x", "y")]), (Some(0), Reason::Missing));
        assert_eq!(reason(&tree, &[block("a.py", "", "y")]), (Some(0), Reason::EmptySearch));
        assert_eq!(reason(&tree, &[write("dir/b", "")]), (Some(0), Reason::Occupied("dir".into())));
        assert_eq!(reason(&tree, &[write("n/b", ""), write("n", "")]), (Some(1), Reason::Occupied("n/b".into())));
        let (index, syntax) = reason(&tree, &[write("ok.py", "x = 1\n"), block("a.py", "f():", "f(:")]);
        assert_eq!(index, Some(1));
        assert!(matches!(syntax, Reason::Syntax { language: "Python", line: 1, .. }), "{syntax:?}");
        // A file that was broken before may stay so: the edit may be one step of the repair.
        assert!(run(&tree, &[block("bad.py", "f(", "g(")]).is_ok());
        // Two edits may break and mend within one call.
        assert!(run(&tree, &[block("a.py", "f():", "f(:"), block("a.py", "f(:", "g():")]).is_ok());
    }

    #[test]
    fn frozen_files_and_folders_refuse_edits() {
        let frozen = Frozen::new(["TODO.md", "checks/", "../nonsense"]);
        let read = |_: &str| Ok(None);
        for path in ["TODO.md", "./TODO.md", "checks", "checks/a.sh"] {
            let error = plan(&read, &[write(path, "")], &frozen, &|_| false).expect_err("frozen");
            assert_eq!(error.reason, Reason::Frozen, "{path}");
        }
        assert!(plan(&read, &[write("checks2/a", "")], &frozen, &|_| false).is_ok());
    }

    #[test]
    fn leniency_reaches_rough_grammars_only() {
        let read = |_: &str| Ok(None);
        let odd = [write("a.h", "class X { Q_OBJECT public slots: void f(); ;;\n")];
        assert!(apply(&read, &odd).is_err());
        let plan_lenient = |edits: &[Edit]| plan(&read, edits, &Frozen::default(), &|_| true);
        assert_eq!(plan_lenient(&odd).expect("let pass").doubts.len(), 1);
        assert!(plan_lenient(&[write("a.json", "{")]).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_not_a_panic() {
        let read = |_: &str| Err(Failure::retryable("transient.store", "away"));
        let error = apply(&read, &[write("a/b", "")]).expect_err("unreadable");
        assert_eq!(error.failure().map(|f| f.code.as_str()), Some("transient.store"));
    }

    fn any_path() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => prop::sample::select(vec!["a.txt", "b.py", "c/d.json", "c", "c/e/f.rs"]).prop_map(str::to_owned),
            1 => prop::sample::select(vec!["../a", "/etc/x", ".git/x", "a\\b", "c/../../a", "", "."]).prop_map(str::to_owned),
            1 => "[a./~\\\\ü-]{0,12}",
        ]
    }
    fn any_text() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("x = 1\ny = 2\n".to_owned()),
            Just("{\"a\": 1}\n".to_owned()),
            Just("x = 1\n".to_owned()),
            "[ x=1(\n{}\"a]{0,24}",
            any::<String>(),
        ]
    }
    fn any_edit() -> impl Strategy<Value = Edit> {
        prop_oneof![
            (any_path(), any_text()).prop_map(|(path, content)| Edit::Write { path, content }),
            (any_path(), any_text(), any_text()).prop_map(|(path, search, replace)| Edit::Replace {
                path,
                search,
                replace
            }),
            any_path().prop_map(|path| Edit::Delete { path }),
        ]
    }

    proptest! {
        #[test]
        fn random_edits_apply_whole_or_not_at_all_and_never_leave_the_tree(
            edits in prop::collection::vec(any_edit(), 0..8),
            files in prop::collection::btree_map(
                prop::sample::select(vec!["a.txt", "b.py", "c/d.json"]).prop_map(str::to_owned), any_text(), 0..3),
        ) {
            let before = files.clone();
            let changes = run(&files, &edits);
            prop_assert_eq!(&before, &files);
            match changes {
                Err(error) => {
                    prop_assert!(error.index.is_none_or(|i| i < edits.len()));
                    prop_assert!(error.to_string().ends_with("Nothing was changed."));
                }
                Ok(changes) => {
                    for (path, content) in &changes {
                        prop_assert_eq!(path::normal(path), Ok(path.clone()));
                        prop_assert_ne!(files.get(path), content.as_ref());
                        let named = |e: &Edit| path::normal(e.path()).is_ok_and(|p| p == *path);
                        prop_assert!(edits.iter().any(named));
                    }
                    // Applying them one call at a time comes to the same tree unless the gate minds a step between.
                    let mut steps = files.clone();
                    let stepwise = edits.iter().all(|edit| match run(&steps, std::slice::from_ref(edit)) {
                        Ok(changes) => {
                            put(&mut steps, changes);
                            true
                        }
                        Err(_) => false,
                    });
                    let mut at_once = files.clone();
                    put(&mut at_once, changes);
                    if stepwise {
                        prop_assert_eq!(at_once, steps);
                    }
                }
            }
        }
    }

    fn put(tree: &mut Tree, changes: Vec<(String, Option<String>)>) {
        for (path, content) in changes {
            match content {
                Some(content) => tree.insert(path, content),
                None => tree.remove(&path),
            };
        }
    }
}
