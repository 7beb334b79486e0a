//! Table `definitions` and its pointers.

use crate::{
    Error, Result,
    definition::{Bundle, Concurrency, Definition, Kind},
    ids::DefinitionHash,
    request::{Deploy, Deployed, Version},
};
use serde_json::Value;
use sqlx::{PgConnection, Row, types::Json};
use std::{collections::BTreeMap, sync::Arc};

/// A definition with its bundle, as runs are pinned to it.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) definition: Definition,
    pub(crate) bundle: Arc<Bundle>,
    pub(crate) budget: Arc<Value>,
    pub(crate) extras: Arc<Value>,
    /// Whether there are `call`s in it.
    pub(crate) calls: bool,
    /// Whether its runs may continue as new under what is `current` then.
    pub(crate) follows: bool,
}

/// # Transaction
/// Must be inside one.
pub(crate) async fn deploy(conn: &mut PgConnection, deploy: &Deploy) -> Result<Deployed> {
    let hash = deploy.definition.hash(&deploy.bundle);
    let name = deploy.definition.name.clone();
    let ir = serde_json::to_value(&deploy.definition).map_err(|e| Error::DefinitionInvalid(e.to_string()))?;
    // Version numbers of one name are given one after the other.
    sqlx::query("select pg_advisory_xact_lock(hashtext($1))").bind(&name).execute(&mut *conn).await?;
    let known: Option<i32> = sqlx::query_scalar("select version from definitions where hash = $1")
        .bind(&hash.0[..])
        .fetch_optional(&mut *conn)
        .await?;
    let (version, created) = match known {
        Some(version) => (version, false),
        None => {
            let version: i32 = sqlx::query_scalar(
                "insert into definitions (hash, name, version, format, source, bundle, ir, author, message)
                 select $1, $2, coalesce(max(version), 0) + 1, $3, $4, $5, $6, $7, $8 from definitions where name = $2
                 returning version",
            )
            .bind(&hash.0[..])
            .bind(&name)
            .bind(i32::try_from(deploy.definition.format).unwrap_or(i32::MAX))
            .bind(&deploy.source)
            .bind(Json(&deploy.bundle))
            .bind(&ir)
            .bind(&deploy.author)
            .bind(&deploy.message)
            .fetch_one(&mut *conn)
            .await?;
            (version, true)
        }
    };
    sqlx::query(
        "insert into definition_pointers (name, pointer, hash) values ($1, 'current', $2)
         on conflict (name, pointer) do update set hash = excluded.hash, moved_at = engine_now()
         where definition_pointers.hash <> excluded.hash",
    )
    .bind(&name)
    .bind(&hash.0[..])
    .execute(&mut *conn)
    .await?;
    Ok(Deployed { hash, version: u32::try_from(version).unwrap_or(0), created })
}

/// # Errors
/// `definition_not_found`; `newer_release`; `definition_invalid` if what is stored is none, the bundle included.
pub(crate) async fn load(conn: &mut PgConnection, hash: DefinitionHash) -> Result<Pinned> {
    let row = sqlx::query("select ir, bundle from definitions where hash = $1")
        .bind(&hash.0[..])
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| Error::DefinitionNotFound(hash.to_string()))?;
    let ir: Value = row.try_get("ir")?;
    // Before it is read: a newer release's may not be readable at all.
    if let Some(format) = ir["format"].as_u64().filter(|format| *format > u64::from(super::known().definition)) {
        return Err(Error::NewerRelease(format!("definition {hash} (format {format})")));
    }
    let unreadable = |what: &str, why: String| Error::DefinitionInvalid(format!("stored {what} {hash}: {why}"));
    let definition: Definition = serde_json::from_value(ir).map_err(|e| unreadable("definition", e.to_string()))?;
    let bundle = row.try_get::<Json<Bundle>, _>("bundle");
    let Json(bundle) = bundle.map_err(|e| unreadable("bundle of definition", e.to_string()))?;
    let (mut calls, mut follows) = (false, false);
    definition.walk(&mut |step| {
        calls |= matches!(step.kind, Kind::Call { .. });
        follows |= matches!(step.kind, Kind::ContinueAsNew { current: true, .. });
    });
    let (budget, extras) = (Arc::new(definition.budget.clone()), Arc::new(definition.extras.clone()));
    Ok(Pinned { definition, bundle: Arc::new(bundle), budget, extras, calls, follows })
}

