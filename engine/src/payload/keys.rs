//! The key ring and what is sealed with it.
//!
//! Each run has keys of its own, derived from the ring's by HKDF, one for sealing and one for the names of its blobs. Nonces are
//! random 96-bit numbers; the bound of 2^32 messages for a key (NIST SP 800-38D, section 8.3) is therefore one of a run, which
//! has a few for each transition.

use super::{Slot, cut::Hash};
use crate::{Error, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf, hmac,
    rand::{SecureRandom, SystemRandom},
};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use std::io::{Read, Write};
use uuid::Uuid;

/// Keys of a ring. Chosen: more are never in use at once.
const KEYS_MAX: usize = 16;
/// Longest id of a key, in bytes.
const ID_BYTES_MAX: usize = 32;
/// Bytes of a key.
const KEY_BYTES: usize = 32;
/// Separates these keys from all that anybody else may derive from the same bytes.
const SALT: &[u8] = b"loopwright payload 1";
/// Texts from here on are deflated: what is sealed cannot be compressed by Postgres any more.
const DEFLATE_BYTES: usize = 1 << 10;
/// Largest text that is inflated. An archive's bound: nothing larger is stored.
const INFLATED_BYTES_MAX: u64 = 256 << 20;
/// Before the text: how it was written.
const PLAIN: u8 = 0;
const DEFLATED: u8 = 1;

/// The keys that payloads are sealed with: the first seals, all open. `Debug` prints their ids.
#[derive(Clone)]
pub struct PayloadKeys {
    keys: Vec<(String, hkdf::Prk)>,
}

impl std::fmt::Debug for PayloadKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

/// What is kept of a sealed document outside its seal.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    #[serde(rename = "$sealed")]
    sealed: Sealed,
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    key: String,
    data: String,
}

impl PayloadKeys {
    /// Reads a ring: `<id>:<base64 of 32 bytes>`, several with commas. An id is 1 to 32 characters of `a-z`, `0-9`, `-`, `_`, `.`.
    ///
    /// # Errors
    /// What is wrong and what helps; nothing of a key.
    pub fn parse(ring: &SecretString) -> std::result::Result<Self, String> {
        let mut keys: Vec<(String, hkdf::Prk)> = Vec::new();
        for entry in ring.expose_secret().split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let at = keys.len() + 1;
            let (id, key) = entry.split_once(':').ok_or_else(|| format!("entry {at} is not <id>:<base64>"))?;
            let named = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
            if id.is_empty() || id.len() > ID_BYTES_MAX || !id.chars().all(named) {
                return Err(format!(
                    "the id of entry {at} is not 1 to {ID_BYTES_MAX} characters of a-z, 0-9, -, _ and ."
                ));
            }
            if keys.iter().any(|(other, _)| other == id) {
                return Err(format!("key `{id}` is there twice"));
            }
            let key =
                BASE64_STANDARD.decode(key.trim()).ok().filter(|key| key.len() == KEY_BYTES).ok_or_else(|| {
                    format!("key `{id}` is not {KEY_BYTES} bytes as base64: make one by `loopwright keys generate`")
                })?;
            keys.push((id.to_owned(), hkdf::Salt::new(hkdf::HKDF_SHA256, SALT).extract(&Zeroizing::new(key))));
        }
        match keys.len() {
            0 => Err("there is no key in it".into()),
            n if n > KEYS_MAX => Err(format!("{n} keys; at most {KEYS_MAX}")),
            _ => Ok(Self { keys }),
        }
    }

    /// A new entry of a ring.
    ///
    /// # Errors
    /// `invariant` if the system has no randomness.
    pub fn generate(id: &str) -> Result<SecretString> {
        let mut key = [0; KEY_BYTES];
        random(&mut key)?;
        let entry = SecretString::from(format!("{id}:{}", BASE64_STANDARD.encode(key)));
        Self::parse(&entry).map_err(|why| Error::InputInvalid(vec![why]))?;
        Ok(entry)
    }

    /// The first is the one that seals.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(id, _)| id.as_str())
    }

    fn find(&self, key: &str) -> Result<&hkdf::Prk> {
        let found = self.keys.iter().find(|(id, _)| id == key);
        found.map(|(_, prk)| prk).ok_or_else(|| Error::PayloadKeyMissing(key.to_owned()))
    }

    /// Seals a document for its one place.
    pub(super) fn seal(&self, run: Uuid, slot: Slot<'_>, text: &str) -> Result<String> {
        let (key, data) = self.seal_bytes(run, slot, &packed(text)?)?;
        let sealed = Sealed { key, data: BASE64_STANDARD.encode(data) };
        serde_json::to_string(&Envelope { sealed }).map_err(|e| Error::Invariant(e.to_string()))
    }

    /// Id of the key, and nonce, ciphertext, tag.
    pub(super) fn seal_bytes(&self, run: Uuid, slot: Slot<'_>, plain: &[u8]) -> Result<(String, Vec<u8>)> {
        let (id, prk) = self.keys.first().ok_or_else(|| Error::Invariant("a ring without a key".into()))?;
        let mut nonce = [0; NONCE_LEN];
        random(&mut nonce)?;
        let mut data = plain.to_vec();
        sealing(prk, run)?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(slot.bytes(run)), &mut data)
            .map_err(|_| Error::Invariant("a payload cannot be sealed".into()))?;
        let mut all = nonce.to_vec();
        all.extend(data);
        Ok((id.clone(), all))
    }

    /// The bytes that were sealed.
    ///
    /// # Errors
    /// `payload_key_missing`; `payload_corrupt` if they were changed, or are not from this place.
    pub(super) fn open_bytes(&self, key: &str, run: Uuid, slot: Slot<'_>, all: &[u8]) -> Result<Vec<u8>> {
        let corrupt = || Error::PayloadCorrupt(format!("{slot} of run {run} does not open under key `{key}`"));
        let prk = self.find(key)?;
        let (nonce, data) = all.split_at_checked(NONCE_LEN).ok_or_else(corrupt)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| corrupt())?;
        let mut data = data.to_vec();
        let length = sealing(prk, run)?
            .open_in_place(nonce, Aad::from(slot.bytes(run)), &mut data)
            .map_err(|_| corrupt())?
            .len();
        data.truncate(length);
        Ok(data)
    }

    /// What a value's blob is called under each key, the one that seals first.
    pub(super) fn hashes(&self, run: Uuid, text: &str) -> Result<Vec<Hash>> {
        let hash = |(_, prk): &(String, hkdf::Prk)| {
            let info = [&b"blob"[..], run.as_bytes()];
            let key = prk.expand(&info, hmac::HMAC_SHA256).map(hmac::Key::from);
            let tag =
                hmac::sign(&key.map_err(|_| Error::Invariant("a key cannot be derived".into()))?, text.as_bytes());
            Hash::try_from(tag.as_ref()).map_err(|e| Error::Invariant(e.to_string()))
        };
        self.keys.iter().map(hash).collect()
    }
}

