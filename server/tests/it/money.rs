//! The jobs that hold the books against the outside, fired as they ship, and what the command line says of money.

use loopwright_activities::{
    MIGRATIONS,
    billing::{
        BillingSettings, LedgerHook, MicroCredits,
        ledger::{self, Identity},
    },
    reconcile::{self, Books},
    usage::{CallClosed, CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource},
};
use loopwright_engine::{
    activity::Registry,
    client::Client,
    definition::Bundle,
    embedded::testing,
    hook::{AttemptEnd, AttemptRef, AttemptStart, Outcome, Phase, Reading, Transition, TransitionHook},
    ids::{AttemptId, RunId},
    schedule::{Timing, When},
    view::{RunStatus, RunView},
    worker::{self, WorkerConfig},
};
use loopwright_server::{app, shipped};
use serde_json::{Value, json};
use sqlx::PgPool;
use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};
use uuid::Uuid;

struct Cli {
    dir: tempfile::TempDir,
    url: String,
    /// Where OpenRouter is said to be.
    openrouter: Option<String>,
}

impl Cli {
    fn of(pool: &PgPool) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), url: testing::url(pool), openrouter: None }
    }

    fn output(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loopwright"));
        command.env_clear().current_dir(self.dir.path()).env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("LOOPWRIGHT_DATA_DIR", self.dir.path().join("data")).env("DATABASE_URL", &self.url);
        if let Some(base) = &self.openrouter {
            command.env("OPENROUTER_API_KEY", "sk-or-test").env("OPENROUTER_BASE_URL", base);
        }
        command.args(args).output().unwrap()
    }

    fn text(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.output(args);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text)
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.output(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

async fn user(pool: &PgPool, telegram: i64) -> Uuid {
    let mut conn = pool.acquire().await.unwrap();
    let welcome = MicroCredits::from_credits(100);
    ledger::ensure_user(&mut conn, &Identity::Telegram(telegram), welcome).await.unwrap().0
}

#[test]
fn the_jobs_that_ship_run_as_often_as_the_design_says() {
    let expected = [
        ("reconcile-calls", "* * * * *", 60),
        ("reconcile-grants", "*/15 * * * *", 15 * 60),
        ("reconcile-ledger", "7 * * * *", 3_600),
        ("reconcile-payments", "17 3 * * *", 86_400),
        ("reconcile-prices", "27 4 * * mon", 7 * 86_400),
        ("reconcile-providers", "37 3 * * *", 86_400),
    ];
    let mut found = Vec::new();
    for (file, text) in shipped::DEFINITIONS {
        let bundle: Bundle = shipped::PROMPTS.iter().map(|(p, t)| ((*p).to_owned(), (*t).to_owned())).collect();
        let (compiled, problems) = loopwright_workflows::compile(text, file, &bundle, &app::catalog());
        let definition = compiled.unwrap_or_else(|| panic!("{file}: {problems:?}")).definition;
        for spec in loopwright_workflows::schedules(&definition) {
            let instants = Timing::new(&spec.when).unwrap().upcoming(chrono::Utc::now(), 2);
            let When::Cron { expression, timezone } = &spec.when else { panic!("{file}: {spec:?}") };
            assert_eq!((spec.workflow.as_str(), timezone.as_str()), (definition.name.as_str(), "UTC"));
            found.push((definition.name.clone(), expression.clone(), (instants[1] - instants[0]).num_seconds()));
        }
    }
    assert_eq!(found, expected.map(|(name, cron, seconds)| (name.to_owned(), cron.to_owned(), seconds)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_ships_fires_its_job_and_what_it_finds_is_kept() {
    let pool = testing::database(MIGRATIONS).await;
    let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
    let client = Client::new(pool.clone(), hook.clone());
    shipped::deploy(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
    shipped::schedule(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
    let user = user(&pool, 7).await;
    sqlx::query("update users set ledger_seq = ledger_seq + 1").execute(&pool).await.unwrap();

    // An hour passes, for Postgres, whose clock counts.
    const NAME: &str = "reconcile-ledger/cron/1";
    let schedules = client.schedules();
    let made = schedules.describe(NAME).await.unwrap().schedule;
    assert!(schedules.describe(NAME).await.unwrap().recent.is_empty());
    let due = Timing::new(&made.spec.when).unwrap().due(made.id, made.next_at.unwrap(), made.spec.jitter_ms);
    let shift = (due - chrono::Utc::now()).num_milliseconds() + 1_000;
    for sql in [
        "create table test_shift (ms bigint)",
        "create or replace function engine_now() returns timestamptz language sql stable as $$
           select clock_timestamp() + coalesce((select max(ms) from test_shift), 0) * interval '1 ms' $$",
    ] {
        sqlx::query(sql).execute(&pool).await.unwrap();
    }
    sqlx::query("insert into test_shift values ($1)").bind(shift).execute(&pool).await.unwrap();
    assert!(schedules.fire_due().await.unwrap() > 0);
    let fired = schedules.describe(NAME).await.unwrap().recent;
    let run = fired[0].run_id.expect("it has started");

    let books =
        Books { pool: pool.clone(), client: client.clone(), openrouter: None, stars: None, candidates: Vec::new() };
    let registry = reconcile::register(Registry::new(), &Arc::new(books));
    let worker = worker::start(WorkerConfig { hook, ..WorkerConfig::new(pool.clone(), registry) }).await.unwrap();
    let view = closed(&client, run).await;
    worker.drain(Duration::from_secs(5)).await;
    assert_eq!((view.status, &view.failure), (RunStatus::Completed, &None));
    let output = view.output.unwrap();
    assert_eq!((&output["findings"], &output["changed"]), (&json!(1), &json!(1)), "{output}");
    assert!(view.attributes["user_id"].is_null(), "it is nobody's: {}", view.attributes);

    let cli = Cli::of(&pool);
    let found = cli.json(&["credits", "findings"]);
    let first = &found[0];
    assert_eq!((&first["job"], &first["kind"]), (&json!("reconcile-ledger"), &json!("I1")), "{found}");
    assert_eq!(first["user_id"], json!(user));
    let stopped: bool =
        sqlx::query_scalar("select holds_stopped_at is not null from users").fetch_one(&pool).await.unwrap();
    assert!(stopped, "its user holds nothing more");
}

async fn closed(client: &Client, run: RunId) -> RunView {
    loop {
        let view = client.describe(run).await.unwrap();
        if view.status.is_closed() {
            return view;
        }
        client.wait_change(run, view.seq, Duration::from_secs(1)).await.unwrap();
    }
}

/// A server that answers every request with this list of models.
fn listing(list: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}/api/v1", listener.local_addr().unwrap());
    // It lives as long as the test process.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines();
            let asked = lines.next().and_then(Result::ok).unwrap_or_default();
            while lines.next().and_then(Result::ok).is_some_and(|line| !line.is_empty()) {}
            let (status, body) =
                if asked.starts_with("GET /api/v1/models ") { ("200 OK", list) } else { ("404 Not Found", "{}") };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            // A client that is gone needs no answer.
            let _ = (&stream).write_all(format!("{head}{body}").as_bytes());
        }
    });
    base
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_openrouter_is_taken_over() {
    const LIST: &str = r#"{"data": [
      {"id": "google/gemini-3.8-flash", "pricing": {"prompt": "0.0000009", "completion": "0.000004", "input_cache_read": "0.00000009"}},
      {"id": "google/gemini-3.5-flash-lite", "pricing": {"prompt": "-1", "completion": "-1"}},
      {"id": "new/model", "pricing": {"prompt": "0.000001", "completion": "0.000002"}}]}"#;
    let pool = testing::database(MIGRATIONS).await;
    let mut cli = Cli::of(&pool);
    let (code, text) = cli.text(&["pricing", "sync"]);
    assert!(code == Some(1) && text.contains("OPENROUTER_API_KEY"), "{code:?} {text}");
    cli.openrouter = Some(listing(LIST));

    // One price of the list is wrong, which is said by the exit code.
    let json = |args: &[&str]| -> Value {
        let output = cli.output(&[args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let dry = json(&["pricing", "sync", "--dry-run"]);
    assert_eq!((&dry["dry_run"], dry["changed"][0]["model"].as_str()), (&json!(true), Some("google/gemini-3.8-flash")));
    let prices = |model: &str| cli.json(&["pricing", "list", model, "--history"]).as_array().unwrap().len();
    let before = prices("openrouter/google/gemini-3.8-flash");

    // Only what is used here; what is listed wrongly is told if it is.
    let (code, text) = cli.text(&["pricing", "sync"]);
    assert!(code == Some(1) && text.contains("changed openrouter/google/gemini-3.8-flash: 0.9 in, 4 out"), "{text}");
    assert!(text.contains("price_negative") && !text.contains("new/model"), "{text}");
    assert_eq!(prices("openrouter/google/gemini-3.8-flash"), before + 1);
    assert_eq!(prices("openrouter/new/model"), 0);
    let row: (i64, i64, i64, String) = sqlx::query_as(
        "select input_umtok, cached_input_umtok, output_umtok, source from model_pricing
         where provider = 'openrouter' and model_id = 'google/gemini-3.8-flash' order by id desc limit 1",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(row, (900_000, 90_000, 4_000_000, "openrouter /models".to_owned()));

    // All of them, and the same again changes nothing.
    let all = json(&["pricing", "sync", "--all"]);
    assert_eq!(all["new"][0]["model"], "new/model", "{all}");
    assert_eq!(prices("openrouter/new/model"), 1);
    assert_eq!(prices("openrouter/google/gemini-3.8-flash"), before + 1, "it is the price that is to come");
}

/// One attempt with one call, from hold to settlement.
async fn spends(pool: &PgPool, user: Uuid, activity: &str, model: &str) {
    let hook = LedgerHook::new(BillingSettings::default());
    let run = RunId::new();
    let attempt = AttemptRef {
        run_id: run,
        attempt_id: AttemptId::derive(run, "step", 1),
        activity: activity.into(),
        path: "step".into(),
        attempt: 1,
        attributes: Arc::new(json!({ "user_id": user.to_string() })),
        budget: Arc::new(Value::Null),
        deadline: chrono::Utc::now() + chrono::Duration::minutes(20),
    };
    let planned = PlannedCall {
        ceilings: Vec::new(),
        candidates: vec![("rehearsed".into(), model.into())],
        count: 1,
        input_tokens: 1_000,
        output_tokens: 100,
    };
    let reserve = serde_json::to_value(Reserve { calls: vec![planned] }).unwrap();
    let opened = CallOpened {
        provider: "rehearsed".into(),
        model: model.into(),
        purpose: "test".into(),
        request_sha256: "00".repeat(32),
        key_fingerprint: "11".repeat(32),
        key_last4: String::new(),
        own_key_id: None,
        input_tokens_max: 1_000,
        output_tokens_max: 100,
        local: false,
        input_umtok_max: None,
        output_umtok_max: None,
    };
    let usage = Usage { tokens_prompt: 1_000, tokens_output: 100, source: UsageSource::Provider, ..Usage::default() };
    let closed = CallClosed {
        state: CallState::Succeeded,
        model_served: None,
        provider_request_id: None,
        http_status: Some(200),
        error_class: None,
        finish_reason: Some("stop".into()),
        stream_completed: true,
        usage: Some(usage),
    };
    let (opened, closed) = (serde_json::to_value(opened).unwrap(), serde_json::to_value(closed).unwrap());
    let starts = vec![AttemptStart { attempt: attempt.clone(), reserve }];
    let ends = vec![AttemptEnd { attempt: attempt.clone(), outcome: Outcome::Succeeded, failure: None, again: false }];
    let begins = Transition { ord: 0, run_id: run, ended: Vec::new(), started: starts };
    let is_over = Transition { ord: 0, run_id: run, ended: ends, started: Vec::new() };
    // Nobody else is at this database: each statement may be a transaction of its own.
    let mut conn = pool.acquire().await.unwrap();
    assert!(hook.apply(&mut conn, &[begins]).await.unwrap().is_empty());
    for (phase, body) in [(Phase::Open, &opened), (Phase::Close, &closed)] {
        hook.meter(&mut conn, &attempt, Reading { key: "a.0", phase, current: true, body }).await.unwrap();
    }
    hook.apply(&mut conn, &[is_over]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_adds_up_over_users_models_and_activities() {
    let pool = testing::database(MIGRATIONS).await;
    let (one, two) = (user(&pool, 1).await, user(&pool, 2).await);
    for (user, activity, model) in [
        (one, "plan@1", "rehearsed/architect"),
        (one, "plan@1", "rehearsed/utility"),
        (two, "plan@1", "rehearsed/architect"),
        (two, "implement@1", "rehearsed/implementer"),
    ] {
        spends(&pool, user, activity, model).await;
    }
    let cli = Cli::of(&pool);
    // 1,000 and 100 tokens at 2 and 10, 0.3 and 2.5, 0.1 and 0.4 USD per million; 120 credits per USD.
    let rows = |args: &[&str]| -> Vec<(String, i64, String, String)> {
        let report = cli.json(&[&["credits", "report"], args].concat());
        let row = |row: &Value| {
            let text = |name: &str| row[name].as_str().unwrap().to_owned();
            (text("key"), row["attempts"].as_i64().unwrap(), text("cost_usd"), text("credits"))
        };
        report.as_array().unwrap().iter().map(row).collect()
    };
    let row = |key: &str, attempts, cost: &str, credits: &str| (key.to_owned(), attempts, cost.into(), credits.into());
    assert_eq!(
        rows(&[]),
        [row("plan@1", 3, "0.00614", "0.7368"), row("implement@1", 1, "0.00055", "0.066")],
        "by activity, dearest first"
    );
    assert_eq!(
        rows(&["--by", "model"]),
        [
            row("rehearsed/rehearsed/architect", 2, "0.006", "0.72"),
            row("rehearsed/rehearsed/implementer", 1, "0.00055", "0.066"),
            row("rehearsed/rehearsed/utility", 1, "0.00014", "0.0168"),
        ]
    );
    let (first, second) = (one.to_string(), two.to_string());
    assert_eq!(rows(&["--by", "user"]), [row(&second, 2, "0.00355", "0.426"), row(&first, 2, "0.00314", "0.3768")]);
    assert_eq!(rows(&["--by", "activity", "--user", &first]), [row("plan@1", 2, "0.00314", "0.3768")]);
    assert_eq!(rows(&["--by", "day", "--to", "2020-01-01"]), []);
    let (code, text) = cli.text(&["credits", "report", "--by", "model"]);
    assert_eq!(code, Some(0), "{text}");
    for word in ["tokens in/out", "given back", "2000/200", "0.0168"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let (code, text) = cli.text(&["credits", "report", "--by", "weather"]);
    assert!(code == Some(2) && text.contains("[possible values: user, project, model, activity, day]"), "{text}");
}
