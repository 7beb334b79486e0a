//! What the steps of the loop send: the same bytes in front, so that providers find their prefix again; less where a window is
//! too small, and never less than the question.

use crate::{
    keys::{self, log::capture},
    loop_steps::{
        Bench, at, calls, complete, finished, finished_with_window, finishes, line, plan, question, says, todo,
        verdict, writes,
    },
    provider::client,
    sandbox,
    workspace::{Place, attempt},
};
use loopwright_activities::{
    billing::Rate,
    orchestrator::{Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{Timeouts, estimate::request_tokens_max},
    registry,
    testing::{Dialect, Endpoint, FakeProvider, Reply, Seen, Told},
    toolbox::Toolbox,
    workspace::{FileChange, NewCommit},
};
use loopwright_engine::activity::{AttemptInfo, Registry, detached};
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// A project with code, notes and an architecture, and a worker whose only model is the fake's.
struct Stage {
    place: Place,
    registry: Registry,
    fake: FakeProvider,
}

impl Stage {
    async fn new(dialect: Dialect, replies: Vec<Reply>) -> Self {
        let place = Place::new().await;
        let open = place.open(None).await;
        let file = |path: &str, content: String| FileChange { path: path.into(), content: Some(content) };
        let code = |n: usize| format!("def count_{n}(text):\n    return len(text.split())\n");
        open.write(&[
            file("docs/ARCHITECTURE.md", "# Architecture\n\nOne file counts words.\n".to_owned()),
            file("AGENTS.md", "Use four spaces.\n".to_owned()),
            file("src/count.py", (0..20).map(code).collect()),
        ])
        .unwrap();
        let new = NewCommit {
            subject: "x".into(),
            body: String::new(),
            trailers: vec![],
            at: chrono::DateTime::UNIX_EPOCH,
            attempt_id: attempt(),
        };
        open.commit(new).await.unwrap();
        let fake = FakeProvider::serve(move |_, n| replies[n].clone()).await;
        let mut routing = Routing::rehearsed();
        for candidate in routing.roles.values_mut().flatten() {
            (candidate.provider, candidate.model) = (dialect.name().to_owned(), "fake-large".to_owned());
        }
        let provider = client(dialect, &fake.base_of(dialect), Timeouts::default());
        let pace = Pace { backoff: Duration::from_millis(1), ..Pace::default() };
        let toolbox = Arc::new(Toolbox {
            orchestrator: Orchestrator::with_pace(routing, vec![provider], pace),
            workspaces: place.all.clone(),
            sandbox: sandbox::levels()[0].clone(),
            pool: place.pool.clone(),
            data_dir: place.root.path().to_owned(),
            rate: Rate { credits_per_usd: 100, markup_bps: 0 },
        });
        Self { place, registry: registry(toolbox), fake }
    }

    async fn implement(&self, item: &Value) {
        let path = format!("implement[{}]/code", item["id"].as_str().unwrap());
        let info = AttemptInfo { path, attempt_id: attempt(), ..detached::info("implement@1", json!({})) };
        let ctx = detached::context(info, BTreeMap::new(), Arc::default());
        let input = json!({"project_id": self.place.project, "todo": item});
        self.registry.get("implement@1").unwrap().run(ctx, input).await.unwrap();
    }

    fn prompts(&self) -> Vec<Prompt> {
        let questions = self.fake.seen().into_iter().filter(|seen| matches!(seen.endpoint, Endpoint::Generate { .. }));
        questions.map(|seen| Prompt::of(&seen)).collect()
    }
}

/// A prompt in the order in which a model reads it, as it arrived.
struct Prompt {
    /// System and tools.
    fixed: String,
    /// A JSON list.
    turns: String,
}

impl Prompt {
    fn of(seen: &Seen) -> Self {
        let body = &seen.body;
        match seen.dialect {
            Dialect::Gemini => Self {
                fixed: format!("{}{}", body["systemInstruction"], body["tools"]),
                turns: body["contents"].to_string(),
            },
            Dialect::OpenRouter | Dialect::OpenAi => {
                Self { fixed: body["tools"].to_string(), turns: body["messages"].to_string() }
            }
        }
    }

    /// Whether `next` begins with all of this prompt, byte for byte.
    fn begins(&self, next: &Self) -> bool {
        self.fixed == next.fixed && next.turns.starts_with(self.turns.trim_end_matches(']'))
    }
}

/// What two texts have in front.
fn shared<'a>(a: &'a str, b: &str) -> &'a str {
    let bytes = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    &a[..(0..=bytes).rev().find(|at| a.is_char_boundary(*at)).unwrap_or(0)]
}

