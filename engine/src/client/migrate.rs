//! Runs in flight that go on under another definition.

use super::{Client, pause::checked, short_id};
use crate::{
    Error, Result,
    definition::Definition,
    event::Event,
    ids::{DefinitionHash, RunId},
    machine::{self, Finding, Moment, Refusals, fold},
    signature::Catalog,
    store::{self, runs::Loaded},
    view::RunStatus,
};
use serde::Serialize;
use sqlx::PgConnection;
use std::{
    cell::Cell,
    collections::{BTreeMap, btree_map::Entry},
};

/// Steps that a map renames. Chosen: a document has at most 200.
const MAP_MAX: usize = 200;

/// A request to let a run go on under another definition of its workflow.
#[derive(Clone, Debug)]
pub struct Migrate {
    pub to: DefinitionHash,
    /// New ids of steps, by their old id or by their path without items and rounds (`each/code`).
    pub map: BTreeMap<String, String>,
    /// At most 4 KiB.
    pub reason: String,
    /// Who asks, as `user:<id>`.
    pub by: Option<String>,
    /// Only check; may be asked while attempts run.
    pub dry_run: bool,
    /// What is known of activities: the stored output of a step that is another activity now is checked against its schema.
    pub catalog: Catalog,
}

/// What a migration came to, or would come to.
#[derive(Clone, Debug, Serialize)]
pub struct MigrationReport {
    pub run_id: RunId,
    pub from: DefinitionHash,
    pub to: DefinitionHash,
    pub outcome: MigrationOutcome,
    /// The transition by which it was migrated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// Why it cannot be, every reason.
    pub violations: Vec<Finding>,
    /// What is to be known of it.
    pub notes: Vec<Finding>,
    /// Steps whose attempts run now.
    pub running: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationOutcome {
    Migrated,
    /// The run has this definition: nothing was done.
    Unchanged,
    /// It was only asked: nothing stands in the way.
    Possible,
    /// It was only asked: attempts run, and they have to end first.
    Busy,
    /// It was only asked: there are violations.
    Impossible,
}

impl Client {
    /// Lets a run go on under another definition of its workflow, if everything that has begun has its place there; see
    /// [`machine::migrate`]. What waits goes on waiting, what has ended is not done again, deadlines stay. The run keeps its queue,
    /// its place in a concurrency group, its attributes and its children. To undo it, migrate back.
    ///
    /// # Errors
    /// `run_not_found`, `run_closed`, `run_quarantined`, `run_imported`, `definition_not_found`, `too_large`; `migration_invalid`
    /// with every violation; `migration_busy` while attempts run: pause the run and ask again when they have ended. A dry run
    /// tells the last two in its report.
    /// # Transaction
    /// One, which locks the run's row. Nothing happens but the transition: whoever owned the run is fenced off by the epoch, and
    /// it is claimable at once. Twice: `Unchanged`.
    pub async fn migrate(&self, run: RunId, asked: Migrate) -> Result<MigrationReport> {
        let reason = checked(&asked.reason)?;
        short_id("the sender", asked.by.as_deref())?;
        if asked.map.len() > MAP_MAX {
            return Err(Error::TooLarge { what: "the map of steps", actual: asked.map.len(), limit: MAP_MAX });
        }
        let report = self.once(|conn| {
            let (asked, client) = (Migrate { reason: reason.clone(), ..asked.clone() }, self.clone());
            Box::pin(async move { client.migrate_in(conn, run, asked).await })
        });
        let report = report.await?;
        if report.outcome == MigrationOutcome::Migrated {
            crate::committer::crash_point("migrate.after_commit");
            self.wake().await;
        }
        Ok(report)
    }

