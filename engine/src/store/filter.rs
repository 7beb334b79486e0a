//! A filter as a condition over table `runs`. Every value and every name of an attribute is a bound parameter; what is written
//! into the statement are the texts of this file.

use crate::filter::{Compare, Condition, Field, Query, Value};
use serde_json::json;
use sqlx::{Postgres, QueryBuilder};

/// Appends the condition, in brackets. With a field that is empty it may be null, which does not select a row.
pub(crate) fn push(sql: &mut QueryBuilder<Postgres>, query: &Query) {
    condition(sql, &query.0);
}

fn condition(sql: &mut QueryBuilder<Postgres>, of: &Condition) {
    match of {
        Condition::All(parts) => joined(sql, parts, " and "),
        Condition::Any(parts) => joined(sql, parts, " or "),
        Condition::Not(part) => {
            // Null is false, and the opposite of false is true.
            sql.push("(not coalesce(");
            condition(sql, part);
            sql.push(", false))");
        }
        Condition::Compare(field, compare, value) => self::compare(sql, field, *compare, value),
        Condition::In(field, values) => one_of(sql, field, values),
        Condition::StartsWith(Field::Attribute(name), beginning) => {
            typed(sql, name, "string", |sql| {
                sql.push("starts_with(attributes ->> ").push_bind(name.clone()).push(", ").push_bind(beginning.clone());
                sql.push(")");
            });
        }
        Condition::StartsWith(field, beginning) => {
            sql.push("starts_with(").push(column(field)).push(", ").push_bind(beginning.clone()).push(")");
        }
        Condition::Empty(Field::Attribute(name)) => {
            sql.push("(coalesce(jsonb_typeof(attributes -> ").push_bind(name.clone()).push("), 'null') = 'null')");
        }
        Condition::Empty(field) => {
            sql.push("(").push(column(field)).push(" is null)");
        }
    }
}

fn joined(sql: &mut QueryBuilder<Postgres>, parts: &[Condition], by: &'static str) {
    sql.push("(");
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            sql.push(by);
        }
        condition(sql, part);
    }
    sql.push(")");
}

/// Texts compare by their bytes, whatever the database's collation.
fn column(field: &Field) -> &'static str {
    match field {
        Field::RunId => "run_id",
        Field::Workflow => "workflow collate \"C\"",
        Field::WorkflowId => "workflow_id collate \"C\"",
        Field::Status => "status collate \"C\"",
        Field::Queue => "queue collate \"C\"",
        Field::StartedAt => "started_at",
        Field::ClosedAt => "closed_at",
        Field::Waiting => "waiting collate \"C\"",
        Field::Attribute(_) => "attributes",
    }
}

fn sign(compare: Compare) -> &'static str {
    match compare {
        Compare::Equal => " = ",
        Compare::Less => " < ",
        Compare::LessOrEqual => " <= ",
        Compare::Greater => " > ",
        Compare::GreaterOrEqual => " >= ",
    }
}

fn compare(sql: &mut QueryBuilder<Postgres>, field: &Field, compare: Compare, value: &Value) {
    let Field::Attribute(name) = field else {
        sql.push("(").push(column(field)).push(sign(compare));
        bind(sql, value);
        sql.push(")");
        return;
    };
    match (compare, value) {
        (Compare::Equal, value) => {
            // The index of `attributes` serves this one.
            sql.push("(attributes @> ").push_bind(json!({ name.clone(): json_of(value) })).push(")");
        }
        (_, Value::Number(number)) => typed(sql, name, "number", |sql| {
            sql.push("(attributes ->> ").push_bind(name.clone()).push(")::numeric").push(sign(compare));
            sql.push("(").push_bind(number.clone()).push("::text)::numeric");
        }),
        (_, value) => typed(sql, name, "string", |sql| {
            sql.push("(attributes ->> ").push_bind(name.clone()).push(") collate \"C\"").push(sign(compare));
            bind(sql, value);
        }),
    }
}

/// A condition over an attribute that holds only if it has that type; what stands in it is not computed otherwise.
fn typed(
    sql: &mut QueryBuilder<Postgres>,
    name: &str,
    kind: &'static str,
    inner: impl FnOnce(&mut QueryBuilder<Postgres>),
) {
    sql.push("(case when jsonb_typeof(attributes -> ")
        .push_bind(name.to_owned())
        .push(") = '")
        .push(kind)
        .push("' then ");
    inner(sql);
    sql.push(" else false end)");
}

fn one_of(sql: &mut QueryBuilder<Postgres>, field: &Field, values: &[Value]) {
    sql.push("(").push(column(field));
    if let Field::Attribute(name) = field {
        let any: Vec<_> = values.iter().map(|value| json!({ name.clone(): json_of(value) })).collect();
        sql.push(" @> any(").push_bind(any);
    } else {
        sql.push(" = any(");
        // The values of a field have its type.
        match field {
            Field::RunId => {
                let ids: Vec<_> =
                    values.iter().filter_map(|v| if let Value::Id(id) = v { Some(*id) } else { None }).collect();
                sql.push_bind(ids);
            }
            Field::StartedAt | Field::ClosedAt => {
                let instant = |v: &Value| if let Value::Instant(at) = v { Some(*at) } else { None };
                sql.push_bind(values.iter().filter_map(instant).collect::<Vec<_>>());
            }
            _ => {
                sql.push_bind(values.iter().map(text_of).collect::<Vec<_>>());
            }
        }
    }
    sql.push("))");
}

fn bind(sql: &mut QueryBuilder<Postgres>, value: &Value) {
    match value {
        Value::Id(id) => sql.push_bind(*id),
        Value::Instant(at) => sql.push_bind(*at),
        Value::Text(_) | Value::Number(_) | Value::Bool(_) | Value::Status(_) => sql.push_bind(text_of(value)),
    };
}

fn text_of(value: &Value) -> String {
    match value {
        Value::Text(text) | Value::Number(text) => text.clone(),
        Value::Bool(b) => b.to_string(),
        Value::Id(id) => id.to_string(),
        Value::Instant(at) => at.to_rfc3339(),
        Value::Status(status) => status.as_str().to_owned(),
    }
}

fn json_of(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(b) => json!(b),
        // As written: a number of JSON has as many digits as it needs.
        Value::Number(number) => serde_json::from_str(number).unwrap_or_else(|_| json!(number)),
        other => json!(text_of(other)),
    }
}
