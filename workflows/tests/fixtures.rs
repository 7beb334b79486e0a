//! Every fixture compiles, or gives exactly the findings that its trailing comments name.
//!
//! A file in `fixtures/err` says what it expects in lines `# expect: WF421@7:5` (code, line, column).

use loopwright_engine::{
    definition::{Bundle, Kind, Step},
    signature::{Catalog, Signature},
};
use loopwright_workflows::{FINDINGS_MAX, Severity, compile, mermaid, render};
use serde_json::{Value, json};
use std::{fs, path::Path};

fn catalog() -> Catalog {
    let text = json!({"type": "string"});
    let signature = |name: &str, inputs: &[&str], required: &[&str], outputs: &[&str]| {
        let properties =
            |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), json!({}))).collect::<serde_json::Map<_, _>>();
        let mut input = properties(inputs);
        input.insert("project_id".into(), text.clone());
        Signature {
            name: name.into(),
            summary: String::new(),
            input_schema: json!({"type": "object", "properties": input, "required": required}),
            output_schema: json!({"type": "object", "properties": properties(outputs)}),
            run_timeout_ms: 1_200_000,
            heartbeat_timeout_ms: Some(120_000),
            metered: true,
            idempotent: true,
            failure_codes: vec![],
        }
    };
    Catalog::new([
        signature(
            "gather@1",
            &["idea", "answer"],
            &["project_id", "idea"],
            &["complete", "question", "suggestions", "requirements", "assumptions", "summary"],
        ),
        signature("plan@1", &["changes"], &["project_id"], &["summary_markdown", "todo", "forecast", "limit_credits"]),
        signature(
            "implement@1",
            &["todo", "role", "evidence"],
            &["project_id", "todo"],
            &["work", "changed_files", "summary"],
        ),
        signature(
            "check@1",
            &["todo", "work", "reason", "previous"],
            &["project_id", "todo"],
            &["passed", "again", "reason", "results", "work"],
        ),
        signature(
            "commit@1",
            &["todo", "checks", "work"],
            &["project_id", "todo", "checks"],
            &["oid", "subject", "ticked"],
        ),
        signature("verify@1", &[], &["project_id"], &["verdict", "report_markdown", "criteria", "todo"]),
        signature("readme@1", &[], &["project_id"], &["path", "commands"]),
        signature("limit@1", &["credits"], &["credits"], &["left_credits", "limit_credits"]),
        signature("deliver@1", &["verdict"], &["project_id", "verdict"], &["commit", "verdict", "todo"]),
        signature("reconcile-calls@1", &[], &[], &["checked", "changed", "findings"]),
        signature("reconcile-grants@1", &[], &[], &["checked", "changed", "findings"]),
        signature("reconcile-ledger@1", &[], &[], &["checked", "changed", "findings"]),
        signature("reconcile-payments@1", &[], &[], &["checked", "changed", "findings"]),
        signature("reconcile-prices@1", &[], &[], &["checked", "changed", "findings"]),
        signature("reconcile-providers@1", &[], &[], &["checked", "changed", "findings"]),
        signature("agent@1", &["prompt", "role"], &["prompt"], &["value"]),
    ])
}

fn files(folder: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut found: Vec<(String, String)> = fs::read_dir(&root)
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .map(|path| {
            let name = path.file_name().expect("name").to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).expect("text"))
        })
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no fixture in {folder}");
    found
}

#[test]
fn good_documents_compile_without_a_finding() {
    for folder in ["tests/fixtures/ok", "../workflow-defs"] {
        for (name, source) in files(folder) {
            if name == "models.yaml" || name == "rehearsal.yaml" {
                continue;
            }
            let (compiled, found) = compile(&source, &name, &Bundle::new(), &catalog());
            let serious: Vec<_> = found.into_iter().filter(|d| d.severity != Severity::Info).collect();
            assert!(serious.is_empty(), "{}", render(&serious, &source));
            let compiled = compiled.expect("compiles");
            assert!(mermaid(&compiled.definition).starts_with("flowchart TD"));
            let stored: Value = serde_json::to_value(&compiled.definition).expect("json");
            let back = serde_json::from_value(stored).expect("definition");
            assert_eq!(compiled.definition, back, "{name}");
        }
    }
}

