//! The steps of the development loop with rehearsed models, on real Postgres, git and sandbox. Each is executed twice, as
//! after a crash before its result was recorded: nothing is bought, committed or written a second time.

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

#[tokio::test]
async fn gathering_asks_hears_and_completes() {
    let bench =
        Bench::new(&json!([at("gather~1/ask:ask", question("Which?")), at("gather~2/ask:ask", complete())])).await;
    let first = bench.step("gather@1", "gather~1/ask", json!({"idea": " Count words "})).await;
    assert_eq!((&first["complete"], &first["question"]), (&json!(false), &json!("Which?")));
    assert_eq!(first["model"], "rehearsed/architect");
    let second =
        bench.step("gather@1", "gather~2/ask", json!({"idea": " Count words ", "answer": "You\0 decide"})).await;
    assert_eq!((&second["complete"], second["requirements"].as_array().unwrap().len()), (&json!(true), 2));
    let rows: Vec<(i32, String, Value)> = sqlx::query_as("select seq, role, parts from conversations order by seq")
        .fetch_all(&bench.place.pool)
        .await
        .unwrap();
    let texts: Vec<_> =
        rows.iter().map(|(n, who, parts)| (*n, who.as_str(), parts[0]["text"].as_str().unwrap())).collect();
    assert_eq!(texts, [(1, "user", "Count words"), (2, "model", "Which?"), (3, "user", "You\u{2400} decide")]);
    assert_eq!(bench.place.count("project_records").await, 2);
    assert!(bench.last_words().contains("You: Which?"), "{}", bench.last_words());

    let failure = bench.attempt("gather@1", "gather~3/ask", 1, &json!({"idea": " \n"})).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("input.invalid", FailureKind::Permanent));
}

#[tokio::test]
async fn after_six_questions_it_is_enough_in_each_run_anew() {
    let mut bench = Bench::new(&json!([at("*:ask", question("And?"))])).await;
    for _ in 0..2 {
        for round in 1..=7 {
            let path = format!("gather~{round}/ask");
            let output = bench.step("gather@1", &path, json!({"idea": "Count words", "answer": "x"})).await;
            assert_eq!(output["complete"], json!(round == 7), "round {round}");
        }
        assert!(bench.last_words().contains("You have asked enough"));
        bench.run = RunId::new();
    }
}

#[tokio::test]
async fn a_plan_with_a_gap_or_a_circle_is_asked_for_again() {
    let gap = plan(vec![todo("a", &["R1"], &[], "true")]);
    let circle = plan(vec![todo("a", &["R1"], &["b"], "true"), todo("b", &["R2"], &["a"], "true")]);
    let good = plan(vec![todo("b", &["R2"], &["a"], "true"), todo("a", &["R1"], &[], "true")]);
    let script = json!([
        at("gather~1/ask:ask", complete()),
        at("plan:plan", gap),
        at("plan:plan-2", circle),
        at("plan:plan-3", good)
    ]);
    let bench = Bench::new(&script).await;
    bench.step("gather@1", "gather~1/ask", json!({"idea": "Count words"})).await;
    let failure = bench.attempt("plan@1", "plan", 1, &json!({})).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.output_invalid", FailureKind::Retryable));
    assert!(failure.message.contains("circle"), "{}", failure.message);
    assert_eq!((bench.commits().await, bench.place.count("project_records").await), (0, 1));
    // The second attempt buys only what is new.
    let output = bench.attempt("plan@1", "plan", 2, &json!({})).await.unwrap();
    assert_eq!(bench.calls(), ["gather~1/ask:ask", "plan:plan", "plan:plan-2", "plan:plan-3"]);
    assert!(bench.last_words().contains("circle"), "{}", bench.last_words());
    let ids: Vec<_> = output["todo"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["a", "b"], "dependencies first");
    let traces = bench.traces().await;
    assert_eq!(bench.attempt("plan@1", "plan", 3, &json!({})).await.unwrap(), output);
    assert_eq!((bench.traces().await, bench.commits().await), (traces, 1));
    let list = bench.file("TODO.md").await.unwrap();
    assert!(list.contains("0 of 2 done") && list.contains("- [ ] **a** Do a"), "{list}");
    assert!(bench.file("docs/ARCHITECTURE.md").await.unwrap().contains("- **R2** It ranks."));
    let message = bench.message().await;
    assert!(message.contains(&format!("Loopwright-Run: {}", bench.run)) && message.contains("Loopwright-Step: plan"));
}

