#![doc = include_str!("../README.md")]

mod bound;
mod check;
mod diagnostic;
mod document;
mod graph;
mod lower;
mod read;
mod scope;
mod steps;
mod trigger;

pub use diagnostic::{Diagnostic, FINDINGS_MAX, Severity, Span};
pub use document::BYTES_MAX;
pub use graph::mermaid;
pub use read::parse_duration;
pub use trigger::schedules;

use loopwright_engine::{
    definition::{Bundle, Definition},
    signature::Catalog,
};

/// A workflow that may be deployed.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub definition: Definition,
    /// The prompt files that go with it; part of its hash.
    pub bundle: Bundle,
}

/// Compiles a document.
///
/// `file` is the name for messages, `files` the prompt files beside the document by relative path, `catalog` the
/// activities that exist. Pure: reads no file, knows no clock.
/// # Shape
/// All findings at once, in order of their places, those of prompt files last; at most [`FINDINGS_MAX`], errors before
/// others, and then one that says how many more there are. `Some` iff none of them is an error.
#[must_use]
pub fn compile(source: &str, file: &str, files: &Bundle, catalog: &Catalog) -> (Option<Compiled>, Vec<Diagnostic>) {
    let mut sink = diagnostic::Sink::new(file);
    let definition =
        document::parse(source, &mut sink).and_then(|root| lower::document(&root, files, catalog, &mut sink));
    check::prompts(files, &mut sink);
    let blocked = sink.has_errors();
    let found = sink.finish();
    let compiled = definition.filter(|_| !blocked).map(|definition| {
        let bundle = files.iter().filter(|(path, _)| path.starts_with("prompts/")).map(|(p, t)| (p.clone(), t.clone()));
        Compiled { definition, bundle: bundle.collect() }
    });
    (compiled, found)
}

/// All findings as text, one after the other.
#[must_use]
pub fn render(diagnostics: &[Diagnostic], source: &str) -> String {
    diagnostics.iter().map(|d| d.render(source)).collect()
}
