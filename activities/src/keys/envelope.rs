//! How a key of a user lies in its row: encrypted by a random key of its own (DEK), which is wrapped by a key of the ring
//! (KEK). Both are bound to the row, its provider and its owner: copied anywhere else, neither opens.
//!
//! Nonces are random 96-bit numbers. A DEK encrypts once; a KEK wraps one DEK for each row and rotation, far below the
//! 2^32 messages of NIST SP 800-38D, section 8.3.

use super::{
    Error,
    ring::{Ring, aead},
};
use ring::{
    aead::{Aad, LessSafeKey, NONCE_LEN, Nonce},
    rand::{SecureRandom, SystemRandom},
};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The version of this format; part of what binds.
pub const VERSION: i16 = 1;
/// Bytes of a row's own key.
const DEK_BYTES: usize = 32;

/// The one place where an envelope opens.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Id of the row in `api_keys`.
    pub id: Uuid,
    pub provider: &'a str,
    /// `None`: the platform's.
    pub user: Option<Uuid>,
    pub version: i16,
}

impl Place<'_> {
    /// Additional data: table, row, provider, owner and version, each after its length, so that no two places are alike.
    fn aad(&self) -> Vec<u8> {
        let user = self.user.map_or_else(|| b"platform".to_vec(), |user| user.as_bytes().to_vec());
        let mut bytes = Vec::with_capacity(96);
        for part in
            [b"api_keys", &self.id.as_bytes()[..], self.provider.as_bytes(), &user, &self.version.to_le_bytes()[..]]
        {
            bytes.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(part);
        }
        bytes
    }
}

/// What is sealed: the key together with the one address that it may be sent to.
#[derive(Clone, Debug)]
pub struct Content {
    pub key: SecretString,
    /// `None`: the provider's own.
    pub base_url: Option<String>,
}

/// [`Content`] as it is encrypted.
#[derive(Serialize)]
struct Written<'a> {
    key: &'a str,
    base_url: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    key: SecretString,
    base_url: Option<String>,
}

/// The sealed columns of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub ciphertext: Vec<u8>,
    pub nonce: Vec<u8>,
    /// Nonce, then ciphertext and tag.
    pub wrapped_dek: Vec<u8>,
    pub kek_id: String,
    pub version: i16,
}

/// Seals `content` for `place` under a new random key.
///
/// # Errors
/// `keys_unavailable` without randomness or a key in the ring; `key_invalid` if the content cannot be written.
pub fn seal(ring: &Ring, place: Place<'_>, content: &Content) -> Result<Envelope, Error> {
    let written = Written { key: content.key.expose_secret(), base_url: content.base_url.as_deref() };
    // Room for the tag from the start: growing would leave a copy behind.
    let mut data = Zeroizing::new(Vec::with_capacity(written.key.len() * 2 + 512));
    serde_json::to_writer(&mut *data, &written).map_err(|_| Error::Invalid("the key cannot be written".into()))?;
    let mut dek = Zeroizing::new([0; DEK_BYTES]);
    random(&mut *dek)?;
    let mut nonce = [0; NONCE_LEN];
    random(&mut nonce)?;
    aead(&*dek)
        .ok_or(Error::Unavailable)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place.aad()), &mut *data)
        .map_err(|_| Error::Unavailable)?;
    let (kek_id, wrapped_dek) = wrap(ring, place, &*dek)?;
    Ok(Envelope { ciphertext: data.to_vec(), nonce: nonce.to_vec(), wrapped_dek, kek_id, version: place.version })
}

/// Opens an envelope in its place.
///
/// # Errors
/// `key_encryption_key_missing`; `key_corrupt` if anything of it was changed, or it is from another place.
pub fn open(ring: &Ring, place: Place<'_>, envelope: &Envelope) -> Result<Content, Error> {
    let corrupt = || Error::Corrupt { id: place.id };
    let dek = unwrap(ring, place, envelope)?;
    let dek = aead(&dek).ok_or_else(corrupt)?;
    let data = unsealed(&dek, place, &envelope.nonce, &envelope.ciphertext)?;
    let Read { key, base_url } = serde_json::from_slice(&data).map_err(|_| corrupt())?;
    Ok(Content { key, base_url })
}

/// The same envelope with its key wrapped by the ring's first; the key itself is not touched.
///
/// # Errors
/// As [`open`].
pub fn rewrap(ring: &Ring, place: Place<'_>, envelope: &Envelope) -> Result<Envelope, Error> {
    let dek = unwrap(ring, place, envelope)?;
    let (kek_id, wrapped_dek) = wrap(ring, place, &dek)?;
    Ok(Envelope { kek_id, wrapped_dek, ..envelope.clone() })
}

fn wrap(ring: &Ring, place: Place<'_>, dek: &[u8]) -> Result<(String, Vec<u8>), Error> {
    let (id, kek) = ring.first().ok_or(Error::Unavailable)?;
    let mut nonce = [0; NONCE_LEN];
    random(&mut nonce)?;
    let mut data = Zeroizing::new(Vec::with_capacity(DEK_BYTES + 16));
    data.extend_from_slice(dek);
    kek.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place.aad()), &mut *data)
        .map_err(|_| Error::Unavailable)?;
    Ok((id.to_owned(), [&nonce[..], &data].concat()))
}

