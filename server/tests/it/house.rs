//! The few rules of the house that a person cannot see in a diff. Style is left to rustfmt, clippy and readers.
//!
//! Reads the sources as text, so it says what is written, not what is meant: a rule that stands in the way of good code
//! is changed here, in the commit that needs it, with the reason.

use loopwright_server::{config::VARIABLES, rest::error::Code};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Who may depend on whom among our crates. Development dependencies are free.
const CRATES: &[(&str, &[&str])] = &[
    ("engine", &[]),
    ("workflows", &["loopwright-engine"]),
    ("activities", &["loopwright-engine"]),
    ("server", &["loopwright-activities", "loopwright-engine", "loopwright-workflows"]),
];

/// Crates that stay in their rooms: name, and the paths (files or folders) that may use it.
const ROOMS: &[(&str, &[&str])] = &[
    (
        "sqlx",
        &[
            "engine/src/bench/",
            "engine/src/client",
            "engine/src/committer.rs",
            "engine/src/embedded/",
            "engine/src/error.rs",
            "engine/src/hook.rs",
            "engine/src/payload/",
            "engine/src/migrate.rs",
            "engine/src/store/",
            // What is heard of it, and its plans.
            "engine/src/testing/",
            // Where a connection leads to, for what sqlx leaves out.
            "engine/src/tcp.rs",
            "engine/src/transaction.rs",
            "engine/src/worker/",
            "activities/src/billing/",
            // The rows of keys, and the leases of their budgets.
            "activities/src/keys/",
            // The stores of activities: files and commits, facts and conversation, the project's state, what they share.
            "activities/src/deliver.rs",
            "activities/src/landing.rs",
            "activities/src/plan.rs",
            "activities/src/reconcile/",
            "activities/src/record.rs",
            "activities/src/toolbox.rs",
            "activities/src/workspace.rs",
            "server/src/app.rs",
            // It audits with statements that share no code with the engine.
            "server/src/cli/chaos/",
            // It makes a second database and reports from both.
            "server/src/cli/demo/",
            "server/src/postgres/",
            "server/src/store/",
        ],
    ),
    ("warp", &["server/src/rest/"]),
    ("teloxide", &["server/src/telegram/"]),
    // `doctor` asks the Bot API whether the token is right; `chaos` asks our own server; `jwks` reads the issuer's keys.
    (
        "reqwest",
        &[
            "activities/src/provider/",
            "server/src/telegram/",
            "server/src/cli/doctor.rs",
            "server/src/cli/chaos/",
            "server/src/rest/jwks.rs",
        ],
    ),
    ("tantivy", &["activities/src/index/"]),
    ("tree_sitter", &["activities/src/index/", "activities/src/edit/syntax.rs"]),
    ("handlebars", &["engine/src/definition/template.rs", "activities/src/tools/prompt.rs"]),
    ("clap", &["server/src/cli/", "server/src/config/", "server/src/main.rs"]),
    ("jsonwebtoken", &["server/src/rest/"]),
];

/// Modules that never name others: folder, and what its code may not say.
const WALLS: &[(&str, &[&str])] = &[
    // Decisions are pure: no clock, no chance, no runtime, no database.
    (
        "engine/src/machine/",
        &["sqlx::", "tokio::", "Utc::now", "Instant::now", "SystemTime", "now_v7", "new_v4", "crate::store"],
    ),
    (
        "engine/src/definition/",
        &["sqlx::", "tokio::", "Utc::now", "Instant::now", "SystemTime", "now_v7", "new_v4", "crate::store"],
    ),
    // Money does not know who answers; what a call consumed arrives as `usage`.
    ("activities/src/billing/", &["crate::provider", "crate::orchestrator", "crate::tools"]),
    // A provider makes one request. Whom to ask is the orchestrator's choice, from its role down.
    (
        "activities/src/provider/",
        &["crate::billing", "crate::tools", "crate::implement", "crate::agent", "crate::workspace"],
    ),
    // A key is kept and judged here; whom to ask with it is the orchestrator's choice.
    ("activities/src/keys/", &["crate::orchestrator", "crate::billing", "crate::tools"]),
    ("activities/src/orchestrator/", &["crate::billing", "crate::tools", "crate::implement", "crate::agent"]),
    // Leaves.
    (
        "activities/src/index/",
        &["crate::provider", "crate::orchestrator", "crate::billing", "crate::tools", "crate::workspace"],
    ),
    ("activities/src/sandbox/", &["crate::provider", "crate::orchestrator", "crate::billing", "crate::tools"]),
    // A token is never read without its signature being checked: the header names a key, and that is all.
    ("server/src/rest/", &["::dangerous", "dangerous::", "insecure_decode"]),
    // Read models become text; they do not act.
    ("server/src/read/", &["sqlx::", "crate::rest", "crate::telegram", "crate::app"]),
];