fn random(bytes: &mut [u8]) -> Result<()> {
    SystemRandom::new().fill(bytes).map_err(|_| Error::Invariant("the system gives no random bytes".into()))
}

/// A run's own key.
fn sealing(prk: &hkdf::Prk, run: Uuid) -> Result<LessSafeKey> {
    let info = [&b"seal"[..], run.as_bytes()];
    let key = prk.expand(&info, &AES_256_GCM).map(UnboundKey::from);
    Ok(LessSafeKey::new(key.map_err(|_| Error::Invariant("a key cannot be derived".into()))?))
}

/// The id of the key and the bytes of a sealed document; `None` for any other.
pub(super) fn envelope(text: &str) -> Result<Option<(String, Vec<u8>)>> {
    let Ok(Envelope { sealed }) = serde_json::from_str(text) else { return Ok(None) };
    let data = BASE64_STANDARD.decode(&sealed.data);
    let data = data.map_err(|_| Error::PayloadCorrupt(format!("what key `{}` sealed is no base64", sealed.key)))?;
    Ok(Some((sealed.key, data)))
}

/// A text as bytes, deflated when that pays.
pub(super) fn packed(text: &str) -> Result<Vec<u8>> {
    if text.len() < DEFLATE_BYTES {
        return Ok([&[PLAIN], text.as_bytes()].concat());
    }
    let mut deflate = DeflateEncoder::new(vec![DEFLATED], Compression::fast());
    // Writing to memory does not fail.
    let all = deflate.write_all(text.as_bytes()).and_then(|()| deflate.finish());
    all.map_err(|e| Error::Invariant(e.to_string()))
}

