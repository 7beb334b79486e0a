//! Questions and plans.

use super::*;

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
