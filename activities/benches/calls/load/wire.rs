//! How often a call goes to Postgres and back: a proxy between a worker and the server that reads what the worker sends.
//!
//! The server answers once for every `Sync` and every `Query`, so their number is that of the round trips, transactions, pings of the
//! pool and all.

use super::Result;
use loopwright_engine::transaction::session;
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode},
};
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
};

/// Connections of the pool: few, so that each has soon prepared what it says.
const POOL: u32 = 4;
/// Of a statement, in a list.
const WORDS_MAX: usize = 12;
pub const PING: &str = "(ping)";
/// What sessions say of calls that the engine keeps for itself; they say other things too.
const OF_A_CALL: [&str; 3] = ["call_announced(", "call_ended(", "update api_key_usage"];

/// Round trips by what was said: all on connections of the pool, and those of calls on others.
pub type Trips = BTreeMap<String, usize>;

/// The proxy. Its connections end with the runtime.
pub struct Wire {
    pub pool: PgPool,
    trips: Arc<Mutex<Trips>>,
}

impl Wire {
    /// To the server of `pool`, on its socket.
    pub async fn to(pool: &PgPool) -> Result<Self> {
        let options = pool.connect_options();
        let folder = options.get_socket().ok_or("the server has no socket")?;
        let socket = folder.join(format!(".s.PGSQL.{}", options.get_port()));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let through = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(listener.local_addr()?.port())
            .ssl_mode(PgSslMode::Disable)
            .username(options.get_username())
            .database(options.get_database().unwrap_or("postgres"));
        let trips = Arc::default();
        tokio::spawn(listen(listener, socket, Arc::clone(&trips)));
        let pool = PgPoolOptions::new().max_connections(POOL).test_before_acquire(false);
        let pool = pool.connect_lazy_with(session(through));
        Ok(Self { pool, trips })
    }

    /// What was counted until now; the count begins anew. Preparing a statement, once for each connection, is left out.
    pub fn take(&self) -> Trips {
        std::mem::take(&mut *self.trips.lock().expect("no panic while held"))
    }
}

async fn listen(listener: TcpListener, socket: PathBuf, trips: Arc<Mutex<Trips>>) {
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = UnixStream::connect(&socket).await else { continue };
        tokio::spawn(pass(client, server, Arc::clone(&trips)));
    }
}

async fn pass(client: TcpStream, server: UnixStream, trips: Arc<Mutex<Trips>>) {
    // What is waited for is not to wait for an acknowledgement.
    drop(client.set_nodelay(true));
    let ((mut from, mut back), (mut answers, mut to)) = (client.into_split(), server.into_split());
    let answering = async { tokio::io::copy(&mut answers, &mut back).await.map(drop) };
    let asking = async {
        let (mut part, mut reader) = (vec![0; 1 << 16], Reader::default());
        loop {
            let n = from.read(&mut part).await?;
            if n == 0 {
                return Ok(());
            }
            for said in reader.read(&part[..n]) {
                *trips.lock().expect("no panic while held").entry(said).or_default() += 1;
            }
            to.write_all(&part[..n]).await?;
        }
    };
    // One side has left.
    let _: std::io::Result<()> = tokio::select! { done = answering => done, done = asking => done };
}

/// Reads what one connection says.
#[derive(Default)]
struct Reader {
    unread: Vec<u8>,
    greeted: bool,
    /// A session that the engine keeps for itself, not one of the pool's.
    own: bool,
    statements: HashMap<Vec<u8>, String>,
    parsed: bool,
    bound: Option<String>,
}

impl Reader {
    /// The round trips that end with these bytes.
    fn read(&mut self, bytes: &[u8]) -> Vec<String> {
        self.unread.extend_from_slice(bytes);
        let mut trips = Vec::new();
        loop {
            // A message says what it is and how long it is, itself included; the first one only how long.
            let head = usize::from(self.greeted);
            let Some(length) = self.unread.get(head..head + 4).and_then(|n| n.try_into().ok()).map(u32::from_be_bytes)
            else {
                return trips;
            };
            let end = head + length as usize;
            if self.unread.len() < end {
                return trips;
            }
            let message: Vec<u8> = self.unread.drain(..end).collect();
            let body = &message[head + 4..];
            if !self.greeted {
                self.greeted = true;
                // As `transaction::Session` connects.
                self.own = body.windows(14).any(|part| part == b"enable_seqscan");
            } else if let Some(trip) = self.message(message[0], body)
                && (!self.own || OF_A_CALL.iter().any(|word| trip.contains(word)))
            {
                trips.push(trip);
            }
        }
    }

    fn message(&mut self, kind: u8, body: &[u8]) -> Option<String> {
        let mut texts = body.split(|byte| *byte == 0);
        let mut next = || texts.next().unwrap_or_default();
        match kind {
            b'Q' => return Some(short(next())),
            b'P' => {
                let name = next().to_vec();
                self.statements.insert(name, short(next()));
                self.parsed = true;
            }
            b'B' => {
                next();
                self.bound = self.statements.get(next()).cloned();
            }
            b'S' => {
                let (parsed, bound) = (std::mem::take(&mut self.parsed), self.bound.take());
                return if parsed { bound } else { Some(bound.unwrap_or_else(|| PING.to_owned())) };
            }
            _ => {}
        }
        None
    }
}

fn short(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    // What the engine puts around it is the same for all.
    let text = text.split_once("told as materialized (").map_or(&*text, |(_, rest)| rest);
    text.split_whitespace().take(WORDS_MAX).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(unused, reason = "the bench has no harness; its test is a part of tests/it/calls.rs")]
mod tests {
    use super::{PING, Reader};

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
        [&[kind][..], &length, body].concat()
    }

    #[test]
    fn each_answer_that_is_waited_for_is_one_round_trip() {
        let greeting = message(b'?', b"\0\x03\0\0user\0me\0\0")[1..].to_vec();
        let said = [
            greeting,
            message(b'Q', b"BEGIN\0"),
            // Prepared, which is not counted, and executed twice.
            message(b'P', b"s1\0select 1\0\0\0"),
            message(b'S', b""),
            message(b'B', b"\0s1\0"),
            message(b'S', b""),
            message(b'B', b"\0s1\0"),
            message(b'S', b""),
            message(b'S', b""),
        ]
        .concat();
        let mut reader = Reader::default();
        // In whatever parts it comes.
        let trips: Vec<String> = said.chunks(3).flat_map(|part| reader.read(part)).collect();
        assert_eq!(trips, ["BEGIN", "select 1", "select 1", PING]);
    }
}
