//! Keys on a real Postgres, by subject: sealed in their rows, of users and of the platform, the standing that workers share,
//! budgets per minute, what calls on own keys cost, what providers say of their keys.
//!
//! Where each item of the reference of security, sections 2 and 3, is held (`sealed::…` is `keys/sealed.rs`; a path with `src`
//! is a unit test):
//!
//! | section 2 | test |
//! | --- | --- |
//! | a random DEK a row, random nonces | `src/keys/envelope.rs`: `the_same_key_never_looks_the_same` |
//! | every changed byte is noticed | `src/keys/envelope.rs`: `every_changed_byte_is_noticed` |
//! | AAD: another row, provider, owner, version, address | `sealed::a_key_is_kept_sealed_and_opens_in_its_own_row_alone`, `src/keys/envelope.rs`: `what_is_sealed_opens_in_its_row_for_its_provider_and_owner_alone` |
//! | AAD: the platform's and a user's are not each other's | `platform::a_key_of_the_platform_is_no_users_and_the_reverse` |
//! | rotation of the KEK, restartable; the old one may leave | `sealed::a_rotation_that_breaks_off_goes_on_and_the_old_key_may_leave`, `platform::the_platforms_keys_rotate_rest_and_end_as_others_do` |
//! | rotation of the DEK | `sealed::a_rotation_that_breaks_off_goes_on_and_the_old_key_may_leave` (`anew`) |
//! | a worker without the ring | `own::a_worker_without_the_ring_says_so_and_asks_nobody`, `platform::a_worker_that_cannot_open_a_key_says_so_once_and_goes_on_with_the_others` |
//! | `Debug` is redacted | `sealed::a_key_is_kept_sealed_and_opens_in_its_own_row_alone`, `src/keys/envelope.rs`, `src/keys/ring.rs` |
//! | no key in a log line and no fingerprint, only id and last four | `log::no_log_line_holds_a_key` |
//! | the header that carries it is sensitive | `provider::errors::no_client_that_is_shown_shows_its_key`, `src/provider/http.rs` |
//! | no key in a failure or record | `own::a_users_key_serves_his_runs_and_goes_to_its_own_server_alone`, `provider::errors::no_error_shows_the_key_or_the_words_of_the_server` |
//! | a key pasted into the chat: deleted, in no table, `telegram_inbox.raw` and `conversations` included | `server/tests/it/telegram.rs`: `a_pasted_key_is_deleted_and_nowhere_in_the_database` (every table is searched), `a_key_in_a_caption_a_quote_or_an_edit_is_deleted_too_and_one_that_stays_is_nowhere_else`; shapes: `server/src/telegram/secret.rs` |
//! | a revoked key is destroyed | `sealed::a_revoked_key_is_destroyed_and_may_come_back` |
//!
//! | section 3 | test |
//! | --- | --- |
//! | every forbidden range, odd spellings, ports, user info, fragment, http | `src/provider/address.rs`: `a_user_reaches_public_hosts_only`, `loopback_is_a_switch_of_the_operator_and_opens_nothing_else` |
//! | refused when it is stored, with a code | `sealed::what_is_no_key_or_leads_inside_is_refused_with_a_code_and_leaves_nothing`, `server/tests/it/keys.rs` |
//! | DNS rebinding, at the moment of the connection | `src/provider/address.rs`: `a_name_that_changes_its_address_after_the_check_reaches_nothing_inside`, `a_connection_is_refused_by_the_address_at_its_moment_and_says_so`; in each client: `provider::limits::a_name_that_leads_inside_is_not_connected_to_by_any_client` |
//! | never to another host than it was stored for | `sealed::a_key_is_kept_sealed_and_opens_in_its_own_row_alone` (a bent row), `platform::a_key_goes_to_the_address_that_it_was_stored_for_or_nowhere` |
//! | redirects | `own::a_users_key_serves_his_runs_and_goes_to_its_own_server_alone`, `provider::faults` (`Redirect`) |
//! | proxies of the environment | `server/tests/it/keys.rs`: `keys_are_tested_without_the_proxy_of_the_environment`; of the issuer's keys: `auth::jwks::the_issuer_is_asked_without_the_proxy_of_the_environment` |
//! | error body of 10 MB, body limit, decompression limit | `provider::faults` (`HugeError`, `HugeBody`, `GzipBomb`) |
//! | total and idle limits | `provider::limits` |
//! | no word of the upstream | `provider::errors::no_error_shows_the_key_or_the_words_of_the_server`, `probe::what_a_provider_says_of_a_key_is_told_in_our_words` |

