//! The real binary: exit codes and sentences.

mod commands;
mod filter;
mod fork;
mod migrate;
mod operate;
mod refused;
mod resume;
mod shell;
mod terms;

use crate::support::{Server, Work, activity, problem, read, run_of, script};
use loopwright_activities::billing::{
    BillingSettings, LedgerHook,
    books::{self, Finding},
    purchase,
};
use loopwright_engine::{embedded::testing, ids::RunId};
use serde_json::json;
use std::{
    path::Path,
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

/// The binary in an environment that holds nothing of this machine's configuration.
pub fn loopwright(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loopwright"));
    command.env_clear().current_dir(dir).env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("LOOPWRIGHT_DATA_DIR", dir.join("data"));
    command
}

/// Arguments, environment, what the sentence must contain.
type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);

pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_wrong_configuration_is_one_sentence_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bad.yaml"), "http: { lisen: x }").unwrap();
    std::fs::write(dir.path().join("torn.yaml"), "http: [").unwrap();
    let cases: [Case; 6] = [
        (&["token", "--config", "bad.yaml"], &[], "lisen"),
        (&["token", "--config", "torn.yaml"], &[], "torn.yaml"),
        (&["token", "--config", "none.yaml"], &[], "none.yaml"),
        (&["token"], &[("LOOPWRIGHT_LISEN", "x")], "LOOPWRIGHT_LISTEN"),
        (&["token"], &[("LOOPWRIGHT_JWT_SECRET", "short")], "32"),
        (&["server"], &[], "LOOPWRIGHT_JWT_SECRET"),
    ];
    for (args, env, expected) in cases {
        let output = loopwright(dir.path()).args(args).envs(env.iter().copied()).output().unwrap();
        let text = text(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.contains(expected) && text.trim().lines().count() == 1, "{args:?}: {text}");
    }
    assert_eq!(loopwright(dir.path()).arg("nonsense").output().unwrap().status.code(), Some(2));
}

#[test]
fn what_the_machine_lacks_is_exit_code_3() {
    let dir = tempfile::tempdir().unwrap();
    let secret = ("LOOPWRIGHT_JWT_SECRET", "0123456789abcdef0123456789abcdef");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().to_string();
    let url = "postgres://u:hunter2@127.0.0.1:1/d";
    let cases: [Case; 4] = [
        (&["server", "--listen", &port], &[secret, ("DATABASE_URL", url)], "--listen"),
        (&["server", "--listen", "127.0.0.1:0"], &[secret], "DATABASE_URL"),
        (&["worker"], &[("DATABASE_URL", url)], "cannot be reached: Connection refused"),
        (&["migrate"], &[("LOOPWRIGHT_PG_BIN", "/nonexistent")], "LOOPWRIGHT_PG_BIN"),
    ];
    for (args, env, expected) in cases {
        let output = loopwright(dir.path()).args(args).envs(env.iter().copied()).output().unwrap();
        let text = text(&output);
        assert_eq!(output.status.code(), Some(3), "{args:?}: {text}");
        assert!(text.contains(expected) && !text.contains("hunter2"), "{args:?}: {text}");
    }
    // A data folder that cannot be one.
    std::fs::write(dir.path().join("taken"), "a file").unwrap();
    let output = loopwright(dir.path()).args(["migrate", "--data-dir", "taken"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("LOOPWRIGHT_DATA_DIR"), "{}", text(&output));
}

#[test]
fn the_development_secret_is_made_once_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<_> = (0..4)
        .map(|_| loopwright(dir.path()).arg("token").stdout(std::process::Stdio::null()).spawn().unwrap())
        .collect();
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    let path = dir.path().join("data/jwt.secret");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_to_string(&path).unwrap().len(), 64);
    assert_eq!(std::fs::read_dir(dir.path().join("data")).unwrap().count(), 1);
}

