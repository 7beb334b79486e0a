//! Bugs that other ledgers shipped. Each test holds a naive version of a few lines, shows that it fails, and shows that ours does not.

use crate::bench::{Bench, CALL_UCR, planning};
use loopwright_activities::{billing::purchase, usage::CallState};
use loopwright_engine::{
    hook::{AttemptEnd, Outcome, Transition, TransitionHook, Verdict},
    ids::RunId,
};
use sqlx::{PgConnection, PgPool};
use std::collections::BTreeMap;
use uuid::Uuid;

/// A naive book: one balance of 100, and keys that were seen.
async fn naive(pool: &PgPool) {
    sqlx::raw_sql(
        "create table naive_balance (balance bigint not null); insert into naive_balance values (100);
         create table naive_key (key text primary key, amount bigint not null default 0)",
    )
    .execute(pool)
    .await
    .expect("naive");
}

async fn naive_balance(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select balance from naive_balance").fetch_one(pool).await.expect("balance")
}

/// Debits once per key, in one transaction: right as far as its key is right.
async fn naive_debit(pool: &PgPool, key: &str, amount: i64) {
    sqlx::query(
        "with k as (insert into naive_key values ($1, $2) on conflict do nothing returning amount)
         update naive_balance set balance = balance - k.amount from k",
    )
    .bind(key)
    .bind(amount)
    .execute(pool)
    .await
    .expect("debit");
}

