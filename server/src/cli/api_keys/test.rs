//! Which keys are asked about, and what is said of them: for `api-keys test` and `doctor`.

use crate::{app::App, cli::failure::refuse, config::Config};
use futures_util::{StreamExt as _, stream};
use loopwright_activities::{
    keys::{KeyView, Keys},
    provider::{
        KeyIdentity, Settings,
        address::Trust,
        probe::{Probe, Target, Verdict, probe},
    },
};
use secrecy::SecretString;
use serde::Serialize;
use uuid::Uuid;

/// Keys that are asked about at the same time. Chosen: forty keys in under a minute, if nobody answers.
const AT_ONCE: usize = 8;

/// A key that can be asked about, or why not.
pub(crate) struct Subject {
    /// Its row; `None` while it has none.
    row: Option<KeyView>,
    provider: String,
    last4: String,
    how: Result<How, String>,
}

struct How {
    /// `None`: a server that wants none.
    key: Option<SecretString>,
    /// `None`: the configured one.
    address: Option<String>,
    trust: Trust,
}

/// What was found of a key.
#[derive(Debug, Serialize)]
pub(crate) struct Tested {
    pub id: Option<Uuid>,
    pub user_id: Option<Uuid>,
    pub provider: String,
    pub last4: String,
    /// Of its row, before; a test changes nothing.
    pub status: Option<String>,
    #[serde(flatten)]
    pub probe: Probe,
    /// What to do; empty when nothing is to be done.
    pub remedy: String,
}

impl Tested {
    pub(crate) fn works(&self) -> bool {
        self.probe.verdict == Verdict::Works
    }

    /// One line for people.
    pub(crate) fn finding(&self) -> String {
        let last4 = if self.last4.is_empty() { String::new() } else { format!(" …{}", self.last4) };
        let verdict = match self.probe.verdict {
            Verdict::Works => "works",
            Verdict::Refused => "refused",
            Verdict::Unreachable => "unreachable",
        };
        match (&self.probe.code, self.probe.message.as_str()) {
            (Some(code), message) => format!("{}{last4} {verdict}: {message} ({code})", self.provider),
            (None, _) => format!("{}{last4} {verdict}", self.provider),
        }
    }
}

/// How the providers are reached, by this configuration.
///
/// # Errors
/// The setting that cannot be used, by name.
pub(crate) fn settings(config: &Config) -> anyhow::Result<Settings> {
    Ok(Settings::from_lookup(&|name| config.provider_setting(name))?)
}

/// The keys of this process's environment and configuration file.
pub(crate) fn of_environment(settings: &Settings) -> Vec<Subject> {
    let subject = |provider: &str, key: Option<&SecretString>| Subject {
        row: None,
        provider: provider.to_owned(),
        last4: KeyIdentity::of(provider, key).last4,
        how: Ok(How { key: key.cloned(), address: None, trust: Trust::Operator }),
    };
    let mut subjects: Vec<Subject> =
        settings.keys().into_iter().map(|(provider, key)| subject(provider, Some(key))).collect();
    if settings.openai_compatible.as_ref().is_some_and(|endpoint| endpoint.keys.is_empty()) {
        subjects.push(subject("openai_compatible", None));
    }
    subjects
}

/// The platform's sealed keys.
///
/// # Errors
/// The database's.
pub(crate) async fn of_platform(keys: &Keys, settings: &Settings) -> anyhow::Result<Vec<Subject>> {
    let rows = keys.list(None).await?;
    let mut subjects = Vec::new();
    for row in rows {
        if row.user_id.is_none() && row.source == "sealed" && row.status != "revoked" {
            subjects.push(of_row(keys, settings, row).await?);
        }
    }
    Ok(subjects)
}

