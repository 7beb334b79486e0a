//! What an operator has to look at: costs that nobody believes, used payments that were given back, attempts that nobody ends.

use crate::{
    bench::{Bench, CALL_UCR, closing_with, opening},
    billing_books::{answer, books_of, job, open_findings, openrouter},
    fake_provider::{FakeProvider, Seen},
};
use futures_util::future::join_all;
use loopwright_activities::{
    billing::{MicroCredits, Rate, doubt, pricelist, pricelist::Trust, purchase},
    reconcile::Books,
    usage::{CallState, Usage, UsageSource},
};
use loopwright_engine::{
    hook::{AttemptRef, Outcome, Phase, Verdict},
    ids::RunId,
};

/// A call of OpenRouter's with [`CALL_UCR`] by our prices, whose provider says that of its cost.
async fn call(bench: &Bench, attempt: &AttemptRef, key: &str, said: (Option<i64>, Option<&str>)) {
    let mut open = opening(1_000);
    (open["provider"], open["model"]) = ("openrouter".into(), "v/m".into());
    assert!(matches!(bench.meter(attempt, key, Phase::Open, open).await, Verdict::Accepted), "{key}");
    let usage = Usage {
        tokens_prompt: 1_000,
        tokens_output: 100,
        source: UsageSource::Provider,
        provider_cost_pusd: said.0,
        doubtful_cost: said.1.map(str::to_owned),
        ..Usage::default()
    };
    let mut closed = closing_with(CallState::Succeeded, usage);
    closed["provider_request_id"] = format!("gen-{key}").into();
    bench.meter(attempt, key, Phase::Close, closed).await;
}

async fn priced(bench: &Bench) {
    sqlx::query(
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
         values ('openrouter', 'v/m', '2026-01-01', 2000000, 10000000, 'test')",
    )
    .execute(&bench.pool)
    .await
    .expect("price");
}