#[tokio::test]
async fn each_turn_begins_with_all_of_the_turn_before_and_items_share_rules_and_project() {
    for dialect in Dialect::ALL {
        let write = |content: &str| {
            let edit = json!({"op": "write", "path": "src/new.py", "content": content});
            // Fields in no particular order, as models write them.
            Reply::tool_call("edit", json!({"edits": [edit]}))
        };
        let done = || Reply::tool_call("done", json!({"summary": "finished"}));
        let read = |path: &str| Reply::tool_call("read", json!({"start_line": 1, "path": path, "end_line": 9}));
        let replies = vec![
            read("src/count.py"),
            write("x = 1\n"),
            read("src/new.py"),
            done(),
            // The second item.
            write("x = 2\n"),
            done(),
        ];
        let stage = Stage::new(dialect, replies).await;
        stage.implement(&todo("first", &["R1"], &[], "sh first.sh")).await;
        stage.implement(&todo("second", &["R2"], &[], "sh second.sh")).await;
        let prompts = stage.prompts();
        assert_eq!(prompts.len(), 6, "{dialect:?}");
        for (n, pair) in prompts.windows(2).enumerate().filter(|(n, _)| *n != 3) {
            assert!(pair[0].begins(&pair[1]), "{dialect:?}, turn {n}:\n{}\n{}", pair[0].turns, pair[1].turns);
        }
        // Rules, tools, architecture, notes and map come before the first byte that is the item's own.
        let (first, second) = (&prompts[0], &prompts[4]);
        assert_eq!(first.fixed, second.fixed, "{dialect:?}");
        let common = shared(&first.turns, &second.turns);
        for part in ["One file counts words.", "Use four spaces.", "</agents>", "</map>"] {
            assert!(common.contains(part), "{dialect:?}, {part}: {common}");
        }
        assert!(common.ends_with("# Item "), "{dialect:?}: {common}");
    }
}

fn user(request: &Request) -> &str {
    match request.messages.iter().find(|message| matches!(message, Message::User { .. })) {
        Some(Message::User { text }) => text,
        other => panic!("{other:?}"),
    }
}

fn asked<'r>(requests: &'r [(String, Request)], at: &str) -> &'r Request {
    &requests.iter().find(|(key, _)| key == at).unwrap_or_else(|| panic!("{at} was not asked")).1
}

/// A loop in which every step is asked twice.
fn stubborn() -> Vec<Value> {
    let good = verdict(&[("R1", "accept", line("a.sh", 1)), ("R2", "accept", line("b.sh", 1))], vec![]);
    let bad = verdict(&[("R1", "accept", Value::Null), ("R2", "accept", line("b.sh", 1))], vec![]);
    let again = plan(vec![todo("a", &["R1"], &[], "true"), todo("c", &["R2"], &["a"], "true")]);
    vec![
        at("more~1/ask:ask", question("Which words?")),
        at("more~2/ask:ask", complete()),
        at("again:plan", plan(vec![])),
        at("again:plan-2", again),
        at("verify:verify", bad),
        at("verify:verify-2", good),
        says("readme:readme-1", "# T\n```sh\nsh missing.sh\n```\n"),
        says("readme:readme-2", "# T\n```sh\nsh a.sh\n```\n"),
    ]
}

/// All of it, on a project with two finished items.
async fn whole(extra: Vec<Value>) -> Vec<(String, Request)> {
    let (bench, _) = finished(extra).await;
    bench.step("verify@1", "verify", json!({})).await;
    bench.step("readme@1", "readme", json!({})).await;
    bench.step("gather@1", "more~1/ask", json!({"idea": "Count words"})).await;
    bench.step("gather@1", "more~2/ask", json!({"idea": "Count words", "answer": "All of them"})).await;
    bench.step("plan@1", "again", json!({"changes": "Rank by length"})).await;
    bench.requests()
}

