//! What may be asked of schedules. Every change locks the schedule's row, so that it does not meet a worker half way.

use super::{
    Action, ActionKind, ActionState, BACKFILL_MAX, NOTE_CHARS_MAX, Overlap, SCHEDULES_MAX, ScheduleDetail,
    ScheduleView, Spec, Timing, name_violation,
};
use crate::{
    Error, Result,
    client::{ATTRIBUTES_BYTES_MAX, Client, json_len},
    store::schedules::{self as store, NewAction, Stored},
    worker::fire,
};
use chrono::{DateTime, Duration, Utc};
use std::sync::Arc;
use uuid::Uuid;

/// Instants that [`Schedules::describe`] looks ahead.
const UPCOMING: usize = 5;
/// Newest actions that [`Schedules::describe`] shows.
const RECENT: i64 = 20;
/// Open runs that [`Schedules::describe`] shows.
const OPEN: i64 = 100;

/// A schedule to be made.
#[derive(Clone, Debug)]
pub struct NewSchedule {
    /// Unique. Letters, digits and `._/:-`, at most 100.
    pub name: String,
    pub spec: Spec,
    /// Make it paused.
    pub paused: bool,
    pub note: Option<String>,
    /// Who makes it, as `user:<id>`.
    pub owner: Option<String>,
}

/// What a backfill came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backfilled {
    /// Instants of the calendar in the range.
    pub instants: usize,
    /// Those that are to be done now; the others have their run already.
    pub added: usize,
}

/// The door to schedules. Cheap to clone.
#[derive(Clone)]
pub struct Schedules {
    client: Client,
}

// Here, so that the client need not know of schedules, which start runs through it.
impl Client {
    /// Recurring starts of runs.
    #[must_use]
    pub fn schedules(&self) -> Schedules {
        Schedules { client: self.clone() }
    }
}

impl Schedules {
    /// Makes a schedule. Its first instant is the first after now.
    ///
    /// # Errors
    /// `schedule_invalid` with every violation; `schedule_exists`; `definition_not_found`, `input_invalid` as of now (the workflow
    /// may change later; then the action fails and says so).
    pub async fn create(&self, new: NewSchedule) -> Result<ScheduleView> {
        let mut violations: Vec<String> = name_violation(&new.name).into_iter().collect();
        violations.extend(note_violation(new.note.as_deref()));
        let timing = check(&new.spec, violations)?;
        self.client
            .once(|conn| {
                let (new, timing) = (new.clone(), timing.clone());
                Box::pin(async move {
                    fire::startable(conn, &new.spec).await?;
                    if store::count(conn).await? >= SCHEDULES_MAX {
                        return Err(Error::ScheduleInvalid(vec![format!(
                            "there are {SCHEDULES_MAX} schedules; delete some"
                        )]));
                    }
                    let now = store::now(conn).await?;
                    let view = ScheduleView {
                        id: Uuid::now_v7(),
                        name: new.name.clone(),
                        paused_at: new.paused.then_some(now),
                        note: new.note,
                        owner: new.owner,
                        next_at: if new.paused { None } else { timing.next_after(now) },
                        runs_left: new.spec.run_limit,
                        spec: new.spec,
                        started: 0,
                        skipped: 0,
                        missed: 0,
                        failed: 0,
                        created_at: now,
                        updated_at: now,
                    };
                    let due = view.next_at.map(|at| timing.due(view.id, at, view.spec.jitter_ms));
                    store::insert(conn, &view, due).await?;
                    Ok(store::get(conn, &new.name).await?.view)
                })
            })
            .await
    }

    /// Gives a schedule another spec. With another calendar or jitter its next instant is the first after now; what waits is
    /// judged by the new overlap policy; another run limit counts from now.
    ///
    /// # Errors
    /// As [`Self::create`], and `schedule_not_found`.
    pub async fn update(&self, name: &str, spec: Spec) -> Result<ScheduleView> {
        let timing = check(&spec, Vec::new())?;
        self.client.ask(async |conn| fire::startable(conn, &spec).await).await?;
        self.change(name, move |stored| {
            let old = std::mem::replace(&mut stored.view.spec, spec.clone());
            if old.run_limit != spec.run_limit {
                stored.view.runs_left = spec.run_limit;
            }
            if old.when != spec.when || old.jitter_ms != spec.jitter_ms || stored.view.next_at.is_none() {
                stored.view.next_at = first(stored, &timing);
            }
        })
        .await
    }

    /// Stops it from acting by its calendar: what waits from the calendar is skipped. Runs that are open go on; backfills and
    /// runs by hand are done nevertheless. Pausing again only changes the note.
    ///
    /// # Errors
    /// `schedule_not_found`, `schedule_invalid` (the note).
    pub async fn pause(&self, name: &str, note: Option<String>) -> Result<ScheduleView> {
        if let Some(violation) = note_violation(note.as_deref()) {
            return Err(Error::ScheduleInvalid(vec![violation]));
        }
        self.change(name, move |stored| {
            stored.view.paused_at.get_or_insert(stored.now);
            stored.view.next_at = None;
            stored.view.note.clone_from(&note);
        })
        .await
    }