#[tokio::test]
async fn a_cost_that_nobody_can_mean_is_charged_by_our_price_and_told_until_it_is_resolved() {
    let bench = Bench::new(100).await;
    priced(&bench).await;
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    // What may be is charged as it is said: what we would say, nothing, not a word, and three times as much.
    let usual = [("a", Some(3_000_000_000)), ("b", Some(0)), ("c", None), ("d", Some(10_000_000_000))];
    for (key, said) in usual {
        call(&bench, &attempt, key, (said, None)).await;
    }
    assert_eq!(open_findings(&bench).await.len(), 0);
    // 0.003 USD by our prices: a million times that, less than nothing, no number.
    let absurd = [
        ("x", (Some(3_000_000_000_000_000), None), "3000"),
        ("y", (None, Some("-0.5")), "-0.5"),
        ("z", (None, Some("\"NaN\"")), "\"NaN\""),
    ];
    for (key, said, _) in absurd {
        call(&bench, &attempt, key, said).await;
    }
    let kept: Vec<(String, String, i64, Option<i64>)> = sqlx::query_as(
        "select k.call_key, d.said, d.charged_pusd, k.provider_cost_pusd from cost_doubts d join api_key_usage k on k.id = d.usage_id
         where k.cost_pusd = d.charged_pusd order by 1",
    )
    .fetch_all(&bench.pool)
    .await
    .expect("doubts");
    let expected = absurd.map(|(key, _, said)| (key.to_owned(), said.to_owned(), 3_000_000_000, None));
    assert_eq!(kept, expected);
    let found = open_findings(&bench).await;
    assert!(found.len() == 3 && found.iter().all(|f| f.kind == "cost_doubtful" && f.seen == 1), "{found:?}");
    assert!(
        found.iter().any(|f| f.message.contains("a call cost 3000 USD") && f.message.contains("0.003 USD")),
        "{found:?}"
    );
    bench.end(&attempt, Outcome::Succeeded).await;
    let usual_pusd: i64 = usual.iter().map(|(_, said)| said.unwrap_or(3_000_000_000)).sum();
    let charged = Rate { credits_per_usd: 100, markup_bps: 2_000 }.credits(i128::from(usual_pusd) + 3 * 3_000_000_000);
    assert_eq!(bench.balance().await, (100_000_000 - charged.0, 0));
    assert_eq!(bench.violations().await, [""; 0], "what is charged is our own arithmetic");

    // The provider is asked again: one is believed now, one is as absurd as before, one is no number still.
    let fake = FakeProvider::start(|seen: &Seen, _| {
        let cost = match seen.path.rsplit('-').next() {
            // The provider's fee, and what the vendor behind it charged the key that is deposited.
            Some("x") => "0.0002,\"is_byok\":true,\"upstream_inference_cost\":0.0040",
            Some("y") => "9000000",
            _ => "\"none\"",
        };
        let body = format!(r#"{{"data":{{"model":"m","total_cost":{cost},"native_tokens_prompt":99999999,"native_tokens_completion":1}}}}"#);
        answer("200 OK", &body)
    })
    .await;
    let books = Books { openrouter: openrouter(&fake), ..books_of(&bench) };
    let done = job(&books, "reconcile-calls").await;
    assert_eq!((done.checked, done.changed), (3, 1));
    assert_eq!(job(&books, "reconcile-calls").await.checked, 0, "later: it backs off");
    let row: (Option<i64>, i64, bool) = sqlx::query_as(
        "select k.provider_cost_pusd, k.cost_pusd, d.resolved_at is not null from cost_doubts d join api_key_usage k on k.id = d.usage_id where d.said = '3000'",
    )
    .fetch_one(&bench.pool)
    .await
    .expect("row");
    assert_eq!(row, (Some(200_000_000), 3_000_000_000, true), "the books have it; the user paid our price");
    let found = open_findings(&bench).await;
    assert_eq!(found.len(), 2);

    // A person says what came of the others.
    let mut conn = bench.pool.acquire().await.expect("conn");
    for finding in &found {
        assert!(doubt::resolve_finding(&mut conn, finding.id, "their bill says 0").await.expect("resolved"));
        assert!(!doubt::resolve_finding(&mut conn, finding.id, "again").await.expect("resolved before"));
    }
    let open: i64 = sqlx::query_scalar("select count(*) from cost_doubts where resolved_at is null")
        .fetch_one(&mut *conn)
        .await
        .expect("count");
    assert_eq!((open, open_findings(&bench).await.len()), (0, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_used_payment_that_is_given_back_is_a_debt_that_is_told_once_and_no_negative_balance() {
    let bench = Bench::new(0).await;
    bench.buy("c1").await;
    bench.buy("c2").await;
    let (used, working) = (bench.attempt(RunId::new(), 1), bench.attempt(RunId::new(), 1));
    assert_eq!(bench.start(&used).await, None);
    bench.open(&used, "a.0", 1_000).await;
    bench.close(&used, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(&used, Outcome::Succeeded).await;
    assert_eq!(bench.start(&working).await, None);
    // The bot hears of it twice and the daily list names it as well.
    for _ in 0..3 {
        let mut tx = bench.pool.begin().await.expect("tx");
        assert!(purchase::taken_back(&mut tx, bench.user, "c1").await.expect("booked"));
        tx.commit().await.expect("commit");
    }
    let found = open_findings(&bench).await;
    let [debt] = &*found else { panic!("{found:?}") };
    assert_eq!(
        (debt.kind.as_str(), debt.subject.as_str(), debt.user_id, debt.seen),
        ("payment_used", "c1", Some(bench.user), 1)
    );
    // 50 were bought: 0.36 are gone, 1.44 are held, 48.2 were taken.
    assert!(
        debt.message
            .contains("when 0.36 of its 50 credits were used and 1.44 held; 48.2 were taken, so up to 1.8 are owed"),
        "{}",
        debt.message
    );
    assert_eq!(bench.balance().await, (51_440_000, 1_440_000), "the other purchase is untouched");
    bench.end(&working, Outcome::Failed).await;
    assert_eq!(bench.violations().await, [""; 0]);
    // One that nobody has touched leaves no debt.
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert!(purchase::taken_back(&mut conn, bench.user, "c2").await.expect("booked"));
    assert_eq!(open_findings(&bench).await.len(), 1);
    let standing = purchase::refund_of(&mut conn, "c2").await.expect("read").expect("there");
    assert_eq!((standing.state.as_str(), standing.taken), ("done", MicroCredits::from_credits(50)));
}

#[tokio::test]
async fn what_an_attempt_holds_that_nobody_ends_comes_back_and_its_late_worker_changes_nothing() {
    let bench = Bench::new(3).await;
    let books = books_of(&bench);
    let (dead, alive) = (bench.attempt(RunId::new(), 1), bench.attempt(RunId::new(), 1));
    assert_eq!(bench.start(&dead).await, None);
    assert_eq!(bench.start(&alive).await, None);
    // It has recorded one answer, and died before the second request was sent.
    bench.open(&dead, "a.0", 100).await;
    bench.close(&dead, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.open(&dead, "a.1", 100).await;
    assert!(bench.start(&bench.attempt(RunId::new(), 1)).await.is_some(), "all is held");
    assert_eq!(job(&books, "reconcile-grants").await.changed, 0, "not before its time is over");
    let late = "update activity_attempts set lease_expires_at = engine_now() - interval '9 minutes' where id = $1";
    for (sql, released) in [(late.to_owned(), 0), (late.replace('9', "11"), 1), (late.replace('9', "11"), 0)] {
        let sql = sqlx::AssertSqlSafe(sql);
        sqlx::query(sql).bind(dead.attempt_id.0).execute(&bench.pool).await.expect("late");
        assert_eq!(job(&books, "reconcile-grants").await.changed, released);
    }
    assert_eq!(bench.balance().await, (3_000_000 - CALL_UCR, 1_440_000), "what was recorded is paid, the rest is back");
    let states: Vec<(String, i64)> = sqlx::query_as("select state, cost_pusd from api_key_usage order by call_no")
        .fetch_all(&bench.pool)
        .await
        .expect("calls");
    assert_eq!(states, [("succeeded".to_owned(), 3_000_000_000), ("unknown".to_owned(), 0)]);
    assert_eq!(bench.violations().await, [""; 0]);

    // Its worker was only slow: it reports, makes no further call, and ends what was ended.
    bench.close(&dead, "a.1", CallState::Succeeded, 1_000, 100).await;
    let verdict = bench.open(&dead, "a.2", 100).await;
    assert!(matches!(&verdict, Verdict::Refused { reason, .. } if reason == "attempt_closed"), "{verdict:?}");
    bench.end(&dead, Outcome::Lost).await;
    bench.end(&dead, Outcome::Succeeded).await;
    let row: (String, bool, i64) =
        sqlx::query_as("select state, late, cost_pusd from api_key_usage where call_key = 'a.1'")
            .fetch_one(&bench.pool)
            .await
            .expect("row");
    assert_eq!(row, ("succeeded".to_owned(), true, 0));
    assert_eq!(bench.balance().await, (3_000_000 - CALL_UCR, 1_440_000));
    bench.end(&alive, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

// A refund that two tell of at one instant: the update of it, and the list of the day.
#[tokio::test]
async fn a_refund_that_is_sent_twice_at_one_instant_gives_back_once() {
    let bench = Bench::new(0).await;
    // Naive: look whether it was given back, then give it back.
    sqlx::raw_sql("create table naive (refunded boolean, balance int); insert into naive values (false, 100)")
        .execute(&bench.pool)
        .await
        .expect("naive");
    let (mut one, mut two) = (bench.pool.begin().await.expect("tx"), bench.pool.begin().await.expect("tx"));
    let looks = "select refunded from naive";
    let seen = [
        sqlx::query_scalar::<_, bool>(looks).fetch_one(&mut *one).await.expect("look"),
        sqlx::query_scalar::<_, bool>(looks).fetch_one(&mut *two).await.expect("look"),
    ];
    for (refunded, mut tx) in seen.into_iter().zip([one, two]) {
        if !refunded {
            let take = "update naive set refunded = true, balance = balance - 50";
            sqlx::query(take).execute(&mut *tx).await.expect("taken");
        }
        tx.commit().await.expect("commit");
    }
    let naive: i32 = sqlx::query_scalar("select balance from naive").fetch_one(&bench.pool).await.expect("balance");
    assert_eq!(naive, 0, "50 were to be given back");

    // Ours: under the lock of the user row, and under one key.
    for round in 0..8 {
        let charge = format!("c{round}");
        bench.buy(&charge).await;
        bench.buy(&format!("other{round}")).await;
        let before = bench.balance().await.0;
        let refunds = (0..4).map(|n| {
            let (pool, user, charge) = (bench.pool.clone(), bench.user, charge.clone());
            async move {
                let mut tx = pool.begin().await.expect("tx");
                match n % 2 {
                    0 => {
                        purchase::refund(&mut tx, user, &charge).await.expect("refund");
                    }
                    _ => assert!(purchase::taken_back(&mut tx, user, &charge).await.expect("taken back")),
                }
                tx.commit().await.expect("commit");
            }
        });
        join_all(refunds).await;
        assert_eq!(bench.balance().await.0, before - 50_000_000);
        let rows: i64 =
            sqlx::query_scalar("select count(*) from credit_transactions where idempotency_key = 'refund:' || $1")
                .bind(&charge)
                .fetch_one(&bench.pool)
                .await
                .expect("rows");
        assert_eq!(rows, 1);
    }
    assert_eq!(open_findings(&bench).await.len(), 0);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn reasoning_has_its_own_price_where_a_map_names_one_and_costs_as_output_where_not() {
    let bench = Bench::new(100).await;
    let map = r#"{
      "gemini/thinks": {"litellm_provider": "gemini", "input_cost_per_token": 2e-06, "output_cost_per_token": 1e-05, "output_cost_per_reasoning_token": 0.00003},
      "gemini/talks": {"litellm_provider": "gemini", "input_cost_per_token": 2e-06, "output_cost_per_token": 1e-05}}"#;
    let list = pricelist::from_map(map, None, Trust::default()).expect("read");
    let mut conn = bench.pool.acquire().await.expect("conn");
    let from = Some(chrono::Utc::now() + chrono::Duration::hours(1));
    pricelist::apply(&mut conn, &list.quotes, from, "t", true).await.expect("sql").expect("accepted");
    // An hour later; rows are never changed, so the clock is.
    let listed = pricelist::list(&mut conn, false, Some("gemini/t")).await.expect("listed");
    let kept: Vec<_> = listed.iter().map(|row| (row.model.as_str(), row.tier.reasoning_umtok)).collect();
    assert_eq!(kept, [("talks", None), ("thinks", Some(30_000_000))]);
    sqlx::raw_sql(
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, reasoning_umtok, source)
         select provider, model_id, '2026-01-01', input_umtok, output_umtok, reasoning_umtok, 'test' from model_pricing
         where model_id in ('thinks', 'talks')",
    )
    .execute(&mut *conn)
    .await
    .expect("in force");
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    // 100 of 300 tokens of output are reasoning.
    for (model, worst, cost) in [
        ("thinks", 1_000 * 2_000_000 + 1_000 * 30_000_000, 1_000 * 2_000_000 + 200 * 10_000_000 + 100 * 30_000_000),
        ("talks", 1_000 * 2_000_000 + 1_000 * 10_000_000, 1_000 * 2_000_000 + 300 * 10_000_000),
    ] {
        let mut open = opening(1_000);
        (open["provider"], open["model"]) = ("gemini".into(), model.into());
        assert!(matches!(bench.meter(&attempt, model, Phase::Open, open).await, Verdict::Accepted));
        let usage = Usage {
            tokens_prompt: 1_000,
            tokens_output: 300,
            tokens_reasoning: 100,
            source: UsageSource::Provider,
            ..Usage::default()
        };
        bench.meter(&attempt, model, Phase::Close, closing_with(CallState::Succeeded, usage)).await;
        let row: (i64, i64) = sqlx::query_as("select worst_pusd, cost_pusd from api_key_usage where call_key = $1")
            .bind(model)
            .fetch_one(&mut *conn)
            .await
            .expect("row");
        assert_eq!(row, (worst, cost), "{model}");
    }
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_price_map_is_compared_with_every_provider_and_changes_nothing_by_itself() {
    let bench = Bench::new(0).await;
    let books = books_of(&bench);
    let map = |input: &str, output: &str| {
        format!(
            r#"{{"gemini/gemini-3.5-flash-lite": {{"litellm_provider": "gemini", "input_cost_per_token": {input}, "output_cost_per_token": {output},
                 "cache_read_input_token_cost": 3e-08}},
                "gemini/unheard-of": {{"litellm_provider": "gemini", "input_cost_per_token": 1e-06, "output_cost_per_token": 1e-06}}}}"#
        )
    };
    let mut conn = bench.pool.acquire().await.expect("conn");
    let rows = "select count(*) from model_pricing";
    let before: i64 = sqlx::query_scalar(rows).fetch_one(&mut *conn).await.expect("count");
    let differs = async || -> Vec<String> {
        let found = open_findings(&bench).await;
        found.into_iter().filter(|f| f.kind == "price_differs").map(|f| f.message).collect()
    };
    let said = pricelist::from_map(&map("3e-07", "2.5e-06"), None, Trust::default()).expect("read").quotes;
    pricelist::keep_map(&mut conn, &said, "map.json").await.expect("kept");
    job(&books, "reconcile-prices").await;
    assert_eq!(differs().await, [""; 0], "it says what we say; a model that we have not is nothing to us");

    let said = pricelist::from_map(&map("4e-07", "2.5e-06"), None, Trust::default()).expect("read").quotes;
    pricelist::keep_map(&mut conn, &said, "newer.json").await.expect("kept");
    for _ in 0..2 {
        job(&books, "reconcile-prices").await;
    }
    let told = differs().await;
    assert!(
        told.len() == 1 && told[0].starts_with("gemini/gemini-3.5-flash-lite: the price map `newer.json` of "),
        "{told:?}"
    );
    assert!(told[0].contains("another price (input, cache write)"), "{told:?}");
    let after: i64 = sqlx::query_scalar(rows).fetch_one(&mut *conn).await.expect("count");
    assert_eq!(after, before, "nothing is changed but by a person");

    // Taken over for later than two weeks from now it still differs; for within them it is told as a change to come, and no longer as a
    // difference.
    for (minutes, is_soon) in [(60, false), (-1, true)] {
        let from = chrono::Utc::now() + chrono::Duration::days(14) + chrono::Duration::minutes(minutes);
        let applied = pricelist::apply(&mut conn, &said, Some(from), "import newer.json", true).await.expect("sql");
        assert_eq!(applied.expect("accepted").changed.len(), 1);
        job(&books, "reconcile-prices").await;
        assert_eq!(differs().await.len(), usize::from(!is_soon), "{minutes}");
        let found = open_findings(&bench).await.into_iter();
        let changes: Vec<_> = found
            .filter(|f| f.kind == "price_changes" && f.subject.starts_with("gemini/gemini-3.5-flash-lite "))
            .map(|f| f.subject)
            .collect();
        let expected = is_soon.then(|| format!("gemini/gemini-3.5-flash-lite from {}", from.format("%F")));
        assert_eq!(changes, Vec::from_iter(expected), "{minutes}");
    }
}
