//! The people outside: they start, signal, update, cancel, terminate, pause, resume, fork and reset runs, and remember what was
//! acknowledged to them.

use super::report::{Said, Waits};
use fastrand::Rng;
use loopwright_engine::{
    Error,
    admission::Admission,
    client::{At, Client, Fork, Start, Update},
    ids::{DefinitionHash, RunId},
    transaction::is_transient,
    view::{Answer as Answered, RunView, Updated, Waiting},
};
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
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
/// Sendings of one request; then it is unknown whether it arrived.
const TRIES: u32 = 6;
/// Between two of them.
const AGAIN: Duration = Duration::from_millis(400);
/// How long an update waits for its answer; then it is asked for again.
const UPDATE_WAIT: Duration = Duration::from_millis(1_500);
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(8);

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

/// What the product says to a request that comes too late, to a fork at an end, or to a reset of a run that was reset. Nothing else
/// makes sense to somebody who has a run.
const FAIR: [&str; 3] = ["run_closed", "fork_invalid", "update.unanswered"];

/// How a request ended.
enum Answer {
    Acknowledged,
    /// By code; what the product says to a request that makes no sense.
    Declined(String),
    /// No answer, or one that says "later": it may have happened.
    Unknown(String),
}

/// Somebody who has runs.
pub(super) struct User {
    pub(super) id: Uuid,
    pub(super) token: String,
}

struct Known {
    run: RunId,
    /// Its start was acknowledged; otherwise it may not exist.
    certain: bool,
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
    /// The engine's own door, past the faults of the wire but not of Postgres: for what REST does not offer.
    client: Client,
    pool: PgPool,
    http: reqwest::Client,
    server: SocketAddr,
    user: User,
    definition: DefinitionHash,
    rng: Rng,
    known: Vec<Known>,
    asked: u64,
    pub(super) promises: Promises,
    pub(super) said: BTreeMap<&'static str, Said>,
    /// Requests that were declined for a reason that is not [`FAIR`], in words.
    pub(super) declined: Vec<String>,
}