#[tokio::test]
async fn who_is_asked_again_is_asked_behind_the_same_words() {
    let requests = whole(stubborn()).await;
    for (first, second) in
        [("verify:verify", "verify:verify-2"), ("readme:readme-1", "readme:readme-2"), ("again:plan", "again:plan-2")]
    {
        let (first, second) = (asked(&requests, first), asked(&requests, second));
        assert!(second.messages.starts_with(&first.messages) && second.messages.len() > first.messages.len());
        assert_eq!((&first.tools, &first.output_schema), (&second.tools, &second.output_schema));
    }
    // From round to round of the conversation, and from plan to plan, what is known comes first and what is new last.
    let (first, second) = (asked(&requests, "more~1/ask:ask"), asked(&requests, "more~2/ask:ask"));
    assert_eq!(first.messages[0], second.messages[0]);
    assert!(shared(user(first), user(second)).contains("Person: Count words"), "{}", user(second));
    let (first, second) = (asked(&requests, "plan:plan"), asked(&requests, "again:plan"));
    assert_eq!(first.messages[0], second.messages[0]);
    let common = shared(user(first), user(second));
    assert!(common.contains("# The idea") && common.contains("- R2: It ranks."), "{common}");
    assert!(user(second).trim_end().ends_with("Keep the ids of items that stay."));
}

#[tokio::test]
async fn the_same_project_is_asked_about_with_the_same_bytes() {
    // Other database, other ids, other hour: nothing of that is in a prompt.
    let (one, two) = (whole(stubborn()).await, whole(stubborn()).await);
    assert_eq!(one.len(), two.len());
    for ((at, one), (_, two)) in one.iter().zip(&two) {
        let texts = [one, two].map(|request| serde_json::to_string(request).unwrap());
        assert!(texts[0] == texts[1], "{at} differs behind: {}", shared(&texts[0], &texts[1]));
    }
}

/// Text with which no window of these tests has room, of words that the requirements use.
fn bulk() -> String {
    let function = |n: usize| {
        format!(
            "def count_{n}(words):\n    \"It counts, ranks, and tests the usage of the command line.\"\n    return {n}\n"
        )
    };
    (0..600).map(function).collect()
}

/// Accepts everything with lines that exist.
fn accepting() -> Value {
    verdict(&[("R1", "accept", line("a.sh", 1)), ("R2", "accept", line("b.sh", 1))], vec![])
}

/// A project of two finished items and more code than fits.
async fn bulky(extra: Vec<Value>, window: u64) -> (Bench, Vec<Value>) {
    let (bench, items) = finished_with_window(extra, window).await;
    let open = bench.place.open(None).await;
    let file = |path: &str, content: String| FileChange { path: path.into(), content: Some(content) };
    open.write(&[
        file("src/words.py", bulk()),
        file("AGENTS.md", bulk()),
        file("docs/ARCHITECTURE.md", format!("# Architecture\n{}", bulk())),
    ])
    .unwrap();
    let new = NewCommit {
        subject: "x".into(),
        body: String::new(),
        trailers: vec![],
        at: chrono::DateTime::UNIX_EPOCH,
        attempt_id: attempt(),
    };
    open.commit(new).await.unwrap();
    (bench, items)
}

fn all_steps() -> Vec<Value> {
    let again = plan(vec![todo("c", &["R1"], &[], "true"), todo("d", &["R2"], &["c"], "true")]);
    vec![
        at("again:plan", again),
        at("verify:verify", accepting()),
        says("readme:readme-1", "# T\n```sh\nsh a.sh\n```\n"),
        writes("code:turn-1", "new.sh", "exit 0\n"),
        finishes("code:turn-2"),
    ]
}

/// Takes every step that asks a model, and returns what each was asked at last. `takes`: most tokens that the model takes of a call.
async fn take_all(bench: &Bench, item: &Value, takes: impl Fn(&str) -> u64) -> BTreeMap<String, Request> {
    let before = bench.requests().len();
    let evidence = json!({"passed": false, "again": true, "work": "", "reason": "x", "results": [
        {"command": "sh a.sh", "passed": false, "expect_exit": 0, "exit_code": 3, "timed_out": false, "duration_ms": 1,
         "output_tail": bulk(), "log_sha256": "", "sandbox": "bubblewrap"}]});
    bench.takes(takes("verify:verify"));
    let output = bench.step("verify@1", "verify", json!({})).await;
    assert_eq!(output["verdict"], "accept", "{output}");
    bench.takes(takes("code:turn-1"));
    bench.step("implement@1", "code", json!({"todo": item, "evidence": evidence})).await;
    bench.takes(takes("readme:readme-1"));
    bench.step("readme@1", "readme", json!({})).await;
    bench.takes(takes("again:plan"));
    bench.step("plan@1", "again", json!({"changes": "Rank by length"})).await;
    bench.requests().split_off(before).into_iter().collect()
}

