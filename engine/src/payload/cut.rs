//! Large values taken out of a document and put back; pure.
//!
//! A value of more than [`BLOB_BYTES`] becomes `{"$loopwright": {"blob": "<hash>", "size": n}}`. It is done from the inside
//! out: in `{"files": [<100 KiB>], "n": 1}` the list is taken out, and is the same blob wherever else it stands. What is left
//! of a value that is still too large is taken out as well, references and all.
//!
//! An object of a user's whose one member is `$loopwright` is kept as it is, with all that is in it: `{"$loopwright": {"raw": <it>}}`.
//! Nothing inside is looked at again, so however deep such objects stand inside each other, two levels are added once. A whole
//! document whose one member is `$sealed` is wrapped with what was taken out of it: `{"$loopwright": {"is": <it>}}`; releases before
//! migration 18 wrote both so, each object by itself. So every JSON comes back as it was.

use super::{OURS, SEALED};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// What names a stored value within its run.
pub(crate) type Hash = [u8; 32];

/// Largest value that stays in its document, in bytes of JSON. Chosen: below it a row of its own costs more than it saves.
pub(crate) const BLOB_BYTES: usize = 64 << 10;

/// Takes values out. `depth`: values above it stay, whatever their size: SQL looks into what is there.
pub(super) struct Cutter<'a> {
    pub(super) depth: usize,
    /// Told the text of a value that is too large; says under which name it is stored, or `None` if it is to stay.
    pub(super) take: &'a mut dyn FnMut(String) -> Option<Hash>,
}

impl Cutter<'_> {
    /// A whole document.
    pub(super) fn document(&mut self, value: Value) -> Value {
        let (value, _) = self.cut(value, 0);
        if only(&value, SEALED).is_some() { wrapped(value) } else { value }
    }

    /// The value as it is stored, and the length of its text.
    fn cut(&mut self, mut value: Value, depth: usize) -> (Value, usize) {
        let raw = only(&value, OURS).is_some();
        if raw {
            value = json!({ OURS: { "raw": value } });
        }
        let mut bytes = match &mut value {
            whole if raw => whole.to_string().len(),
            Value::Array(items) => {
                let parts = items.iter_mut().map(|item| self.cut_in_place(item, depth + 1) + 1).sum::<usize>();
                (parts + 1).max(2)
            }
            Value::Object(map) => {
                let members = map.iter_mut();
                let parts = members.map(|(k, item)| text_bytes(k) + 2 + self.cut_in_place(item, depth + 1));
                (parts.sum::<usize>() + 1).max(2)
            }
            Value::String(text) => text_bytes(text),
            Value::Number(number) => number.to_string().len(),
            Value::Bool(_) | Value::Null => 5,
        };
        if bytes > BLOB_BYTES && depth >= self.depth {
            // The same value has one text, in whatever order its members came.
            value.sort_all_objects();
            let text = value.to_string();
            let size = text.len();
            if let Some(hash) = (self.take)(text) {
                value = json!({ OURS: { "blob": hex(&hash), "size": size } });
                bytes = value.to_string().len();
            }
        }
        (value, bytes)
    }

    fn cut_in_place(&mut self, value: &mut Value, depth: usize) -> usize {
        let (cut, bytes) = self.cut(value.take(), depth);
        *value = cut;
        bytes
    }
}

/// Length of a text as JSON.
fn text_bytes(text: &str) -> usize {
    // A text can be written.
    serde_json::to_string(text).map_or(0, |t| t.len())
}

fn wrapped(value: Value) -> Value {
    json!({ OURS: { "is": value } })
}

/// The value of an object's one member, if that has this name.
fn only<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    value.as_object().filter(|map| map.len() == 1)?.get(name)
}

/// What an object that is ours says.
enum Ours {
    Is,
    /// All of it is the user's.
    Raw,
    Blob(Hash),
}

fn ours(value: &Value) -> Option<Ours> {
    let inner = only(value, OURS)?;
    if only(inner, "is").is_some() {
        return Some(Ours::Is);
    }
    if only(inner, "raw").is_some() {
        return Some(Ours::Raw);
    }
    let map = inner.as_object().filter(|map| map.len() == 2 && map.contains_key("size"))?;
    unhex(map.get("blob")?.as_str()?).map(Ours::Blob)
}