/// Words that the engine's code does not know. In comments they may serve as examples of what stays outside.
const FOREIGN: &[&str] = &[
    "agent",
    "credit",
    "credits",
    "gemini",
    "git",
    "http",
    "https",
    "llm",
    "money",
    "openrouter",
    "price",
    "prices",
    "pricing",
    "prompt",
    "prompts",
    "telegram",
    "usd",
    "yaml",
];
/// Words that its comments do not know either: no example needs them.
const FOREIGN_IN_COMMENTS: &[&str] =
    &["gemini", "http", "https", "llm", "openrouter", "price", "prices", "pricing", "telegram", "usd"];
/// Where the engine's code says one of them nevertheless: file, word, reason.
const SAID: &[(&str, &str, &str)] = &[("engine/src/machine/react.rs", "money", "the reason of a lint exception")];

/// Beginnings of failure codes.
const FAILURES: &[&str] = &[
    "budget",
    "check",
    "commit",
    "deliver",
    "gather",
    "git",
    "index",
    "input",
    "internal",
    "model",
    "output",
    "path",
    "plan",
    "provider",
    "readme",
    "rehearsal",
    "sandbox",
    "template",
    "transient",
    "verify",
    "workspace",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Path from the root and text of every Rust source of a crate, tests left out.
fn sources(krate: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(krate).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && !path.ends_with("tests") {
                folders.push(path);
            } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod ").next().unwrap().to_owned();
                found.push((name, code));
            }
        }
    }
    found.sort();
    found
}

fn all_sources() -> Vec<(String, String)> {
    CRATES.iter().flat_map(|(krate, _)| sources(krate)).collect()
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `needle` stands in `line` and does not continue a word to its left.
fn says(line: &str, needle: &str) -> bool {
    line.match_indices(needle).any(|(at, _)| !line[..at].ends_with(is_word))
}

fn none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn crates_depend_one_way() {
    for (krate, allowed) in CRATES {
        let manifest = text(&format!("{krate}/Cargo.toml"));
        let mut section = "";
        let mut found = Vec::new();
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            } else if section == "[dependencies]" && line.starts_with("loopwright-") {
                found.push(line.split(['.', ' ', '=']).next().unwrap());
            }
        }
        assert_eq!(&found, allowed, "{krate}/Cargo.toml");
    }
    let workflows = text("workflows/Cargo.toml");
    assert!(!workflows.contains("\"runtime\""), "workflows works on the pure part of the engine");
}

#[test]
fn foreign_crates_stay_in_their_rooms() {
    let mut problems = Vec::new();
    for (file, code) in all_sources() {
        for (krate, rooms) in ROOMS {
            let used = code.lines().any(|line| !is_comment(line) && says(line, &format!("{krate}::")));
            if used && !rooms.iter().any(|room| file.starts_with(room)) {
                problems.push(format!("{file} uses {krate}, which belongs to {}", rooms.join(", ")));
            }
        }
    }
    none(&problems);
}

#[test]
fn modules_do_not_reach_over_their_walls() {
    let mut problems = Vec::new();
    for (file, code) in all_sources() {
        for (folder, banned) in WALLS.iter().filter(|(folder, _)| file.starts_with(folder)) {
            for (n, line) in code.lines().enumerate().filter(|(_, line)| !is_comment(line)) {
                for word in banned.iter().filter(|word| says(line, word)) {
                    problems.push(format!("{file}:{}: {folder} does not know {word}", n + 1));
                }
            }
        }
    }
    none(&problems);
}

/// `loopwright_engine::transaction` says why.
#[test]
fn transactions_begin_in_one_place() {
    let mut problems = Vec::new();
    for (file, code) in all_sources().into_iter().filter(|(file, _)| file != "engine/src/transaction.rs") {
        for (n, line) in code.lines().enumerate().filter(|(_, line)| !is_comment(line)) {
            let its_own = ["store", "self", "session"].iter().any(|own| line.contains(&format!("{own}.begin()")));
            if (line.contains(".begin()") && !its_own) || line.contains(".begin_with(") {
                problems.push(format!("{file}:{}: a transaction begins by `transaction::begin`", n + 1));
            }
        }
    }
    none(&problems);
}

