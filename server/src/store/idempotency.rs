//! Answers kept under the key that their caller chose, so that a repeated request gets the first answer again.

use super::{Error, Store};
use loopwright_engine::ids::RunId;
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// A request that is answered nowhere after this long, in seconds, belonged to a process that died. Above the longest `Prefer: wait`.
pub const ABANDONED_S: u32 = 900;
/// How long answers are kept. Source: what payment providers promise.
const KEPT_S: i32 = 86_400;
/// Old rows removed per new one.
const SWEEP: i64 = 20;

/// What is known under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nobody has used it, or nobody has answered: do the work, then [`Store::answer`], [`Store::release`] or
    /// [`Store::forget`].
    Fresh(Ticket),
    /// The first answer.
    Answered { status: u16, location: Option<String>, body: String },
    /// The first request is still being worked on.
    InProgress,
    /// It was used for another request.
    Mismatch,
}

/// The right to answer under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    user: Uuid,
    key: String,
    /// Rises with every claim: an abandoned request that comes back late does not overwrite the newer answer.
    turn: i32,
    run: RunId,
}

impl Ticket {
    /// The run of this request: the id to start it under, the same at every turn.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.run
    }
}

impl Store {
    /// Claims `key` of the user for the request that `request` stands for (route and body). One that is not answered
    /// `abandoned_s` seconds after it was claimed may be claimed again.
    ///
    /// # Transaction
    /// One statement; of two at once one is `Fresh`, the other `InProgress`.
    pub async fn claim(&self, user: Uuid, key: &str, request: &str, abandoned_s: u32) -> Result<Claim, Error> {
        let hash: Vec<u8> = Sha256::digest(request.as_bytes()).to_vec();
        sqlx::query(
            "delete from idempotency_keys where ctid in (select ctid from idempotency_keys
             where created_at < engine_now() - make_interval(secs => $1) limit $2 for update skip locked)",
        )
        .bind(f64::from(KEPT_S))
        .bind(SWEEP)
        .execute(&self.pool)
        .await?;
        let claimed: Option<(i32, Uuid)> = sqlx::query_as(
            "insert into idempotency_keys as k (user_id, key, request_sha256, run_id) values ($1, $2, $3, $5)
             on conflict (user_id, key) do update set turn = k.turn + 1, claimed_at = engine_now()
               where k.status is null and k.request_sha256 = excluded.request_sha256
                 and k.claimed_at < engine_now() - make_interval(secs => $4)
             returning turn, run_id",
        )
        .bind(user)
        .bind(key)
        .bind(&hash)
        .bind(f64::from(abandoned_s))
        .bind(RunId::new().0)
        .fetch_optional(&self.pool)
        .await?;
        if let Some((turn, run)) = claimed {
            return Ok(Claim::Fresh(Ticket { user, key: key.to_owned(), turn, run: RunId(run) }));
        }
        type Row = (Vec<u8>, Option<i32>, Option<String>, Option<String>);
        let row: Option<Row> = sqlx::query_as(
            "select request_sha256, status, location, body from idempotency_keys where user_id = $1 and key = $2",
        )
        .bind(user)
        .bind(key)
        .fetch_optional(&self.pool)
        .await?;
        Ok(match row {
            // Forgotten between the two statements: the other request failed just now.
            None => Claim::InProgress,
            Some((first, ..)) if first != hash => Claim::Mismatch,
            Some((_, Some(status), location, body)) => Claim::Answered {
                status: u16::try_from(status).unwrap_or(500),
                location,
                body: body.unwrap_or_default(),
            },
            Some(_) => Claim::InProgress,
        })
    }

    /// Keeps the answer.
    pub async fn answer(&self, ticket: &Ticket, status: u16, location: Option<&str>, body: &str) -> Result<(), Error> {
        sqlx::query(
            "update idempotency_keys set status = $4, location = $5, body = $6
             where user_id = $1 and key = $2 and turn = $3 and status is null",
        )
        .bind(ticket.user)
        .bind(&ticket.key)
        .bind(ticket.turn)
        .bind(i32::from(status))
        .bind(location)
        .bind(body)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Keeps the run that the request found open instead of starting its own: later turns mean it too.
    pub async fn keep_run(&self, ticket: &Ticket, run: RunId) -> Result<(), Error> {
        sqlx::query(
            "update idempotency_keys set run_id = $4 where user_id = $1 and key = $2 and turn = $3 and status is null",
        )
        .bind(ticket.user)
        .bind(&ticket.key)
        .bind(ticket.turn)
        .bind(run.0)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Lets the next request with this key go on at once, with the same run: this one failed, perhaps after it had
    /// started something.
    pub async fn release(&self, ticket: &Ticket) -> Result<(), Error> {
        sqlx::query(
            "update idempotency_keys set claimed_at = '-infinity'
             where user_id = $1 and key = $2 and turn = $3 and status is null",
        )
        .bind(ticket.user)
        .bind(&ticket.key)
        .bind(ticket.turn)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Gives the key back: the request was refused or failed and left nothing behind, and another try is another
    /// request.
    pub async fn forget(&self, ticket: &Ticket) -> Result<(), Error> {
        sqlx::query("delete from idempotency_keys where user_id = $1 and key = $2 and turn = $3 and status is null")
            .bind(ticket.user)
            .bind(&ticket.key)
            .bind(ticket.turn)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
