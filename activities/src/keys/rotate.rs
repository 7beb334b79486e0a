//! Rotation: rows move from one key of the ring to another, a few at a time.

use super::{Error, Keys, envelope, rows::SealedRow};
use serde::Serialize;
use uuid::Uuid;

/// Rows that one step of a rotation looks at.
const REWRAP_ROWS: i64 = 100;

/// What one step of a rotation did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rewrapped {
    pub rows: u64,
    /// Rows that do not open under this ring, or changed meanwhile; they stay as they are.
    pub left: u64,
    /// Where the next step begins; `None` when there is none.
    pub after: Option<Uuid>,
}

impl Keys {
    /// One step of a rotation: wraps rows that another key of the ring wraps by the first, or with `anew` seals every
    /// row under a new key of its own. Go on with `after` until there is none; a step that was not finished is simply done
    /// again, and finds what is left by `kek_id`.
    ///
    /// # Errors
    /// `keys_unavailable`. A row that does not open is counted and left.
    /// # Transaction
    /// One statement a row, guarded by the bytes that were read: a key that was put anew meanwhile wins.
    pub async fn rewrap(&self, after: Option<Uuid>, anew: bool) -> Result<Rewrapped, Error> {
        let ring = self.ring.as_ref().ok_or(Error::Unavailable)?;
        let (first, _) = ring.first().ok_or(Error::Unavailable)?;
        let rows: Vec<SealedRow> = sqlx::query_as(
            "select id, provider, user_id, base_url, ciphertext, nonce, wrapped_dek, kek_id, envelope_version from api_keys
             where source = 'sealed' and status <> 'revoked' and ($1::uuid is null or id > $1) and ($2 or kek_id <> $3) order by id limit $4",
        )
        .bind(after)
        .bind(anew)
        .bind(first)
        .bind(REWRAP_ROWS)
        .fetch_all(&self.pool)
        .await?;
        let mut done = Rewrapped::default();
        if rows.len() as i64 == REWRAP_ROWS {
            done.after = rows.last().map(|row| row.id);
        }
        for row in rows {
            let (place, old) = (row.place(), row.envelope());
            let new = if anew {
                envelope::open(ring, place, &old).and_then(|content| envelope::seal(ring, place, &content))
            } else {
                envelope::rewrap(ring, place, &old)
            };
            let new = match new {
                Ok(new) => new,
                Err(error) => {
                    tracing::error!(key = %row.id, %error, "a key is not wrapped anew");
                    done.left += 1;
                    continue;
                }
            };
            let written = sqlx::query(
                "update api_keys set ciphertext = $3, nonce = $4, wrapped_dek = $5, kek_id = $6, rotated_at = engine_now()
                 where id = $1 and wrapped_dek = $2",
            )
            .bind(row.id)
            .bind(&row.wrapped_dek)
            .bind(&new.ciphertext)
            .bind(&new.nonce)
            .bind(&new.wrapped_dek)
            .bind(&new.kek_id)
            .execute(&self.pool)
            .await?;
            match written.rows_affected() {
                0 => done.left += 1,
                _ => done.rows += 1,
            }
        }
        Ok(done)
    }

    /// Sealed keys by the key of the ring that wraps them. One that counts none may leave the ring.
    ///
    /// # Errors
    /// The database's.
    pub async fn wrapped_by(&self) -> Result<Vec<(String, i64)>, Error> {
        Ok(sqlx::query_as(
            "select kek_id, count(*) from api_keys where source = 'sealed' and status <> 'revoked' group by 1 order by 1",
        )
        .fetch_all(&self.pool)
        .await?)
    }
}
