//! Attempts: retries, handlers, timeouts.

use crate::bench::Bench;
use loopwright_engine::view::RunStatus;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_succeeds_after_its_backoff() {
    let bench = Bench::new().await;
    let run = bench
        .start(
            r#"
steps:
  - id: a
    uses: work@1
    with: { fails: 3, value: { n: 7 } }
    retry: { attempts: 4, delay: 40ms, backoff: 2, max-delay: 100ms, jitter: 0, on: ["transient.*"] }
outputs: { n: "${{ steps.a.output.n }}", attempts: "${{ steps.a.attempts }}" }
"#,
            json!({}),
        )
        .await;
    assert_eq!(bench.output(run).await, json!({"n": 7, "attempts": 4}));
    let events = bench.events(run).await;
    let at = |e: &serde_json::Value, key: &str| {
        e[key].as_str().expect("instant").parse::<chrono::DateTime<chrono::Utc>>().expect("instant")
    };
    let ends = events.iter().filter(|e| e["type"] == "attempt_ended").map(|e| at(e, "at"));
    let dues = events.iter().filter(|e| e["type"] == "retry_scheduled").map(|e| at(e, "due_at"));
    let delays: Vec<i64> = ends.zip(dues).map(|(end, due)| (due - end).num_milliseconds()).collect();
    assert_eq!(delays, [40, 80, 100], "delay times backoff, at most max-delay");
    let starts = events.iter().filter(|e| e["type"] == "attempt_started").skip(1).map(|e| at(e, "at"));
    let dues = events.iter().filter(|e| e["type"] == "retry_scheduled").map(|e| at(e, "due_at"));
    assert!(starts.zip(dues).all(|(start, due)| start >= due), "no attempt starts before it is due");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_end_when_they_are_exhausted_or_not_wanted() {
    let bench = Bench::new().await;
    let body = |code: &str| {
        format!(
            r#"
steps:
  - id: a
    uses: work@1
    with: {{ fails: 9, code: {code} }}
    retry: {{ attempts: 2, delay: 1ms, on: ["transient.*", "model.*"], not-on: ["model.refused"] }}
"#
        )
    };
    let failure = bench.fails(&body("transient.test"), json!({})).await;
    assert_eq!((failure.code.as_str(), failure.path.as_deref()), ("transient.test", Some("a")));
    assert_eq!(bench.world.paths().len(), 2, "every count includes the first");
    for code in ["model.refused", "other.kind"] {
        assert_eq!(bench.fails(&body(code), json!({})).await.code, code);
    }
    assert_eq!(bench.world.paths().len(), 4, "what no pattern names, or `not-on` does, is final");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escalation_changes_the_input_from_its_attempt_on() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: a
    uses: work@1
    with: { fails: 2, value: small, other: kept }
    retry: { attempts: 3, delay: 1ms, on: ["transient.*"], escalate: [{ from-attempt: 3, with: { value: "${{ upper('big') }}" } }] }
outputs: { v: "${{ steps.a.output }}" }
"#;
    assert_eq!(bench.completes(body, json!({})).await, json!({"v": "BIG"}));
    let calls = bench.world.calls.lock().expect("lock").clone();
    assert_eq!(calls.iter().map(|c| c.input["value"].clone()).collect::<Vec<_>>(), ["small", "small", "BIG"]);
    assert!(calls.iter().all(|c| c.input["other"] == "kept"));
    drop(calls);
    bench.done().await;
}

const CATCH: &str = r#"
steps:
  - id: a
    uses: work@1
    with: { fail: "${{ inputs.code }}" }
    catch:
      - on: ["user.*"]
        if: error.message == 'somebody else'
        steps: [{ id: never, set: { v: 1 } }]
      - on: ["user.*", "model.output_invalid"]
        steps:
          - id: note
            set: { type: "${{ error.type }}", why: "${{ error.data.why }}", path: "${{ error.path }}" }
      - on: ["activity.*"]
        steps:
          - id: again
            uses: work@1
            with: { fail: user.second }
  - id: after
    set: { status: "${{ steps.a.status }}", error: "${{ steps.a.error.type }}" }
inputs: { code: { type: string, required: true } }
outputs: { caught: "${{ steps.a.output }}", after: "${{ steps.after.output }}" }
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_first_handler_that_matches_takes_the_failure() {
    let bench = Bench::new().await;
    let out = bench.completes(CATCH, json!({"code": "user.mine"})).await;
    assert_eq!(
        out,
        json!({
            "caught": {"type": "user.mine", "why": "the test", "path": "a"},
            "after": {"status": "recovered", "error": "user.mine"},
        })
    );
    let failure = bench.fails(CATCH, json!({"code": "other.kind"})).await;
    assert_eq!(failure.code, "other.kind", "no handler names it");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_handler_replaces_the_failure_and_keeps_it_as_its_cause() {
    let bench = Bench::new().await;
    let failure = bench.fails(CATCH, json!({"code": "activity.first"})).await;
    assert_eq!((failure.code.as_str(), failure.path.as_deref()), ("user.second", Some("a!/again")));
    assert_eq!(failure.cause.map(|c| c.code), Some("activity.first".into()));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tolerated_failure_stays_visible_and_the_block_goes_on() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: a
    uses: work@1
    with: { fail: user.mine }
    continue-on-error: true
  - id: b
    set: { status: "${{ steps.a.status }}", type: "${{ steps.a.error.type }}", output: "${{ has(steps.a.output) }}" }
outputs: { b: "${{ steps.b.output }}" }
"#;
    let out = bench.completes(body, json!({})).await;
    assert_eq!(out, json!({"b": {"status": "failed", "type": "user.mine", "output": false}}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn schedule_to_start_queue() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: a
    uses: absent@1
    timeout: { queue: 60ms }
"#;
    assert_eq!(bench.fails(body, json!({})).await.code, "timeout.queue");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn start_to_close_run_is_per_attempt_and_retried() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: a
    uses: work@1
    with: { hang: true }
    timeout: 60ms
    retry: { attempts: 2, delay: 1ms, on: ["timeout.*"] }
"#;
    assert_eq!(bench.fails(body, json!({})).await.code, "timeout.run");
    assert_eq!(bench.world.paths(), ["a", "a"]);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn schedule_to_close_total_spans_all_attempts() {
    let bench = Bench::new().await;
    let hang = r#"
steps:
  - id: a
    uses: work@1
    with: { hang: true }
    timeout: { run: 1m, total: 80ms }
    retry: { attempts: 5, delay: 1ms, on: ["timeout.*"] }
"#;
    assert_eq!(bench.fails(hang, json!({})).await.code, "timeout.total");
    assert_eq!(bench.world.paths(), ["a"], "no attempt follows");
    let flaky = r#"
steps:
  - id: a
    uses: work@1
    with: { fails: 99 }
    timeout: { total: 300ms }
    retry: { attempts: 20, delay: 100ms, backoff: 1, jitter: 0, on: ["transient.*"] }
"#;
    // No attempt begins that could only begin after the end: what stands is why the last one failed, or is the cause if
    // the total was over while the next one was waited for.
    let failure = bench.fails(flaky, json!({})).await;
    let code = failure.cause.as_ref().map_or(&failure.code, |cause| &cause.code);
    assert_eq!(code, "transient.test", "{failure:?}");
    assert!(bench.world.paths().len() <= 5, "{:?}", bench.world.paths());
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeat_is_the_longest_silence() {
    let bench = Bench::new().await;
    let body = |with: &str| {
        format!(
            r#"
steps:
  - id: a
    uses: beat@1
    with: {with}
    timeout: {{ run: 1m, heartbeat: 2s }}
    retry: {{ attempts: 1 }}
"#
        )
    };
    assert_eq!(bench.fails(&body("{ hang: true }"), json!({})).await.code, "timeout.heartbeat");
    // Twice as long as the silence that is allowed.
    let run = bench.start(&body("{ beats: 200 }"), json!({})).await;
    assert_eq!(bench.closed(run).await.status, RunStatus::Completed);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_timeout_of_a_block_stops_what_is_in_it() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: g
    timeout: 150ms
    steps:
      - id: p
        parallel:
          branches:
            l: [{ id: l, uses: work@1, with: { gate: never } }]
            r: [{ id: r, uses: work@1, with: { gate: never } }]
    catch:
      - on: ["timeout.total"]
        steps: [{ id: note, set: { type: "${{ error.type }}" } }]
outputs: { g: "${{ steps.g.output }}" }
"#;
    assert_eq!(bench.completes(body, json!({})).await, json!({"g": {"type": "timeout.total"}}));
    assert_eq!(bench.world.cancelled(), ["g/p:l/l", "g/p:r/r"]);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_timeout_of_a_waiting_step_is_a_total_too() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: w
    wait: { for: 1h }
    timeout: 60ms
"#;
    assert_eq!(bench.fails(body, json!({})).await.code, "timeout.total");
    bench.done().await;
}
