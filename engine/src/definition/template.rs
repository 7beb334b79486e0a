//! Handlebars in its cage: prose for people and models.
//!
//! Strict (a missing name is an error), without HTML escaping, without partials, output capped. `each` may be nested twice.

use super::Template;
use crate::failure::Failure;
use handlebars::{
    Handlebars, Output, Template as Parsed,
    template::{HelperTemplate, Parameter, TemplateElement},
};
use serde_json::Value;
use std::{io, sync::LazyLock};

/// Longest source, in bytes.
pub const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Longest rendered text, in bytes.
pub const OUTPUT_BYTES_MAX: usize = 256 << 10;
/// `each` inside `each`: two rounds over 1,000 items are a million.
pub const EACH_NESTING_MAX: usize = 2;

/// Why a template is not accepted; the place is 1-based inside the template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TemplateError {
    pub message: String,
    pub line: u32,
    pub column: u32,
}

static REGISTRY: LazyLock<Handlebars<'static>> = LazyLock::new(|| {
    let mut registry = Handlebars::new();
    registry.set_strict_mode(true);
    registry.register_escape_fn(handlebars::no_escape);
    registry.set_recursive_lookup(false);
    registry.register_helper(
        "json",
        Box::new(
            |h: &handlebars::Helper<'_>,
             _: &Handlebars<'_>,
             _: &handlebars::Context,
             _: &mut handlebars::RenderContext<'_, '_>,
             out: &mut dyn Output|
             -> handlebars::HelperResult {
                let value = h.param(0).map_or(&Value::Null, |p| p.value());
                let text = serde_json::to_string_pretty(value)
                    .map_err(|e| handlebars::RenderErrorReason::Other(e.to_string()))?;
                Ok(out.write(&text)?)
            },
        ),
    );
    registry
});