/// What is meant on the command line: an id, a label, or with `None` every key of the platform.
///
/// # Errors
/// Nothing is meant; the database's.
pub(crate) async fn meant(app: &App, keys: &Keys, name: Option<&str>) -> anyhow::Result<(Settings, Vec<Subject>)> {
    let settings = settings(&app.config)?;
    // So that each has an id, as after the start of a worker.
    let identity = |(provider, key): (&str, &SecretString)| {
        let identity = KeyIdentity::of(provider, Some(key));
        (provider.to_owned(), identity.fingerprint, identity.last4)
    };
    keys.board().register(&settings.keys().into_iter().map(identity).collect::<Vec<_>>()).await?;
    let rows = keys.list(None).await?;
    let subjects = match name {
        Some(name) => {
            let id = name.parse::<Uuid>().ok();
            let meant = |row: &KeyView| Some(row.id) == id || (id.is_none() && row.label == name);
            let mut subjects = Vec::new();
            for row in rows.into_iter().filter(meant) {
                subjects.push(of_row(keys, &settings, row).await?);
            }
            if subjects.is_empty() {
                let text = format!("no key has the id or label `{name}`; see `loopwright api-keys list`");
                return Err(refuse("key_not_found", text));
            }
            subjects
        }
        None => {
            let mut subjects = of_environment(&settings);
            for subject in &mut subjects {
                let key = subject.how.as_ref().ok().and_then(|how| how.key.as_ref());
                let fingerprint = KeyIdentity::of(&subject.provider, key).fingerprint;
                let same = |row: &&KeyView| {
                    row.user_id.is_none() && row.provider == subject.provider && row.fingerprint == fingerprint
                };
                subject.row = rows.iter().find(same).cloned();
            }
            let listed: Vec<Uuid> =
                subjects.iter().filter_map(|subject| subject.row.as_ref().map(|row| row.id)).collect();
            let sealed = of_platform(keys, &settings).await?;
            subjects.extend(sealed.into_iter().filter(|s| s.row.as_ref().is_none_or(|row| !listed.contains(&row.id))));
            if subjects.is_empty() {
                let text = "the platform has no key; set GEMINI_API_KEY, OPENROUTER_API_KEY or OPENAI_BASE_URL, or `loopwright api-keys add --platform`";
                return Err(refuse("key_not_found", text));
            }
            subjects
        }
    };
    Ok((settings, subjects))
}

async fn of_row(keys: &Keys, settings: &Settings, row: KeyView) -> anyhow::Result<Subject> {
    let how = if row.status == "revoked" {
        Err("it is revoked: nothing is left of it".to_owned())
    } else if row.source == "sealed" {
        let sealed = keys
            .sealed(row.id)
            .await?
            .ok_or_else(|| refuse("key_not_found", "the key was revoked meanwhile; ask again"))?;
        keys.open(&sealed).map_err(|error| error.to_string()).and_then(|content| match sealed.is_platform() {
            false => Ok(How { key: Some(content.key), address: content.base_url, trust: keys.trust() }),
            // As workers do.
            true if settings.address(&row.provider)?.as_str() != content.base_url.as_deref().unwrap_or_default() => {
                Err("it was stored for another address than the configured one: add it again".to_owned())
            }
            true => Ok(How { key: Some(content.key), address: content.base_url, trust: Trust::Operator }),
        })
    } else {
        let keys = settings.keys();
        let here = keys.into_iter().find(|(provider, key)| {
            *provider == row.provider && KeyIdentity::of(provider, Some(key)).fingerprint == row.fingerprint
        });
        match here {
            Some((_, key)) => Ok(How { key: Some(key.clone()), address: None, trust: Trust::Operator }),
            None => Err("it stands in the environment of another process: test it there".to_owned()),
        }
    };
    Ok(Subject { provider: row.provider.clone(), last4: row.last4.clone(), how, row: Some(row) })
}

/// Asks about all of them, some at a time; in their order.
pub(crate) async fn ask(settings: &Settings, subjects: Vec<Subject>) -> Vec<Tested> {
    let asked = stream::iter(subjects.into_iter().map(|subject| one(settings, subject)));
    asked.buffered(AT_ONCE).collect().await
}

async fn one(settings: &Settings, subject: Subject) -> Tested {
    let Subject { row, provider, last4, how } = subject;
    let probe = match how {
        Ok(How { key, address, trust }) => {
            let target = Target { provider: &provider, address: address.as_deref(), trust };
            probe(settings, &target, key.as_ref()).await
        }
        Err(why) => Probe { verdict: Verdict::Refused, code: Some("provider.key_sealed".to_owned()), message: why },
    };
    let out = row.as_ref().filter(|row| row.status == "disabled" || row.status == "cooling");
    let remedy = match (probe.verdict, out) {
        (Verdict::Works, Some(row)) => format!("it is {}; loopwright api-keys enable {}", row.status, row.id),
        (Verdict::Works, None) => String::new(),
        (Verdict::Refused, _) => "replace it, or act as it says".to_owned(),
        (Verdict::Unreachable, _) => "check the network and the base URL".to_owned(),
    };
    Tested {
        id: row.as_ref().map(|row| row.id),
        user_id: row.as_ref().and_then(|row| row.user_id),
        status: row.map(|row| row.status),
        provider,
        last4,
        probe,
        remedy,
    }
}