#[tokio::test]
async fn a_retry_above_the_tool_layer_is_no_second_charge() {
    let bench = Bench::new(100).await;
    naive(&bench.pool).await;
    // Naive: the layer below the retry makes up a key for each call that it sees.
    for _ in 0..2 {
        naive_debit(&bench.pool, &Uuid::new_v4().to_string(), 10).await;
    }
    assert_eq!(naive_balance(&bench.pool).await, 80, "charged twice");
    // Ours: the key is made of the attempt and the call's name, so that the repetition is the same call.
    let attempt = bench.attempt(RunId::new(), 1);
    for _ in 0..2 {
        bench.start(&attempt).await;
        bench.open(&attempt, "a.0", 100).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    }
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn settlements_are_keyed_by_what_was_charged_and_not_by_who_charges() {
    let bench = Bench::new(0).await;
    naive(&bench.pool).await;
    // Naive: one settlement per order. The second payment of a forwarded invoice is swallowed.
    for _charge in ["c1", "c2"] {
        naive_debit(&bench.pool, "order-1", -50).await;
    }
    assert_eq!(naive_balance(&bench.pool).await, 150, "200 were paid for");
    bench.order("ord", 50_000_000).await;
    for charge_id in ["c1", "c2", "c1", "c2"] {
        bench.pay(charge_id, "ord").await.expect("paid");
    }
    assert_eq!(bench.balance().await.0, 100_000_000);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_guard_that_an_error_resets_does_not_refund_twice() {
    let bench = Bench::new(0).await;
    naive(&bench.pool).await;
    // Naive: the guard lives beside the work, and an error after the commit takes it back.
    let mut refunded = false;
    for try_no in 0..2 {
        if refunded {
            continue;
        }
        refunded = true;
        naive_debit(&bench.pool, &format!("refund-{try_no}"), -10).await;
        let notified: Result<(), &str> = if try_no == 0 { Err("the chat is away") } else { Ok(()) };
        if notified.is_err() {
            refunded = false;
        }
    }
    assert_eq!(naive_balance(&bench.pool).await, 120, "refunded twice");
    // Ours: the guard is the state of the payment, in the transaction of the refund. What follows that is another transaction, and it
    // fails; the whole is done again. The bot and Telegram: `server/tests/it/telegram/payments.rs`,
    // `an_error_after_a_refund_was_booked_does_not_book_it_again`.
    bench.buy("c1").await;
    sqlx::raw_sql(
        "create function is_away() returns trigger language plpgsql as $$ begin raise exception 'away'; end $$;
         create trigger is_away before update on payments for each row when (new.refund_state = 'done') execute function is_away()",
    )
    .execute(&bench.pool)
    .await
    .expect("trigger");
    let mut conn = bench.pool.acquire().await.expect("conn");
    let mut tried = Vec::new();
    for last in [false, false, true] {
        if last {
            sqlx::raw_sql("drop trigger is_away on payments").execute(&bench.pool).await.expect("it is there again");
        }
        let mut tx = bench.pool.begin().await.expect("tx");
        let refunded = purchase::refund(&mut tx, bench.user, "c1").await.expect("refund");
        tx.commit().await.expect("commit");
        tried.push((refunded, purchase::refund_done(&mut conn, "c1").await.is_ok()));
        assert_eq!(bench.balance().await.0, 0);
    }
    assert_eq!(tried, [(true, false), (false, false), (false, true)]);
    let taken: (i64, i64) =
        sqlx::query_as("select count(*), sum(amount_ucr)::bigint from credit_transactions where kind = 'refund'")
            .fetch_one(&bench.pool)
            .await
            .expect("refunds");
    let standing = purchase::refund_of(&mut conn, "c1").await.expect("read").expect("known");
    assert_eq!((taken.0, -taken.1, standing.state.as_str()), (1, standing.granted.0, "done"));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn parallel_calls_that_swap_their_order_keep_their_own_price() {
    // Naive: the n-th call of a step has the key n. In the repetition the other one is faster.
    let mut recorded: BTreeMap<usize, &str> = BTreeMap::new();
    for (n, call) in ["cheap", "dear"].into_iter().enumerate() {
        recorded.insert(n, call);
    }
    let repeated: Vec<bool> = ["dear", "cheap"].into_iter().enumerate().map(|(n, call)| recorded[&n] == call).collect();
    assert_eq!(repeated, [false, false], "each gets the other's answer and price");
    // Ours: a call is named by what it is.
    let bench = Bench::new(100).await;
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    for order in [["cheap", "dear"], ["dear", "cheap"]] {
        for key in order {
            bench.open(&attempt, key, 1_000).await;
        }
        for key in order {
            let output = if key == "dear" { 1_000 } else { 10 };
            bench.close(&attempt, key, CallState::Succeeded, 1_000, output).await;
        }
    }
    let costs: Vec<(String, i64)> = sqlx::query_as("select call_key, cost_pusd from api_key_usage order by call_key")
        .fetch_all(&bench.pool)
        .await
        .expect("costs");
    assert_eq!(
        costs,
        [
            ("cheap".to_owned(), 1_000 * 2_000_000 + 10 * 10_000_000),
            ("dear".to_owned(), 1_000 * 2_000_000 + 1_000 * 10_000_000)
        ]
    );
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_marker_is_never_committed_before_the_debit() {
    let bench = Bench::new(100).await;
    naive(&bench.pool).await;
    // Naive: mark, commit, die; whoever comes back finds the mark and believes that the debit was done.
    for dies in [true, false] {
        let marked = sqlx::query("insert into naive_key values ('settled') on conflict do nothing")
            .execute(&bench.pool)
            .await
            .expect("mark")
            .rows_affected();
        if marked == 0 || dies {
            continue;
        }
        sqlx::query("update naive_balance set balance = balance - 10").execute(&bench.pool).await.expect("debit");
    }
    assert_eq!(naive_balance(&bench.pool).await, 100, "never charged");
    // Ours: end of the attempt, settlement and debit are one transaction; a death before its commit undoes all of it.
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    for dies in [true, false] {
        let end = AttemptEnd { attempt: attempt.clone(), outcome: Outcome::Succeeded, failure: None, again: false };
        let transition = Transition { ord: 0, run_id: attempt.run_id, ended: vec![end], started: vec![] };
        let mut tx = bench.pool.begin().await.expect("tx");
        bench.hook.apply(&mut tx, &[transition]).await.expect("settled");
        if dies {
            tx.rollback().await.expect("died");
            assert_eq!(bench.balance().await.0, 100_000_000);
        } else {
            tx.commit().await.expect("commit");
        }
    }
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn two_that_check_at_once_cannot_both_write() {
    // Enough for one attempt of 1.44.
    let bench = Bench::new(2).await;
    naive(&bench.pool).await;
    let mut one = bench.pool.acquire().await.expect("conn");
    let mut two = bench.pool.acquire().await.expect("conn");
    // Naive: both read, both find enough, both write what they computed.
    let read = async |conn: &mut PgConnection| -> i64 {
        sqlx::query_scalar("select balance from naive_balance").fetch_one(conn).await.expect("read")
    };
    let (first, second) = (read(&mut one).await, read(&mut two).await);
    let mut spent = 0;
    for (conn, seen) in [(&mut one, first), (&mut two, second)] {
        if seen >= 80 {
            sqlx::query("update naive_balance set balance = $1")
                .bind(seen - 80)
                .execute(&mut **conn)
                .await
                .expect("write");
            spent += 80;
        }
    }
    assert!(spent == 160 && naive_balance(&bench.pool).await == 20, "160 of 100 were spent, and 20 are left");
    // Ours: the check is made under the lock of the user row; the second waits for the first and sees what it left.
    let (a, b) = (bench.attempt(RunId::new(), 1), bench.attempt(RunId::new(), 1));
    let start =
        |attempt| Transition { ord: 0, run_id: RunId::new(), ended: vec![], started: vec![planning(attempt, 1)] };
    let mut first = bench.pool.begin().await.expect("tx");
    assert!(bench.hook.apply(&mut first, &[start(&a)]).await.expect("applied").is_empty());
    let late = async {
        let mut second = bench.pool.begin().await.expect("tx");
        let refused = bench.hook.apply(&mut second, &[start(&b)]).await.expect("applied");
        second.rollback().await.expect("rollback");
        refused
    };
    let commit = async {
        // The second has to wait for the lock.
        bench.until_somebody_waits().await;
        first.commit().await.expect("commit");
    };
    let (refused, ()) = tokio::join!(late, commit);
    assert_eq!(refused.len(), 1, "only one of them starts");
    assert_eq!(bench.balance().await, (2_000_000, 1_440_000));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn an_outcome_that_nobody_knows_is_not_replayed() {
    let bench = Bench::new(100).await;
    naive(&bench.pool).await;
    // Naive: a time-out after sending is tried again. The provider had served both.
    let mut served = 0;
    for answered in [false, true] {
        served += 1;
        naive_debit(&bench.pool, &format!("try-{served}"), 10).await;
        if answered {
            break;
        }
    }
    assert_eq!((served, naive_balance(&bench.pool).await), (2, 80), "bought and charged twice");
    // Ours: it is recorded as unknown and free, and its name is used up: neither this attempt nor a late report changes that.
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Unknown, 0, 0).await;
    let again = bench.open(&attempt, "a.0", 100).await;
    assert!(matches!(&again, Verdict::Refused { reason, .. } if reason == "internal.call_repeated"), "{again:?}");
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(&attempt, Outcome::Failed).await;
    let row: (String, i64) =
        sqlx::query_as("select state, cost_pusd from api_key_usage").fetch_one(&bench.pool).await.expect("one call");
    assert_eq!((row, bench.balance().await), (("unknown".to_owned(), 0), (100_000_000, 0)));
    assert_eq!(bench.violations().await, [""; 0]);
}