#[tokio::test]
async fn the_command_line_works_on_a_configured_database() {
    let pool = testing::database(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).args(args).output().unwrap();
        (output.status.code(), text(&output))
    };
    assert_eq!(run(&["migrate", "--check"]).0, Some(1));
    assert!(run(&["migrate"]).1.contains("Applied: 0001"));
    assert!(run(&["migrate"]).1.contains("up to date"));
    let (code, id) = run(&["project", "new", "A program that greets.", "--name", "Greeter"]);
    assert_eq!(code, Some(0), "{id}");
    let (_, list) = run(&["project", "list"]);
    assert!(list.contains(id.trim()) && list.contains("Greeter"), "{list}");
    let (_, json) = run(&["project", "show", id.trim(), "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["idea"], "A program that greets.");
    let (code, text) = run(&["project", "show", &uuid::Uuid::nil().to_string()]);
    assert!(code == Some(1) && text.contains("there is no project"), "{text}");
    let (_, doctor) = run(&["doctor", "--offline", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(doctor.lines().next().unwrap()).unwrap();
    let state = |name: &str| doctor.as_array().unwrap().iter().find(|c| c["name"] == name).unwrap()["state"].clone();
    assert!(["database", "schema", "clock", "data"].iter().all(|n| state(n) == "ok"), "{doctor}");
}

/// Half a minute, most of it sleep: a lease must end and timers must come due.
#[tokio::test(flavor = "multi_thread")]
async fn the_bench_measures_with_workers_that_are_this_program() {
    let pool = testing::database(&[]).await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = loopwright(dir.path());
    command.env("DATABASE_URL", testing::url(&pool)).args(["bench", "--quick", "--percent", "1", "--json"]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let figures = report["figures"].as_array().unwrap();
    let of = |name: &str| figures.iter().find(|f| f["name"].as_str().unwrap().contains(name)).expect(name);
    for name in [
        "transitions/s",
        "commits of transitions",
        "transactions that write",
        "WAL per step",
        "a sequential step",
        "lag of timers",
        "kill -9",
    ] {
        assert!(of(name)["value"].as_f64().unwrap() > 0.0, "{name}: {text}");
    }
    // Every figure stands beside what this Postgres and this driver do without the engine; what is such a limit itself does not.
    for figure in figures.iter().filter(|figure| figure["name"] != "one insert per commit, p50") {
        assert!(figure["limit"]["value"].is_f64() && figure["limit"]["what"].is_string(), "no limit: {figure}");
    }
    // Each commit of transitions is a transaction that writes, and claims are others.
    let value = |name: &str| of(name)["value"].as_f64().unwrap();
    assert!(value("transactions that write") > value("commits of transitions"), "{text}");
    let memory = of("memory of the worker");
    assert!(memory["limit"]["value"].as_f64().unwrap() > 1.0 && memory["limit"]["ratio"].is_f64(), "{memory}");
    let lost = of("steps lost or done twice");
    assert_eq!((&lost["value"], &lost["limit"]["value"], lost["limit"].get("ratio")), (&json!(0.0), &json!(0.0), None));
    // Of a trial without fsync no goal counts, whatever was measured.
    assert!(report["void"].as_array().unwrap().contains(&json!("fsync is off")), "{text}");
    assert!(figures.iter().all(|figure| figure["goal"].is_null() || figure["goal"]["reached"] == false), "{text}");
}

/// A definition that needs no activity.
const SMALL: &str = "dsl: 1
name: small
timeout: 1h
steps:
  - { id: rest, wait: { for: 1s } }
";

#[test]
fn definitions_are_checked_and_drawn_without_a_database() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("good.yaml"), SMALL).unwrap();
    std::fs::write(dir.path().join("bad.yaml"), SMALL.replace("wait: { for: 1s }", "uses: implemnt@1")).unwrap();
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("LOOPWRIGHT_PG_BIN", "/nonexistent").args(args).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), stdout, String::from_utf8(output.stderr).unwrap())
    };
    let (code, stdout, stderr) = run(&["workflow", "lint", "good.yaml"]);
    assert_eq!((code, stdout.trim()), (Some(0), "1 file: 0 errors, 0 other findings"), "{stderr}");
    let (code, stdout, _) = run(&["workflow", "lint", "good.yaml", "bad.yaml"]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.starts_with("bad.yaml:5:") && stdout.contains("error[WF801]: "), "{stdout}");
    assert!(stdout.contains("help: did you mean `implement@1`"), "{stdout}");
    let (code, stdout, _) = run(&["workflow", "lint", "--json", "good.yaml", "bad.yaml"]);
    let found: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, found.as_array().unwrap().len()), (Some(1), 1), "{found}");
    assert_eq!((&found[0]["code"], &found[0]["line"]), (&"WF801".into(), &5.into()), "{found}");
    let (code, stdout, _) = run(&["workflow", "graph", "good.yaml"]);
    assert!(code == Some(0) && stdout.starts_with("flowchart TD\n") && stdout.contains("rest"), "{stdout}");
    let (code, stdout, stderr) = run(&["workflow", "graph", "bad.yaml"]);
    assert!(code == Some(1) && stdout.is_empty() && stderr.contains("WF801"), "{stdout}{stderr}");
    let (code, _, stderr) = run(&["workflow", "lint", "none.yaml"]);
    assert!(code == Some(1) && stderr.contains("none.yaml cannot be read"), "{stderr}");
}

