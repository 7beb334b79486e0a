//! A way to the server that tests break: a proxy on the loopback, between a pool and the real Postgres.

use loopwright_engine::transaction::session;
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

/// What a way loses, once, with the connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lost {
    /// A COMMIT before it arrives.
    Commit,
    /// The answer to a COMMIT that was done.
    Answer,
}

/// The next fault.
struct Fault {
    lost: Lost,
    /// Only a COMMIT of a transaction in which a statement with this word was sent. Statements that a session has prepared before
    /// do not say their words again: see [`Way::pool_that_says_all`].
    word: &'static [u8],
    /// Nobody gets through afterwards.
    then_away: bool,
}

/// A message that is on its way until the test lets it go on.
#[derive(Clone, Default)]
pub struct Held {
    pub arrived: CancellationToken,
    pub goes_on: CancellationToken,
}

#[derive(Default)]
struct State {
    fault: Mutex<Option<Fault>>,
    /// Sessions that the server has refused: it has no more places, or the role may not log in.
    refused: AtomicU32,
    /// Connections that came while the server was away.
    turned_away: AtomicU32,
    /// Nothing moves any more, on no connection, when a statement with this word was executed.
    dies_at: Mutex<Option<&'static [u8]>>,
    /// The first connection on which a statement with this word is executed has no answer, and never hears anything again.
    hushes_at: Mutex<Option<&'static [u8]>>,
    dead: CancellationToken,
    /// The first message that says this word arrives only when it may: see [`Held`].
    holds: Mutex<Option<(&'static [u8], Held)>>,
    /// Somebody has had the fault.
    broken: AtomicBool,
}

/// The way. Its connections end with the test's runtime.
pub struct Way {
    options: PgConnectOptions,
    state: Arc<State>,
    away: watch::Sender<bool>,
}

impl Way {
    /// To the server of `pool`, and as its user to its database.
    pub async fn to(pool: &PgPool) -> Self {
        let options = pool.connect_options();
        let socket = options.get_socket().expect("socket").join(format!(".s.PGSQL.{}", options.get_port()));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let port = listener.local_addr().expect("address").port();
        let state = Arc::new(State::default());
        let away = watch::Sender::new(false);
        tokio::spawn(listen(listener, socket, state.clone(), away.clone()));
        let options = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(port)
            .username(options.get_username())
            .database(options.get_database().expect("database"));
        Self { options: session(options), state, away }
    }

    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    pub async fn pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new().max_connections(connections).connect_with(self.options()).await.expect("pool")
    }

    /// A pool that sends the text of a statement with each execution.
    pub async fn pool_that_says_all(&self, connections: u32) -> PgPool {
        let options = self.options().statement_cache_capacity(0);
        PgPoolOptions::new().max_connections(connections).connect_with(options).await.expect("pool")
    }

    /// Breaks at the next COMMIT.
    pub fn breaks(&self, lost: Lost) {
        self.arm(Fault { lost, word: b"", then_away: false });
    }

    /// Breaks at the next COMMIT of a transaction that has said `word`; with `then_away` the server is away from then on.
    pub fn breaks_after(&self, word: &'static str, lost: Lost, then_away: bool) {
        self.arm(Fault { lost, word: word.as_bytes(), then_away });
    }

    fn arm(&self, fault: Fault) {
        self.state.broken.store(false, Ordering::SeqCst);
        *self.state.fault.lock().expect("lock") = Some(fault);
    }

    /// Whether it has broken since it was told to.
    pub fn has_broken(&self) -> bool {
        self.state.broken.load(Ordering::SeqCst)
    }

    /// Every connection ends, and those that come are turned away, until [`Self::back`].
    pub fn away(&self) {
        self.away.send_replace(true);
    }

    pub fn back(&self) {
        self.away.send_replace(false);
    }

    /// How many connections came while the server was away.
    pub fn turned_away(&self) -> u32 {
        self.state.turned_away.load(Ordering::SeqCst)
    }

    /// How many sessions the server has refused.
    pub fn refused(&self) -> u32 {
        self.state.refused.load(Ordering::SeqCst)
    }

