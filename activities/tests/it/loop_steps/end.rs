//! Verdicts, the README and what is delivered.

use super::*;

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
