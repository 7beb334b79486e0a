//! Every invariant catches its own deliberate corruption, and that one only.

use crate::bench::Bench;
use loopwright_activities::{billing::audit::INVARIANTS, usage::CallState};
use loopwright_engine::{hook::Outcome, ids::RunId};

/// What breaks one rule and no other, on books with two grants, a purchase, an ended attempt with two calls and a running one.
const CORRUPTIONS: &[(&str, &str)] = &[
    ("I1", "update users set ledger_seq = ledger_seq + 1"),
    ("I2", "update credit_transactions set balance_after_ucr = balance_after_ucr + 1 where seq = 1"),
    ("I3", "update credit_transactions set attempt_id = gen_random_uuid() where kind = 'capture'"),
    ("I4", "update activity_attempts set state = 'running', ended_at = null where state = 'completed'"),
    ("I5", "update credit_grants set remaining_ucr = remaining_ucr - 1 where source = 'welcome';
            update credit_grants set remaining_ucr = remaining_ucr + 1, amount_ucr = amount_ucr + 1 where source = 'promo'"),
    ("I6", "update credit_grants set remaining_ucr = remaining_ucr + 1, amount_ucr = amount_ucr + 1 where source = 'promo'"),
    ("I7", "update credit_allocations set held_ucr = held_ucr + 1 where captured_ucr is not null"),
    ("I8", "update api_key_usage set started_at = started_at - interval '1 hour' where call_key = 'a.1'"),
    ("I9", "update credit_transactions set markup_bps = markup_bps + 1000 where kind = 'hold'"),
    ("I10", "update api_key_usage set state = 'started', finished_at = null where call_key = 'a.1'"),
    ("I11", "insert into payments (charge_id, order_id, user_id, stars) select 'c9', id, user_id, 250 from orders"),
    ("I12", "update payments set refund_state = 'done'"),
    ("I13", "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
             select provider, model_id, '2026-01-02', input_umtok, output_umtok, 'too late' from model_pricing where model_id = 'rehearsed/architect'"),
    ("I14", "update api_key_usage set tokens_output = tokens_output + 1 where call_key = 'a.0'"),
    ("I14", "update api_key_usage set tokens_output = tokens_output + 1 where call_key = 'a.2'"),
    ("I15", "update activity_attempts set lease_expires_at = now() - interval '1 hour' where state = 'running'"),
    ("I16", "insert into definitions (hash, name, version, format, source, bundle, ir) values (decode(repeat('00', 32), 'hex'), 'n', 1, 1, '', '{}', '{}');
             insert into runs (shard, run_id, workflow, definition, status, inputs, closed_at)
               select 0, run_id, 'n', decode(repeat('00', 32), 'hex'), 'failed', '{}', now() from activity_attempts where state = 'running'"),
    ("I17", "update api_key_usage set state = 'failed' where call_key = 'a.0'"),
    ("I17", "update api_key_usage set error_class = 'transient.http' where call_key = 'a.2'"),
    ("I17", "update api_key_usage set state = 'unknown' where call_key = 'a.2'"),
    ("I17", "update api_key_usage set usage_source = 'estimated' where call_key = 'a.2'"),
    ("I18", "update api_keys set user_id = (select id from users)"),
];

#[tokio::test]
async fn every_invariant_catches_its_corruption_and_no_other() {
    let names: Vec<&str> = INVARIANTS.iter().map(|(name, ..)| *name).collect();
    let mut corrupted: Vec<&str> = CORRUPTIONS.iter().map(|(name, _)| *name).collect();
    corrupted.dedup();
    assert_eq!(names, corrupted, "each has one");
    let bench = Bench::new(100).await;
    bench.grant("b", 1).await;
    bench.buy("c1").await;
    let mut conn = bench.pool.acquire().await.expect("conn");
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 500).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.open(&attempt, "a.1", 100).await;
    bench.close(&attempt, "a.1", CallState::Failed, 0, 0).await;
    // One that failed and is paid.
    bench.open(&attempt, "a.2", 100).await;
    bench.cut(&attempt, "a.2", "model.truncated", 1_000, 100).await;
    bench.end(&attempt, Outcome::Succeeded).await;
    bench.start(&bench.attempt(RunId::new(), 1)).await;
    assert_eq!(bench.violations().await, [""; 0]);
    // Each in a transaction that is rolled back. Triggers and foreign keys stand in the way of a corruption.
    let mut wrong = Vec::new();
    for (invariant, sql) in CORRUPTIONS {
        sqlx::raw_sql("begin; set local session_replication_role = replica").execute(&mut *conn).await.expect("begin");
        sqlx::raw_sql(*sql).execute(&mut *conn).await.unwrap_or_else(|error| panic!("{invariant}: {error}"));
        let found = loopwright_activities::billing::audit::run(&mut conn).await.expect("audit");
        let mut fired: Vec<_> = found.iter().map(|violation| violation.invariant).collect();
        fired.dedup();
        if fired != [*invariant] {
            wrong.push(format!("{invariant}: {fired:?}"));
        }
        assert!(found.iter().all(|violation| violation.user == Some(bench.user)), "{invariant}: {found:?}");
        sqlx::raw_sql("rollback").execute(&mut *conn).await.expect("rollback");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(bench.violations().await, [""; 0]);
}
