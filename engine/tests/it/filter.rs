//! The filter language on a real Postgres, against an oracle in Rust that shares no code with it.

use crate::bench::{Bench, definition, work};
use chrono::{DateTime, Duration, Utc};
use fastrand::Rng;
use loopwright_engine::{
    Error,
    client::{Filter, Start},
    filter::Query,
    ids::RunId,
    view::RunStatus,
};
use serde_json::{Value, json};
use sqlx::Row as _;
use std::collections::BTreeSet;
use uuid::Uuid;

#[derive(Clone, Debug, PartialEq)]
enum Cell {
    Empty,
    Text(String),
    Number(f64),
    Bool(bool),
    Instant(DateTime<Utc>),
    Id(Uuid),
    Other,
}

/// What the oracle knows of a run: cells by the names of the language.
struct Run {
    id: Uuid,
    cells: Vec<(&'static str, Cell)>,
    attributes: Value,
}

impl Run {
    fn cell(&self, field: &str) -> Cell {
        let Some(name) = field.strip_prefix("attributes.") else {
            return self.cells.iter().find(|(f, _)| *f == field).expect("field").1.clone();
        };
        match self.attributes.get(name.trim_matches('"')) {
            None | Some(Value::Null) => Cell::Empty,
            Some(Value::String(text)) => Cell::Text(text.clone()),
            Some(Value::Bool(b)) => Cell::Bool(*b),
            Some(Value::Number(n)) => Cell::Number(n.as_f64().expect("small")),
            Some(_) => Cell::Other,
        }
    }
}

#[derive(Debug)]
enum Wish {
    All(Vec<Wish>),
    Any(Vec<Wish>),
    Not(Box<Wish>),
    Compare(String, &'static str, Cell),
    In(String, bool, Vec<Cell>),
    Like(String, bool, String),
    Null(String, bool),
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn literal(cell: &Cell) -> String {
    match cell {
        Cell::Text(text) => quoted(text),
        Cell::Number(n) => n.to_string(),
        Cell::Bool(b) => b.to_string(),
        Cell::Instant(at) => quoted(&at.to_rfc3339()),
        Cell::Id(id) => quoted(&id.to_string()),
        Cell::Empty | Cell::Other => panic!("no literal"),
    }
}

impl Wish {
    fn text(&self) -> String {
        let joined =
            |parts: &[Self], by: &str| parts.iter().map(|p| format!("({})", p.text())).collect::<Vec<_>>().join(by);
        let not = |not: &bool| if *not { "not " } else { "" };
        match self {
            Self::All(parts) => joined(parts, " and "),
            Self::Any(parts) => joined(parts, " OR "),
            Self::Not(part) => format!("not ({})", part.text()),
            Self::Compare(field, op, value) => format!("{field} {op} {}", literal(value)),
            Self::In(field, n, values) => {
                format!("{field} {}in ({})", not(n), values.iter().map(literal).collect::<Vec<_>>().join(", "))
            }
            Self::Like(field, n, beginning) => format!("{field} {}like {}", not(n), quoted(&format!("{beginning}%"))),
            Self::Null(field, n) => format!("{field} is {}null", not(n)),
        }
    }

    fn holds(&self, run: &Run) -> bool {
        match self {
            Self::All(parts) => parts.iter().all(|p| p.holds(run)),
            Self::Any(parts) => parts.iter().any(|p| p.holds(run)),
            Self::Not(part) => !part.holds(run),
            Self::Compare(field, op, value) => {
                let order = match (&run.cell(field), value) {
                    (Cell::Text(a), Cell::Text(b)) => Some(a.as_bytes().cmp(b.as_bytes())),
                    (Cell::Number(a), Cell::Number(b)) => a.partial_cmp(b),
                    (Cell::Bool(a), Cell::Bool(b)) => Some(a.cmp(b)),
                    (Cell::Instant(a), Cell::Instant(b)) => Some(a.cmp(b)),
                    (Cell::Id(a), Cell::Id(b)) => Some(a.as_bytes().cmp(b.as_bytes())),
                    _ => None,
                };
                match *op {
                    "=" => order.is_some_and(|o| o.is_eq()),
                    "!=" => !order.is_some_and(|o| o.is_eq()),
                    "<" => order.is_some_and(|o| o.is_lt()),
                    "<=" => order.is_some_and(|o| o.is_le()),
                    ">" => order.is_some_and(|o| o.is_gt()),
                    _ => order.is_some_and(|o| o.is_ge()),
                }
            }
            Self::In(field, not, values) => values.contains(&run.cell(field)) != *not,
            Self::Like(field, not, beginning) => {
                matches!(run.cell(field), Cell::Text(text) if text.starts_with(beginning)) != *not
            }
            Self::Null(field, not) => (run.cell(field) == Cell::Empty) != *not,
        }
    }
}

const TEXTS: [&str; 12] = ["a", "b", "ab", "A", "Z", "ä", "a_b", "it's", "1", "'; drop table runs; --", "\\", "100%"];
const FIELDS: [&str; 12] = [
    "run_id",
    "workflow",
    "workflow_id",
    "status",
    "queue",
    "started_at",
    "closed_at",
    "waiting",
    "attributes.p",
    "attributes.q",
    "attributes.\"x y'z\"",
    "attributes.none",
];

fn pick<T: Clone>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())].clone()
}

