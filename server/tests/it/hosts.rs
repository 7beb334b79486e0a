//! Two hosts: workers in network namespaces of their own, each with its own wire to Postgres and no folder in common. They
//! share the load; the first is cut off in the middle of its work and the second takes over from it; the wire is mended when the first has
//! tried in vain to begin anew, and they share again; the second is killed in the middle of its work and the first takes over from it.
//!
//! Needs root and `ip` for the namespaces. Elsewhere it says that it was left out; with `LOOPWRIGHT_ALL_TESTS` it fails there.

use crate::e2e::{Loop, PATIENCE, audited, binary, folder, rehearsal};
use loopwright_engine::{embedded::testing, ids::RunId, view::RunStatus};
use loopwright_server::app::NOT_YET;
use sqlx::PgPool;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::net::{TcpListener, UnixStream};
use uuid::Uuid;

/// Runs under way at once, as long as the hosts share: more than one of them works on.
const RUNS: usize = 4;

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn words(text: &str) -> Vec<&str> {
    text.split(' ').collect()
}

/// A process that lives in namespaces of its own for network and host name, and the wire to it.
struct Host {
    holder: Child,
    wire: String,
    /// Where this side of the wire listens.
    near: Ipv4Addr,
    worker: Option<Child>,
}

impl Host {
    /// The `n`th host of this process.
    fn new(n: u8) -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "--uts", "sh", "-c"])
            .arg(format!("hostname host{n} && echo there && exec sleep 900"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut there = [0; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut there).unwrap();
        // Short, and of this process: names of interfaces have 15 characters.
        let wire = format!("lw{}n{n}", std::process::id());
        // A network for tests (RFC 2544), cut by the process's id: two test programs at once use different wires.
        let [.., high, low] = std::process::id().to_be_bytes();
        let (near, far) = (Ipv4Addr::new(198, 18, high, (low & 0b0001_1111) * 8 + n * 4 + 1), n);
        let mut octets = near.octets();
        octets[3] += 1;
        let far_address = Ipv4Addr::from(octets);
        let pid = holder.id().to_string();
        let ip = |args: &str| run(Command::new("ip").args(words(args)));
        let inside = |args: &str| run(Command::new("nsenter").args(["--target", &pid, "--net"]).args(words(args)));
        ip(&format!("link add {wire} type veth peer name far{far} netns {pid}"));
        ip(&format!("address add {near}/30 dev {wire}"));
        ip(&format!("link set {wire} up"));
        inside(&format!("ip address add {far_address}/30 dev far{far}"));
        inside(&format!("ip link set far{far} up"));
        inside("ip link set lo up");
        Self { holder, wire, near, worker: None }
    }

    fn wire(&self, state: &str) {
        run(Command::new("ip").args(["link", "set", &self.wire, state]));
    }

    /// A way from the near end of the wire to the tests' Postgres, which listens on a socket file. Returns its port.
    async fn way(&self, pool: &PgPool) -> u16 {
        let options = pool.connect_options();
        let socket = options.get_socket().expect("socket").join(format!(".s.PGSQL.{}", options.get_port()));
        let listener = TcpListener::bind((self.near, 0)).await.expect("listener");
        let port = listener.local_addr().expect("address").port();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let socket = socket.clone();
                tokio::spawn(async move {
                    let mut server = UnixStream::connect(socket).await.expect("server");
                    // A wire that is cut is none of its business.
                    drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
                });
            }
        });
        port
    }

    async fn start_worker(&mut self, pool: &PgPool, dir: &Path) {
        let options = pool.connect_options();
        let (user, database) = (options.get_username(), options.get_database().expect("database"));
        let url = format!("postgres://{user}@{}:{}/{database}", self.near, self.way(pool).await);
        fs::create_dir_all(dir).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let plain = binary(&dir.join("data"), pool);
        let mut inside = Command::new("nsenter");
        inside
            .args(["--target", &self.holder.id().to_string(), "--net", "--uts"])
            .arg(plain.get_program())
            .env_clear()
            .envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("DATABASE_URL", url)
            .env("LOOPWRIGHT_WORKER_LEASE_MS", "2000")
            .env("LOOPWRIGHT_WORKER_SLOTS", "2")
            .args(["worker", "--rehearsal"])
            .arg(rehearsal());
        self.worker = Some(inside.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    /// As a power cut does it.
    fn kill_worker(&mut self) {
        let mut worker = self.worker.take().expect("a worker");
        assert!(worker.try_wait().unwrap().is_none(), "it works");
        worker.kill().unwrap();
        worker.wait().unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in self.worker.iter_mut().chain([&mut self.holder]) {
            drop(child.kill());
            drop(child.wait());
        }
        // The wire goes with the last process of its far end, a moment later or now.
        drop(Command::new("ip").args(["link", "delete", &self.wire]).stderr(Stdio::null()).status());
    }
}

/// Whether this machine lets us make hosts.
fn possible() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let works = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    root && works(Command::new("ip").arg("-V"))
        && works(Command::new("nsenter").arg("-V"))
        && works(Command::new("unshare").args(["--net", "--uts", "true"]))
}