/// The text again.
///
/// # Errors
/// `payload_corrupt`
pub(super) fn unpacked(bytes: &[u8]) -> Result<String> {
    let corrupt = |why: &dyn std::fmt::Display| Error::PayloadCorrupt(format!("a payload cannot be inflated: {why}"));
    match bytes.split_first() {
        Some((&PLAIN, text)) => String::from_utf8(text.to_vec()).map_err(|e| corrupt(&e)),
        Some((&DEFLATED, deflated)) => {
            let mut text = String::new();
            let read = DeflateDecoder::new(deflated).take(INFLATED_BYTES_MAX).read_to_string(&mut text);
            read.map_err(|e| corrupt(&e))?;
            Ok(text)
        }
        _ => Err(corrupt(&"it does not say how it was written")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(entries: &[&str]) -> PayloadKeys {
        PayloadKeys::parse(&SecretString::from(entries.join(","))).unwrap()
    }

    fn entry(id: &str, byte: u8) -> String {
        format!("{id}:{}", BASE64_STANDARD.encode([byte; KEY_BYTES]))
    }

    #[test]
    fn a_ring_is_read_or_says_what_is_wrong_with_it_and_nothing_of_a_key() {
        let keys = ring(&[&entry("2026b", 1), "", &format!(" {} ", entry("2026a", 2))]);
        assert_eq!(keys.ids().collect::<Vec<_>>(), ["2026b", "2026a"]);
        assert_eq!(format!("{keys:?}"), r#"["2026b", "2026a"]"#);
        for (text, why) in [
            (String::new(), "no key"),
            ("secretsecret".into(), "entry 1 is not <id>:<base64>"),
            ("Upper:secretsecret".into(), "the id of entry 1"),
            ("a:secretsecret".into(), "key `a` is not 32 bytes"),
            (format!("{},{}", entry("a", 1), entry("a", 2)), "key `a` is there twice"),
            ((0..17).map(|n| entry(&format!("k{n}"), n)).collect::<Vec<_>>().join(","), "17 keys; at most 16"),
        ] {
            let error = PayloadKeys::parse(&SecretString::from(text)).unwrap_err();
            assert!(error.contains(why) && !error.contains("secretsecret"), "{error}");
        }
        let made = PayloadKeys::generate("2027").unwrap();
        assert_eq!(PayloadKeys::parse(&made).unwrap().ids().collect::<Vec<_>>(), ["2027"]);
        assert_eq!(PayloadKeys::generate("No").unwrap_err().code(), "input_invalid");
    }

    #[test]
    fn what_is_sealed_opens_in_its_place_alone() {
        let (run, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let keys = ring(&[&entry("b", 1), &entry("a", 2)]);
        let places = [
            Slot::Inputs,
            Slot::Output,
            Slot::Failure,
            Slot::Cursor { seq: 4 },
            Slot::Events { seq: 4 },
            Slot::Events { seq: 5 },
            Slot::Checkpoint { path: "a", key: "bc" },
            Slot::Checkpoint { path: "ab", key: "c" },
            Slot::Message { kind: "signal", name: "go" },
            Slot::Message { kind: "update", name: "go" },
            Slot::Progress { path: "a" },
            Slot::Schedule,
            Slot::Blob { hash: &[1; 32] },
            Slot::Blob { hash: &[2; 32] },
        ];
        for text in ["{}".to_owned(), "the same again, ".repeat(500)] {
            for place in places {
                let (key, sealed) = keys.seal_bytes(run, place, &packed(&text).unwrap()).unwrap();
                assert_eq!(key, "b");
                for there in places {
                    let opened = keys.open_bytes(&key, run, there, &sealed);
                    if there == place {
                        assert_eq!(unpacked(&opened.unwrap()).unwrap(), text);
                    } else {
                        assert_eq!(opened.unwrap_err().code(), "payload_corrupt", "{place} {there}");
                    }
                }
                let corrupt =
                    |key: &str, run, bytes: &[u8]| keys.open_bytes(key, run, place, bytes).unwrap_err().code();
                assert_eq!(corrupt("b", other, &sealed), "payload_corrupt");
                assert_eq!(corrupt("a", run, &sealed), "payload_corrupt");
                assert_eq!(corrupt("b", run, &sealed[..5]), "payload_corrupt");
                let mut changed = sealed.clone();
                changed[NONCE_LEN] ^= 1;
                assert_eq!(corrupt("b", run, &changed), "payload_corrupt");
                assert_eq!(corrupt("c", run, &sealed), "payload_key_missing");
            }
        }
    }

    #[test]
    fn the_name_of_a_blob_is_its_runs_and_its_keys() {
        let keys = ring(&[&entry("b", 1), &entry("a", 2)]);
        let of = |run, text| keys.hashes(Uuid::from_u128(run), text).unwrap();
        assert_eq!(of(1, "x"), of(1, "x"));
        assert_eq!(of(1, "x")[1], ring(&[&entry("a", 2)]).hashes(Uuid::from_u128(1), "x").unwrap()[0]);
        let mut names = [of(1, "x"), of(1, "y"), of(2, "x")].concat();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 6);
    }

    #[test]
    fn texts_come_back_and_what_is_no_text_is_said() {
        for text in ["", "short", &"long ü ".repeat(10_000)] {
            assert_eq!(unpacked(&packed(text).unwrap()).unwrap(), text);
        }
        assert!(packed(&"long ".repeat(10_000)).unwrap().len() < 1_000);
        for bytes in [&[][..], &[7, 1], &[PLAIN, 0xff], &[DEFLATED, 0xff, 0xff]] {
            assert_eq!(unpacked(bytes).unwrap_err().code(), "payload_corrupt");
        }
    }
}
