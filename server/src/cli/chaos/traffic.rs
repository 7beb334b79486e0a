//! The people outside: they start, signal, update, cancel, terminate, pause, resume, fork and reset runs, and remember what was
//! acknowledged to them.

use super::{
    doors::{Answer, Begin, Begun, Doors, of},
    report::{Said, Waits},
};
use fastrand::Rng;
use loopwright_engine::{
    Error,
    admission::Admission,
    client::{At, Fork, Start, Update},
    ids::{DefinitionHash, RunId},
    view::{Answer as Answered, RunView, Updated, Waiting},
};
use serde_json::{Map, json};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

/// Pause between two requests, in ms.
const PAUSE_MS: std::ops::Range<u64> = 20..140;
/// Most runs of one person that are open at once: few enough for a small machine to end them in the calm.
const OPEN_MAX: usize = 10;
/// Runs of one person that nobody answers: at the end they wait, as they should.
const KEPT_MAX: usize = 1;
/// Sendings of one request; then it is unknown whether it arrived. One that makes a run is sent again later, until that is known.
const TRIES: u32 = 6;
/// Between two of them.
const AGAIN: Duration = Duration::from_millis(400);
/// One in so many of the requests by REST that make a run hangs up, after that many ms: in the middle of it, or when it is done and
/// the answer is on its way.
const HANG_UP_SHARE: u32 = 4;
const HANG_UP_MS: std::ops::Range<u64> = 1..400;
/// How long an update waits for its answer; then it is asked for again.
const UPDATE_WAIT: Duration = Duration::from_millis(1_500);
/// Longest wait for an answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(8);

/// What somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Ask {
    Start,
    Signal,
    Cancel,
    Terminate,
    Pause,
    Resume,
    Fork,
    Reset,
    Update,
}

impl Ask {
    const ALL: [(Self, u32); 9] = [
        (Self::Start, 40),
        (Self::Signal, 30),
        (Self::Cancel, 4),
        (Self::Terminate, 4),
        (Self::Pause, 8),
        (Self::Resume, 9),
        (Self::Fork, 5),
        (Self::Reset, 4),
        (Self::Update, 8),
    ];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Signal => "signal",
            Self::Cancel => "cancel",
            Self::Terminate => "terminate",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Fork => "fork",
            Self::Reset => "reset",
            Self::Update => "update",
        }
    }
}

/// Whether a refusal makes sense to somebody who has a run: he comes too late, forks at an end, or resets what was reset.
fn is_fair(ask: Ask, code: &str) -> bool {
    match code {
        "run_closed" | "fork_invalid" | "update.unanswered" => true,
        // What REST makes of `fork_invalid`.
        "input_invalid" => matches!(ask, Ask::Fork | Ask::Reset),
        _ => false,
    }
}

/// A request that makes a run, and has no answer.
struct Unanswered {
    ask: Ask,
    begin: Begin,
    /// What is forked or reset.
    of_run: Option<RunId>,
    /// Nobody answers the run.
    kept: bool,
}

struct Known {
    run: RunId,
    /// Nobody answers it.
    kept: bool,
    signalled: bool,
    closed: bool,
}

/// What was acknowledged.
#[derive(Clone, Default)]
pub(super) struct Promises {
    /// Started, forked, or made by a reset.
    pub(super) runs: Vec<RunId>,
    /// Signals, pauses, resumes: run and the sender's id as it is stored.
    pub(super) messages: Vec<(RunId, String)>,
    /// Answered updates: run and the sender's id.
    pub(super) updates: Vec<(RunId, String)>,
    pub(super) cancelled: Vec<RunId>,
    pub(super) terminated: Vec<RunId>,
    /// Another took their place.
    pub(super) reset: Vec<RunId>,
    /// Nobody answers them: they may be open at the end, and no others.
    pub(super) kept: Vec<RunId>,
}

impl Promises {
    pub(super) fn add(&mut self, other: Self) {
        self.runs.extend(other.runs);
        self.messages.extend(other.messages);
        self.updates.extend(other.updates);
        self.cancelled.extend(other.cancelled);
        self.terminated.extend(other.terminated);
        self.reset.extend(other.reset);
        self.kept.extend(other.kept);
    }
}

/// One person's requests.
pub(super) struct Traffic {
    doors: Doors,
    /// Past the proxy: for looking only.
    pool: PgPool,
    definition: DefinitionHash,
    rng: Rng,
    known: Vec<Known>,
    unanswered: VecDeque<Unanswered>,
    asked: u64,
    pub(super) promises: Promises,
    pub(super) said: BTreeMap<&'static str, Said>,
    /// Requests that were declined for no good reason, in words.
    pub(super) declined: Vec<String>,
}

