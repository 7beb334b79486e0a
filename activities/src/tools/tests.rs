//! The loop with rehearsed models: each stop rule stops, and a crash costs nothing that was paid for.

use super::*;
use crate::{
    edit::Frozen,
    orchestrator::{Message, Opening, Orchestrator, Role, Routing},
    provider::scripted::Scripted,
    workspace::FileChange,
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure, FailureKind,
    activity::{Context, detached},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};
use tokio_util::sync::CancellationToken;

type Files = BTreeMap<String, String>;

/// A tree in memory whose "commands" are `put <path> <text>`, `cat <path>`, `many <n>` and `false`.
#[derive(Default)]
struct Memory {
    committed: Files,
    files: Mutex<Files>,
    commands: Mutex<Vec<String>>,
    /// Cancelled by the command `crash`.
    crash: Option<CancellationToken>,
}

impl Memory {
    fn of(files: &[(&str, &str)]) -> Self {
        let files: Files = files.iter().map(|(p, c)| ((*p).to_owned(), (*c).to_owned())).collect();
        Self { committed: files.clone(), files: Mutex::new(files), ..Self::default() }
    }
    fn files(&self) -> Files {
        self.files.lock().unwrap().clone()
    }
    fn commands(&self) -> Vec<String> {
        self.commands.lock().unwrap().clone()
    }
}

impl Bench for Memory {
    fn read(&self, path: &str) -> Result<Option<String>, Failure> {
        if path == "secret" {
            return Err(Failure::permanent("path.outside", "the path leaves the tree"));
        }
        Ok(self.files.lock().unwrap().get(path).cloned())
    }
    fn write(&self, changes: &[FileChange]) -> Result<(), Failure> {
        let mut files = self.files.lock().unwrap();
        for change in changes {
            match &change.content {
                Some(content) => files.insert(change.path.clone(), content.clone()),
                None => files.remove(&change.path),
            };
        }
        Ok(())
    }
    fn changes(&self) -> BoxFuture<'_, Result<Vec<FileChange>, Failure>> {
        let files = self.files();
        let paths: BTreeSet<_> = files.keys().chain(self.committed.keys()).cloned().collect();
        let changed = paths.into_iter().filter(|p| files.get(p) != self.committed.get(p));
        let changes = changed.map(|path| FileChange { content: files.get(&path).cloned(), path }).collect();
        Box::pin(async move { Ok(changes) })
    }
    fn committed<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<String>, Failure>> {
        Box::pin(async move { Ok(self.committed.get(path).cloned()) })
    }
    fn search(&self, query: String) -> BoxFuture<'_, Result<String, Failure>> {
        let hits: Vec<_> = self.files().into_iter().filter(|(_, c)| c.contains(&query)).map(|(p, _)| p).collect();
        Box::pin(async move { Ok(hits.join("\n")) })
    }
    fn symbols(&self, _: String) -> BoxFuture<'_, Result<String, Failure>> {
        Box::pin(async { Ok(String::new()) })
    }
    fn run<'a>(&'a self, command: String, _: &'a CancellationToken) -> BoxFuture<'a, Result<Ran, Failure>> {
        Box::pin(async move {
            self.commands.lock().unwrap().push(command.clone());
            let mut files = self.files.lock().unwrap();
            let (mut code, mut output) = (0, String::new());
            match command.splitn(3, ' ').collect::<Vec<_>>().as_slice() {
                ["put", path, text] => {
                    files.insert((*path).to_owned(), (*text).to_owned());
                }
                ["cat", path] => output = files.get(*path).cloned().unwrap_or_default(),
                ["many", count] => {
                    for n in 0..count.parse().unwrap() {
                        files.insert(format!("deps/{n}"), "x".to_owned());
                    }
                }
                ["crash"] => {
                    if let Some(token) = &self.crash {
                        token.cancel();
                    }
                }
                _ => code = 1,
            }
            let output_bytes = output.len() as u64;
            let (exit_code, signal, timed_out) = (Some(code), None, false);
            Ok(Ran { exit_code, signal, timed_out, duration_ms: 1, output_tail: output, output_bytes })
        })
    }
}

