//! Which base URLs a call may go to. What the operator sets is trusted, local servers included; what a user sets may
//! only name public hosts, and that is decided when the connection is made, not before (a name can change its address
//! in between).

use futures_util::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};
use url::{Host, Url};

/// Ports that a user's base URL may name.
const USER_PORTS: [u16; 2] = [443, 8443];

/// Who chose an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// By environment or configuration file: any host, http allowed.
    Operator,
    /// By a user of the product: https to public addresses only.
    User,
    /// By a user, where the operator lets users name this machine: http and any port, but to loopback only.
    UserOrLoopback,
}

impl Trust {
    /// The resolver that a client of such an address must use; `None`: the system's.
    #[must_use]
    pub fn resolver(self) -> Option<Arc<dyn Resolve>> {
        match self {
            Self::Operator => None,
            Self::User | Self::UserOrLoopback => Some(Arc::new(Filtered::new(self, Arc::new(SystemLookup)))),
        }
    }

    /// Whether a connection may go to `ip`.
    #[must_use]
    pub fn allows(self, ip: IpAddr) -> bool {
        match self {
            Self::Operator => true,
            Self::User => is_public(ip),
            Self::UserOrLoopback => is_public(ip) || ip.is_loopback(),
        }
    }
}

/// A base URL that is not used. The text never holds the URL: it may carry a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("it is not a URL with a host")]
    NotUrl,
    #[error("its scheme must be https (http only where the operator set it)")]
    Scheme,
    #[error("it must not hold a user name or password: keys go into their own setting")]
    UserInfo,
    #[error("it must not hold a query or a fragment")]
    Query,
    #[error("its port is not allowed")]
    Port,
    #[error("its address is not a public one")]
    NotPublic,
    #[error("its host has no address")]
    NotFound,
}

/// Parses and checks a base URL; the path comes back without a slash at its end.
///
/// # Errors
/// [`AddressError`] names the rule that it breaks.
pub fn parse_base_url(text: &str, trust: Trust) -> Result<Url, AddressError> {
    let mut url = Url::parse(text.trim()).map_err(|_| AddressError::NotUrl)?;
    if url.cannot_be_a_base() || url.host().is_none() {
        return Err(AddressError::NotUrl);
    }
    let loopback = trust == Trust::UserOrLoopback && names_loopback(&url);
    match (url.scheme(), trust) {
        ("https", _) | ("http", Trust::Operator) => {}
        ("http", Trust::UserOrLoopback) if loopback => {}
        _ => return Err(AddressError::Scheme),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(AddressError::UserInfo);
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(AddressError::Query);
    }
    if trust != Trust::Operator && !loopback {
        if !url.port_or_known_default().is_some_and(|port| USER_PORTS.contains(&port)) {
            return Err(AddressError::Port);
        }
        // The client asks no resolver about literal addresses, so they are judged here.
        if is_local(&url) {
            return Err(AddressError::NotPublic);
        }
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

/// Whether a URL names this machine or its network by itself, without asking a resolver.
#[must_use]
pub fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => !is_public(IpAddr::V4(ip)),
        Some(Host::Ipv6(ip)) => !is_public(IpAddr::V6(ip)),
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            name == "localhost" || name.ends_with(".localhost") || !name.contains('.')
        }
        None => true,
    }
}

/// Whether a URL names this machine itself: by address, or as `localhost`, whose addresses the resolver checks.
fn names_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name.trim_end_matches('.') == "localhost",
        None => false,
    }
}

