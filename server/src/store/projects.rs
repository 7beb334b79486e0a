//! Projects as their owner sees them.

use super::{Error, Page, Store};
use chrono::{DateTime, Utc};
use loopwright_activities::billing::MicroCredits;
use loopwright_engine::{admission::Admission, client::Start, ids::DefinitionHash, transaction};
use serde::Serialize;
use sqlx::PgExecutor;
use uuid::Uuid;

/// Business key of a project's loop: at most one open run has it.
#[must_use]
pub fn workflow_id(project: Uuid) -> String {
    format!("project:{project}")
}

/// A project.
#[derive(Clone, Debug, Serialize)]
pub struct Project {
    pub id: Uuid,
    pub name: String,
    pub idea: String,
    pub status: String,
    pub workflow_name: String,
    pub created_at: DateTime<Utc>,
}

impl Project {
    /// The request to start its loop, whoever asks for it.
    #[must_use]
    pub fn start(&self, user: Uuid, definition: DefinitionHash) -> Start {
        Start {
            run_id: None,
            definition,
            inputs: serde_json::json!({"project_id": self.id.to_string(), "idea": self.idea}),
            workflow_id: Some(workflow_id(self.id)),
            attributes: serde_json::json!({"user_id": user.to_string(), "project_id": self.id.to_string()}),
            queue: String::new(),
            topic: None,
            // Its owner's turn.
            admission: Admission { fairness_key: Some(user.to_string()), ..Admission::default() },
        }
    }
}

/// Creates a project of the user, in the caller's transaction or in one of its own.
pub async fn create(
    executor: impl PgExecutor<'_>,
    user: Uuid,
    name: &str,
    idea: &str,
    workflow: &str,
) -> Result<Project, Error> {
    let row: ProjectRow = sqlx::query_as(
        "insert into projects (id, user_id, name, idea, workflow_name) values ($1, $2, $3, $4, $5)
         returning id, name, idea, status, workflow_name, created_at",
    )
    .bind(Uuid::now_v7())
    .bind(user)
    .bind(name)
    .bind(idea)
    .bind(workflow)
    .fetch_one(executor)
    .await?;
    Ok(row.into())
}

/// A file of a project at its newest version.
#[derive(Clone, Debug, Serialize)]
pub struct ProjectFile {
    pub path: String,
    pub version: i32,
    pub size_bytes: i64,
    /// Of the content, as hex.
    pub sha256: String,
    pub created_at: DateTime<Utc>,
}

type ProjectRow = (Uuid, String, String, String, String, DateTime<Utc>);

impl From<ProjectRow> for Project {
    fn from((id, name, idea, status, workflow_name, created_at): ProjectRow) -> Self {
        Self { id, name, idea, status, workflow_name, created_at }
    }
}

type FileRow = (String, i32, i64, String, DateTime<Utc>);

impl From<FileRow> for ProjectFile {
    fn from((path, version, size_bytes, sha256, created_at): FileRow) -> Self {
        Self { path, version, size_bytes, sha256, created_at }
    }
}

impl Store {
    /// Creates a project of the user.
    ///
    /// # Transaction
    /// One statement.
    pub async fn create_project(&self, user: Uuid, name: &str, idea: &str, workflow: &str) -> Result<Project, Error> {
        create(&self.pool, user, name, idea, workflow).await
    }

    /// Creates a project of the user under a given id, unless it is there.
    ///
    /// # Transaction
    /// One statement.
    pub async fn create_project_as(
        &self,
        id: Uuid,
        user: Uuid,
        name: &str,
        idea: &str,
        workflow: &str,
    ) -> Result<(), Error> {
        sqlx::query(
            "insert into projects (id, user_id, name, idea, workflow_name) values ($1, $2, $3, $4, $5) on conflict (id) do nothing",
        )
        .bind(id)
        .bind(user)
        .bind(name)
        .bind(idea)
        .bind(workflow)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// A project of the user, or of anybody; `None` when it is not there or somebody else's.
    pub async fn project(&self, user: impl Into<Option<Uuid>>, id: Uuid) -> Result<Option<Project>, Error> {
        let row: Option<ProjectRow> = sqlx::query_as(
            "select id, name, idea, status, workflow_name, created_at from projects where id = $1
             and ($2::uuid is null or user_id = $2)",
        )
        .bind(id)
        .bind(user.into())
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(Project::from))
    }