    /// The next connection on which a statement that says `word` is executed stays open and says nothing any more, as one that a proxy
    /// has forgotten: the server sees its end. All others go on. [`Self::has_broken`] tells when.
    pub fn hushes_at(&self, word: &'static str) {
        self.state.broken.store(false, Ordering::SeqCst);
        *self.state.hushes_at.lock().expect("lock") = Some(word.as_bytes());
    }

    /// From now on nothing moves on any connection, old or new, and none ends: as a server that is frozen.
    pub fn falls_silent(&self) {
        self.state.dead.cancel();
    }

    /// Stops the next message that says `word`.
    pub fn holds_at(&self, word: &'static str) -> Held {
        let held = Held::default();
        *self.state.holds.lock().expect("lock") = Some((word.as_bytes(), held.clone()));
        held
    }

    /// Both ends stay open and nothing moves, as when a wire is cut, once somebody has executed a statement that says `word`.
    /// Returns a signal for that moment.
    pub fn dies_at(&self, word: &'static str) -> CancellationToken {
        *self.state.dies_at.lock().expect("lock") = Some(word.as_bytes());
        self.state.dead.clone()
    }
}

async fn listen(listener: TcpListener, socket: PathBuf, state: Arc<State>, away: watch::Sender<bool>) {
    while let Ok((client, _)) = listener.accept().await {
        if *away.borrow() {
            state.turned_away.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        let server = UnixStream::connect(&socket).await.expect("server");
        let (state, away) = (state.clone(), away.clone());
        tokio::spawn(async move {
            let mut gone = away.subscribe();
            tokio::select! {
                () = pass(client, server, &state, &away) => {}
                _ = gone.wait_for(|away| *away) => {}
            }
        });
    }
}

fn says(message: &[u8], word: &[u8]) -> bool {
    word.is_empty() || message.windows(word.len()).any(|part| part == word)
}

/// Passes on what both sides say, until one of them leaves or the connection has a fault.
async fn pass(mut client: TcpStream, mut server: UnixStream, state: &State, away: &watch::Sender<bool>) {
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let (mut prepared, mut said, mut hushed) = (false, false, false);
    loop {
        tokio::select! {
            biased;
            () = state.dead.cancelled() => std::future::pending().await,
            Ok(n) = client.read(&mut asked) => {
                let message = &asked[..n];
                if n == 0 {
                    return;
                }
                // The frontend sends it alone and waits, so it is never cut in two.
                let commits = message.ends_with(b"COMMIT\0");
                let fault = {
                    let mut fault = state.fault.lock().expect("lock");
                    said |= fault.as_ref().is_some_and(|fault| says(message, fault.word));
                    if commits && said { fault.take() } else { None }
                };
                said &= !commits;
                if let Some(fault) = &fault {
                    if fault.then_away {
                        away.send_replace(true);
                    }
                    state.broken.store(true, Ordering::SeqCst);
                    if fault.lost == Lost::Commit {
                        return;
                    }
                }
                let held = {
                    let mut holds = state.holds.lock().expect("lock");
                    if holds.as_ref().is_some_and(|(word, _)| says(message, word)) { holds.take() } else { None }
                };
                if let Some((_, held)) = held {
                    held.arrived.cancel();
                    held.goes_on.cancelled().await;
                }
                if server.write_all(message).await.is_err() {
                    return;
                }
                if fault.is_some() {
                    assert!(server.read(&mut answered).await.expect("answer") > 0);
                    return;
                }
                // A statement is prepared, and then executed by a message that does not repeat its text.
                if prepared {
                    state.dead.cancel();
                }
                prepared = state.dies_at.lock().expect("lock").is_some_and(|word| says(message, word));
                if hushed {
                    state.broken.store(true, Ordering::SeqCst);
                    drop(server);
                    std::future::pending::<()>().await;
                    return;
                }
                let mut hushes_at = state.hushes_at.lock().expect("lock");
                hushed = hushes_at.is_some_and(|word| says(message, word));
                if hushed {
                    *hushes_at = None;
                }
            }
            Ok(n) = server.read(&mut answered) => {
                // The field of an error's code, in its one short message.
                if says(&answered[..n], b"C53300\0") || says(&answered[..n], b"C28000\0") {
                    state.refused.fetch_add(1, Ordering::SeqCst);
                }
                if n == 0 || client.write_all(&answered[..n]).await.is_err() {
                    return;
                }
            }
            else => return,
        }
    }
}
