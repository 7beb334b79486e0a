use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket};

/// A port of loopback at which nobody listens: who connects is refused.
///
/// It is bound as long as this lives, so that nobody else is given it meanwhile, by a `bind` of port 0 or as the near
/// end of a connection. Another process that is told the address may still listen at it (`SO_REUSEADDR`, which tokio's
/// and std's listeners set).
pub struct ClosedPort {
    socket: TcpSocket,
    address: SocketAddr,
}

impl ClosedPort {
    /// # Panics
    /// Where loopback has no port left.
    #[expect(clippy::new_without_default, reason = "it asks the system for a port")]
    pub fn new() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option of every socket");
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a free port");
        let address = socket.local_addr().expect("a bound socket has an address");
        Self { socket, address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on connections wait to be accepted.
    ///
    /// # Panics
    /// If another socket listens at it already, or outside of a runtime.
    pub fn open(self) -> TcpListener {
        self.socket.listen(128).expect("nobody else listens at it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn it_refuses_until_it_is_opened_and_another_may_listen_in_its_place() {
        let (closed, lent) = (ClosedPort::new(), ClosedPort::new());
        assert_eq!(TcpStream::connect(closed.address()).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let address = closed.address();
        let ours = closed.open();
        let theirs = TcpListener::bind(lent.address()).await.unwrap();
        for (address, listener) in [(address, ours), (lent.address(), theirs)] {
            let caller = TcpStream::connect(address).await.unwrap();
            assert_eq!(listener.accept().await.unwrap().1, caller.local_addr().unwrap());
        }
    }
}