    /// Goes on with the first instant after now; what passed meanwhile is not caught up. Nothing happens if it is not paused.
    ///
    /// # Errors
    /// `schedule_not_found`, `schedule_invalid` (the note).
    pub async fn resume(&self, name: &str, note: Option<String>) -> Result<ScheduleView> {
        if let Some(violation) = note_violation(note.as_deref()) {
            return Err(Error::ScheduleInvalid(vec![violation]));
        }
        self.change(name, move |stored| {
            if stored.view.paused_at.take().is_some() {
                stored.view.note.clone_from(&note);
                // A calendar that was accepted can be read.
                stored.view.next_at = timing_of(stored).ok().and_then(|timing| first(stored, &timing));
            }
        })
        .await
    }

    /// Deletes it with what waits. Its runs go on.
    ///
    /// # Errors
    /// `schedule_not_found`.
    pub async fn delete(&self, name: &str) -> Result<()> {
        self.client
            .once(|conn| {
                let name = name.to_owned();
                Box::pin(async move { store::delete(conn, &name).await })
            })
            .await
    }

    /// A run now, whether paused or not, under the given overlap policy or the schedule's. The action says what it came to:
    /// `started` with its run, `pending`, `skipped` or `failed`.
    ///
    /// # Errors
    /// `schedule_not_found`; `schedule_invalid` if 10,000 actions wait.
    pub async fn trigger(&self, name: &str, overlap: Option<Overlap>) -> Result<Action> {
        let (action, turn) = self
            .client
            .once(|conn| {
                let (client, name) = (self.client.clone(), name.to_owned());
                Box::pin(async move {
                    let mut stored = store::lock(conn, &name).await?;
                    let waits = store::pending_count(conn, stored.view.id).await?;
                    if usize::try_from(waits).is_ok_and(|n| n >= BACKFILL_MAX) {
                        let why = format!(
                            "{waits} actions wait; let the open runs end first, or choose another overlap policy"
                        );
                        return Err(Error::ScheduleInvalid(vec![why]));
                    }
                    crate::committer::crash_point("trigger.after_lock");
                    stored.action_n += 1;
                    let (n, id) = (stored.action_n, stored.view.id);
                    let (kind, state) = (ActionKind::Manual, ActionState::Pending);
                    store::add(conn, id, &[NewAction { n, instant: stored.now, kind, overlap, state, note: None }])
                        .await?;
                    crate::committer::crash_point("trigger.after_add");
                    let turn = fire::turn(conn, &client, &mut stored).await?;
                    let newest = store::recent(conn, id, fire::KEPT).await?;
                    let action = newest.into_iter().find(|a| a.n == n);
                    Ok((action.ok_or_else(|| Error::Invariant("the action of a trigger is gone".into()))?, turn))
                })
            })
            .await?;
        crate::committer::crash_point("trigger.after_commit");
        turn.follow(&self.client).await;
        crate::committer::crash_point("trigger.before_wake");
        self.client.wake().await;
        Ok(action)
    }

    /// Fills in the instants of the calendar in `from ..= to` that have no run, under the given overlap policy or the
    /// schedule's, paused or not. An instant has one run at most, so that a backfill may be sent again. A worker starts them.
    ///
    /// # Errors
    /// `schedule_not_found`; `schedule_invalid` if the range is empty, reaches beyond now, or has more than 10,000 instants, those
    /// that wait already included.
    pub async fn backfill(
        &self,
        name: &str,
        from: DateTime<Utc>,
        to: DateTime<Utc>,
        overlap: Option<Overlap>,
    ) -> Result<Backfilled> {
        self.client.once(|conn| {
            let name = name.to_owned();
            Box::pin(async move {
                let mut stored = store::lock(conn, &name).await?;
                let invalid = |text: String| Err(Error::ScheduleInvalid(vec![text]));
                if from > to {
                    return invalid(format!("the range ends at {to}, before it begins at {from}"));
                }
                if to > stored.now || from.timestamp() < 0 {
                    return invalid(format!("a backfill lies between 1970 and now, {}", stored.now));
                }
                let timing = timing_of(&stored)?;
                let instants: Vec<_> = timing
                    .upcoming(from - Duration::milliseconds(1), BACKFILL_MAX + 1)
                    .into_iter()
                    // Instants are whole milliseconds, the range may begin between two.
                    .skip_while(|at| *at < from)
                    .take_while(|at| *at <= to)
                    .collect();
                let waits = usize::try_from(store::pending_count(conn, stored.view.id).await?).unwrap_or(usize::MAX);
                if instants.len().saturating_add(waits) > BACKFILL_MAX {
                    return invalid(format!(
                        "a backfill has at most {BACKFILL_MAX} instants, and {waits} actions wait; take a shorter range"
                    ));
                }
                crate::committer::crash_point("backfill.after_lock");
                let (kind, state) = (ActionKind::Backfill, ActionState::Pending);
                let actions: Vec<NewAction> = instants
                    .iter()
                    .zip(stored.action_n + 1..)
                    .map(|(at, n)| NewAction { n, instant: *at, kind, overlap, state, note: None })
                    .collect();
                stored.action_n += i64::try_from(actions.len()).unwrap_or(0);
                let added = store::add(conn, stored.view.id, &actions).await?;
                crate::committer::crash_point("backfill.after_add");
                stored.wake_at = Some(stored.now);
                store::save(conn, &stored, false).await?;
                Ok(Backfilled { instants: instants.len(), added: usize::try_from(added).unwrap_or(0) })
            })
        })
        .await
    }

