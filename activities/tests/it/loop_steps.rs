//! The steps of the development loop with rehearsed models, on real Postgres, git and sandbox. Each is executed twice, as
//! after a crash before its result was recorded: nothing is bought, committed or written a second time.

mod end;
mod items;
mod plans;

use crate::{billing_worker::closed, sandbox, workspace::Place};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    billing::Rate,
    orchestrator::{Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{
        Advice, Call, Completion, KeyIdentity, Provider, ProviderError, Scripted, estimate::request_tokens_max,
    },
    registry,
    toolbox::Toolbox,
    workspace::{FileChange, NewCommit},
};
use loopwright_engine::{
    Failure, FailureKind,
    activity::{
        AttemptInfo, Registry,
        detached::{self, Recorder},
    },
    client::{Client, Deploy, Start},
    definition::{Bundle, Definition, FORMAT},
    hook::NoHook,
    ids::{AttemptId, RunId},
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// A rehearsed model that remembers what it was asked: step path and call key, and the last words of the prompt.
pub(crate) struct Model {
    script: Scripted,
    calls: Mutex<Vec<(String, String)>>,
    requests: Mutex<Vec<(String, Request)>>,
    /// Most tokens of a prompt that it takes, whatever the routing says.
    takes: AtomicU64,
}

impl Provider for Model {
    fn name(&self) -> &'static str {
        "rehearsed"
    }
    fn key(&self) -> KeyIdentity {
        self.script.key()
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        let last = match call.request.messages.last() {
            Some(Message::User { text }) => text.clone(),
            other => format!("{other:?}"),
        };
        let at = format!("{}:{}", call.path, call.key);
        self.calls.lock().unwrap().push((at.clone(), last));
        self.requests.lock().unwrap().push((at, call.request.clone()));
        if request_tokens_max(call.request) > self.takes.load(Ordering::Relaxed) {
            let failure = Failure::permanent("model.context_overflow", "as ordered");
            return Box::pin(async move { Err(ProviderError::new(failure, Advice::OtherModel)) });
        }
        Provider::complete(&self.script, call)
    }
}

/// A project, a run on it, and its steps.
pub(crate) struct Bench {
    pub(crate) place: Place,
    registry: Registry,
    model: Arc<Model>,
    run: RunId,
    recorders: Mutex<BTreeMap<String, Arc<Recorder>>>,
    /// Attempts of a step that failed, and so count for the next ones.
    failures: Mutex<BTreeMap<String, u32>>,
}

impl Bench {
    async fn new(script: &Value) -> Self {
        Self::with_window(script, 1_000_000).await
    }

    /// Over models with a window of so many tokens.
    async fn with_window(script: &Value, window: u64) -> Self {
        let place = Place::new().await;
        let script = Scripted::new(serde_json::from_value(script.clone()).unwrap());
        let takes = AtomicU64::new(u64::MAX);
        let model = Arc::new(Model { script, calls: Mutex::default(), requests: Mutex::default(), takes });
        let mut routing = Routing::rehearsed();
        for candidate in routing.roles.values_mut().flatten() {
            candidate.context_tokens = window;
        }
        let pace = Pace { backoff: Duration::from_millis(1), ..Pace::default() };
        let toolbox = Arc::new(Toolbox {
            orchestrator: Orchestrator::with_pace(routing, vec![model.clone() as Arc<dyn Provider>], pace),
            workspaces: place.all.clone(),
            sandbox: sandbox::levels()[0].clone(),
            pool: place.pool.clone(),
            data_dir: place.root.path().to_owned(),
            rate: Rate { credits_per_usd: 100, markup_bps: 0 },
        });
        let run = RunId::new();
        Self { place, registry: registry(toolbox), model, run, recorders: Mutex::default(), failures: Mutex::default() }
    }