pub(crate) async fn pointer(conn: &mut PgConnection, name: &str, pointer: &str) -> Result<DefinitionHash> {
    let bytes: Option<Vec<u8>> =
        sqlx::query_scalar("select hash from definition_pointers where name = $1 and pointer = $2")
            .bind(name)
            .bind(pointer)
            .fetch_optional(conn)
            .await?;
    bytes.and_then(hash_of).ok_or_else(|| Error::DefinitionNotFound(format!("{name}@{pointer}")))
}

/// The definition that has this number among those of its name.
pub(crate) async fn version(conn: &mut PgConnection, name: &str, version: i32) -> Result<DefinitionHash> {
    let bytes: Option<Vec<u8>> = sqlx::query_scalar("select hash from definitions where name = $1 and version = $2")
        .bind(name)
        .bind(version)
        .fetch_optional(conn)
        .await?;
    bytes.and_then(hash_of).ok_or_else(|| Error::DefinitionNotFound(format!("{name}@{version}")))
}

/// Fewest digits by which a hash is looked for. Chosen: fewer are mostly a slip.
const DIGITS_MIN: usize = 4;
/// Most definitions that are named to choose from. Chosen.
const CANDIDATES_MAX: usize = 10;

/// The definition whose hash begins with these hex digits, `sha256:` before them or not. `None` if they are none, or none begins so.
///
/// # Errors
/// `definition_ambiguous` if several do.
pub(crate) async fn beginning(conn: &mut PgConnection, text: &str) -> Result<Option<DefinitionHash>> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    if !(DIGITS_MIN..=64).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let end =
        |fill: char| format!("{digits}{}", fill.to_string().repeat(64 - digits.len())).parse::<DefinitionHash>().ok();
    let (Some(DefinitionHash(first)), Some(DefinitionHash(last))) = (end('0'), end('f')) else { return Ok(None) };
    let rows =
        sqlx::query("select hash, name, version from definitions where hash between $1 and $2 order by hash limit $3")
            .bind(&first[..])
            .bind(&last[..])
            .bind(i64::try_from(CANDIDATES_MAX + 1).unwrap_or(i64::MAX))
            .fetch_all(conn)
            .await?;
    let mut found = Vec::with_capacity(rows.len());
    for row in &rows {
        let hash = hash_of(row.try_get("hash")?).ok_or_else(|| Error::Invariant("a definition's hash".into()))?;
        found.push((hash, row.try_get::<String, _>("name")?, row.try_get::<i32, _>("version")?));
    }
    if let [(hash, ..)] = found[..] {
        return Ok(Some(hash));
    }
    if found.is_empty() {
        return Ok(None);
    }
    let mut candidates: Vec<String> =
        found.iter().take(CANDIDATES_MAX).map(|(hash, name, version)| format!("{hash} ({name}@{version})")).collect();
    if found.len() > CANDIDATES_MAX {
        candidates.push("others".into());
    }
    Err(Error::DefinitionAmbiguous { digits, candidates })
}

pub(crate) async fn versions(conn: &mut PgConnection, name: &str) -> Result<Vec<Version>> {
    let rows = sqlx::query(
        "select d.name, d.version, d.hash, d.author, d.message, d.created_at, p.hash is not null as current
         from definitions d left join definition_pointers p on p.name = d.name and p.pointer = 'current' and p.hash = d.hash
         where d.name = $1 order by d.version desc limit 1000",
    )
    .bind(name)
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Version {
                name: row.try_get("name")?,
                version: u32::try_from(row.try_get::<i32, _>("version")?).unwrap_or(0),
                hash: hash_of(row.try_get("hash")?).ok_or_else(|| Error::Invariant("a definition's hash".into()))?,
                author: row.try_get("author")?,
                message: row.try_get("message")?,
                created_at: row.try_get("created_at")?,
                current: row.try_get("current")?,
            })
        })
        .collect()
}