/// What may never be given up, by the call that has to say it.
const KEPT: [(&str, &[&str]); 4] = [
    ("verify:verify", &["- R1: It counts.", "- R2: It ranks.", "- a: Do a"]),
    ("code:turn-1", &["# Item a: Do a", "Requirements: R1", "`sh a.sh` has to exit with 0", "TODO.md", "<evidence>"]),
    ("readme:readme-1", &["- R1: It counts.", "- R2: It ranks.", "- src/words.py"]),
    ("again:plan", &["Count words", "- R1: It counts.", "- UTF-8", "Rank by length", "- a: Do a"]),
];

fn holds_what_counts(requests: &BTreeMap<String, Request>, rules: &BTreeMap<String, Request>) {
    for (at, parts) in KEPT {
        let request = &requests[at];
        assert_eq!(request.messages[0], rules[at].messages[0], "{at}: the rules");
        let text = user(request);
        for part in parts {
            assert!(text.contains(part), "{at}, {part}: {text}");
        }
        assert!(text.contains("left out"), "{at} is not told: {text}");
        assert!(text.len() < user(&rules[at]).len(), "{at}");
        assert_eq!(request.output_schema, rules[at].output_schema, "{at}");
    }
}

#[tokio::test]
async fn a_small_window_and_a_provider_that_refuses_get_the_same_questions_with_less() {
    let (large, items) = bulky(all_steps(), 1_000_000).await;
    let full = take_all(&large, &items[0], |_| u64::MAX).await;

    // Half of it is for the answer.
    let (small, items) = bulky(all_steps(), 12_288).await;
    let requests = take_all(&small, &items[0], |_| u64::MAX).await;
    holds_what_counts(&requests, &full);
    assert!(requests.values().all(|request| request_tokens_max(request) < 6_144));
    assert!(small.calls_of("code:turn-1") == 1, "what does not fit is not sent");

    // A window that is said to be large, and is not.
    let (liar, items) = bulky(all_steps(), 1_000_000).await;
    let requests = take_all(&liar, &items[0], |at| request_tokens_max(&full[at]) * 6 / 10).await;
    holds_what_counts(&requests, &full);
    for (at, _) in KEPT {
        assert!(liar.calls_of(at) <= 4, "{at} was asked {} times", liar.calls_of(at));
    }
}

#[tokio::test]
async fn reading_more_than_a_window_holds_does_not_end_an_item() {
    let mut script: Vec<Value> = (1..=8)
        .flat_map(|n| {
            let read = json!({"path": "src/words.py", "start_line": n * 100});
            [
                calls(&format!("code:turn-{}", 2 * n - 1), "read", read),
                writes(&format!("code:turn-{}", 2 * n), "n.sh", &format!("# {n}\n")),
            ]
        })
        .collect();
    script.push(finishes("code:turn-17"));
    let (bench, items) = bulky(script, 24_000).await;
    let output = bench.step("implement@1", "code", json!({"todo": items[0]})).await;
    assert_eq!(output["turns"], json!(17));
    for (at, request) in bench.requests().iter().filter(|(at, _)| at.starts_with("code:")) {
        assert!(request_tokens_max(request) < 24_000 - 8_192, "{at}");
        assert!(user(request).contains("`sh a.sh` has to exit with 0"), "{at}");
    }
}

#[tokio::test]
async fn a_server_that_counts_far_fewer_tokens_than_it_was_sent_is_told_of() {
    // A window of 1,000 tokens, and one of 3,000; they were sent some 3,000.
    for (prompt, is_told) in [(1_000, true), (2_900, false)] {
        let told = Told { prompt, ..Told::default() };
        let server = FakeProvider::saying(Reply::text("planned").with_usage(Some(told))).await;
        let routing = Routing { roles: [(Role::Architect, vec![keys::candidate("openai_compatible", "m")])].into() };
        let provider = client(Dialect::OpenAi, &server.base_of(Dialect::OpenAi), Timeouts::default());
        let orchestrator = Orchestrator::with_pace(routing, vec![provider], Pace::default());
        let request = Request { messages: vec![Message::User { text: "line ".repeat(2_400) }], ..keys::request() };
        let (guard, lines) = capture();
        let reply = orchestrator.call(&keys::attempt_of(None).0, "plan", request).await.unwrap();
        drop(guard);
        assert_eq!((reply.text.as_str(), reply.tokens_prompt), ("planned", prompt));
        let text = lines.text();
        assert_eq!(text.contains("may have cut the prompt"), is_told, "{text}");
        assert!(!is_told || text.contains("told=1000") && text.contains("expected=300"), "{text}");
    }
}