/// Asks whether a URL's host has an address that a connection may go to now. For a good message only: a name can change its
/// address before it is connected to, so every connection asks again.
///
/// # Errors
/// `NotPublic`, `NotFound`.
pub async fn resolves_public(url: &Url, trust: Trust, lookup: &dyn Lookup) -> Result<(), AddressError> {
    match url.host() {
        Some(Host::Ipv4(ip)) if trust.allows(ip.into()) => Ok(()),
        Some(Host::Ipv6(ip)) if trust.allows(ip.into()) => Ok(()),
        Some(Host::Domain(name)) => {
            let found = lookup.addresses(name.to_owned()).await.map_err(|_| AddressError::NotFound)?;
            match found.iter().any(|address| trust.allows(address.ip())) {
                true => Ok(()),
                false if found.is_empty() => Err(AddressError::NotFound),
                false => Err(AddressError::NotPublic),
            }
        }
        _ => Err(AddressError::NotPublic),
    }
}

/// `base` with `segments` appended to its path, each percent-encoded.
#[must_use]
pub(super) fn join(base: &Url, segments: &[&str]) -> Url {
    let mut url = base.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(segments);
    }
    url
}

/// Whether an address belongs to the public internet: nothing local, private, reserved, or translated to such.
#[must_use]
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(a == 0
        || ip.is_loopback()
        || ip.is_private()
        || (a == 100 && (64..128).contains(&b))
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_broadcast()
        || ip.is_documentation()
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19))
        || a >= 240)
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let s = ip.segments();
    // Global unicast is 2000::/3; within it: 6to4, documentation, Teredo and other protocol assignments, benchmarks.
    let global = s[0] & 0xe000 == 0x2000;
    global
        && s[0] != 0x2002
        && !(s[0] == 0x2001 && s[1] == 0x0db8)
        && !(s[0] == 0x2001 && s[1] < 0x0200)
        && !(s[0] == 0x3fff && s[1] < 0x1000)
}

/// Finds the addresses of a name.
pub trait Lookup: Send + Sync + 'static {
    /// All of them, whatever they are.
    fn addresses(&self, name: String) -> BoxFuture<'_, std::io::Result<Vec<SocketAddr>>>;
}

/// As the system does it.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemLookup;

impl Lookup for SystemLookup {
    fn addresses(&self, name: String) -> BoxFuture<'_, std::io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect()) })
    }
}

/// A resolver that knows only addresses that may be connected to. The connection goes to what it returns and to nothing
/// else, so a name whose address changes between two questions gains nothing.
pub struct Filtered {
    trust: Trust,
    lookup: Arc<dyn Lookup>,
}

impl Filtered {
    #[must_use]
    pub fn new(trust: Trust, lookup: Arc<dyn Lookup>) -> Self {
        Self { trust, lookup }
    }
}