#[test]
fn the_engine_knows_no_word_of_its_users() {
    let mut problems = Vec::new();
    for (file, code) in sources("engine") {
        for (n, line) in code.lines().enumerate() {
            let banned = if is_comment(line) { FOREIGN_IN_COMMENTS } else { FOREIGN };
            let said = line.to_lowercase();
            for word in said.split(|c: char| !c.is_alphanumeric()).filter(|word| banned.contains(word)) {
                if !SAID.iter().any(|(path, allowed, _)| *path == file && *allowed == word) {
                    problems.push(format!("{file}:{}: `{word}`", n + 1));
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn every_code_of_rest_is_in_its_readme_with_its_status() {
    let readme = text("server/README.md");
    for code in Code::ALL {
        let row = format!("| `{}` | {} |", code.as_str(), code.status().as_u16());
        assert!(readme.contains(&row), "server/README.md lacks the row {row}");
    }
}

/// String literals of the code that look like `prefix.word`, with one of these prefixes.
fn codes(krate: &str, prefixes: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (_, code) in sources(krate) {
        for line in code.lines().filter(|line| !is_comment(line)) {
            for literal in line.split('"').skip(1).step_by(2) {
                let Some((prefix, rest)) = literal.split_once('.') else { continue };
                let tail = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
                if tail && prefixes.contains(&prefix) {
                    found.insert(literal.to_owned());
                }
            }
        }
    }
    found
}

#[test]
fn every_failure_code_of_an_activity_has_a_cause_and_a_remedy() {
    let readme = text("activities/README.md");
    let codes = codes("activities", FAILURES);
    assert!(codes.contains("model.refused") && codes.contains("workspace.conflict"), "{codes:?}");
    let missing = codes.iter().filter(|code| !readme.contains(&format!("`{code}`")));
    none(&missing.map(|code| format!("activities/README.md does not explain `{code}`")).collect::<Vec<_>>());
}

#[test]
fn every_finding_of_the_compiler_is_in_its_readme() {
    let readme = text("workflows/README.md");
    let ranges: Vec<(u32, u32)> = readme
        .split("WF")
        .collect::<Vec<_>>()
        .windows(2)
        .filter_map(|pair| Some((pair[0].strip_suffix(" – ")?.parse().ok()?, pair[1].get(..3)?.parse().ok()?)))
        .collect();
    let listed = |code: &str| {
        let number: u32 = code[2..].parse().unwrap();
        readme.contains(code) || ranges.iter().any(|(from, to)| (*from..=*to).contains(&number))
    };
    for (file, code) in sources("workflows") {
        let literals = code.lines().flat_map(|line| line.split('"').skip(1).step_by(2));
        let of_ours = |text: &&str| text.len() == 5 && text.starts_with("WF") && text[2..].parse::<u32>().is_ok();
        for code in literals.filter(of_ours) {
            assert!(listed(code), "{file}: workflows/README.md does not list {code}");
        }
    }
}

#[test]
fn every_metric_is_in_a_readme() {
    let readmes: String = CRATES.iter().map(|(krate, _)| text(&format!("{krate}/README.md"))).collect();
    let operators = readmes + &text("deploy/RUNBOOK.md");
    let mut problems = Vec::new();
    for (file, code) in all_sources() {
        for macro_name in ["counter!(", "histogram!(", "gauge!("] {
            for (at, _) in code.match_indices(macro_name) {
                let Some(name) = code[at + macro_name.len()..].trim_start().strip_prefix('"') else { continue };
                let name = name.split('"').next().unwrap();
                if !operators.contains(&format!("`{name}`")) && !operators.contains(&format!("`{name}{{")) {
                    problems.push(format!("{file}: nobody is told of the metric `{name}`"));
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn the_example_of_the_environment_is_the_table_of_variables() {
    let example = text("deploy/environment.example");
    let assigned = |line: &str| {
        let name = line.trim_start_matches('#').split_once('=')?.0.to_owned();
        let variable =
            !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
        variable.then_some(name)
    };
    let listed: Vec<String> = example.lines().filter_map(assigned).collect();
    let expected: Vec<&str> = VARIABLES.iter().map(|v| v.name).collect();
    assert_eq!(listed, expected, "deploy/environment.example, in the order of config::env::VARIABLES");
}

#[test]
fn documents_point_at_files_that_exist() {
    let mut documents = vec!["README.md".to_owned(), "deploy/RUNBOOK.md".to_owned(), "deploy/CHANGELOG.md".to_owned()];
    documents.extend(CRATES.iter().map(|(krate, _)| format!("{krate}/README.md")));
    let mut problems = Vec::new();
    for document in documents {
        let body = text(&document);
        let folder = root().join(&document).parent().unwrap().to_owned();
        for link in body.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap();
            if !path.is_empty() && !path.contains("://") && !folder.join(path).exists() {
                problems.push(format!("{document} points at {path}, which does not exist"));
            }
        }
    }
    none(&problems);
}

#[test]
fn the_map_names_every_room() {
    let map = text("README.md");
    let mut problems = Vec::new();
    for (krate, _) in CRATES {
        for entry in fs::read_dir(root().join(krate).join("src")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let noun = name.trim_end_matches(".rs");
            if !["lib", "main", "tests", "queries"].contains(&noun) && !says(&map, &format!("`{noun}")) {
                problems.push(format!("README.md: the code map does not name `{noun}` of {krate}"));
            }
        }
    }
    none(&problems);
}