/// Parses a template and lists the paths it reads (`["steps", "plan", "output"]`), loop-relative ones excluded.
///
/// # Errors
/// A syntax error with its place, an unknown helper, a partial, or `each` nested too deep.
pub fn check(template: &Template) -> Result<Vec<Vec<String>>, TemplateError> {
    let whole = |message: String| TemplateError { message, line: 1, column: 1 };
    if template.0.len() > SOURCE_BYTES_MAX {
        return Err(whole(format!("longer than {SOURCE_BYTES_MAX} bytes")));
    }
    let parsed = Parsed::compile(&template.0).map_err(|e| {
        let (line, column) = e.pos().unwrap_or((1, 1));
        TemplateError {
            message: plain_message(&e.reason().to_string()),
            line: u32::try_from(line).unwrap_or(1),
            column: u32::try_from(column).unwrap_or(1),
        }
    })?;
    let mut paths = Vec::new();
    survey(&parsed, 0, false, &mut paths).map_err(whole)?;
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// The parser's wording is its generator's: a list of grammar rules says nothing to an author.
fn plain_message(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let said = line.split(": expected ").next().unwrap_or(line).trim_end_matches(':').trim();
    if said.is_empty() { "not a template".to_owned() } else { said.to_owned() }
}

/// Renders a template over `data`, an object of root names.
///
/// # Errors
/// `template.missing` (a name does not exist), `template.size`, `template.syntax`.
pub fn render(template: &Template, data: &Value) -> Result<String, Failure> {
    check(template).map_err(|e| Failure::permanent("template.syntax", e.message))?;
    let mut out = Capped(Vec::new());
    match REGISTRY.render_template_to_write(&template.0, data, &mut out) {
        Ok(()) => String::from_utf8(out.0).map_err(|e| Failure::permanent("template.syntax", e.to_string())),
        Err(_) if out.0.len() >= OUTPUT_BYTES_MAX => {
            Err(Failure::permanent("template.size", format!("renders to more than {OUTPUT_BYTES_MAX} bytes")))
        }
        Err(error) => Err(Failure::permanent(
            "template.missing",
            error.to_string().lines().next().unwrap_or("cannot be rendered").to_owned(),
        )),
    }
}

/// A writer that fails when it is full, because rendering cannot be interrupted otherwise.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let room = OUTPUT_BYTES_MAX.saturating_sub(self.0.len());
        self.0.extend_from_slice(&buf[..buf.len().min(room)]);
        if buf.len() > room { Err(io::Error::other("output limit")) } else { Ok(buf.len()) }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const HELPERS: &[&str] = &[
    "if", "unless", "each", "with", "lookup", "json", "eq", "ne", "gt", "gte", "lt", "lte", "and", "or", "not", "len",
];

fn survey(template: &Parsed, each: usize, inside: bool, paths: &mut Vec<Vec<String>>) -> Result<(), String> {
    for element in &template.elements {
        match element {
            TemplateElement::RawString(_) | TemplateElement::Comment(_) => {}
            TemplateElement::Expression(h) | TemplateElement::HtmlExpression(h) => {
                if h.params.is_empty() && h.hash.is_empty() {
                    parameter(&h.name, inside, paths)?;
                } else {
                    helper(h, each, inside, paths)?;
                }
            }
            TemplateElement::HelperBlock(h) => helper(h, each, inside, paths)?,
            TemplateElement::PartialExpression(_) | TemplateElement::PartialBlock(_) => {
                return Err("partials are not part of this language".into());
            }
            TemplateElement::DecoratorExpression(_) | TemplateElement::DecoratorBlock(_) => {
                return Err("decorators are not part of this language".into());
            }
            _ => return Err("this construct is not part of this language".into()),
        }
    }
    Ok(())
}

fn helper(h: &HelperTemplate, each: usize, inside: bool, paths: &mut Vec<Vec<String>>) -> Result<(), String> {
    let name = match &h.name {
        Parameter::Name(name) => name.clone(),
        Parameter::Path(path) => path_text(path),
        _ => return Err("a helper needs a name".into()),
    };
    if !HELPERS.contains(&name.as_str()) {
        return Err(format!("unknown helper `{name}`; there are {}", HELPERS.join(", ")));
    }
    for p in h.params.iter().chain(h.hash.values()) {
        parameter(p, inside, paths)?;
    }
    let each = each + usize::from(name == "each");
    if each > EACH_NESTING_MAX {
        return Err(format!("`each` nested deeper than {EACH_NESTING_MAX}"));
    }
    // Inside `each` and `with` plain names are relative to the item.
    let relative = inside || name == "each" || name == "with";
    if let Some(t) = &h.template {
        survey(t, each, relative, paths)?;
    }
    if let Some(t) = &h.inverse {
        survey(t, each, inside, paths)?;
    }
    Ok(())
}

fn parameter(p: &Parameter, inside: bool, paths: &mut Vec<Vec<String>>) -> Result<(), String> {
    match p {
        Parameter::Name(name) if !inside => paths.push(name.split('.').map(str::to_owned).collect()),
        Parameter::Path(path) if !inside => {
            let text = path_text(path);
            if !text.starts_with(['@', '.']) && text != "this" {
                paths.push(text.split(['.', '/']).map(str::to_owned).collect());
            }
        }
        Parameter::Subexpression(sub) => {
            if let TemplateElement::Expression(h) = sub.element.as_ref() {
                helper(h, 0, inside, paths)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn path_text(path: &handlebars::Path) -> String {
    match path {
        handlebars::Path::Relative((_, raw)) | handlebars::Path::Local((_, _, raw)) => raw.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn show(source: &str) -> Result<String, String> {
        let data = json!({"steps": {"ask": {"output": {"question": "Which <db>?", "options": ["a", "b"]}}}});
        render(&Template(source.into()), &data).map_err(|f| f.code)
    }

    #[test]
    fn renders_without_escaping() {
        assert_eq!(show("Q: {{steps.ask.output.question}}"), Ok("Q: Which <db>?".into()));
        assert_eq!(show("{{#each steps.ask.output.options}}{{@index}}={{this}};{{/each}}"), Ok("0=a;1=b;".into()));
        assert_eq!(show("{{#if (eq steps.ask.output.question \"x\")}}1{{else}}2{{/if}}"), Ok("2".into()));
    }

    #[test]
    fn failures_have_codes() {
        assert_eq!(show("{{steps.nothing.x}}"), Err("template.missing".into()));
        assert_eq!(show("{{#if}}"), Err("template.syntax".into()));
        assert_eq!(show("{{> other}}"), Err("template.syntax".into()));
        assert_eq!(show("{{shout x}}"), Err("template.syntax".into()));
        let many = json!({"l": vec![0; 1000]});
        let huge = Template("{{#each l}}{{#each ../l}}xxxxxxxxxx{{/each}}{{/each}}".into());
        assert_eq!(render(&huge, &many).map_err(|f| f.code), Err("template.size".into()));
    }

    #[test]
    fn paths_are_listed_also_under_if() {
        let paths =
            check(&Template("{{#if inputs.a}}{{steps.b.output}}{{/if}}{{#each inputs.c}}{{name}}{{/each}}".into()));
        assert_eq!(paths.expect("valid"), vec![vec!["inputs", "a"], vec!["inputs", "c"], vec!["steps", "b", "output"]]);
    }
}
