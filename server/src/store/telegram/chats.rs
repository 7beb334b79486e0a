//! Chats, the runs they follow, what runs asked, buttons.

use super::{Error, Store, Tx};
use crate::store::users::User;
use loopwright_engine::ids::RunId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

/// The outbox topic of the engine that wakes the notifier.
pub const TOPIC: &str = "telegram";

/// What a chat is about.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// The project that commands mean.
    pub project: Option<Uuid>,
    /// The next text is what to change there.
    pub asks: Option<Place>,
}

/// A place of a run that waits for its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub run_id: RunId,
    pub path: String,
    /// Step id of the approval.
    pub step: String,
}

/// A run that a chat follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Followed {
    pub run: RunId,
    pub chat_id: i64,
    pub user: Uuid,
    pub project: Uuid,
    /// Its end was told.
    pub closed: bool,
}

/// A button that somebody pressed.
#[derive(Clone, Debug)]
pub struct Button {
    pub run: Option<RunId>,
    pub path: Option<String>,
    pub action: Value,
}

type FollowedRow = (Uuid, i64, Uuid, Uuid, bool);

fn followed((run, chat_id, user, project, closed): FollowedRow) -> Followed {
    Followed { run: RunId(run), chat_id, user, project, closed }
}

/// The chat, created at first sight. Whoever writes has not blocked the bot.
pub async fn chat(tx: &mut Tx, chat_id: i64) -> Result<Chat, Error> {
    let (project, asks): (Option<Uuid>, Option<Value>) = sqlx::query_as(
        "insert into telegram_chats (chat_id) values ($1)
         on conflict (chat_id) do update set blocked_at = null returning project_id, asks",
    )
    .bind(chat_id)
    .fetch_one(&mut **tx)
    .await?;
    Ok(Chat { project, asks: asks.and_then(|asks| serde_json::from_value(asks).ok()) })
}

