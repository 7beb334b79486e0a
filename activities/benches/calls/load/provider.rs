//! The fake provider as a process of its own: its processor time is visible, and it says when it had what.

use super::{Options, Result, host::monotonic_ns};
use loopwright_activities::testing::{Dialect, Endpoint, FakeProvider, Fault, Reply, Seen, Told, When};
use loopwright_engine::bench::cpu_of;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::Read,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// Makes this program the provider: JSON of a [`Task`]. With an underscore: what begins with the product's name is
/// configuration, and an unknown one is refused.
const CHILD: &str = "_LOOPWRIGHT_BENCH_PROVIDER";
/// What goes wrong, in turn.
const FAULTS: [Fault; 5] =
    [Fault::RateLimited(None), Fault::HtmlError, Fault::ResetMidBody, Fault::NoFinishReason, Fault::CloseBeforeHeaders];
/// Keys of each provider: a limit that one of them meets leaves the model to the others.
const KEYS: usize = 4;
/// How a question names itself, up to a colon.
pub const QUESTION: &str = "question ";
/// Before what the child says; it may share its output with a test harness.
const ENVIRONMENT: &str = "environment: ";
const SPANS: &str = "spans: ";
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
struct Task {
    think_us: u64,
    faults_percent: usize,
}

/// What the provider did with one question, in nanoseconds of the machine's monotonic clock.
#[derive(Serialize, Deserialize)]
pub struct Span {
    pub question: String,
    /// It had read the whole request, and made nothing of it yet.
    pub received_ns: u64,
    /// It handed over the last bytes of its answer.
    pub written_ns: u64,
    pub spoiled: bool,
}

/// If this process was started as the provider: serves until its standard input ends, then tells its spans and returns true.
///
/// # Errors
/// When it does not understand its task.
pub async fn child() -> Result<bool> {
    let Ok(text) = std::env::var(CHILD) else { return Ok(false) };
    let task: Task = serde_json::from_str(&text)?;
    // A fifth of what such a call may cost at most, so that the first hold of an attempt does not last to its end.
    let usage = Told { prompt: 1_000, output: 700, ..Told::default() };
    let fake = FakeProvider::saying(Reply::text("an answer of some words").with_usage(Some(usage))).await;
    // So many of the questions of a dialect before the n-th are spoiled.
    let spoiled = move |n: usize| n * task.faults_percent / 100;
    for (nth, fault) in FAULTS.into_iter().enumerate() {
        let pick = move |seen: &Seen, n: usize| {
            matches!(seen.endpoint, Endpoint::Generate { .. })
                && spoiled(n) != spoiled(n + 1)
                && spoiled(n) % FAULTS.len() == nth
        };
        fake.inject(When::picked(pick), fault);
    }
    let mean = Duration::from_micros(task.think_us);
    if !mean.is_zero() {
        // Half to one and a half of the mean.
        fake.think(move || mean / 2 + mean.mul_f64(fastrand::f64()));
    }
    let environment: BTreeMap<_, _> =
        fake.environment(&[Dialect::Gemini, Dialect::OpenRouter], "sk-bench-0123456789abcdef").into_iter().collect();
    println!("\n{ENVIRONMENT}{}", serde_json::to_string(&environment)?);
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    println!("\n{SPANS}{}", serde_json::to_string(&spans(&fake))?);
    Ok(true)
}

fn spans(fake: &FakeProvider) -> Vec<Span> {
    let (now, now_ns) = (Instant::now(), monotonic_ns());
    let ns = |at: Instant| now_ns.saturating_sub(u64::try_from((now - at).as_nanos()).unwrap_or(u64::MAX));
    let all = fake.seen().into_iter().zip(fake.journal());
    let asked = all.filter(|(seen, _)| matches!(seen.endpoint, Endpoint::Generate { .. }));
    asked
        .map(|(seen, entry)| {
            let text = seen.body.to_string();
            let name = text.split_once(QUESTION).and_then(|(_, rest)| rest.split_once(':')).map(|(name, _)| name);
            Span {
                question: name.unwrap_or_default().to_owned(),
                received_ns: ns(entry.received_at),
                written_ns: ns(entry.written_at.unwrap_or(entry.received_at)),
                spoiled: entry.answered != "reply",
            }
        })
        .collect()
}

/// The running provider.
pub struct Provider {
    child: Child,
    // Its end is the child's signal to tell.
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    environment: BTreeMap<String, String>,
}

impl Provider {
    /// Starts one that takes `think` for an answer, on average.
    pub async fn start(options: &Options, think: Duration) -> Result<Self> {
        let think_us = u64::try_from(think.as_micros())?;
        let task = Task { think_us, faults_percent: options.faults_percent };
        let mut child = Command::new(std::env::current_exe()?)
            .args(&options.child_arguments)
            .env(CHILD, serde_json::to_string(&task)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().ok_or("the provider's process has no output")?;
        let lines = BufReader::new(stdout).lines();
        let mut provider = Self { child, stdin, lines, environment: BTreeMap::new() };
        let environment = provider.told(ENVIRONMENT).await?;
        provider.environment = serde_json::from_str(&environment)?;
        for dialect in [Dialect::Gemini, Dialect::OpenRouter] {
            let one = dialect.key_setting();
            let key = provider.environment.get(one).cloned().unwrap_or_default();
            let several: Vec<String> = (1..KEYS).map(|n| format!("{key}-{n}")).collect();
            provider.environment.insert(format!("{one}S"), several.join(","));
        }
        Ok(provider)
    }

    /// The settings that point the product at it.
    pub fn environment(&self) -> &BTreeMap<String, String> {
        &self.environment
    }

    /// Processor time so far.
    pub fn cpu(&self) -> Duration {
        self.child.id().and_then(cpu_of).unwrap_or_default()
    }

    /// Ends it and hears what it did.
    pub async fn stop(mut self) -> Result<Vec<Span>> {
        drop(self.stdin.take());
        let spans = self.told(SPANS).await?;
        self.child.wait().await?;
        Ok(serde_json::from_str(&spans)?)
    }

    /// The rest of the line that begins so.
    async fn told(&mut self, mark: &str) -> Result<String> {
        let found = async {
            while let Some(line) = self.lines.next_line().await? {
                if let Some(rest) = line.strip_prefix(mark) {
                    return Ok(rest.to_owned());
                }
            }
            Err(format!("the provider's process ended without {mark:?}").into())
        };
        tokio::time::timeout(PATIENCE, found).await?
    }
}
