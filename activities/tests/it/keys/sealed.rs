//! Keys in their rows: sealed, bound, rotated, destroyed.

use super::{SECRET, new_key, ring, user};
use futures_util::future::BoxFuture;
use loopwright_activities::{
    MIGRATIONS,
    keys::{Error, Keys, NewKey},
    provider::address::Lookup,
};
use loopwright_engine::embedded::testing::database;
use secrecy::ExposeSecret;
use std::{net::SocketAddr, sync::Arc};

#[tokio::test]
async fn a_key_is_kept_sealed_and_opens_in_its_own_row_alone() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let view = keys.put(ann, &new_key("gemini", SECRET)).await.unwrap();
    assert_eq!((view.last4.as_str(), view.status.as_str(), view.user_id), ("ghij", "active", Some(ann)));
    assert!(!serde_json::to_string(&view).unwrap().contains("0123456789"));
    let row: String = sqlx::query_scalar("select row_to_json(k)::text || encode(ciphertext, 'escape') from api_keys k")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(!row.contains("sk-own") && !row.contains("0123456789abcdef"), "{row}");
    let own = keys.own(ann).await.unwrap();
    assert_eq!(keys.open(&own[0]).unwrap().key.expose_secret(), SECRET);
    assert!(!format!("{own:?} {:?}", keys.open(&own[0]).unwrap()).contains("sk-own"));

    // The same key once more is the same row, sealed anew.
    let again = keys.put(ann, &NewKey { label: "again".into(), ..new_key("gemini", SECRET) }).await.unwrap();
    assert_eq!((again.id, again.label.as_str()), (view.id, "again"));
    assert_eq!(keys.put(bob, &new_key("gemini", SECRET)).await.unwrap().user_id, Some(bob), "another's is another row");

    // Copied to another owner, provider, row, or bent to another host, it does not open.
    let bobs = keys.put(bob, &new_key("openrouter", "sk-other-0123456789")).await.unwrap();
    let copy =
        "update api_keys t set ciphertext = s.ciphertext, nonce = s.nonce, wrapped_dek = s.wrapped_dek from api_keys s
                where t.id = $1 and s.id = $2";
    sqlx::query(copy).bind(bobs.id).bind(view.id).execute(&pool).await.unwrap();
    let own = keys.own(bob).await.unwrap();
    let copied = own.iter().find(|key| key.id == bobs.id).unwrap();
    assert_eq!(keys.open(copied).unwrap_err().code(), "key_corrupt");
    for change in ["provider = 'openrouter'", "base_url = 'https://evil.example.com'"] {
        let mut tx = pool.begin().await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("update api_keys set {change} where id = $1")))
            .bind(view.id)
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        let own = keys.own(ann).await.unwrap();
        assert_eq!(keys.open(&own[0]).unwrap_err().code(), "key_corrupt", "{change}");
        sqlx::query("update api_keys set provider = 'gemini', base_url = null where id = $1")
            .bind(view.id)
            .execute(&pool)
            .await
            .unwrap();
    }
    sqlx::query("update api_keys set user_id = $2 where id = $1")
        .bind(view.id)
        .bind(user(&pool, 3).await)
        .execute(&pool)
        .await
        .unwrap();
    let own = keys.own(user(&pool, 3).await).await.unwrap();
    assert_eq!(keys.open(&own[0]).unwrap_err().code(), "key_corrupt", "another owner");
}