    /// Whether one of these ids is a project that is not the user's.
    pub async fn are_somebody_elses(&self, user: Uuid, ids: &[Uuid]) -> Result<bool, Error> {
        Ok(sqlx::query_scalar("select exists (select from projects where id = any($1) and user_id <> $2)")
            .bind(ids)
            .bind(user)
            .fetch_one(&self.pool)
            .await?)
    }

    /// Projects of the user, or of everybody, newest first, beginning after the one with id `after`.
    pub async fn projects(
        &self,
        user: impl Into<Option<Uuid>>,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<Page<Project>, Error> {
        // By (created_at, id): ids of other writers need not be in the order of time.
        let rows: Vec<ProjectRow> = sqlx::query_as(
            "select id, name, idea, status, workflow_name, created_at from projects
             where ($1::uuid is null or user_id = $1) and ($2::uuid is null or (created_at, id) <
               (select created_at, id from projects where id = $2))
             order by created_at desc, id desc limit $3",
        )
        .bind(user.into())
        .bind(after)
        .bind(i64::from(limit) + 1)
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::of(rows.into_iter().map(Project::from).collect(), limit, |p| p.id.to_string()))
    }

    /// Files of the user's project at their newest versions, by path, beginning after `after`.
    pub async fn project_files(
        &self,
        user: Uuid,
        project: Uuid,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<ProjectFile>, Error> {
        let rows: Vec<FileRow> = sqlx::query_as(
            "select path, version, size_bytes, encode(sha256, 'hex') as sha256, created_at from (
               select distinct on (f.path) f.* from project_files f join projects p on p.id = f.project_id
               where f.project_id = $1 and p.user_id = $2 and ($3::text is null or f.path > $3)
               order by f.path, f.version desc) newest
             where not deleted order by path limit $4",
        )
        .bind(project)
        .bind(user)
        .bind(after)
        .bind(i64::from(limit) + 1)
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::of(rows.into_iter().map(ProjectFile::from).collect(), limit, |f| f.path.clone()))
    }

    /// Newest content of one file of the user's project.
    pub async fn project_file(&self, user: Uuid, project: Uuid, path: &str) -> Result<Option<Vec<u8>>, Error> {
        let row: Option<(Option<Vec<u8>>, bool)> = sqlx::query_as(
            "select f.content, f.deleted from project_files f join projects p on p.id = f.project_id
             where f.project_id = $1 and p.user_id = $2 and f.path = $3 order by f.version desc limit 1",
        )
        .bind(project)
        .bind(user)
        .bind(path)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.and_then(|(content, deleted)| if deleted { None } else { content }))
    }

    /// Bounds what all runs of a project may have captured and held together, or lifts the bound, and wakes what waits in it. False if
    /// there is no such project.
    ///
    /// # Transaction
    /// One. Locks the project's runs; a hold that is being placed sees the cap of before or this one.
    pub async fn cap_project(
        &self,
        client: &loopwright_engine::client::Client,
        project: Uuid,
        cap: Option<MicroCredits>,
    ) -> Result<bool, loopwright_engine::Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        client.unblock_in(&mut tx, &serde_json::json!({ "project_id": project.to_string() })).await?;
        let set = sqlx::query("update projects set budget_cap_ucr = $2 where id = $1")
            .bind(project)
            .bind(cap.map(|cap| cap.0))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        client.wake().await;
        Ok(set.rows_affected() > 0)
    }

    /// Wakes what waits in this project for something outside, such as credits.
    ///
    /// # Transaction
    /// One, around the engine's.
    pub async fn wake(
        &self,
        client: &loopwright_engine::client::Client,
        project: Uuid,
    ) -> Result<u64, loopwright_engine::Error> {
        let mut tx = transaction::begin(&self.pool).await?;
        let woken = client.unblock_in(&mut tx, &serde_json::json!({ "project_id": project.to_string() })).await?;
        tx.commit().await?;
        client.wake().await;
        Ok(woken)
    }
}