struct Stage {
    recorder: Arc<detached::Recorder>,
    script: String,
    /// Of the models, in tokens.
    window: u64,
    /// Bytes of the opening that may be given up.
    material: usize,
}

impl Stage {
    /// A script of `(call key pattern, answer as YAML flow)`.
    fn new(entries: &[(&str, &str)]) -> Self {
        let script = entries.iter().map(|(at, reply)| format!("- at: \"step:{at}\"\n  reply: {reply}\n")).collect();
        Self { recorder: Arc::default(), script, window: 1_000_000, material: 0 }
    }
    fn context(&self, attempt: u32) -> Context {
        let mut info = detached::info("implement@1", Value::Null);
        info.attempt = attempt;
        detached::context(info, Default::default(), self.recorder.clone())
    }
    fn agent(&self, role: Role, goal: Goal) -> AgentLoop {
        let script = Scripted::from_yaml(&self.script).expect("valid script");
        let mut routing = Routing::rehearsed();
        for candidate in routing.roles.values_mut().flatten() {
            candidate.context_tokens = self.window;
        }
        AgentLoop {
            orchestrator: Orchestrator::new(routing, vec![Arc::new(script)]),
            role,
            purpose: "implement".into(),
            tools: Tool::ALL.to_vec(),
            goal,
            frozen: Frozen::new(["TODO.md"]),
            turns_max: TURNS_MAX,
            max_output_tokens: 1000,
        }
    }
    async fn run(&self, bench: &Memory) -> Result<Outcome, Failure> {
        let agent = self.agent(Role::Implementer, Goal::Change);
        agent.run(&self.context(1), bench, || opening_with(self.material)).await
    }
    fn calls(&self) -> usize {
        self.recorder.readings.lock().unwrap().iter().filter(|(kind, ..)| *kind == "open").count()
    }
    /// What each call was announced with, in tokens of its prompt.
    fn prompts(&self) -> Vec<u64> {
        let readings = self.recorder.readings.lock().unwrap();
        let opens = readings.iter().filter(|(kind, ..)| *kind == "open");
        opens.map(|(.., reading)| reading["input_tokens_max"].as_u64().expect("a number")).collect()
    }
    fn checkpoint(&self, key: &str) -> Value {
        self.recorder.checkpoints.lock().unwrap().get(key).cloned().unwrap_or_default()
    }
    /// The output of the first tool call of a turn.
    fn output(&self, turn: u32) -> String {
        self.checkpoint(&format!("turn:{turn}"))["results"][0]["output"].as_str().unwrap_or_default().to_owned()
    }
}

async fn opening() -> Result<Opening, Failure> {
    opening_with(0).await
}

async fn opening_with(material: usize) -> Result<Opening, Failure> {
    let messages = |bytes: usize| {
        vec![
            Message::System { text: "You edit.".into() },
            Message::User { text: format!("{}Do it.", "m".repeat(bytes)) },
        ]
    };
    Ok(Opening { messages: messages(material), smaller: vec![messages(material / 2), messages(material / 10)] })
}

fn tool(name: &str, arguments: &str) -> String {
    format!("{{ tool_calls: [{{ name: {name}, arguments: {arguments} }}] }}")
}
fn write(path: &str, content: &str) -> String {
    tool("edit", &format!("{{ edits: [{{ op: write, path: {path}, content: \"{content}\" }}] }}"))
}
fn done() -> String {
    tool("done", "{ summary: finished }")
}

fn stopped(result: Result<Outcome, Failure>) -> Value {
    let failure = result.expect_err("stopped");
    assert_eq!((failure.kind, failure.code.as_str()), (FailureKind::Retryable, "model.no_progress"));
    failure.detail["stop"].clone()
}