    /// By name, at most `limit` (200); `after` is the last name of the page before.
    pub async fn list(&self, after: Option<&str>, limit: u32) -> Result<Vec<ScheduleView>> {
        let listed = self.client.ask(async |conn| store::list(conn, after, limit).await).await?;
        Ok(listed.into_iter().map(|stored| stored.view).collect())
    }

    /// A schedule with its next instants, its open runs and its newest actions.
    ///
    /// # Errors
    /// `schedule_not_found`.
    pub async fn describe(&self, name: &str) -> Result<ScheduleDetail> {
        self.client
            .ask(async |conn| {
                let stored = store::get(conn, name).await?;
                let timing = timing_of(&stored)?;
                let upcoming = match stored.view.next_at {
                    Some(next) => timing.upcoming(next - Duration::milliseconds(1), UPCOMING),
                    None => Vec::new(),
                };
                Ok(ScheduleDetail {
                    upcoming,
                    open: store::open_runs(conn, stored.view.id, OPEN).await?,
                    recent: store::recent(conn, stored.view.id, RECENT).await?,
                    schedule: stored.view,
                })
            })
            .await
    }

    /// Does what is due now, as workers do by themselves about twice a second. Returns how many runs were started.
    pub async fn fire_due(&self) -> Result<usize> {
        fire::fire_due(&self.client).await
    }

    /// Changes the row of a name under its lock. What waits is looked at in any case: another policy may let it go.
    async fn change(&self, name: &str, change: impl Fn(&mut Stored) + Send + Sync + 'static) -> Result<ScheduleView> {
        let change = Arc::new(change);
        self.client
            .once(|conn| {
                let (change, name) = (change.clone(), name.to_owned());
                Box::pin(async move {
                    let mut stored = store::lock(conn, &name).await?;
                    crate::committer::crash_point("change.after_lock");
                    change(&mut stored);
                    let id = stored.view.id;
                    if stored.view.paused_at.is_some() {
                        stored.view.skipped += store::skip_waiting(conn, id, "the schedule was paused").await?;
                    }
                    crate::committer::crash_point("change.after_skip");
                    let timing = timing_of(&stored)?;
                    let due = stored.view.next_at.map(|at| timing.due(id, at, stored.view.spec.jitter_ms));
                    stored.wake_at = if store::pending_count(conn, id).await? > 0 { Some(stored.now) } else { due };
                    store::save(conn, &stored, true).await?;
                    Ok(store::get(conn, &name).await?.view)
                })
            })
            .await
    }
}

/// The first instant after now, if the schedule acts by its calendar at all.
fn first(stored: &Stored, timing: &Timing) -> Option<DateTime<Utc>> {
    let rests = stored.view.paused_at.is_some() || stored.view.runs_left == Some(0);
    if rests { None } else { timing.next_after(stored.now) }
}

fn timing_of(stored: &Stored) -> Result<Timing> {
    Timing::new(&stored.view.spec.when).map_err(|e| Error::ScheduleInvalid(vec![e]))
}

fn note_violation(note: Option<&str>) -> Option<String> {
    let note = note?;
    (note.chars().count() > NOTE_CHARS_MAX || note.contains('\0'))
        .then(|| format!("the note is longer than {NOTE_CHARS_MAX} characters or contains a NUL"))
}

fn check(spec: &Spec, mut violations: Vec<String>) -> Result<Timing> {
    violations.extend(spec.violations());
    if !violations.is_empty() {
        return Err(Error::ScheduleInvalid(violations));
    }
    // The two that a schedule adds fit as well.
    let size = json_len(&spec.attributes) + 256;
    if size > ATTRIBUTES_BYTES_MAX {
        return Err(Error::TooLarge { what: "attributes", actual: size, limit: ATTRIBUTES_BYTES_MAX });
    }
    crate::client::shallow("attributes", &spec.attributes)?;
    Timing::new(&spec.when).map_err(|e| Error::ScheduleInvalid(vec![e]))
}