/// The blobs that a document refers to and that are not among those that are there.
pub(super) fn missing(value: &Value, there: &HashMap<Hash, Value>, found: &mut Vec<Hash>) {
    match ours(value) {
        Some(Ours::Blob(hash)) => {
            if !there.contains_key(&hash) && !found.contains(&hash) {
                found.push(hash);
            }
            return;
        }
        Some(Ours::Raw) => return,
        Some(Ours::Is) | None => {}
    }
    match value {
        Value::Array(items) => items.iter().for_each(|item| missing(item, there, found)),
        Value::Object(map) => map.values().for_each(|item| missing(item, there, found)),
        _ => {}
    }
}

/// The document as it was.
///
/// # Errors
/// `payload_corrupt` if a blob is not among those that are there.
pub(super) fn restore(value: Value, blobs: &HashMap<Hash, Value>) -> Result<Value> {
    match ours(&value) {
        Some(Ours::Blob(hash)) => {
            let blob = blobs.get(&hash).cloned();
            return restore(blob.ok_or_else(|| Error::PayloadCorrupt(format!("no blob {}", hex(&hash))))?, blobs);
        }
        // What is wrapped is not ours; what is below it may be.
        Some(Ours::Is) => return within(unwrapped(value, "is"), blobs),
        Some(Ours::Raw) => return Ok(unwrapped(value, "raw")),
        None => {}
    }
    within(value, blobs)
}

fn unwrapped(mut value: Value, name: &str) -> Value {
    value[OURS][name].take()
}

fn within(value: Value, blobs: &HashMap<Hash, Value>) -> Result<Value> {
    Ok(match value {
        Value::Array(items) => Value::Array(items.into_iter().map(|item| restore(item, blobs)).collect::<Result<_>>()?),
        Value::Object(map) => Value::Object(
            map.into_iter().map(|(k, item)| Ok((k, restore(item, blobs)?))).collect::<Result<Map<_, _>>>()?,
        ),
        other => other,
    })
}

