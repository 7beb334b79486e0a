//! Whether the database can be reached and has the schema of this program.

use super::{Error, Store};

impl Store {
    /// Migrations that are missing; empty means ready.
    pub async fn missing_migrations(&self) -> Result<Vec<i64>, Error> {
        Ok(loopwright_engine::migrate::missing(&self.pool, loopwright_activities::MIGRATIONS).await?)
    }

    /// Difference between the database's clock and ours, in milliseconds.
    pub async fn clock_difference_ms(&self) -> Result<i64, Error> {
        let before = chrono::Utc::now();
        let now: chrono::DateTime<chrono::Utc> =
            sqlx::query_scalar("select clock_timestamp()").fetch_one(&self.pool).await?;
        let after = chrono::Utc::now();
        let middle = before + (after - before) / 2;
        Ok((now - middle).num_milliseconds())
    }

    /// The server's version number, as in 150018.
    pub async fn server_version(&self) -> Result<i32, Error> {
        Ok(sqlx::query_scalar("select current_setting('server_version_num')::int").fetch_one(&self.pool).await?)
    }
}