impl Traffic {
    pub(super) fn new(doors: Doors, pool: PgPool, definition: DefinitionHash, rng: Rng) -> Self {
        Self {
            doors,
            pool,
            definition,
            rng,
            known: Vec::new(),
            unanswered: VecDeque::new(),
            asked: 0,
            promises: Promises::default(),
            said: Ask::ALL.into_iter().map(|(ask, _)| (ask.text(), Said::default())).collect(),
            declined: Vec::new(),
        }
    }

    /// Asks for this and that until `end`, or until `stop` turns true.
    pub(super) async fn go(&mut self, end: Instant, stop: &watch::Receiver<bool>) {
        let sum: u32 = Ask::ALL.iter().map(|(_, share)| share).sum();
        while Instant::now() < end && !*stop.borrow() {
            let mut draw = self.rng.u32(..sum);
            let ask = Ask::ALL.iter().find(|(_, share)| {
                let here = draw < *share;
                draw = draw.saturating_sub(*share);
                here
            });
            let ask = ask.map_or(Ask::Start, |(ask, _)| *ask);
            let (chosen, door) = (self.rng.usize(..), self.rng.usize(..));
            self.ask_again().await;
            self.ask(ask, chosen, door).await;
            let pause = Duration::from_millis(self.rng.u64(PAUSE_MS));
            tokio::time::sleep(pause).await;
        }
    }

    async fn ask(&mut self, ask: Ask, chosen: usize, door: usize) {
        if ask == Ask::Start {
            return self.start(chosen, door).await;
        }
        let open: Vec<usize> = (0..self.known.len())
            .filter(|i| {
                let known = &self.known[*i];
                let of_interest = !matches!(ask, Ask::Signal | Ask::Update) || !known.signalled;
                // What is kept is left to itself; a fork of it is a run like others.
                (!known.closed && !known.kept && of_interest) || ask == Ask::Fork
            })
            .collect();
        // The oldest is the likeliest to wait for it.
        let chosen = if ask == Ask::Update { 0 } else { chosen % open.len().max(1) };
        let Some(&i) = open.get(chosen) else { return };
        match ask {
            Ask::Fork | Ask::Reset => self.branch(ask, i, door).await,
            Ask::Update => self.update(i).await,
            _ => self.tell(ask, i).await,
        }
    }

    async fn start(&mut self, chosen: usize, door: usize) {
        self.forget_closed().await;
        if self.known.iter().filter(|k| !k.closed).count() + self.unanswered.len() >= OPEN_MAX {
            return;
        }
        let kept = self.known.iter().filter(|k| k.kept).count() + self.unanswered.iter().filter(|u| u.kept).count();
        let kept = chosen.is_multiple_of(8) && kept < KEPT_MAX;
        let (inputs, id) = (json!({ "a": chosen % 4, "b": chosen / 4 % 4 }), self.id());
        let mut body = json!({ "workflow": "chaos", "inputs": inputs, "id": id });
        let begin = match door % 3 {
            0 => Begin::Keyed { path: "/v1/runs".into(), key: id, body },
            1 => {
                body["id_reuse"] = "reject_duplicate".into();
                Begin::Named { body }
            }
            _ => Begin::Start(Box::new(Start {
                run_id: Some(RunId::new()),
                definition: self.definition,
                inputs,
                workflow_id: Some(format!("chaos:{id}")),
                attributes: json!({ "user_id": self.doors.user }),
                queue: String::new(),
                topic: None,
                admission: Admission::default(),
            })),
        };
        self.begin(Unanswered { ask: Ask::Start, begin, of_run: None, kept }).await;
    }

    /// An id that nobody else has.
    fn id(&mut self) -> String {
        self.asked += 1;
        format!("chaos-{}-{}", self.doors.user, self.asked)
    }

    /// A fork, or a reset.
    async fn branch(&mut self, ask: Ask, i: usize, door: usize) {
        let of_run = self.known[i].run;
        // A run that has done nothing yet cannot be forked; one that cannot be read now is left alone.
        let Ok(Ok(view)) = tokio::time::timeout(PATIENCE, self.doors.client.describe(of_run)).await else { return };
        if view.seq == 0 {
            return;
        }
        let seq = self.rng.u64(1..=view.seq);
        let fork = Fork {
            run_id: Some(RunId::new()),
            at: At::Seq(seq),
            inputs: Map::new(),
            attributes: None,
            definition: None,
            reason: "chaos".into(),
        };
        let begin = match (door % 2, ask) {
            (0, _) => {
                let path = format!("/v1/runs/{of_run}/{}", ask.text());
                Begin::Keyed { path, key: self.id(), body: json!({ "at": seq, "reason": "chaos" }) }
            }
            (_, Ask::Reset) => Begin::Reset(of_run, fork),
            _ => Begin::Fork(of_run, fork),
        };
        self.begin(Unanswered { ask, begin, of_run: Some(of_run), kept: false }).await;
    }

