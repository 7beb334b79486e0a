//! Which statements a router can serve, where tables are distributed by `shard` as on Citus: [`listen`] to what is sent while runs do
//! everything, then [`judge`] it by its plans. There is no Citus here; that it takes them as they are is not claimed.

use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write},
    sync::Mutex,
};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

/// By `shard`, as in `deploy/citus.sql`, which a test compares.
pub const DISTRIBUTED: &[&str] = &[
    "admissions",
    "archived_runs",
    "attempt_progress",
    "blobs",
    "checkpoints",
    "former_definitions",
    "history",
    "inbox",
    "outbox",
    "ready",
    "runs",
];

/// On every node, as there. All other tables are on the coordinator.
pub const REFERENCE: &[&str] = &["archives", "definition_pointers", "definitions"];

// --- listening ---

static HEARD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Hears what sqlx sends.
struct Ear;

#[derive(Default)]
struct Statement(String);

impl Visit for Statement {
    fn record_str(&mut self, field: &Field, value: &str) {
        // `summary` is the whole of a short one.
        if (field.name() == "db.statement" && !value.is_empty()) || (field.name() == "summary" && self.0.is_empty()) {
            self.0 = value.trim().to_owned();
        }
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "db.statement" || field.name() == "summary" {
            let mut text = String::new();
            write!(text, "{value:?}").expect("text");
            self.record_str(field, &text);
        }
    }
}

impl Subscriber for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query"
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut statement = Statement::default();
        event.record(&mut statement);
        HEARD.lock().expect("lock").insert(statement.0);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Listens from now on, in this whole process.
///
/// # Panics
/// If somebody else does. And the pool that is to be heard must log its statements: the ordinary pool of tests does not.
pub fn listen() {
    tracing::subscriber::set_global_default(Ear).expect("the only one");
}

/// What was heard that reads or changes tables.
pub fn heard() -> Vec<String> {
    let all = HEARD.lock().expect("lock").clone();
    let verbs = ["select", "with", "insert", "update", "delete"];
    all.into_iter().filter(|sql| verbs.iter().any(|verb| sql.to_lowercase().starts_with(verb))).collect()
}

// --- reading plans ---

/// A plan's reads of distributed tables: by alias, the table; what is compared with what; and the shards of new rows.
#[derive(Default, Debug)]
struct Plan {
    scans: BTreeMap<String, String>,
    conditions: Vec<String>,
    inserted: Vec<String>,
    /// Any distributed table, also one that is only written; and what is on the coordinator alone.
    is_distributed: bool,
    beside: BTreeSet<String>,
}

impl Plan {
    fn read(&mut self, node: &Value) {
        if let Some(table) = node["Relation Name"].as_str() {
            if is_distributed(table) {
                self.is_distributed = true;
            } else if !REFERENCE.contains(&table) {
                self.beside.insert(table.to_owned());
            }
        }
        if let (Some(table), Some(alias)) = (node["Relation Name"].as_str(), node["Alias"].as_str())
            && node["Node Type"] != "ModifyTable"
            && is_distributed(table)
        {
            self.scans.insert(alias.to_owned(), table.to_owned());
        }
        if node["Operation"] == "Insert" && node["Relation Name"].as_str().is_some_and(is_distributed) {
            // The rows, and not what a `with` did before. `shard` is the first column, but in `outbox`.
            let column = if node["Relation Name"] == "outbox" { 2 } else { 0 };
            let rows = node["Plans"].as_array().into_iter().flatten().find(|n| n["Parent Relationship"] == "Outer");
            self.inserted.extend(rows.and_then(|rows| rows["Output"][column].as_str()).map(bare));
        }
        for key in ["Index Cond", "Recheck Cond", "Filter", "Join Filter", "Hash Cond", "Merge Cond", "One-Time Filter"]
        {
            self.conditions.extend(node[key].as_str().map(str::to_owned));
        }
        for child in node["Plans"].as_array().into_iter().flatten() {
            self.read(child);
        }
    }

    /// Aliases of distributed tables that no shard is named for. `one`: only a shard that is one value counts, not a column of
    /// what the statement brings along; and it is the same for all of them.
    fn unbound(&self, one: bool) -> Vec<String> {
        let pairs: Vec<(String, String)> = self.conditions.iter().flat_map(|c| equalities(c)).collect();
        let shard = |side: &str| side.strip_suffix(".shard").filter(|a| self.scans.contains_key(*a)).map(str::to_owned);
        let mut bound = BTreeSet::new();
        let mut values: BTreeSet<&str> =
            self.inserted.iter().map(String::as_str).filter(|shard| is_value(shard)).collect();
        let mut links = Vec::new();
        for (left, right) in &pairs {
            let (alias, value) = match (shard(left), shard(right)) {
                (Some(a), Some(b)) => {
                    links.push((a, b));
                    continue;
                }
                (Some(alias), None) => (alias, right),
                (None, Some(alias)) => (alias, left),
                (None, None) => continue,
            };
            // A parameter, a constant, a column of what is no table: an array of keys, a row that was changed before.
            if !one || is_value(value) {
                bound.insert(alias);
                values.extend(is_value(value).then_some(value.as_str()));
            }
        }
        loop {
            let before = bound.len();
            for (a, b) in &links {
                if bound.contains(a) || bound.contains(b) {
                    bound.extend([a.clone(), b.clone()]);
                }
            }
            if bound.len() == before {
                break;
            }
        }
        let unbound = self.scans.iter().filter(|(alias, _)| !bound.contains(*alias));
        let several = (one && values.len() > 1).then(|| format!("several shards: {values:?}"));
        let beside = (one && self.is_distributed && !self.beside.is_empty())
            .then(|| format!("beside what is on the coordinator: {:?}", self.beside));
        unbound.map(|(alias, table)| format!("{table} as {alias}")).chain(several).chain(beside).collect()
    }
}

