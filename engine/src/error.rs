//! Errors of the engine's public boundary: values for the caller now, as opposed to failures, which are data.

/// What the engine's functions return to their callers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no run {0}")]
    RunNotFound(String),
    #[error("run {0} is closed")]
    RunClosed(String),
    #[error("no definition {0}")]
    DefinitionNotFound(String),
    #[error("the definition is not valid: {0}")]
    DefinitionInvalid(String),
    #[error("the inputs are not valid: {}", .0.join("; "))]
    InputInvalid(Vec<String>),
    #[error("the payload does not satisfy the form: {}", .0.join("; "))]
    SignalInvalid(Vec<String>),
    #[error("run {0} does not wait for an approval `{1}`")]
    ApprovalNotWaiting(String, String),
    #[error("{what} is {actual} bytes; the limit is {limit}")]
    TooLarge { what: &'static str, actual: usize, limit: usize },
    #[error("another worker owns the run now")]
    LeaseLost,
    #[error("the run was refused: {reason}: {message}")]
    Refused { reason: String, message: String },
    #[error("invariant broken: {0}")]
    Invariant(String),
    #[error("expression: {0}")]
    Expression(String),
    #[cfg(feature = "runtime")]
    #[error("database: {0}")]
    Sql(#[from] sqlx::Error),
}

impl Error {
    /// A stable code for programs; listed in the crate's README.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::RunNotFound(_) => "run_not_found",
            Self::RunClosed(_) => "run_closed",
            Self::DefinitionNotFound(_) => "definition_not_found",
            Self::DefinitionInvalid(_) => "definition_invalid",
            Self::InputInvalid(_) => "input_invalid",
            Self::SignalInvalid(_) => "signal_invalid",
            Self::ApprovalNotWaiting(..) => "approval_not_waiting",
            Self::TooLarge { .. } => "too_large",
            Self::LeaseLost => "lease_lost",
            Self::Refused { .. } => "refused",
            Self::Invariant(_) => "invariant",
            Self::Expression(_) => "expression",
            #[cfg(feature = "runtime")]
            Self::Sql(_) => "database",
        }
    }
}

/// Shorthand for the engine's results.
pub type Result<T> = std::result::Result<T, Error>;
