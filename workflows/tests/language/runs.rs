//! Whole runs: children, endings, `finally`, deployments while runs are in flight, starts that come twice.

use crate::bench::{Bench, document};
use loopwright_engine::{
    Error,
    ids::RunId,
    view::{RunStatus, Waiting},
};
use serde_json::{Value, json};

const CHILD: &str = r#"
inputs: { x: { type: integer, required: true } }
steps:
  - id: w
    uses: work@1
    if: inputs.x != 13
    with: { value: "${{ inputs.x * 2 }}" }
  - id: bad
    if: inputs.x == 13
    fail: { type: user.unlucky, message: "never ${{ inputs.x }}" }
outputs: { y: "${{ default(steps.w.output, 0) }}" }
"#;

const PARENT: &str = r#"
inputs: { x: { type: integer, required: true } }
steps:
  - id: c
    call: { workflow: child, with: { x: "${{ inputs.x }}" } }
outputs: { y: "${{ steps.c.output.y }}" }
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_call_returns_the_child_s_outputs_or_its_failure_as_the_cause() {
    let bench = Bench::new().await;
    bench.deploy(&document("child", CHILD)).await;
    assert_eq!(bench.completes(PARENT, json!({"x": 21})).await, json!({"y": 42}));
    let failure = bench.fails(PARENT, json!({"x": 13})).await;
    let cause = failure.cause.expect("cause");
    assert_eq!((failure.code.as_str(), cause.code.as_str()), ("call.failed", "user.unlucky"));
    assert_eq!(cause.message, "never 13");
    let unknown = PARENT.replace("workflow: child", "workflow: nobody");
    assert_eq!(bench.fails(&unknown, json!({"x": 1})).await.code, "call.failed");
    bench.done().await;
}