#[test]
fn bad_documents_give_the_findings_that_they_name() {
    let mut problems = Vec::new();
    for (name, source) in files("tests/fixtures/err") {
        let mut expected: Vec<String> =
            source.lines().filter_map(|l| l.trim().strip_prefix("# expect: ")).map(str::to_owned).collect();
        let (compiled, found) = compile(&source, &name, &Bundle::new(), &catalog());
        let mut got: Vec<String> =
            found.iter().map(|d| format!("{}@{}:{}", d.code, d.span.line, d.span.column)).collect();
        expected.sort();
        got.sort();
        if expected != got {
            problems.push(format!("{name}: expected {expected:?}, got {got:?}\n{}", render(&found, &source)));
        }
        for finding in &found {
            assert!(finding.help.is_some(), "no help: {}", finding.render(&source));
            assert!(finding.span.line > 0 && finding.span.column > 0 && finding.file == name, "{finding:?}");
        }
        let blocked = found.iter().any(|d| d.severity == Severity::Error);
        assert_eq!(compiled.is_none(), blocked, "{name}");
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The codes of the README's table; `WF301 – WF306` is all of them in between.
fn listed() -> Vec<String> {
    let number = |code: &str| code.trim().strip_prefix("WF").and_then(|n| n.parse::<u32>().ok());
    let readme = include_str!("../README.md");
    let cells = readme.lines().filter(|l| l.starts_with("| WF")).filter_map(|l| l.split('|').nth(1));
    let mut codes = Vec::new();
    for part in cells.flat_map(|cell| cell.split(',')) {
        let ends: Vec<u32> = part.split('–').filter_map(number).collect();
        let (Some(first), Some(last)) = (ends.first(), ends.last()) else { panic!("`{part}` is no code") };
        codes.extend((*first..=*last).map(|n| format!("WF{n}")));
    }
    codes
}

/// The texts of the files of a folder and of the folders in it.
fn sources(folder: &Path) -> Vec<String> {
    let paths = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("entry").path());
    paths
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![fs::read_to_string(path).expect("text")] })
        .collect()
}

#[test]
fn every_listed_finding_has_a_fixture_and_every_finding_is_listed() {
    let listed = listed();
    let mut shown = std::collections::BTreeSet::new();
    for (_, source) in files("tests/fixtures/err") {
        shown.extend(
            source
                .lines()
                .filter_map(|l| l.trim().strip_prefix("# expect: "))
                .filter_map(|l| l.split('@').next())
                .map(str::to_owned),
        );
    }
    let missing: Vec<_> = listed.iter().filter(|code| !shown.contains(*code)).collect();
    assert!(missing.is_empty(), "no fixture shows {missing:?}");
    // The sources name their codes as literals.
    let mut used = std::collections::BTreeSet::new();
    for text in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        for (at, _) in text.match_indices("\"WF") {
            used.insert(text[at + 1..].chars().take_while(char::is_ascii_alphanumeric).collect::<String>());
        }
    }
    let unlisted: Vec<_> = used.iter().filter(|code| code.len() == 5 && !listed.contains(code)).collect();
    assert!(unlisted.is_empty(), "the README does not list {unlisted:?}");
    let unused: Vec<_> = listed.iter().filter(|code| !used.contains(*code)).collect();
    assert!(unused.is_empty(), "the README lists {unused:?}, which nothing gives");
}

fn dev_loop() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../workflow-defs/dev-loop.yaml")).expect("text")
}

#[test]
fn redo_ranges_become_repeats_around_their_steps() {
    let (compiled, _) = compile(&dev_loop(), "dev-loop.yaml", &Bundle::new(), &catalog());
    let steps = compiled.expect("compiles").definition.steps;
    let ids: Vec<&str> = steps.iter().map(|s| s.id.as_str()).collect();
    assert_eq!(ids, ["gather", "plan..approve", "limit", "implement..verify", "decide", "readme", "deliver"]);
    let inner = |step: &Step| match &step.kind {
        Kind::Repeat { steps, .. } | Kind::Foreach { steps, .. } => steps.clone(),
        other => panic!("{other:?}"),
    };
    let implement = inner(&steps[3])[0].clone();
    let ids: Vec<String> = inner(&implement).iter().map(|s| s.id.clone()).collect();
    assert_eq!(ids, ["code..check", "commit"]);
}

