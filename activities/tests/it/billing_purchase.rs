//! Purchases with Stars: booked once, given back once.

use crate::bench::{Bench, payment};
use loopwright_activities::{
    billing::{
        MicroCredits, audit,
        ledger::{self, GrantSource, LedgerError},
        purchase::{self, Known, Payment},
    },
    usage::CallState,
};
use loopwright_engine::{hook::Outcome, ids::RunId};
use uuid::Uuid;

#[tokio::test]
async fn a_purchase_counts_once_per_charge_and_is_refunded_while_it_is_untouched() {
    let bench = Bench::new(1).await;
    bench.order("ord", 50_000_000).await;
    let pay = async |charge_id: &str, currency: &str, stars: i32| {
        let mut tx = bench.pool.begin().await.expect("tx");
        let payment = Payment { currency, stars, ..payment(charge_id, "ord") };
        let result = purchase::purchase(&mut tx, bench.user, &payment).await;
        tx.commit().await.expect("commit");
        result
    };
    assert!(matches!(pay("c1", "USD", 250).await, Err(LedgerError::Mismatch(_))));
    assert!(matches!(pay("c1", "XTR", 1).await, Err(LedgerError::Mismatch(_))));
    assert_eq!(pay("c1", "XTR", 250).await.expect("paid"), Some(MicroCredits(50_000_000)));
    assert_eq!(pay("c1", "XTR", 250).await.expect("replayed"), None);
    assert_eq!(pay("c2", "XTR", 250).await.expect("a forwarded invoice"), Some(MicroCredits(50_000_000)));
    assert_eq!(bench.balance().await.0, 101_000_000);
    let refund = async |charge: &str| {
        let mut tx = bench.pool.begin().await.expect("tx");
        let result = purchase::refund(&mut tx, bench.user, charge).await;
        match result {
            Ok(_) => tx.commit().await.expect("commit"),
            Err(_) => tx.rollback().await.expect("rollback"),
        }
        result
    };
    assert!(refund("c1").await.expect("untouched"));
    assert!(!refund("c1").await.expect("done before"));
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 1_000).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 1_000).await;
    assert!(matches!(refund("c2").await, Err(LedgerError::Used(_))), "part of it is held");
    bench.end(&attempt, Outcome::Succeeded).await;
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_used_purchase_that_is_taken_back_loses_what_is_left_of_it() {
    // Without welcome credits every attempt holds part of the purchase.
    for held in [true, false] {
        let bench = Bench::new(0).await;
        bench.buy("c1").await;
        let mut conn = bench.pool.acquire().await.expect("conn");
        let attempt = bench.attempt(RunId::new(), 1);
        assert_eq!(bench.start(&attempt).await, None);
        bench.open(&attempt, "a.0", 1_000).await;
        bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
        if !held {
            bench.end(&attempt, Outcome::Succeeded).await;
        }
        let before = ledger::balance(&mut conn, bench.user).await.expect("balance");
        assert!(before.held.0 > 0 || !held);
        let other = purchase::charge_back(&mut conn, Uuid::nil(), "c1").await;
        assert!(matches!(other, Err(LedgerError::NoUser(_))), "{other:?}");
        let unknown = purchase::charge_back(&mut conn, bench.user, "c2").await;
        assert!(matches!(unknown, Err(LedgerError::Mismatch(_))), "{unknown:?}");
        let taken = purchase::charge_back(&mut conn, bench.user, "c1").await.expect("taken back");
        assert_eq!(taken, Some(before.available()));
        assert_eq!(purchase::charge_back(&mut conn, bench.user, "c1").await.expect("again"), None);
        assert!(!purchase::refund(&mut conn, bench.user, "c1").await.expect("taken back already"));
        let after = ledger::balance(&mut conn, bench.user).await.expect("balance");
        assert_eq!((after.balance, after.held), (before.held, before.held));
        assert_eq!(bench.violations().await, [""; 0]);
        if held {
            // What the attempt gives back is not held again, and goes.
            bench.end(&attempt, Outcome::Succeeded).await;
            let rest = ledger::balance(&mut conn, bench.user).await.expect("balance");
            assert!(rest.balance.0 > 0 && rest.held.0 == 0, "{rest:?}");
            assert!(bench.start(&bench.attempt(RunId::new(), 1)).await.is_some(), "there is nothing to hold");
            assert_eq!(bench.violations().await, [""; 0]);
        }
        assert_eq!(ledger::expire(&mut conn, 10).await.expect("expired"), u64::from(held));
        assert_eq!(ledger::balance(&mut conn, bench.user).await.expect("balance").balance.0, 0);
        assert_eq!(bench.violations().await, [""; 0]);
    }
}

