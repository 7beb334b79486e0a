//! Releases side by side on one database: a worker that knows less is a process of its own, limited to an older format
//! ([`KNOWN_FORMAT`]). It brings to its end what it can read, gives back what it cannot, and goes on with the rest.
//!
//! With [`OLDER`] the worker of one of these formats is a release of its time; `.ci/run older` builds one and runs these tests with it.
//!
//! The same runs as rows are kept in `tests/golden/rows`, a file a format, as their release stored them. A new format needs a run
//! that has it: let [`written`] meet it, then `GOLDEN=<name> cargo test -p loopwright-engine --test it versions::write -- --ignored` writes
//! the files that are not there yet. Those that are there stay as they are.

use crate::{
    bench::{Bench, PATIENCE, definition, e, step, waits_for, work},
    faults::{DATABASE, GRACE, LONG},
};
use loopwright_engine::{
    Failure,
    admission::{Admission, Rate},
    client::{Migrate, Signal, Start, Update, Why},
    definition::{Await, Branch, CallVersion, Data, Definition, Input, Join, Kind, ParentClose, Step},
    embedded::testing::url,
    event::FORMAT,
    ids::RunId,
    testing::KNOWN_FORMAT,
    view::{RunStatus, RunView},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

/// These tests as they were when histories had an older format: `<format>=<their program>`. Its `child_worker` is the older worker.
const OLDER: &str = "LOOPWRIGHT_TEST_OLDER";
/// Longest waits of the runs here, in ms: rows that are kept are to be gone on with in many years.
const CENTURY: u64 = 100 * 365 * 86_400_000;
/// Larger than what stays in a document.
const LARGE: usize = 100 << 10;

fn literal(value: Value) -> Vec<(&'static str, Data)> {
    vec![("is", Data::Literal(value))]
}

fn asks(signal: &str) -> Step {
    step(signal, Kind::Await(Box::new(Await { timeout_ms: CENTURY, ..waits_for(signal) })))
}

/// As a compiler makes them: an older release reads what says nothing new.
fn patient(name: &str, steps: Vec<Step>) -> Definition {
    lowest(Definition { timeout_ms: CENTURY, ..definition(name, steps) })
}

fn lowest(definition: Definition) -> Definition {
    Definition { format: definition.lowest_format(), ..definition }
}

/// Who does the work is written down.
fn works(bench: &Bench, who: u16) {
    let pool = bench.pool.clone();
    bench.script(move |ctx, input| {
        let pool = pool.clone();
        async move {
            let info = ctx.info().clone();
            sqlx::query("insert into test_by (run_id, path, who) values ($1, $2, $3)")
                .bind(info.run_id.0)
                .bind(&info.path)
                .bind(i32::from(who))
                .execute(&pool)
                .await
                .map_err(|e| Failure::retryable("transient.store", e.to_string()))?;
            match input["is"].as_str() {
                Some("away") if info.attempt == 1 => {
                    let away = Failure::retryable("transient.unavailable", "nobody is there");
                    Err(away.with_retry_after_ms(5).without_counting())
                }
                Some("large") => Ok(json!("much ".repeat(LARGE / 5))),
                _ => Ok(json!(1)),
            }
        }
    });
}

async fn prepared() -> Bench {
    let bench = Bench::new().await;
    sqlx::query("create table test_by (run_id uuid, path text, who int)").execute(&bench.pool).await.expect("table");
    works(&bench, FORMAT);
    bench
}

/// Who did the last step of a run.
async fn who(bench: &Bench, run: RunId) -> u16 {
    let who: i32 = sqlx::query_scalar("select who from test_by where run_id = $1 and path like '%last'")
        .bind(run.0)
        .fetch_one(&bench.pool)
        .await
        .expect("its last step was done once");
    u16::try_from(who).expect("a format")
}

fn waits(signal: &'static str) -> impl Fn(&RunView) -> bool {
    move |view| view.status == RunStatus::Running && view.waiting.iter().any(|w| format!("{w:?}").contains(signal))
}

/// A run that has got so far that something of it has this format, and waits for `go`. Then it works once more.
async fn written(bench: &Bench, format: u16) -> RunId {
    let name = format!("format{format}");
    let rest = || vec![asks("go"), work("last", &[])];
    let before = |first: Step| [vec![first], rest()].concat();
    let client = &bench.client;
    let run = match format {
        1 => bench.start(patient(&name, rest()), json!({})).await,
        2 => {
            let run = bench.start(patient(&name, rest()), json!({})).await;
            bench.until(run, "waits", waits("go")).await;
            client.pause(run, Why { reason: "look".into(), ..Why::default() }).await.expect("pause");
            bench.until(run, "paused", |v| v.status == RunStatus::Paused).await;
            client.resume(run, Why::default()).await.expect("resume");
            run
        }
        3 => {
            let run = bench.start(patient(&name, before(asks("question"))), json!({})).await;
            let update = Update { name: "question".into(), id: Some("u".into()), ..Update::default() };
            client.update(run, update, PATIENCE).await.expect("answered");
            run
        }
        4 => {
            // It waits in `finally`, between its end and that of its chain.
            let with = [("n".to_owned(), Data::Expr(e("inputs.n + 1")))].into();
            let first = |mut step: Step| {
                step.condition = Some(e("inputs.n < 1"));
                step
            };
            let mut chained = patient(&name, vec![first(step("again", Kind::ContinueAsNew { with, current: false }))]);
            let n = Input { schema: json!({"type": "integer"}), required: false, default: Some(json!(0)) };
            chained.inputs.insert("n".into(), n);
            chained.finally = rest().into_iter().map(first).collect();
            bench.start(lowest(chained), json!({})).await
        }
        5 => {
            let run = bench.start(patient(&name, rest()), json!({})).await;
            bench.until(run, "waits", waits("go")).await;
            let to = bench.deploy(patient(&name, [rest(), vec![work("more", &[])]].concat())).await;
            let migrate = Migrate {
                to,
                map: Default::default(),
                reason: "better".into(),
                by: None,
                dry_run: false,
                catalog: Default::default(),
            };
            client.migrate(run, migrate).await.expect("migrates");
            run
        }
        6 => bench.start(patient(&name, before(work("large", &literal(json!("large"))))), json!({})).await,
        7 => {
            let rate = Some(Rate { key: "versions".into(), starts: 9, per_ms: 1_000 });
            let start = Start {
                run_id: None,
                definition: bench.deploy(patient(&name, rest())).await,
                inputs: json!({}),
                workflow_id: None,
                attributes: json!({"user_id": "u1"}),
                queue: String::new(),
                topic: None,
                admission: Admission { rate, ..Admission::default() },
            };
            client.start(start).await.expect("start").run_id
        }
        8 => bench.start(patient(&name, before(work("away", &literal(json!("away"))))), json!({})).await,
        9 => {
            // One branch is done, and the call of the other is told to stop.
            bench.deploy(patient("part", vec![asks("never")])).await;
            let (workflow, version, with) = ("part".into(), CallVersion::Latest, Default::default());
            let call = step("part", Kind::Call { workflow, version, with, parent_close: ParentClose::Cancel });
            let branch = |name: &str, first: Step| Branch { name: name.into(), steps: vec![first] };
            let branches = vec![branch("l", call), branch("r", work("w", &[]))];
            let race = step("race", Kind::Parallel { branches, join: Join::First, fail_fast: false });
            bench.start(patient(&name, before(race)), json!({})).await
        }
        _ => panic!("format {format} is new: say here how a run comes to it"),
    };
    bench.until(run, "waits", waits("go")).await;
    // The number of what is stored, of whichever part.
    let stored: i32 = sqlx::query_scalar(
        "select greatest((select max(format) from history h where h.run_id = r.run_id), (cursor->>'format')::int)
         from runs r where run_id = $1",
    )
    .bind(run.0)
    .fetch_one(&bench.pool)
    .await
    .expect("stored");
    assert_eq!(stored, i32::from(format), "run of format {format}");
    run
}

async fn go(bench: &Bench, run: RunId) {
    let signal = Signal { name: "go".into(), dedupe_id: Some("go".into()), ..Signal::default() };
    bench.client.signal(run, signal).await.expect("signal");
}

/// Epoch and number of transitions of each run.
async fn standing(pool: &PgPool, runs: &[RunId]) -> Vec<(i64, i64)> {
    sqlx::query_as(
        "select epoch, seq from unnest($1::uuid[]) with ordinality u(run_id, n) join runs using (run_id) order by n",
    )
    .bind(runs.iter().map(|run| run.0).collect::<Vec<_>>())
    .fetch_all(pool)
    .await
    .expect("runs")
}

/// Nobody has set a run aside.
async fn none_is_quarantined(pool: &PgPool) {
    let aside: Vec<String> = sqlx::query_scalar(
        "select run_id || ': ' || coalesce(failure::text, '') from runs where status = 'quarantined'",
    )
    .fetch_all(pool)
    .await
    .expect("runs");
    assert_eq!(aside, Vec::<String>::new());
}

/// Works until its standard input ends. A worker that was declared dead is followed by the next, as its supervisor would do it: on
/// a busy machine a process may get no turn for longer than a lease.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the other tests of this file in a process of its own"]
async fn child_worker() {
    let (Ok(database), Ok(known)) = (std::env::var(DATABASE), std::env::var(KNOWN_FORMAT)) else { return };
    let bench = Bench::over(PgPool::connect(&database).await.expect("database"));
    works(&bench, known.parse().expect("a number"));
    let (ended, mut end) = tokio::sync::oneshot::channel::<()>();
    // A thread: the runtime would wait for a blocking read at its own end.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        drop(ended);
    });
    loop {
        let worker = bench.worker_with(LONG, 4).await;
        let leaves = tokio::select! {
            _ = &mut end => true,
            () = worker.fenced() => false,
        };
        worker.drain(GRACE).await;
        if leaves {
            return;
        }
        println!("worker of format {known} was declared dead; the next one starts");
    }
}