#[tokio::test]
async fn what_is_deployed_has_its_prompts_and_no_error() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).args(args).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), stdout, String::from_utf8(output.stderr).unwrap())
    };
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&run(args).1).unwrap() };
    let deploy = ["workflow", "deploy", "defs/small.yaml", "--json"];
    let defs = dir.path().join("defs");
    std::fs::create_dir_all(defs.join("prompts")).unwrap();
    std::fs::write(defs.join("small.yaml"), SMALL.replace("1s", "soon")).unwrap();
    std::fs::write(defs.join("prompts/greet.hbs"), "Hello {{name}}").unwrap();
    std::fs::write(defs.join("prompts/notes.txt"), "no prompt").unwrap();

    let (code, _, stderr) = run(&["workflow", "deploy", "defs/small.yaml"]);
    assert!(code == Some(1) && stderr.contains("WF107") && stderr.contains("Nothing was deployed"), "{stderr}");
    let (code, _, stderr) = run(&["workflow", "versions", "small"]);
    assert!(code == Some(1) && stderr.contains("no workflow small is deployed"), "{stderr}");

    std::fs::write(defs.join("small.yaml"), SMALL).unwrap();
    let first = json(&deploy);
    assert_eq!((&first["version"], &first["created"]), (&1.into(), &true.into()), "{first}");
    let bundle: serde_json::Value =
        sqlx::query_scalar("select bundle from definitions").fetch_one(&pool).await.unwrap();
    assert_eq!(bundle, serde_json::json!({"prompts/greet.hbs": "Hello {{name}}"}));
    assert_eq!(json(&deploy)["created"], false);

    std::fs::write(defs.join("prompts/greet.hbs"), "Good morning {{name}}").unwrap();
    let (code, stdout, _) = run(&["workflow", "deploy", "defs/small.yaml", "--message", "Politer"]);
    assert!(code == Some(0) && stdout.contains("small version 2 is current (new)"), "{stdout}");
    let versions = json(&["workflow", "versions", "small", "--json"]);
    assert_eq!(versions[0]["message"], "Politer");
    assert_eq!((&versions[0]["current"], &versions[1]["current"]), (&true.into(), &false.into()), "{versions}");
    assert_eq!((&versions[0]["author"], &versions[1]["hash"]), (&"operator".into(), &first["hash"]), "{versions}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn granted_credits_stand_in_the_ledger_once_and_let_a_waiting_run_go_on() {
    let server = Server::start_with(|config| config.billing.welcome_credits = 0).await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let work = Work::new("plan@1", script(|_| async { Ok(json!({})) })).metered();
    let worker = server.worker_with(vec![work], hook).await;
    let project = server.project("ann").await;
    let response = server.trigger("ann", &project, "wait=30").await;
    let run = RunId(run_of(&response).parse().unwrap());
    let (_, body) = read(response).await;
    assert!(body["result"]["message"].as_str().unwrap().starts_with("Blocked (credits)"), "{body}");

    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&server.pool);
    let user: uuid::Uuid = sqlx::query_scalar("select user_id from projects").fetch_one(&server.pool).await.unwrap();
    let user = user.to_string();
    let cli =
        |args: &[&str]| loopwright(dir.path()).env("DATABASE_URL", &url).arg("credits").args(args).output().unwrap();
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_slice(&cli(args).stdout).unwrap() };
    let grant = ["grant", "2.5", &user, "--key", "ticket-7", "--json"];
    let first = json(&grant);
    assert_eq!((&first["granted"], &first["available"]), (&true.into(), &"2.5".into()), "{first}");

    // It goes on by itself.
    let client = server.client();
    let patience = Duration::from_secs(120);
    let mut seq = 0;
    while !client.describe(run).await.unwrap().status.is_closed() {
        let newest = client.wait_change(run, seq, patience).await.unwrap();
        assert!(newest > seq, "the run does not go on");
        seq = newest;
    }
    worker.drain(patience).await;

    assert_eq!(json(&grant)["granted"], false);
    let balance = text(&cli(&["balance", "--user", &user]));
    assert!(balance.starts_with("2.5 credits available"), "{balance}");
    let ledger = json(&["ledger", &user, "--json"]);
    let kinds: Vec<_> = ledger["items"].as_array().unwrap().iter().map(|t| t["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["capture", "hold", "grant"], "{ledger}");
    assert_eq!(ledger["items"][2]["reference"], format!("promo:ticket-7:{user}"));
    let plain = text(&cli(&["ledger", &user]));
    assert!(plain.contains("grant") && plain.contains("promo:ticket-7"), "{plain}");

    assert_eq!(json(&["audit", "--json"]), json!([]));
    sqlx::query("update users set credit_balance_ucr = 1 where id = $1::uuid")
        .bind(&user)
        .execute(&server.pool)
        .await
        .unwrap();
    let audit = cli(&["audit"]);
    assert_eq!(audit.status.code(), Some(1));
    assert!(text(&audit).contains("I1") && text(&audit).contains(&user), "{}", text(&audit));
    server.stop().await;
}

#[tokio::test]
async fn credits_go_to_the_developer_unless_somebody_is_named() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let run = |args: &[&str]| {
        let mut command = loopwright(dir.path());
        command.env("DATABASE_URL", &url).env("LOOPWRIGHT_WELCOME_CREDITS", "0").arg("credits").args(args);
        let output = command.output().unwrap();
        (output.status.code(), text(&output))
    };
    let (code, granted) = run(&["grant", "50", "--reason", "a trial"]);
    assert!(code == Some(0) && granted.starts_with("50 credits available (50 in all, 0 of it held)"), "{granted}");
    assert!(run(&["ledger"]).1.contains("promo:a trial:"));
    let nobody = uuid::Uuid::nil().to_string();
    for args in [&["balance", &nobody][..], &["grant", "1", &nobody]] {
        let (code, text) = run(args);
        assert!(code == Some(1) && text.contains("there is no user"), "{text}");
    }
    let (code, taken) = run(&["adjust", "20", "--take", "--ticket", "T-1"]);
    assert!(code == Some(0) && taken.starts_with("30 credits available"), "{taken}");
    assert!(run(&["adjust", "20", "--take", "--ticket", "T-1"]).1.contains("honored before"));
    let (code, short) = run(&["adjust", "31", "--take", "--ticket", "T-2"]);
    assert!(code == Some(1) && short.contains("[credits_short]"), "{short}");
    let (code, unknown) = run(&["refund", "stx1"]);
    assert!(code == Some(1) && unknown.contains("[payment_mismatch]"), "{unknown}");
    assert_eq!(run(&["report", "--by", "model", "--from", "2026-01-01"]).0, Some(0));
    assert_eq!(run(&["findings"]), (Some(0), "Nothing is open.\n".to_owned()));
    // Credits with an end, which lies ahead.
    let (code, ending) = run(&["grant", "7", "--expires", "2999-12-31", "--key", "T-3"]);
    assert!(code == Some(0) && ending.starts_with("37 credits available"), "{ending}");
    let at: chrono::DateTime<chrono::Utc> = sqlx::query_scalar(
        "select expires_at from credit_grants where amount_ucr = 7000000 and expires_at is not null",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(at.to_rfc3339(), "2999-12-31T00:00:00+00:00");
    let (code, over) = run(&["grant", "7", "--expires", "2020-01-01"]);
    assert!(code == Some(1) && over.contains("which is over"), "{over}");
    assert_eq!(run(&["balance"]).1.split(' ').next(), Some("37"), "nothing was given");
    // A purchase is given back once, and its payer hears why.
    let user: uuid::Uuid = sqlx::query_scalar("select id from users").fetch_one(&pool).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("insert into orders (payload, user_id, stars, credits_ucr, state, expires_at) values ('o', $1, 100, 9000000, 'open', now())")
        .bind(user)
        .execute(&mut *tx)
        .await
        .unwrap();
    let payment = purchase::Payment { charge_id: "stx2", payload: "o", currency: "XTR", stars: 100, recurring: false };
    purchase::purchase(&mut tx, user, &payment).await.unwrap();
    tx.commit().await.unwrap();
    let (code, back) = run(&["refund", "stx2", "--reason", "bought by mistake"]);
    assert!(code == Some(0) && back.contains("The credits are taken back"), "{back}");
    let (code, again) = run(&["refund", "stx2", "--reason", "and again"]);
    assert!(code == Some(0) && again.contains("given back before; nothing was changed"), "{again}");
    let mut conn = pool.acquire().await.unwrap();
    let refund = purchase::refund_of(&mut conn, "stx2").await.unwrap().unwrap();
    assert_eq!((refund.reason.as_deref(), refund.taken), (Some("bought by mistake"), refund.granted));
    // What was found is resolved by a word, once.
    let finding = Finding { kind: "payment_used", subject: "c".into(), message: "look at it".into(), user: None };
    books::keep_findings(&mut conn, "reconcile-payments", &[finding], false).await.unwrap();
    let (_, found) = run(&["findings", "--json"]);
    let id = serde_json::from_str::<serde_json::Value>(&found).unwrap()[0]["id"].to_string();
    assert_eq!(run(&["resolve", &id, "--why", "paid in cash"]), (Some(0), format!("Finding {id} is resolved.\n")));
    assert_eq!(run(&["resolve", &id, "--why", "paid in cash"]).0, Some(1));
    assert_eq!(run(&["findings"]), (Some(0), "Nothing is open.\n".to_owned()));
    for args in [
        &["report", "--by", "mood"][..],
        &["adjust", "1"],
        &["grant", "0"],
        &["grant", "1.0000001"],
        &["grant", "1", "--key", "a\nb"],
    ] {
        assert_eq!(run(args).0, Some(2), "{args:?}");
    }
    assert_eq!(run(&["audit"]), (Some(0), "Money is in order.\n".to_owned()));
}

#[tokio::test]
async fn a_projects_cap_is_set_and_lifted() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).arg("project").args(args).output().unwrap();
        (output.status.code(), text(&output))
    };
    let project = run(&["new", "an idea"]).1.trim().to_owned();
    let cap = async || -> Option<i64> {
        sqlx::query_scalar("select budget_cap_ucr from projects").fetch_one(&pool).await.unwrap()
    };
    let (code, set) = run(&["cap", &project, "12.5"]);
    assert!(code == Some(0) && set.contains("may spend 12.5 credits"), "{set}");
    assert_eq!(cap().await, Some(12_500_000));
    assert_eq!(run(&["cap", &project, "none"]).0, Some(0));
    assert_eq!(cap().await, None);
    for (args, code) in [
        (["cap", &project, "0"], 2),
        (["cap", &project, "much"], 2),
        (["cap", "00000000-0000-0000-0000-000000000000", "1"], 1),
    ] {
        assert_eq!(run(&args).0, Some(code), "{args:?}");
    }
}

