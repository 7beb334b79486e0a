//! Which base URLs a call may go to. What the operator sets is trusted, local servers included; what a user sets may
//! only name public hosts, and that is decided when the connection is made, not before (a name can change its address
//! in between).

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
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
    match (url.scheme(), trust) {
        ("https", _) | ("http", Trust::Operator) => {}
        _ => return Err(AddressError::Scheme),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(AddressError::UserInfo);
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(AddressError::Query);
    }
    if trust == Trust::User {
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

/// A resolver that knows public addresses only.
#[derive(Clone, Copy, Debug, Default)]
pub struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|address| is_public(address.ip())).collect();
            if public.is_empty() {
                return Err(AddressError::NotPublic.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
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
            ("https://127.0.0.1", Some(NotPublic)),
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

    #[tokio::test]
    async fn a_name_that_resolves_to_a_local_address_is_not_reached() {
        let resolved = PublicOnly.resolve("localhost".parse().unwrap()).await;
        assert!(resolved.is_err());
    }
}