/// A worker of an older release.
struct Older {
    child: Child,
    stdin: Option<ChildStdin>,
}

/// The format of [`OLDER`], and its program.
fn older() -> Option<(u16, PathBuf)> {
    let text = std::env::var(OLDER).ok()?;
    let (format, program) = text.split_once('=').expect("<format>=<program>");
    Some((format.parse().expect("a format"), program.into()))
}

impl Older {
    fn start(bench: &Bench, known: u16) -> Self {
        let program = match older() {
            Some((format, program)) if format == known => program,
            _ => std::env::current_exe().expect("this binary"),
        };
        let mut child = Command::new(program)
            .args(["versions::child_worker", "--exact", "--ignored", "--nocapture"])
            .env(DATABASE, url(&bench.pool))
            .env(KNOWN_FORMAT, known.to_string())
            .env_remove("LOOPWRIGHT_CRASH_POINT")
            .stdin(Stdio::piped())
            .spawn()
            .expect("child");
        Self { stdin: child.stdin.take(), child }
    }

    /// Lets it go in good order.
    async fn leaves(mut self) {
        drop(self.stdin.take());
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(status.success(), "the older worker ended with {status}");
    }
}

impl Drop for Older {
    fn drop(&mut self) {
        // Our own child; one that has ended needs no end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_worker_ends_what_it_can_read_gives_back_the_rest_and_goes_on() {
    let bench = prepared().await;
    let newest = bench.worker().await;
    let mut runs = Vec::new();
    for format in 1..=FORMAT {
        runs.push(written(&bench, format).await);
    }
    newest.drain(GRACE).await;
    for run in &runs {
        go(&bench, *run).await;
    }
    for known in 1..FORMAT {
        let newer = &runs[usize::from(known)..];
        let before = standing(&bench.pool, newer).await;
        let older = Older::start(&bench, known);
        let run = runs[usize::from(known) - 1];
        bench.closed(run).await;
        assert_eq!(who(&bench, run).await, known, "nobody else is there");
        // Claimed and given back, each, and nothing of it has changed.
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let refused = loop {
            let now = standing(&bench.pool, newer).await;
            if now.iter().zip(&before).all(|((epoch, _), (old, _))| *epoch >= old + 2) {
                break now;
            }
            assert!(tokio::time::Instant::now() < deadline, "{known}: {before:?}, still {now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let transitions = |all: &[(i64, i64)]| all.iter().map(|(_, seq)| *seq).collect::<Vec<_>>();
        assert_eq!(
            transitions(&refused),
            transitions(&before),
            "a worker of format {known} has moved what it cannot read"
        );
        for run in newer {
            let other = bench.client.describe(*run).await.expect("it waits for somebody who can");
            assert_eq!(other.status, RunStatus::Running);
        }
        // What comes afterwards finds it at work.
        let after = bench.start(patient("plain", vec![work("first", &[]), work("last", &[])]), json!({})).await;
        assert_eq!(bench.closed(after).await.status, RunStatus::Completed);
        assert_eq!(who(&bench, after).await, known);
        older.leaves().await;
        none_is_quarantined(&bench.pool).await;
        // The next one need not wait until they are looked at again.
        sqlx::query("update ready set due_at = engine_now()").execute(&bench.pool).await.expect("sql");
    }
    let newest = bench.worker().await;
    let last = runs[usize::from(FORMAT) - 1];
    bench.closed(last).await;
    assert_eq!(who(&bench, last).await, FORMAT);
    newest.drain(GRACE).await;
    let open: i64 = sqlx::query_scalar("select count(*) from runs where closed_at is null")
        .fetch_one(&bench.pool)
        .await
        .expect("runs");
    assert_eq!(open, 0);
    bench.audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_releases_share_the_work_of_one_database() {
    const RUNS: usize = 12;
    let bench = prepared().await;
    let known = older().map_or(1, |(format, _)| format);
    let older = Older::start(&bench, known);
    let newest = bench.worker_with(LONG, 4).await;
    let hash = bench.deploy(patient("shared", vec![work("first", &[]), asks("go"), work("last", &[])])).await;
    // Until each has done something while the other was there.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut runs = Vec::new();
    loop {
        for _ in 0..RUNS {
            runs.push(bench.start_as(hash, json!({}), None).await.run_id);
        }
        for run in &runs {
            bench.until(*run, "waits", waits("go")).await;
        }
        let workers: i64 =
            sqlx::query_scalar("select count(distinct who) from test_by").fetch_one(&bench.pool).await.expect("count");
        if workers == 2 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "of {} runs one worker has done all", runs.len());
    }
    // A third of them becomes unreadable for the older one in the middle, and nobody says so to it.
    let why = || Why { reason: "look".into(), ..Why::default() };
    let paused: Vec<RunId> = runs.iter().copied().step_by(3).collect();
    for run in &paused {
        bench.client.pause(*run, why()).await.expect("pause");
    }
    for run in &paused {
        bench.until(*run, "paused", |v| v.status == RunStatus::Paused).await;
        bench.client.resume(*run, why()).await.expect("resume");
    }
    for run in &runs {
        go(&bench, *run).await;
    }
    for run in &runs {
        assert_eq!(bench.closed(*run).await.status, RunStatus::Completed);
    }
    for run in &paused {
        assert!(known > 1 || who(&bench, *run).await == FORMAT, "the older one cannot read it");
    }
    none_is_quarantined(&bench.pool).await;
    older.leaves().await;
    newest.drain(GRACE).await;
    bench.audit().await;
}

// --- rows ---

/// What belongs to a run, in an order in which it can be written; the run's id is `$1`.
const ROWS: [(&str, &str); 8] = [
    (
        "definitions",
        "hash in (select definition from runs where run_id = $1 union select hash from former_definitions where run_id = $1)",
    ),
    ("runs", "run_id = $1"),
    ("blobs", "run_id = $1"),
    ("former_definitions", "run_id = $1"),
    ("history", "run_id = $1"),
    ("checkpoints", "run_id = $1"),
    ("inbox", "run_id = $1"),
    ("ready", "run_id = $1"),
];

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/rows")
}

/// Names and texts of the files that are kept, with their format, which their name ends with.
fn kept() -> Vec<(u16, String)> {
    let mut found: Vec<_> = fs::read_dir(folder())
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .map(|path| {
            let format = path.file_stem().and_then(|name| name.to_str()?.rsplit('-').next()?.parse().ok());
            (format.expect("…-<format>.jsonl"), fs::read_to_string(&path).expect("text"))
        })
        .collect();
    found.sort();
    found
}

/// Writes a row with the columns that it had; columns that came later have their defaults.
async fn put(pool: &PgPool, table: &str, row: &Value) {
    assert!(ROWS.iter().any(|(known, _)| *known == table), "{table}: {row}");
    // The null of JSON is a value, which `jsonb_populate_record` takes for none.
    let columns: Vec<(String, String)> = sqlx::query_as(
        "select quote_ident(column_name), case when data_type = 'jsonb' and is_nullable = 'NO'
             then format('coalesce(%I, ''null'')', column_name) else quote_ident(column_name) end
         from information_schema.columns where table_schema = 'public' and table_name = $1 and $2 ? column_name",
    )
    .bind(table)
    .bind(row)
    .fetch_all(pool)
    .await
    .expect("columns");
    let (names, values): (Vec<String>, Vec<String>) = columns.into_iter().unzip();
    let sql = format!(
        "insert into {table} ({}) select {} from jsonb_populate_record(null::{table}, $1) on conflict do nothing",
        names.join(", "),
        values.join(", ")
    );
    sqlx::query(AssertSqlSafe(sql)).bind(row).execute(pool).await.unwrap_or_else(|error| panic!("{table}: {error}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_every_format_are_read_and_gone_on_with() {
    let kept = kept();
    let formats: Vec<u16> = kept.iter().map(|(format, _)| *format).collect();
    let missing: Vec<u16> = (1..=FORMAT).filter(|format| !formats.contains(format)).collect();
    assert!(missing.is_empty(), "no rows are kept of format {missing:?}: see the top of this file");
    let bench = prepared().await;
    let mut runs = Vec::new();
    for (format, text) in &kept {
        let mut run = None;
        for line in text.lines() {
            let mut row: Value = serde_json::from_str(line).expect("JSON");
            let table = row["table"].as_str().expect("table").to_owned();
            let row = row["row"].take();
            if table == "runs" {
                run = Some(row["run_id"].as_str().and_then(|id| id.parse::<RunId>().ok()).expect("a run"));
            }
            put(&bench.pool, &table, &row).await;
        }
        runs.push((*format, run.expect("a run")));
    }
    // Soon after those of format 4 were written, which are in `finally`: it has an hour.
    let clock = "do $do$ begin execute format('create or replace function engine_now() returns timestamptz language sql stable as
                   $f$ select clock_timestamp() - %L::interval $f$',
                 (select clock_timestamp() - max(at) - interval '10 s' from history where format = 4)); end $do$";
    sqlx::query(clock).execute(&bench.pool).await.expect("clock");
    let worker = bench.worker().await;
    for (format, run) in &runs {
        let view = bench.client.describe(*run).await.unwrap_or_else(|error| panic!("format {format}: {error}"));
        assert!(waits("go")(&view), "format {format}: {view:#?}");
        go(&bench, *run).await;
    }
    for (format, run) in &runs {
        let closed = bench.closed(*run).await;
        let wanted = if *format == 4 { RunStatus::Continued } else { RunStatus::Completed };
        assert_eq!(closed.status, wanted, "format {format}: {:?}", closed.failure);
        assert_eq!(bench.client.replay(*run, None).await.expect("folds").divergence, None, "format {format}");
        let rows = bench.client.history(*run, 0, 1_000).await.expect("history");
        if *format == 6 {
            let large = "much ".repeat(LARGE / 5);
            assert!(rows.iter().any(|row| json!(row.events).to_string().contains(&large)), "its value is whole");
        }
    }
    worker.drain(GRACE).await;
    none_is_quarantined(&bench.pool).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes files: see the top"]
async fn write_rows() {
    let name = std::env::var("GOLDEN").expect("GOLDEN=<name>");
    let bench = prepared().await;
    let worker = bench.worker().await;
    let mut runs = Vec::new();
    for format in 1..=FORMAT {
        runs.push((format, written(&bench, format).await));
    }
    worker.drain(GRACE).await;
    fs::create_dir_all(folder()).expect("folder");
    for (format, run) in runs {
        let path = folder().join(format!("{name}-{format}.jsonl"));
        // What is there stays.
        let Ok(mut file) = fs::File::create_new(path) else { continue };
        for (table, condition) in ROWS {
            let sql = format!("select to_jsonb(t) from {table} t where {condition}");
            let rows: Vec<Value> =
                sqlx::query_scalar(AssertSqlSafe(sql)).bind(run.0).fetch_all(&bench.pool).await.expect("rows");
            for row in rows {
                writeln!(file, "{}", json!({ "table": table, "row": row })).expect("written");
            }
        }
    }
}
