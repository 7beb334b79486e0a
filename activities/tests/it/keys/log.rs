//! What logs hold of keys: ids and last four characters.

use super::{SECRET, ask, attempt_of, candidate, new_key, register, request, ring, user, worker};
use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use loopwright_activities::{
    MIGRATIONS,
    keys::{Keys, NewKey},
    provider::{
        Settings,
        address::Trust,
        probe::{Target, probe},
    },
};
use loopwright_engine::embedded::testing::database;
use std::{
    io::Write,
    sync::{Arc, Mutex},
};
use tracing::subscriber::DefaultGuard;

/// What this thread logs.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
    pub fn clear(&self) {
        self.0.lock().unwrap().clear();
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Every line of every library on this thread until the guard is dropped.
pub fn capture() -> (DefaultGuard, Lines) {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    (tracing::subscriber::set_default(subscriber), lines)
}

const PLATFORM: &str = "sk-platform-abcdefghijklmnop";
const ENVIRONMENT: &str = "sk-environment-qrstuvwxyz0123";

#[tokio::test]
async fn no_log_line_holds_a_key() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    // Every way in which a key is judged, one after the other, over and over.
    let server = FakeProvider::start(|_, n| match n % 6 {
        0 => answer_json(401, "", &Dialect::OpenAi.error(401, "x")),
        1 => answer_json(403, "", &Dialect::OpenAi.error(403, "x")),
        2 => answer_json(429, "retry-after: 60\r\n", &Dialect::OpenAi.error(429, "x")),
        3 => answer_json(402, "", &Dialect::OpenAi.error(402, "x")),
        4 => answer_json(500, "", &Dialect::OpenAi.error(500, "x")),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    let (guard, lines) = capture();
    register(&pool, &[ENVIRONMENT]).await;
    let keys = || Keys::new(pool.clone(), Some(ring(&[("a", 1)])), true);
    let own = NewKey { base_url: Some(server.base()), model: Some("m".into()), ..new_key("openai_compatible", SECRET) };
    for n in 0..6 {
        let id = keys().put(ann, &own).await.unwrap().id;
        let address = format!("{}/", server.base());
        let platform = keys().put_platform(&new_key("openai_compatible", PLATFORM), &address).await.unwrap().id;
        let one = worker(&keys(), &server, ENVIRONMENT, candidate("openai_compatible", "m"));
        let _ = ask(&one).await;
        let _ = one.call(&attempt_of(Some(ann)).0, "plan", request()).await;
        for id in [id, platform] {
            keys().set_enabled(id, n % 2 == 0).await.unwrap();
            keys().set_enabled(id, true).await.unwrap();
        }
        sqlx::query("update api_keys set status = 'active', disabled_reason = null").execute(&pool).await.unwrap();
    }
    keys().rewrap(None, true).await.unwrap();
    // Who cannot open them, and what was changed.
    let _ = ask(&worker(&Keys::new(pool.clone(), None, true), &server, "", candidate("openai_compatible", "m"))).await;
    sqlx::query("update api_keys set nonce = '\\x000000000000000000000000' where source = 'sealed'")
        .execute(&pool)
        .await
        .unwrap();
    let broken = worker(&keys(), &server, ENVIRONMENT, candidate("openai_compatible", "m"));
    let _ = broken.call(&attempt_of(Some(ann)).0, "plan", request()).await;
    let target = Target { provider: "openai_compatible", address: Some(&server.base()), trust: Trust::UserOrLoopback };
    for _ in 0..6 {
        probe(&Settings::default(), &target, Some(&SECRET.into())).await;
    }
    drop(guard);
    let text = lines.text();
    assert!(text.contains("a key is out of service") && text.contains("does not open"), "{text}");
    for key in [SECRET, PLATFORM, ENVIRONMENT] {
        // The word before the last dash is in no id.
        let middle = &key[key.len() - 14..key.len() - 4];
        assert!(!text.contains(key) && !text.contains(middle), "{middle}");
    }
    assert!(!text.to_lowercase().contains("bearer "), "no header either");
    let words = text.split(|c: char| !c.is_ascii_hexdigit());
    let long: Vec<&str> = words.filter(|word| word.len() >= 64).collect();
    assert!(long.is_empty(), "no fingerprint: {long:?}");
    // What the operator is to replace is named by its row.
    let rows: Vec<(uuid::Uuid, String)> =
        sqlx::query_as("select id, last4 from api_keys").fetch_all(&pool).await.unwrap();
    // (A server without a key has no row.)
    let told: Vec<&str> = text.lines().filter(|line| line.contains("a key is out of service")).collect();
    let is_told = |(id, last4): &(uuid::Uuid, String)| {
        let row = [format!("id={id}"), format!("ends_in=\"{last4}\"")];
        told.iter().any(|line| row.iter().all(|part| line.contains(part)))
    };
    assert!(rows.iter().any(is_told), "{told:#?}");
}