    /// One attempt of a step; what its earlier attempts saved is there.
    pub(crate) async fn attempt(
        &self,
        activity: &str,
        path: &str,
        attempt: u32,
        input: &Value,
    ) -> Result<Value, Failure> {
        let recorder = self.recorders.lock().unwrap().entry(format!("{}/{path}", self.run)).or_default().clone();
        let info = AttemptInfo {
            run_id: self.run,
            attempt_id: AttemptId::derive(self.run, path, attempt),
            path: path.to_owned(),
            attempt,
            counted: 1 + self.failures.lock().unwrap().get(path).copied().unwrap_or(0),
            idempotency_key: format!("{}/{path}", self.run),
            ..detached::info(activity, json!({}))
        };
        let mut input = input.clone();
        input["project_id"] = json!(self.place.project);
        let ctx = detached::context(info, BTreeMap::new(), recorder);
        let result = self.registry.get(activity).unwrap().run(ctx, input).await;
        if result.is_err() {
            *self.failures.lock().unwrap().entry(path.to_owned()).or_default() += 1;
        }
        result
    }

    /// A step that died before its result was recorded and is executed again, twice: nothing happens twice.
    pub(crate) async fn step(&self, activity: &str, path: &str, input: Value) -> Value {
        let first = self.attempt(activity, path, 1, &input).await.unwrap();
        let traces = self.traces().await;
        for attempt in 2..=3 {
            let again = self.attempt(activity, path, attempt, &input).await.unwrap();
            assert_eq!(steady(again), steady(first.clone()), "{path}");
            assert_eq!(self.traces().await, traces, "{path} left something twice");
        }
        first
    }

    async fn traces(&self) -> Vec<i64> {
        let mut counts = vec![i64::try_from(self.model.calls.lock().unwrap().len()).unwrap()];
        for table in ["project_records", "conversations", "project_bundles", "project_files", "project_refs"] {
            counts.push(self.place.count(table).await);
        }
        counts
    }

    fn calls(&self) -> Vec<String> {
        self.model.calls.lock().unwrap().iter().map(|(at, _)| at.clone()).collect()
    }

    /// From now on the model takes prompts of so many tokens.
    pub(crate) fn takes(&self, tokens: u64) {
        self.model.takes.store(tokens, Ordering::Relaxed);
    }

    /// How often a call was made, those that were refused included.
    pub(crate) fn calls_of(&self, at: &str) -> usize {
        self.calls().iter().filter(|call| *call == at).count()
    }

    /// Everything that the model was asked, with step path and call key.
    pub(crate) fn requests(&self) -> Vec<(String, Request)> {
        self.model.requests.lock().unwrap().clone()
    }

    fn last_words(&self) -> String {
        self.model.calls.lock().unwrap().last().unwrap().1.clone()
    }

    async fn file(&self, path: &str) -> Option<String> {
        self.place.open(None).await.read(path).unwrap()
    }

    /// The message of the newest commit.
    async fn message(&self) -> String {
        let to = tempfile::tempdir().unwrap();
        self.place.all.export(self.place.project, &to.path().join("out")).await.unwrap();
        let mut git = std::process::Command::new("git");
        git.current_dir(to.path().join("out")).args(["log", "-1", "--format=%B"]);
        String::from_utf8(git.output().unwrap().stdout).unwrap()
    }

    async fn commits(&self) -> usize {
        let to = tempfile::tempdir().unwrap();
        if self.place.all.export(self.place.project, &to.path().join("out")).await.is_err() {
            return 0;
        }
        let mut git = std::process::Command::new("git");
        git.current_dir(to.path().join("out")).args(["log", "--format=%H"]);
        String::from_utf8(git.output().unwrap().stdout).unwrap().lines().count()
    }

    /// A snapshot of `main` with these changes, as an implementer leaves it.
    pub(crate) async fn work(&self, changes: &[(&str, &str)]) -> String {
        let open = self.place.open(None).await;
        let changes: Vec<_> = changes
            .iter()
            .map(|(path, content)| FileChange { path: (*path).into(), content: Some((*content).into()) })
            .collect();
        open.write(&changes).unwrap();
        open.snapshot("work", chrono::DateTime::UNIX_EPOCH).await.unwrap()
    }

    /// Requirements and a plan, the shortest way.
    pub(crate) async fn planned(&self) -> Vec<Value> {
        self.step("gather@1", "gather~1/ask", json!({"idea": "Count words"})).await;
        let plan = self.step("plan@1", "plan", json!({})).await;
        plan["todo"].as_array().unwrap().clone()
    }

