//! What cannot be done: each is refused by the real binary with a code and a remedy, in time, and changes nothing.

use super::shell::{Done, Shell};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

const LISTENS: &str = "dsl: 1
name: listens
inputs:
  n: { type: integer, default: 1 }
steps:
  - { id: ear, await: { signal: hello, timeout: 1h, form: { type: object, properties: { text: { type: string } } } } }
queries:
  at: \"${{ run.status }}\"
";
const NOBODY: &str = "01890000-0000-7000-8000-000000000000";
/// Commands at once; each is a process.
const AT_ONCE: usize = 3;

/// What is typed, the exit code, the code of the error, what the sentence says of cause or remedy.
type Case<'a> = (Vec<&'a str>, i32, &'a str, &'a str);

async fn refuses(shell: &Shell, cases: Vec<Case<'_>>) {
    let seen: Vec<(Case<'_>, Done)> = stream::iter(cases)
        .map(|case| async move { (case.clone(), shell.run(&case.0).await) })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let wrong: Vec<String> = seen
        .iter()
        .filter(|((_, exit, code, says), done)| {
            done.code != Some(*exit)
                || done.refusal() != Some(code)
                || !done.stderr.contains(says)
                || done.stderr.contains("panicked")
                || !done.stdout.is_empty()
        })
        .map(|((args, exit, code, says), done)| format!("{args:?}: wanted {exit} [{code}] and {says:?}: {done:?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Everything that runs, schedules and definitions are, in one number.
async fn everything(shell: &Shell) -> i64 {
    let sql = "select ((select count(*) from runs) + (select coalesce(sum(inbox_n + seq), 0) from runs) + (select count(*) from inbox)
                    + (select count(*) from schedules) + (select count(*) from definitions) + (select count(*) from projects))::bigint";
    sqlx::query_scalar(sql).fetch_one(&shell.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_not_there_is_said_to_be_missing_by_every_command() {
    let shell = Shell::new().await;
    shell.deploy("listens.yaml", LISTENS).await;
    let says = "no run 01890000-0000-7000-8000-000000000000: check the id; `run list`";
    let cases: Vec<Vec<&str>> = vec![
        vec!["show", NOBODY],
        vec!["watch", NOBODY],
        vec!["history", NOBODY],
        vec!["history", NOBODY, "--after", "5"],
        vec!["signal", NOBODY, "hello"],
        vec!["approve", NOBODY],
        vec!["approve", NOBODY, "ok"],
        vec!["update", NOBODY, "hello"],
        vec!["query", NOBODY, "at"],
        vec!["export", NOBODY],
        vec!["replay", NOBODY],
        vec!["replay", NOBODY, "--definition", "current"],
        vec!["cancel", NOBODY],
        vec!["terminate", NOBODY],
        vec!["pause", NOBODY],
        vec!["resume", NOBODY],
        vec!["fork", NOBODY, "--at", "1"],
        vec!["reset", NOBODY, "--step", "ear"],
        vec!["forecast", NOBODY],
        vec!["limit", NOBODY, "5"],
        vec!["migrate", NOBODY, "--to", "current"],
    ];
    refuses(&shell, cases.iter().map(|args| ([&["run"], &args[..]].concat(), 1, "run_not_found", says)).collect())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_with_a_code_and_what_to_do() {
    let shell = Shell::new().await;
    let hash = shell.deploy("listens.yaml", LISTENS).await;
    let open = shell.start("listens", &["--id", "one"]).await;
    let closed = shell.start("listens", &[]).await;
    assert_eq!(shell.run(&["run", "terminate", &closed]).await.code, Some(0));
    shell.json(&["schedule", "create", "nightly", "listens", "--cron", "0 3 * * *"]).await;
    let exported = shell.run(&["run", "export", &closed]).await.stdout;
    shell.write("run.jsonl", &exported);
    shell.write("cut.jsonl", &exported[..exported.len() / 2]);
    shell.write("big.json", format!("{{\"n\": \"{}\"}}", "x".repeat(2 << 20)));
    shell.write("latin1.yaml", b"dsl: 1\nname: caf\xe9\n");
    let deep = format!("{}1{}", "{\"a\":".repeat(60), "}".repeat(60));
    let nine_kilobytes = format!("{{\"a\": \"{}\"}}", "x".repeat(9 << 10));
    let five_kilobytes = "x".repeat(5 << 10);
    let long_filter = format!("workflow = '{}'", "x".repeat(5_000));
    let other_hash = if hash.starts_with("ffff") { "0000" } else { "ffff" };
    let before = everything(&shell).await;
    let (open, closed) = (open.as_str(), closed.as_str());

    let gone = "is closed: it takes nothing more";
    let of_runs: Vec<Case> = vec![
        // Closed.
        (vec!["run", "signal", closed, "hello"], 1, "run_closed", gone),
        (vec!["run", "update", closed, "hello"], 1, "run_closed", gone),
        (vec!["run", "approve", closed, "ok"], 1, "run_closed", gone),
        (vec!["run", "cancel", closed], 1, "run_closed", gone),
        (vec!["run", "terminate", closed], 1, "run_closed", gone),
        (vec!["run", "pause", closed], 1, "run_closed", gone),
        (vec!["run", "resume", closed], 1, "run_closed", gone),
        (vec!["run", "migrate", closed, "--to", "current"], 1, "run_closed", gone),
        (vec!["run", "limit", closed, "5"], 1, "run_closed", gone),
        // Wrong messages.
        (vec!["run", "signal", open, "helo"], 1, "signal_invalid", "`hello`"),
        (vec!["run", "signal", open, "hello", "{\"text\": 5}"], 1, "signal_invalid", "string"),
        (vec!["run", "signal", open, "hello", &deep], 1, "too_deep", "flatten it"),
        (vec!["run", "update", open, "hello", "--wait", "0"], 1, "update_pending", "ask again with the same id"),
        (vec!["run", "query", open, "what"], 1, "query_not_found", "`at`"),
        (vec!["run", "approve", open], 1, "approval_not_waiting", "`run show`"),
        (vec!["run", "approve", open, "ear"], 1, "approval_not_waiting", "`run show`"),
        (vec!["run", "cancel", open, "--reason", &five_kilobytes], 1, "too_large", "the limit is 4096"),
        (vec!["run", "cancel", open, "--within", "soon"], 2, "usage_invalid", "90s"),
        (vec!["run", "cancel", open, "--within", "500ms"], 1, "input_invalid", "within 1 s to 24 h"),
        (vec!["run", "cancel", open, "--within", "25h"], 1, "input_invalid", "terminate it"),
        (vec!["run", "resume"], 2, "usage_invalid", "--where FILTER"),
        (vec!["run", "resume", open, "--where", "status = 'paused'"], 2, "usage_invalid", "--where"),
        (vec!["run", "limit", open, "0"], 2, "usage_invalid", "credits"),
        // Wrong places and definitions.
        (vec!["run", "fork", open, "--at", "9"], 1, "fork_invalid", "it has none yet"),
        (vec!["run", "fork", closed, "--step", "nose"], 1, "fork_invalid", "no step `nose`"),
        (
            vec!["run", "fork", closed, "--at", "1", "--definition", other_hash],
            1,
            "definition_not_found",
            "workflow versions",
        ),
        (vec!["run", "fork", closed, "--at", "1", "--definition", "v9"], 1, "definition_not_found", "listens@9"),
        (
            vec!["run", "fork", closed, "--at", "1", "--definition", "nobody@current"],
            1,
            "definition_not_found",
            "nobody",
        ),
        (vec!["run", "fork", closed, "--at", "1", "--input", "n"], 2, "usage_invalid", "--input name=value"),
        (vec!["run", "replay", closed, "--definition", "xyz"], 1, "definition_not_found", "listens@xyz"),
        (vec!["run", "migrate", open, "--to", "v7"], 1, "definition_not_found", "listens@7"),
        (vec!["run", "migrate", open, "--to", "current", "--map", "a"], 2, "usage_invalid", "--map old=new"),
        (vec!["run", "migrate", "--to", "current"], 2, "usage_invalid", "--where"),
        // Ids.
        (vec!["run", "show", "17"], 2, "usage_invalid", "invalid"),
        (vec!["run", "list", "--limit", "0"], 2, "usage_invalid", "1..=200"),
        (vec!["run", "list", "--after", "x"], 2, "usage_invalid", "--after"),
        (
            vec!["run", "start", "listens", "--id", "one", "--id-conflict", "fail"],
            1,
            "workflow_id_open",
            "use_existing",
        ),
        (vec!["run", "import", "run.jsonl"], 1, "run_exists", "another database"),
        (vec!["run", "import", "cut.jsonl"], 1, "archive_invalid", "line"),
        (vec!["run", "import", "none.jsonl"], 1, "file_failed", "none.jsonl cannot be read"),
        (vec!["run", "replay", "none.jsonl"], 1, "run_not_found", "neither the id of a run nor a file"),
        // Inputs.
        (vec!["run", "start", "nobody"], 1, "definition_not_found", "deploy it"),
        (vec!["run", "start", "listens", "--inputs", "{"], 1, "json_invalid", "--inputs"),
        (vec!["run", "start", "listens", "--inputs", "[]"], 1, "json_invalid", "{\"name\": value}"),
        (vec!["run", "start", "listens", "--inputs", "{\"n\": \"x\"}"], 1, "input_invalid", "integer"),
        (vec!["run", "start", "listens", "--inputs", "{\"m\": 1}"], 1, "input_invalid", "no input `m`"),
        (vec!["run", "start", "listens", "--inputs", "@big.json"], 1, "too_large", "at most"),
        (vec!["run", "start", "listens", "--inputs", "@none.json"], 1, "file_failed", "none.json cannot be read"),
        (vec!["run", "start", "listens", "--attributes", "x"], 1, "json_invalid", "--attributes"),
        (vec!["run", "start", "listens", "--attributes", &nine_kilobytes], 1, "too_large", "8192"),
        (vec!["run", "start", "listens", "--priority", "9"], 1, "input_invalid", "5 is last"),
        (vec!["run", "start", "listens", "--id-reuse", "always"], 2, "usage_invalid", "reject_duplicate"),
    ];
    refuses(&shell, of_runs).await;

    let filters = [
        ("status = 'runing'", "did you mean 'running'?"),
        ("status = running", "write 'running'"),
        ("statu = 'running'", "`status`"),
        ("projct = 'x'", "`project`"),
        ("started_at > 'yesterday'", "2026-11-25"),
        ("started_at > '2026-11-25T10:00:00 Europe/Berlin'", "+01:00"),
        ("workflow = 'x'; drop table runs", "no statements"),
        ("workflow = 'x' -- ", "`-` cannot be read"),
        ("workflow = 'x' or 1=1", "expected a field"),
        ("1=1", "expected a field"),
        ("attributes.a = (select 1)", "expected a value"),
        ("pg_sleep(100) = '1'", "no field `pg_sleep`"),
        ("workflow = 'x' union select 1", "`and`"),
        (long_filter.as_str(), "at most 4096"),
        ("", "expected a field"),
    ];
    let of_filters =
        filters.iter().map(|(text, says)| (vec!["run", "list", "--where", *text], 2, "filter_invalid", *says));
    refuses(&shell, of_filters.collect()).await;

    let create = |rest: &[&'static str]| [&["schedule", "create", "s", "listens"][..], rest].concat();
    let others: Vec<Case> = vec![
        (create(&["--cron", "0 3 * * * *"]), 1, "schedule_invalid", "leave out the seconds"),
        (create(&["--cron", "61 * * * *"]), 1, "schedule_invalid", "minute"),
        (create(&["--cron", "0 0 31 2 *"]), 1, "schedule_invalid", "31"),
        (create(&["--cron", ""]), 1, "schedule_invalid", "write five"),
        (create(&["--cron", "'; drop table schedules; --"]), 1, "schedule_invalid", ""),
        (create(&["--cron", "0 3 * * *", "--timezone", "Mars/Olympus"]), 1, "schedule_invalid", "Europe/Berlin"),
        (create(&["--cron", "0 3 * * *", "--overlap", "stop"]), 2, "usage_invalid", "terminate_other"),
        (create(&["--every", "ten"]), 2, "usage_invalid", "1h30m"),
        (create(&["--every", "1h", "--inputs", "{"]), 1, "json_invalid", "--inputs"),
        (create(&["--every", "1h", "--inputs", "@big.json"]), 1, "too_large", "at most"),
        (create(&["--every", "1h", "--user", NOBODY]), 1, "user_not_found", "there is no user"),
        (create(&["--every", "1h", "--project", NOBODY]), 1, "project_not_found", "project list"),
        (vec!["schedule", "create", "nightly", "listens", "--every", "1h"], 1, "schedule_exists", "another name"),
        (vec!["schedule", "create", "a b", "listens", "--every", "1h"], 1, "schedule_invalid", "cannot be a name"),
        (vec!["schedule", "show", "none"], 1, "schedule_not_found", "schedule list"),
        (vec!["schedule", "trigger", "none"], 1, "schedule_not_found", "schedule list"),
        (vec!["schedule", "delete", "none"], 1, "schedule_not_found", "schedule list"),
        (
            vec!["schedule", "backfill", "nightly", "--from", "2026-02-30", "--to", "2026-03-01"],
            2,
            "usage_invalid",
            "2026-11-25",
        ),
        (vec!["project", "show", NOBODY], 1, "project_not_found", "project list"),
        (vec!["project", "new", "x", "--user", NOBODY], 1, "user_not_found", "there is no user"),
        (vec!["project", "new", " "], 1, "input_invalid", "1 to 20000 characters"),
        (vec!["credits", "balance", "--user", NOBODY], 1, "user_not_found", "there is no user"),
        (vec!["workflow", "versions", "nobody"], 1, "definition_not_found", "workflow deploy FILE"),
        (vec!["workflow", "lint", "none.yaml"], 1, "file_failed", "none.yaml cannot be read"),
        (vec!["workflow", "deploy", "latin1.yaml"], 1, "file_failed", "UTF-8"),
        (vec!["retention", "import", "cut.jsonl"], 1, "archive_invalid", ""),
        (vec!["index", "build", "nowhere"], 1, "file_failed", "nowhere cannot be read"),
        (vec!["index", "map", "listens.yaml"], 1, "file_failed", "name a folder"),
        (vec!["nonsense"], 2, "usage_invalid", "nonsense"),
    ];
    refuses(&shell, others).await;
    assert_eq!(everything(&shell).await, before + 2, "the update that was not answered waits; nothing else is there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_are_told_in_json_also_what_they_typed_wrong() {
    let shell = Shell::new().await;
    for (args, code, says) in [
        (vec!["run", "list", "--where", "status = 'runing'", "--json"], "filter_invalid", "did you mean 'running'?"),
        (vec!["--json", "run", "show", "17"], "usage_invalid", "17"),
        (vec!["run", "history", NOBODY, "--json"], "run_not_found", "run list"),
        (vec!["run", "start", "nobody", "--inputs", "{", "--json"], "definition_not_found", "nobody@current"),
    ] {
        let done = shell.run(&args).await;
        let told: Value = serde_json::from_str(&done.stderr).unwrap_or_else(|e| panic!("{args:?}: {e}: {done:?}"));
        assert_eq!(told["error"]["code"], json!(code), "{done:?}");
        assert!(told["error"]["message"].as_str().unwrap().contains(says), "{done:?}");
    }
    // Help is no error, and goes where it can be piped.
    let help = shell.run(&["run", "--help"]).await;
    assert!(help.code == Some(0) && help.stdout.contains("migrate") && help.stderr.is_empty(), "{help:?}");
}