use crate::fake_provider::FakeProvider;
use base64::{Engine, prelude::BASE64_STANDARD};
use loopwright_activities::{
    billing::{
        MicroCredits,
        ledger::{self, Identity},
    },
    keys::{Keys, NewKey, Ring},
    orchestrator::{Candidate, Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{Settings, StructuredOutput},
};
use loopwright_engine::{
    Failure,
    activity::{
        AttemptInfo, Context,
        detached::{self, Recorder},
    },
};
use serde_json::json;
use sqlx::PgPool;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use uuid::Uuid;

pub mod log;
mod money;
mod own;
mod platform;
mod probe;
mod rates;
mod sealed;
mod standing;
mod totals;

pub const SECRET: &str = "sk-own-0123456789abcdefghij";

pub fn ring(entries: &[(&str, u8)]) -> Ring {
    let text: Vec<_> = entries.iter().map(|(id, b)| format!("{id}:{}", BASE64_STANDARD.encode([*b; 32]))).collect();
    Ring::parse(&text.join(",").into()).unwrap()
}

pub fn new_key(provider: &str, key: &str) -> NewKey {
    NewKey {
        provider: provider.into(),
        key: key.into(),
        label: "mine".into(),
        base_url: None,
        model: None,
        platform_fallback: false,
    }
}

pub async fn user(pool: &PgPool, telegram: i64) -> Uuid {
    let mut tx = pool.begin().await.unwrap();
    let (user, _) = ledger::ensure_user(&mut tx, &Identity::Telegram(telegram), MicroCredits(0)).await.unwrap();
    tx.commit().await.unwrap();
    user
}

pub const QUICK: Pace = Pace { backoff: Duration::from_millis(1), wait_max: Duration::from_secs(30) };

pub fn candidate(provider: &str, model: &str) -> Candidate {
    Candidate {
        provider: provider.into(),
        model: model.into(),
        context_tokens: 10_000,
        max_output_tokens: 4_000,
        structured_output: StructuredOutput::JsonSchema,
        tools: true,
        thinking: None,
        thinking_tokens: 0,
        requests_per_minute: None,
        tokens_per_minute: None,
        tasks: vec![],
        input_umtok_max: None,
        output_umtok_max: None,
    }
}

pub fn request() -> Request {
    Request {
        role: Role::Architect,
        purpose: "plan".into(),
        messages: vec![Message::User { text: "plan it".into() }],
        tools: vec![],
        output_schema: None,
        max_output_tokens: 1_000,
    }
}

/// A worker's orchestrator over a server with the OpenAI dialect and the platform's `api_keys`.
pub fn worker(keys: &Keys, server: &FakeProvider, api_keys: &str, candidate: Candidate) -> Orchestrator {
    worker_at(QUICK, keys, server, api_keys, candidate)
}

/// The same at another pace.
pub fn worker_at(pace: Pace, keys: &Keys, server: &FakeProvider, api_keys: &str, candidate: Candidate) -> Orchestrator {
    let base = server.base();
    let settings = Settings::from_lookup(&|name| match name {
        "OPENAI_BASE_URL" => Some(base.clone()),
        "OPENAI_API_KEYS" => Some(api_keys.to_owned()),
        _ => None,
    })
    .unwrap();
    let routing = Routing { roles: BTreeMap::from([(Role::Architect, vec![candidate])]) };
    Orchestrator::with_keys(routing, settings.providers().unwrap(), pace, keys, settings)
}

pub fn attempt_of(user: Option<Uuid>) -> (Context, Arc<Recorder>) {
    let recorder: Arc<Recorder> = Arc::default();
    (later_attempt_of(user, 1, &recorder), recorder)
}

/// The `attempt`th of a step, which finds what the ones before have recorded.
pub fn later_attempt_of(user: Option<Uuid>, attempt: u32, recorder: &Arc<Recorder>) -> Context {
    let attributes = user.map_or(json!({}), |user| json!({"user_id": user.to_string()}));
    let info = AttemptInfo { attempt, counted: attempt, ..detached::info("plan@1", attributes) };
    detached::context(info, BTreeMap::new(), Arc::clone(recorder))
}

pub async fn ask(worker: &Orchestrator) -> Result<String, Failure> {
    worker.call(&attempt_of(None).0, "plan", request()).await.map(|reply| reply.text)
}

pub fn bearers(server: &FakeProvider) -> Vec<String> {
    server.seen().iter().map(|seen| seen.headers["authorization"].trim_start_matches("Bearer ").to_owned()).collect()
}

/// The rows that `Orchestrator::configured` writes.
pub async fn register(pool: &PgPool, list: &[&str]) {
    let identity = |key: &&str| {
        let identity = loopwright_activities::provider::KeyIdentity::of("openai_compatible", Some(&(*key).into()));
        ("openai_compatible".to_owned(), identity.fingerprint, identity.last4)
    };
    let rows: Vec<_> = list.iter().map(identity).collect();
    Keys::new(pool.clone(), None, false).board().register(&rows).await.unwrap();
}
