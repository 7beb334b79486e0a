//! What activities work with, composed once by the program that registers them.

use crate::{billing::Rate, orchestrator::Orchestrator, sandbox::Sandbox, workspace::Workspaces};
use sqlx::PgPool;
use std::path::PathBuf;

/// The instruments of every activity of the development loop; activities hold an `Arc` of it.
#[derive(Clone)]
pub struct Toolbox {
    /// The only way to a model.
    pub orchestrator: Orchestrator,
    /// The only way to a project's files.
    pub workspaces: Workspaces,
    /// The only way to run a command.
    pub sandbox: Sandbox,
    /// For the stores of activities that keep rows of their own.
    pub pool: PgPool,
    /// Folder of this worker for caches and scratch; nothing in it is the only copy of anything.
    pub data_dir: PathBuf,
    /// What a model call costs in credits, for forecasts.
    pub rate: Rate,
}