#[tokio::test]
async fn a_price_list_is_taken_over_as_a_whole_or_not_at_all() {
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let file = dir.path().join("prices.json");
    let file = file.to_str().unwrap();
    let run = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).arg("pricing").args(args).output().unwrap();
        (output.status.code(), text(&output))
    };
    let rows =
        async || -> i64 { sqlx::query_scalar("select count(*) from model_pricing").fetch_one(&pool).await.unwrap() };
    let before = rows().await;
    let good = r#"  "gemini/gemini-9": {"litellm_provider": "gemini", "input_cost_per_token": 7.5e-07, "output_cost_per_token": 3.75e-06}"#;
    let bad = r#"  "gemini/gemini-8": {"litellm_provider": "gemini", "input_cost_per_token": -1, "output_cost_per_token": 1e-6}"#;
    std::fs::write(file, format!("{{\n{good},\n{bad}\n}}")).unwrap();
    let (code, refused) = run(&["import", file]);
    assert!(code == Some(1) && refused.contains("line 3") && refused.contains("[price_negative]"), "{refused}");
    assert_eq!(rows().await, before);
    std::fs::write(file, format!("{{\n{good}\n}}")).unwrap();
    // Kept for the comparison, and no price is changed.
    let (code, kept) = run(&["import", file, "--compare"]);
    assert!(code == Some(0) && kept.contains("1 model would be priced anew"), "{kept}");
    let mapped: Vec<String> = sqlx::query_scalar("select model_id from price_map").fetch_all(&pool).await.unwrap();
    assert_eq!((mapped, rows().await), (vec!["gemini-9".to_owned()], before));
    let (code, dry) = run(&["import", file, "--dry-run"]);
    assert!(code == Some(0) && dry.contains("new gemini/gemini-9: 0.75 in, 3.75 out"), "{dry}");
    assert_eq!(rows().await, before);
    assert_eq!(run(&["import", file]).0, Some(0));
    assert_eq!(rows().await, before + 1);
    let (code, listed) = run(&["list", "gemini-9"]);
    assert!(code == Some(0) && listed.contains("import prices.json") && listed.contains("3.75"), "{listed}");
    let (code, sync) = run(&["sync"]);
    assert!(code == Some(1) && sync.contains("OPENROUTER_API_KEY"), "{sync}");
}

