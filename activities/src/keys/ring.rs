//! The keys that wrap the keys of rows: named, from the environment or a file; a KMS later.

use base64::{Engine, prelude::BASE64_STANDARD};
use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};

/// Keys of a ring. Chosen: more are never in use at once.
const KEKS_MAX: usize = 16;
/// Longest id of a key, in bytes.
const ID_BYTES_MAX: usize = 32;
/// Bytes of a key.
const KEY_BYTES: usize = 32;

/// Key encryption keys (KEK): the first wraps, all unwrap. `Debug` prints their ids.
#[derive(Clone)]
pub struct Ring {
    keks: Vec<(String, LessSafeKey)>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

impl Ring {
    /// Reads a ring: `<id>:<base64 of 32 bytes>`, several with commas; the format of `LOOPWRIGHT_PAYLOAD_KEYS`, whose
    /// entries `loopwright keys generate` makes.
    ///
    /// # Errors
    /// What is wrong and what helps; nothing of a key.
    pub fn parse(text: &SecretString) -> Result<Self, String> {
        let mut keks: Vec<(String, LessSafeKey)> = Vec::new();
        for entry in text.expose_secret().split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let at = keks.len() + 1;
            let (id, key) = entry.split_once(':').ok_or_else(|| format!("entry {at} is not <id>:<base64>"))?;
            let named = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
            if id.is_empty() || id.len() > ID_BYTES_MAX || !id.chars().all(named) {
                return Err(format!(
                    "the id of entry {at} is not 1 to {ID_BYTES_MAX} characters of a-z, 0-9, -, _ and ."
                ));
            }
            if keks.iter().any(|(other, _)| other == id) {
                return Err(format!("key `{id}` is there twice"));
            }
            let bytes = BASE64_STANDARD.decode(key.trim()).map(Zeroizing::new).ok();
            let key = bytes.filter(|bytes| bytes.len() == KEY_BYTES).and_then(|bytes| aead(&bytes));
            let key = key.ok_or_else(|| {
                format!("key `{id}` is not {KEY_BYTES} bytes as base64: make one by `loopwright keys generate`")
            })?;
            keks.push((id.to_owned(), key));
        }
        match keks.len() {
            0 => Err("there is no key in it".into()),
            n if n > KEKS_MAX => Err(format!("{n} keys; at most {KEKS_MAX}")),
            _ => Ok(Self { keks }),
        }
    }

    /// The first is the one that wraps.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.keks.iter().map(|(id, _)| id.as_str())
    }

    pub(super) fn first(&self) -> Option<(&str, &LessSafeKey)> {
        self.keks.first().map(|(id, key)| (id.as_str(), key))
    }

    pub(super) fn find(&self, id: &str) -> Option<&LessSafeKey> {
        self.keks.iter().find(|(other, _)| other == id).map(|(_, key)| key)
    }
}

/// An AES-256-GCM key of `bytes`; `None` unless there are 32.
pub(super) fn aead(bytes: &[u8]) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, bytes).ok().map(LessSafeKey::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_read_or_says_what_is_wrong_with_it_and_nothing_of_a_key() {
        let entry = |id: &str, byte: u8| format!("{id}:{}", BASE64_STANDARD.encode([byte; KEY_BYTES]));
        let ring = Ring::parse(&format!("{}, {}", entry("2026b", 1), entry("2026a", 2)).into()).unwrap();
        assert_eq!(format!("{ring:?}"), r#"["2026b", "2026a"]"#);
        for (text, why) in [
            (String::new(), "no key"),
            ("secretsecret".into(), "entry 1 is not <id>:<base64>"),
            ("Upper:secretsecret".into(), "the id of entry 1"),
            ("a:secretsecret".into(), "key `a` is not 32 bytes"),
            (format!("{},{}", entry("a", 1), entry("a", 2)), "key `a` is there twice"),
            ((0..17).map(|n| entry(&format!("k{n}"), n)).collect::<Vec<_>>().join(","), "17 keys; at most 16"),
        ] {
            let error = Ring::parse(&text.into()).unwrap_err();
            assert!(error.contains(why) && !error.contains("secretsecret"), "{error}");
        }
    }
}
