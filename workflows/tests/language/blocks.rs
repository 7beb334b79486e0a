//! Blocks and pure steps: parallel, foreach, repeat, redo, switch, set, wait, groups, conditions.

use crate::bench::Bench;
use serde_json::{Value, json};

fn race(join: &str, left: &str, right: &str, third: &str) -> String {
    format!(
        r#"
steps:
  - id: p
    parallel:
      join: {join}
      branches:
        left: [{{ id: l, uses: work@1, with: {left}, retry: {{ attempts: 1 }} }}]
        right: [{{ id: r, uses: work@1, with: {right}, retry: {{ attempts: 1 }} }}]
        third: [{{ id: t, uses: work@1, with: {third}, retry: {{ attempts: 1 }} }}]
outputs: {{ p: "${{{{ steps.p.output }}}}" }}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_all_needs_all_and_stops_at_the_first_failure() {
    let bench = Bench::new().await;
    let run = bench
        .start(&race("all", "{ gate: x, value: 1 }", "{ gate: x, value: 2 }", "{ gate: x, value: 3 }"), json!({}))
        .await;
    bench.world.arrived("x", 3).await;
    bench.world.open("x", 3);
    let out = bench.output(run).await;
    let outputs: Vec<&Value> = ["left", "right", "third"].iter().map(|b| &out["p"]["branches"][b]["output"]).collect();
    assert_eq!(outputs, [&json!(1), &json!(2), &json!(3)]);
    assert_eq!(out["p"]["branches"]["left"]["status"], "succeeded");
    let failure =
        bench.fails(&race("all", "{ gate: never }", "{ fail: user.bad }", "{ gate: never }"), json!({})).await;
    assert_eq!((failure.code.as_str(), failure.path.as_deref()), ("user.bad", Some("p:right/r")));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_without_fail_fast_lets_the_others_end() {
    let bench = Bench::new().await;
    let body = race("all\n      fail-fast: false", "{ gate: x }", "{ fail: user.bad }", "{ gate: x }");
    let run = bench.start(&body, json!({})).await;
    bench.world.arrived("x", 2).await;
    bench.world.open("x", 2);
    assert_eq!(bench.failure(run).await.code, "user.bad");
    assert!(bench.world.cancelled().is_empty());
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_settled_succeeds_however_its_branches_end() {
    let bench = Bench::new().await;
    let out =
        bench.completes(&race("settled", "{ value: 1 }", "{ fail: user.bad }", "{ fail: user.too }"), json!({})).await;
    let branches = &out["p"]["branches"];
    assert_eq!((&branches["left"]["status"], &branches["right"]["status"]), (&json!("succeeded"), &json!("failed")));
    assert_eq!((&branches["right"]["error"]["type"], &out["p"]["winner"]), (&json!("user.bad"), &json!("left")));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_first_cancels_the_losers() {
    let bench = Bench::new().await;
    let run =
        bench.start(&race("first", "{ gate: never }", "{ gate: x, value: 2 }", "{ fail: user.bad }"), json!({})).await;
    bench.world.arrived("never", 1).await;
    bench.world.arrived("x", 1).await;
    bench.world.open("x", 1);
    let out = bench.output(run).await;
    assert_eq!((&out["p"]["winner"], &out["p"]["branches"]["right"]["output"]), (&json!("right"), &json!(2)));
    assert_eq!(out["p"]["branches"]["left"]["status"], "cancelled");
    assert_eq!(bench.world.cancelled(), ["p:left/l"]);
    let failure =
        bench.fails(&race("first", "{ fail: user.a }", "{ fail: user.b }", "{ fail: user.c }"), json!({})).await;
    assert_eq!(failure.code, "join.none_succeeded");
    assert!(failure.cause.is_some());
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_at_least_succeeds_at_its_number_and_fails_when_it_is_out_of_reach() {
    let bench = Bench::new().await;
    let out =
        bench.completes(&race("{ at-least: 2 }", "{ value: 1 }", "{ gate: never }", "{ value: 3 }"), json!({})).await;
    assert_eq!(out["p"]["branches"]["right"]["status"], "cancelled");
    let body = race("{ at-least: 2 }", "{ fail: user.a }", "{ gate: never }", "{ fail: user.c }");
    assert_eq!(bench.fails(&body, json!({})).await.code, "join.failed");
    bench.done().await;
}

fn each(options: &str, step: &str) -> String {
    format!(
        r#"
inputs: {{ items: {{ type: array, required: true }} }}
steps:
  - id: each
    foreach: {{ in: inputs.items, max-items: 4, {options} }}
    steps:
      - {step}
    outputs: {{ got: "${{{{ steps.s.output }}}}", at: "${{{{ index }}}}" }}
outputs: {{ list: "${{{{ steps.each.output }}}}" }}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn foreach_runs_in_a_window_and_answers_in_order() {
    let bench = Bench::new().await;
    let body =
        each("key: item.id, concurrency: 2", "{ id: s, uses: work@1, with: { gate: x, value: \"${{ item.v }}\" } }");
    let items = json!([{"id": "a/1", "v": 1}, {"id": "b", "v": 2}, {"id": "c", "v": 3}]);
    let run = bench.start(&body, json!({ "items": items })).await;
    bench.world.arrived("x", 2).await;
    assert_eq!(bench.client.describe(run).await.expect("run").live.len(), 2, "no third before one has ended");
    bench.world.open("x", 3);
    let out = bench.output(run).await;
    assert_eq!(
        out["list"],
        json!([
            {"index": 0, "key": "a%2F1", "status": "succeeded", "output": {"got": 1, "at": 0}, "error": null},
            {"index": 1, "key": "b", "status": "succeeded", "output": {"got": 2, "at": 1}, "error": null},
            {"index": 2, "key": "c", "status": "succeeded", "output": {"got": 3, "at": 2}, "error": null},
        ])
    );
    let mut paths = bench.world.paths();
    paths.sort();
    assert_eq!(paths, ["each[a%2F1]/s", "each[b]/s", "each[c]/s"]);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreach_of_nothing_is_nothing() {
    let bench = Bench::new().await;
    let body = each("concurrency: 2", "{ id: s, uses: work@1 }");
    assert_eq!(bench.completes(&body, json!({"items": []})).await, json!({"list": []}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreach_fail_fast_cancels_the_items_under_way() {
    let bench = Bench::new().await;
    let failing = each(
        "key: item, concurrency: 2",
        "{ id: s, steps: [{ id: w, uses: work@1, with: { gate: \"${{ item == 'bad' ? 'x' : 'never' }}\" } }, { id: f, fail: { type: user.bad } }] }",
    );
    let run = bench.start(&failing, json!({"items": ["slow", "bad", "later"]})).await;
    bench.world.arrived("never", 1).await;
    bench.world.arrived("x", 1).await;
    bench.world.open("x", 1);
    assert_eq!(bench.failure(run).await.code, "user.bad");
    assert_eq!(bench.world.cancelled(), ["each[slow]/s/w"]);
    assert_eq!(bench.world.paths().len(), 2, "the third never began");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreach_continue_and_fail_after_let_every_item_end() {
    let bench = Bench::new().await;
    let step = "{ id: s, switch: [{ when: item == 'bad', steps: [{ id: f, fail: { type: user.bad } }] }, { else: true, steps: [{ id: v, uses: work@1, with: { value: \"${{ item }}\" } }] }] }";
    let items = json!({"items": ["a", "bad", "c"]});
    let out = bench.completes(&each("on-item-failure: continue", step), items.clone()).await;
    let statuses: Vec<&Value> = out["list"].as_array().expect("list").iter().map(|i| &i["status"]).collect();
    assert_eq!(statuses, ["succeeded", "failed", "succeeded"]);
    assert_eq!(out["list"][1]["error"]["type"], "user.bad");
    assert_eq!(bench.fails(&each("on-item-failure: fail-after", step), items).await.code, "user.bad");
    assert_eq!(bench.world.paths().len(), 4, "two good items, twice");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreach_refuses_long_lists_and_doubled_keys_before_any_item() {
    let bench = Bench::new().await;
    let body = each("key: item", "{ id: s, uses: work@1 }");
    for (items, code) in [(json!([1, 2, 3, 4, 5]), "limit.items"), (json!(["a", "b", "a"]), "limit.keys")] {
        assert_eq!(bench.fails(&body, json!({ "items": items })).await.code, code);
    }
    assert!(bench.world.paths().is_empty());
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeat_goes_round_until_its_condition() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: again
    repeat: { max-rounds: 5, until: steps.count.output.n >= 3, delay: 5ms }
    steps:
      - id: count
        set: { n: "${{ round.number == 1 ? 1 : round.previous.count.n + 1 }}", max: "${{ round.max }}" }
      - id: do
        uses: work@1
        with: { value: "${{ steps.count.output.n }}" }
    outputs: { n: "${{ steps.count.output.n }}", did: "${{ steps.do.output }}" }
outputs: { out: "${{ steps.again.output }}", rounds: "${{ steps.again.rounds }}", exhausted: "${{ steps.again.exhausted }}" }
"#;
    let out = bench.completes(body, json!({})).await;
    assert_eq!(out, json!({"out": {"n": 3, "did": 3}, "rounds": 3, "exhausted": false}));
    assert_eq!(bench.world.paths(), ["again~1/do", "again~2/do", "again~3/do"]);
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeat_that_is_exhausted_fails_or_goes_on() {
    let bench = Bench::new().await;
    let body = |exhausted: &str| {
        format!(
            r#"
steps:
  - id: again
    repeat: {{ max-rounds: 2, while: steps.s.output.go, exhausted: {exhausted} }}
    steps: [{{ id: s, set: {{ go: true }} }}]
outputs: {{ exhausted: "${{{{ steps.again.exhausted }}}}", rounds: "${{{{ steps.again.rounds }}}}" }}
"#
        )
    };
    assert_eq!(bench.fails(&body("fail"), json!({})).await.code, "limit.rounds");
    assert_eq!(bench.completes(&body("continue"), json!({})).await, json!({"exhausted": true, "rounds": 2}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redo_goes_back_with_what_the_round_before_found() {
    let bench = Bench::new().await;
    let body = |max: u32, exhausted: &str| {
        format!(
            r#"
steps:
  - id: code
    uses: work@1
    with: {{ value: {{ n: "${{{{ round.number }}}}", evidence: "${{{{ round.number == 1 ? 'none' : round.previous.check.found }}}}" }} }}
  - id: check
    uses: work@1
    with: {{ value: {{ passed: "${{{{ steps.code.output.n == 3 }}}}", found: "${{{{ 'broken ' + string(round.number) }}}}" }} }}
    redo: {{ from: code, if: "!steps.check.output.passed", max-rounds: {max}, exhausted: {exhausted} }}
  - id: after
    set: {{ evidence: "${{{{ steps.code.output.evidence }}}}", passed: "${{{{ steps.check.output.passed }}}}" }}
outputs: {{ after: "${{{{ steps.after.output }}}}" }}
"#
        )
    };
    let out = bench.completes(&body(5, "fail"), json!({})).await;
    assert_eq!(out, json!({"after": {"evidence": "broken 2", "passed": true}}), "the last round stays visible");
    assert_eq!(bench.fails(&body(2, "fail"), json!({})).await.code, "limit.rounds");
    let out = bench.completes(&body(2, "continue"), json!({})).await;
    assert_eq!(out, json!({"after": {"evidence": "broken 1", "passed": false}}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn switch_takes_the_first_case_that_holds() {
    let bench = Bench::new().await;
    let body = |last: &str| {
        format!(
            r#"
inputs: {{ n: {{ type: integer, required: true }} }}
steps:
  - id: s
    switch:
      - when: inputs.n > 10
        steps: [{{ id: big, set: {{ v: big }} }}]
      - when: inputs.n > 5
        steps: [{{ id: middle, set: {{ v: middle }} }}]
{last}
outputs: {{ s: "${{{{ steps.s.output }}}}" }}
"#
        )
    };
    let with_else = body("      - else: true\n        steps: [{ id: small, set: { v: small } }]");
    for (n, case, v) in [(11, 0, "big"), (6, 1, "middle"), (1, 2, "small")] {
        let out = bench.completes(&with_else, json!({ "n": n })).await;
        assert_eq!(out, json!({"s": {"case": case, "output": {"v": v}}}));
    }
    assert_eq!(bench.completes(&body(""), json!({"n": 1})).await, json!({"s": {"case": -1, "output": null}}));
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn set_computes_values_and_a_mistake_in_it_is_a_failure_with_a_code() {
    let bench = Bench::new().await;
    let body = r#"
inputs: { list: { type: array, default: [3, 1, 2] }, name: { type: string, default: Ada } }
env: { GREETING: "hello ${{ inputs.name }}" }
steps:
  - id: s
    set:
      typed: ${{ size(inputs.list) }}
      text: "n=${{ size(inputs.list) }}, ${{ env.GREETING }}"
      nested: { list: ["${{ sum(inputs.list) }}", plain], when: "${{ inputs.name == 'Ada' }}" }
      escaped: "$${{ kept }}"
      started: "${{ run.started_at != '' && run.workflow == 't' }}"
outputs: { s: "${{ steps.s.output }}" }
"#;
    assert_eq!(
        bench.completes(body, json!({})).await["s"],
        json!({"typed": 3, "text": "n=3, hello Ada", "nested": {"list": [6, "plain"], "when": true}, "escaped": "${{ kept }}", "started": true})
    );
    for (expression, code) in [
        ("inputs.name + 1", "expr.type"),
        ("inputs.list[7]", "expr.missing"),
        ("1 / (size(inputs.name) - 3)", "expr.overflow"),
    ] {
        let body = body.replace("size(inputs.list) }}\n", &format!("{expression} }}}}\n"));
        let failure = bench.fails(&body, json!({})).await;
        assert_eq!((failure.code.as_str(), failure.path.as_deref()), (code, Some("s")), "{}", failure.message);
    }
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_for_and_until_are_durable_timers() {
    let bench = Bench::new().await;
    let body = r#"
inputs: { at: { type: string, required: true } }
steps:
  - id: some
    wait: { for: 50ms }
  - id: until
    wait: { until: inputs.at, max: 1h }
outputs: { ok: "${{ steps.some.output.waited_ms >= 50 }}" }
"#;
    assert_eq!(bench.completes(body, json!({"at": "2020-01-01T00:00:00Z"})).await, json!({"ok": true}));
    assert_eq!(bench.fails(body, json!({"at": "2099-01-01T00:00:00Z"})).await.code, "limit.wait");
    assert_eq!(bench.fails(body, json!({"at": "soon"})).await.code, "expr.type");
    bench.done().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_has_outputs_and_a_skipped_step_has_none() {
    let bench = Bench::new().await;
    let body = r#"
steps:
  - id: g
    steps:
      - id: one
        set: { v: 1 }
      - id: two
        if: steps.one.output.v == 2
        set: { v: 2 }
    outputs: { one: "${{ steps.one.output.v }}", two: "${{ steps.two.status }}", reason: "${{ steps.two.reason }}" }
  - id: plain
    steps: [{ id: first, set: { v: 1 } }, { id: last, set: { v: 9 } }]
outputs: { g: "${{ steps.g.output }}", plain: "${{ steps.plain.output }}" }
"#;
    let out = bench.completes(body, json!({})).await;
    assert_eq!(out, json!({"g": {"one": 1, "two": "skipped", "reason": "if"}, "plain": {"v": 9}}));
    bench.done().await;
}