/// Chooses what commands of the chat mean.
pub async fn set_project(tx: &mut Tx, chat_id: i64, project: Uuid) -> Result<(), Error> {
    sqlx::query("update telegram_chats set project_id = $2 where chat_id = $1")
        .bind(chat_id)
        .bind(project)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Notes whether the next text is what to change in a plan.
pub async fn set_asks(tx: &mut Tx, chat_id: i64, place: Option<&Place>) -> Result<(), Error> {
    sqlx::query("update telegram_chats set asks = $2 where chat_id = $1")
        .bind(chat_id)
        .bind(place.and_then(|place| serde_json::to_value(place).ok()))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The user of a Telegram id. Takes no lock.
pub async fn user(tx: &mut Tx, telegram_user_id: i64) -> Result<Option<User>, Error> {
    let row: Option<(Uuid, String)> = sqlx::query_as("select id, status from users where telegram_user_id = $1")
        .bind(telegram_user_id)
        .fetch_optional(&mut **tx)
        .await?;
    Ok(row.map(|(id, status)| User { id, blocked: status != "active" }))
}

/// Lets the chat follow a run.
pub async fn follow(tx: &mut Tx, followed: &Followed) -> Result<(), Error> {
    sqlx::query(
        "insert into telegram_runs (run_id, chat_id, user_id, project_id) values ($1, $2, $3, $4) on conflict do nothing",
    )
    .bind(followed.run.0)
    .bind(followed.chat_id)
    .bind(followed.user)
    .bind(followed.project)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Open runs of the chat, those of its project first, then the newest; at most ten.
pub async fn open_runs(tx: &mut Tx, chat_id: i64) -> Result<Vec<Followed>, Error> {
    let rows: Vec<FollowedRow> = sqlx::query_as(
        "select r.run_id, r.chat_id, r.user_id, r.project_id, false from telegram_runs r
           join telegram_chats c on c.chat_id = r.chat_id
         where r.chat_id = $1 and r.closed_at is null
         order by r.project_id is not distinct from c.project_id desc, r.created_at desc limit 10",
    )
    .bind(chat_id)
    .fetch_all(&mut **tx)
    .await?;
    Ok(rows.into_iter().map(followed).collect())
}

/// The newest run of a project that the chat follows.
pub async fn newest_run(tx: &mut Tx, chat_id: i64, project: Uuid) -> Result<Option<Followed>, Error> {
    let row: Option<FollowedRow> = sqlx::query_as(
        "select run_id, chat_id, user_id, project_id, closed_at is not null from telegram_runs
         where chat_id = $1 and project_id = $2 order by created_at desc limit 1",
    )
    .bind(chat_id)
    .bind(project)
    .fetch_optional(&mut **tx)
    .await?;
    Ok(row.map(followed))
}

/// Those of these runs that a chat follows.
pub async fn followed_among(tx: &mut Tx, runs: impl IntoIterator<Item = RunId>) -> Result<Vec<Followed>, Error> {
    let runs: Vec<Uuid> = runs.into_iter().map(|run| run.0).collect();
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<FollowedRow> = sqlx::query_as(
        "select run_id, chat_id, user_id, project_id, closed_at is not null from telegram_runs where run_id = any($1) order by run_id",
    )
    .bind(runs)
    .fetch_all(&mut **tx)
    .await?;
    Ok(rows.into_iter().map(followed).collect())
}

/// Open runs that nobody looked at for `age_s`, because progress within an attempt moves no run.
pub async fn unseen(tx: &mut Tx, age_s: f64, limit: i64) -> Result<Vec<Followed>, Error> {
    let rows: Vec<FollowedRow> = sqlx::query_as(
        "select run_id, chat_id, user_id, project_id, false from telegram_runs
         where closed_at is null and looked_at < engine_now() - make_interval(secs => $1)
         order by looked_at limit $2 for update skip locked",
    )
    .bind(age_s)
    .bind(limit)
    .fetch_all(&mut **tx)
    .await?;
    Ok(rows.into_iter().map(followed).collect())
}

/// Notes that a run was looked at, and whether that was its end.
pub async fn looked(tx: &mut Tx, run: RunId, closed: bool) -> Result<(), Error> {
    sqlx::query(
        "update telegram_runs set looked_at = engine_now(),
           closed_at = case when $2 then coalesce(closed_at, engine_now()) end where run_id = $1",
    )
    .bind(run.0)
    .bind(closed)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Whether the place has not been asked about yet; from now on it has.
pub async fn ask(tx: &mut Tx, run: RunId, path: &str) -> Result<bool, Error> {
    let done = sqlx::query("insert into telegram_asks (run_id, path) values ($1, $2) on conflict do nothing")
        .bind(run.0)
        .bind(path)
        .execute(&mut **tx)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Takes the one answer of a place. False if it was given before.
pub async fn answer(tx: &mut Tx, run: RunId, path: &str) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into telegram_asks as a (run_id, path, answered_at) values ($1, $2, engine_now())
         on conflict (run_id, path) do update set answered_at = engine_now() where a.answered_at is null",
    )
    .bind(run.0)
    .bind(path)
    .execute(&mut **tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Whether the place was answered.
pub async fn is_answered(tx: &mut Tx, run: RunId, path: &str) -> Result<bool, Error> {
    let sql = "select exists (select from telegram_asks where run_id = $1 and path = $2 and answered_at is not null)";
    Ok(sqlx::query_scalar(sql).bind(run.0).bind(path).fetch_one(&mut **tx).await?)
}

/// Makes a button of the chat. `ask` is the place whose one answer it gives. Returns the callback data, 32 bytes.
pub async fn button(tx: &mut Tx, chat_id: i64, ask: Option<(RunId, &str)>, action: &Value) -> Result<String, Error> {
    let token = Uuid::new_v4().simple().to_string();
    sqlx::query("insert into telegram_buttons (token, chat_id, run_id, path, action) values ($1, $2, $3, $4, $5)")
        .bind(&token)
        .bind(chat_id)
        .bind(ask.map(|(run, _)| run.0))
        .bind(ask.map(|(_, path)| path))
        .bind(action)
        .execute(&mut **tx)
        .await?;
    Ok(token)
}

/// How often a project was offered to go on at a step.
pub async fn offers_to_go_on(tx: &mut Tx, project: Uuid, path: &str) -> Result<i64, Error> {
    Ok(sqlx::query_scalar(
        "select count(*) from telegram_buttons b join telegram_runs r on r.run_id = b.run_id
         where r.project_id = $1 and b.path = $2 and b.action->>'do' = 'go_on'",
    )
    .bind(project)
    .bind(path)
    .fetch_one(&mut **tx)
    .await?)
}

/// The button with this callback data, if it belongs to this chat. Locked: of two presses at once one is first.
pub async fn pressed(tx: &mut Tx, chat_id: i64, token: &str) -> Result<Option<Button>, Error> {
    type Row = (Option<Uuid>, Option<String>, Value);
    let row: Option<Row> = sqlx::query_as(
        "select run_id, path, action from telegram_buttons where token = $1 and chat_id = $2 for update",
    )
    .bind(token)
    .bind(chat_id)
    .fetch_optional(&mut **tx)
    .await?;
    Ok(row.map(|(run, path, action)| Button { run: run.map(RunId), path, action }))
}

/// Takes a button that works once.
pub async fn take_button(tx: &mut Tx, token: &str) -> Result<(), Error> {
    sqlx::query("delete from telegram_buttons where token = $1").bind(token).execute(&mut **tx).await?;
    Ok(())
}

impl Store {
    /// Micro-credits that a project's runs in chats have taken so far, those included that failed and went on as others: what their ended
    /// attempts cost.
    pub async fn spent(&self, project: Uuid) -> Result<i64, Error> {
        let runs: Vec<Uuid> = sqlx::query_scalar("select run_id from telegram_runs where project_id = $1")
            .bind(project)
            .fetch_all(&self.pool)
            .await?;
        Ok(sqlx::query_scalar(
            "select coalesce(-sum(t.amount_ucr), 0)::bigint from activity_attempts a
               join credit_transactions t on t.attempt_id = a.id and t.kind = 'capture' where a.run_id = any($1)",
        )
        .bind(runs)
        .fetch_one(&self.pool)
        .await?)
    }
}
