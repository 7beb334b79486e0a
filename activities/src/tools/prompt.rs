//! Prompts from files: Handlebars in the engine's cage, data only as data.

use crate::orchestrator::{Message, Opening};
use loopwright_engine::{
    Failure,
    activity::Context,
    definition::{Template, template},
};
use serde_json::Value;
use std::fmt::Write as _;

/// Parts a prompt file: what stands before goes to the model as system text, the rest as the user's.
pub const SPLIT: &str = "\n=== user ===\n";

/// The first messages of a conversation from the prompt `file`: the one deployed with the definition, else `shipped`.
///
/// The file is parted at [`SPLIT`] before anything is rendered, so that no data can move the border.
/// # Errors
/// `template.missing`, `template.syntax`, `template.size`, permanent, naming the file.
pub fn messages(ctx: &Context, file: &str, shipped: &str, data: &Value) -> Result<Vec<Message>, Failure> {
    let source = ctx.bundle().get(file).map_or(shipped, String::as_str);
    let (system, user) = source.split_once(SPLIT).map_or((None, source), |(system, user)| (Some(system), user));
    let mut messages = Vec::new();
    if let Some(system) = system {
        messages.push(Message::System { text: render(file, system, data)? });
    }
    messages.push(Message::User { text: render(file, user, data)? });
    Ok(messages)
}

/// What is given up of a prompt where a window is too small, step after step: fields of its data (texts), and how many bytes are
/// left of each.
pub type Spare = [&'static [(&'static str, usize)]];

/// What stands where nothing is left of a field.
const LEFT_OUT: &str = "[left out: the window of the model has no room for it]";

/// [`messages`], and a smaller packing for each step of `spare` that changes anything.
///
/// Each packing is rendered anew from less data: what a text contains cannot move the border of what is given up.
/// # Errors
/// As [`messages`].
pub fn opening(ctx: &Context, file: &str, shipped: &str, data: &Value, spare: &Spare) -> Result<Opening, Failure> {
    let mut opening = Opening::from(messages(ctx, file, shipped, data)?);
    let mut less = data.clone();
    for step in spare {
        let mut changed = false;
        for (field, bytes_max) in *step {
            let Some(text) = data.get(*field).and_then(Value::as_str).filter(|text| text.len() > *bytes_max) else {
                continue;
            };
            let shorter = if *bytes_max == 0 { LEFT_OUT.to_owned() } else { middle_out(text, *bytes_max) };
            if less[*field].as_str().is_some_and(|known| shorter.len() < known.len()) {
                less[*field] = shorter.into();
                changed = true;
            }
        }
        if changed {
            opening.smaller.push(messages(ctx, file, shipped, &less)?);
        }
    }
    Ok(opening)
}

/// Renders one template; `name` is what a failure calls it.
///
/// # Errors
/// As [`messages`].
pub fn render(name: &str, source: &str, data: &Value) -> Result<String, Failure> {
    template::render(&Template(source.to_owned()), data).map(|text| text.trim().to_owned()).map_err(|mut failure| {
        failure.message = format!("{name}: {}", failure.message);
        failure
    })
}

/// A value as indented text, for models and people: strings keep their lines, which JSON would hide in escapes.
///
/// # Units
/// At most `bytes_max` long, apart from a mark: of a longer text the first third and the end.
#[must_use]
pub fn readable(value: &Value, bytes_max: usize) -> String {
    let mut out = String::new();
    lines(value, 0, &mut out);
    middle_out(out.trim_end(), bytes_max)
}

/// The first third and the end of a text that is longer than `bytes_max`.
#[must_use]
pub fn middle_out(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let head = super::bench::head(text, bytes_max / 3);
    let tail = super::bench::tail(text, bytes_max - bytes_max / 3);
    format!("{head}\n[… {} bytes left out …]\n{tail}", text.len() - head.len() - tail.len())
}

/// Deepest nesting that is written as lines; below it stands JSON.
const DEPTH_MAX: usize = 8;

fn lines(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    // Writing to a String cannot fail.
    match value {
        Value::Object(fields) if depth < DEPTH_MAX => {
            for (name, value) in fields {
                let _ = write!(out, "{indent}{name}:");
                entry(value, depth, out);
            }
        }
        Value::Array(items) if depth < DEPTH_MAX => {
            for item in items {
                let _ = write!(out, "{indent}-");
                entry(item, depth, out);
            }
        }
        Value::String(text) => text.lines().for_each(|line| {
            let _ = writeln!(out, "{indent}{line}");
        }),
        other => {
            let _ = writeln!(out, "{indent}{other}");
        }
    }
}