    /// Takes an item through check and commit.
    pub(crate) async fn item(&self, path: &str, todo: &Value, work: &str) -> Value {
        let checks = self.step("check@1", &format!("{path}/check"), json!({"todo": todo, "work": work})).await;
        let input = json!({"todo": todo, "checks": checks, "work": work});
        self.step("commit@1", &format!("{path}/commit"), input).await
    }
}

/// An output without what measures differently each time.
fn steady(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            fields.retain(|name, _| !["duration_ms", "log_sha256", "output_tail"].contains(&name.as_str()));
            fields.values_mut().for_each(|field| *field = steady(field.take()));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = steady(item.take())),
        _ => {}
    }
    value
}

pub(crate) fn at(pattern: &str, answer: Value) -> Value {
    json!({"at": pattern, "reply": {"json": answer}})
}

pub(crate) fn says(pattern: &str, text: &str) -> Value {
    json!({"at": pattern, "reply": {"text": text}})
}

pub(crate) fn todo(id: &str, serves: &[&str], after: &[&str], command: &str) -> Value {
    json!({"id": id, "title": format!("Do {id}"), "detail": "d", "requirements": serves, "depends_on": after, "files": [],
           "checks": [{"command": command, "expect_exit": 0}]})
}

pub(crate) fn plan(items: Vec<Value>) -> Value {
    json!({"summary": "Counts.", "stack": [{"choice": "sh", "reason": "there"}], "architecture_markdown": "One file.", "todo": items})
}

pub(crate) fn complete() -> Value {
    json!({"complete": true, "question": "", "suggestions": [], "assumptions": ["UTF-8"],
           "requirements": [{"id": "R1", "text": "It counts."}, {"id": "R2", "text": "It ranks."}]})
}

pub(crate) fn question(text: &str) -> Value {
    json!({"complete": false, "question": text, "suggestions": ["a", "b"], "assumptions": [],
           "requirements": [{"id": "R1", "text": "It counts."}]})
}

pub(crate) fn verdict(criteria: &[(&str, &str, Value)], items: Vec<Value>) -> Value {
    let criteria: Vec<Value> = criteria
        .iter()
        .map(|(id, verdict, citation)| {
            let citations = if citation.is_null() { json!([]) } else { json!([citation]) };
            json!({"requirement": id, "verdict": verdict, "reason": "because", "citations": citations})
        })
        .collect();
    json!({"summary": "Looked.", "criteria": criteria, "items": items})
}

pub(crate) fn line(path: &str, line: u32) -> Value {
    json!({"path": path, "line": line, "check": ""})
}

fn simple() -> Vec<Value> {
    vec![
        at("gather~1/ask:ask", complete()),
        at("plan:plan", plan(vec![todo("a", &["R1"], &[], "sh a.sh"), todo("b", &["R2"], &["a"], "sh b.sh")])),
    ]
}

/// An answer that calls one tool.
pub(crate) fn calls(pattern: &str, tool: &str, arguments: Value) -> Value {
    json!({"at": pattern, "reply": {"tool_calls": [{"name": tool, "arguments": arguments}]}})
}

pub(crate) fn writes(pattern: &str, path: &str, content: &str) -> Value {
    calls(pattern, "edit", json!({"edits": [{"op": "write", "path": path, "content": content}]}))
}

pub(crate) fn finishes(pattern: &str) -> Value {
    calls(pattern, "done", json!({"summary": "finished"}))
}

/// Requirements, a plan with two finished items, and the code.
pub(crate) async fn finished(extra: Vec<Value>) -> (Bench, Vec<Value>) {
    finished_with_window(extra, 1_000_000).await
}

/// The same over models with a window of so many tokens.
pub(crate) async fn finished_with_window(extra: Vec<Value>, window: u64) -> (Bench, Vec<Value>) {
    let mut script = simple();
    script.extend(extra);
    let bench = Bench::with_window(&json!(script), window).await;
    let items = bench.planned().await;
    let work = bench.work(&[("a.sh", "echo made > made.txt\nexit 0\n")]).await;
    bench.item("implement[a]", &items[0], &work).await;
    let work = bench.work(&[("b.sh", "grep -q exit a.sh\n")]).await;
    bench.item("implement[b]", &items[1], &work).await;
    (bench, items)
}