/// Where the `call`s of a definition lead, as of now. A call without a deployed workflow is absent.
pub(crate) async fn resolve_calls(
    conn: &mut PgConnection,
    definition: &Definition,
) -> Result<BTreeMap<String, DefinitionHash>> {
    use crate::definition::CallVersion as V;
    let mut calls = Vec::new();
    definition.walk(&mut |step| {
        if let Kind::Call { workflow, version, .. } = &step.kind {
            calls.push((workflow.clone(), version.clone()));
        }
    });
    let mut found = BTreeMap::new();
    for (workflow, version) in calls {
        let bytes: Option<Vec<u8>> = match &version {
            V::Latest => {
                sqlx::query_scalar("select hash from definition_pointers where name = $1 and pointer = 'current'")
                    .bind(&workflow)
                    .fetch_optional(&mut *conn)
                    .await?
            }
            V::Number(n) => {
                sqlx::query_scalar("select hash from definitions where name = $1 and version = $2")
                    .bind(&workflow)
                    .bind(i32::try_from(*n).unwrap_or(i32::MAX))
                    .fetch_optional(&mut *conn)
                    .await?
            }
            V::Hash(h) => {
                sqlx::query_scalar("select hash from definitions where name = $1 and hash = $2")
                    .bind(&workflow)
                    .bind(&h.0[..])
                    .fetch_optional(&mut *conn)
                    .await?
            }
        };
        if let Some(hash) = bytes.and_then(hash_of) {
            found.insert(crate::machine::call_key(&workflow, &version), hash);
        }
    }
    Ok(found)
}

/// A stored hash; `None` if it does not have 32 bytes.
pub(crate) fn hash_of(bytes: Vec<u8>) -> Option<DefinitionHash> {
    bytes.try_into().ok().map(DefinitionHash)
}

/// What a definition says of how many of its runs may be under way.
pub(crate) async fn concurrency(conn: &mut PgConnection, hash: DefinitionHash) -> Result<Option<Concurrency>> {
    Ok(terms(conn, hash).await?.concurrency)
}

/// On what terms the runs of a definition come into the queue.
#[derive(Debug, Default)]
pub(crate) struct Terms {
    pub(crate) concurrency: Option<Concurrency>,
    pub(crate) runs_on: Vec<String>,
    /// With the labels by which its runs are found.
    pub(crate) extras: Value,
}

/// None, if there is no such definition.
///
/// # Errors
/// `newer_release`.
pub(crate) async fn terms(conn: &mut PgConnection, hash: DefinitionHash) -> Result<Terms> {
    let found = sqlx::query(
        "select format, coalesce(ir->'concurrency', 'null') as concurrency, ir->'runs_on' as runs_on,
                jsonb_build_object('labels', ir #> '{extras,labels}') as extras
         from definitions where hash = $1 and (ir ? 'concurrency' or ir ? 'runs_on' or ir #> '{extras,labels}' is not null)",
    )
    .bind(&hash.0[..])
    .fetch_optional(conn)
    .await?;
    let Some(row) = found else { return Ok(Terms::default()) };
    // Before they are read: a newer release's may not be readable at all.
    let format: i32 = row.try_get("format")?;
    if i64::from(format) > i64::from(super::known().definition) {
        return Err(Error::NewerRelease(format!("definition {hash} (format {format})")));
    }
    let Json(concurrency) = row.try_get("concurrency")?;
    let labels: Option<Json<Vec<String>>> = row.try_get("runs_on")?;
    let runs_on = labels.map(|Json(labels)| labels).unwrap_or_default();
    Ok(Terms { concurrency, runs_on, extras: row.try_get("extras")? })
}