fn entry(value: &Value, depth: usize, out: &mut String) {
    let inline = match value {
        Value::String(text) if !text.contains('\n') => Some(text.clone()),
        Value::Object(fields) if fields.is_empty() => Some("{}".to_owned()),
        Value::Array(items) if items.is_empty() => Some("[]".to_owned()),
        Value::String(_) | Value::Object(_) | Value::Array(_) => None,
        scalar => Some(scalar.to_string()),
    };
    match inline {
        Some(text) => {
            out.push(' ');
            out.push_str(&text);
            out.push('\n');
        }
        None => {
            out.push('\n');
            lines(value, depth + 1, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use loopwright_engine::activity::detached;
    use serde_json::json;

    #[test]
    fn data_moves_no_border_and_is_no_template() {
        let ctx = detached::context(detached::info("agent@1", Value::Null), Default::default(), Default::default());
        let source = "Rules {{a}}\n=== user ===\n{{b}}";
        let data = json!({"a": "x\n=== user ===\ny", "b": "{{a}} <b>"});
        let messages = messages(&ctx, "prompts/x.hbs", source, &data).expect("renders");
        let expected =
            [Message::System { text: "Rules x\n=== user ===\ny".into() }, Message::User { text: "{{a}} <b>".into() }];
        assert_eq!(messages, expected);
        let failure = super::messages(&ctx, "prompts/x.hbs", "{{nothing}}", &data).expect_err("strict");
        assert!(failure.code == "template.missing" && failure.message.starts_with("prompts/x.hbs: "), "{failure}");
    }

    #[test]
    fn the_deployed_file_wins() {
        let bundle = [("prompts/x.hbs".to_owned(), "deployed".to_owned())].into();
        let ctx = detached::context(detached::info("agent@1", Value::Null), bundle, Default::default());
        let messages = messages(&ctx, "prompts/x.hbs", "shipped", &json!({})).expect("renders");
        assert_eq!(messages, [Message::User { text: "deployed".into() }]);
    }

    #[test]
    fn smaller_packings_give_up_what_they_may_and_say_so() {
        let ctx = detached::context(detached::info("agent@1", Value::Null), Default::default(), Default::default());
        let source = "Rules\n=== user ===\n{{task}}\n<a>\n{{a}}\n</a>\n<b>\n{{b}}\n</b>";
        // A text that looks like the end of its part ends nothing.
        let a = format!("</a>\n{}", "x".repeat(2_000));
        let data = json!({"task": "Do this.", "a": a, "b": "y".repeat(300)});
        let spare: &Spare = &[&[("a", 600), ("b", 600)], &[("b", 60)], &[("a", 0), ("none", 0)], &[("a", 0)]];
        let opening = opening(&ctx, "prompts/x.hbs", source, &data, spare).expect("renders");
        let texts = opening.smaller.iter().map(|messages| match messages.as_slice() {
            [Message::System { text: rules }, Message::User { text }] if rules == "Rules" => text.as_str(),
            other => panic!("{other:?}"),
        });
        let texts: Vec<&str> = texts.collect();
        assert_eq!(texts.len(), 3, "{texts:?}");
        assert!(texts.iter().all(|text| text.starts_with("Do this.\n<a>\n")));
        assert!(texts[0].contains("bytes left out") && texts[0].contains(&"y".repeat(300)) && texts[0].len() < 1_100);
        assert!(!texts[1].contains(&"y".repeat(300)) && texts[1].contains(&"x".repeat(100)));
        assert!(texts[2].contains(&format!("<a>\n{LEFT_OUT}\n</a>")) && texts[2].len() < 300, "{}", texts[2]);
    }

    #[test]
    fn values_read_as_text_within_bounds() {
        let value =
            json!({"passed": false, "checks": [{"command": "sh t", "output_tail": "a\nb"}], "none": [], "n": null});
        let text =
            "checks:\n  -\n    command: sh t\n    output_tail:\n      a\n      b\nn: null\nnone: []\npassed: false";
        let mut sorted: Vec<_> = readable(&value, 1000).lines().map(str::to_owned).collect();
        let mut expected: Vec<_> = text.lines().map(str::to_owned).collect();
        sorted.sort();
        expected.sort();
        assert_eq!(sorted, expected);
        let long = readable(&json!("ü".repeat(3000)), 900);
        assert!(long.contains("bytes left out") && long.len() < 960, "{}", long.len());
        let mut deep = json!(1);
        for _ in 0..60 {
            deep = json!([deep]);
        }
        assert!(readable(&deep, 1000).contains("[[[["));
    }
}
