//! Read models: what REST, Telegram and the command line show of runs. Pure functions over what the engine tells;
//! nothing here is ever read back by a decision.

pub mod progress;
pub mod task;
