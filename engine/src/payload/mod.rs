//! How JSON becomes what is stored, and back.
//!
//! ```text
//! value ──text──▶ small, nobody's words of ours in it ──────────────▶ no key: as it is ──▶ column
//!                   └─ otherwise: large values are taken out (`cut`) ──┘  └─ key: sealed (`keys`)
//!                                    └──▶ Blob ──▶ `store::blobs`, before the document
//! ```
//!
//! Everything in `store` that writes or reads `runs.inputs`, `output`, `failure` and `cursor`, `history.events`,
//! `checkpoints.value`, `inbox.payload`, `attempt_progress.progress` and `schedules.inputs` goes through here. What is searched
//! (attributes, names, business keys, groups) and what says where a run stands does not, and is plain.
//!
//! A small document without a key costs one search of its text for `"$loopwright"` each way, and is not parsed for it.
//!
//! The ring is the process's, as its crypto backend is: whoever makes a client or a worker cannot forget it.

mod cut;
mod keys;

pub use keys::PayloadKeys;

pub(crate) use cut::{Hash, hex};

use crate::{
    Error, Result, event,
    ids::RunId,
    store::{
        blobs,
        transitions::{Text, text},
    },
};
use cut::{BLOB_BYTES, Cutter};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};
use sha2::{Digest, Sha256};
use sqlx::{
    Decode, PgConnection, Postgres, Type,
    error::BoxDynError,
    postgres::{PgTypeInfo, PgValueFormat, PgValueRef},
    types::Json,
};
use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, RwLock},
};
use uuid::Uuid;

/// The member of an object inside a document that is not the user's.
const OURS: &str = "$loopwright";
/// As it stands in a text, written by serde or by Postgres: neither escapes a letter.
const OURS_TEXT: &str = "\"$loopwright\"";
/// The one member of a sealed document.
const SEALED: &str = "$sealed";
const SEALED_TEXT: &str = "{\"$sealed\"";
/// Blobs inside blobs. A text of the parser's greatest depth cannot have more.
const NESTED_MAX: usize = 128;

static RING: RwLock<Option<Arc<PayloadKeys>>> = RwLock::new(None);

/// Seals what this process writes from now on, and opens what it reads. `None`: writes plain, and cannot read what is sealed.
pub fn install(keys: Option<PayloadKeys>) {
    *RING.write().unwrap_or_else(std::sync::PoisonError::into_inner) = keys.map(Arc::new);
}

fn ring() -> Option<Arc<PayloadKeys>> {
    RING.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
}

/// Id of the key that seals.
pub(crate) fn sealing_key() -> Option<String> {
    ring().and_then(|keys| keys.ids().next().map(str::to_owned))
}

/// Where a document stands. What is sealed for one place does not open in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot<'a> {
    Inputs,
    Output,
    Failure,
    /// The state after that transition.
    Cursor {
        seq: i64,
    },
    Events {
        seq: i64,
    },
    Checkpoint {
        path: &'a str,
        key: &'a str,
    },
    /// Its number is not known when it is written.
    Message {
        kind: &'a str,
        name: &'a str,
    },
    Progress {
        path: &'a str,
    },
    /// Inputs of a schedule; by its id instead of a run's.
    Schedule,
    Blob {
        hash: &'a Hash,
    },
}

impl Slot<'_> {
    /// Additional data of the seal: version, table, run and the rest of the key, each after its length. The shard is a
    /// function of the run.
    fn bytes(self, run: Uuid) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(96);
        let mut put = |part: &[u8]| {
            bytes.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(part);
        };
        put(b"1");
        put(self.column().as_bytes());
        put(run.as_bytes());
        match self {
            Self::Inputs | Self::Output | Self::Failure | Self::Schedule => {}
            Self::Cursor { seq } | Self::Events { seq } => put(&seq.to_le_bytes()),
            Self::Checkpoint { path: a, key: b } | Self::Message { kind: a, name: b } => {
                put(a.as_bytes());
                put(b.as_bytes());
            }
            Self::Progress { path } => put(path.as_bytes()),
            Self::Blob { hash } => put(hash),
        }
        bytes
    }

    fn column(self) -> &'static str {
        match self {
            Self::Inputs => "runs.inputs",
            Self::Output => "runs.output",
            Self::Failure => "runs.failure",
            Self::Cursor { .. } => "runs.cursor",
            Self::Events { .. } => "history.events",
            Self::Checkpoint { .. } => "checkpoints.value",
            Self::Message { .. } => "inbox.payload",
            Self::Progress { .. } => "attempt_progress.progress",
            Self::Schedule => "schedules.inputs",
            Self::Blob { .. } => "blobs.bytes",
        }
    }

    /// Values above that depth stay in the document: an event keeps its type and path, a state its members.
    fn depth(self) -> usize {
        match self {
            Self::Events { .. } => 2,
            Self::Cursor { .. } => 1,
            _ => 0,
        }
    }
}

