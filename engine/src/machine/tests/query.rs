//! Queries read a state at any moment and change nothing.

use super::*;
use crate::machine::query;

fn asked() -> Definition {
    let mut d = definition(vec![act("a", &[]), await_step("ask", None, OnTimeout::Default)]);
    d.queries.insert("got".into(), x("has(steps.a) && steps.a.status == 'succeeded' ? steps.a.output.v : inputs.n"));
    d.queries.insert("bare".into(), x("steps.a.output.v"));
    d.queries.insert(
        "all".into(),
        Data::Map(BTreeMap::from([
            ("at".to_owned(), x("run.status")),
            ("id".to_owned(), x("run.id")),
            ("text".to_owned(), Data::Concat(vec![lit(json!("n is ")), x("inputs.n")])),
        ])),
    );
    d
}

#[test]
fn a_query_sees_what_the_body_s_steps_have_come_to() {
    let mut run = Bench::start_with(asked(), json!({"n": 1, "q": "?"}));
    let ask = |run: &Bench, name: &str| query(&run.definition, &run.state, name).expect("legal");
    let before = run.state.clone();
    assert_eq!(ask(&run, "got"), Some(Ok(json!(1))));
    let failure = ask(&run, "bare").expect("there").expect_err("not yet");
    assert_eq!(failure.code, "expr.missing");
    assert_eq!(ask(&run, "nothing"), None);
    let all = ask(&run, "all").expect("there").expect("value");
    assert_eq!(all, json!({"at": "running", "id": run.state.run_id, "text": "n is 1"}));
    assert_eq!(run.state, before);
    run.ok("a", json!({"v": 7}));
    assert_eq!((ask(&run, "got"), ask(&run, "bare")), (Some(Ok(json!(7))), Some(Ok(json!(7)))));
    // Before it has started there are no steps.
    let pending = RunState::new(RunId::new());
    let failure = query(&run.definition, &pending, "bare").expect("legal").expect("there").expect_err("nothing");
    assert_eq!(failure.code, "expr.missing");
}

#[test]
fn queries_are_part_of_the_hash_and_their_absence_is_not() {
    let hash = |d: &Definition| d.hash(&Bundle::new());
    let (with, without) = (asked(), Definition { queries: BTreeMap::new(), ..asked() });
    assert_ne!(hash(&with), hash(&without));
    assert!(!serde_json::to_string(&without).expect("json").contains("queries"));
}
