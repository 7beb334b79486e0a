//! The fake provider lives in the crate, behind `test-util`: tests of other crates use it as well.

pub use loopwright_activities::testing::{Dialect, FakeProvider, answer_json, stream};
