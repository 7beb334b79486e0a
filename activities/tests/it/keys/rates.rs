//! Budgets per minute that workers share.

use super::{ask, attempt_of, bearers, candidate, request, worker};
use crate::fake_provider::{Dialect, FakeProvider, answer_json, stream};
use futures_util::future::join_all;
use loopwright_activities::{
    MIGRATIONS,
    keys::{Keys, Rates, Taken},
    orchestrator::{Candidate, Message, Request},
};
use loopwright_engine::{FailureKind, embedded::testing::database};
use std::time::{Duration, Instant};

/// Minutes of this test.
const MINUTE: Duration = Duration::from_millis(1_200);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_share_a_budget_per_minute_and_use_it() {
    // Many calls for each lease: a row that every call wrote would stand out.
    const BUDGET: u64 = 1_000;
    const WORKERS: usize = 4;
    let pool = database(MIGRATIONS).await;
    sqlx::raw_sql(
        // Every lease as it was, and how often rows were written.
        "create table journal (id bigint, amount bigint, at timestamptz default clock_timestamp(), expires_at timestamptz, op text);
         create function note() returns trigger language plpgsql as $$ begin
           insert into journal (id, amount, expires_at, op) values (new.id, new.amount, new.expires_at, tg_op); return new; end $$;
         create trigger note after insert or update on rate_leases for each row execute function note();
         create table wants (op text);
         create function note_want() returns trigger language plpgsql as $$ begin insert into wants values (tg_op); return null; end $$;
         create trigger note_want after insert or update or delete on rate_wants for each row execute function note_want()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let began = Instant::now();
    let spent: Vec<u64> = join_all((0..WORKERS).map(|_| {
        let rates = Rates::new(pool.clone(), MINUTE);
        tokio::spawn(async move {
            let mut spent = 0;
            while began.elapsed() < 3 * MINUTE {
                match rates.take("requests x", BUDGET, 1).await.unwrap() {
                    Taken::Granted(_) => spent += 1,
                    Taken::Wait(wait) => tokio::time::sleep(wait.min(MINUTE)).await,
                }
            }
            spent
        })
    }))
    .await
    .into_iter()
    .map(Result::unwrap)
    .collect();
    let spent: u64 = spent.iter().sum();
    // What counts at a lease's beginning: every lease that ended less than a minute before. Never more than the budget.
    let most: i64 = sqlx::query_scalar(
        "with leases as (select id, min(at) filter (where op = 'INSERT') at, max(expires_at) expires_at,
                                (array_agg(amount order by at desc))[1] amount, max(amount) taken from journal group by id)
         select max((select sum(o.amount) from leases o where o.at <= l.at and o.expires_at > l.at - $1 * interval '1 ms'))::bigint
         from leases l",
    )
    .bind(MINUTE.as_millis() as f64)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(most <= BUDGET as i64, "{most} of {BUDGET} in one minute");
    let (leased, writes, leases): (i64, i64, i64) = sqlx::query_as(
        "select (select sum(amount) from (select distinct on (id) amount from journal order by id, at desc) l)::bigint,
                max(n), count(*) from (select count(*) n from journal group by id) w",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(spent <= leased as u64, "{spent} of {leased} leased");
    assert!(writes <= 2, "a row was written {writes} times");
    // A slice is a twentieth; three minutes, with what each worker corrects at most.
    assert!(leases <= 20 * 4 + 4 * WORKERS as i64, "{leases} leases");
    // A want is noted where there is none and goes with the next lease, so it is written twice a lease at most. Those who are refused
    // beside it change it only when its time is over, and that is a quarter of a minute at least.
    let (noted, changed, served): (i64, i64, i64) = sqlx::query_as(
        "select count(*) filter (where op = 'INSERT'), count(*) filter (where op = 'UPDATE'), count(*) filter (where op = 'DELETE') from wants",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    let quarters = (4.0 * began.elapsed().as_secs_f64() / MINUTE.as_secs_f64()).ceil() as i64;
    assert!((1..=served + 1).contains(&noted) && served <= leases, "{noted} noted, {served} served, {leases} leases");
    assert!(changed <= quarters, "{changed} changes in {quarters} quarters of a minute");
    // Whole minutes that fit between the first and the last question, with the twelfth that a lease may last.
    let minutes = began.elapsed().as_secs_f64() / (MINUTE.as_secs_f64() * 13.0 / 12.0);
    let share = spent as f64 / (minutes.floor().max(1.0) * BUDGET as f64);
    assert!(share >= 0.8, "{spent} in {minutes:.1} minutes");
}

#[tokio::test]
async fn a_dead_workers_slice_comes_back_and_a_call_larger_than_a_slice_is_served() {
    let pool = database(MIGRATIONS).await;
    // Longer than the test takes.
    let minute = Duration::from_secs(600);
    let (dead, living) = (Rates::new(pool.clone(), minute), Rates::new(pool.clone(), minute));
    assert!(matches!(dead.take("tokens x", 1_000, 700).await.unwrap(), Taken::Granted(_)));
    drop(dead);
    assert!(matches!(living.take("tokens y", 1_000, 700).await.unwrap(), Taken::Granted(_)), "another scope");
    let Taken::Granted(small) = living.take("tokens x", 1_000, 250).await.unwrap() else { panic!("there is room") };
    living.give_back(&small, 50).await;
    assert!(matches!(living.take("tokens x", 1_000, 200).await.unwrap(), Taken::Granted(_)), "what was not spent");
    let Taken::Wait(wait) = living.take("tokens x", 1_000, 400).await.unwrap() else { panic!("over the budget") };
    assert!(wait <= minute * 13 / 12 + Duration::from_millis(1), "{wait:?}");
    // Time goes by.
    sqlx::query("update rate_leases set expires_at = expires_at - $1 * interval '1 ms'")
        .bind(minute.as_millis() as f64 * 1.1)
        .execute(&pool)
        .await
        .unwrap();
    let later = Rates::new(pool.clone(), minute);
    assert!(matches!(later.take("tokens x", 1_000, 5_000).await.unwrap(), Taken::Granted(_)), "all of it, for one");
    let rows: i64 =
        sqlx::query_scalar("select count(*) from rate_leases where scope = 'tokens x'").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 1, "what no longer counts is gone");
}

#[tokio::test]
async fn small_calls_leave_a_large_one_that_was_refused_its_room() {
    let pool = database(MIGRATIONS).await;
    // Long enough that no want ends while this is asked; time goes by in the rows.
    let minute = Duration::from_secs(600);
    let worker = || Rates::new(pool.clone(), minute);
    let pass = |share: f64| {
        let ms = minute.as_millis() as f64 * share;
        sqlx::query("update rate_leases set expires_at = expires_at - $1 * interval '1 ms'").bind(ms).execute(&pool)
    };
    assert!(matches!(worker().take("tokens x", 1_000, 500).await.unwrap(), Taken::Granted(_)));
    pass(0.5).await.unwrap();
    assert!(matches!(worker().take("tokens x", 1_000, 400).await.unwrap(), Taken::Granted(_)));
    assert!(matches!(worker().take("tokens x", 1_000, 500).await.unwrap(), Taken::Wait(_)), "the large one");
    assert!(
        matches!(worker().take("tokens x", 1_000, 50).await.unwrap(), Taken::Wait(_)),
        "there is room, but not for it"
    );
    // The 500 of the first are back: 600.
    pass(0.6).await.unwrap();
    let Taken::Wait(wait) = worker().take("tokens x", 1_000, 200).await.unwrap() else {
        panic!("it would take the room")
    };
    assert!(wait <= minute / 60 + Duration::from_millis(1), "{wait:?}");
    assert!(matches!(worker().take("tokens x", 1_000, 100).await.unwrap(), Taken::Granted(_)), "beside it");
    assert!(matches!(worker().take("tokens x", 1_000, 500).await.unwrap(), Taken::Granted(_)), "the large one");
    let wants: i64 = sqlx::query_scalar("select count(*) from rate_wants").fetch_one(&pool).await.unwrap();
    assert_eq!(wants, 0);
    // One that does not come back is forgotten.
    assert!(matches!(worker().take("tokens x", 1_000, 900).await.unwrap(), Taken::Wait(_)));
    pass(2.0).await.unwrap();
    assert!(matches!(worker().take("tokens x", 1_000, 200).await.unwrap(), Taken::Wait(_)));
    sqlx::query("update rate_wants set wanted_until = engine_now()").execute(&pool).await.unwrap();
    assert!(matches!(worker().take("tokens x", 1_000, 200).await.unwrap(), Taken::Granted(_)));
}

#[tokio::test]
async fn what_was_never_served_goes_back_to_the_budget() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::start(|_, n| match n {
        0 => answer_json(404, "", &Dialect::OpenAi.error(404, "x")),
        _ => stream(&Dialect::OpenAi.good("hi")),
    })
    .await;
    // Room for one of these prompts.
    let request = || Request { messages: vec![Message::User { text: "x".repeat(2_000) }], ..request() };
    let tokens = loopwright_activities::provider::estimate::request_tokens_max(&request());
    let limited = Candidate { tokens_per_minute: Some(tokens), ..candidate("openai_compatible", "m") };
    let one = worker(&Keys::new(pool, None, false), &server, "key-a", limited);
    let failure = one.call(&attempt_of(None).0, "a", request()).await.unwrap_err();
    assert_eq!(failure.code, "model.unavailable");
    one.call(&attempt_of(None).0, "b", request()).await.unwrap();
}

