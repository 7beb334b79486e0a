//! Table `blobs`: large values of a run, each once. A reference is written after its blob or with it, and a blob goes with its
//! run only; so a crash leaves at most a value that nobody refers to, until its run is deleted.

use crate::{
    Error, Result,
    ids::RunId,
    payload::{Blob, Hash},
};
use sqlx::PgConnection;
use std::collections::HashSet;
use uuid::Uuid;

/// Stores values of one run that are not there yet; of a run that does not exist, none.
///
/// # Transaction
/// The caller's, or none: each statement is whole by itself, and twice is once. Locks the run's row for key share.
pub(crate) async fn put(conn: &mut PgConnection, blobs: &[Blob]) -> Result<()> {
    if blobs.is_empty() {
        return Ok(());
    }
    let there: Vec<(Uuid, Vec<u8>)> = sqlx::query_as(
        "select b.run_id, b.hash from unnest($1::smallint[], $2::uuid[], $3::bytea[]) k(shard, run_id, hash)
         join blobs b on b.shard = $4 and b.shard = k.shard and b.run_id = k.run_id and b.hash = k.hash",
    )
    .bind(blobs.iter().map(|b| b.run.shard()).collect::<Vec<_>>())
    .bind(blobs.iter().map(|b| b.run.0).collect::<Vec<_>>())
    .bind(blobs.iter().map(|b| &b.hash[..]).collect::<Vec<_>>())
    .bind(blobs[0].run.shard())
    .fetch_all(&mut *conn)
    .await?;
    for blob in blobs.iter().filter(|b| !there.iter().any(|(run, hash)| *run == b.run.0 && hash[..] == b.hash)) {
        let stowed = blob.stow()?;
        sqlx::query(
            "insert into blobs (shard, run_id, hash, key, size, bytes)
             select shard, run_id, $3, $4, $5, $6 from runs where shard = $1 and run_id = $2 on conflict do nothing",
        )
        .bind(blob.run.shard())
        .bind(blob.run.0)
        .bind(&blob.hash[..])
        .bind(stowed.key)
        .bind(stowed.size)
        .bind(stowed.bytes)
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

/// What a run has stored.
pub(crate) async fn known(conn: &mut PgConnection, run: RunId) -> Result<HashSet<Hash>> {
    let hashes: Vec<Vec<u8>> = sqlx::query_scalar("select hash from blobs where shard = $1 and run_id = $2")
        .bind(run.shard())
        .bind(run.0)
        .fetch_all(conn)
        .await?;
    hashes.iter().map(|hash| hash_of(hash)).collect()
}

/// Hash, key and bytes of those that are there.
pub(crate) async fn fetch(
    conn: &mut PgConnection,
    run: RunId,
    hashes: &[Hash],
) -> Result<Vec<(Hash, Option<String>, Vec<u8>)>> {
    let rows: Vec<(Vec<u8>, Option<String>, Vec<u8>)> =
        sqlx::query_as("select hash, key, bytes from blobs where shard = $1 and run_id = $2 and hash = any($3)")
            .bind(run.shard())
            .bind(run.0)
            .bind(hashes.iter().map(|hash| &hash[..]).collect::<Vec<_>>())
            .fetch_all(conn)
            .await?;
    rows.into_iter().map(|(hash, key, bytes)| Ok((hash_of(&hash)?, key, bytes))).collect()
}

pub(super) fn hash_of(bytes: &[u8]) -> Result<Hash> {
    Hash::try_from(bytes).map_err(|_| Error::Invariant("a blob's hash".into()))
}