#[tokio::test]
async fn a_purchase_that_is_all_held_when_it_is_taken_back_is_a_chargeback() {
    let bench = Bench::new(0).await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    // As large as one hold: an attempt on a larger grant tells how large.
    bench.grant("large", 100).await;
    let first = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&first).await, None);
    let hold = ledger::balance(&mut conn, bench.user).await.expect("balance").held.0;
    bench.end(&first, Outcome::Failed).await;
    bench.order("ord", hold).await;
    bench.pay("c1", "ord").await.expect("paid");
    // The purchase burns first here.
    sqlx::query("update credit_grants set priority = 1 where source = 'purchase'")
        .execute(&bench.pool)
        .await
        .expect("set");
    let second = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&second).await, None);
    assert_eq!(purchase::charge_back(&mut conn, bench.user, "c1").await.expect("taken back"), Some(MicroCredits(0)));
    let state: String =
        sqlx::query_scalar("select refund_state from payments").fetch_one(&bench.pool).await.expect("one");
    assert_eq!(state, "chargeback");
    assert_eq!(bench.violations().await, [""; 0]);
    bench.end(&second, Outcome::Failed).await;
    assert_eq!(ledger::expire(&mut conn, 10).await.expect("expired"), 1);
    assert_eq!(bench.balance().await.0, 100_000_000);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_refund_is_carried_out_whoever_dies_between_ledger_and_provider() {
    let bench = Bench::new(1).await;
    bench.buy("c1").await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert!(purchase::refund(&mut conn, bench.user, "c1").await.expect("untouched"));
    assert_eq!(bench.balance().await.0, 1_000_000, "the ledger comes first");
    // Whoever asked the provider is dead: the next one finds what is to be done.
    let open = purchase::open_refunds(&mut conn, 10).await.expect("open");
    assert_eq!((open.len(), open[0].charge_id.as_str(), open[0].telegram_user_id), (1, "c1", Some(42)));
    purchase::refund_done(&mut conn, "c1").await.expect("done");
    purchase::refund_done(&mut conn, "c1").await.expect("again");
    assert_eq!(purchase::open_refunds(&mut conn, 10).await.expect("open"), []);
    // The provider's own report of it changes nothing any more, and neither does a late refusal.
    assert!(purchase::taken_back(&mut conn, bench.user, "c1").await.expect("known"));
    assert!(!purchase::refund_refused(&mut conn, "c1", "late").await.expect("done before"));
    assert_eq!(bench.balance().await.0, 1_000_000);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_refund_that_the_provider_refuses_gives_the_credits_again_once() {
    let bench = Bench::new(1).await;
    bench.buy("c1").await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    assert!(purchase::refund(&mut conn, bench.user, "c1").await.expect("untouched"));
    assert!(purchase::refund_refused(&mut conn, "c1", "CHARGE_NOT_FOUND").await.expect("refused"));
    assert!(!purchase::refund_refused(&mut conn, "c1", "CHARGE_NOT_FOUND").await.expect("again"));
    assert_eq!(bench.balance().await.0, 51_000_000, "nothing is lost");
    assert_eq!(bench.violations().await, [""; 0]);
    let known = purchase::known(&mut conn, "c1").await.expect("known");
    assert_eq!(known, Known::Payment { user: bench.user, refund_state: "refused".into() });
    assert!(matches!(purchase::refund_refused(&mut conn, "c9", "").await, Err(LedgerError::Mismatch(_))));
}

// The second was swallowed: the user had Stars and credits.
#[tokio::test]
async fn a_refund_that_was_refused_and_comes_all_the_same_takes_the_credits_again_once() {
    for held in [false, true] {
        let bench = Bench::new(0).await;
        bench.buy("c1").await;
        let mut conn = bench.pool.acquire().await.expect("conn");
        assert!(purchase::refund(&mut conn, bench.user, "c1").await.expect("untouched"));
        assert!(purchase::refund_refused(&mut conn, "c1", "CHARGE_NOT_FOUND").await.expect("refused"));
        let attempt = bench.attempt(RunId::new(), 1);
        if held {
            assert_eq!(bench.start(&attempt).await, None);
        }
        // Whoever dies before the commit has booked nothing.
        let before = bench.balance().await;
        let mut tx = bench.pool.begin().await.expect("tx");
        assert!(purchase::taken_back(&mut tx, bench.user, "c1").await.expect("known"));
        tx.rollback().await.expect("rollback");
        assert_eq!(bench.balance().await, before);
        for _ in 0..2 {
            assert!(purchase::taken_back(&mut conn, bench.user, "c1").await.expect("known"));
            assert_eq!(bench.balance().await, (before.1, before.1), "all but what is held");
            assert_eq!(bench.violations().await, [""; 0]);
        }
        assert!(!purchase::refund_refused(&mut conn, "c1", "late").await.expect("it is done"));
        let known = purchase::known(&mut conn, "c1").await.expect("known");
        assert_eq!(known, Known::Payment { user: bench.user, refund_state: "done".into() });
        if held {
            bench.end(&attempt, Outcome::Failed).await;
            assert!(bench.start(&bench.attempt(RunId::new(), 1)).await.is_some(), "there is nothing to hold");
        }
        assert_eq!(ledger::expire(&mut conn, 10).await.expect("expired"), u64::from(held));
        assert_eq!(bench.balance().await, (0, 0));
        assert_eq!(bench.violations().await, [""; 0]);
    }
}

#[tokio::test]
async fn an_operators_correction_counts_once_per_ticket_and_takes_no_held_credits() {
    let bench = Bench::new(3).await;
    bench.grant("g", 2).await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    let mut adjust = async |ticket: &str, ucr: i64| {
        ledger::adjust(&mut conn, bench.user, ticket, MicroCredits(ucr)).await.map_err(|error| error.code())
    };
    assert_eq!(adjust("T1", 500_000).await, Ok(true));
    assert_eq!(adjust("T1", 500_000).await, Ok(false));
    assert_eq!(adjust("T1", 600_000).await, Err("key_reused"), "another amount under the same ticket");
    assert_eq!(adjust("T2", 0).await, Err("amount_invalid"));
    let attempt = bench.attempt(RunId::new(), 1);
    assert_eq!(bench.start(&attempt).await, None);
    // 5.5 less the 1.44 that the attempt holds.
    assert_eq!(adjust("T3", -4_100_000).await, Err("credits_short"));
    assert_eq!(adjust("T3", -4_000_000).await, Ok(true), "from three grants");
    assert_eq!(adjust("T3", -4_000_000).await, Ok(false));
    assert_eq!(adjust("T3", -1).await, Err("key_reused"));
    assert_eq!(bench.balance().await, (1_500_000, 1_440_000));
    bench.end(&attempt, Outcome::Failed).await;
    assert_eq!(bench.violations().await, [""; 0]);
    let nobody = ledger::adjust(&mut conn, Uuid::nil(), "T4", MicroCredits(1)).await.map_err(|error| error.code());
    assert_eq!(nobody, Err("user_not_found"));
}

#[tokio::test]
async fn a_reference_of_another_user_is_refused() {
    let bench = Bench::new(1).await;
    let other = bench.another(43).await;
    bench.grant("t1", 5).await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    let stolen = ledger::grant(&mut conn, other, GrantSource::Promo, "t1", MicroCredits(5_000_000), None).await;
    assert_eq!(stolen.map_err(|error| error.code()), Err("key_reused"));
    assert_eq!(audit::run(&mut conn).await.expect("audit"), []);
}
