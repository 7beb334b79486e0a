//! The fake provider lives in the crate, behind `test-util`: tests of other crates use it as well.

pub use loopwright_activities::testing::{Act, Dialect, FakeProvider, Seen, answer_json, stream};
