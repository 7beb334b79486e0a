//! Whether it is the question that a server fails at.
//!
//! A plain 500 may be an outage, which is waited for without an end, or the work of one question, at which the server will fail for
//! ever. Between the two lies a brown-out, in which a server fails at some questions of everybody. It is the question's if the same
//! key has answered others for the same model since it failed at this question first, many times as often as it failed at theirs, and
//! one of them since it failed last.
//! Only this process's calls are known: who asks alone waits as for an outage.

use crate::keys::KeyRef;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Most keys with a model, and most questions, that are remembered: many times what a worker has to do with. What is forgotten is
/// waited for a little longer.
const REMEMBERED_MAX: usize = 4_096;
/// Answers to others, for each failure at theirs and for none at all, that make a failure the question's. Chosen: a server that fails
/// at every second question answers eight in a row once in 256 times, and one that fails at every tenth is asked often enough.
const ANSWERS_MIN: u64 = 8;

/// A question at a model: the step, the call in it, the model.
pub(super) type Asked = (String, String, String);

/// How often keys have answered and failed for a model, and where they stood when a server first failed at a question.
#[derive(Default)]
pub(super) struct Blame(Mutex<Known>);

#[derive(Default)]
struct Known {
    tallies: HashMap<(KeyRef, String), Tally>,
    failed: HashMap<(KeyRef, Asked), Failed>,
}

#[derive(Clone, Copy, Default)]
struct Tally {
    answered: u64,
    failed: u64,
}

/// A question that a server has failed at.
#[derive(Clone, Copy)]
struct Failed {
    /// At the first time.
    then: Tally,
    /// Answers of its key at the last time.
    answered: u64,
    /// Of this question, that time included.
    times: u64,
}

impl Blame {
    /// Notes that a key has answered a question for its model.
    pub(super) fn answered(&self, asked: &Asked, key: &KeyRef) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.failed.remove(&(key.clone(), asked.clone()));
        let of_key = (key.clone(), asked.2.clone());
        let tally = known.tallies.get(&of_key).copied().unwrap_or_default();
        put(&mut known.tallies, of_key, Tally { answered: tally.answered + 1, ..tally });
    }

    /// Notes that the server behind `key` has failed at a question, and says whether that is about the question.
    pub(super) fn failed(&self, asked: Asked, key: &KeyRef) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_key = (key.clone(), asked.2.clone());
        let tally = known.tallies.get(&of_key).copied().unwrap_or_default();
        let tally = Tally { failed: tally.failed + 1, ..tally };
        put(&mut known.tallies, of_key, tally);
        let asked = (key.clone(), asked);
        let Some(before) = known.failed.get(&asked).copied() else {
            put(&mut known.failed, asked, Failed { then: tally, answered: tally.answered, times: 1 });
            return false;
        };
        let Failed { then, times, .. } = before;
        put(&mut known.failed, asked, Failed { then, answered: tally.answered, times: times + 1 });
        // Each time anew: the server may be away by now.
        if tally.answered <= before.answered {
            return false;
        }
        let answered = tally.answered.saturating_sub(then.answered);
        let of_others = tally.failed.saturating_sub(then.failed).saturating_sub(times);
        answered >= ANSWERS_MIN.saturating_mul(of_others.max(1))
    }
}

fn put<K: Eq + std::hash::Hash, V>(map: &mut HashMap<K, V>, key: K, value: V) {
    if map.len() >= REMEMBERED_MAX && !map.contains_key(&key) {
        map.clear();
    }
    map.insert(key, value);
}

/// A failure of the server that some questions cause. What a proxy says of the server behind it, and what says that the server is
/// overloaded, is about the server.
pub(super) fn is_plain(status: Option<u16>) -> bool {
    status.is_some_and(|status| (500..=599).contains(&status) && !matches!(status, 502..=504 | 520..=530))
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn asked(n: usize) -> Asked {
        ("step".to_owned(), n.to_string(), "m".to_owned())
    }

    #[test]
    fn a_failure_is_the_questions_if_many_others_were_answered_since_the_first_one() {
        let (blame, key) = (Blame::default(), KeyRef::Own(Uuid::nil()));
        let others = |key: &KeyRef, model: &str, n: usize| {
            (0..n).for_each(|n| blame.answered(&("s".into(), format!("other {n}"), model.into()), key));
        };
        others(&key, "m", 20);
        assert!(!blame.failed(asked(0), &key), "an outage may begin like that");
        assert!(!blame.failed(asked(0), &key), "and goes on like that");
        others(&key, "other", 20);
        others(&KeyRef::Own(Uuid::max()), "m", 20);
        assert!(!blame.failed(asked(0), &key), "another model or key says nothing");
        others(&key, "m", 7);
        assert!(!blame.failed(asked(0), &key));
        others(&key, "m", 1);
        assert!(!blame.failed(asked(1), &key), "it is new");
        assert!(blame.failed(asked(0), &key));
        assert!(!blame.failed(asked(0), &key), "an outage may have begun since");
        others(&key, "m", 1);
        assert!(blame.failed(asked(0), &key));
        blame.answered(&asked(0), &key);
        assert!(!blame.failed(asked(0), &key), "it was answered meanwhile");
    }

    #[test]
    fn a_brown_out_is_nobodys_and_a_few_failures_of_others_hide_nothing() {
        // Of each ten questions of others so many fail.
        for (failing, own) in [(0, true), (1, true), (3, false), (5, false), (9, false)] {
            let (blame, key) = (Blame::default(), KeyRef::Own(Uuid::nil()));
            let mut blamed = false;
            assert!(!blame.failed(asked(0), &key));
            for n in 1..=400 {
                if n % 10 < failing {
                    assert!(!blame.failed(asked(n), &key), "{failing} of ten");
                } else {
                    blame.answered(&asked(n), &key);
                }
                if n % 20 == 0 {
                    blamed = blame.failed(asked(0), &key);
                }
            }
            assert_eq!(blamed, own, "{failing} of ten");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let blame = Blame::default();
        for n in 0..=2 * REMEMBERED_MAX {
            let key = KeyRef::Own(Uuid::from_u128(n as u128));
            blame.answered(&asked(0), &key);
            blame.failed(asked(n), &key);
        }
        let known = blame.0.lock().unwrap();
        assert!(known.tallies.len() <= REMEMBERED_MAX && known.failed.len() <= REMEMBERED_MAX);
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