impl Traffic {
    pub(super) fn new(
        client: Client,
        pool: PgPool,
        server: SocketAddr,
        user: User,
        definition: DefinitionHash,
        rng: Rng,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            client,
            pool,
            http: reqwest::Client::builder().timeout(PATIENCE).build()?,
            server,
            user,
            definition,
            rng,
            known: Vec::new(),
            asked: 0,
            promises: Promises::default(),
            said: Ask::ALL.into_iter().map(|(ask, _)| (ask.text(), Said::default())).collect(),
            declined: Vec::new(),
        })
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
            let chosen = self.rng.usize(..);
            self.ask(ask, chosen).await;
            let pause = Duration::from_millis(self.rng.u64(PAUSE_MS));
            tokio::time::sleep(pause).await;
        }
    }

    async fn ask(&mut self, ask: Ask, chosen: usize) {
        if ask == Ask::Start {
            return self.start(chosen).await;
        }
        let open: Vec<usize> = (0..self.known.len())
            .filter(|i| {
                let known = &self.known[*i];
                let of_interest = !matches!(ask, Ask::Signal | Ask::Update) || !known.signalled;
                // What is kept is left to itself; a fork of it is a run like others.
                known.certain && ((!known.closed && !known.kept && of_interest) || ask == Ask::Fork)
            })
            .collect();
        // The oldest is the likeliest to wait for it.
        let chosen = if ask == Ask::Update { 0 } else { chosen % open.len().max(1) };
        let Some(&i) = open.get(chosen) else { return };
        match ask {
            Ask::Fork | Ask::Reset => self.branch(ask, i).await,
            Ask::Update => self.update(i).await,
            _ => self.tell(ask, i).await,
        }
    }

    async fn start(&mut self, chosen: usize) {
        self.forget_closed().await;
        if self.known.iter().filter(|k| !k.closed).count() >= OPEN_MAX {
            return;
        }
        let run = RunId::new();
        let kept = chosen.is_multiple_of(8) && self.known.iter().filter(|k| k.kept).count() < KEPT_MAX;
        let start = Start {
            run_id: Some(run),
            definition: self.definition,
            inputs: json!({ "a": chosen % 4, "b": chosen / 4 % 4 }),
            workflow_id: Some(format!("chaos:{run}")),
            attributes: json!({ "user_id": self.user.id }),
            queue: String::new(),
            topic: None,
            admission: Admission::default(),
        };
        let client = self.client.clone();
        let acknowledged = self.settle(Ask::Start, run, async || of(client.start(start.clone()).await)).await;
        self.made(run, kept, acknowledged);
    }

    /// A fork, or a reset.
    async fn branch(&mut self, ask: Ask, i: usize) {
        let (of_run, run) = (self.known[i].run, RunId::new());
        // A run that has done nothing yet cannot be forked; one that cannot be read now is left alone.
        let Ok(Ok(view)) = tokio::time::timeout(PATIENCE, self.client.describe(of_run)).await else { return };
        if view.seq == 0 {
            return;
        }
        let at = At::Seq(self.rng.u64(1..=view.seq));
        let fork = Fork {
            run_id: Some(run),
            at,
            inputs: Map::new(),
            attributes: None,
            definition: None,
            reason: "chaos".into(),
        };
        let client = self.client.clone();
        let acknowledged = if ask == Ask::Reset {
            self.settle(ask, run, async || of(client.reset(of_run, fork.clone()).await)).await
        } else {
            self.settle(ask, run, async || of(client.fork(of_run, fork.clone()).await)).await
        };
        if ask == Ask::Reset && acknowledged {
            self.promises.reset.push(of_run);
        }
        self.made(run, false, acknowledged);
    }

    /// A signal that is answered.
    async fn update(&mut self, i: usize) {
        self.asked += 1;
        let (run, id) = (self.known[i].run, format!("chaos-{}", self.asked));
        let update = Update {
            name: "go".into(),
            payload: json!({ "n": self.asked }),
            id: Some(id.clone()),
            sender: Some(format!("user:{}", self.user.id)),
        };
        let client = self.client.clone();
        let send = async || match client.update(run, update.clone(), UPDATE_WAIT).await {
            Ok(Updated { answer: Answered::Completed { .. }, .. }) => Answer::Acknowledged,
            Ok(Updated { answer: Answered::Failed { failure }, .. }) => Answer::Declined(failure.code),
            Ok(Updated { answer: Answered::Rejected { problems }, .. }) => Answer::Declined(problems.join("; ")),
            Err(error @ Error::UpdatePending { .. }) => Answer::Unknown(error.to_string()),
            Err(error) => of::<()>(Err(error)),
        };
        if self.settle(Ask::Update, run, send).await {
            self.known[i].signalled = true;
            self.promises.updates.push((run, id));
        }
    }

    /// A run that exists, or may.
    fn made(&mut self, run: RunId, kept: bool, certain: bool) {
        if certain {
            self.promises.runs.push(run);
        }
        if kept {
            self.promises.kept.push(run);
        }
        self.known.push(Known { run, certain, kept, signalled: false, closed: false });
    }

    async fn tell(&mut self, ask: Ask, i: usize) {
        self.asked += 1;
        let (run, key) = (self.known[i].run, format!("chaos-{}", self.asked));
        let token = self.user.token.clone();
        let (path, body, stored) = match ask {
            Ask::Signal => ("signals", json!({ "name": "go", "payload": { "n": self.asked } }), format!("rest:{key}")),
            Ask::Pause => ("pause", json!({ "reason": "chaos" }), format!("rest:pause:{key}")),
            Ask::Resume => ("resume", json!({ "reason": "chaos" }), format!("rest:resume:{key}")),
            Ask::Cancel => ("cancel", json!({ "reason": "chaos" }), String::new()),
            Ask::Terminate | Ask::Start | Ask::Fork | Ask::Reset | Ask::Update => {
                let client = self.client.clone();
                if self.settle(ask, run, async || of(client.terminate(run, "chaos").await)).await {
                    self.promises.terminated.push(run);
                }
                return;
            }
        };
        let (http, url) = (self.http.clone(), format!("http://{}/v1/runs/{run}/{path}", self.server));
        let post = async || {
            let request = http.post(&url).bearer_auth(&token).header("idempotency-key", &key).json(&body);
            match request.send().await {
                Ok(response) => of_rest(response).await,
                Err(error) => Answer::Unknown(error.to_string()),
            }
        };
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
        let mut answer = Answer::Unknown(String::new());
        for n in 0..TRIES {
            if n > 0 {
                tokio::time::sleep(AGAIN).await;
            }
            answer = match tokio::time::timeout(PATIENCE, send()).await {
                Ok(answer) => answer,
                Err(_) => Answer::Unknown("no answer in time".into()),
            };
            if !matches!(answer, Answer::Unknown(_)) {
                break;
            }
        }
        let said = self.said.entry(ask.text()).or_default();
        match &answer {
            Answer::Acknowledged => said.acknowledged += 1,
            Answer::Unknown(why) => {
                said.unknown += 1;
                tracing::debug!(run_id = %run, ?ask, why, "no answer");
            }
            Answer::Declined(code) => {
                said.declined += 1;
                if !FAIR.contains(&code.as_str()) {
                    self.declined.push(format!("{} of run {run}: {code}", ask.text()));
                }
                return false;
            }
        }
        matches!(answer, Answer::Acknowledged)
    }

    /// Looks which of the known runs have ended, or never were. What cannot be seen now is seen later.
    async fn forget_closed(&mut self) {
        let open: Vec<Uuid> = self.known.iter().filter(|k| !k.closed).map(|k| k.run.0).collect();
        let look = sqlx::query_scalar("select run_id from runs where run_id = any($1) and closed_at is null")
            .bind(&open)
            .fetch_all(&self.pool);
        let Ok(Ok(still)) = tokio::time::timeout(PATIENCE, look).await else { return };
        let still: BTreeSet<Uuid> = still.into_iter().collect();
        self.known.iter_mut().filter(|k| open.contains(&k.run.0)).for_each(|k| k.closed = !still.contains(&k.run.0));
    }

    /// After the faults: answers and resumes everything that waits, until all is closed or kept.
    pub(super) async fn settle_all(&mut self) -> Standing {
        self.forget_closed().await;
        let mut standing = Standing::default();
        for i in 0..self.known.len() {
            let (run, kept) = (self.known[i].run, self.known[i].kept);
            if self.known[i].closed {
                continue;
            }
            let view = match self.client.describe(run).await {
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

fn of<T>(done: Result<T, Error>) -> Answer {
    match done {
        Ok(_) => Answer::Acknowledged,
        Err(Error::Sql(error)) if is_transient(&error) => Answer::Unknown(error.to_string()),
        // It moved meanwhile: ask again.
        Err(error @ (Error::LeaseLost | Error::InDoubt(_))) => Answer::Unknown(error.to_string()),
        Err(error) => Answer::Declined(error.code().to_owned()),
    }
}

async fn of_rest(response: reqwest::Response) -> Answer {
    let status = response.status();
    if status.is_success() {
        return Answer::Acknowledged;
    }
    let body: Value = response.json().await.unwrap_or_default();
    let code = body["code"].as_str().unwrap_or("no code").to_owned();
    match (status.as_u16(), code.as_str()) {
        (429 | 503, _) => Answer::Unknown(code),
        _ => Answer::Declined(code),
    }
}