async fn child_of(bench: &Bench, run: RunId) -> RunId {
    let view = bench.until(run, "calls", |v| v.waiting.iter().any(|w| matches!(w, Waiting::Child { .. }))).await;
    match &view.waiting[0] {
        Waiting::Child { run_id, .. } => *run_id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_the_child_unless_it_is_detached() {
    let bench = Bench::new().await;
    bench
        .deploy(&document(
            "child",
            "steps: [{ id: w, uses: work@1, with: { gate: x } }]\nfinally: [{ id: clean, uses: work@1 }]",
        ))
        .await;
    let parent = |how: &str| format!("steps: [{{ id: c, call: {{ workflow: child@1, {how} }} }}]");
    let run = bench.start(&parent("on-cancel: propagate"), json!({})).await;
    let child = child_of(&bench, run).await;
    bench.world.arrived("x", 1).await;
    bench.client.cancel(run, "enough").await.expect("cancel");
    assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    assert_eq!(bench.closed(child).await.status, RunStatus::Cancelled);
    assert_eq!(bench.world.paths(), ["w", "!finally/clean"], "the child's `finally` ran, before the parent ended");
    let run = bench.start(&parent("on-cancel: detach"), json!({})).await;
    let child = child_of(&bench, run).await;
    bench.world.arrived("x", 1).await;
    bench.client.cancel(run, "enough").await.expect("cancel");
    assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
    bench.world.open("x", 1);
    assert_eq!(bench.closed(child).await.status, RunStatus::Completed);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_s_timeout_ends_its_child() {
    let bench = Bench::new().await;
    bench.deploy(&document("child", "steps: [{ id: w, uses: work@1, with: { gate: never } }]")).await;
    let run = bench.start("steps: [{ id: c, call: { workflow: child }, timeout: 400ms }]", json!({})).await;
    let child = child_of(&bench, run).await;
    assert_eq!(bench.failure(run).await.code, "timeout.total");
    assert_eq!(bench.closed(child).await.status, RunStatus::Cancelled);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn finish_ends_the_run_as_completed_from_any_depth() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: p
    parallel:
      branches:
        slow: [{ id: s, uses: work@1, with: { gate: never } }]
        out:
          - id: g
            steps:
              - id: before
                uses: work@1
                with: { gate: x }
              - id: end
                finish: { outputs: { early: "${{ 1 + 1 }}" } }
  - id: never
    uses: work@1
finally: [{ id: clean, uses: work@1 }]
"#;
    let run = bench.start(body, json!({})).await;
    bench.world.arrived("never", 1).await;
    bench.world.arrived("x", 1).await;
    bench.world.open("x", 1);
    assert_eq!(bench.output(run).await, json!({"early": 2}));
    assert_eq!(bench.world.cancelled(), ["p:slow/s"]);
    assert_eq!(bench.world.paths().last().map(String::as_str), Some("!finally/clean"));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fail_ends_the_block_with_the_user_s_own_type() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: g
    steps: [{ id: no, fail: { type: user.no_tests, message: "found ${{ 0 }} tests" } }]
    catch: [{ on: ["user.other"], steps: [{ id: n, set: { v: 1 } }] }]
"#;
    let failure = bench.fails(body, json!({})).await;
    assert_eq!((failure.code.as_str(), failure.message.as_str()), ("user.no_tests", "found 0 tests"));
    assert_eq!(failure.path.as_deref(), Some("g/no"));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn finally_runs_after_success_failure_cancel_and_timeout() {
    let bench = Bench::new().await;
    let body = |with: &str| {
        format!(
            r#"
timeout: 3s
steps:
  - id: a
    uses: work@1
    with: {with}
    retry: {{ attempts: 1 }}
finally:
  - id: clean
    uses: work@1
    with: {{ value: "${{{{ steps.a.status }}}}", seen: "${{{{ steps.a.status }}}}" }}
"#
        )
    };
    let seen = |bench: &Bench| {
        let calls = bench.world.calls.lock().expect("lock");
        calls.last().map(|c| (c.path.clone(), c.input["seen"].clone()))
    };
    let clean = |status: &str| Some(("!finally/clean".to_owned(), json!(status)));
    bench.completes(&body("{ value: 1 }"), json!({})).await;
    assert_eq!(seen(&bench), clean("succeeded"));
    assert_eq!(bench.fails(&body("{ fail: user.bad }"), json!({})).await.code, "user.bad");
    assert_eq!(seen(&bench), clean("failed"));
    let run = bench.start(&body("{ gate: never }"), json!({})).await;
    bench.world.arrived("never", 1).await;
    bench.client.cancel(run, "enough").await.expect("cancel");
    let view = bench.closed(run).await;
    assert_eq!((view.status, view.failure.map(|f| f.message)), (RunStatus::Cancelled, Some("enough".into())));
    assert_eq!(seen(&bench), clean("cancelled"));
    let short = body("{ gate: never }").replace("timeout: 3s", "timeout: 300ms");
    assert_eq!(bench.fails(&short, json!({})).await.code, "timeout.run_total");
    // The attempt was stopped by the run's deadline, or had just found it out by itself.
    assert!([clean("cancelled"), clean("failed")].contains(&seen(&bench)), "{:?}", seen(&bench));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_finally_fails_a_completed_run_and_hides_no_first_failure() {
    let bench = Bench::new().await;
    let body = |with: &str| {
        format!(
            "steps: [{{ id: a, uses: work@1, with: {with}, retry: {{ attempts: 1 }} }}]\nfinally: [{{ id: clean, uses: work@1, with: {{ fail: user.clean }} }}]"
        )
    };
    assert_eq!(bench.fails(&body("{ value: 1 }"), json!({})).await.code, "user.clean");
    assert_eq!(bench.fails(&body("{ fail: user.first }"), json!({})).await.code, "user.first");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_run_s_timeout_stops_a_wait_that_is_parked() {
    let bench = Bench::new().await;
    let body = "timeout: 200ms\nsteps: [{ id: w, wait: { for: 1h } }]";
    assert_eq!(bench.fails(body, json!({})).await.code, "timeout.run_total");
    bench.done().await;
}

fn version(text: &str, more: &str) -> String {
    document(
        "edited",
        &format!(
            r#"
steps:
  - id: ask
    await: {{ signal: go, timeout: 1h }}
  - id: say
    uses: work@1
    with: {{ value: {text} }}
{more}
  - id: sub
    call: {{ workflow: child }}
outputs: {{ said: "${{{{ steps.say.output }}}}", sub: "${{{{ steps.sub.output.v }}}}" }}
"#
        ),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_changes_the_next_run_and_no_run_in_flight() {
    let bench = Bench::new().await;
    let child = |v: u32| {
        document(
            "child",
            &format!("steps: [{{ id: s, set: {{ v: {v} }} }}]\noutputs: {{ v: \"${{{{ steps.s.output.v }}}}\" }}"),
        )
    };
    bench.deploy(&child(1)).await;
    let first = bench.deploy(&version("old", "")).await;
    let old = bench.start_hash(first, json!({})).await.run_id;
    bench.waits(old).await;
    // The document and what it calls are edited and deployed while the run waits.
    bench.deploy(&child(2)).await;
    let second = bench.deploy(&version("new", "  - id: more\n    uses: work@1")).await;
    assert_eq!(bench.client.pointer("edited", "current").await.expect("pointer"), second);
    let new = bench.start_hash(second, json!({})).await.run_id;
    bench.waits(new).await;
    for run in [old, new] {
        bench.signal(run, "go", Value::Null).await;
    }
    assert_eq!(bench.output(old).await, json!({"said": "old", "sub": 1}));
    assert_eq!(bench.output(new).await, json!({"said": "new", "sub": 2}));
    assert_eq!(bench.client.describe(old).await.expect("run").definition, first);
    let mut paths = bench.world.paths();
    paths.sort();
    assert_eq!(paths, ["more", "say", "say"], "the old run has no step that it was not started with");
    // What only looks different is no new version.
    assert_eq!(
        bench.deploy(&format!("# a comment\n{}", version("new", "  - id: more\n    uses: work@1"))).await,
        second
    );
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_comes_twice_is_one_run() {
    let bench = Bench::new().await;
    let hash = bench.deploy(&document("t", "steps: [{ id: ask, await: { signal: go, timeout: 1h } }]")).await;
    let mut by_key = Bench::request(hash, json!({}));
    by_key.workflow_id = Some("project:1".into());
    let first = bench.client.start(by_key.clone()).await.expect("start");
    let again = bench.client.start(by_key).await.expect("start");
    assert_eq!((first.created, again.created, again.run_id), (true, false, first.run_id));
    let mut by_id = Bench::request(hash, json!({}));
    by_id.run_id = Some(RunId::new());
    let first = bench.client.start(by_id.clone()).await.expect("start");
    let again = bench.client.start(by_id).await.expect("start");
    assert_eq!((first.created, again.created, again.run_id), (true, false, first.run_id));
    let count: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&bench.pool).await.expect("count");
    assert_eq!(count, 2);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_are_checked_at_the_door_and_defaulted() {
    let bench = Bench::new().await;
    let body = r#"
inputs:
  n: { type: integer, minimum: 1, default: 3 }
  name: { type: string, required: true, maxLength: 5 }
steps: [{ id: s, set: { v: "${{ inputs.n }} ${{ inputs.name }}" } }]
outputs: { v: "${{ steps.s.output.v }}" }
"#;
    let hash = bench.deploy(&document("t", body)).await;
    for inputs in
        [json!({}), json!({"name": "too long"}), json!({"name": "a", "n": 0}), json!({"name": "a", "x": 1}), json!([])]
    {
        let refused = bench.client.start(Bench::request(hash, inputs.clone())).await;
        assert!(matches!(refused, Err(Error::InputInvalid(_))), "{inputs}");
    }
    let run = bench.start_hash(hash, json!({"name": "Ada"})).await.run_id;
    assert_eq!(bench.output(run).await, json!({"v": "3 Ada"}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_execution_limit_ends_a_run() {
    let bench = Bench::new().await;
    let body = "limits: { executions: 5 }\nsteps: [{ id: r, repeat: { max-rounds: 4, until: \"false\" }, steps: [{ id: s, set: { v: 1 } }] }]";
    // The compiler's bound is exact here: four rounds and the block.
    assert_eq!(bench.fails(body, json!({})).await.code, "limit.rounds");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_that_calls_itself_ends_failed_at_the_depth_limit() {
    let bench = Bench::new().await;
    // Two that call each other, each of which also passes on how its child ended.
    bench.deploy(&document("ping", "steps: [{ id: c, call: { workflow: pong } }]")).await;
    let pong = bench.deploy(&document("pong", "steps: [{ id: c, call: { workflow: ping } }]")).await;
    let run = bench.start_hash(pong, json!({})).await.run_id;
    let failure = bench.failure(run).await;
    assert_eq!(failure.code, "call.failed");
    assert!(failure.message.contains("at most 8 runs"), "{failure:?}");
    let rows: Vec<(i32, String)> =
        sqlx::query_as("select depth, status from runs order by depth").fetch_all(&bench.pool).await.expect("rows");
    assert_eq!(rows, (0..=8).map(|depth| (depth, "failed".to_owned())).collect::<Vec<_>>());
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_tells_how_far_a_run_is() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - { id: first, set: { v: 1 } }
  - id: hold
    await: { signal: go, timeout: 1h }
queries:
  progress: { at: "${{ run.status }}", v: "${{ default(steps.first.output.v, 0) }}" }
"#;
    let run = bench.start(body, json!({})).await;
    bench.waits(run).await;
    let asked = bench.client.query(run, "progress").await.expect("answered");
    assert_eq!(asked.result, json!({"at": "running", "v": 1}));
    bench.signal(run, "go", json!({})).await;
    bench.output(run).await;
    let asked = bench.client.query(run, "progress").await.expect("answered");
    assert_eq!(asked.result, json!({"at": "completed", "v": 1}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_has_a_default_for_a_step_that_runs_or_has_not_begun() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - { id: runs, uses: work@1, with: { gate: x, value: { v: 1 } } }
  - { id: later, set: { v: 2 } }
queries:
  v: ["${{ default(steps.runs.output.v, 0) }}", "${{ default(steps.later.output.v, 'none') }}"]
  guarded: "${{ has(steps.runs.output) ? steps.runs.output.v : -1 }}"
"#;
    let run = bench.start(body, json!({})).await;
    let ask = async |name: &str| bench.client.query(run, name).await.expect("answered").result;
    bench.world.arrived("x", 1).await;
    assert_eq!((ask("v").await, ask("guarded").await), (json!([0, "none"]), json!(-1)));
    bench.world.open("x", 1);
    bench.output(run).await;
    assert_eq!((ask("v").await, ask("guarded").await), (json!([1, 2]), json!(1)));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_as_another_until_it_has_done_its_work() {
    let bench = Bench::new().await;
    let counter = r#"
inputs: { n: { type: integer, default: 1 }, step: { type: integer, default: 1 } }
steps:
  - { id: more, if: inputs.n < 3, continue-as-new: { with: { n: "${{ inputs.n + inputs.step }}" } } }
finally: [{ id: clean, uses: work@1 }]
outputs: { n: "${{ inputs.n }}" }
"#;
    bench.deploy(&document("counter", counter)).await;
    let body = "steps: [{ id: c, call: { workflow: counter } }]\noutputs: { n: \"${{ steps.c.output.n }}\" }";
    assert_eq!(bench.completes(body, json!({})).await, json!({"n": 3}));
    assert_eq!(bench.world.paths(), ["!finally/clean"; 3]);

    // What the next run does not take is a failure here, and may be handled.
    let caught = r#"
inputs: { n: { type: integer, default: 1 } }
steps:
  - id: more
    continue-as-new: { with: { n: many } }
    if: inputs.n < 3
    catch: [{ on: [input.invalid], steps: [{ id: less, set: { v: 1 } }] }]
outputs: { status: "${{ steps.more.status }}" }
"#;
    assert_eq!(bench.completes(caught, json!({})).await, json!({"status": "recovered"}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_under_the_version_that_is_current() {
    let bench = Bench::new().await;
    let old = "steps: [{ id: wait, await: { signal: go, timeout: 1h } }, { id: more, continue-as-new: { with: { v: 2 }, version: current } }]";
    let run = bench.start(old, json!({})).await;
    bench.waits(run).await;
    let new =
        "inputs: { v: { type: integer } }\nsteps: [{ id: s, set: { v: 1 } }]\noutputs: { v: \"${{ inputs.v }}\" }";
    bench.deploy(&document("t", new)).await;
    bench.signal(run, "go", json!({})).await;
    let view = bench.closed(run).await;
    assert_eq!(view.status, RunStatus::Continued, "{:?}", view.failure);
    assert_eq!(bench.output(view.chain.continued_as.expect("a successor")).await, json!({"v": 2}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_s_end_ends_its_child_as_the_call_says() {
    let bench = Bench::new().await;
    bench
        .deploy(&document(
            "child",
            "steps: [{ id: w, uses: work@1, with: { gate: x } }]\nfinally: [{ id: clean, uses: work@1 }]",
        ))
        .await;
    let calls = |how: &str| format!("steps: [{{ id: c, call: {{ workflow: child@1, parent-close: {how} }} }}]");
    for (how, wanted) in [("cancel", RunStatus::Cancelled), ("terminate", RunStatus::Terminated)] {
        let run = bench.start(&calls(how), json!({})).await;
        let child = child_of(&bench, run).await;
        bench.world.arrived("x", 1).await;
        bench.client.cancel(run, "enough").await.expect("cancel");
        assert_eq!(bench.closed(run).await.status, RunStatus::Cancelled);
        assert_eq!(bench.closed(child).await.status, wanted, "{how}");
    }
    assert_eq!(bench.world.paths(), ["w", "!finally/clean", "w"], "a terminated child does not clean up");
    bench.done().await;
}