/// What one host's worker has under way: by run, how far its history is.
type Work = BTreeMap<Uuid, i64>;

/// The runs that a host's worker owns and has an attempt of.
async fn busy(pool: &PgPool, host: &str) -> Work {
    let sql = "select r.run_id, r.seq from runs r join workers w on w.id = r.owner
               where w.host = $1 and r.closed_at is null
                 and exists (select from activity_attempts a where a.run_id = r.run_id and a.state = 'running')";
    sqlx::query_as::<_, (Uuid, i64)>(sql).bind(host).fetch_all(pool).await.unwrap().into_iter().collect()
}

/// Whether an attempt of this work was lost and the run went on, by whoever else reaches Postgres.
async fn was_taken(pool: &PgPool, work: &Work) -> bool {
    let sql = "select exists (
                 select from history l cross join jsonb_array_elements(l.events) x
                   join history s on s.run_id = l.run_id and s.seq > l.seq cross join jsonb_array_elements(s.events) y
                 where l.run_id = $1 and l.seq > $2 and x->>'type' = 'attempt_ended' and x->>'outcome' = 'lost'
                   and y->>'type' = 'attempt_ended' and y->>'outcome' = 'succeeded')";
    for (run, seq) in work {
        if sqlx::query_scalar::<_, bool>(sql).bind(run).bind(seq).fetch_one(pool).await.unwrap() {
            return true;
        }
    }
    false
}

/// Whether the worker of a folder has said so.
fn said(dir: &Path, text: &str) -> bool {
    fs::read_to_string(dir.join("log")).unwrap().contains(text)
}

/// How far the story is.
#[derive(Debug)]
enum Scene {
    /// Until both have work.
    Shared,
    /// The first is cut off from this work, until some of it went on, as only the second is there, and until the first has tried to begin
    /// anew.
    Cut(Work),
    /// The wire is whole, until both have work again.
    Mended,
    /// The second was killed in the middle of this work, until some of it went on: only the first is there.
    Killed(Work),
    /// Until everything is done.
    Taken,
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_share_the_load_and_take_over_from_each_other() {
    if !possible() {
        return testing::left_out("two hosts", "network namespaces need root and the programs ip, unshare and nsenter");
    }
    let pool = testing::database(crate::support::MIGRATIONS).await;
    let dir = folder();
    let mut loops = Vec::new();
    let mut hosts = [Host::new(0), Host::new(1)];
    for (n, host) in hosts.iter_mut().enumerate() {
        host.start_worker(&pool, &dir.path().join(n.to_string())).await;
    }
    let mut scene = Scene::Shared;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let mut open = 0;
        for it in &loops {
            let it: &Loop = it;
            let view = it.view().await;
            assert!(!view.status.is_closed() || view.status == RunStatus::Completed, "{:?}", view.failure);
            open += usize::from(!view.status.is_closed());
            it.play_the_owner(&view).await;
        }
        if matches!(scene, Scene::Shared | Scene::Mended) && open < RUNS {
            loops.push(Loop::start(&pool, RunId::new()).await);
            continue;
        }
        let (first, second) = (busy(&pool, "host0").await, busy(&pool, "host1").await);
        scene = match scene {
            Scene::Shared if !first.is_empty() && !second.is_empty() => {
                hosts[0].wire("down");
                // What it had to say is said: from now on nothing of it comes through.
                Scene::Cut(busy(&pool, "host0").await)
            }
            Scene::Cut(work) if work.is_empty() => {
                // It had just ended: nothing was cut off.
                hosts[0].wire("up");
                Scene::Shared
            }
            Scene::Cut(work) if was_taken(&pool, &work).await && said(&dir.path().join("0"), NOT_YET) => {
                hosts[0].wire("up");
                Scene::Mended
            }
            Scene::Mended if !first.is_empty() && !second.is_empty() => {
                hosts[1].kill_worker();
                let work = busy(&pool, "host1").await;
                if work.is_empty() {
                    hosts[1].start_worker(&pool, &dir.path().join("again")).await;
                    Scene::Mended
                } else {
                    Scene::Killed(work)
                }
            }
            Scene::Killed(work) if was_taken(&pool, &work).await => Scene::Taken,
            same => same,
        };
        if open == 0 && matches!(scene, Scene::Taken) {
            break;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{scene:?}: {open} runs are open; the first has {first:?}, the second {second:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut commits = BTreeSet::new();
    for it in &loops {
        let (made, ..) = it.facts(&pool).await;
        assert_eq!(made.len(), 1, "the head of its project");
        commits.extend(made);
    }
    assert_eq!(commits.len(), loops.len());
    audited(&pool).await;
}
