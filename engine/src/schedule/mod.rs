//! Recurring starts of runs. [`cron`] is pure and says when.

pub mod cron;