    /// Asks for a run. Without an answer it is asked for again later: see [`Self::ask_again`].
    async fn begin(&mut self, request: Unanswered) {
        let doors = self.doors.clone();
        let (hangs_up, after) = (self.rng.u32(..HANG_UP_SHARE) == 0, self.rng.u64(HANG_UP_MS));
        if hangs_up && request.begin.is_rest() {
            // Whatever the answer would have been is lost; what was asked for is perhaps done.
            let sending = doors.begin(&request.begin);
            drop(tokio::time::timeout(Duration::from_millis(after), sending).await);
        }
        let answer = until_answered(async || doors.begin(&request.begin).await).await;
        self.answered(request, answer);
    }

    /// The same request once more, for one that has no answer: what became of it is found out, however late.
    async fn ask_again(&mut self) {
        if let Some(request) = self.unanswered.pop_front() {
            let answer = in_time(self.doors.begin(&request.begin)).await;
            self.answered(request, answer);
        }
    }

    fn answered(&mut self, request: Unanswered, answer: Answer<Begun>) {
        let Unanswered { ask, of_run, kept, .. } = request;
        match answer {
            Answer::Unknown(why) => {
                tracing::debug!(?ask, why, "no answer");
                self.unanswered.push_back(request);
            }
            Answer::Declined(code) => self.is_declined(ask, of_run, code),
            Answer::Acknowledged(Begun { run, found }) => {
                let said = self.said.entry(ask.text()).or_default();
                said.acknowledged += 1;
                said.found += u32::from(found);
                self.promises.runs.push(run);
                if ask == Ask::Reset {
                    self.promises.reset.extend(of_run);
                }
                if kept {
                    self.promises.kept.push(run);
                }
                self.known.push(Known { run, kept, signalled: false, closed: false });
            }
        }
    }

    fn is_declined(&mut self, ask: Ask, run: Option<RunId>, code: String) {
        self.said.entry(ask.text()).or_default().declined += 1;
        if !is_fair(ask, &code) {
            let of_run = run.map_or_else(String::new, |run| format!(" of run {run}"));
            self.declined.push(format!("{}{of_run}: {code}", ask.text()));
        }
    }

    /// A signal that is answered.
    async fn update(&mut self, i: usize) {
        self.asked += 1;
        let (run, id) = (self.known[i].run, format!("chaos-{}", self.asked));
        let update = Update {
            name: "go".into(),
            payload: json!({ "n": self.asked }),
            id: Some(id.clone()),
            sender: Some(format!("user:{}", self.doors.user)),
        };
        let client = self.doors.client.clone();
        let send = async || match client.update(run, update.clone(), UPDATE_WAIT).await {
            Ok(Updated { answer: Answered::Completed { .. }, .. }) => Answer::Acknowledged(()),
            Ok(Updated { answer: Answered::Failed { failure }, .. }) => Answer::Declined(failure.code),
            Ok(Updated { answer: Answered::Rejected { problems }, .. }) => Answer::Declined(problems.join("; ")),
            Err(error @ Error::UpdatePending { .. }) => Answer::Unknown(error.to_string()),
            Err(error) => of(Err(error)),
        };
        if self.settle(Ask::Update, run, send).await {
            self.known[i].signalled = true;
            self.promises.updates.push((run, id));
        }
    }

    async fn tell(&mut self, ask: Ask, i: usize) {
        self.asked += 1;
        let (run, key) = (self.known[i].run, format!("chaos-{}", self.asked));
        let doors = self.doors.clone();
        let (path, body, stored) = match ask {
            Ask::Signal => ("signals", json!({ "name": "go", "payload": { "n": self.asked } }), format!("rest:{key}")),
            Ask::Pause => ("pause", json!({ "reason": "chaos" }), format!("rest:pause:{key}")),
            Ask::Resume => ("resume", json!({ "reason": "chaos" }), format!("rest:resume:{key}")),
            Ask::Cancel => ("cancel", json!({ "reason": "chaos" }), String::new()),
            Ask::Terminate | Ask::Start | Ask::Fork | Ask::Reset | Ask::Update => {
                if self.settle(ask, run, async || of(doors.client.terminate(run, "chaos").await)).await {
                    self.promises.terminated.push(run);
                }
                return;
            }
        };
        let path = format!("/v1/runs/{run}/{path}");
        let post = async || doors.post(&path, Some(&key), &body).await.heard();
        if self.settle(ask, run, post).await {
            match ask {
                Ask::Cancel => self.promises.cancelled.push(run),
                _ => self.promises.messages.push((run, stored)),
            }
            self.known[i].signalled |= ask == Ask::Signal;
        }
    }

