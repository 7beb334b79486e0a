//! The language in its cage: what it says, what it refuses, and that it ends.

use super::*;
use serde_json::json;

fn eval(source: &str) -> Result<Value, String> {
    let scope = json!({
        "inputs": {"max": 5, "f": 1.5, "name": "Ada", "none": null},
        "steps": {"plan": {"output": {"todo": [{"id": "a"}, {"id": "b"}]}}},
    });
    evaluate(&Expr(source.into()), scope.as_object().expect("object")).map_err(|f| f.code)
}

#[test]
fn values() {
    for (source, expected) in [
        ("inputs.max + 1", json!(6)),
        ("inputs.f * 2.0", json!(3.0)),
        ("inputs.name == 'Ada' ? {} : 1", json!({})),
        ("steps.plan.output.todo.map(t, t.id)", json!(["a", "b"])),
        ("default(inputs.absent, 'x')", json!("x")),
        ("default(inputs.none, 'x')", json!("x")),
        ("default(inputs.name, 'x')", json!("Ada")),
        ("default(inputs.absent.deep.down, 'x')", json!("x")),
        ("default(inputs.none.deep, 'x')", json!("x")),
        ("default(steps.none.output.v, 0) + default(steps.plan.output.v, 2)", json!(2)),
        ("size(default(steps.plan.output.todo, []))", json!(2)),
        ("[{'a': 1}].map(x, default(x.a, 0) + default(x.b.c, 5))", json!([6])),
        ("has(steps.none) ? 1 : default(steps.plan.output.v, 2)", json!(2)),
        ("default(steps.plan.output.todo[0].title, 'none')", json!("none")),
        ("has(inputs.absent)", json!(false)),
        ("join(['a','b'], '-') + upper('c')", json!("a-bC")),
        ("sum([1,2,3]) + max([4,9])", json!(15)),
        ("sort(unique([3,1,3]))", json!([1, 3])),
        ("glob('src/main.rs', 'src/*.rs')", json!(true)),
        ("slice([1,2,3], 1, 9)", json!([2, 3])),
        ("from_json(to_json({'a': [1]})).a[0]", json!(1)),
    ] {
        assert_eq!(eval(source), Ok(expected), "{source}");
    }
}

#[test]
fn a_default_refers_to_its_path_and_to_what_has_its_last_field() {
    let variables = |source: &str| check(&Expr(source.into())).expect("an expression").variables;
    let path = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        variables("default(steps.a.output.v, inputs.x)"),
        [path("inputs.x"), path("steps.a.output"), path("steps.a.output.v")]
    );
    assert_eq!(
        variables("has(steps.b) ? 1 : default(steps.a.output, 0)"),
        [path("steps"), path("steps.a"), path("steps.a.output")]
    );
    // As many as a source can hold.
    let many = vec!["default(steps.a.output.v,0)"; 36].join("+");
    assert!(check(&Expr(many)).is_ok());
    let long = format!("default({}, 0)", vec!["a"; 300].join("."));
    assert_eq!(variables(&long).len(), 2, "of a path that is too long only the last field may be absent");
}

#[test]
fn failures_have_codes() {
    for (source, code) in [
        ("inputs.absent", "expr.missing"),
        ("nowhere.x", "expr.missing"),
        ("inputs.max / 0", "expr.overflow"),
        ("inputs.name + 1", "expr.type"),
        ("1 +", "expr.syntax"),
    ] {
        assert_eq!(eval(source), Err(code.into()), "{source}");
    }
}

#[test]
fn hostile_expressions_are_refused_and_do_not_abort() {
    let deep = format!("{}1{}", "(".repeat(200), ")".repeat(200));
    let chain = vec!["1"; 400].join("+");
    let loops = "[1].all(a, [1].all(b, [1].all(c, true)))".to_owned();
    let motif = "\u{0}[{(".repeat(31);
    for source in [deep, chain, loops, motif, "!".repeat(500) + "true", "x".repeat(2000)] {
        assert!(check(&Expr(source.clone())).is_err(), "{}", &source[..20.min(source.len())]);
    }
}

#[test]
fn values_and_lists_have_a_budget() {
    let scope = json!({"inputs": {
        "big": "x".repeat(600_000),
        "texts": vec!["y".repeat(2_000); 1_000],
        "long": vec![1; 1_001],
        "list": vec![1; 1_000],
    }});
    let scope = scope.as_object().expect("object");
    let code = |source: &str| evaluate(&Expr(source.into()), scope).map_err(|f| f.code).expect_err(source);
    let started = std::time::Instant::now();
    for (source, expected) in [
        ("inputs.big + inputs.big", "limit.size"),
        ("inputs.list.map(i, inputs.big)", "limit.size"),
        ("join(inputs.texts, '')", "expr.cost"),
        ("to_json(inputs.texts)", "expr.cost"),
        ("inputs.list.map(i, upper(inputs.big))", "expr.cost"),
        ("inputs.long.all(i, i == 1)", "expr.cost"),
        ("split(inputs.big, 'x').all(i, i == '')", "expr.cost"),
        ("(inputs.list + inputs.list).all(a, (inputs.list + inputs.list).all(b, a == b))", "expr.cost"),
    ] {
        assert_eq!(code(source), expected, "{source}");
    }
    for source in
        ["size(inputs.long) == 1001", "inputs.list.all(a, a == 1)", "inputs.texts.map(t, t + '!').size() == 1000"]
    {
        assert_eq!(evaluate(&Expr(source.into()), scope), Ok(json!(true)), "{source}");
    }
    assert!(started.elapsed().as_secs() < 20, "refused before, not after");
}

#[test]
fn references_exclude_loop_variables() {
    let found = check(&Expr("steps.plan.output.todo.filter(t, t.id != inputs.name)[0]".into())).expect("valid");
    assert_eq!(
        found.variables,
        vec![
            vec!["inputs".to_owned(), "name".into()],
            vec!["steps".into(), "plan".into(), "output".into(), "todo".into()],
        ]
    );
}

#[test]
fn syntax_errors_have_a_place() {
    let error = check(&Expr("inputs.a ==\n  == 2".into())).expect_err("invalid");
    assert_eq!(error.line, 2, "{error:?}");
}