/// A partition stands for its table.
fn is_distributed(table: &str) -> bool {
    DISTRIBUTED.contains(&table) || table.starts_with("history_")
}

/// A parameter or a constant.
fn is_value(side: &str) -> bool {
    side.starts_with(['$', '\'']) || side.parse::<i16>().is_ok()
}

/// One side, or a column that is written, without casts and brackets.
fn bare(side: &str) -> String {
    side.split("::").next().unwrap_or_default().trim_matches(|c| c == '(' || c == ')').to_owned()
}

/// `(a.shard = b.shard)`, `($1 = r.shard)`, with casts and brackets: both sides, bare. Of what is more than that, nothing.
fn equalities(condition: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (at, _) in condition.match_indices(" = ") {
        // To the left, the last word that no cast ends; to the right, the first.
        let left = condition[..at].rsplit([' ']).next().unwrap_or_default();
        let right = condition[at + 3..].split([' ']).next().unwrap_or_default();
        found.push((bare(left), bare(right)));
    }
    found
}

/// Reads of distributed tables in a statement that no shard is named for; with `one`, no single one, and tables of the coordinator in the
/// same statement.
///
/// # Errors
/// Postgres has no plan for it.
pub async fn unbound(pool: &PgPool, sql: &str, one: bool) -> Result<Vec<String>, sqlx::Error> {
    let mut conn = pool.acquire().await?.detach();
    // Joins by keys, as on large tables; and one plan for whatever is bound.
    for set in [
        "plan_cache_mode = force_generic_plan",
        "enable_seqscan = off",
        "enable_hashjoin = off",
        "enable_mergejoin = off",
    ] {
        sqlx::raw_sql(AssertSqlSafe(format!("set {set}"))).execute(&mut conn).await?;
    }
    sqlx::raw_sql(AssertSqlSafe(format!("prepare asked as {sql}"))).execute(&mut conn).await?;
    let parameters: i32 =
        sqlx::query_scalar("select cardinality(parameter_types) from pg_prepared_statements where name = 'asked'")
            .fetch_one(&mut conn)
            .await?;
    let nulls = vec!["null"; usize::try_from(parameters).expect("few")].join(", ");
    let call = if nulls.is_empty() { "asked".to_owned() } else { format!("asked({nulls})") };
    let Value::Array(plans) = sqlx::query_scalar::<_, Value>(AssertSqlSafe(format!(
        "explain (format json, verbose, costs off) execute {call}"
    )))
    .persistent(false)
    .fetch_one(&mut conn)
    .await?
    else {
        panic!("no plan of {sql}");
    };
    let mut plan = Plan::default();
    plan.read(&plans[0]["Plan"]);
    Ok(plan.unbound(one))
}

/// What became of statements that were heard.
#[derive(Debug, Default)]
pub struct Judged {
    /// A router can serve them: they name one shard, or no distributed table.
    pub routed: Vec<String>,
    /// The excuses that were needed.
    pub excused: BTreeSet<&'static str>,
    /// What nothing excuses.
    pub problems: Vec<String>,
}

/// Judges statements by their plans. `one`: as where runs are spread, each has to name a single shard and no table that lies elsewhere.
/// `excuses`: what stands in statements that are let off, and why; one that none of them needs is a problem as well.
pub async fn judge(pool: &PgPool, statements: &[String], one: bool, excuses: &[(&'static str, &str)]) -> Judged {
    let mut judged = Judged::default();
    for sql in statements {
        let found = match unbound(pool, sql, one).await {
            Ok(found) => found,
            Err(error) => {
                judged.problems.push(format!("no plan: {error}\n{sql}"));
                continue;
            }
        };
        if found.is_empty() {
            judged.routed.push(sql.clone());
            continue;
        }
        // A batch takes places of groups away as well: no reason for it to go everywhere, but where a termination sends it.
        let batch = sql.contains("insert into history");
        match excuses.iter().find(|(what, _)| sql.contains(what) && !(batch && *what == "from admissions")) {
            Some((what, _)) => drop(judged.excused.insert(*what)),
            None => judged.problems.push(format!("{found:?}\n{sql}")),
        }
    }
    let needless = excuses.iter().map(|(what, _)| *what).filter(|what| !judged.excused.contains(what));
    judged.problems.extend(needless.map(|what| format!("nothing needs the excuse of `{what}`")));
    judged
}

/// Tables are full, so that plans are those of a full database. Needs a definition.
pub async fn fill(pool: &PgPool) {
    for sql in [
        "insert into runs (shard, run_id, workflow, definition, status, inputs, parked)
           select n % 128, gen_random_uuid(), 'w', (select hash from definitions limit 1), 'pending', '{}', true from generate_series(1, 20000) n",
        "insert into history (shard, run_id, seq, epoch, format, events) select shard, run_id, n, 1, 1, '[]' from runs, generate_series(1, 3) n on conflict do nothing",
        "insert into inbox (shard, run_id, n, kind) select shard, run_id, 1000, 'unblock' from runs",
        "insert into checkpoints (shard, run_id, path, key, value) select shard, run_id, 'p', 'k', '1' from runs",
        "insert into ready (shard, run_id, queue) select shard, run_id, 'other' from runs on conflict do nothing",
        "analyze",
    ] {
        sqlx::query(sql).execute(pool).await.expect("filled");
    }
}