    /// Sends a request until somebody answers, or until it was sent often enough. True if it was acknowledged.
    async fn settle(&mut self, ask: Ask, run: RunId, send: impl AsyncFn() -> Answer) -> bool {
        match until_answered(send).await {
            Answer::Acknowledged(()) => {
                self.said.entry(ask.text()).or_default().acknowledged += 1;
                return true;
            }
            Answer::Unknown(why) => {
                self.said.entry(ask.text()).or_default().unknown += 1;
                tracing::debug!(run_id = %run, ?ask, why, "no answer");
            }
            Answer::Declined(code) => self.is_declined(ask, Some(run), code),
        }
        false
    }

    /// Looks which of the known runs have ended. What cannot be seen now is seen later.
    async fn forget_closed(&mut self) {
        let open: Vec<Uuid> = self.known.iter().filter(|k| !k.closed).map(|k| k.run.0).collect();
        let look = sqlx::query_scalar("select run_id from runs where run_id = any($1) and closed_at is null")
            .bind(&open)
            .fetch_all(&self.pool);
        let Ok(Ok(still)) = tokio::time::timeout(PATIENCE, look).await else { return };
        let still: BTreeSet<Uuid> = still.into_iter().collect();
        self.known.iter_mut().filter(|k| open.contains(&k.run.0)).for_each(|k| k.closed = !still.contains(&k.run.0));
    }

    /// After the faults: finds out what has no answer, answers and resumes everything that waits, until all is closed or kept.
    pub(super) async fn settle_all(&mut self) -> Standing {
        for _ in 0..self.unanswered.len() {
            self.ask_again().await;
        }
        self.forget_closed().await;
        let unanswered = self.unanswered.iter().map(|u| format!("{} without an answer: {:?}", u.ask.text(), u.begin));
        let mut standing = Standing { left: unanswered.collect(), ..Standing::default() };
        for i in 0..self.known.len() {
            let (run, kept) = (self.known[i].run, self.known[i].kept);
            if self.known[i].closed {
                continue;
            }
            let view = match self.doors.client.describe(run).await {
                Ok(view) => view,
                Err(error) => {
                    standing.left.push(format!("run {run}: {error}"));
                    continue;
                }
            };
            if view.status.as_str() == "paused" {
                self.tell(Ask::Resume, i).await;
            } else if kept && let Some(waits) = waits_for_nobody(&view) {
                standing.waits.push(waits);
                continue;
            } else if !kept && !self.known[i].signalled {
                self.tell(Ask::Signal, i).await;
            }
            let waits: Vec<String> = view.waiting.iter().map(|w| format!("{w:?}")).collect();
            let live: Vec<&str> = view.live.iter().map(|l| l.path.as_str()).collect();
            standing.left.push(format!("run {run} is {}, waits for {waits:?}, live {live:?}", view.status.as_str()));
        }
        standing
    }
}

/// What is open when nothing goes wrong any more.
#[derive(Default)]
pub(super) struct Standing {
    /// In words: what should have closed.
    pub(super) left: Vec<String>,
    /// What waits, and should.
    pub(super) waits: Vec<Waits>,
}

impl Standing {
    pub(super) fn of(all: Vec<Self>) -> Self {
        all.into_iter().fold(Self::default(), |mut sum, one| {
            sum.left.extend(one.left);
            sum.waits.extend(one.waits);
            sum
        })
    }
}

/// A run that does nothing and waits for signals only: those that its person keeps from it.
fn waits_for_nobody(view: &RunView) -> Option<Waits> {
    let mut signals = Vec::new();
    for waiting in &view.waiting {
        let Waiting::Signal { path, signal, .. } = waiting else { return None };
        signals.push(format!("signal `{signal}` at {path}"));
    }
    (view.live.is_empty() && !signals.is_empty()).then(|| Waits {
        run: view.run_id.to_string(),
        waits_for: signals.join(", "),
        why: "its person never sends it, so that a run waits through all of this".into(),
    })
}

/// Sends a request until somebody answers, or until it was sent often enough.
async fn until_answered<T>(send: impl AsyncFn() -> Answer<T>) -> Answer<T> {
    let mut answer = in_time(send()).await;
    for _ in 1..TRIES {
        if !matches!(answer, Answer::Unknown(_)) {
            break;
        }
        tokio::time::sleep(AGAIN).await;
        answer = in_time(send()).await;
    }
    answer
}

async fn in_time<T>(sending: impl Future<Output = Answer<T>>) -> Answer<T> {
    let answer = tokio::time::timeout(PATIENCE, sending).await;
    answer.unwrap_or_else(|_| Answer::Unknown("no answer in time".into()))
}