#[tokio::test]
async fn edits_runs_and_done_come_to_a_changed_tree() {
    let stage = Stage::new(&[
        ("turn-1", &tool("read", "{ path: a.txt }")),
        ("turn-2", &write("a.txt", "new")),
        ("turn-3", &tool("run", "{ command: 'put b.txt made' }")),
        ("turn-*", &done()),
    ]);
    let bench = Memory::of(&[("a.txt", "old")]);
    let outcome = stage.run(&bench).await.expect("done");
    assert_eq!((outcome.ending, outcome.turns, outcome.changed), (Ending::Done, 4, 2));
    assert_eq!((outcome.summary.as_str(), outcome.provider.as_str()), ("finished", "rehearsed"));
    assert_eq!(bench.files()["a.txt"], "new");
    assert_eq!(stage.output(1), "a.txt, lines 1-1 of 1:\nold\n");
    assert_eq!(stage.output(2), "Changed:\n  a.txt");
    assert!(stage.output(3).contains("Files changed by the command: b.txt"));
    let progress = stage.recorder.progress.lock().unwrap().clone();
    let edit = json!({"turn": 2, "turns_max": 24, "tool": "edit", "path": "a.txt", "changed_files": 0});
    assert!(progress.contains(&edit), "{progress:?}");
}

/// The models that edits are counted under.
#[derive(Default)]
struct Models(Mutex<BTreeSet<String>>);

impl metrics::Recorder for Models {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        if key.name() == "loopwright_edits_total" {
            let models = key.labels().filter(|label| label.key() == "model").map(|label| label.value().to_owned());
            self.0.lock().unwrap().extend(models);
        }
        metrics::Counter::noop()
    }
    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }
    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

#[tokio::test]
async fn edits_of_users_own_models_are_one_series_whatever_their_names() {
    let script = [("turn-1", write("a.txt", "new")), ("turn-*", done())];
    let script = script.each_ref().map(|(at, reply)| (*at, reply.as_str()));
    let counted = async |stage: &Stage| {
        let models = Models::default();
        let guard = metrics::set_default_local_recorder(&models);
        stage.run(&Memory::of(&[("a.txt", "old")])).await.expect("done");
        drop(guard);
        models.0.into_inner().unwrap()
    };
    let ours = Stage::new(&script);
    assert_eq!(counted(&ours).await, BTreeSet::from(["rehearsed/implementer".to_owned()]));
    // The same answers, as keys of users have served them.
    let own = Stage::new(&script);
    for (key, value) in ours.recorder.checkpoints.lock().unwrap().iter().filter(|(key, _)| key.starts_with("call:")) {
        let mut value = value.clone();
        (value["own"], value["model"]) = (true.into(), format!("the model of {key}").into());
        own.recorder.checkpoints.lock().unwrap().insert(key.clone(), value);
    }
    assert_eq!(counted(&own).await, BTreeSet::from(["own".to_owned()]));
    assert_eq!(own.calls(), 0, "nobody was asked");
}

#[tokio::test]
async fn a_model_that_repeats_one_call_is_warned_and_stopped() {
    let stage = Stage::new(&[("turn-*", &tool("read", "{ path: a.txt }"))]);
    let stop = stopped(stage.run(&Memory::of(&[("a.txt", "x")])).await);
    assert_eq!(stop, json!({"rule": "identical_calls", "tool": "read", "times": 5}));
    assert_eq!(stage.calls(), 5);
    assert!(!stage.output(2).contains("This exact call"));
    assert!(stage.output(3).contains("This exact call was made 3 times"));
}

#[tokio::test]
async fn a_model_that_goes_back_and_forth_is_stopped() {
    let (there, back) = (write("a.txt", "one"), write("a.txt", "two"));
    let pairs: Vec<(String, &str)> =
        (1..=24).map(|n| (format!("turn-{n}"), if n % 2 == 1 { there.as_str() } else { back.as_str() })).collect();
    let entries: Vec<(&str, &str)> = pairs.iter().map(|(at, reply)| (at.as_str(), *reply)).collect();
    let stage = Stage::new(&entries);
    let stop = stopped(stage.run(&Memory::of(&[("a.txt", "two")])).await);
    assert_eq!(stop, json!({"rule": "alternation", "tools": ["edit", "edit"]}));
    assert_eq!(stage.calls(), 4);
}

#[tokio::test]
async fn a_model_that_only_looks_is_stopped() {
    let entries: Vec<(String, String)> =
        (1..=24).map(|n| (format!("turn-{n}"), tool("read", &format!("{{ path: f{n} }}")))).collect();
    let entries: Vec<(&str, &str)> = entries.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let stage = Stage::new(&entries);
    let stop = stopped(stage.run(&Memory::default()).await);
    assert_eq!(stop, json!({"rule": "no_change", "turns": 6}));
    assert!(stage.output(4).contains("No file changed in 4 turns"));
}

