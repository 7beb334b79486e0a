//! The wire between the processes and Postgres: a loopback listener that copies bytes to its socket, late, or not at all.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    task::JoinHandle,
};

/// Bytes that are under way at most in one direction: few, so that a cut tears messages apart.
const CHUNK: usize = 8 << 10;

/// How the wire is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weather {
    /// Connections break and new ones are closed at once.
    pub(super) cut: bool,
    /// Every chunk comes that much later.
    pub(super) delay: Duration,
}

/// What the weather has done so far, to connections that were open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Connections that a cut broke.
    pub(super) cut: u64,
    /// Bytes that arrived late.
    pub(super) late: u64,
}

#[derive(Debug, Default)]
struct Toll {
    cut: AtomicU64,
    late: AtomicU64,
}

/// A running proxy. Dropping it ends it, its connections with it.
pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    weather: watch::Sender<Weather>,
    toll: Arc<Toll>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on loopback and copies to the Unix socket `target` for clients whose first message says `pass`.
    pub(super) async fn start(target: &Path, pass: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (weather, watched) = watch::channel(Weather::default());
        let toll = Arc::new(Toll::default());
        let task = tokio::spawn(accept(listener, target.to_owned(), pass.to_owned(), watched, toll.clone()));
        Ok(Self { address, weather, toll, task })
    }

    /// Since it started.
    pub(super) fn damage(&self) -> Damage {
        Damage { cut: self.toll.cut.load(Ordering::Relaxed), late: self.toll.late.load(Ordering::Relaxed) }
    }

    pub(super) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(
    listener: TcpListener,
    target: PathBuf,
    pass: String,
    weather: watch::Receiver<Weather>,
    toll: Arc<Toll>,
) {
    while let Ok((client, _)) = listener.accept().await {
        if !weather.borrow().cut {
            // What becomes of a connection is told by its two ends.
            let (target, pass, weather, toll) = (target.clone(), pass.clone(), weather.clone(), toll.clone());
            tokio::spawn(async move { copy(client, &target, &pass, weather, &toll).await });
        }
    }
}

/// Copies both ways until one end closes or the wire is cut: then both connections are dropped, with what was under way.
async fn copy(
    mut client: TcpStream,
    target: &Path,
    pass: &str,
    mut weather: watch::Receiver<Weather>,
    toll: &Toll,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    // The startup message comes first: names and values of a session, this one's name among them.
    let mut first = [0; CHUNK];
    let n = client.read(&mut first).await?;
    if !first[..n].windows(pass.len()).any(|part| part == pass.as_bytes()) {
        return Ok(());
    }
    let mut server = UnixStream::connect(target).await?;
    server.write_all(&first[..n]).await?;
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let (one, two) = (weather.clone(), weather.clone());
    tokio::select! {
        done = pump(&mut from_client, &mut to_server, one, toll) => done,
        done = pump(&mut from_server, &mut to_client, two, toll) => done,
        // Nobody left to change the weather: the proxy is gone, and the wire with it.
        _ = weather.wait_for(|w| w.cut) => {
            toll.cut.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    weather: watch::Receiver<Weather>,
    toll: &Toll,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = from.read(&mut chunk).await?;
        if n == 0 {
            return Ok(());
        }
        let delay = weather.borrow().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        to.write_all(&chunk[..n]).await?;
        if !delay.is_zero() {
            toll.late.fetch_add(n as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    const GUARD: Duration = Duration::from_secs(120);

    async fn settles(mut holds: impl FnMut() -> bool) {
        let wait = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(GUARD, wait).await.expect("in time");
    }

    #[tokio::test]
    async fn only_what_happens_to_open_connections_is_damage() {
        let folder = tempfile::tempdir().expect("folder");
        let target = folder.path().join("target");
        let listener = UnixListener::bind(&target).expect("target");
        // Gives back what it gets.
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.into_split();
                    drop(tokio::io::copy(&mut read, &mut write).await);
                });
            }
        });
        let proxy = Proxy::start(&target, "pass").await.expect("proxy");
        let (calm, slow) = (Weather::default(), Duration::from_millis(20));
        // Nobody is there: a cut breaks nothing, and slowness delays nothing.
        proxy.set(Weather { cut: true, delay: slow });
        proxy.set(calm);
        assert_eq!(proxy.damage(), Damage::default());

        let mut client = TcpStream::connect(proxy.address).await.expect("connection");
        let mut echo = [0; 4];
        client.write_all(b"pass").await.expect("written");
        client.read_exact(&mut echo).await.expect("echo");
        assert_eq!(proxy.damage(), Damage::default(), "the weather was fine");
        proxy.set(Weather { delay: slow, ..calm });
        client.write_all(b"late").await.expect("written");
        client.read_exact(&mut echo).await.expect("echo");
        settles(|| proxy.damage() == Damage { cut: 0, late: 8 }).await;
        proxy.set(Weather { cut: true, ..calm });
        settles(|| proxy.damage() == Damage { cut: 1, late: 8 }).await;
        assert!(matches!(client.read(&mut echo).await, Ok(0) | Err(_)), "the connection is gone");
        // One that is refused was never open.
        let mut refused = TcpStream::connect(proxy.address).await.expect("accepted by the kernel");
        assert!(matches!(refused.read(&mut echo).await, Ok(0) | Err(_)));
        assert_eq!(proxy.damage(), Damage { cut: 1, late: 8 });
    }
}
