//! The wire between the processes and Postgres: a loopback listener that copies bytes to its socket, late, or not at all.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
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

/// A running proxy. Dropping it ends it, its connections with it.
pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    weather: watch::Sender<Weather>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on loopback and copies to the Unix socket `target` for clients whose first message says `pass`.
    pub(super) async fn start(target: &Path, pass: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (weather, watched) = watch::channel(Weather::default());
        let task = tokio::spawn(accept(listener, target.to_owned(), pass.to_owned(), watched));
        Ok(Self { address, weather, task })
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

async fn accept(listener: TcpListener, target: PathBuf, pass: String, weather: watch::Receiver<Weather>) {
    while let Ok((client, _)) = listener.accept().await {
        if !weather.borrow().cut {
            // What becomes of a connection is told by its two ends.
            let (target, pass, weather) = (target.clone(), pass.clone(), weather.clone());
            tokio::spawn(async move { copy(client, &target, &pass, weather).await });
        }
    }
}

/// Copies both ways until one end closes or the wire is cut: then both connections are dropped, with what was under way.
async fn copy(
    mut client: TcpStream,
    target: &Path,
    pass: &str,
    mut weather: watch::Receiver<Weather>,
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
        done = pump(&mut from_client, &mut to_server, one) => done,
        done = pump(&mut from_server, &mut to_client, two) => done,
        // Nobody left to change the weather: the proxy is gone, and the wire with it.
        _ = weather.wait_for(|w| w.cut) => Ok(()),
    }
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    weather: watch::Receiver<Weather>,
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
    }
}