#[tokio::test]
async fn a_model_that_only_talks_is_reminded_once() {
    let stage = Stage::new(&[("turn-*", "{ text: \"I would change a.txt.\" }")]);
    assert_eq!(stopped(stage.run(&Memory::default()).await), json!({"rule": "no_calls"}));
    assert_eq!(stage.calls(), 2);

    // Words after work mean that it is finished, also when the reminder came before the work.
    let words = "{ text: \"All done.\" }";
    let stage = Stage::new(&[("turn-1", words), ("turn-2", &write("a.txt", "x")), ("turn-*", words)]);
    let outcome = stage.run(&Memory::default()).await.expect("done");
    assert_eq!((outcome.ending, outcome.turns, outcome.summary.as_str()), (Ending::Text, 3, "All done."));
}

#[tokio::test]
async fn turns_are_bounded_and_work_is_kept_for_the_checks() {
    let entries: Vec<(String, String)> =
        (1..=30).map(|n| (format!("turn-{n}"), write("a.txt", &format!("version {n}")))).collect();
    let entries: Vec<(&str, &str)> = entries.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let stage = Stage::new(&entries);
    let bench = Memory::default();
    let outcome = stage.run(&bench).await.expect("changed");
    assert_eq!((outcome.ending, outcome.turns, stage.calls()), (Ending::Turns, 24, 24));
    assert_eq!(bench.files()["a.txt"], "version 24");
}

#[tokio::test]
async fn wrong_calls_are_answered_and_change_nothing() {
    let stage = Stage::new(&[
        ("turn-1", &tool("fly", "{}")),
        (
            "turn-2",
            &tool(
                "edit",
                "{ edits: [{ op: write, path: ok.txt, content: x }, { op: write, path: ../x, content: x }] }",
            ),
        ),
        ("turn-3", &tool("edit", "{ edits: nothing }")),
        ("turn-4", &tool("read", "{ path: secret }")),
        ("turn-5", &write("ok.txt", "x")),
        ("turn-6", &write("TODO.md", "x")),
        ("turn-7", &tool("run", "{ command: 'put TODO.md ticked' }")),
        ("turn-8", &tool("run", "{ command: 'many 300' }")),
        ("turn-*", &done()),
    ]);
    let bench = Memory::of(&[("TODO.md", "- [ ] a")]);
    stage.run(&bench).await.expect("done");
    assert!(stage.output(1).starts_with("error: there is no tool \"fly\""));
    assert!(stage.output(2).starts_with("error: edit 2 (\"../x\") was refused"), "{}", stage.output(2));
    assert!(stage.checkpoint("turn:2")["delta"].as_array().expect("a list").is_empty());
    assert!(stage.output(3).starts_with("error: `edits` must be a list"));
    assert!(stage.output(4).starts_with("error: the path leaves the tree"));
    assert!(stage.output(6).contains("this file is frozen"));
    assert!(stage.output(7).contains("TODO.md is frozen; its change was undone"));
    assert!(stage.output(8).contains("all of it was undone"));
    let expected: Files = [("TODO.md", "- [ ] a"), ("ok.txt", "x")].map(|(a, b)| (a.into(), b.into())).into();
    assert_eq!(bench.files(), expected);
}

#[tokio::test]
async fn after_two_missed_blocks_the_whole_file_is_asked_for() {
    let miss = |search: &str| {
        tool("edit", &format!("{{ edits: [{{ op: replace, path: a.txt, search: {search}, replace: z }}] }}"))
    };
    let stage = Stage::new(&[
        ("turn-1", &miss("first")),
        ("turn-2", &miss("second")),
        ("turn-3", &write("a.txt", "x")),
        ("turn-*", &done()),
    ]);
    stage.run(&Memory::of(&[("a.txt", "old")])).await.expect("done");
    assert!(!stage.output(1).contains("send it whole"));
    assert!(stage.output(2).contains("send it whole"));
}