fn attribute(rng: &mut Rng) -> Value {
    match rng.u8(..8) {
        0 => Value::Null,
        1 => json!(rng.i32(-3..4)),
        2 => json!(f64::from(rng.i32(-3..4)) / 2.0),
        3 => json!(rng.bool()),
        4 => json!([pick(rng, &TEXTS)]),
        5 => json!({"a": pick(rng, &TEXTS)}),
        _ => json!(pick(rng, &TEXTS)),
    }
}

fn wish(rng: &mut Rng, runs: &[Run], depth: u8) -> Wish {
    if depth > 0 && rng.bool() {
        let parts = |rng: &mut Rng| (0..rng.usize(1..4)).map(|_| wish(rng, runs, depth - 1)).collect();
        return match rng.u8(..3) {
            0 => Wish::All(parts(rng)),
            1 => Wish::Any(parts(rng)),
            _ => Wish::Not(Box::new(wish(rng, runs, depth - 1))),
        };
    }
    let field = pick(rng, &FIELDS);
    let ordered = !matches!(field, "status");
    // Mostly values that occur.
    let value = |rng: &mut Rng| match (field, runs[rng.usize(..runs.len())].cell(field)) {
        (_, Cell::Empty | Cell::Other) | ("workflow" | "queue", _) => match field {
            "closed_at" => Cell::Instant(
                runs[0]
                    .cells
                    .iter()
                    .find_map(|(_, c)| if let Cell::Instant(t) = c { Some(*t) } else { None })
                    .expect("time"),
            ),
            f if f.starts_with("attributes") && rng.bool() => Cell::Number(f64::from(rng.i32(-6..7)) / 2.0),
            _ => Cell::Text(pick(rng, &TEXTS).to_owned()),
        },
        (_, cell) => cell,
    };
    let texts = ["workflow", "workflow_id", "queue", "waiting"].contains(&field) || field.starts_with("attributes");
    match rng.u8(..6) {
        0 => Wish::Null(field.into(), rng.bool()),
        1 => Wish::In(field.into(), rng.bool(), (0..rng.usize(1..4)).map(|_| value(rng)).collect()),
        2 if texts => Wish::Like(field.into(), rng.bool(), pick(rng, &["a", "", "it'", "ä", "\\", "100"]).into()),
        _ => {
            let value = value(rng);
            let all = ["=", "!=", "<", "<=", ">", ">="];
            let ops = if ordered && !matches!(value, Cell::Bool(_)) { &all[..] } else { &all[..2] };
            Wish::Compare(field.into(), pick(rng, ops), value)
        }
    }
}

