//! `loopwright chaos`: a real Postgres, a real server and real workers under faults, and an audit of what they leave.
//!
//! ```text
//! traffic (three people) ──REST──▶ server process ──TCP──▶ proxy ──▶ Postgres of our own (fsync on)
//!    └── the engine's client ──────────────────────TCP──▶ proxy ───────┤
//!                                 worker processes ──TCP──▶ proxy ─────┘
//!                              └── idempotency keys ──▶ recorder
//! faults: SIGKILL · SIGSTOP beyond the lease · immediate shutdown of Postgres · wire cut, slow
//! then calm: everything closes or waits ──▶ audit (SQL, recorder, what was acknowledged) ──▶ report
//! ```
//!
//! Loopback and a folder of its own only; ends by itself; ends only processes that it started. A seed makes the same
//! choices; what they meet is a matter of timing.

mod audit;
mod doors;
mod faults;
mod process;
mod proxy;
mod recorder;
mod report;
mod traffic;
mod work;

use super::{Context, EXIT_FAILED, EXIT_INTERRUPTED};
use crate::{
    app::{self, App},
    config::{Config, Key, KeyMaterial},
    postgres::{self, Fallback},
};
use anyhow::Context as _;
use audit::{Ended, Evidence};
use doors::Doors;
use fastrand::Rng;
use faults::{LEASE_MS, Postgres, Stage};
use futures_util::future::join_all;
use loopwright_engine::{
    client::{Client, Deploy},
    definition::Bundle,
    ids::DefinitionHash,
};
use loopwright_workflows::{Compiled, compile, render};
use process::Recipe;
use proxy::Proxy;
use recorder::Recorder;
use report::{Report, Waits};
use sqlx::PgPool;
use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use traffic::{PATIENCE, Standing, Traffic};

/// Worker processes.
const WORKERS: usize = 3;
/// Attempts at once in each.
const SLOTS: usize = 4;
/// People who ask for things.
const PEOPLE: usize = 3;
/// Credits of each: more than all runs of an hour cost.
const CREDITS: u32 = 100_000;
/// Longest time of faults, in minutes.
const MINUTES_MAX: f64 = 60.0;
/// After the last fault everything is closed, or waits, within that time. Leases, retries and timers are seconds; two cores with
/// a load of 18 took 62 s.
const CALM_MAX: Duration = Duration::from_secs(240);
/// Between two words about what is still open.
const TELL: Duration = Duration::from_secs(5);
/// Between two looks at what is still open.
const LOOK: Duration = Duration::from_millis(200);

/// The run and its child, in the order in which they are deployed.
const DEFINITIONS: [(&str, &str); 2] =
    [("part.yaml", include_str!("part.yaml")), ("chaos.yaml", include_str!("chaos.yaml"))];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long things go wrong
    #[arg(long, value_name = "N", default_value = "2", value_parser = minutes)]
    minutes: Duration,
    /// Make the choices of an earlier round again [default: others each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Be a worker of another such process, whose recorder listens there
    #[arg(long, value_name = "SOCKET", hide = true)]
    worker_of: Option<PathBuf>,
}

fn minutes(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes > 0.0 && minutes <= MINUTES_MAX => Ok(Duration::from_secs_f64(minutes * 60.0)),
        _ => Err(format!("a number above 0, at most {MINUTES_MAX}")),
    }
}