#[tokio::test]
async fn a_turn_changes_no_more_than_its_checkpoint_holds() {
    let files: Vec<(String, String)> = (0..8).map(|n| (format!("f{n}"), "\u{1}".repeat(200_000) + "end")).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(p, c)| (p.as_str(), c.as_str())).collect();
    let all: Vec<_> = (0..8).map(|n| format!("{{ op: replace, path: f{n}, search: end, replace: fin }}")).collect();
    let stage = Stage::new(&[
        ("turn-1", &tool("edit", &format!("{{ edits: [{}] }}", all.join(", ")))),
        ("turn-2", &tool("edit", &format!("{{ edits: [{}] }}", all[..4].join(", ")))),
        ("turn-*", &done()),
    ]);
    let bench = Memory::of(&files);
    stage.run(&bench).await.expect("done");
    assert!(stage.output(1).contains("go on in the next turn"), "{}", stage.output(1));
    assert_eq!(bench.files().values().filter(|text| text.ends_with("fin")).count(), 4);
    let size = stage.checkpoint("turn:2").to_string().len();
    assert!(size > TURN_BYTES_MAX / 2 && size < 8 << 20, "{size}");
}

proptest::proptest! {
    #[test]
    fn no_tool_call_panics_or_leaves_the_tree(
        calls in proptest::collection::vec(any_call(), 1..6),
    ) {
        let bench = Memory::of(&[("a.txt", "one\ntwo\n"), ("TODO.md", "- [ ] a")]);
        let frozen = Frozen::new(["TODO.md"]);
        let stage = Stage::new(&[]);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let mut hands = execute::Hands::new(&bench, &frozen);
            for call in &calls {
                let before = bench.files();
                match call::parse(call, &Tool::ALL) {
                    Ok(call) => {
                        let answer = hands.execute(&stage.context(1), &call).await.expect("no infrastructure");
                        assert!(answer.ok || bench.files() == before, "a refused call changed something");
                    }
                    Err(why) => assert!(!why.is_empty()),
                }
            }
        });
        let files = bench.files();
        proptest::prop_assert_eq!(files.get("TODO.md").map(String::as_str), Some("- [ ] a"));
        for path in files.keys() {
            proptest::prop_assert_eq!(crate::edit::path::normal(path), Ok(path.clone()));
        }
    }
}

fn any_call() -> impl proptest::strategy::Strategy<Value = crate::orchestrator::ToolCall> {
    use proptest::prelude::*;
    let text = prop_oneof![
        prop::sample::select(vec![
            "a.txt",
            "TODO.md",
            "../a",
            "/a",
            ".git/config",
            "b.json",
            "one\n",
            "write",
            "replace",
            ""
        ])
        .prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(Value::Null),
    ];
    let field = prop::sample::select(vec![
        "path",
        "op",
        "content",
        "search",
        "replace",
        "query",
        "name",
        "start_line",
        "end_line",
        "summary",
    ]);
    let object = prop::collection::btree_map(field.prop_map(str::to_owned), text, 0..6)
        .prop_map(|fields| Value::Object(fields.into_iter().collect()));
    let arguments = prop_oneof![
        object.clone(),
        prop::collection::vec(object, 0..4).prop_map(|edits| json!({ "edits": edits })),
        Just(json!(7)),
        Just(json!({"_invalid": "{"})),
    ];
    let name = prop::sample::select(vec!["read", "search", "symbols", "edit", "done", "other"]);
    (name, arguments).prop_map(|(name, arguments)| crate::orchestrator::ToolCall {
        id: String::new(),
        name: name.to_owned(),
        arguments,
    })
}

#[tokio::test]
async fn done_with_nothing_done_is_doubted_once_and_after_a_refused_edit_refused() {
    let stage = Stage::new(&[("turn-*", &done())]);
    let outcome = stage.run(&Memory::default()).await.expect("satisfied as it is");
    assert_eq!((outcome.turns, outcome.changed), (2, 0));

    let both = "{ tool_calls: [{ name: edit, arguments: { edits: [{ op: write, path: b.json, content: '{' }] } }, \
                { name: done, arguments: { summary: s } }] }";
    let stage = Stage::new(&[("turn-1", &write("a.txt", "x")), ("turn-2", both), ("turn-*", &done())]);
    assert_eq!(stage.run(&Memory::default()).await.expect("done").turns, 3);
    assert!(stage.output(2).contains("would not be valid JSON"));
    assert!(stage.checkpoint("turn:2")["results"][1]["output"].as_str().expect("text").contains("not done"));
}

