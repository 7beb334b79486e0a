//! The definitions that come with the program, and their way into the database.
//!
//! Everything under `workflow-defs/` that a run needs is embedded here, in one place; `models.yaml` is configuration
//! and not a definition. What a team has deployed under the same name stays current: it is theirs.

use loopwright_engine::{
    Error,
    client::{Client, Deploy},
    definition::Bundle,
    ids::DefinitionHash,
    schedule::door::NewSchedule,
    signature::Catalog,
};
use loopwright_workflows::{Compiled, compile, render, schedules};
use serde::Serialize;

/// Author of versions that the program deployed by itself.
pub const AUTHOR: &str = "loopwright";

/// Name and text of every shipped definition.
pub const DEFINITIONS: &[(&str, &str)] = &[
    ("dev-loop.yaml", include_str!("../../workflow-defs/dev-loop.yaml")),
    ("reconcile-calls.yaml", include_str!("../../workflow-defs/reconcile-calls.yaml")),
    ("reconcile-grants.yaml", include_str!("../../workflow-defs/reconcile-grants.yaml")),
    ("reconcile-ledger.yaml", include_str!("../../workflow-defs/reconcile-ledger.yaml")),
    ("reconcile-payments.yaml", include_str!("../../workflow-defs/reconcile-payments.yaml")),
    ("reconcile-prices.yaml", include_str!("../../workflow-defs/reconcile-prices.yaml")),
    ("reconcile-providers.yaml", include_str!("../../workflow-defs/reconcile-providers.yaml")),
];

/// Path and text of every shipped prompt; all of them go with each definition.
pub const PROMPTS: &[(&str, &str)] = &[
    ("prompts/agent.hbs", include_str!("../../workflow-defs/prompts/agent.hbs")),
    ("prompts/gather.hbs", include_str!("../../workflow-defs/prompts/gather.hbs")),
    ("prompts/implement.hbs", include_str!("../../workflow-defs/prompts/implement.hbs")),
    ("prompts/plan.hbs", include_str!("../../workflow-defs/prompts/plan.hbs")),
    ("prompts/readme.hbs", include_str!("../../workflow-defs/prompts/readme.hbs")),
    ("prompts/verify.hbs", include_str!("../../workflow-defs/prompts/verify.hbs")),
];

/// What the rehearsed models of `loopwright demo` answer.
pub const REHEARSAL: &str = include_str!("../../workflow-defs/rehearsal/demo.yaml");

/// Definitions with the prompts that go with them.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub definitions: &'a [(&'a str, &'a str)],
    pub prompts: &'a [(&'a str, &'a str)],
}

/// What this program ships.
pub const SHIPPED: Source<'static> = Source { definitions: DEFINITIONS, prompts: PROMPTS };

/// What became of one shipped definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Outcome {
    /// It is current now.
    Deployed { name: String, version: u32 },
    /// It had been deployed before; nothing was moved, also where somebody rolled back to another version.
    Present { name: String },
    /// Somebody else's version is current and stays so.
    Kept { name: String, version: u32 },
}

/// Deploys what this program ships and the database does not have, unless a team's own version is current.
///
/// # Errors
/// `definition_invalid` when a shipped definition does not compile, which is our bug; those of the database.
/// # Transaction
/// Reads, then one per definition. Idempotent by content hash, so programs that start at once agree. A team's
/// deployment between the two is overtaken: it stays a version, one `workflow deploy` away from being current again.
pub async fn deploy(client: &Client, source: Source<'_>, catalog: &Catalog) -> Result<Vec<Outcome>, Error> {
    let mut outcomes = Vec::new();
    for (file, text) in source.definitions {
        let Compiled { definition, bundle } = compiled(file, text, source.prompts, catalog)?;
        let name = definition.name.clone();
        let hash: DefinitionHash = definition.hash(&bundle);
        let versions = client.versions(&name).await?;
        let current = versions.iter().find(|v| v.current);
        outcomes.push(if versions.iter().any(|v| v.hash == hash) {
            Outcome::Present { name }
        } else if let Some(theirs) = current.filter(|v| v.author.as_deref() != Some(AUTHOR)) {
            tracing::info!(name, version = theirs.version, "a version of your own is current and stays so");
            Outcome::Kept { name, version: theirs.version }
        } else {
            let message = Some(format!("shipped with {}", env!("CARGO_PKG_VERSION")));
            let source = (*text).to_owned();
            let deploy = Deploy { definition, bundle, source, author: Some(AUTHOR.into()), message };
            let version = client.deploy(deploy).await?.version;
            Outcome::Deployed { name, version }
        });
    }
    Ok(outcomes)
}

/// Makes the schedules that the shipped definitions ask for by `on: cron`, unless one of the name is there: what an operator
/// changed, paused or made stays as it is. Their runs are nobody's. Returns the names of those that are new.
///
/// # Errors
/// As [`deploy`]; call it afterwards.
/// # Transaction
/// One per schedule. Idempotent by name, so programs that start at once agree.
pub async fn schedule(client: &Client, source: Source<'_>, catalog: &Catalog) -> Result<Vec<String>, Error> {
    let door = client.schedules();
    let mut made = Vec::new();
    for (file, text) in source.definitions {
        let Compiled { definition, .. } = compiled(file, text, source.prompts, catalog)?;
        for (n, spec) in (1..).zip(schedules(&definition)) {
            let name = format!("{}/cron/{n}", definition.name);
            match door.describe(&name).await {
                Ok(_) => continue,
                Err(Error::ScheduleNotFound(_)) => {}
                Err(error) => return Err(error),
            }
            let new = NewSchedule { name: name.clone(), spec, paused: false, note: None, owner: Some(AUTHOR.into()) };
            match door.create(new).await {
                Ok(_) => made.push(name),
                // Another program was faster.
                Err(Error::ScheduleExists(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(made)
}

fn compiled(file: &str, text: &str, prompts: &[(&str, &str)], catalog: &Catalog) -> Result<Compiled, Error> {
    let bundle: Bundle = prompts.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
    let (compiled, found) = compile(text, file, &bundle, catalog);
    compiled.ok_or_else(|| Error::DefinitionInvalid(render(&found, text)))
}