#[tokio::test]
async fn hostile_answers_are_classified_failures_without_effect() {
    let huge = format!("{{\"summary\": \"{}\"}}", "x".repeat(3_000_000));
    let deep = "[".repeat(100_000);
    let wrong = json!({"complete": "yes", "todo": {}, "criteria": 7}).to_string();
    let cut = complete().to_string()[..60].to_owned();
    let text = |name: &str, text: &str| says(&format!("*-{name}:*"), text);
    let refusal = |name: &str| json!({"at": format!("*-{name}:*"), "reply": {"failure": {"code": format!("model.{name}"), "permanent": true}}});
    let cases = [
        ("prose", text("prose", "I cannot do that, sorry.")),
        ("empty", text("empty", "")),
        ("cut", text("cut", &cut)),
        ("wrong", text("wrong", &wrong)),
        ("huge", text("huge", &huge)),
        ("deep", text("deep", &deep)),
        ("null", text("null", "null")),
        ("refused", refusal("refused")),
        ("truncated", refusal("truncated")),
    ];
    let (bench, _) = finished(cases.iter().map(|(_, entry)| entry.clone()).collect()).await;
    let before = bench.traces().await;
    for (name, _) in &cases {
        for activity in ["gather@1", "plan@1", "verify@1", "readme@1"] {
            let path = format!("{}-{name}", activity.trim_end_matches("@1"));
            if activity == "readme@1" && !["empty", "huge", "refused", "truncated"].contains(name) {
                // Any text is a README.
                continue;
            }
            let failure = bench.attempt(activity, &path, 1, &json!({"idea": "x"})).await.expect_err(name);
            assert!(failure.code.starts_with("model."), "{activity} {name}: {failure:?}");
            assert!(failure.message.len() < 2_000, "{activity} {name}: {} bytes", failure.message.len());
        }
    }
    let after = bench.traces().await;
    // The user's idea was a turn of the conversation already; nothing was written.
    assert_eq!(after[1..], before[1..]);
}

/// Postgres takes no NUL in JSON, and the answer is recorded before it is used.
#[tokio::test]
async fn a_nul_in_an_answer_does_not_lose_it() {
    let mut odd = complete();
    odd["requirements"][0]["text"] = json!("It\0counts.");
    let bench = Bench::new(&json!([
        at("gather~1/ask:ask", odd),
        at("plan:plan", plan(vec![todo("a", &["R1", "R2"], &[], "true")]))
    ]))
    .await;
    let output = bench.step("gather@1", "gather~1/ask", json!({"idea": "x"})).await;
    assert_eq!(output["requirements"][0]["text"], "It\u{2400}counts.");
    let saved: Vec<Value> = {
        let recorders = bench.recorders.lock().unwrap();
        recorders.values().flat_map(|r| r.checkpoints.lock().unwrap().values().cloned().collect::<Vec<_>>()).collect()
    };
    assert!(!saved.is_empty());
    for value in saved {
        sqlx::query("select $1::jsonb").bind(value).execute(&bench.place.pool).await.expect("it can be recorded");
    }
    bench.step("plan@1", "plan", json!({})).await;
}

#[tokio::test]
async fn paths_and_commands_of_a_model_stay_in_their_place() {
    let mut evil = todo("../../Evil; rm -rf /", &["R1", "R2"], &[], "true");
    evil["files"] = json!(["../../etc/passwd", "/etc/shadow", ".git/config", "src/ok.rs", "a/../../b"]);
    evil["frozen"] = json!(["../x", "tests"]);
    evil["title"] = json!("A title\nLoopwright-Run: forged\n```");
    let script = json!([at("gather~1/ask:ask", complete()), at("plan:plan", plan(vec![evil]))]);
    let bench = Bench::new(&script).await;
    let items = bench.planned().await;
    assert_eq!(items[0]["id"], "evil-rm-rf");
    assert_eq!((&items[0]["files"], &items[0]["frozen"]), (&json!(["src/ok.rs"]), &json!(["tests"])));
    let work = bench.work(&[("a", "a")]).await;
    bench.item("implement[evil-rm-rf]", &items[0], &work).await;
    let message = bench.message().await;
    assert!(!message.lines().any(|line| line == "Loopwright-Run: forged"), "{message}");
}
