//! Whether it is the question that a server fails at.
//!
//! A plain 500 may be an outage, which is waited for without an end, or the work of one question, at which the server will fail for
//! ever. It is the question's if the same key has answered somebody for the same model since it failed at this question before.
//! Only this process's calls are known: who asks alone waits as for an outage.

use crate::keys::KeyRef;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Most keys with a model, and most questions, that are remembered: many times what a worker has to do with. What is forgotten is
/// waited for a little longer.
const REMEMBERED_MAX: usize = 4_096;

/// A question at a model: the step, the call in it, the model.
pub(super) type Asked = (String, String, String);

/// When keys have last answered for a model, and when a server has last failed at a question.
#[derive(Default)]
pub(super) struct Blame(Mutex<Known>);

#[derive(Default)]
struct Known {
    answered: HashMap<(KeyRef, String), Instant>,
    failed: HashMap<Asked, Instant>,
}

impl Blame {
    /// Notes that a key has answered for a model.
    pub(super) fn answered(&self, key: &KeyRef, model: &str, now: Instant) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        put(&mut known.answered, (key.clone(), model.to_owned()), now);
    }

    /// Notes that the server behind `key` has failed at a question, and says whether that is about the question.
    pub(super) fn failed(&self, asked: Asked, key: &KeyRef, now: Instant) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = known.answered.get(&(key.clone(), asked.2.clone())).copied();
        let before = known.failed.get(&asked).copied();
        put(&mut known.failed, asked, now);
        matches!((before, answered), (Some(before), Some(answered)) if answered > before)
    }
}

fn put<K: Eq + std::hash::Hash>(map: &mut HashMap<K, Instant>, key: K, now: Instant) {
    if map.len() >= REMEMBERED_MAX && !map.contains_key(&key) {
        map.clear();
    }
    map.insert(key, now);
}

/// A failure of the server that some questions cause. What a proxy says of the server behind it, and what says that the server is
/// overloaded, is about the server.
pub(super) fn is_plain(status: Option<u16>) -> bool {
    status.is_some_and(|status| (500..=599).contains(&status) && !matches!(status, 502..=504 | 520..=530))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use uuid::Uuid;

    #[test]
    fn a_failure_is_the_questions_if_others_were_answered_since_the_last_one() {
        let (blame, key) = (Blame::default(), KeyRef::Own(Uuid::nil()));
        let start = Instant::now();
        let at = |second: u64| start + Duration::from_secs(second);
        let asked = |call: &str| ("step".to_owned(), call.to_owned(), "m".to_owned());
        blame.answered(&key, "m", at(0));
        assert!(!blame.failed(asked("a"), &key, at(1)), "an outage may begin like that");
        assert!(!blame.failed(asked("a"), &key, at(2)), "and goes on like that");
        blame.answered(&key, "other", at(3));
        blame.answered(&KeyRef::Own(Uuid::max()), "m", at(3));
        assert!(!blame.failed(asked("a"), &key, at(4)), "another model or key says nothing");
        blame.answered(&key, "m", at(5));
        assert!(!blame.failed(asked("b"), &key, at(6)));
        assert!(blame.failed(asked("a"), &key, at(6)));
        assert!(!blame.failed(asked("a"), &key, at(7)), "each time anew: the server may be away by now");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let blame = Blame::default();
        let now = Instant::now();
        for n in 0..=2 * REMEMBERED_MAX {
            blame.answered(&KeyRef::Own(Uuid::from_u128(n as u128)), "m", now);
            blame.failed((n.to_string(), "a".into(), "m".into()), &KeyRef::Own(Uuid::nil()), now);
        }
        let known = blame.0.lock().unwrap();
        assert!(known.answered.len() <= REMEMBERED_MAX && known.failed.len() <= REMEMBERED_MAX);
    }

    #[test]
    fn overload_and_gateways_are_no_plain_failures() {
        for status in [500, 501, 505, 599] {
            assert!(is_plain(Some(status)), "{status}");
        }
        for status in [None, Some(200), Some(408), Some(502), Some(503), Some(504), Some(522), Some(529)] {
            assert!(!is_plain(status), "{status:?}");
        }
    }
}