impl fmt::Display for Slot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cursor { seq } | Self::Events { seq } => write!(f, "{} {seq}", self.column()),
            Self::Checkpoint { path: a, key: b } | Self::Message { kind: a, name: b } => {
                write!(f, "{} `{a}` `{b}`", self.column())
            }
            Self::Blob { hash } => write!(f, "{} {}", self.column(), hex(hash)),
            other => f.write_str(other.column()),
        }
    }
}

/// A large value on its way to a row of its own.
pub(crate) struct Blob {
    pub(crate) run: RunId,
    pub(crate) hash: Hash,
    text: String,
}

/// What is stored of it.
pub(crate) struct Stowed {
    pub(crate) key: Option<String>,
    pub(crate) size: i32,
    pub(crate) bytes: Vec<u8>,
}

impl Blob {
    /// Deflates and seals it.
    pub(crate) fn stow(&self) -> Result<Stowed> {
        let (size, bytes) = (i32::try_from(self.text.len()).unwrap_or(i32::MAX), keys::packed(&self.text)?);
        let Some(ring) = ring() else { return Ok(Stowed { key: None, size, bytes }) };
        let (key, bytes) = ring.seal_bytes(self.run.0, Slot::Blob { hash: &self.hash }, &bytes)?;
        Ok(Stowed { key: Some(key), size, bytes })
    }
}

/// The value of a stored blob.
///
/// # Errors
/// `payload_key_missing`, `payload_corrupt`.
fn unstow(run: RunId, hash: &Hash, key: Option<&str>, bytes: &[u8]) -> Result<Value> {
    let text = match key {
        Some(key) => keys::unpacked(&open_bytes(key, run.0, Slot::Blob { hash }, bytes)?)?,
        None => {
            let text = keys::unpacked(bytes)?;
            if plain_hash(&text) != *hash {
                return Err(Error::PayloadCorrupt(format!("blob {} of run {run} is another", hex(hash))));
            }
            text
        }
    };
    serde_json::from_str(&text).map_err(|e| Error::PayloadCorrupt(format!("blob {} of run {run}: {e}", hex(hash))))
}

/// The bytes of a blob under the key that seals now.
pub(crate) fn resealed(run: RunId, hash: &Hash, key: Option<&str>, bytes: &[u8]) -> Result<Stowed> {
    let slot = Slot::Blob { hash };
    let plain = match key {
        Some(key) => open_bytes(key, run.0, slot, bytes)?,
        None => bytes.to_vec(),
    };
    let ring = ring().ok_or_else(no_ring)?;
    let (key, bytes) = ring.seal_bytes(run.0, slot, &plain)?;
    Ok(Stowed { key: Some(key), size: 0, bytes })
}

/// A stored document under the key that seals now; nothing of it is looked into.
pub(crate) fn resealed_document(id: Uuid, slot: Slot<'_>, stored: &str) -> Result<Text> {
    let text = opened(id, slot, stored)?;
    raw(ring().ok_or_else(no_ring)?.seal(id, slot, &text)?)
}

fn no_ring() -> Error {
    Error::InputInvalid(vec!["there is no payload key to seal with: set LOOPWRIGHT_PAYLOAD_KEYS".into()])
}

fn open_bytes(key: &str, id: Uuid, slot: Slot<'_>, bytes: &[u8]) -> Result<Vec<u8>> {
    ring().ok_or_else(|| Error::PayloadKeyMissing(key.to_owned()))?.open_bytes(key, id, slot, bytes)
}

fn plain_hash(text: &str) -> Hash {
    Sha256::digest(text.as_bytes()).into()
}

/// Whether a text can be stored as it is.
fn is_plain(text: &str) -> bool {
    text.len() <= BLOB_BYTES && !is_marked(text)
}

fn is_marked(text: &str) -> bool {
    text.contains(OURS_TEXT) || text.starts_with(SEALED_TEXT)
}

