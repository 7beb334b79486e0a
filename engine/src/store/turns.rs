//! Whose run is claimed next: pure, the same for Postgres, the memory and the simulator.

use crate::ids::RunId;
use chrono::{DateTime, Utc};
use std::collections::HashMap;

/// Lanes whose last turn is remembered. A forgotten one counts as if it had never had a turn.
const REMEMBERED_MAX: usize = 10_000;

/// A due run, as the queue knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) run: RunId,
    /// 1 is first.
    pub(crate) priority: i16,
    pub(crate) lane: i32,
    pub(crate) due_at: DateTime<Utc>,
}

/// What one worker remembers of the turns that it gave.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// What each lane has here now.
    held: HashMap<i32, usize>,
    /// The number of its last turn.
    last: HashMap<i32, u64>,
    n: u64,
}

impl Turns {
    /// Puts due runs in the order of their turns: by priority; then the lane that would have the fewest here; then the one
    /// whose last turn was the longest ago; within a lane the run that was due first.
    pub(crate) fn order(&self, mut due: Vec<Due>) -> Vec<Due> {
        due.sort_unstable_by_key(|d| (d.priority, d.lane, d.due_at, d.run));
        let (mut of, mut rank) = (None, 0);
        let mut ranked: Vec<(i16, usize, u64, Due)> = due
            .into_iter()
            .map(|d| {
                if of != Some((d.priority, d.lane)) {
                    (of, rank) = (Some((d.priority, d.lane)), self.held(d.lane));
                }
                rank += 1;
                (d.priority, rank, self.last(d.lane), d)
            })
            .collect();
        ranked.sort_unstable_by_key(|(priority, rank, last, d)| (*priority, *rank, *last, d.due_at, d.run));
        ranked.into_iter().map(|(.., d)| d).collect()
    }

    /// How much a lane has here.
    pub(crate) fn held(&self, lane: i32) -> usize {
        self.held.get(&lane).copied().unwrap_or(0)
    }

    /// When a lane had its last turn; 0 is never.
    pub(crate) fn last(&self, lane: i32) -> u64 {
        self.last.get(&lane).copied().unwrap_or(0)
    }

    /// A lane has one more here.
    pub(crate) fn took(&mut self, lane: i32) {
        *self.held.entry(lane).or_default() += 1;
        self.n += 1;
        if self.last.len() >= REMEMBERED_MAX {
            self.last.clear();
        }
        self.last.insert(lane, self.n);
    }

    /// A lane has one less here.
    pub(crate) fn gave_back(&mut self, lane: i32) {
        if let Some(n) = self.held.get_mut(&lane) {
            *n -= 1;
            if *n == 0 {
                self.held.remove(&lane);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn due(n: u128, priority: i16, lane: i32) -> Due {
        let seconds = i64::try_from(n).expect("small");
        Due {
            run: RunId(Uuid::from_u128(n)),
            priority,
            lane,
            due_at: DateTime::UNIX_EPOCH + chrono::Duration::seconds(seconds),
        }
    }

    fn order(turns: &Turns, all: &[Due]) -> Vec<u128> {
        turns.order(all.to_vec()).into_iter().map(|d| d.run.0.as_u128()).collect()
    }

    #[test]
    fn lanes_take_turns_and_priorities_do_not() {
        let all = [due(1, 3, 7), due(2, 3, 7), due(3, 3, 7), due(4, 3, 8), due(5, 1, 7), due(6, 5, 9), due(7, 3, 9)];
        assert_eq!(order(&Turns::default(), &all), [5, 1, 4, 7, 2, 3, 6]);
    }

    #[test]
    fn who_has_much_here_waits_for_who_has_nothing() {
        let mut turns = Turns::default();
        (0..2).for_each(|_| turns.took(7));
        let all = [due(1, 3, 7), due(2, 3, 8), due(3, 3, 8), due(4, 3, 8)];
        assert_eq!(order(&turns, &all), [2, 3, 4, 1]);
        (0..2).for_each(|_| turns.gave_back(7));
        // Everybody has nothing: who had a turn comes after who never had one.
        assert_eq!(order(&turns, &all), [2, 1, 3, 4]);
        turns.gave_back(7);
        assert_eq!(turns.held(7), 0);
    }

    #[test]
    fn one_place_at_a_time_goes_round() {
        let mut turns = Turns::default();
        let mut all: Vec<Due> = (1..=9).map(|n| due(n, 3, 7)).chain((10..=12).map(|n| due(n, 3, 8))).collect();
        let mut lanes = Vec::new();
        while !all.is_empty() {
            let next = turns.order(all.clone())[0];
            lanes.push(next.lane);
            all.retain(|d| d.run != next.run);
            // It ends at once.
            turns.took(next.lane);
            turns.gave_back(next.lane);
        }
        assert_eq!(lanes, [7, 8, 7, 8, 7, 8, 7, 7, 7, 7, 7, 7]);
    }
}