#[tokio::test]
async fn edits_in_plain_text_are_taken() {
    let text = |json: &str| format!("{{ text: '{json}' }}");
    let stage = Stage::new(&[
        ("turn-1", &text("Here: {\"edits\": [{\"op\": \"write\", \"path\": \"a.txt\", \"content\": \"x\"}]}")),
        ("turn-*", &text("{\"edits\": []}")),
    ]);
    let bench = Memory::default();
    let outcome = stage.run(&bench).await.expect("done");
    assert_eq!((outcome.ending, outcome.turns, bench.files()["a.txt"].as_str()), (Ending::Done, 2, "x"));
    assert!(stage.checkpoint("turn:1")["note"].as_str().expect("text").contains("Changed:\n  new a.txt"));
}

#[tokio::test]
async fn an_answer_with_a_schema_comes_as_a_valid_object() {
    let schema = json!({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}});
    let stage = Stage::new(&[
        ("turn-1", &tool("done", "{ result: { n: many } }")),
        ("turn-2", &tool("done", "{}")),
        ("turn-*", &tool("done", "{ result: { n: 3 } }")),
    ]);
    let agent = stage.agent(Role::Utility, Goal::Answer { schema: Some(schema) });
    let outcome = agent.run(&stage.context(1), &Memory::default(), opening).await.expect("answered");
    assert_eq!((outcome.answer, outcome.turns), (Some(json!({"n": 3})), 3));
    assert!(stage.output(1).contains("/n"), "{}", stage.output(1));

    let stage = Stage::new(&[("turn-*", "{ text: \"42\" }")]);
    let agent = stage.agent(Role::Utility, Goal::Answer { schema: None });
    let outcome = agent.run(&stage.context(1), &Memory::default(), opening).await.expect("answered");
    assert_eq!((outcome.ending, outcome.summary.as_str()), (Ending::Text, "42"));
}

#[tokio::test]
async fn a_model_that_repeats_one_bad_object_in_words_is_stopped_as_by_calls() {
    let schema = json!({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}});
    let stage = Stage::new(&[("turn-*", "{ text: 'So: {\"n\": \"many\"}' }")]);
    let agent = stage.agent(Role::Utility, Goal::Answer { schema: Some(schema.clone()) });
    let stop = stopped(agent.run(&stage.context(1), &Memory::default(), opening).await);
    assert_eq!(stop, json!({"rule": "identical_calls", "tool": "done", "times": 5}));
    assert_eq!(stage.calls(), 5);
    let note = |turn: u32| stage.checkpoint(&format!("turn:{turn}"))["note"].as_str().unwrap_or_default().to_owned();
    assert!(note(2).contains("/n") && !note(2).contains("exact call"), "{}", note(2));
    assert!(note(3).contains("/n") && note(3).contains("This exact call was made 3 times"), "{}", note(3));

    // Those of an attempt before count.
    let second = Stage::new(&[("turn-*", "{ text: '{\"n\": \"many\"}' }")]);
    let mut kept = vec!["opening:0".to_owned()];
    kept.extend((1..=3).flat_map(|n| [format!("call:turn-{n}"), format!("turn:{n}")]));
    for key in kept {
        let value = stage.checkpoint(&key);
        second.recorder.checkpoints.lock().unwrap().insert(key, value);
    }
    let agent = second.agent(Role::Utility, Goal::Answer { schema: Some(schema) });
    assert_eq!(stopped(agent.run(&second.context(2), &Memory::default(), opening).await), stop);
    assert_eq!(second.calls(), 2);
}