fn raw(text: String) -> Result<Text> {
    RawValue::from_string(text).map_err(|e| Error::Invariant(format!("what is to be stored is no JSON: {e}")))
}

/// Seals a text, if there is a key.
fn finish(id: Uuid, slot: Slot<'_>, text: Text) -> Result<Text> {
    match ring() {
        None => Ok(text),
        Some(ring) => raw(ring.seal(id, slot, text.get())?),
    }
}

/// A value that is serialized again, member by member: what it says is not parsed from a text, which would round numbers.
fn tree(value: &impl Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| Error::Invariant(format!("what is to be stored is no JSON: {e}")))
}

/// The text to be stored of a value. Large values in it come to `blobs`, which must be stored before it, or with it.
///
/// # Errors
/// `invariant`: everything that is stored can be written.
pub(crate) fn pack(run: RunId, slot: Slot<'_>, value: &impl Serialize, blobs: &mut Vec<Blob>) -> Result<Text> {
    let mut text = text(value)?;
    if !is_plain(text.get()) {
        let ring = ring();
        let mut take = |text: String| {
            // A key can be derived, or nothing would be sealed at all.
            let hash = ring
                .as_ref()
                .map_or_else(|| Some(plain_hash(&text)), |r| r.hashes(run.0, &text).ok()?.first().copied())?;
            if !blobs.iter().any(|blob: &Blob| blob.hash == hash && blob.run == run) {
                blobs.push(Blob { run, hash, text });
            }
            Some(hash)
        };
        text = stamped(slot, Cutter { depth: slot.depth(), take: &mut take }.document(tree(value)?))?;
    }
    finish(run.0, slot, text)
}

/// The text of a document that was cut. A state says itself in which format it is; if something of it lies apart, an older release
/// must not read it.
fn stamped(slot: Slot<'_>, mut document: Value) -> Result<Text> {
    let text = document.to_string();
    if matches!(slot, Slot::Cursor { .. })
        && is_marked(&text)
        && let Some(state) = document.as_object_mut()
    {
        let own = state.get("format").and_then(Value::as_u64).unwrap_or(0);
        state.insert("format".into(), own.max(event::APART.into()).into());
        return raw(document.to_string());
    }
    raw(text)
}

/// The number of a row of history: that of its events, or [`event::APART`] if its text is not all that they say.
pub(crate) fn format(text: &Text, vocabulary: u16) -> u16 {
    if is_marked(text.get()) { vocabulary.max(event::APART) } else { vocabulary }
}

/// [`pack`] of a document that there is nothing in to take out or to wrap; `None` if there is.
pub(crate) fn pack_small(run: RunId, slot: Slot<'_>, value: &impl Serialize) -> Result<Option<Text>> {
    let text = text(value)?;
    if is_plain(text.get()) { finish(run.0, slot, text).map(Some) } else { Ok(None) }
}

/// [`pack`] of a document that is written again and again: only what its run has stored already, or `with` it, is taken out.
/// Everything that a state holds was in an event before, and what is made of many small values would be another blob each time.
pub(crate) async fn pack_known(
    conn: &mut PgConnection,
    run: RunId,
    slot: Slot<'_>,
    value: &impl Serialize,
    with: &[Blob],
) -> Result<Text> {
    if let Some(small) = pack_small(run, slot, value)? {
        return Ok(small);
    }
    let mut known: HashSet<Hash> = blobs::known(conn, run).await?;
    known.extend(with.iter().filter(|blob| blob.run == run).map(|blob| blob.hash));
    let ring = ring();
    let mut take = |text: String| {
        // Perhaps stored under an older key, or before there was one.
        let keyed = ring.as_ref().and_then(|r| r.hashes(run.0, &text).ok()).unwrap_or_default();
        keyed.into_iter().chain([plain_hash(&text)]).find(|hash| known.contains(hash))
    };
    let cut = Cutter { depth: slot.depth(), take: &mut take }.document(tree(value)?);
    finish(run.0, slot, stamped(slot, cut)?)
}

/// The text to be stored of a value that is kept whole, whatever its size.
pub(crate) fn pack_whole(id: Uuid, slot: Slot<'_>, value: &Value) -> Result<Text> {
    let mut text = text(value)?;
    if is_marked(text.get()) {
        text = raw(Cutter { depth: 0, take: &mut |_| None }.document(value.clone()).to_string())?;
    }
    finish(id, slot, text)
}