fn unwrap(ring: &Ring, place: Place<'_>, envelope: &Envelope) -> Result<Zeroizing<Vec<u8>>, Error> {
    let kek = ring.find(&envelope.kek_id).ok_or_else(|| Error::KekMissing { kek: envelope.kek_id.clone() })?;
    let (nonce, data) = envelope.wrapped_dek.split_at_checked(NONCE_LEN).ok_or(Error::Corrupt { id: place.id })?;
    unsealed(kek, place, nonce, data)
}

fn unsealed(key: &LessSafeKey, place: Place<'_>, nonce: &[u8], data: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
    let corrupt = || Error::Corrupt { id: place.id };
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| corrupt())?;
    let mut data = Zeroizing::new(data.to_vec());
    let length = key.open_in_place(nonce, Aad::from(place.aad()), &mut data).map_err(|_| corrupt())?.len();
    data.truncate(length);
    Ok(data)
}

fn random(bytes: &mut [u8]) -> Result<(), Error> {
    SystemRandom::new().fill(bytes).map_err(|_| Error::Unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::{Engine, prelude::BASE64_STANDARD};

    fn ring(ids: &[(&str, u8)]) -> Ring {
        let entries: Vec<_> = ids.iter().map(|(id, b)| format!("{id}:{}", BASE64_STANDARD.encode([*b; 32]))).collect();
        Ring::parse(&entries.join(",").into()).unwrap()
    }

    fn content() -> Content {
        Content { key: "sk-very-secret-0123456789".into(), base_url: Some("https://models.example.com/v1".into()) }
    }

    #[test]
    fn what_is_sealed_opens_in_its_row_for_its_provider_and_owner_alone() {
        let ring = ring(&[("b", 1), ("a", 2)]);
        let (row, user) = (Uuid::from_u128(1), Some(Uuid::from_u128(7)));
        let place = Place { id: row, provider: "gemini", user, version: VERSION };
        let sealed = seal(&ring, place, &content()).unwrap();
        assert_eq!(sealed.kek_id, "b");
        let opened = open(&ring, place, &sealed).unwrap();
        assert_eq!(opened.key.expose_secret(), content().key.expose_secret());
        assert_eq!(opened.base_url, content().base_url);
        assert!(!format!("{opened:?} {sealed:?} {ring:?}").contains("very-secret"));
        for there in [
            Place { id: Uuid::from_u128(2), ..place },
            Place { provider: "openrouter", ..place },
            Place { user: Some(Uuid::from_u128(8)), ..place },
            Place { user: None, ..place },
            Place { version: VERSION + 1, ..place },
        ] {
            assert_eq!(open(&ring, there, &sealed).unwrap_err().code(), "key_corrupt", "{there:?}");
            assert_eq!(rewrap(&ring, there, &sealed).unwrap_err().code(), "key_corrupt", "{there:?}");
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let ring = ring(&[("a", 1)]);
        let place = Place { id: Uuid::from_u128(1), provider: "gemini", user: None, version: VERSION };
        let sealed = seal(&ring, place, &content()).unwrap();
        let changed = |change: &dyn Fn(&mut Envelope)| {
            let mut other = sealed.clone();
            change(&mut other);
            open(&ring, place, &other).unwrap_err().code()
        };
        for at in 0..sealed.ciphertext.len() {
            assert_eq!(changed(&|e| e.ciphertext[at] ^= 1), "key_corrupt");
        }
        for at in 0..sealed.wrapped_dek.len() {
            assert_eq!(changed(&|e| e.wrapped_dek[at] ^= 1), "key_corrupt");
        }
        assert_eq!(changed(&|e| e.nonce[0] ^= 1), "key_corrupt");
        assert_eq!(changed(&|e| e.nonce.clear()), "key_corrupt");
        assert_eq!(changed(&|e| e.wrapped_dek.truncate(5)), "key_corrupt");
        assert_eq!(changed(&|e| e.ciphertext.clear()), "key_corrupt");
        assert_eq!(changed(&|e| e.kek_id = "b".into()), "key_encryption_key_missing");
    }

    #[test]
    fn another_key_of_the_ring_takes_over_without_the_key_being_touched() {
        let place = Place { id: Uuid::from_u128(1), provider: "gemini", user: None, version: VERSION };
        let sealed = seal(&ring(&[("a", 1)]), place, &content()).unwrap();
        let moved = rewrap(&ring(&[("b", 2), ("a", 1)]), place, &sealed).unwrap();
        assert_eq!((moved.kek_id.as_str(), &moved.ciphertext), ("b", &sealed.ciphertext));
        assert!(open(&ring(&[("b", 2)]), place, &moved).is_ok(), "the old one may leave");
        assert_eq!(open(&ring(&[("b", 2)]), place, &sealed).unwrap_err().code(), "key_encryption_key_missing");
        // Under the right name, the wrong bytes.
        assert_eq!(open(&ring(&[("b", 3)]), place, &moved).unwrap_err().code(), "key_corrupt");
    }

    #[test]
    fn the_same_key_never_looks_the_same() {
        let ring = ring(&[("a", 1)]);
        let place = Place { id: Uuid::from_u128(1), provider: "gemini", user: None, version: VERSION };
        let (one, two) = (seal(&ring, place, &content()).unwrap(), seal(&ring, place, &content()).unwrap());
        assert!(one.ciphertext != two.ciphertext && one.nonce != two.nonce && one.wrapped_dek != two.wrapped_dek);
    }
}