/// Runs of every kind: started by the door, then moved by hand to where no test would bring them all.
async fn runs(bench: &Bench, rng: &mut Rng, n: usize) -> Vec<Run> {
    let mut definitions = Vec::new();
    for name in ["a", "ab", "a_b", "Z"] {
        definitions.push(bench.deploy(definition(name, vec![work("a", &[])])).await);
    }
    for i in 0..n {
        let mut attributes = json!({ "n": i });
        for name in ["p", "q", "x y'z"] {
            if rng.u8(..5) > 0 {
                attributes[name] = attribute(rng);
            }
        }
        let key = rng.bool().then(|| format!("{}{i}", pick(rng, &TEXTS)));
        let queue = pick(rng, &["", "a", "it's"]).to_owned();
        let definition = pick(rng, &definitions);
        let start = Start {
            run_id: None,
            definition,
            inputs: json!({}),
            workflow_id: key,
            attributes,
            queue,
            topic: None,
            admission: Default::default(),
        };
        let run = bench.client.start(start).await.expect("start").run_id;
        let status = pick(rng, &RunStatus::ALL);
        sqlx::query(
            "update runs set status = $2, waiting = $3, started_at = started_at - make_interval(hours => $4),
               closed_at = case when $5 then started_at + interval '1 hour' end where run_id = $1",
        )
        .bind(run.0)
        .bind(status.as_str())
        .bind((!status.is_closed()).then(|| pick(rng, &["timer", "signal", "a"])))
        .bind(rng.i32(0..100))
        .bind(status.is_closed())
        .execute(&bench.pool)
        .await
        .expect("moved");
    }
    let rows = sqlx::query("select * from runs").fetch_all(&bench.pool).await.expect("rows");
    rows.into_iter()
        .map(|row| {
            let text = |name: &str| row.get::<Option<String>, _>(name).map_or(Cell::Empty, Cell::Text);
            let time = |name: &str| row.get::<Option<DateTime<Utc>>, _>(name).map_or(Cell::Empty, Cell::Instant);
            let mut cells: Vec<(&'static str, Cell)> =
                ["workflow", "workflow_id", "status", "queue", "waiting"].map(|name| (name, text(name))).into();
            cells.extend(["started_at", "closed_at"].map(|name| (name, time(name))));
            cells.push(("run_id", Cell::Id(row.get("run_id"))));
            Run { id: row.get("run_id"), cells, attributes: row.get("attributes") }
        })
        .collect()
}

async fn found(bench: &Bench, text: &str) -> BTreeSet<Uuid> {
    let query = Query::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    let filter = Filter { matching: Some(query), limit: 200, ..Filter::default() };
    let list = bench.client.list(filter.clone()).await.unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(bench.client.count(&filter).await.expect("count"), list.len() as u64, "{text}");
    list.into_iter().map(|r| r.run_id.0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_finds_what_an_oracle_in_rust_finds() {
    let seed = std::env::var("LOOPWRIGHT_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("LOOPWRIGHT_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let bench = Bench::new().await;
    let runs = runs(&bench, &mut rng, 60).await;
    let (mut some, mut tried) = (0, 0);
    while tried < 400 {
        let wish = wish(&mut rng, &runs, 3);
        let text = wish.text();
        // Beyond the limits: the parser's tests have those.
        let Ok(_) = Query::parse(&text) else {
            assert!(
                text.matches(['=', '<', '>']).count() > 40 || text.len() > 2000,
                "{text}: {:?}",
                Query::parse(&text)
            );
            continue;
        };
        tried += 1;
        let wanted: BTreeSet<Uuid> = runs.iter().filter(|run| wish.holds(run)).map(|run| run.id).collect();
        assert_eq!(found(&bench, &text).await, wanted, "seed {seed}: {text}");
        some += usize::from(!wanted.is_empty() && wanted.len() < runs.len());
    }
    assert!(some > tried / 4, "{some} of {tried} tell runs apart");
}

#[tokio::test(flavor = "multi_thread")]
async fn attacks_are_texts_or_errors() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("w", vec![work("a", &[])])).await;
    let run = bench.start_as(hash, json!({}), None).await.run_id;
    for text in [
        "workflow = ''' or ''1''=''1'",
        "workflow = '''; drop table runs; --'",
        "attributes.\"a' or '1'='1\" = 'x'",
        "attributes.\"a\"\"b\" = 'x'",
        "attributes.a = '\"}'' or true --'",
        "queue in (''') or true --', '$1', '%s', '{}')",
        "workflow like ''' or true --%'",
        "workflow_id = '\\'' or 1=1 --'' or queue = 'x'",
    ] {
        match Query::parse(text) {
            Ok(_) => assert_eq!(found(&bench, text).await, BTreeSet::new(), "{text}"),
            Err(error) => assert!(error.column > 0, "{text}: {error}"),
        }
    }
    for text in [
        "workflow = 'w' or 1=1",
        "1=1",
        "workflow = 'w'; delete from runs",
        "workflow = 'w' union select * from runs",
        "workflow = 'w' -- comment",
        "workflow = 'w' /* comment */",
        "pg_sleep(10) = 'x'",
        "workflow = (select 'w')",
        "workflow = $1",
        "workflow::text = 'w'",
        "workflow = E'w'",
        "workflow || 'x' = 'wx'",
        "attributes->>'a' = 'x'",
        "runs.workflow = 'w'",
        "owner is null",
        "workflow = 'w\0'",
    ] {
        let error = Query::parse(text).expect_err(text);
        assert!(error.column > 0 && !error.help.is_empty(), "{text}: {error}");
    }
    assert_eq!(found(&bench, "workflow = 'w' and attributes.user_id = 'u1'").await, BTreeSet::from([run.0]));
    let error = Error::from(Query::parse("x").expect_err("bad"));
    assert_eq!(error.code(), "filter_invalid");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_goes_with_the_other_wishes_and_pages() {
    let bench = Bench::new().await;
    let hash = bench.deploy(definition("w", vec![work("a", &[])])).await;
    let mut started = Vec::new();
    for n in 0..7 {
        let start = Start {
            run_id: None,
            definition: hash,
            inputs: json!({}),
            workflow_id: None,
            attributes: json!({"n": n, "user_id": if n % 2 == 0 { "even" } else { "odd" }}),
            queue: String::new(),
            topic: None,
            admission: Default::default(),
        };
        started.push(bench.client.start(start).await.expect("start").run_id);
    }
    bench.client.terminate(started[6], "the test").await.expect("terminate");
    let filter = |after: Option<RunId>| Filter {
        attributes: Some(json!({"user_id": "even"})),
        workflow: Some("w".into()),
        open_only: true,
        after,
        matching: Some("attributes.n > 0 and status in ('pending', 'running')".parse().expect("filter")),
        limit: 1,
    };
    let first = bench.client.list(filter(None)).await.expect("list");
    let second = bench.client.list(filter(Some(first[0].run_id))).await.expect("list");
    let third = bench.client.list(filter(Some(second[0].run_id))).await.expect("list");
    assert_eq!((first[0].run_id, second[0].run_id, third.len()), (started[4], started[2], 0));
    assert_eq!(bench.client.count(&filter(Some(started[0]))).await.expect("count"), 2, "pages do not matter");
    let hour = Utc::now() - Duration::hours(1);
    assert_eq!(found(&bench, &format!("started_at < '{}'", hour.to_rfc3339())).await, BTreeSet::new());
    assert_eq!(found(&bench, &format!("started_at >= '{}'", hour.to_rfc3339())).await.len(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attribute_that_is_asked_for_by_equality_is_found_by_its_index() {
    let bench = Bench::new().await;
    let plan: Vec<String> = {
        let mut conn = bench.pool.acquire().await.expect("conn");
        sqlx::query("set enable_seqscan = off").execute(&mut *conn).await.expect("set");
        sqlx::query_scalar("explain select count(*) from runs where true and (attributes @> $1)")
            .bind(json!({"project_id": "p"}))
            .fetch_all(&mut *conn)
            .await
            .expect("plan")
    };
    assert!(plan.iter().any(|line| line.contains("runs_attributes")), "{plan:#?}");
}
