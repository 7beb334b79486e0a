//! What attempts leave behind: kept once under its key, and only by who owns the run.

use super::Pair;
use crate::{
    hook::AtOnce,
    ids::RunId,
    store::{checkpoints, spread::Spread},
    transaction::begin,
};
use serde_json::{Value, json};
use uuid::Uuid;

impl Pair {
    /// Two attempts save a value under one key, each as [`Self::save_one`] does.
    pub(super) async fn save(&mut self, run: RunId) -> (String, String, String) {
        let (path, key) = (["a", "b"][self.random.usize(0..2)], ["x", "y"][self.random.usize(0..2)]);
        let (first, there, here) = self.save_one(run, path, key).await;
        let (second, there_next, here_next) = self.save_one(run, path, key).await;
        (format!("save {first} {second} {run} {path} {key}"), there + &there_next, here + &here_next)
    }

    /// A value is saved in a transaction, or beside a reading that the hook accepts or not; and what is there is read.
    async fn save_one(&mut self, run: RunId, path: &str, key: &str) -> (&'static str, String, String) {
        let (epoch, _) = self.fence(run);
        let value = json!(self.random.u32(..));
        let (accepts, at_once) = (self.random.u8(0..4) > 0, self.spread == Spread::Together && self.random.bool());
        let saved = if at_once {
            let mut conn = self.pool.acquire().await.expect("connection");
            let hook = AtOnce { sql: if accepts { "true" } else { "false" }, arguments: Default::default() };
            let small = checkpoints::small(run, path, key, &value).expect("packed").expect("small");
            checkpoints::at_once(&mut conn, run, epoch, hook, Some(&small)).await.expect("saved")
        } else {
            let mut tx = begin(&self.pool).await.expect("begin");
            let owned = checkpoints::fence(&mut tx, run, epoch).await.expect("fence");
            if owned {
                checkpoints::put(&mut tx, run, path, key, &value).await.expect("put");
            }
            tx.commit().await.expect("commit");
            owned
        };
        let read = checkpoints::get(&self.pool, run, path, key).await.expect("read");
        let known = self.memory.checkpoint(run, path, key).is_some();
        let done = self.memory.save(run, epoch, (path, key), value, accepts || !at_once);
        let what = match (done, known) {
            (true, true) => "saved-before",
            (true, false) => "saves",
            (false, _) => "saves-not",
        };
        let here = (done, self.memory.checkpoint(run, path, key));
        (what, format!("{:?}", (saved, read.as_ref())), format!("{here:?}"))
    }

    /// Every value that is kept: on Postgres and in memory.
    pub(super) async fn saved(&self) -> (Vec<(Uuid, String, String, Value)>, Vec<(Uuid, String, String, Value)>) {
        let there = sqlx::query_as("select run_id, path, key, value from checkpoints order by 1, 2, 3");
        let here = self.memory.checkpoints.iter().map(|((run, path, key), value)| {
            let (path, key) = (path.clone(), key.clone());
            (run.0, path, key, value.clone())
        });
        (there.fetch_all(&self.pool).await.expect("checkpoints"), here.collect())
    }
}
