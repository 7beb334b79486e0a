//! The engine's filter language in this program's words: `project` and `user` are attributes of its runs.

use super::{Error, Store};
use loopwright_engine::filter::{FilterError, Query};
use std::collections::HashMap;
use uuid::Uuid;

/// The attribute that says whose project a run is for.
const PROJECT: &str = "project_id";
/// Words of ours, and the attributes that they stand for.
const WORDS: [(&str, &str); 2] = [("project", PROJECT), ("user", "user_id")];
/// Most projects that one filter's names lead to. Chosen: names are a user's own and not unique over all of them.
const NAMED_MAX: i64 = 1_000;

/// Reads a filter such as `status = 'running' and project = 'Greeter' and started_at > '2026-11-25'`.
///
/// # Errors
/// What is wrong, at which column, and what to write instead.
pub fn parse(text: &str) -> Result<Query, FilterError> {
    Query::parse_with(text, &WORDS)
}

impl Store {
    /// The filter with ids where it names projects by their names, those of `owner` or of everybody. A name that nobody gave
    /// matches nothing.
    pub async fn with_projects(&self, owner: Option<Uuid>, query: Query) -> Result<Query, Error> {
        let names: Vec<String> = query
            .texts_of(PROJECT)
            .into_iter()
            .filter(|text| Uuid::parse_str(text).is_err())
            .map(str::to_owned)
            .collect();
        if names.is_empty() {
            return Ok(query);
        }
        let rows: Vec<(String, Uuid)> = sqlx::query_as(
            "select name, id from projects where name = any($1) and ($2::uuid is null or user_id = $2) limit $3",
        )
        .bind(&names)
        .bind(owner)
        .bind(NAMED_MAX)
        .fetch_all(&self.pool)
        .await?;
        let mut ids: HashMap<String, Vec<String>> = HashMap::new();
        for (name, id) in rows {
            ids.entry(name).or_default().push(id.to_string());
        }
        Ok(query.replacing(PROJECT, &|name| ids.get(name).cloned()))
    }
}