/// A column of JSON as Postgres sends it, not parsed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored<'r>(pub(crate) &'r str);

impl Type<Postgres> for Stored<'_> {
    fn type_info() -> PgTypeInfo {
        <Json<Value> as Type<Postgres>>::type_info()
    }
    fn compatible(info: &PgTypeInfo) -> bool {
        <Json<Value> as Type<Postgres>>::compatible(info)
    }
}

impl<'r> Decode<'r, Postgres> for Stored<'r> {
    fn decode(value: PgValueRef<'r>) -> std::result::Result<Self, BoxDynError> {
        let bytes = match value.format() {
            // The version of the format comes first.
            PgValueFormat::Binary => value.as_bytes()?.strip_prefix(&[1]).ok_or("a jsonb of another version")?,
            PgValueFormat::Text => value.as_bytes()?,
        };
        Ok(Self(std::str::from_utf8(bytes)?))
    }
}

/// A document as it was given.
pub(crate) enum Doc<'r> {
    Text(Cow<'r, str>),
    Tree(Value),
}

impl Doc<'_> {
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        match self {
            Self::Text(text) => serde_json::from_str(text),
            Self::Tree(value) => T::deserialize(value),
        }
    }
}

/// The text inside a seal.
fn opened<'r>(id: Uuid, slot: Slot<'_>, stored: &'r str) -> Result<Cow<'r, str>> {
    if stored.starts_with(SEALED_TEXT)
        && let Some((key, bytes)) = keys::envelope(stored)?
    {
        return Ok(Cow::Owned(keys::unpacked(&open_bytes(&key, id, slot, &bytes)?)?));
    }
    Ok(Cow::Borrowed(stored))
}

/// Opens a document and puts back what was taken out of it.
///
/// # Errors
/// `payload_key_missing`, `payload_corrupt`; those of reading blobs.
pub(crate) async fn open<'r>(
    conn: &mut PgConnection,
    run: RunId,
    slot: Slot<'_>,
    stored: Stored<'r>,
) -> Result<Doc<'r>> {
    let text = opened(run.0, slot, stored.0)?;
    if !text.contains(OURS_TEXT) {
        return Ok(Doc::Text(text));
    }
    let value: Value = parsed(&text, run.0, slot)?;
    let mut there: HashMap<Hash, Value> = HashMap::new();
    let mut wanted = Vec::new();
    cut::missing(&value, &there, &mut wanted);
    for _ in 0..NESTED_MAX {
        if wanted.is_empty() {
            break;
        }
        let mut next = Vec::new();
        for (hash, key, bytes) in blobs::fetch(conn, run, &wanted).await? {
            there.insert(hash, unstow(run, &hash, key.as_deref(), &bytes)?);
        }
        for blob in there.values() {
            cut::missing(blob, &there, &mut next);
        }
        // What was asked for and did not come is found missing below.
        wanted = next.into_iter().filter(|hash| !wanted.contains(hash)).collect();
    }
    let whole = cut::restore(value, &there);
    Ok(Doc::Tree(whole.map_err(|e| Error::PayloadCorrupt(format!("{slot} of run {run}: {e}")))?))
}

fn parsed(text: &str, id: Uuid, slot: Slot<'_>) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::PayloadCorrupt(format!("{slot} of {id}: {e}")))
}

/// [`open`], as JSON.
pub(crate) async fn read(conn: &mut PgConnection, run: RunId, slot: Slot<'_>, stored: Stored<'_>) -> Result<Value> {
    match open(conn, run, slot, stored).await? {
        Doc::Text(text) => parsed(&text, run.0, slot),
        Doc::Tree(value) => Ok(value),
    }
}

/// [`read`] of what may be absent.
pub(crate) async fn read_some(
    conn: &mut PgConnection,
    run: RunId,
    slot: Slot<'_>,
    stored: Option<Stored<'_>>,
) -> Result<Option<Value>> {
    match stored {
        Some(stored) => read(conn, run, slot, stored).await.map(Some),
        None => Ok(None),
    }
}

/// What [`pack_whole`] had packed.
pub(crate) fn read_whole(id: Uuid, slot: Slot<'_>, stored: Stored<'_>) -> Result<Value> {
    let value = parsed(&opened(id, slot, stored.0)?, id, slot)?;
    cut::restore(value, &HashMap::new())
}
