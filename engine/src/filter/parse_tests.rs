//! What is read, and what is said about what is not.

use super::*;
use proptest::prelude::*;

fn read(text: &str) -> Condition {
    parse(text, &[]).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn eq(field: &str, value: &str) -> Condition {
    Condition::Compare(Field::Attribute(field.into()), Compare::Equal, Value::Text(value.into()))
}

#[test]
fn and_binds_closer_than_or_and_not_closest() {
    let wanted =
        Condition::Any(vec![eq("a", "1"), Condition::All(vec![Condition::Not(Box::new(eq("b", "2"))), eq("c", "3")])]);
    for text in [
        "attributes.a = '1' or not attributes.b = '2' and attributes.c = '3'",
        "attributes.a='1'OR(attributes.b!='2'AND attributes.c='3')",
        "attributes.\"a\" = '1' or ((attributes.b <> '2') and (((attributes.c = '3'))))\n",
    ] {
        assert_eq!(read(text), wanted, "{text}");
    }
}

#[test]
fn every_field_takes_values_of_its_type() {
    let id = "0193a1b2-0000-7000-8000-000000000001";
    for (text, value) in [
        (format!("run_id = '{id}'"), Value::Id(id.parse().expect("id"))),
        ("workflow = 'it''s'".into(), Value::Text("it's".into())),
        ("status = 'running'".into(), Value::Status(RunStatus::Running)),
        ("started_at = '2026-11-25'".into(), Value::Instant("2026-11-25T00:00:00Z".parse().expect("instant"))),
        ("closed_at = '2026-11-25 10:30'".into(), Value::Instant("2026-11-25T10:30:00Z".parse().expect("instant"))),
        (
            "started_at = '2026-11-25T10:30:00+02:00'".into(),
            Value::Instant("2026-11-25T08:30:00Z".parse().expect("instant")),
        ),
        ("attributes.n = -1.5".into(), Value::Number("-1.5".into())),
        ("attributes.b = TRUE".into(), Value::Bool(true)),
        ("attributes.\"a.b c\" = ''".into(), Value::Text(String::new())),
    ] {
        let Condition::Compare(_, Compare::Equal, found) = read(&text) else { panic!("{text}") };
        assert_eq!(found, value, "{text}");
    }
    assert_eq!(read("waiting is not null"), Condition::Not(Box::new(Condition::Empty(Field::Waiting))));
    assert_eq!(read("queue like 'a_b%'"), Condition::StartsWith(Field::Queue, "a_b".into()));
    let list = vec![Value::Text("a".into()), Value::Text("b".into())];
    assert_eq!(read("workflow_id not in ('a','b')"), Condition::Not(Box::new(Condition::In(Field::WorkflowId, list))));
}

#[test]
fn an_instant_is_what_iso_8601_calls_one() {
    for (written, meant) in [
        ("2026-11-25", "2026-11-25T00:00:00Z"),
        ("2026-11-25T10:30", "2026-11-25T10:30:00Z"),
        ("2026-11-25 10:30:15", "2026-11-25T10:30:15Z"),
        ("2026-11-25T10:30:15.250", "2026-11-25T10:30:15.25Z"),
        ("2026-11-25T10:30Z", "2026-11-25T10:30:00Z"),
        ("2026-11-25 10:30:15z", "2026-11-25T10:30:15Z"),
        ("2026-11-25T10:30:15+02:00", "2026-11-25T08:30:15Z"),
        ("2026-11-25 10:30:15+02:00", "2026-11-25T08:30:15Z"),
        ("2026-11-25T10:30+0200", "2026-11-25T08:30:00Z"),
        ("2026-11-25 10:30 +02:00", "2026-11-25T08:30:00Z"),
        ("2026-11-25T10:30:15.5-05", "2026-11-25T15:30:15.5Z"),
    ] {
        assert_eq!(instant(written), Some(meant.parse().expect("instant")), "{written}");
    }
    for wrong in
        ["2026-13-25", "2026-11-25T25:00", "2026-11-25T10:30 Europe/Berlin", "10:30", "2026-11-25Z", "", "now() -- "]
    {
        assert_eq!(instant(wrong), None, "{wrong}");
    }
}

#[test]
fn words_of_the_caller_stand_for_attributes_and_their_texts_for_others() {
    let words = [("project", "project_id")];
    let query = |text: &str| super::super::Query::parse_with(text, &words).unwrap_or_else(|e| panic!("{text}: {e}"));
    let typed = query("status = 'running' and (Project = 'Greeter' or not project in ('x', 'y', 3))");
    assert_eq!(
        typed,
        query(
            "status = 'running' and (attributes.project_id = 'Greeter' or attributes.project_id not in ('x', 'y', 3))"
        )
    );
    assert_eq!(typed.texts_of("project_id"), ["Greeter", "x", "y"]);
    assert_eq!(typed.texts_of("user_id"), Vec::<&str>::new());
    let ids = |name: &str| match name {
        "Greeter" => Some(vec!["1".to_owned(), "2".to_owned()]),
        "y" => Some(vec!["4".to_owned()]),
        _ => None,
    };
    assert_eq!(
        typed.replacing("project_id", &ids),
        query("status = 'running' and (project in ('1', '2') or project not in ('x', '4', 3))")
    );
    let error = parse("projekt = 'x'", &words).expect_err("no such field");
    assert!(error.help.contains("`project`"), "{error}");
    assert!(parse("", &words).expect_err("empty").help.contains("waiting, project"));
}

#[test]
fn what_is_wrong_is_said_with_its_column_and_what_to_write() {
    let long = format!("status in ({})", vec!["'running'"; 101].join(","));
    let many = vec!["queue = 'a'"; 51].join(" or ");
    let deep = format!("{}queue = 'a'{}", "(".repeat(30), ")".repeat(30));
    let nots = format!("{}queue = 'a'", "not ".repeat(30));
    for (text, column, message, help) in [
        ("", 1, "expected a field", "workflow"),
        ("   ", 1, "expected a field", "workflow"),
        ("project = 'x'", 1, "no field `project`", "attributes.project"),
        ("statu = 'x'", 1, "no field `statu`", "`status`"),
        ("and status = 'x'", 1, "no field `and`", "missing before"),
        ("status", 7, "expected a comparison, found the end", "is null"),
        ("status ~ 'x'", 8, "`~` cannot be read", "single quotes"),
        ("status == 'running'", 9, "`==`", "write `=`"),
        ("status = running", 10, "expected a value, found `running`", "'running'"),
        ("status = \"running\"", 10, "expected a value", "'running'"),
        ("status = 'runing'", 10, "no status `'runing'`", "'running'"),
        ("status = 'xyz'", 10, "no status", "pending, running"),
        ("status < 'running'", 8, "no order", "in"),
        ("status = 'running' workflow = 'a'", 20, "something follows", "`and`"),
        ("status = 'running')", 19, "never opened", "away"),
        ("(status = 'running'", 1, "never closed", "`)`"),
        ("(status = 'running' queue = 'x')", 21, "expected `)`", "`and`"),
        ("workflow = 'abc", 12, "`'` cannot be read", "ends with `'`"),
        ("workflow = 3", 12, "expected a text, found `3`", "quotes"),
        ("attributes = 'x'", 12, "which attribute", "attributes.project_id"),
        ("attributes. = 'x'", 13, "which attribute", "double quotes"),
        ("attributes.a.b = 'x'", 13, "flat", "quoted"),
        ("attributes.a = null", 16, "null", "is null"),
        ("attributes.a is 3", 17, "expected `null`", "is null"),
        ("attributes.a > true", 14, "no order", "in"),
        ("attributes.a in 'x'", 17, "expected `(`", "in ('a', 'b')"),
        ("attributes.a in ()", 18, "expected a value", "'text'"),
        ("attributes.a in ('x'", 21, "expected `,` or `)`", "in ('a', 'b')"),
        ("workflow like 'a'", 15, "no `%`", "`=`"),
        ("workflow like '%a%'", 15, "only beginnings", "at the end"),
        ("workflow like 3", 15, "expected a text", "like 'abc%'"),
        ("started_at like '2026%'", 12, "no beginnings", "in"),
        ("started_at > 'yesterday'", 14, "not an instant", "2026-11-25"),
        ("started_at > '+99999-01-01'", 14, "not an instant", "2026-11-25"),
        ("run_id = '17'", 10, "not the id of a run", "36"),
        ("ä = 'x'", 1, "`ä` cannot be read", "quotes"),
        ("attributes.ä = 'x'", 12, "`ä` cannot be read", "quotes"),
        ("workflow = 'ä' & status = 'x'", 16, "`&`", "`and`"),
        ("workflow = 'a'; drop table runs", 15, "`;`", "statements"),
        ("workflow = 'a\0'", 14, "NUL", "leave it out"),
        (&long, 1012, "more than 100 values", "twice"),
        (&many, 751, "more than 50 comparisons", "`in`"),
        (&deep, 25, "more than 24 levels", "flatter"),
        (&nots, 97, "more than 24 levels", "flatter"),
        (&"x".repeat(5000), 0, "5000 bytes", "4096"),
    ] {
        let error = parse(text, &[]).expect_err(text);
        assert!(error.message.contains(message) && error.help.contains(help), "{text}: {error}");
        assert_eq!(error.column, column, "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_with_a_place_in_it(text in "( |and|or|not|in|like|is|null|status|attributes|[.]|a|'[a%]{0,3}'|'|\"|[(),=<>!;ä0-9-]){0,30}") {
        if let Err(error) = parse(&text, &[]) {
            prop_assert!((1..=text.chars().count() + 1).contains(&error.column), "{:?}: {}", text, error);
            prop_assert!(!error.help.is_empty());
        }
    }
}

#[test]
fn a_number_is_the_same_however_many_zeros_stand_before_it() {
    for (written, meant) in [("007", "7"), ("-007.50", "-7.50"), ("000", "0"), ("00.5", "0.5")] {
        let parsed = |number: &str| read(&format!("attributes.n = {number}"));
        assert_eq!(parsed(written), parsed(meant));
    }
}