#[test]
fn the_hash_ignores_presentation_and_sees_meaning() {
    let hash = |source: &str, prompt: &str| {
        let files = Bundle::from([("prompts/plan.hbs".to_owned(), prompt.to_owned())]);
        let (compiled, _) = compile(source, "x.yaml", &files, &catalog());
        let compiled = compiled.expect("compiles");
        compiled.definition.hash(&compiled.bundle)
    };
    let source = dev_loop();
    let first = hash(&source, "a");
    assert_eq!(first, hash(&source.replace("title: From", "title: Out of"), "a"));
    assert_eq!(first, hash(&format!("# a comment\n{source}"), "a"));
    assert_eq!(first, hash(&source.replace("timeout: 30d", "timeout: 720h"), "a"));
    assert_ne!(first, hash(&source, "b"), "one character of a prompt is another version");
    assert_ne!(first, hash(&source.replace("max-rounds: 8", "max-rounds: 7"), "a"));
}

/// Thousands of mistakes in one line, which is quoted at each of them.
#[test]
fn many_mistakes_give_a_short_answer() {
    let keys: Vec<String> = (0..5_000).map(|n| format!("k{n}: 1")).collect();
    let source = format!("{{ dsl: 1, name: many, steps: [{{ id: a, set: {{ v: 1 }} }}], {} }}", keys.join(", "));
    let (compiled, found) = compile(&source, "x.yaml", &Bundle::new(), &catalog());
    assert!(compiled.is_none());
    assert_eq!(found.len(), FINDINGS_MAX + 1);
    let last = &found[FINDINGS_MAX];
    assert_eq!((last.severity, last.message.as_str()), (Severity::Info, "4900 more findings are not shown"));
    let text = render(&found, &source);
    assert!(text.len() < 100_000, "{} bytes", text.len());
    // The mark stands under the key, also in a line that is cut.
    let lines: Vec<&str> = text.lines().collect();
    for (line, marks) in lines.iter().zip(&lines[1..]).filter(|(_, marks)| marks.contains('^')) {
        let at = marks.chars().position(|c| c == '^').expect("mark");
        assert!(line.chars().count() < 180, "{line}");
        assert!(matches!(line.chars().nth(at), Some('k' | '{')), "{line}\n{marks}");
    }
}

#[test]
fn an_error_is_not_hidden_behind_what_does_not_block() {
    let calls: Vec<String> = (0..150).map(|n| format!("  - {{ id: s{n}, call: {{ workflow: other }} }}\n")).collect();
    let source =
        format!("dsl: 1\nname: calls\nsteps:\n{}outputs: {{ v: \"${{{{ inputs.none }}}}\" }}\n", calls.concat());
    let (compiled, found) = compile(&source, "x.yaml", &Bundle::new(), &catalog());
    assert!(compiled.is_none());
    assert_eq!(found.iter().filter(|d| d.severity == Severity::Error).map(|d| d.code).collect::<Vec<_>>(), ["WF302"]);
    assert_eq!(found.len(), FINDINGS_MAX + 1);
    assert!(found[FINDINGS_MAX].message.starts_with("51 more "), "{}", found[FINDINGS_MAX].message);
}

/// A long name would be stored with each of the values below it.
#[test]
fn long_names_are_refused_before_they_multiply() {
    let source = format!("{{ ? {} : {{ {} }} }}", "n".repeat(200_000), "a: 1, ".repeat(40_000));
    let (compiled, found) = compile(&source, "x.yaml", &Bundle::new(), &catalog());
    assert!(compiled.is_none() && found.iter().any(|d| d.code == "WF210"), "{found:?}");
    assert!(render(&found, &source).len() < 10_000);
}

#[test]
fn prompt_files_are_checked_where_they_are() {
    let source = "dsl: 1\nname: p\nsteps:\n  - id: a\n    uses: agent@1\n    with: { prompt: review.hbs }\n";
    let check = |files: &[(&str, &str)]| {
        let bundle = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        compile(source, "defs/p.yaml", &bundle, &catalog())
    };
    let (compiled, found) = check(&[("prompts/review.hbs", "Rules.\n=== user ===\n{{what}} {{#if a}}b{{/if}}")]);
    assert!(compiled.is_some() && found.is_empty(), "{found:?}");

    let broken = "Rules {{fine}}.\nMore.\n\n=== user ===\nDo\n{{#if a}} it {{/unless}}\n";
    let (compiled, found) = check(&[("prompts/review.hbs", broken)]);
    assert!(compiled.is_none());
    let [finding] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((finding.code, finding.file.as_str(), finding.span.line), ("WF311", "defs/prompts/review.hbs", 6));
    assert!(finding.render(source).contains("    | {{#if a}} it {{/unless}}\n"), "{}", finding.render(source));

    // A block may not reach over the border, because the parts are rendered one by one.
    let (_, found) = check(&[("prompts/review.hbs", "{{#if a}}\n=== user ===\n{{/if}}\n")]);
    let at: Vec<_> = found.iter().map(|d| (d.code, d.span.line)).collect();
    assert!(at.len() == 2 && at.iter().all(|(code, _)| *code == "WF311") && at[1].1 == 3, "{at:?}");

    let (_, found) = check(&[("prompts/reviews.hbs", "x")]);
    assert_eq!(found[0].help.as_deref(), Some("did you mean `reviews.hbs`?"));
}