pub(crate) async fn run(args: Args, context: Context) -> anyhow::Result<u8> {
    let stop = app::stop_on_signal()?;
    if let Some(recorder) = args.worker_of {
        work::run(context, recorder, stop).await?;
        return Ok(0);
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let folder = tempfile::Builder::new().prefix("loopwright-chaos-").tempdir()?;
    // The account that runs Postgres has to get through.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
    eprintln!("seed {seed}: {} s of faults, then an audit", args.minutes.as_secs());
    let report = round(seed, args.minutes, folder.path(), &stop).await;
    let ok = report.as_ref().is_ok_and(|report| report.as_ref().is_none_or(|report| report.ok));
    if !ok {
        let kept = folder.keep();
        eprintln!("logs are kept in {}", kept.display());
    }
    let Some(report) = report? else {
        eprintln!("stopped");
        return Ok(EXIT_INTERRUPTED);
    };
    if context.json {
        eprintln!("{}", report.text());
    }
    super::print(context.json, &report, Report::text)?;
    Ok(if report.ok { 0 } else { EXIT_FAILED })
}

/// One round, from nothing to its report. `None` when somebody stopped it.
async fn round(
    seed: u64,
    time: Duration,
    folder: &Path,
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<Option<Report>> {
    let mut rng = Rng::with_seed(seed);
    let postgres = Postgres::start(folder).await?;
    // Whoever knows it may pass: Postgres trusts the socket behind the proxy, and this machine has other accounts.
    let pass = format!("chaos-{:032x}", fastrand::u128(..));
    let proxy = Proxy::start(&postgres.socket, &pass).await?;
    let recorder = Recorder::start(folder)?;
    let app = App::open_migrated(config(&postgres.url, folder)?, Fallback::None).await?;
    let definition = deploy(&app.client, &recorder).await?;
    let listen = free_address()?;
    let through = format!("postgres://loopwright@{}/loopwright?sslmode=disable&application_name={pass}", proxy.address);
    let workers = (0..WORKERS).map(|n| worker(n, &through, folder, &recorder.socket)).collect();
    let mut stage =
        Stage::new(postgres, proxy, workers, server(&through, folder, listen, &app.config)?, folder, app.pool.clone());
    stage.keep().await?;
    // People do not ask past the faults either.
    let outside = postgres::open(&config(&through, folder)?, Fallback::None).await?;
    let client = Client::new(outside.pool.clone(), app.hook.clone()).waiting(PATIENCE);
    let http = reqwest::Client::builder().timeout(PATIENCE).build()?;
    let mut people = Vec::new();
    for n in 0..PEOPLE {
        let user = app.store.user_of("chaos", &format!("person-{n}"), "chaos").await?.id;
        let auth = app.config.auth.clone();
        let doors = Doors { client: client.clone(), http: http.clone(), server: listen, user, auth };
        let rng = Rng::with_seed(seed.wrapping_add(1 + n as u64));
        people.push(Traffic::new(doors, app.pool.clone(), definition, rng));
    }

    let end = Instant::now() + time;
    let going = join_all(people.iter_mut().map(|person| person.go(end, stop)));
    let (injected, _) = tokio::join!(stage.inject(&mut rng, end, stop), going);
    injected?;
    let began = Instant::now();
    let standing = settle(&mut stage, &mut people, stop).await?;
    let report = if *stop.borrow() {
        None
    } else {
        let settled = standing.left.is_empty().then(|| began.elapsed());
        let evidence = evidence(time, standing.left, &mut stage, &recorder, people).await?;
        let ended_by_itself = stage.processes().map(|process| process.ended_by_itself).sum();
        Some(report(seed, settled, standing.waits, ended_by_itself, evidence, &app.pool).await?)
    };
    for process in stage.processes() {
        process.kill(Duration::ZERO)?;
    }
    outside.pool.close().await;
    app.close().await;
    stage.postgres.stop().await;
    Ok(report)
}

/// No faults any more: waits until everything is closed or waits, at most [`CALM_MAX`].
async fn settle(stage: &mut Stage, people: &mut [Traffic], stop: &watch::Receiver<bool>) -> anyhow::Result<Standing> {
    let end = Instant::now() + CALM_MAX;
    let mut tell = Instant::now() + TELL;
    stage.calm().await?;
    loop {
        stage.keep().await?;
        let standing = Standing::of(join_all(people.iter_mut().map(Traffic::settle_all)).await);
        if tell <= Instant::now() {
            tracing::info!(open = standing.left.len(), first = standing.left.first(), "settling");
            tell = Instant::now() + TELL;
        }
        let up = stage.processes().all(|process| process.is_up());
        if (standing.left.is_empty() && up) || Instant::now() > end || *stop.borrow() {
            return Ok(standing);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Asks the processes to end, and gathers what is known besides what is in the database.
async fn evidence(
    time: Duration,
    left: Vec<String>,
    stage: &mut Stage,
    recorder: &Recorder,
    people: Vec<Traffic>,
) -> anyhow::Result<Evidence> {
    let mut processes = Vec::new();
    for process in stage.processes() {
        let in_order = process.stop().await?;
        let log = std::fs::read(process.log()).with_context(|| process.log().display().to_string())?;
        let log = String::from_utf8_lossy(&log).into_owned();
        processes.push(Ended { name: process.name().into(), in_order, signals: process.died.clone(), log });
    }
    let (faults, seen) = (stage.faults.clone(), recorder.seen());
    let mut evidence = Evidence { time, left, processes, faults, seen, ..Evidence::default() };
    for person in people {
        evidence.promises.add(person.promises);
        evidence.declined.extend(person.declined);
        for (ask, said) in person.said {
            evidence.requests.entry(ask).or_default().add(said);
        }
    }
    Ok(evidence)
}

async fn report(
    seed: u64,
    settled: Option<Duration>,
    waits: Vec<Waits>,
    ended_by_itself: u32,
    evidence: Evidence,
    pool: &PgPool,
) -> anyhow::Result<Report> {
    let mut conn = pool.acquire().await?;
    let (effects, violations) = audit::run(&mut conn, &evidence).await?;
    let counts =
        "select case when closed_at is null then 'waits for ' || coalesce(waiting, status) else status end, count(*)
                  from runs group by 1";
    let attempts = "select e->>'outcome', count(*) from history, jsonb_array_elements(events) e
                    where e->>'type' = 'attempt_ended' group by 1";
    let runs: Vec<(String, i64)> = sqlx::query_as(counts).fetch_all(&mut *conn).await?;
    let attempts: Vec<(String, i64)> = sqlx::query_as(attempts).fetch_all(&mut *conn).await?;
    let ok = violations.is_empty();
    Ok(Report {
        seed,
        seconds: evidence.time.as_secs(),
        settled_ms: settled.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        faults: evidence.faults,
        ended_by_itself,
        requests: evidence.requests,
        runs: runs.into_iter().collect(),
        waits,
        attempts: attempts.into_iter().collect(),
        effects,
        checks: audit::names(),
        violations,
        ok,
    })
}

/// A configuration of our own, nothing of this machine's: a database, a folder and a key of our own.
fn config(url: &str, folder: &Path) -> anyhow::Result<Config> {
    let mut config = Config::with_database(url, folder.to_owned())?;
    let secret = format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
    config.auth.keys.push(Key { kid: "default".into(), material: KeyMaterial::Hs256(secret.into()) });
    config.billing.welcome_credits = CREDITS;
    Ok(config)
}

/// Deploys both definitions; gives the one that is started.
async fn deploy(client: &Client, recorder: &Recorder) -> anyhow::Result<DefinitionHash> {
    let catalog = work::registry(recorder.socket.clone()).catalog();
    let mut last = None;
    for (file, text) in DEFINITIONS {
        let (compiled, found) = compile(text, file, &Bundle::new(), &catalog);
        let Compiled { definition, bundle } = compiled.with_context(|| render(&found, text))?;
        let deploy = Deploy { definition, bundle, source: text.into(), author: None, message: None };
        last = Some(client.deploy(deploy).await?.hash);
    }
    last.context("no definition")
}

/// A loopback address that was free a moment ago, and that the server takes again and again.
fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn worker(n: usize, database: &str, folder: &Path, recorder: &Path) -> Recipe {
    let name = format!("worker-{}", n + 1);
    let arguments = ["chaos".into(), "--worker-of".into(), recorder.display().to_string()];
    let mut environment = environment(database, &folder.join(&name));
    environment.push(("LOOPWRIGHT_WORKER_LEASE_MS", LEASE_MS.to_string()));
    environment.push(("LOOPWRIGHT_WORKER_SLOTS", SLOTS.to_string()));
    Recipe { name, arguments: arguments.to_vec(), environment }
}

fn server(database: &str, folder: &Path, listen: SocketAddr, config: &Config) -> anyhow::Result<Recipe> {
    let secret = config.auth.keys.iter().find_map(|key| match &key.material {
        KeyMaterial::Hs256(secret) => Some(secrecy::ExposeSecret::expose_secret(secret).to_owned()),
        _ => None,
    });
    let name = "server".to_owned();
    let mut environment = environment(database, &folder.join(&name));
    environment.push(("LOOPWRIGHT_JWT_SECRET", secret.context("a key of our own")?));
    // We are three, and fast.
    environment.push(("LOOPWRIGHT_REQUESTS_PER_MINUTE", "60000".into()));
    Ok(Recipe { name, arguments: vec!["server".into(), "--listen".into(), listen.to_string()], environment })
}

fn environment(database: &str, folder: &Path) -> Vec<(&'static str, String)> {
    vec![("DATABASE_URL", database.to_owned()), ("LOOPWRIGHT_DATA_DIR", folder.display().to_string())]
}
