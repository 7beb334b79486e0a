//! The shipped development loop, as it is, over activities that only say what the real ones would.

use crate::bench::{Bench, Named, World};
use loopwright_engine::{
    Failure,
    activity::{Context, Registry},
    client::Decision,
    view::Waiting,
};
use serde_json::{Value, json};
use std::{path::Path, sync::Arc};

#[tokio::test(flavor = "multi_thread")]
async fn the_development_loop_goes_through_every_turn_it_can_take() {
    let world = Arc::new(World::default());
    let mut registry = Registry::new();
    for name in ["gather", "plan", "implement", "check", "commit", "verify", "readme", "deliver", "limit"] {
        let world = world.clone();
        let script = move |ctx: Context, input: Value| {
            let world = world.clone();
            async move {
                let path = ctx.info().path.clone();
                let mut calls = world.calls.lock().expect("lock");
                calls.push(crate::bench::Call { path: path.clone(), input: input.clone() });
                let nth = calls.iter().filter(|c| c.path.ends_with(&format!("/{name}")) || c.path == name).count();
                Ok(match name {
                    "gather" => {
                        let answered = input["answer"] == "blue";
                        json!({"complete": answered, "question": "Which color?", "summary": "a program"})
                    }
                    "plan" => {
                        json!({"summary_markdown": format!("plan, changed: {}", input["changes"]), "todo": [{"id": "a"}, {"id": "b"}], "limit_credits": "12.5"})
                    }
                    "implement" => json!({"work": "w", "summary": "done"}),
                    // The first item's first code does not pass.
                    "check" => {
                        let passed = !path.contains("[a]/code..check~1");
                        json!({"passed": passed, "again": !passed, "reason": "", "results": [], "work": input["work"]})
                    }
                    "commit" => json!({"oid": format!("commit of {}", input["todo"]["id"])}),
                    // The first whole round is rejected with one item to do again.
                    "verify" if nth == 1 => {
                        json!({"verdict": "reject", "report_markdown": "no", "todo": [{"id": "c"}]})
                    }
                    "verify" => json!({"verdict": "accept", "report_markdown": "yes", "todo": []}),
                    "limit" => json!({"left_credits": input["credits"], "limit_credits": "20"}),
                    "readme" => json!({"path": "README.md"}),
                    _ => json!({"commit": "abc", "verdict": input["verdict"]}),
                })
            }
        };
        registry = registry.with(Named::new(&format!("{name}@1"), script));
    }
    let bench = Bench::with(world, registry.clone(), registry).await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workflow-defs/dev-loop.yaml");
    let hash = bench.deploy(&std::fs::read_to_string(folder).expect("text")).await;
    let inputs = json!({"project_id": "123e4567-e89b-42d3-a456-426614174000", "idea": "a program that paints"});
    let run = bench.start_hash(hash, inputs).await.run_id;

    let view = bench.waits(run).await;
    assert!(matches!(&view.waiting[0], Waiting::Signal { show: Some(s), .. } if s == "Which color?"), "{view:#?}");
    bench.signal(run, "user_message", json!({"text": "blue"})).await;
    for (round, decision) in [(1, Decision::ChangesRequested), (2, Decision::Approved)] {
        let path = format!("plan..approve~{round}/approve");
        bench
            .until(run, "the plan's approval", |v| {
                v.waiting.iter().any(|w| matches!(w, Waiting::Approval { path: p, .. } if *p == path))
            })
            .await;
        bench.approve(run, "approve", decision, "smaller", "user:1").await;
    }
    assert_eq!(bench.output(run).await, json!({"commit": "abc", "verdict": "accept"}));
    let calls = bench.world.calls.lock().expect("lock").clone();
    let paths: Vec<&str> = calls.iter().map(|c| c.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "gather~1/ask",
            "gather~2/ask",
            "plan..approve~1/plan",
            "plan..approve~2/plan",
            "limit",
            "implement..verify~1/implement[a]/code..check~1/code",
            "implement..verify~1/implement[a]/code..check~1/check",
            "implement..verify~1/implement[a]/code..check~2/code",
            "implement..verify~1/implement[a]/code..check~2/check",
            "implement..verify~1/implement[a]/commit",
            "implement..verify~1/implement[b]/code..check~1/code",
            "implement..verify~1/implement[b]/code..check~1/check",
            "implement..verify~1/implement[b]/commit",
            "implement..verify~1/verify",
            "implement..verify~2/implement[c]/code..check~1/code",
            "implement..verify~2/implement[c]/code..check~1/check",
            "implement..verify~2/implement[c]/commit",
            "implement..verify~2/verify",
            "readme",
            "deliver",
        ]
    );
    assert_eq!(calls[3].input["changes"], "smaller");
    assert_eq!(calls[4].input["credits"], "12.5", "what was approved");
    assert_eq!(calls[7].input["evidence"]["passed"], false, "the second try sees why the first did not pass");
    bench.done().await;
}

