//! What comes with the program is deployed, and a team's own version is never overwritten by it.

use loopwright_engine::{
    client::{Client, Deploy},
    definition::Bundle,
    embedded::testing,
    hook::NoHook,
    signature::Catalog,
};
use loopwright_server::{
    app,
    shipped::{self, Outcome, Source},
};
use std::{path::Path, sync::Arc};

const ONE: &str = "dsl: 1\nname: small\ntimeout: 1h\nsteps:\n  - { id: rest, wait: { for: 1s } }\n";
const TWO: &str = "dsl: 1\nname: small\ntimeout: 1h\nsteps:\n  - { id: rest, wait: { for: 2s } }\n";
const THEIRS: &str = "dsl: 1\nname: small\ntimeout: 1h\nsteps:\n  - { id: rest, wait: { for: 3s } }\n";

async fn client() -> Client {
    Client::new(testing::database(loopwright_activities::MIGRATIONS).await, Arc::new(NoHook))
}

/// A program that ships this text starts.
async fn start(client: &Client, text: &str) -> Outcome {
    let source = Source { definitions: &[("small.yaml", text)], prompts: &[("prompts/a.hbs", "a")] };
    let mut outcomes = shipped::deploy(client, source, &Catalog::default()).await.unwrap();
    assert_eq!(outcomes.len(), 1);
    outcomes.remove(0)
}

/// A team deploys this text.
async fn team(client: &Client, text: &str) {
    let (compiled, _) = loopwright_workflows::compile(text, "small.yaml", &Bundle::new(), &Catalog::default());
    let compiled = compiled.unwrap();
    let deploy = Deploy {
        definition: compiled.definition,
        bundle: compiled.bundle,
        source: text.into(),
        author: Some("operator".into()),
        message: None,
    };
    client.deploy(deploy).await.unwrap();
}

async fn current(client: &Client) -> u32 {
    client.versions("small").await.unwrap().iter().find(|v| v.current).unwrap().version
}

fn deployed(version: u32) -> Outcome {
    Outcome::Deployed { name: "small".into(), version }
}

fn present() -> Outcome {
    Outcome::Present { name: "small".into() }
}

#[tokio::test]
async fn a_newer_program_brings_its_newer_definition_once() {
    let client = client().await;
    assert_eq!(start(&client, ONE).await, deployed(1));
    assert_eq!(start(&client, ONE).await, present());
    assert_eq!(start(&client, TWO).await, deployed(2));
    assert_eq!(start(&client, TWO).await, present());
    // A program of the release before starts again beside it: no step back.
    assert_eq!(start(&client, ONE).await, present());
    assert_eq!(current(&client).await, 2);
    let versions = client.versions("small").await.unwrap();
    assert!(versions.iter().all(|v| v.author.as_deref() == Some(shipped::AUTHOR)), "{versions:?}");
}

#[tokio::test]
async fn a_teams_own_version_stays_current() {
    let client = client().await;
    start(&client, ONE).await;
    team(&client, THEIRS).await;
    assert_eq!(start(&client, ONE).await, present());
    assert_eq!(start(&client, TWO).await, Outcome::Kept { name: "small".into(), version: 2 });
    assert_eq!(current(&client).await, 2);
    assert_eq!(client.versions("small").await.unwrap().len(), 2);
}

#[tokio::test]
async fn programs_that_start_at_once_agree() {
    let client = client().await;
    let starts = (0..4).map(|_| {
        let client = client.clone();
        tokio::spawn(async move { start(&client, ONE).await })
    });
    let starts: Vec<_> = starts.collect();
    for start in starts {
        let outcome = start.await.unwrap();
        assert!(outcome == deployed(1) || outcome == present(), "{outcome:?}");
    }
    assert_eq!(client.versions("small").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_shipped_definition_that_does_not_compile_says_where() {
    let client = client().await;
    let source = Source { definitions: &[("broken.yaml", "dsl: 1\nnam: x\n")], prompts: &[] };
    let error = shipped::deploy(&client, source, &Catalog::default()).await.unwrap_err();
    assert!(error.code() == "definition_invalid" && error.to_string().contains("broken.yaml:2:1"), "{error}");
}

#[tokio::test]
async fn what_ships_is_made_of_the_programs_own_activities() {
    let client = client().await;
    let outcomes = shipped::deploy(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
    let names = [
        "dev-loop",
        "reconcile-calls",
        "reconcile-grants",
        "reconcile-ledger",
        "reconcile-payments",
        "reconcile-prices",
        "reconcile-providers",
    ];
    assert_eq!(outcomes, names.map(|name| Outcome::Deployed { name: name.into(), version: 1 }));
    // Their schedules are made once; what an operator did to one of them stays.
    let made = shipped::schedule(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
    assert_eq!(made.len(), 6);
    assert!(made.contains(&"reconcile-ledger/cron/1".to_owned()), "{made:?}");
    client.schedules().pause("reconcile-calls/cron/1", None).await.unwrap();
    let again = shipped::schedule(&client, shipped::SHIPPED, &app::catalog()).await.unwrap();
    assert_eq!(again, [""; 0]);
    let paused = client.schedules().describe("reconcile-calls/cron/1").await.unwrap().schedule;
    assert!(paused.paused_at.is_some() && paused.owner.as_deref() == Some("loopwright"), "{paused:?}");
}

/// Names of the files of a folder that end so.
fn files(folder: &Path, ending: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|n| n.ends_with(ending) && n != "models.yaml").collect();
    names.sort();
    names
}

#[test]
fn every_file_of_workflow_defs_is_embedded() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workflow-defs");
    let names = |list: &[(&str, &str)]| list.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(names(shipped::DEFINITIONS), files(&folder, ".yaml"), "shipped::DEFINITIONS, by name");
    let prompts: Vec<String> = files(&folder.join("prompts"), ".hbs").iter().map(|n| format!("prompts/{n}")).collect();
    assert_eq!(names(shipped::PROMPTS), prompts, "shipped::PROMPTS, by name");
}
