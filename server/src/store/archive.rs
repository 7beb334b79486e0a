//! A project's newest files as a zip, straight from their rows: no worktree, no git.

use super::Store;
use crate::rest::Archives;
use futures_util::{TryStreamExt, future::BoxFuture};
use loopwright_engine::Failure;
use std::io::{Cursor, Write};
use uuid::Uuid;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// Largest sum of file sizes that is put into one archive, in bytes. Chosen: it is held in memory.
const BYTES_MAX: usize = 256 << 20;

impl Archives for Store {
    fn zip(&self, project: Uuid) -> BoxFuture<'_, Result<Vec<u8>, Failure>> {
        Box::pin(async move {
            let database = |e: sqlx::Error| Failure::retryable("transient.store", e.to_string());
            let broken = |e: &dyn std::fmt::Display| Failure::permanent("archive.failed", e.to_string());
            let mut rows = sqlx::query_as::<_, (String, Option<Vec<u8>>, bool)>(
                "select distinct on (path) path, content, deleted from project_files where project_id = $1
                 order by path, version desc",
            )
            .bind(project)
            .fetch(&self.pool);
            // A fixed date: the same files give the same bytes.
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Deflated)
                .last_modified_time(zip::DateTime::default());
            let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
            let mut total = 0;
            while let Some((path, content, deleted)) = rows.try_next().await.map_err(database)? {
                let Some(content) = content.filter(|_| !deleted) else { continue };
                total += content.len();
                if total > BYTES_MAX {
                    return Err(Failure::permanent("archive.too_large", format!("more than {BYTES_MAX} bytes")));
                }
                writer.start_file(path, options).map_err(|e| broken(&e))?;
                writer.write_all(&content).map_err(|e| broken(&e))?;
            }
            Ok(writer.finish().map_err(|e| broken(&e))?.into_inner())
        })
    }
}