    async fn migrate_in(&self, conn: &mut PgConnection, run: RunId, asked: Migrate) -> Result<MigrationReport> {
        // Who commits a transition or sends a message now waits for us, and sees what we have done.
        if !asked.dry_run {
            store::migrations::lock(conn, run).await?;
        }
        if self.open(conn, run).await?.status == RunStatus::Quarantined {
            return Err(Error::RunQuarantined(run.to_string()));
        }
        let loaded = store::runs::load(conn, run).await?;
        let mut report = MigrationReport {
            run_id: run,
            from: loaded.definition,
            to: asked.to,
            outcome: MigrationOutcome::Unchanged,
            seq: None,
            violations: Vec::new(),
            notes: Vec::new(),
            running: Vec::new(),
        };
        if loaded.definition == asked.to {
            return Ok(report);
        }
        let dry_run = asked.dry_run;
        let migration = decide(conn, &loaded, asked).await?;
        (report.violations, report.notes, report.running) = (migration.violations, migration.notes, migration.running);
        let event = match (migration.event, dry_run) {
            (None, true) => {
                report.outcome = MigrationOutcome::Impossible;
                return Ok(report);
            }
            (None, false) => {
                let told =
                    |f: &Finding| if f.path.is_empty() { f.text.clone() } else { format!("`{}`: {}", f.path, f.text) };
                return Err(Error::MigrationInvalid(report.violations.iter().map(told).collect()));
            }
            (Some(_), true) => {
                let possible = report.running.is_empty();
                report.outcome = if possible { MigrationOutcome::Possible } else { MigrationOutcome::Busy };
                return Ok(report);
            }
            (Some(_), false) if !report.running.is_empty() => {
                return Err(Error::MigrationBusy { run: run.to_string(), running: report.running });
            }
            (Some(event), false) => event,
        };
        let mut state = loaded.state;
        fold(&mut state, &event).map_err(|e| Error::Invariant(format!("migration of run {run}: {e}")))?;
        let state = serde_json::to_value(&state).map_err(|e| Error::Invariant(e.to_string()))?;
        let inputs = if let Event::RunMigrated { inputs, .. } = &event { inputs.as_ref() } else { None };
        crate::committer::crash_point("migrate.before_store");
        let new = store::migrations::New {
            run,
            epoch: loaded.epoch,
            seq: loaded.seq,
            from: report.from,
            to: report.to,
            inputs,
            event: &event,
            state: &state,
        };
        if !store::migrations::apply(conn, &new).await? {
            // The row is locked: nobody else can have moved it.
            return Err(Error::Invariant(format!("run {run} moved under its lock")));
        }
        crate::committer::crash_point("migrate.before_commit");
        report.outcome = MigrationOutcome::Migrated;
        report.seq = u64::try_from(loaded.seq + 1).ok();
        Ok(report)
    }
}

async fn decide(conn: &mut PgConnection, loaded: &Loaded, asked: Migrate) -> Result<machine::Migration> {
    let old = store::definitions::load(conn, loaded.definition).await?;
    let new = store::definitions::load(conn, asked.to).await?;
    let calls = store::definitions::resolve_calls(conn, &new.definition).await?;
    let (mut unread, mut seen) = (Vec::new(), loaded.inbox_seen);
    while seen < loaded.inbox_n {
        let (messages, upto) = store::inbox::read(conn, loaded.run_id, seen, loaded.inbox_n).await?;
        unread.extend(messages);
        seen = upto;
    }
    let moment = Moment {
        now: store::runs::now(conn).await?,
        draw: 0,
        permits: Cell::new(0),
        refused: &Refusals::default(),
        catalog: &asked.catalog,
        calls: &calls,
        current: None,
        depth: u32::try_from(loaded.depth).unwrap_or(u32::MAX),
        bounds_calls: true,
        workflow: &new.definition.name,
    };
    let pending = loaded.state.status == RunStatus::Pending;
    let migrate = machine::Migrate {
        from: loaded.definition,
        to: asked.to,
        map: asked.map,
        inputs: if pending { loaded.inputs.clone() } else { loaded.state.inputs.clone() },
        reason: asked.reason,
        by: asked.by,
    };
    Ok(machine::migrate(&old.definition, &new.definition, &loaded.state, &unread, migrate, &moment))
}

/// Definitions by their hash, as a replay wants them.
pub(super) async fn definitions(
    conn: &mut PgConnection,
    hashes: impl IntoIterator<Item = DefinitionHash>,
) -> Result<BTreeMap<DefinitionHash, Definition>> {
    let mut found = BTreeMap::new();
    for hash in hashes {
        if let Entry::Vacant(vacant) = found.entry(hash) {
            vacant.insert(store::definitions::load(conn, hash).await?.definition);
        }
    }
    Ok(found)
}

impl Client {
    /// A deployed definition by what people write: its number, a pointer such as `current`, or its hash, of which the first digits
    /// are enough if no other begins with them. Numbers and pointers are those of `workflow`, or of the workflow that is named
    /// before an `@`.
    ///
    /// # Errors
    /// `definition_not_found`; `definition_ambiguous` with those that begin so.
    pub async fn definition_named(&self, workflow: &str, text: &str) -> Result<DefinitionHash> {
        let (workflow, text) = text.split_once('@').unwrap_or((workflow, text));
        let number = text.strip_prefix('v').unwrap_or(text).parse::<i32>();
        self.ask(async |conn| {
            let found = match number {
                Ok(version) => store::definitions::version(conn, workflow, version).await,
                Err(_) => store::definitions::pointer(conn, workflow, text).await,
            };
            match found {
                // Digits may be the beginning of a hash as well.
                Err(Error::DefinitionNotFound(named)) => match store::definitions::beginning(conn, text).await? {
                    Some(hash) => Ok(hash),
                    None => Err(Error::DefinitionNotFound(named)),
                },
                found => found,
            }
        })
        .await
    }
}