fn long_script() -> Vec<(&'static str, String)> {
    vec![
        ("turn-1", tool("read", "{ path: a.txt }")),
        ("turn-2", write("a.txt", "new")),
        ("turn-3", "{ text: \"hm\" }".to_owned()),
        ("turn-4", tool("run", "{ command: 'put made.txt by a command' }")),
        ("turn-5", tool("run", "{ command: crash }")),
        ("turn-6", tool("edit", "{ edits: [{ op: delete, path: made.txt }, { op: write, path: c.txt, content: c }] }")),
        ("turn-7", tool("run", "{ command: 'cat c.txt' }")),
        ("turn-8", tool("search", "{ query: c }")),
        ("turn-*", done()),
    ]
}

fn stage_of(script: &[(&'static str, String)]) -> Stage {
    let entries: Vec<(&str, &str)> = script.iter().map(|(a, b)| (*a, b.as_str())).collect();
    Stage::new(&entries)
}

/// The messages of every call, as the model saw them: the recorded request hashes.
fn requests(stage: &Stage) -> BTreeMap<String, String> {
    let readings = stage.recorder.readings.lock().unwrap();
    let opens = readings.iter().filter(|(kind, ..)| *kind == "open");
    opens
        .map(|(_, key, reading)| {
            let turn = key.split('.').next().unwrap_or_default().to_owned();
            (turn, reading["request_sha256"].as_str().expect("a hash").to_owned())
        })
        .collect()
}

#[tokio::test]
async fn after_a_crash_the_loop_goes_on_where_it_stopped() {
    goes_on_where_it_stopped(1_000_000, 0, "old").await;
}

#[tokio::test]
async fn after_a_crash_a_packed_conversation_goes_on_with_the_same_bytes() {
    goes_on_where_it_stopped(4_000, 12_000, &"old\n".repeat(2_000)).await;
}

async fn goes_on_where_it_stopped(window: u64, material: usize, old: &str) {
    let script = long_script();
    let stage = || Stage { window, material, ..stage_of(&script) };
    let straight = stage();
    let whole = Memory::of(&[("a.txt", old)]);
    let expected = straight.run(&whole).await.expect("done");
    assert_eq!(straight.calls(), 9);
    assert!(straight.prompts().iter().all(|tokens| tokens + 1_000 <= window), "{:?}", straight.prompts());

    // Killed after every single write: what the store holds then is all that the next attempt gets.
    let writes = straight.recorder.checkpoints.lock().unwrap().len();
    for kept in 0..writes {
        let order = write_order(&straight);
        let second = stage();
        for key in &order[..kept] {
            let value = straight.checkpoint(key);
            second.recorder.checkpoints.lock().unwrap().insert(key.clone(), value);
        }
        let fresh = Memory::of(&[("a.txt", old)]);
        let agent = second.agent(Role::Implementer, Goal::Change);
        let outcome = agent.run(&second.context(2), &fresh, || opening_with(material)).await.expect("done");
        let calls_kept = order[..kept].iter().filter(|key| key.starts_with("call:")).count();
        assert_eq!((&outcome, fresh.files()), (&expected, whole.files()), "after {kept} writes");
        assert_eq!(second.calls(), 9 - calls_kept, "after {kept} writes");
        let turns_kept = order[..kept].iter().filter(|key| key.starts_with("turn:")).count();
        let commands_kept = [4, 5, 7].iter().filter(|turn| **turn <= turns_kept).count();
        assert_eq!(fresh.commands().len(), 3 - commands_kept, "after {kept} writes");
        // The calls that were still to be made were asked the very same thing.
        for (turn, hash) in requests(&second) {
            assert_eq!(requests(&straight)[&turn], hash, "{turn} after {kept} writes");
        }
    }
}

#[tokio::test]
async fn an_opening_of_an_earlier_release_is_still_read() {
    let stage = Stage::new(&[("turn-1", &write("a.txt", "x")), ("turn-*", &done())]);
    let before = json!([{"role": "system", "text": "You edit."}, {"role": "user", "text": "Do it."}]);
    stage.recorder.checkpoints.lock().unwrap().insert("opening:0".to_owned(), before);
    assert_eq!(stage.run(&Memory::default()).await.expect("done").turns, 2);
}

/// The order in which the loop writes: opening, then per turn the call and the turn.
fn write_order(stage: &Stage) -> Vec<String> {
    let checkpoints = stage.recorder.checkpoints.lock().unwrap();
    let mut keys: Vec<String> = checkpoints.keys().cloned().collect();
    keys.sort_by_key(|key| match key.rsplit_once(['-', ':']) {
        Some((kind, number)) => (number.parse::<u32>().unwrap_or(0), !kind.starts_with("call")),
        None => (0, false),
    });
    keys
}

#[tokio::test]
async fn cancelled_between_steps_and_started_again_costs_nothing_twice() {
    let script = long_script();
    let straight = stage_of(&script);
    let whole = Memory::of(&[("a.txt", "old")]);
    let expected = straight.run(&whole).await.expect("done");

    let stage = stage_of(&script);
    let ctx = stage.context(1);
    let bench = Memory { crash: Some(ctx.cancellation().clone()), ..Memory::of(&[("a.txt", "old")]) };
    let agent = stage.agent(Role::Implementer, Goal::Change);
    let failure = agent.run(&ctx, &bench, opening).await.expect_err("cancelled in turn 5");
    assert_eq!(failure.kind, FailureKind::Cancelled);
    assert_eq!(stage.calls(), 5);

    let fresh = Memory::of(&[("a.txt", "old")]);
    let outcome = agent.run(&stage.context(2), &fresh, opening).await.expect("done");
    assert_eq!((outcome, fresh.files()), (expected, whole.files()));
    assert_eq!(stage.calls(), straight.calls());
    assert_eq!(fresh.commands(), ["crash", "cat c.txt"]);
}

#[tokio::test]
async fn a_stop_is_final_for_its_role_and_a_fresh_start_for_another() {
    let mut script: Vec<(String, String)> =
        (1..=6).map(|n| (format!("turn-{n}"), tool("read", &format!("{{ path: f{n} }}")))).collect();
    script.push(("turn-7".to_owned(), write("a.txt", "x")));
    script.push(("turn-8".to_owned(), done()));
    let entries: Vec<(&str, &str)> = script.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let stage = Stage::new(&entries);
    let first = stage.run(&Memory::default()).await;
    let again = stage.agent(Role::Implementer, Goal::Change).run(&stage.context(2), &Memory::default(), opening).await;
    assert_eq!((first, stage.calls()), (again, 6));

    let agent = stage.agent(Role::Architect, Goal::Change);
    let outcome = agent.run(&stage.context(3), &Memory::default(), opening).await.expect("done");
    assert_eq!((outcome.turns, outcome.changed, stage.calls()), (2, 1, 8));
    let opening = stage.checkpoint("opening:1");
    assert!(opening["messages"][2]["text"].as_str().expect("text").contains("no file changed in 6 turns"), "{opening}");
}

fn long_reads() -> Vec<(String, String)> {
    let mut script: Vec<(String, String)> = Vec::new();
    for n in 1..=20 {
        let reply = if n % 2 == 1 { tool("read", "{ path: big }") } else { write("a.txt", &format!("v{n}")) };
        script.push((format!("turn-{n}"), reply));
    }
    script.push(("turn-*".to_owned(), done()));
    script
}

#[tokio::test]
async fn a_long_conversation_is_shortened_from_its_oldest_end() {
    let big = "y".repeat(30 << 10);
    let script = long_reads();
    let entries: Vec<(&str, &str)> = script.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let stage = Stage::new(&entries);
    stage.run(&Memory::of(&[("big", &big)])).await.expect("done");
    let largest = stage.prompts().into_iter().max();
    assert!(largest.expect("calls") < (HISTORY_BYTES_MAX as u64), "{largest:?}");
}

#[tokio::test]
async fn a_window_that_holds_two_turns_is_enough_for_twenty() {
    let big = "y".repeat(30 << 10);
    let script = long_reads();
    let entries: Vec<(&str, &str)> = script.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let stage = Stage { window: 8_000, material: 20_000, ..Stage::new(&entries) };
    let outcome = stage.run(&Memory::of(&[("big", &big)])).await.expect("done");
    assert_eq!((outcome.ending, outcome.turns), (Ending::Done, 21));
    assert!(stage.prompts().iter().all(|tokens| tokens + 1_000 <= 8_000), "{:?}", stage.prompts());
}