/// Section 4 of the design: stopped, escalated, then blocked. `a` is an item on which every model is stopped, `b` one whose checks
/// fail the same way each time.
#[tokio::test(flavor = "multi_thread")]
async fn what_gets_nowhere_goes_to_the_architect_and_is_then_blocked_without_ending_the_run() {
    let world = Arc::new(World::default());
    let mut registry = Registry::new();
    for name in ["gather", "plan", "implement", "check", "commit", "verify", "readme", "deliver", "limit"] {
        let world = world.clone();
        let script = move |ctx: Context, input: Value| {
            let world = world.clone();
            async move {
                let path = ctx.info().path.clone();
                let call = crate::bench::Call { path: path.clone(), input: input.clone() };
                world.calls.lock().expect("lock").push(call);
                Ok(match name {
                    "gather" => json!({"complete": true, "question": ""}),
                    "plan" => {
                        json!({"summary_markdown": "plan", "todo": [{"id": "a"}, {"id": "b"}], "limit_credits": "1"})
                    }
                    "implement" if path.contains("[a]") => {
                        return Err(Failure::retryable("model.no_progress", "The work was stopped."));
                    }
                    "implement" => json!({"work": "w", "summary": "done"}),
                    "check" => {
                        let again = input["work"] != "" && !path.contains("..check~3");
                        json!({"passed": false, "again": again, "reason": "", "results": [], "work": input["work"]})
                    }
                    "commit" => json!({"oid": "c"}),
                    "verify" => json!({"verdict": "accept", "report_markdown": "yes", "todo": []}),
                    "readme" => json!({"path": "README.md"}),
                    _ => json!({"commit": "abc", "verdict": input["verdict"]}),
                })
            }
        };
        registry = registry.with(Named::new(&format!("{name}@1"), script));
    }
    let bench = Bench::with(world, registry.clone(), registry).await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workflow-defs/dev-loop.yaml");
    // As it is, but for its patience.
    let source = std::fs::read_to_string(folder).expect("text").replace("delay: 5s", "delay: 10ms");
    let hash = bench.deploy(&source).await;
    let inputs = json!({"project_id": "123e4567-e89b-42d3-a456-426614174000", "idea": "x", "approve_plan": false});
    let run = bench.start_hash(hash, inputs).await.run_id;
    assert_eq!(bench.output(run).await, json!({"commit": "abc", "verdict": "accept"}));
    let calls = bench.world.calls.lock().expect("lock").clone();
    let of = |item: &str, step: &str| -> Vec<Value> {
        let wanted = |call: &&crate::bench::Call| call.path.contains(item) && call.path.ends_with(step);
        calls.iter().filter(wanted).map(|call| call.input.clone()).collect()
    };
    for item in ["[a]", "[b]"] {
        let roles: Vec<Value> = of(item, "/code").iter().map(|input| input["role"].clone()).collect();
        assert_eq!(roles, ["implementer", "implementer", "architect"], "{item}");
        let commits = of(item, "/commit");
        assert_eq!((commits.len(), &commits[0]["checks"]["passed"]), (1, &json!(false)), "{item}");
    }
    let checks = of("[a]", "/check");
    assert_eq!(
        (checks.len(), &checks[0]["work"], &checks[0]["reason"]),
        (1, &json!(""), &json!("The work was stopped."))
    );
    assert_eq!(of("[b]", "/check").len(), 3);
    bench.done().await;
}
