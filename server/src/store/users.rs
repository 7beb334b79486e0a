//! From a verified token to a user row.

use super::{Error, Store};
use loopwright_activities::billing::ledger::{self, Identity};
use loopwright_engine::transaction;
use uuid::Uuid;

/// A user as the edges need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub id: Uuid,
    pub blocked: bool,
}

impl Store {
    /// The user of (issuer, subject), created on first sight with the welcome grant.
    ///
    /// `own_issuer` is the issuer of this installation: its subjects may be ids of our users, so that a token can be
    /// minted for somebody who came by another way, such as the bot.
    ///
    /// # Transaction
    /// A read; for a new user one transaction with the grant, idempotent by (issuer, subject).
    pub async fn user_of(&self, issuer: &str, subject: &str, own_issuer: &str) -> Result<User, Error> {
        let id = (issuer == own_issuer).then(|| Uuid::parse_str(subject).ok()).flatten();
        let known: Option<(Uuid, String)> = sqlx::query_as(
            "select id, status from users where id = $1 or (auth_issuer = $2 and auth_subject = $3)
             order by id = $1 desc nulls last limit 1",
        )
        .bind(id)
        .bind(issuer)
        .bind(subject)
        .fetch_optional(&self.pool)
        .await?;
        if let Some((id, status)) = known {
            return Ok(User { id, blocked: status != "active" });
        }
        self.create_user(issuer, subject).await
    }

    async fn create_user(&self, issuer: &str, subject: &str) -> Result<User, Error> {
        let identity = Identity::Token { issuer: issuer.to_owned(), subject: subject.to_owned() };
        let mut tx = transaction::begin(&self.pool).await?;
        let (id, _) = ledger::ensure_user(&mut tx, &identity, self.welcome).await?;
        tx.commit().await?;
        Ok(User { id, blocked: false })
    }
}