#[tokio::test]
async fn calls_beyond_the_budget_of_one_key_go_to_the_next_and_then_end_with_the_wait() {
    let pool = database(MIGRATIONS).await;
    let server = FakeProvider::always(stream(&Dialect::OpenAi.good("hi"))).await;
    let keys = || Keys::new(pool.clone(), None, false);
    let limited = Candidate { requests_per_minute: Some(2), ..candidate("openai_compatible", "m") };
    for n in 0..4 {
        // Each call by a worker of its own.
        ask(&worker(&keys(), &server, "key-a,key-b", limited.clone())).await.unwrap_or_else(|e| panic!("{n}: {e}"));
    }
    assert_eq!(bearers(&server), ["key-a", "key-a", "key-b", "key-b"]);
    let failure = ask(&worker(&keys(), &server, "key-a,key-b", limited)).await.unwrap_err();
    assert_eq!((failure.code.as_str(), failure.kind), ("transient.rate_limited", FailureKind::Retryable));
    assert!((30_000..=65_000).contains(&failure.retry_after_ms.unwrap()), "{failure:?}");
    assert_eq!(server.seen().len(), 4);
    let few = Candidate { tokens_per_minute: Some(40), ..candidate("openai_compatible", "other") };
    ask(&worker(&keys(), &server, "key-a", few.clone())).await.unwrap();
    let long = Request { messages: vec![Message::User { text: "x".repeat(300) }], ..request() };
    let worker = worker(&keys(), &server, "key-a", few);
    assert_eq!(worker.call(&attempt_of(None).0, "p", long).await.unwrap_err().code, "transient.rate_limited");
}
