//! Items of a plan: written, checked, stopped, landed.

use super::*;

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