#[test]
fn the_index_of_a_folder_is_kept_in_the_data_folder() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("code")).unwrap();
    std::fs::write(dir.path().join("code/greet.py"), "def greet(name):\n    return f'Hello {name}'\n").unwrap();
    let run = |args: &[&str]| {
        let mut command = loopwright(dir.path());
        let output = command.env("LOOPWRIGHT_PG_BIN", "/nonexistent").arg("index").args(args).output().unwrap();
        (output.status.code(), text(&output))
    };
    let (code, built) = run(&["build", "code", "--json"]);
    let built: serde_json::Value = serde_json::from_str(&built).unwrap();
    assert!(code == Some(0) && built["files"].is_u64(), "{built}");
    // The same folder under another name has the same index.
    assert_eq!(run(&["build", "./code/../code"]).0, Some(0));
    assert_eq!(std::fs::read_dir(dir.path().join("data/index")).unwrap().count(), 1);
    for args in [&["search", "code", "greet"][..], &["symbols", "code", "greet"], &["map", "code"]] {
        let (code, text) = run(args);
        assert_eq!(code, Some(0), "{args:?}: {text}");
    }
    let (code, pack) = run(&["pack", "code", "greet somebody", "--tokens", "100", "--json"]);
    let pack: serde_json::Value = serde_json::from_str(&pack).unwrap();
    assert!(code == Some(0) && pack["tokens"].as_u64().unwrap() <= 100, "{pack}");
    let (code, text) = run(&["build", "nowhere"]);
    assert!(code == Some(1) && text.contains("nowhere cannot be read"), "{text}");
    assert_eq!(run(&["build", "code/greet.py"]).0, Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_paused_forked_exported_and_decided_again_from_the_command_line() {
    use loopwright_engine::{
        activity::Registry,
        client::{Client, Start},
        hook::NoHook,
        view::RunStatus,
        worker::{self, WorkerConfig},
    };
    let pool = testing::database(loopwright_activities::MIGRATIONS).await;
    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&pool);
    let in_database = |url: &str, args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", url).args(args).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), stdout, String::from_utf8(output.stderr).unwrap())
    };
    let run = |args: &[&str]| in_database(&url, args);
    std::fs::write(dir.path().join("small.yaml"), SMALL).unwrap();
    std::fs::write(dir.path().join("slow.yaml"), SMALL.replace("1s", "2s")).unwrap();
    assert_eq!(run(&["workflow", "deploy", "small.yaml"]).0, Some(0));
    let client = Client::new(pool.clone(), Arc::new(NoHook));
    let start = Start {
        run_id: None,
        definition: client.pointer("small", "current").await.unwrap(),
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let id = client.start(start).await.unwrap().run_id;
    let until = async |id: RunId, what: RunStatus| {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            let view = client.describe(id).await.unwrap();
            if view.status == what {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{view:#?}");
            client.wait_change(id, view.seq, Duration::from_millis(200)).await.unwrap();
        }
    };
    let text = id.to_string();
    assert_eq!(run(&["run", "pause", &text, "--reason", "a look"]).0, Some(0));
    let worker = worker::start(WorkerConfig::new(pool.clone(), Registry::new())).await.unwrap();
    until(id, RunStatus::Paused).await;
    assert!(run(&["run", "list"]).1.contains("paused"));
    assert!(run(&["run", "resume", &text]).1.contains("Asked to go on"));
    until(id, RunStatus::Completed).await;

    let (code, stdout, stderr) = run(&["run", "replay", &text]);
    assert!(code == Some(0) && stdout.starts_with("The same decisions: "), "{stdout}{stderr}");
    let (code, file, _) = run(&["run", "export", &text]);
    assert_eq!(code, Some(0));
    std::fs::write(dir.path().join("run.jsonl"), &file).unwrap();
    // A file needs no database.
    let offline = |args: &[&str]| {
        let output = loopwright(dir.path()).env("LOOPWRIGHT_PG_BIN", "/nonexistent").args(args).output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), stdout, String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(offline(&["run", "replay", "run.jsonl"]).0, Some(0));
    assert_eq!(offline(&["run", "replay", "run.jsonl", "--definition", "small.yaml"]).0, Some(0));
    let (code, stdout, _) = offline(&["run", "replay", "run.jsonl", "--definition", "slow.yaml", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &found["divergence"]["found"]["type"]), (Some(1), &json!("step_started")), "{found}");
    let (code, _, stderr) = offline(&["run", "replay", "nowhere"]);
    assert!(code == Some(1) && stderr.contains("neither the id of a run nor a file"), "{stderr}");
    std::fs::write(dir.path().join("cut.jsonl"), &file[..file.len() / 2]).unwrap();
    let (code, _, stderr) = offline(&["run", "replay", "cut.jsonl"]);
    assert!(code == Some(1) && stderr.contains("cut.jsonl: line "), "{stderr}");

    let (code, _, stderr) = run(&["run", "import", "run.jsonl"]);
    assert!(code == Some(1) && stderr.contains("in this database already"), "{stderr}");
    let elsewhere = testing::database(loopwright_activities::MIGRATIONS).await;
    let there = testing::url(&elsewhere);
    let (code, stdout, stderr) = in_database(&there, &["run", "import", "run.jsonl"]);
    assert!(code == Some(0) && stdout.contains("never executed"), "{stdout}{stderr}");
    let (_, shown, _) = in_database(&there, &["run", "show", &text]);
    assert!(shown.contains("imported") && shown.contains("completed"), "{shown}");

    for args in [&["run", "fork", &text][..], &["run", "fork", &text, "--at", "1", "--step", "rest"]] {
        assert_eq!(run(args).0, Some(2), "{args:?}");
    }
    let (code, _, stderr) = run(&["run", "fork", &text, "--at", "900"]);
    assert!(code == Some(1) && stderr.contains("there is no transition 900"), "{stderr}");
    let (code, stdout, stderr) = run(&["run", "fork", &text, "--step", "rest", "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let fork: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let fork: RunId = fork["run_id"].as_str().unwrap().parse().unwrap();
    assert!(run(&["run", "show", &fork.to_string()]).1.contains(&format!("from {text} after transition 2")));
    let (code, stdout, stderr) = run(&["run", "reset", &fork.to_string(), "--at", "2", "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let reset: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    until(reset["run_id"].as_str().unwrap().parse().unwrap(), RunStatus::Completed).await;
    worker.drain(Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_run_goes_into_a_file_and_comes_back_to_be_read() {
    let server = Server::start().await;
    server.deploy(vec![activity("plan", "plan@1")]).await;
    let worker = server.worker(vec![Work::new("plan@1", script(|_| async { Ok(json!({})) }))]).await;
    let project = server.project("ann").await;
    let run = run_of(&server.trigger("ann", &project, "wait=30").await);
    worker.drain(Duration::from_secs(10)).await;
    let later = "create or replace function engine_now() returns timestamptz language sql stable as $$ select clock_timestamp() + interval '200 days' $$";
    sqlx::raw_sql(later).execute(&server.pool).await.unwrap();

    let dir = tempfile::tempdir().unwrap();
    let url = testing::url(&server.pool);
    let cli = |args: &[&str]| {
        let output = loopwright(dir.path()).env("DATABASE_URL", &url).args(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        (output.status.code(), text)
    };
    for (args, says) in [
        (vec!["retention", "run"], "retention.keep"),
        (vec!["retention", "run", "--keep", "90d"], "retention.archive"),
        (vec!["retention", "run", "--keep", "1h"], "less than a day"),
    ] {
        let (code, text) = cli(&args);
        assert!(code == Some(2) && text.contains(says), "{args:?}: {text}");
    }
    let folder = dir.path().join("archives");
    let archive = folder.to_str().unwrap();
    let (code, text) = cli(&["retention", "run", "--keep", "90d", "--dry-run"]);
    assert!(code == Some(0) && text.starts_with("1 runs would leave") && !folder.exists(), "{text}");
    let (code, text) = cli(&["retention", "run", "--keep", "90d", "--archive", archive, "--json"]);
    let report: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!((code, &report["runs"]), (Some(0), &json!(1)), "{text}");
    let file = report["archives"][0].as_str().unwrap();
    assert!(cli(&["retention", "list"]).1.contains(file));
    let (code, text) = cli(&["run", "show", &run]);
    assert!(code == Some(1) && text.contains("was retired") && text.contains(file), "{text}");
    problem(server.get("ann", &format!("/v1/runs/{run}")).send().await.unwrap(), 404, "not_found").await;
    let path = folder.join(file);
    let (code, text) = cli(&["retention", "import", path.to_str().unwrap(), "--run", &run]);
    assert!(code == Some(0) && text.starts_with("1 runs can be read here"), "{text}");
    let (code, text) = cli(&["run", "show", &run]);
    assert!(code == Some(0) && text.contains("imported"), "{text}");
}