#[tokio::test]
async fn a_plan_needs_requirements_and_a_project() {
    let bench = Bench::new(&json!(simple())).await;
    let failure = bench.attempt("plan@1", "plan", 1, &json!({})).await.unwrap_err();
    assert_eq!(failure.code, "input.invalid");
    assert!(bench.calls().is_empty(), "nothing was bought");
}

#[tokio::test]
async fn a_new_plan_keeps_what_is_finished() {
    let mut script = simple();
    // The finished item in another spelling, which still means the same.
    script.push(at("again:plan", plan(vec![todo("A", &["R1"], &[], "true"), todo("c", &["R2"], &["a"], "true")])));
    let bench = Bench::new(&json!(script)).await;
    let items = bench.planned().await;
    let work = bench.work(&[("a.sh", "exit 0\n")]).await;
    bench.item("implement[a]", &items[0], &work).await;
    let again = bench.step("plan@1", "again", json!({"changes": "Rank by length"})).await;
    let ids: Vec<_> = again["todo"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["c"]);
    let list = bench.file("TODO.md").await.unwrap();
    assert!(list.contains("1 of 2 done") && list.contains("- [x] **a**") && list.contains("- [ ] **c**"), "{list}");
    assert!(bench.last_words().contains("Rank by length"));
    assert_eq!(bench.calls().last().unwrap(), "again:plan");
    assert_eq!(bench.file("a.sh").await.as_deref(), Some("exit 0\n"), "code is not touched");
}