#[test]
fn the_shipped_prompts_are_without_findings() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workflow-defs/prompts");
    let bundle: Bundle = fs::read_dir(folder)
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .map(|path| {
            let name = path.file_name().expect("name").to_string_lossy().into_owned();
            (format!("prompts/{name}"), fs::read_to_string(&path).expect("text"))
        })
        .collect();
    assert!(bundle.len() >= 6, "{:?}", bundle.keys());
    let (_, found) = compile(&dev_loop(), "dev-loop.yaml", &bundle, &catalog());
    assert!(found.is_empty(), "{found:?}");
}

/// The page of the language shows every kind and every function, and its example compiles.
#[test]
fn the_page_of_the_language_is_true() {
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("```yaml\n").expect("an example");
    let (example, page) = rest.split_once("```\n").expect("its end");
    let (compiled, found) = compile(example, "README.md", &Bundle::new(), &catalog());
    assert!(found.is_empty(), "{}", render(&found, example));
    let mut kinds = std::collections::BTreeSet::new();
    compiled.expect("compiles").definition.walk(&mut |step: &Step| {
        kinds.insert(serde_json::to_value(&step.kind).expect("json").to_string().split('"').nth(1).map(str::to_owned));
    });
    assert_eq!(kinds.len(), 13, "{kinds:?}");
    let (page, _) = page.split_once("\n## ").expect("the next section");
    for function in loopwright_engine::definition::expr::FUNCTIONS {
        assert!(page.contains(&format!("`{function}`")), "{function}");
    }
}

#[test]
fn a_wrong_shape_is_answered_with_a_right_one() {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/err/shapes.yaml"));
    let (_, found) = compile(&source.expect("text"), "x.yaml", &Bundle::new(), &catalog());
    let helps: Vec<&str> = found.iter().filter_map(|d| d.help.as_deref()).collect();
    for (help, start) in helps.iter().zip(["call: {", "wait: {", "fail: {", "to: ["]) {
        assert!(help.starts_with(&format!("for example `{start}")), "{help}");
    }
}

#[test]
fn hostile_documents_are_refused_and_not_executed() {
    let mut bomb = String::from("a: &a [x, x, x, x, x, x, x, x, x]\n");
    for n in 0..8 {
        let (from, to) = ((b'a' + n) as char, (b'b' + n) as char);
        bomb.push_str(&format!(
            "{to}: &{to} [*{from}, *{from}, *{from}, *{from}, *{from}, *{from}, *{from}, *{from}, *{from}]\n"
        ));
    }
    for source in [
        bomb,
        "[".repeat(100_000),
        "a: ".repeat(5_000),
        "x".repeat(600_000),
        String::new(),
        "\u{0}\u{feff}:\t- !!".into(),
    ] {
        let (compiled, found) = compile(&source, "x.yaml", &Bundle::new(), &catalog());
        assert!(compiled.is_none() && !found.is_empty());
    }
}

#[test]
fn cutting_and_garbling_the_shipped_document_never_panics() {
    let source = dev_loop();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % (n as u64)).expect("small")
    };
    let chars: Vec<char> = source.chars().collect();
    for _ in 0..300 {
        let mut text = chars.clone();
        for _ in 0..=random(4) {
            let at = random(text.len());
            match random(4) {
                0 => text.truncate(at.max(1)),
                1 => text[at] = ['{', '}', ':', '"', '\t', '-', '\n', '*', '&', '#'][random(10)],
                2 => drop(text.remove(at)),
                _ => text.insert(at, ['[', ']', '\'', '$', ' ', '!', '|', 'é'][random(8)]),
            }
        }
        let text: String = text.into_iter().collect();
        let (_, found) = compile(&text, "x.yaml", &Bundle::new(), &catalog());
        let _rendered = render(&found, &text);
    }
}
