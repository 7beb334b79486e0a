//! Checks of what the document carries for others: JSON Schemas, prompt files, models.

use crate::{
    diagnostic::{Severity, Sink, Span, suggestion},
    document::{Content, Node},
    read::Fields,
};
use loopwright_engine::definition::{Bundle, Template, template};
use serde_json::Value;
use std::path::Path;

/// Parts a prompt file into system and user text. The same text as `SPLIT` of the activities' `tools::prompt`, which
/// this crate may not depend on: the two parts are rendered as templates of their own.
const PROMPT_SPLIT: &str = "\n=== user ===\n";
/// Where prompts lie in a bundle; the part of the path that an author may leave out.
const PROMPT_FOLDER: &str = "prompts/";
const PROVIDERS: &[&str] = &["gemini", "openrouter", "openai_compatible", "rehearsed"];
const ROLES: &[&str] = &["architect", "implementer", "utility"];

/// Whether `schema`, written at `node`, is a JSON Schema that values can be checked against.
pub(crate) fn schema(schema: &Value, node: &Node, what: &str, sink: &mut Sink) -> bool {
    let Err(error) = jsonschema::validator_for(schema) else { return true };
    // A schema that violates its own schema is the instance there: the pointer leads into it.
    let at = node.at(&error.instance_path().to_string()).unwrap_or(node);
    let text: String = error.to_string().chars().take(300).collect();
    let message = format!("{what} is not a usable JSON Schema: {text}");
    let help = "for example `{ type: string, maxLength: 200 }`; references lead only into the schema itself";
    sink.error_help("WF621", at.span, &at.path, message, help);
    false
}

/// Syntax of every prompt file. Which names it may read is the business of the activity that renders it.
pub(crate) fn prompts(files: &Bundle, sink: &mut Sink) {
    for (path, source) in files.iter().filter(|(path, _)| path.ends_with(".hbs")) {
        // As its author opens it: beside the document.
        let file = Path::new(&sink.file).parent().unwrap_or(Path::new("")).join(path).display().to_string();
        let (first, second) = match source.split_once(PROMPT_SPLIT) {
            Some((system, user)) => (system, Some((user, system.matches('\n').count() + 2))),
            None => (source.as_str(), None),
        };
        for (text, lines_before) in std::iter::once((first, 0)).chain(second) {
            let Err(error) = template::check(&Template(text.to_owned())) else { continue };
            let line = error.line.saturating_add(u32::try_from(lines_before).unwrap_or(u32::MAX));
            let column = error.column.max(1);
            let span = Span { line, column, end_line: line, end_column: column.saturating_add(1) };
            let shown = source.split('\n').nth(line.saturating_sub(1) as usize).unwrap_or_default();
            sink.error_in(&file, shown, "WF311", span, format!("template: {}", error.message));
        }
    }
}

/// A prompt that names a file must name one of the bundle. What is no file name is the prompt itself.
pub(crate) fn prompt_file(name: &str, node: &Node, files: &Bundle, sink: &mut Sink) {
    let name = name.trim();
    // An expression gives the name only in a run.
    let is_file = name.ends_with(".hbs") && !name.contains(char::is_whitespace) && !name.contains("${{");
    if !is_file || files.contains_key(name) || files.contains_key(&format!("{PROMPT_FOLDER}{name}")) {
        return;
    }
    let short = |path: &'_ str| path.strip_prefix(PROMPT_FOLDER).unwrap_or(path).to_owned();
    let names: Vec<String> = files.keys().map(|path| short(path)).collect();
    let help = match suggestion(&short(name), names.iter().map(String::as_str)) {
        Some(like) => format!("did you mean `{like}`?"),
        None if names.is_empty() => format!("write the file `{PROMPT_FOLDER}{}` beside the document", short(name)),
        None => format!("there are {}", names.join(", ")),
    };
    let message = format!("there is no prompt file `{name}`");
    sink.add("WF801", Severity::Error, node.span, &node.path, message, Some(help));
}

/// Models that the document names for its roles: lists of `<provider>/<model>`.
pub(crate) fn models(node: &Node, sink: &mut Sink) {
    let Some(roles) = Fields::new(node, "`models`", ROLES, sink) else { return };
    for list in ROLES.iter().filter_map(|role| roles.get(role)) {
        let items = match &list.kind {
            Content::List(items) if !items.is_empty() => items,
            _ => {
                let message = format!("expected a list of `<provider>/<model>`, found {}", list.type_name());
                sink.error("WF701", list.span, &list.path, message);
                continue;
            }
        };
        for item in items {
            let value = item.value();
            let named = value.as_str().and_then(|text| text.split_once('/'));
            match named {
                Some((provider, model)) if PROVIDERS.contains(&provider) && !model.is_empty() => {}
                Some((provider, _)) if !PROVIDERS.contains(&provider) => {
                    let help = suggestion(provider, PROVIDERS.iter().copied()).map_or_else(
                        || format!("there are {}", PROVIDERS.join(", ")),
                        |s| format!("did you mean `{s}`?"),
                    );
                    sink.error_help("WF701", item.span, &item.path, format!("unknown provider `{provider}`"), help);
                }
                _ => sink.error("WF701", item.span, &item.path, "a model is named `<provider>/<model>`"),
            }
        }
    }
}
