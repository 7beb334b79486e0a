//! Transactions of Postgres, begun so that nobody can leave one open by being dropped.

pub use crate::store::is_transient;

use crate::{Error, Result, store::retry_pause};
use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use std::pin::Pin;

/// Begins a transaction. Dropping it rolls it back; the only way in this workspace to begin one (a test looks for others).
///
/// It begins in a task of its own, because a caller may be dropped at any await, by a time-out or a client that goes away, and
/// sqlx 0.9 queues no ROLLBACK for a BEGIN whose answer it has not seen. Such a session would go back to the pool inside an
/// open transaction, and whoever writes there next would be told of a commit that never was. A dropped caller leaves the task
/// behind; it begins, finds nobody waiting, and rolls back.
///
/// # Errors
/// Those of acquiring a connection and of `BEGIN`; `WorkerCrashed` if the runtime shuts down meanwhile.
pub async fn begin(pool: &PgPool) -> sqlx::Result<Transaction<'static, Postgres>> {
    let pool = pool.clone();
    tokio::spawn(async move { pool.begin().await }).await.map_err(|_| sqlx::Error::WorkerCrashed)?
}

/// Runs a closure in a transaction, again when Postgres asks for it.
pub(crate) async fn in_transaction<T, F>(pool: &PgPool, work: F) -> Result<T>
where
    F: for<'c> Fn(&'c mut PgConnection) -> Pin<Box<dyn Future<Output = Result<T>> + Send + 'c>> + Send + Sync,
    T: Send,
{
    let mut tries = 0;
    loop {
        let attempt = async {
            let mut tx = begin(pool).await?;
            let value = work(&mut tx).await?;
            tx.commit().await?;
            Ok(value)
        };
        match attempt.await {
            Err(Error::Sql(error)) if is_transient(&error) => match retry_pause(tries) {
                Some(pause) => {
                    tries += 1;
                    tokio::time::sleep(pause).await;
                }
                None => return Err(Error::Sql(error)),
            },
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::begin;
    use crate::embedded::testing::database;
    use sqlx::{PgPool, Postgres, Transaction, postgres::PgPoolOptions};
    use std::{
        future::poll_fn,
        task::Poll::{Pending, Ready},
    };

    /// Drops what begins when the server has begun and the caller does not know it yet, and then writes a row through the same
    /// session. Tries until that moment is caught. Returns whether others see the row.
    async fn others_see_what_is_written_next<F>(begins: impl Fn(PgPool) -> F) -> bool
    where
        F: Future<Output = sqlx::Result<Transaction<'static, Postgres>>>,
    {
        let others = database(&[]).await;
        let options = others.connect_options().as_ref().clone().application_name("dropped");
        // Of one session, so that whoever comes next gets what the dropped caller left.
        let pool = PgPoolOptions::new().max_connections(1).connect_with(options).await.expect("pool");
        sqlx::query("create table written ()").execute(&others).await.expect("table");
        let open = "select state like 'idle in transaction%' from pg_stat_activity where application_name = 'dropped'";
        loop {
            let mut beginning = Box::pin(begins(pool.clone()));
            let caught = loop {
                // One look: a task that waits for this future would now wait for its sockets.
                let look = poll_fn(|context| match beginning.as_mut().poll(context) {
                    Ready(begun) => Ready(Some(begun)),
                    Pending => Ready(None),
                });
                if let Some(begun) = look.await {
                    begun.expect("begin").rollback().await.expect("rollback");
                    break false;
                }
                if sqlx::query_scalar(open).fetch_one(&others).await.expect("state") {
                    break true;
                }
            };
            drop(beginning);
            if caught {
                sqlx::query("insert into written default values").execute(&pool).await.expect("insert");
                return sqlx::query_scalar("select exists (select from written)")
                    .fetch_one(&others)
                    .await
                    .expect("seen");
            }
        }
    }

    #[tokio::test]
    async fn whoever_writes_after_a_dropped_begin_has_written() {
        assert!(others_see_what_is_written_next(|pool| async move { begin(&pool).await }).await);
    }

    /// Why [`begin`] is there. When this fails, sqlx has been mended and `begin` may go.
    #[tokio::test]
    async fn sqlx_alone_loses_what_is_written_after_a_dropped_begin() {
        assert!(!others_see_what_is_written_next(|pool| async move { pool.begin().await }).await);
    }
}