#[tokio::test]
async fn a_revoked_key_is_destroyed_and_may_come_back() {
    let pool = database(MIGRATIONS).await;
    let (ann, bob) = (user(&pool, 1).await, user(&pool, 2).await);
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let id = keys.put(ann, &new_key("gemini", SECRET)).await.unwrap().id;
    for error in [keys.show(Some(bob), id).await.unwrap_err(), keys.revoke(Some(bob), id).await.unwrap_err()] {
        assert_eq!(error.code(), "key_not_found", "somebody else's");
    }
    keys.revoke(Some(ann), id).await.unwrap();
    let left: (i32, i32, String) =
        sqlx::query_as("select length(ciphertext), length(wrapped_dek), kek_id from api_keys")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(left, (0, 0, String::new()));
    assert!(keys.own(ann).await.unwrap().is_empty() && keys.list(Some(ann)).await.unwrap().is_empty());
    assert_eq!(keys.wrapped_by().await.unwrap(), []);
    for error in [keys.revoke(Some(ann), id).await.unwrap_err(), keys.set_enabled(id, true).await.unwrap_err()] {
        assert_eq!(error.code(), "key_not_found");
    }
    assert_eq!(keys.put(ann, &new_key("gemini", SECRET)).await.unwrap().id, id);
    assert_eq!(keys.own(ann).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_rotation_that_breaks_off_goes_on_and_the_old_key_may_leave() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let old = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    for n in 0..4 {
        old.put(ann, &new_key("gemini", &format!("{SECRET}{n}"))).await.unwrap();
    }
    let both = Keys::new(pool.clone(), Some(ring(&[("b", 2), ("a", 1)])), false);
    // The third row cannot be written: the process dies there.
    sqlx::raw_sql(
        "create function stop() returns trigger language plpgsql as $$ begin
           if (select count(*) from api_keys where kek_id = 'b') >= 2 then raise exception 'died'; end if; return new; end $$;
         create trigger stop before update on api_keys for each row execute function stop()",
    )
    .execute(&pool)
    .await
    .unwrap();
    assert!(matches!(both.rewrap(None, false).await, Err(Error::Sql(_))));
    assert_eq!(both.wrapped_by().await.unwrap(), [("a".to_owned(), 2), ("b".to_owned(), 2)]);
    for key in both.own(ann).await.unwrap() {
        assert!(both.open(&key).unwrap().key.expose_secret().starts_with(SECRET), "all open in the middle");
    }
    sqlx::raw_sql("drop trigger stop on api_keys").execute(&pool).await.unwrap();
    let done = both.rewrap(None, false).await.unwrap();
    assert_eq!((done.rows, done.left, done.after), (2, 0, None));
    assert_eq!(both.rewrap(None, false).await.unwrap().rows, 0, "done is done");
    let new = Keys::new(pool.clone(), Some(ring(&[("b", 2)])), false);
    let before: Vec<Vec<u8>> =
        sqlx::query_scalar("select ciphertext from api_keys order by id").fetch_all(&pool).await.unwrap();
    assert_eq!(new.rewrap(None, true).await.unwrap().rows, 4, "new keys of the rows");
    let after: Vec<Vec<u8>> =
        sqlx::query_scalar("select ciphertext from api_keys order by id").fetch_all(&pool).await.unwrap();
    assert!(before.iter().zip(&after).all(|(a, b)| a != b));
    for key in new.own(ann).await.unwrap() {
        new.open(&key).unwrap();
        assert_eq!(old.open(&key).unwrap_err().code(), "key_encryption_key_missing");
    }
}

/// Every name leads there.
struct Leads(&'static str);

impl Lookup for Leads {
    fn addresses(&self, _: String) -> BoxFuture<'_, std::io::Result<Vec<SocketAddr>>> {
        let found = match self.0 {
            "" => Vec::new(),
            ip => vec![SocketAddr::new(ip.parse().unwrap(), 0)],
        };
        Box::pin(async move { Ok(found) })
    }
}

#[tokio::test]
async fn what_is_no_key_or_leads_inside_is_refused_with_a_code_and_leaves_nothing() {
    let pool = database(MIGRATIONS).await;
    let ann = user(&pool, 1).await;
    let keys = Keys::new(pool.clone(), Some(ring(&[("a", 1)])), false);
    let at = |url: &str| NewKey {
        base_url: Some(url.into()),
        model: Some("m".into()),
        ..new_key("openai_compatible", SECRET)
    };
    let leading = |ip| keys.clone().with_lookup(Arc::new(Leads(ip)));
    for (keys, new, code) in [
        (keys.clone(), new_key("mistral", SECRET), "key_invalid"),
        (keys.clone(), new_key("rehearsed", SECRET), "key_invalid"),
        (keys.clone(), new_key("gemini", ""), "key_invalid"),
        (keys.clone(), new_key("gemini", "two words"), "key_invalid"),
        (keys.clone(), new_key("gemini", "sk-\u{e4}"), "key_invalid"),
        (keys.clone(), new_key("gemini", &"x".repeat(5_000)), "key_invalid"),
        (keys.clone(), NewKey { label: "a\nb".into(), ..new_key("gemini", SECRET) }, "key_invalid"),
        (keys.clone(), NewKey { provider: "gemini".into(), ..at("https://api.example.com") }, "key_invalid"),
        (keys.clone(), new_key("openai_compatible", SECRET), "key_invalid"),
        (keys.clone(), NewKey { model: None, ..at("https://api.example.com") }, "key_invalid"),
        (keys.clone(), at("http://api.example.com"), "address_refused"),
        (keys.clone(), at("https://127.0.0.1"), "address_refused"),
        (keys.clone(), at("https://[::ffff:169.254.169.254]"), "address_refused"),
        (keys.clone(), at("https://me:x@api.example.com"), "address_refused"),
        (leading("10.0.0.1"), at("https://inside.example.com"), "address_refused"),
        (leading("169.254.169.254"), at("https://metadata.example.com"), "address_refused"),
        (leading("fd00::1"), at("https://inside.example.com"), "address_refused"),
        (leading(""), at("https://nowhere.example.com"), "address_refused"),
        (Keys::new(pool.clone(), None, false), new_key("gemini", SECRET), "keys_unavailable"),
    ] {
        let error = keys.put(ann, &new).await.unwrap_err();
        assert_eq!(error.code(), code, "{new:?}");
        assert!(!error.to_string().contains("sk-") && !error.to_string().contains("example.com"), "{error}");
    }
    let rows: i64 = sqlx::query_scalar("select count(*) from api_keys").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 0);
    assert!(leading("8.8.8.8").put(ann, &at("https://api.example.com/v1/")).await.is_ok());
    for n in 1..8 {
        keys.put(ann, &new_key("gemini", &format!("{SECRET}{n}"))).await.unwrap();
    }
    assert_eq!(keys.put(ann, &new_key("gemini", SECRET)).await.unwrap_err().code(), "keys_too_many");
}
