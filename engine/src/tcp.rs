//! What sqlx 0.9.0 leaves out when it connects by TCP. It has no door for it, so that the sockets are looked up among the open files
//! of this process; a release that sets `TCP_NODELAY` and keepalives itself makes this file needless.
//!
//! Without `TCP_NODELAY` the last piece of a batch that is larger than a segment waits for the server's delayed
//! acknowledgement, 40 ms. Without a limit a wire that went silent in the middle of a statement is given up after a quarter of an
//! hour, or never if the statement had arrived.

use socket2::{SockRef, TcpKeepalive};
use sqlx::postgres::PgConnectOptions;
use std::{fs, io, os::fd::BorrowedFd, time::Duration};

/// A server that acknowledges nothing for so long is gone. Chosen: as long as Postgres is told to wait for us, and no working server
/// is silent for a second, since its kernel answers.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const PROBE_EVERY: Duration = Duration::from_secs(10);

/// Sets up every connection of this process to that server's port, the newest among them. Best effort: a connection works
/// without it.
pub(crate) fn settle(options: &PgConnectOptions) {
    if options.get_socket().is_some() || options.get_host().starts_with('/') {
        return;
    }
    if let Err(error) = each(options.get_port(), set) {
        tracing::debug!(%error, "connections to Postgres are left as they are");
    }
}

fn set(socket: &SockRef<'_>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(SILENCE_MAX).with_interval(PROBE_EVERY);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(SILENCE_MAX))?;
    Ok(())
}

/// Goes through the TCP sockets of this process whose other end has that port.
fn each(port: u16, mut visit: impl FnMut(&SockRef<'_>) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir("/dev/fd")? {
        let Some(fd) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // SAFETY: nothing is read, written or closed. Closed meanwhile, the number is refused or means another open file: that is
        // asked for its peer as well.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let socket = SockRef::from(&fd);
        // Whatever is no connected socket has no peer.
        let there = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        if there.is_some_and(|there| there.port() == port) {
            visit(&socket)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{PROBE_EVERY, SILENCE_MAX, each};
    use crate::transaction;
    use sqlx::{
        Connection,
        postgres::{PgConnectOptions, PgSslMode},
    };
    use tokio::{
        io::copy_bidirectional,
        net::{TcpListener, UnixStream},
    };

    /// The test server has no TCP: a door of our own leads to it.
    async fn by_tcp() -> PgConnectOptions {
        let pool = crate::embedded::testing::database(&[]).await;
        let options = pool.connect_options().as_ref().clone();
        let folder = options.get_socket().cloned().unwrap_or_else(|| options.get_host().into());
        let socket = folder.join(format!(".s.PGSQL.{}", options.get_port()));
        let door = TcpListener::bind("127.0.0.1:0").await.expect("door");
        let port = door.local_addr().expect("address").port();
        tokio::spawn(async move {
            while let Ok((mut here, _)) = door.accept().await {
                let mut there = UnixStream::connect(&socket).await.expect("server");
                tokio::spawn(async move { copy_bidirectional(&mut here, &mut there).await });
            }
        });
        PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(port)
            .username(options.get_username())
            .database(options.get_database().expect("database"))
            .ssl_mode(PgSslMode::Disable)
    }

    #[tokio::test]
    async fn no_connection_waits_for_an_acknowledgement_or_for_a_silent_server() {
        let options = by_tcp().await;
        let pool = transaction::pool(&options).max_connections(2).connect_lazy_with(options.clone());
        let mut pooled = pool.acquire().await.expect("pool");
        pooled.ping().await.expect("server");
        let mut own = transaction::Session::like(&pool);
        own.conn().await.expect("session").ping().await.expect("server");
        let mut found = 0;
        each(options.get_port(), |socket| {
            found += 1;
            assert!(socket.tcp_nodelay()? && socket.keepalive()?);
            assert_eq!(socket.tcp_keepalive_time()?, SILENCE_MAX);
            assert_eq!(socket.tcp_keepalive_interval()?, PROBE_EVERY);
            #[cfg(target_os = "linux")]
            assert_eq!(socket.tcp_user_timeout()?, Some(SILENCE_MAX));
            Ok(())
        })
        .expect("sockets");
        assert_eq!(found, 2, "one of the pool, one of its own");
    }
}