#[tokio::test]
async fn checks_are_evidence_and_the_same_failure_is_stopped_then_the_end() {
    let bench = Bench::new(&json!([])).await;
    let item = |commands: &[&str]| {
        let checks: Vec<Value> = commands.iter().map(|command| json!({"command": command})).collect();
        json!({"id": "a", "title": "Do a", "checks": checks})
    };
    let work = bench.work(&[("a.txt", "1\n")]).await;
    let run = async |path: &str, todo: Value, previous: Value| {
        bench.step("check@1", path, json!({"todo": todo, "work": work, "previous": previous})).await
    };
    let good = run("c1", item(&["grep -q 1 a.txt", "echo hi"]), json!({})).await;
    assert_eq!((&good["passed"], &good["again"], &good["work"]), (&json!(true), &json!(false), &json!(work)));
    assert_eq!(good["results"][1]["output_tail"], "hi\n");
    // All commands run, whatever fails, and a failure that differs by its duration only is the same.
    let slow = ["echo \"1 failed in 0.$(date +%N)s\"; exit 3", "printf 'a\\000b'"];
    let bad = run("c2", item(&slow), json!({})).await;
    assert_eq!((&bad["passed"], &bad["again"]), (&json!(false), &json!(true)));
    assert_eq!((&bad["results"][0]["exit_code"], &bad["results"][1]["passed"]), (&json!(3), &json!(true)));
    assert!(bad["reason"].as_str().unwrap().ends_with("exits with 3 instead of 0"), "{}", bad["reason"]);
    sqlx::query("select $1::jsonb").bind(&bad).execute(&bench.place.pool).await.expect("Postgres takes it");
    assert_eq!(bad["repeated"], json!(false));
    // Once more the same: another model may try. A third time: nobody.
    let same = run("c3", item(&slow), bad.clone()).await;
    assert_eq!((&same["again"], &same["repeated"]), (&json!(true), &json!(true)), "{same}");
    let third = run("c3b", item(&slow), same.clone()).await;
    assert_eq!((&third["again"], &third["repeated"]), (&json!(false), &json!(true)), "{third}");
    let moved = run("c3c", item(&["exit 5"]), same).await;
    assert_eq!((&moved["again"], &moved["repeated"]), (&json!(true), &json!(false)));
    let other = run("c4", item(&["exit 4"]), bad).await;
    assert_eq!(other["again"], json!(true));
    let bare = run("c5", item(&[]), json!({})).await;
    assert_eq!((&bare["passed"], &bare["again"]), (&json!(false), &json!(false)), "no evidence is no success");
    let none = bench.step("check@1", "c6", json!({"todo": item(&["true"]), "work": "", "reason": "stuck"})).await;
    assert_eq!((&none["passed"], &none["again"], &none["reason"]), (&json!(false), &json!(false), &json!("stuck")));
    let unknown = json!({"todo": item(&["true"]), "work": "0".repeat(40)});
    assert_eq!(bench.attempt("check@1", "c7", 1, &unknown).await.unwrap_err().code, "workspace.missing");
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

/// Section 4 of the development loop, each rule provoked by a model that does just that: stopped, escalated, then blocked.
#[tokio::test]
async fn each_stop_rule_stops_an_item_for_its_model_and_then_for_good() {
    let mut script = simple();
    // Nobody else is as stubborn as this one, the architect included.
    script.push(calls("same/code:turn-*", "read", json!({"path": "a.txt"})));
    for n in 1..=24 {
        let content = if n % 2 == 1 { "one" } else { "two" };
        script.push(writes(&format!("swing/code:turn-{n}"), "a.txt", content));
        script.push(calls(&format!("look/code:turn-{n}"), "read", json!({"path": format!("f{n}")})));
    }
    script.push(says("talk/code:turn-*", "I would change a.txt."));
    let bench = Bench::new(&json!(script)).await;
    let items = bench.planned().await;
    let base = bench.work(&[("a.txt", "two")]).await;
    let cases = [
        ("same", "identical_calls", 5, "This exact call was made 3 times"),
        ("swing", "alternation", 4, ""),
        ("look", "no_change", 6, "No file changed in 4 turns"),
        ("talk", "no_calls", 2, "Use the tools"),
    ];
    for (name, rule, asked, warning) in cases {
        let path = format!("{name}/code");
        let mut input = json!({"todo": items[0], "evidence": {"work": base}});
        let before = bench.calls().len();
        let failure = bench.attempt("implement@1", &path, 1, &input).await.expect_err(name);
        assert_eq!((failure.code.as_str(), failure.kind), ("model.no_progress", FailureKind::Retryable), "{name}");
        assert_eq!(failure.detail["stop"]["rule"], rule, "{name}: {failure:?}");
        assert_eq!(bench.calls().len() - before, asked, "{name}");
        if !warning.is_empty() {
            // The model was told before it was stopped.
            let told = bench.requests().last().map(|(_, request)| format!("{:?}", request.messages)).unwrap();
            assert!(told.contains(warning), "{name}: {told}");
        }
        // For the same role the stop stands and nothing is bought; the architect starts afresh and is told.
        let again = bench.attempt("implement@1", &path, 2, &input).await.expect_err(name);
        assert_eq!((&again.detail, bench.calls().len() - before), (&failure.detail, asked), "{name}");
        input["role"] = json!("architect");
        let last = bench.attempt("implement@1", &path, 3, &input).await.expect_err(name);
        assert_eq!((last.detail["stop"]["rule"].as_str(), bench.calls().len() - before), (Some(rule), 2 * asked));
        let told = bench.requests().last().map(|(_, request)| format!("{:?}", request.messages)).unwrap();
        assert!(told.contains("Another model worked on this before you and was stopped"), "{name}: {told}");
        // What the workflow makes of it: no work, so no evidence, so the item is blocked and the tree as it was.
        let checks = json!({"todo": items[0], "work": "", "reason": last.message});
        let checks = bench.step("check@1", &format!("{name}/check"), checks).await;
        assert_eq!((&checks["passed"], &checks["again"]), (&json!(false), &json!(false)), "{name}");
        let commit = json!({"todo": items[0], "checks": checks, "work": ""});
        let commit = bench.step("commit@1", &format!("{name}/commit"), commit).await;
        assert_eq!(commit["state"], "blocked", "{name}");
        assert!(bench.message().await.contains("The work was stopped"), "{name}");
    }
    assert_eq!(bench.file("a.txt").await, None);
}

#[tokio::test]
async fn a_stopped_item_that_the_architect_finishes_is_done() {
    let mut script = simple();
    for n in 1..=6 {
        script.push(calls(&format!("a/code:turn-{n}"), "read", json!({"path": format!("f{n}")})));
    }
    script.extend([writes("a/code:turn-7", "a.sh", "exit 0\n"), finishes("a/code:turn-8")]);
    let bench = Bench::new(&json!(script)).await;
    let items = bench.planned().await;
    let mut input = json!({"todo": items[0]});
    let failure = bench.attempt("implement@1", "a/code", 1, &input).await.unwrap_err();
    assert_eq!(failure.detail["stop"]["rule"], "no_change");
    input["role"] = json!("architect");
    let code = bench.step("implement@1", "a/code", input).await;
    assert_eq!((&code["model"], &code["turns"]), (&json!("rehearsed/architect"), &json!(2)));
    assert_eq!(bench.item("a", &items[0], code["work"].as_str().unwrap()).await["state"], "done");
}

/// The same under a policy as the shipped loop has it: the engine goes on to the architect, whom nothing told that it is his turn.
#[tokio::test]
async fn the_engine_escalates_a_stopped_item_by_the_policy_of_its_step() {
    let mut script = simple();
    for n in 1..=6 {
        script.push(calls(&format!("code:turn-{n}"), "read", json!({"path": format!("f{n}")})));
    }
    script.extend([writes("code:turn-7", "a.sh", "exit 0\n"), finishes("code:turn-8")]);
    let bench = Bench::new(&json!(script)).await;
    let items = bench.planned().await;
    let with = json!({"project_id": {"literal": bench.place.project}, "todo": {"literal": items[0]}});
    let retry = json!({"attempts": 3, "delay_ms": 10, "backoff": 1.0, "max_delay_ms": 10, "jitter": 0.0, "on": ["model.*"],
        "escalate": [{"from_attempt": 3, "with": {"role": {"literal": "architect"}}}]});
    let step = json!({"id": "code", "kind": {"activity": {"name": "implement@1", "with": with}}, "retry": retry});
    let definition: Definition = serde_json::from_value(
        json!({"format": FORMAT, "name": "code", "timeout_ms": 600_000, "executions_max": 100, "steps": [step]}),
    )
    .unwrap();
    let pool = bench.place.pool.clone();
    let worker = worker::start(WorkerConfig::new(pool.clone(), bench.registry.clone())).await.unwrap();
    let client = Client::new(pool, Arc::new(NoHook));
    let deploy = Deploy { definition, bundle: Bundle::new(), source: String::new(), author: None, message: None };
    let start = Start {
        run_id: None,
        definition: client.deploy(deploy).await.unwrap().hash,
        inputs: json!({}),
        workflow_id: None,
        attributes: json!({}),
        queue: String::new(),
        topic: None,
        admission: Default::default(),
    };
    let run = client.start(start).await.unwrap().run_id;
    assert_eq!(closed(&client, run).await, RunStatus::Completed);
    worker.drain(Duration::from_secs(10)).await;
    let turns: Vec<(String, Role)> =
        bench.requests().into_iter().filter(|(at, _)| at.starts_with("code:")).map(|(at, r)| (at, r.role)).collect();
    let role = |n| if n <= 6 { Role::Implementer } else { Role::Architect };
    assert_eq!(turns, (1..=8).map(|n| (format!("code:turn-{n}"), role(n))).collect::<Vec<_>>());
}

#[tokio::test]
async fn checks_that_fail_the_same_way_are_stopped_escalated_and_then_blocked() {
    let mut script = simple();
    for round in 1..=3 {
        script.push(writes(&format!("*~{round}/code:turn-1"), "a.sh", &format!("# try {round}\nexit 1\n")));
        script.push(finishes(&format!("*~{round}/code:turn-2")));
    }
    let bench = Bench::new(&json!(script)).await;
    let items = bench.planned().await;
    // As the shipped loop does it: two rounds by the implementer, the third by the architect.
    let (mut checks, mut seen) = (json!({}), Vec::new());
    for round in 1..=3 {
        let role = if round < 3 { "implementer" } else { "architect" };
        let input = json!({"todo": items[0], "role": role, "evidence": checks});
        let code = bench.step("implement@1", &format!("code..check~{round}/code"), input).await;
        let input = json!({"todo": items[0], "work": code["work"], "previous": checks});
        checks = bench.step("check@1", &format!("code..check~{round}/check"), input).await;
        assert_eq!(checks["passed"], json!(false));
        seen.push((code["model"].clone(), checks["again"].clone(), checks["repeated"].clone()));
    }
    let (implementer, architect) = (json!("rehearsed/implementer"), json!("rehearsed/architect"));
    let expected = [
        (implementer.clone(), json!(true), json!(false)),
        (implementer, json!(true), json!(true)),
        (architect, json!(false), json!(true)),
    ];
    assert_eq!(seen, expected);
    let input = json!({"todo": items[0], "checks": checks, "work": checks["work"]});
    let commit = bench.step("commit@1", "commit", input).await;
    assert_eq!((&commit["state"], bench.file("a.sh").await), (&json!("blocked"), None));
}

#[tokio::test]
async fn an_item_lands_once_and_a_blocked_one_leaves_the_tree_alone() {
    let bench = Bench::new(&json!(simple())).await;
    let items = bench.planned().await;
    let good = bench.work(&[("a.sh", "exit 0\n")]).await;
    let done = bench.item("implement[a]/body", &items[0], &good).await;
    assert_eq!((&done["state"], bench.commits().await), (&json!("done"), 2));
    let message = bench.message().await;
    assert!(message.starts_with("a: Do a\n\nServes R1.\n- passed: `sh a.sh`\n"), "{message}");
    assert!(message.contains("Loopwright-Item: a") && !message.contains("Loopwright-Work"), "{message}");

    let bad = bench.work(&[("b.sh", "exit 1\n"), ("a.sh", "exit 9\n")]).await;
    let blocked = bench.item("implement[b]/body", &items[1], &bad).await;
    assert_eq!((&blocked["state"], bench.commits().await), (&json!("blocked"), 3));
    assert!(bench.message().await.contains(&format!("Loopwright-Work: {bad}")));
    assert_eq!((bench.file("b.sh").await, bench.file("a.sh").await.as_deref()), (None, Some("exit 0\n")));
    let list = bench.file("TODO.md").await.unwrap();
    assert!(list.contains("1 of 2 done") && list.contains("**b** Do b *(blocked"), "{list}");
    // Evidence of another snapshot proves nothing.
    let checks = bench.step("check@1", "x/check", json!({"todo": items[0], "work": good})).await;
    let other = bench.work(&[("a.sh", "exit 7\n")]).await;
    let forged = json!({"todo": items[0], "checks": checks, "work": other});
    assert_eq!(bench.step("commit@1", "x/commit", forged).await["state"], json!("blocked"));
    assert_eq!(bench.file("a.sh").await.as_deref(), Some("exit 0\n"));
}

#[tokio::test]
async fn a_step_whose_ground_has_moved_says_so() {
    let bench = Bench::new(&json!(simple())).await;
    let items = bench.planned().await;
    let work = bench.work(&[("a.sh", "exit 0\n")]).await;
    let checks = bench.step("check@1", "a/check", json!({"todo": items[0], "work": work})).await;
    let other = bench.place.open(None).await;
    other.write(&[FileChange { path: "x".into(), content: Some("x".into()) }]).unwrap();
    let new = NewCommit {
        subject: "x".into(),
        body: String::new(),
        trailers: vec![],
        at: chrono::DateTime::UNIX_EPOCH,
        attempt_id: crate::workspace::attempt(),
    };
    other.commit(new).await.unwrap();
    let input = json!({"todo": items[0], "checks": checks, "work": work});
    let failure = bench.attempt("commit@1", "a/commit", 1, &input).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("workspace.conflict", FailureKind::Permanent));
    // A step that had looked before somebody else moved `main`.
    let main = bench.place.open(None).await;
    let base = json!(main.parent_of(main.head().unwrap()).await.unwrap());
    let recorder = bench.recorders.lock().unwrap().entry(format!("{}/b/commit", bench.run)).or_default().clone();
    recorder.checkpoints.lock().unwrap().insert("base".into(), base);
    let failure = bench.attempt("commit@1", "b/commit", 1, &input).await.unwrap_err();
    assert_eq!(failure.code, "workspace.conflict");
    assert_eq!(bench.place.count("project_records").await, 2, "no outcome was recorded");
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
async fn an_acceptance_needs_citations_that_exist() {
    let check = |command: &str| json!({"path": "", "line": 0, "check": command});
    // Criteria that cite checks alone are judged anew each time, so that one project serves for all.
    let good = verdict(&[("R1", "accept", check("sh a.sh")), ("R2", "accept", check("sh b.sh"))], vec![]);
    let cases = [
        ("no such file", line("zz.sh", 1)),
        ("no such line", line("a.sh", 99)),
        ("line zero", line("a.sh", 0)),
        ("nothing", Value::Null),
        ("out of the tree", line("../../../../../../etc/passwd", 1)),
        ("absolute", line("/etc/passwd", 1)),
        ("made by a check", line("made.txt", 1)),
        ("a check that never ran", check("true")),
    ];
    let mut script = vec![at("*:verify-2", good)];
    for (n, (_, citation)) in cases.iter().enumerate() {
        let bad = verdict(&[("R1", "accept", citation.clone()), ("R2", "accept", line("b.sh", 1))], vec![]);
        script.push(at(&format!("v{n}:verify"), bad));
    }
    let (bench, _) = finished(script).await;
    for (n, (name, _)) in cases.iter().enumerate() {
        let output = bench.step("verify@1", &format!("v{n}"), json!({})).await;
        assert_eq!(output["verdict"], "accept", "{name}");
        assert_eq!(bench.calls().last().unwrap(), &format!("v{n}:verify-2"), "{name}");
        assert!(bench.last_words().contains("R1 is accepted without a citation that exists"), "{name}");
        assert_eq!((&output["checks_passed"], output["todo"].as_array().unwrap().len()), (&json!(2), 0));
    }
}

#[tokio::test]
async fn what_machines_show_outweighs_an_accepting_model() {
    let all = verdict(&[("R1", "accept", line("a.sh", 1)), ("R2", "accept", line("b.sh", 1))], vec![]);
    let (bench, _) = finished(vec![at("*:verify", all)]).await;
    // Somebody breaks what passed.
    let open = bench.place.open(None).await;
    open.write(&[FileChange { path: "a.sh".into(), content: Some("exit 5\n".into()) }]).unwrap();
    let new = NewCommit {
        subject: "x".into(),
        body: String::new(),
        trailers: vec![],
        at: chrono::DateTime::UNIX_EPOCH,
        attempt_id: crate::workspace::attempt(),
    };
    open.commit(new).await.unwrap();
    let output = bench.step("verify@1", "verify", json!({})).await;
    assert_eq!((&output["verdict"], &output["checks_failed"]), (&json!("reject"), &json!(1)));
    assert_eq!(output["todo"][0]["id"], "mend-a-1", "{output}");
    assert_eq!(output["todo"][0]["checks"][0]["command"], "sh a.sh");
    assert!(output["report_markdown"].as_str().unwrap().contains("exits with 5"));
    // The plan was extended once, and the next review sees the new item as not done.
    let plans: Vec<Value> = sqlx::query_scalar("select body from project_records where kind = 'plan' order by n")
        .fetch_all(&bench.place.pool)
        .await
        .unwrap();
    assert_eq!(plans.iter().map(|p| p["items"].as_array().unwrap().len()).collect::<Vec<_>>(), [2, 3]);
    let next = bench.step("verify@1", "verify-next", json!({})).await;
    assert_eq!((&next["verdict"], &next["todo"][0]["id"]), (&json!("reject"), &json!("mend-a-1")));
}

#[tokio::test]
async fn what_was_accepted_stands_until_a_cited_file_changes() {
    let first = verdict(&[("R1", "accept", line("a.sh", 1)), ("R2", "reject", Value::Null)], vec![]);
    let second = verdict(&[("R2", "reject", line("b.sh", 1))], vec![todo("new", &["R2"], &["b"], "true")]);
    let third = verdict(&[("R1", "accept", line("a.sh", 1)), ("R2", "reject", Value::Null)], vec![]);
    let (bench, _) = finished(vec![at("v1:verify", first), at("v2:verify", second), at("v3:verify", third)]).await;
    let one = bench.step("verify@1", "v1", json!({})).await;
    assert_eq!(one["todo"][0]["id"], "mend-r2-1", "rejected, and the model gave no item: {one}");
    assert_eq!(one["todo"][0]["requirements"], json!(["R2"]));
    let two = bench.step("verify@1", "v2", json!({})).await;
    assert_eq!((&two["criteria"][0]["carried"], &two["criteria"][1]["carried"]), (&json!(true), &json!(false)));
    let asked = bench.last_words();
    assert!(!asked.contains("- R1: It counts.") && asked.contains("- R2: It ranks."), "{asked}");
    // Now its file changes.
    let item = todo("mend-r2-1", &["R2"], &[], "true");
    let work = bench.work(&[("a.sh", "exit 0\n")]).await;
    bench.item("implement..v2~1[mend-r2-1]", &item, &work).await;
    let three = bench.step("verify@1", "v3", json!({})).await;
    assert_eq!(three["criteria"][0]["carried"], json!(false));
    assert!(bench.last_words().contains("- R1: It counts."));
}

#[tokio::test]
async fn everything_accepted_costs_no_further_call() {
    let all = verdict(&[("R1", "accept", line("a.sh", 1)), ("R2", "accept", line("b.sh", 1))], vec![]);
    let (bench, _) = finished(vec![at("v1:verify", all)]).await;
    assert_eq!(bench.step("verify@1", "v1", json!({})).await["verdict"], "accept");
    let again = bench.step("verify@1", "v2", json!({})).await;
    assert_eq!((&again["verdict"], &again["model"]), (&json!("accept"), &json!("")));
    assert_eq!(bench.calls().last().unwrap(), "v1:verify");
    let delivered = bench.step("deliver@1", "deliver", json!({"verdict": "accept"})).await;
    assert_eq!(delivered["files"], json!(4));
    assert!(delivered["summary"].as_str().unwrap().contains("accepted by the review"));
    let status: String = sqlx::query_scalar("select status from projects").fetch_one(&bench.place.pool).await.unwrap();
    assert_eq!(status, "done");
}

#[tokio::test]
async fn nothing_is_delivered_from_nothing() {
    let bench = Bench::new(&json!([])).await;
    let failure = bench.attempt("deliver@1", "deliver", 1, &json!({"verdict": "accept"})).await.unwrap_err();
    assert_eq!((failure.code.as_str(), bench.place.count("conversations").await), ("workspace.empty", 0));
}

#[tokio::test]
async fn a_readme_is_repaired_until_its_commands_work() {
    let (bench, _) = finished(vec![
        says("readme:readme-1", "```markdown\n# T\n```sh\nsh a.sh\nsh missing.sh\n```\n```"),
        says("readme:readme-2", "# T\n```sh\nsh a.sh\n```\n"),
    ])
    .await;
    let output = bench.step("readme@1", "readme", json!({})).await;
    assert_eq!((&output["verified"], &output["versions"]), (&json!(true), &json!(2)));
    assert!(bench.last_words().contains("missing.sh"), "{}", bench.last_words());
    assert_eq!(bench.file("README.md").await.as_deref(), Some("# T\n```sh\nsh a.sh\n```\n"));
    assert_eq!(bench.file("made.txt").await, None, "what commands leave is not committed");
    assert!(bench.message().await.contains("Every command in it was executed."));
}

#[tokio::test]
async fn a_readme_says_what_did_not_work() {
    let many = format!("# T\n```sh\n{}```\n", "true\n".repeat(21));
    let (bench, _) = finished(vec![
        says("readme:readme-1", &many),
        says("readme:readme-2", ""),
        says("readme:readme-3", "# T\n```sh\nsh a.sh\nfalse\n```\n"),
    ])
    .await;
    let output = bench.step("readme@1", "readme", json!({})).await;
    assert_eq!((&output["verified"], &output["versions"]), (&json!(false), &json!(3)));
    let text = bench.file("README.md").await.unwrap();
    assert!(text.contains("## Not verified") && text.trim_end().ends_with("- `false`"), "{text}");
    assert!(bench.model.calls.lock().unwrap().iter().any(|(_, last)| last.contains("more than 20 commands")));
    assert!(!bench.message().await.contains("Every command"));
}

#[tokio::test]
async fn a_second_attempt_at_a_readme_may_buy_new_versions() {
    let (bench, _) = finished(vec![says("readme:readme-4", "# T\n```sh\ntrue\n```\n"), says("readme:*", " ")]).await;
    let failure = bench.attempt("readme@1", "readme", 1, &json!({})).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("model.output_invalid", FailureKind::Retryable));
    assert_eq!(bench.file("README.md").await, None);
    let calls = bench.calls().len();
    let output = bench.attempt("readme@1", "readme", 2, &json!({})).await.unwrap();
    assert_eq!((&output["versions"], bench.calls().len()), (&json!(4), calls + 1));
}

#[tokio::test]
async fn an_attempt_at_a_readme_buys_no_version_in_the_stead_of_former_attempts() {
    let (bench, _) = finished(vec![says("readme:*", " ")]).await;
    bench.takes(1);
    for attempt in 1..=2 {
        let failure = bench.attempt("readme@1", "readme", attempt, &json!({})).await.unwrap_err();
        assert_eq!(failure.code, "model.context_overflow");
    }
    bench.takes(u64::MAX);
    let calls = bench.calls().len();
    let failure = bench.attempt("readme@1", "readme", 3, &json!({})).await.unwrap_err();
    assert_eq!((failure.code.as_str(), bench.calls().len()), ("model.output_invalid", calls + 3));
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