pub(crate) fn hex(hash: &Hash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Hash> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, at) in hash.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    /// Cuts, and puts together again from what was taken out.
    fn there_and_back(value: &Value, depth: usize) -> (Value, Value, usize) {
        let mut blobs: HashMap<Hash, Value> = HashMap::new();
        let mut take = |text: String| {
            let hash: Hash = Sha256::digest(text.as_bytes()).into();
            blobs.insert(hash, serde_json::from_str(&text).unwrap());
            Some(hash)
        };
        let cut = Cutter { depth, take: &mut take }.document(value.clone());
        let back = restore(cut.clone(), &blobs).unwrap();
        (cut, back, blobs.len())
    }

    fn json() -> impl Strategy<Value = Value> {
        let name = || {
            prop_oneof![
                3 => Just("$loopwright".to_owned()),
                1 => Just("$sealed".to_owned()),
                1 => Just("is".to_owned()),
                1 => Just("raw".to_owned()),
                1 => Just("blob".to_owned()),
                1 => Just("size".to_owned()),
                2 => "[a-z\"\\\\ü]{0,3}",
            ]
        };
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            name().prop_map(Value::from),
            Just(Value::from("ab".repeat(32))),
            (65_500_usize..65_600).prop_map(|n| Value::from("x".repeat(n))),
            (1_usize..4).prop_map(|n| Value::from("\"ü\n".repeat(n * 9_000))),
        ];
        leaf.prop_recursive(5, 24, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((name(), inner), 0..3).prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_json_comes_back_as_it_was(value in json(), depth in 0_usize..3) {
            let (cut, back, _) = there_and_back(&value, depth);
            prop_assert_eq!(&back, &value);
            prop_assert!(only(&cut, SEALED).is_none());
            // Nothing that could be taken out is left in. A wrapping is none of the user's levels; it may stand around it.
            fn largest(value: &Value, depth: usize, least: usize, inside: bool) -> usize {
                // What is kept as it is, is taken out whole or not at all.
                if only(value, OURS).is_some_and(|v| only(v, "raw").is_some()) {
                    return if depth >= least { value.to_string().len() } else { 0 };
                }
                if let Some(inner) = only(value, OURS).and_then(|v| only(v, "is")).filter(|_| !inside) {
                    return largest(inner, depth, least, true);
                }
                let below = match value {
                    Value::Array(items) => items.iter().map(|v| largest(v, depth + 1, least, false)).max(),
                    Value::Object(map) => map.values().map(|v| largest(v, depth + 1, least, false)).max(),
                    _ => None,
                };
                below.unwrap_or(0).max(if depth >= least { value.to_string().len() } else { 0 })
            }
            let most = largest(&cut, 0, depth, false);
            prop_assert!(most <= BLOB_BYTES + 32, "{}", most);
        }
    }

    #[test]
    fn what_looks_like_ours_is_not_taken_for_it() {
        let blob = json!({ OURS: { "blob": "ab".repeat(32), "size": 7 } });
        for value in [
            blob.clone(),
            json!({ OURS: { "is": blob.clone() } }),
            json!({ OURS: 3 }),
            json!({ SEALED: { "key": "a", "data": "b" } }),
            json!([{ SEALED: 1 }]),
            json!({ "a": [{ OURS: { "is": { OURS: null } } }, blob.clone()] }),
        ] {
            let (cut, back, blobs) = there_and_back(&value, 0);
            assert_eq!((back, blobs), (value, 0), "{cut}");
        }
        let more = json!({ OURS: { "is": 1 }, "other": 2 });
        assert_eq!(there_and_back(&more, 0).0, more, "with a second member it is nobody's but the user's");
    }

    #[test]
    fn whatever_is_accepted_can_be_read_back_however_deep_words_of_ours_stand_in_it() {
        use crate::definition::inputs::{DEPTH_MAX, is_too_deep};
        for name in [OURS, SEALED, "is", "raw", "a"] {
            let deep = (0..DEPTH_MAX).fold(json!("x".repeat(70_000)), |inner, _| json!({ name: inner }));
            assert!(!is_too_deep(&deep));
            let (cut, back, _) = there_and_back(&deep, 0);
            // As a parser reads it, with room for an event or a state around it.
            let text = cut.to_string();
            let around = format!("{}{text}{}", "[".repeat(60), "]".repeat(60));
            assert!(serde_json::from_str::<Value>(&around).is_ok(), "{name}");
            assert_eq!(back, deep, "{name}");
        }
    }

    #[test]
    fn what_earlier_releases_wrapped_is_read_as_before() {
        let user = json!({ OURS: { "raw": { OURS: 3 } } });
        let stored = json!({ "a": wrapped(json!({ OURS: wrapped(json!({ "raw": wrapped(json!({ OURS: 3 })) }))[OURS]["is"] })) });
        assert_eq!(restore(stored, &HashMap::new()).unwrap(), json!({ "a": user }));
    }

    #[test]
    fn a_value_is_taken_out_from_the_inside_and_once() {
        let big = "x".repeat(70_000);
        let (cut, back, blobs) = there_and_back(&json!({ "b": { "t": big, "n": 1 }, "a": [big] }), 0);
        assert_eq!(blobs, 1);
        assert_eq!(cut["b"]["n"], 1);
        assert_eq!(cut["b"]["t"][OURS]["size"], 70_002);
        assert_eq!(cut["a"][0], cut["b"]["t"]);
        assert_eq!(back["a"][0], big.as_str());
        // Much that is small, beside what is large.
        let many: Vec<String> = (0..2_000).map(|n| format!("item number {n:030}")).collect();
        let (cut, _, blobs) = there_and_back(&json!({ "many": many, "t": big }), 0);
        assert_eq!((blobs, cut.to_string().len() < 400), (2, true), "{cut}");
    }

    #[test]
    fn a_reference_that_leads_nowhere_is_said() {
        let value = json!([{ OURS: { "blob": "ab".repeat(32), "size": 7 } }]);
        let error = restore(value, &HashMap::new()).unwrap_err();
        assert_eq!(error.code(), "payload_corrupt");
        assert!(error.to_string().contains("abab"), "{error}");
    }
}
