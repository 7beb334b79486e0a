//! A database beside the ordinary one, for the undisturbed run of `demo --crash`.

use crate::{
    app::App,
    postgres::{self, Fallback},
};
use secrecy::SecretString;
use sqlx::{AssertSqlSafe, PgPool};

/// Its name.
const DATABASE: &str = "loopwright_reference";

/// The application over the database beside the ordinary one; emptied first if `fresh`.
pub(super) async fn open(app: &App, fresh: bool) -> anyhow::Result<App> {
    let mut url = url::Url::parse(&app.database_url)
        .map_err(|e| postgres::Error::Address(format!("{e}; `demo --crash` needs the form postgres://…")))?;
    url.set_path(&format!("/{DATABASE}"));
    create(&app.pool, fresh).await.map_err(|e| {
        anyhow::anyhow!(
            "the database {DATABASE} cannot be made ({e}); `demo --crash` needs a role that may create databases"
        )
    })?;
    let mut config = app.config.clone();
    config.database_url = Some(SecretString::from(url.to_string()));
    Ok(App::open_migrated(config, Fallback::None).await?)
}

async fn create(pool: &PgPool, fresh: bool) -> Result<(), sqlx::Error> {
    let execute = |sql: String| async move {
        // The name is a constant.
        sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(pool).await.map(drop)
    };
    if fresh {
        execute(format!("drop database if exists {DATABASE} with (force)")).await?;
    }
    let there: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(DATABASE)
        .fetch_one(pool)
        .await?;
    if there { Ok(()) } else { execute(format!("create database {DATABASE}")).await }
}