impl Resolve for Filtered {
    fn resolve(&self, name: Name) -> Resolving {
        let (trust, lookup) = (self.trust, Arc::clone(&self.lookup));
        Box::pin(async move {
            let found = lookup.addresses(name.as_str().to_owned()).await?;
            let allowed: Vec<SocketAddr> = found.into_iter().filter(|address| trust.allows(address.ip())).collect();
            if allowed.is_empty() {
                return Err(AddressError::NotPublic.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// Whether an error goes back to an address that is not connected to.
#[must_use]
pub fn is_refused_address(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<AddressError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_reaches_public_hosts_only() {
        use AddressError::{NotPublic, NotUrl, Port, Query, Scheme, UserInfo};
        for (text, expected) in [
            ("https://api.example.com/v1/", None),
            ("https://8.8.8.8", None),
            ("https://api.example.com:8443", None),
            ("http://api.example.com", Some(Scheme)),
            ("ftp://api.example.com", Some(Scheme)),
            ("https://me:secret@api.example.com", Some(UserInfo)),
            ("https://api.example.com/?a=b", Some(Query)),
            ("https://api.example.com/#x", Some(Query)),
            ("https://api.example.com:22", Some(Port)),
            ("mailto:me@example.com", Some(NotUrl)),
            ("api.example.com", Some(NotUrl)),
            ("https://localhost", Some(NotPublic)),
            ("https://LOCALHOST.", Some(NotPublic)),
            ("https://intranet", Some(NotPublic)),
            ("https://a.localhost", Some(NotPublic)),
            ("https://127.0.0.1", Some(NotPublic)),
            ("https://127.0.0.1.", Some(NotPublic)),
            ("https://127.1", Some(NotPublic)),
            ("https://127.255.255.254", Some(NotPublic)),
            ("https://0x7f000001", Some(NotPublic)),
            ("https://017700000001", Some(NotPublic)),
            ("https://%31%32%37.0.0.1", Some(NotPublic)),
            ("https://\u{ff11}\u{ff12}\u{ff17}.0.0.1", Some(NotPublic)),
            ("https://localhos\u{24e3}", Some(NotPublic)),
            ("https://172.31.255.255", Some(NotPublic)),
            ("https://100.127.255.255", Some(NotPublic)),
            ("https://169.254.0.1", Some(NotPublic)),
            ("https://0.1.2.3", Some(NotPublic)),
            ("https://239.255.255.255", Some(NotPublic)),
            ("https://240.0.0.1", Some(NotPublic)),
            ("https://198.19.255.255", Some(NotPublic)),
            ("https://198.51.100.1", Some(NotPublic)),
            ("https://203.0.113.1", Some(NotPublic)),
            ("https://192.0.0.8", Some(NotPublic)),
            ("https://192.88.99.1", Some(NotPublic)),
            ("https://[::]", Some(NotPublic)),
            ("https://[::ffff:8.8.8.8]", Some(NotPublic)),
            ("https://[::ffff:0:127.0.0.1]", Some(NotPublic)),
            ("https://[fdff::1]", Some(NotPublic)),
            ("https://[febf::1]", Some(NotPublic)),
            ("https://[fec0::1]", Some(NotPublic)),
            ("https://[ff02::1]", Some(NotPublic)),
            ("https://[64:ff9b:1::1]", Some(NotPublic)),
            ("https://[100::1]", Some(NotPublic)),
            ("https://[2001::1]", Some(NotPublic)),
            ("https://[2001:2::1]", Some(NotPublic)),
            ("https://[3fff::1]", Some(NotPublic)),
            ("https://[5f00::1]", Some(NotPublic)),
            ("https://172.32.0.1", None),
            ("https://100.128.0.1", None),
            ("https://api.example.com:80", Some(Port)),
            ("https://0x7f.1", Some(NotPublic)),
            ("https://2130706433", Some(NotPublic)),
            ("https://0177.0.0.1", Some(NotPublic)),
            ("https://10.1.2.3", Some(NotPublic)),
            ("https://172.16.0.1", Some(NotPublic)),
            ("https://192.168.0.1", Some(NotPublic)),
            ("https://100.64.0.1", Some(NotPublic)),
            ("https://169.254.169.254", Some(NotPublic)),
            ("https://0.0.0.0", Some(NotPublic)),
            ("https://224.0.0.1", Some(NotPublic)),
            ("https://255.255.255.255", Some(NotPublic)),
            ("https://198.18.0.1", Some(NotPublic)),
            ("https://192.0.2.1", Some(NotPublic)),
            ("https://[::1]", Some(NotPublic)),
            ("https://[::ffff:127.0.0.1]", Some(NotPublic)),
            ("https://[::127.0.0.1]", Some(NotPublic)),
            ("https://[fc00::1]", Some(NotPublic)),
            ("https://[fe80::1]", Some(NotPublic)),
            ("https://[64:ff9b::7f00:1]", Some(NotPublic)),
            ("https://[2002:7f00:1::]", Some(NotPublic)),
            ("https://[2001:db8::1]", Some(NotPublic)),
            ("https://[2a00:1450:4001:830::200e]", None),
        ] {
            assert_eq!(parse_base_url(text, Trust::User).err(), expected, "{text}");
        }
    }

    #[test]
    fn the_operator_may_name_a_local_server() {
        let url = parse_base_url(" http://127.0.0.1:8080/v1/ ", Trust::Operator).unwrap();
        assert_eq!(join(&url, &["chat", "completions"]).as_str(), "http://127.0.0.1:8080/v1/chat/completions");
        assert_eq!(parse_base_url("http://me:x@127.0.0.1", Trust::Operator).err(), Some(AddressError::UserInfo));
        let root = parse_base_url("http://127.0.0.1:8080", Trust::Operator).unwrap();
        assert_eq!(join(&root, &["v1", "a/../b:c"]).path(), "/v1/a%2F..%2Fb:c");
    }

    #[test]
    fn loopback_is_a_switch_of_the_operator_and_opens_nothing_else() {
        use AddressError::{NotPublic, Port, Scheme, UserInfo};
        for (text, expected) in [
            ("http://127.0.0.1:11434/v1", None),
            ("http://localhost:8080", None),
            ("https://[::1]:9", None),
            ("http://me:x@127.0.0.1", Some(UserInfo)),
            ("http://192.168.0.1", Some(Scheme)),
            ("https://192.168.0.1", Some(NotPublic)),
            ("http://api.example.com", Some(Scheme)),
            ("https://api.example.com:22", Some(Port)),
            ("https://169.254.169.254", Some(NotPublic)),
        ] {
            assert_eq!(parse_base_url(text, Trust::UserOrLoopback).err(), expected, "{text}");
        }
    }

    /// Says each list once, then the last one for ever.
    struct Changing(std::sync::Mutex<Vec<Vec<&'static str>>>);

    impl Lookup for Changing {
        fn addresses(&self, _: String) -> BoxFuture<'_, std::io::Result<Vec<SocketAddr>>> {
            let mut lists = self.0.lock().unwrap();
            let list = if lists.len() > 1 { lists.remove(0) } else { lists[0].clone() };
            let found = list.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 0)).collect();
            Box::pin(async move { Ok(found) })
        }
    }

    async fn resolved(filter: &Filtered) -> Option<Vec<String>> {
        let found = filter.resolve("rebinding.example.com".parse().unwrap()).await;
        found.ok().map(|list| list.map(|address| address.ip().to_string()).collect())
    }

    #[tokio::test]
    async fn a_name_that_changes_its_address_after_the_check_reaches_nothing_inside() {
        let lookup = Arc::new(Changing(std::sync::Mutex::new(vec![
            vec!["8.8.8.8"],
            vec!["10.0.0.1", "8.8.4.4", "::1"],
            vec!["127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1"],
        ])));
        let url = parse_base_url("https://rebinding.example.com", Trust::User).unwrap();
        assert_eq!(resolves_public(&url, Trust::User, lookup.as_ref()).await, Ok(()));
        let filter = Filtered::new(Trust::User, lookup.clone());
        assert_eq!(resolved(&filter).await, Some(vec!["8.8.4.4".to_owned()]), "what is inside is dropped");
        assert_eq!(resolved(&filter).await, None);
        assert_eq!(resolves_public(&url, Trust::User, lookup.as_ref()).await, Err(AddressError::NotPublic));
        let loopback = Filtered::new(Trust::UserOrLoopback, lookup);
        assert_eq!(resolved(&loopback).await, Some(vec!["127.0.0.1".to_owned()]));
    }

    #[tokio::test]
    async fn a_connection_is_refused_by_the_address_at_its_moment_and_says_so() {
        crate::provider::install_crypto();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let resolver = Trust::User.resolver().unwrap();
        let client = reqwest::Client::builder().dns_resolver(resolver).no_proxy();
        let client = client.tls_certs_only(Vec::<reqwest::Certificate>::new()).build().unwrap();
        let error = client.get(format!("http://localhost:{port}/")).send().await.unwrap_err();
        assert!(error.is_connect() && is_refused_address(&error), "{error:?}");
        let nobody = std::future::poll_fn(|cx| std::task::Poll::Ready(listener.poll_accept(cx).is_pending())).await;
        assert!(nobody, "nobody has connected");
    }
}
