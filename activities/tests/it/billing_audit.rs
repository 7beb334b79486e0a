//! Every invariant catches its own deliberate corruptions, and those only; and of each of its conditions there is one that it alone
//! catches.

use crate::bench::{Bench, closing_with, opening};
use loopwright_activities::{
    billing::{
        MicroCredits,
        audit::{self, INVARIANTS},
        ledger::{self, GrantSource},
        purchase,
    },
    usage::{CallOpened, CallState, Usage, UsageSource},
};
use loopwright_engine::{
    hook::{AttemptRef, Outcome, Phase},
    ids::RunId,
};
use sqlx::{AssertSqlSafe, Row};
use std::mem::replace;

/// Rule, one of its conditions, what stands there without it, and what this condition alone catches, on the books of
/// [`in_order`]. No other rule is broken by it.
const CORRUPTIONS: &[(&str, &str, &str, &str)] = &[
    (
        "I1",
        "u.credit_balance_ucr <> coalesce(a, 0)",
        "false",
        "update users set credit_balance_ucr = credit_balance_ucr + 1 where telegram_user_id = 42;
         update credit_grants set remaining_ucr = remaining_ucr + 1, amount_ucr = amount_ucr + 1 where source_ref = 'b'",
    ),
    (
        "I1",
        "u.credit_held_ucr <> coalesce(h, 0)",
        "false",
        // A part of what is held counts as captured, with nothing taken.
        "insert into credit_allocations select hold_txn_id, (select id from credit_grants where source_ref = 'b'), 1, 0
           from credit_allocations where captured_ucr is null;
         update credit_allocations set held_ucr = held_ucr - 1 where captured_ucr is null;
         update credit_grants set held_ucr = held_ucr - 1 where source = 'welcome';
         update users set credit_held_ucr = credit_held_ucr - 1 where telegram_user_id = 42",
    ),
    (
        "I1",
        "u.ledger_seq <> coalesce(n, 0)",
        "false",
        "update users set ledger_seq = ledger_seq + 1 where telegram_user_id = 42",
    ),
    (
        "I1",
        "coalesce(m, 0) <> coalesce(n, 0)",
        "false",
        "update credit_transactions set seq = seq + 1 where seq = (select max(seq) from credit_transactions)",
    ),
    (
        "I2",
        "b <> balance_after_ucr",
        "false",
        "update credit_transactions set balance_after_ucr = balance_after_ucr + 1 where idempotency_key like 'welcome:%'",
    ),
    (
        "I2",
        "h <> held_after_ucr",
        "false",
        "update credit_transactions set held_after_ucr = held_after_ucr + 1 where idempotency_key like 'welcome:%'",
    ),
    (
        "I2",
        "h < 0",
        "false",
        // What one row takes from what is held, the next one gives back.
        "update credit_transactions set held_delta_ucr = -1, held_after_ucr = -1 where idempotency_key = 'purchase:c1';
         update credit_transactions set held_delta_ucr = 1 where idempotency_key = 'purchase:c2'",
    ),
    (
        "I2",
        "h > b",
        "false",
        "update credit_transactions set held_delta_ucr = balance_after_ucr + 1, held_after_ucr = balance_after_ucr + 1 where idempotency_key = 'purchase:c1';
         update credit_transactions n set held_delta_ucr = -p.balance_after_ucr - 1 from credit_transactions p
           where n.idempotency_key = 'purchase:c2' and p.idempotency_key = 'purchase:c1'",
    ),
    (
        "I3",
        "h.kind <> 'hold'",
        "false",
        "update credit_transactions set kind = 'grant' where kind = 'hold' and attempt_id = (select id from activity_attempts where path = 'idle')",
    ),
    (
        "I3",
        "h.user_id <> r.user_id",
        "false",
        // Captures of the same size change places.
        "update credit_transactions c set hold_txn_id = o.hold_txn_id, attempt_id = o.attempt_id
         from credit_transactions o, activity_attempts a, activity_attempts b
         where c.kind = 'capture' and o.kind = 'capture' and a.id = c.attempt_id and b.id = o.attempt_id and a.path <> b.path
           and a.path in ('idle', 'of another') and b.path in ('idle', 'of another')",
    ),
    (
        "I3",
        "h.attempt_id <> r.attempt_id",
        "false",
        "update credit_transactions set attempt_id = gen_random_uuid()
           where kind = 'capture' and attempt_id = (select id from activity_attempts where path = 'busy')",
    ),
    (
        "I3",
        "r.held_delta_ucr <> -h.held_delta_ucr",
        "false",
        // What a capture leaves held, the next row gives back.
        "update credit_transactions set held_delta_ucr = held_delta_ucr + 1, held_after_ucr = held_after_ucr + 1
           where kind = 'capture' and attempt_id = (select id from activity_attempts where path = 'idle');
         update credit_transactions set held_delta_ucr = -1 where idempotency_key = 'promo:b'",
    ),
    (
        "I3",
        "r.seq <= h.seq",
        "false",
        "update credit_transactions c set hold_txn_id = o.hold_txn_id, attempt_id = o.attempt_id
         from credit_transactions o, activity_attempts a, activity_attempts b
         where c.kind = 'capture' and o.kind = 'capture' and a.id = c.attempt_id and b.id = o.attempt_id and a.path <> b.path
           and a.path in ('idle', 'idle again') and b.path in ('idle', 'idle again')",
    ),
    (
        "I4",
        "when 'running' then r.id is not null",
        "when 'running' then false",
        "update activity_attempts set state = 'running', ended_at = null where path = 'busy'",
    ),
    (
        "I4",
        "else r.id is null",
        "else false",
        "update activity_attempts set state = 'failed', ended_at = now() where state = 'running'",
    ),
    (
        "I5",
        "g.remaining_ucr <> g.amount_ucr - coalesce(c, 0) - coalesce(x, 0)",
        "false",
        "update credit_grants set remaining_ucr = remaining_ucr - 1 where source = 'welcome';
         update credit_grants set remaining_ucr = remaining_ucr + 1, amount_ucr = amount_ucr + 1 where source_ref = 'b'",
    ),
    (
        "I5",
        "g.held_ucr <> coalesce(o, 0)",
        "false",
        "update credit_grants set held_ucr = held_ucr - 1 where source = 'welcome';
         update credit_grants set held_ucr = held_ucr + 1 where source_ref = 'b'",
    ),
    (
        "I6",
        "u.credit_balance_ucr <> coalesce(r, 0)",
        "false",
        "update credit_grants set remaining_ucr = remaining_ucr + 1, amount_ucr = amount_ucr + 1 where source_ref = 'b'",
    ),
    (
        "I6",
        "u.credit_held_ucr <> coalesce(h, 0)",
        "false",
        "insert into credit_allocations select hold_txn_id, (select id from credit_grants where source_ref = 'b'), 1, 0
           from credit_allocations where captured_ucr is null;
         update credit_allocations set held_ucr = held_ucr - 1 where captured_ucr is null;
         update credit_grants set held_ucr = held_ucr - 1 where source = 'welcome'",
    ),
    (
        "I7",
        "h.held_delta_ucr <> coalesce(s, 0)",
        "false",
        "update credit_allocations set held_ucr = held_ucr + 1 where captured_ucr > 0",
    ),
    (
        "I7",
        "-r.amount_ucr <> coalesce(c, 0)",
        "false",
        "update credit_grants g set amount_ucr = g.amount_ucr + (select count(*) from credit_allocations l where l.grant_id = g.id and l.captured_ucr > 0);
         update credit_allocations set captured_ucr = captured_ucr + 1 where captured_ucr > 0",
    ),
    (
        "I7",
        "(r.id is null) <> coalesce(open, false)",
        "false",
        // The open one counts as captured, and one that was resolved as open.
        "update credit_allocations set captured_ucr = case when captured_ucr is null then 0 end
           where captured_ucr is null or hold_txn_id in
             (select t.id from credit_transactions t join activity_attempts a on a.id = t.attempt_id where a.path = 'idle')",
    ),
    (
        "I8",
        "h.attempt_id = k.attempt_id",
        "true",
        "update api_key_usage set attempt_id = gen_random_uuid() where call_key = 'a.1'",
    ),
    (
        "I8",
        "h.kind = 'hold'",
        "true",
        "update credit_transactions set kind = 'grant' where attempt_id = (select id from activity_attempts where state = 'running');
         update api_key_usage set started_at = engine_now(), attempt_id = (select id from activity_attempts where state = 'running') where call_key = 'a.1'",
    ),
    (
        "I8",
        "h.user_id = k.user_id",
        "true",
        "update api_key_usage set user_id = (select user_id from activity_attempts where path = 'of another') where call_key = 'a.1'",
    ),
    (
        "I8",
        "h.created_at <= k.started_at",
        "true",
        "update api_key_usage set started_at = started_at - interval '1 hour' where call_key = 'a.1'",
    ),
    (
        "I9",
        "s.actual <> ceil(coalesce(p, 0) * s.rate * (10000 + s.markup) / 1e10)",
        "false",
        "update credit_transactions set markup_bps = markup_bps + 1000 where kind = 'hold'",
    ),
    (
        "I9",
        "s.taken <> least(s.actual, s.held)",
        "false",
        "update credit_transactions set rate_credits_per_usd = 2 * rate_credits_per_usd where kind = 'hold';
         update credit_transactions set actual_ucr = 2 * actual_ucr where kind = 'capture'",
    ),
    (
        "I10",
        "k.state = 'started' and a.state <> 'running'",
        "false",
        "update api_key_usage set state = 'started', finished_at = null where call_key = 'a.1'",
    ),
    (
        "I11",
        "g.id is null",
        "false",
        "insert into payments (charge_id, order_id, user_id, stars) select 'c9', id, user_id, 250 from orders where payload = 'c1'",
    ),
    ("I11", "p.charge_id is null", "false", "delete from payments where charge_id = 'c1'"),
    (
        "I11",
        " and g.user_id = p.user_id",
        "",
        "update payments set user_id = (select user_id from activity_attempts where path = 'of another') where charge_id = 'c1'",
    ),
    ("I12", "'requested',", "", "update payments set refund_state = 'requested' where charge_id = 'c1'"),
    ("I12", "'done',", "", "update payments set refund_state = 'done' where charge_id = 'c1'"),
    ("I12", ",'refused'", "", "update payments set refund_state = 'refused' where charge_id = 'c1'"),
    ("I12", ") <> (t.id is not null)", " and t.id is null)", "update payments set refund_state = 'none' where charge_id = 'c2'"),
    ("I12", "p.refund_state = 'chargeback'", "false", "update payments set refund_state = 'chargeback' where charge_id = 'c1'"),
    (
        "I12",
        "t.kind = 'adjustment'",
        "false",
        // What was held of it when it was taken back is free again.
        "update credit_grants set remaining_ucr = remaining_ucr - 1, amount_ucr = amount_ucr - 1 where source_ref = 'c1';
         update credit_grants set remaining_ucr = 1, amount_ucr = amount_ucr + 1, expires_at = null where source_ref = 'c3'",
    ),
    ("I12", "p.refund_state = 'done'", "false", "update payments set refund_state = 'done' where charge_id = 'c4'"),
    (
        "I13",
        "m.provider <> k.provider",
        "false",
        "update model_pricing set provider = 'gemini' where model_id = 'rehearsed/architect'",
    ),
    (
        "I13",
        "m.model_id not in (k.model_requested, '*')",
        "false",
        "update model_pricing set model_id = 'another' where model_id = 'rehearsed/architect'",
    ),
    (
        "I13",
        "m.effective_from > k.started_at",
        "false",
        "update model_pricing set effective_from = engine_now() + interval '1 day' where model_id = 'rehearsed/architect'",
    ),
    (
        "I13",
        "m.model_id = '*' and exists",
        "false and exists",
        "update model_pricing set model_id = '*' where model_id = 'rehearsed/architect';
         insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
           values ('rehearsed', 'rehearsed/architect', '2026-01-01', 1, 1, 'its own')",
    ),
    (
        "I13",
        "n.effective_from > m.effective_from",
        "false",
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
         select provider, model_id, '2026-01-02', input_umtok, output_umtok, 'too late' from model_pricing where model_id = 'rehearsed/architect'",
    ),
    (
        "I13",
        "n.min_prompt_tokens > m.min_prompt_tokens",
        "false",
        "insert into model_pricing (provider, model_id, effective_from, min_prompt_tokens, input_umtok, output_umtok, source)
         select provider, model_id, effective_from, 500, input_umtok, output_umtok, 'of larger ones' from model_pricing where model_id = 'rehearsed/architect'",
    ),
    (
        "I13",
        "m.min_prompt_tokens > 0",
        "false",
        "update model_pricing set min_prompt_tokens = 5000 where model_id = 'rehearsed/architect'",
    ),
    (
        "I14",
        "k.state = 'succeeded'",
        "false",
        "update api_key_usage set tokens_output = tokens_output + 1 where call_key = 'a.0'",
    ),
    (
        "I14",
        "k.state = 'failed' and k.cost_pusd > 0",
        "false",
        "update api_key_usage set tokens_output = tokens_output + 1 where call_key = 'a.2'",
    ),
    (
        "I15",
        "a.lease_expires_at < engine_now() - interval '10 minutes'",
        "false",
        "update activity_attempts set lease_expires_at = now() - interval '1 hour' where state = 'running'",
    ),
    (
        "I16",
        "r.closed_at is not null",
        "false",
        "insert into definitions (hash, name, version, format, source, bundle, ir) values (decode(repeat('00', 32), 'hex'), 'n', 1, 1, '', '{}', '{}');
         insert into runs (shard, run_id, workflow, definition, status, inputs, closed_at)
           select 0, run_id, 'n', decode(repeat('00', 32), 'hex'), 'failed', '{}', now() from activity_attempts where state = 'running'",
    ),
    ("I17", "late or ", "", "update api_key_usage set late = true where call_key = 'a.0'"),
    ("I17", "state = 'failed' and ", "", "update api_key_usage set state = 'unknown' where call_key = 'a.2'"),
    (
        "I17",
        "coalesce(error_class, '') like 'model.%'",
        "true",
        "update api_key_usage set error_class = 'transient.http' where call_key = 'a.2'",
    ),
    (
        "I17",
        "coalesce(error_class, '') like 'model.%'",
        "true",
        "update api_key_usage set state = 'failed' where call_key = 'a.0'",
    ),
    (
        "I17",
        "usage_source = 'provider'",
        "true",
        "update api_key_usage set usage_source = 'estimated' where call_key = 'a.2'",
    ),
    (
        "I17",
        "tokens_output > 0",
        "true",
        // A token of output costs as much as five of the prompt.
        "update api_key_usage set tokens_prompt = tokens_prompt + 5 * tokens_output, tokens_output = 0 where call_key = 'a.2'",
    ),
    ("I18", "y.provider <> k.provider", "false", "update api_keys set provider = 'gemini'"),
    (
        "I18",
        "k.cost_pusd <> 0",
        "false",
        "update api_keys set user_id = (select id from users where telegram_user_id = 42);
         update api_key_usage set worst_pusd = 0",
    ),
    (
        "I18",
        "k.worst_pusd <> 0",
        "false",
        "insert into api_keys (provider, user_id, source, last4, fingerprint) select 'rehearsed', id, 'environment', '', '' from users where telegram_user_id = 42;
         update api_key_usage set worst_pusd = 1, api_key_id = (select id from api_keys where last4 = '') where call_key = 'a.1'",
    ),
    (
        "I18",
        "y.user_id <> k.user_id",
        "false",
        "insert into api_keys (provider, user_id, source, last4, fingerprint) select 'rehearsed', user_id, 'environment', '', '' from activity_attempts where path = 'of another';
         update api_key_usage set worst_pusd = 0, api_key_id = (select id from api_keys where last4 = '') where call_key = 'a.1'",
    ),
];

/// Books of two users in which every rule has something to look at: grants of all kinds, one that expired, a purchase, another that
/// was given back, one that its provider took back, one whose refund it refused, a correction, attempts without calls, one with all kinds of calls, and one that runs.
async fn in_order(bench: &mut Bench) {
    let at = |bench: &Bench, path: &str| AttemptRef { path: path.into(), ..bench.attempt(RunId::new(), 1) };
    let idle = async |bench: &Bench, path: &str| {
        let attempt = at(bench, path);
        assert_eq!(bench.start(&attempt).await, None);
        bench.end(&attempt, Outcome::Succeeded).await;
    };
    let another = bench.another(43).await;
    let user = replace(&mut bench.user, another);
    bench.grant("of another", 10).await;
    idle(bench, "of another").await;
    bench.user = user;
    idle(bench, "idle").await;
    bench.grant("b", 1).await;
    idle(bench, "idle again").await;
    bench.buy("c1").await;
    bench.buy("c2").await;
    bench.buy("c3").await;
    bench.buy("c4").await;
    let mut tx = bench.pool.begin().await.expect("tx");
    assert!(purchase::refund(&mut tx, user, "c2").await.expect("untouched"));
    purchase::refund_done(&mut tx, "c2").await.expect("given back");
    let taken = purchase::charge_back(&mut tx, user, "c3").await.expect("taken back");
    assert!(taken.is_some_and(|taken| taken.0 > 0));
    assert!(purchase::refund(&mut tx, user, "c4").await.expect("untouched"));
    assert!(purchase::refund_refused(&mut tx, "c4", "too late").await.expect("given again"));
    assert!(ledger::adjust(&mut tx, user, "t1", MicroCredits(-1_000)).await.expect("corrected"));
    let over = Some(chrono::Utc::now() - chrono::Duration::hours(1));
    let credit = MicroCredits::from_credits(1);
    assert!(ledger::grant(&mut tx, user, GrantSource::Promo, "x", credit, over).await.expect("grant"));
    assert_eq!(ledger::expire(&mut tx, 10).await.expect("expired"), 1);
    // Of a model whose every kind of token has a price of its own.
    sqlx::query(
        "insert into model_pricing (provider, model_id, effective_from, input_umtok, cached_input_umtok, cache_write_umtok, output_umtok,
                                    reasoning_umtok, per_request_pusd, source)
         values ('rehearsed', 'rehearsed/all', '2026-01-01', 2000000, 500000, 3000000, 10000000, 7000000, 1000000000, 'test')",
    )
    .execute(&mut *tx)
    .await
    .expect("price");
    tx.commit().await.expect("commit");

    let busy = at(bench, "busy");
    assert_eq!(bench.start(&busy).await, None);
    bench.open(&busy, "a.0", 500).await;
    bench.close(&busy, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.open(&busy, "a.1", 100).await;
    bench.close(&busy, "a.1", CallState::Failed, 0, 0).await;
    // One that failed and is paid.
    bench.open(&busy, "a.2", 100).await;
    bench.cut(&busy, "a.2", "model.truncated", 1_000, 100).await;
    let mut all: CallOpened = serde_json::from_value(opening(100)).expect("opening");
    all.model = "rehearsed/all".into();
    bench.meter(&busy, "a.3", Phase::Open, serde_json::to_value(all).expect("json")).await;
    let usage = Usage {
        tokens_prompt: 1_000,
        tokens_cached: 200,
        tokens_cache_write: 100,
        tokens_output: 100,
        tokens_reasoning: 40,
        source: UsageSource::Provider,
        ..Usage::default()
    };
    bench.meter(&busy, "a.3", Phase::Close, closing_with(CallState::Succeeded, usage)).await;
    bench.end(&busy, Outcome::Succeeded).await;
    assert_eq!(bench.start(&at(bench, "running")).await, None);
}

/// With a condition deleted from a query it no longer stands there, or its corruption is not caught: either way this fails. The books
/// in order hold what each term of a sum is for.
#[tokio::test]
async fn every_condition_of_an_invariant_catches_its_corruption_and_no_other_rule_does() {
    let names: Vec<&str> = INVARIANTS.iter().map(|(name, ..)| *name).collect();
    let mut corrupted: Vec<&str> = CORRUPTIONS.iter().map(|(name, ..)| *name).collect();
    corrupted.dedup();
    assert_eq!(names, corrupted, "each has one");
    for (name, _, query) in INVARIANTS {
        let parts = CORRUPTIONS.iter().filter(|(rule, ..)| rule == name).count();
        assert!(query.matches(" or ").count() < parts, "{name}: an alternative is not among the {parts}");
    }
    let mut bench = Bench::new(100).await;
    in_order(&mut bench).await;
    assert_eq!(bench.violations().await, [""; 0]);
    let mut conn = bench.pool.acquire().await.expect("conn");
    // The books were made under all constraints. A corruption has to get past them, as past triggers and foreign keys.
    sqlx::raw_sql(
        "do $$ declare c record; begin
           for c in select conrelid::regclass as relation, conname from pg_constraint
                    where contype in ('c', 'u') and conrelid::regclass::text in
                      ('users', 'activity_attempts', 'api_keys', 'api_key_usage', 'credit_allocations', 'credit_grants', 'credit_transactions',
                       'model_pricing', 'payments') loop
             execute format('alter table %s drop constraint %I cascade', c.relation, c.conname);
           end loop; end $$",
    )
    .execute(&mut *conn)
    .await
    .expect("constraints");
    // Each in a transaction that is rolled back.
    let mut wrong = Vec::new();
    for (rule, part, without, sql) in CORRUPTIONS {
        sqlx::raw_sql("begin; set local session_replication_role = replica").execute(&mut *conn).await.expect("begin");
        sqlx::raw_sql(*sql).execute(&mut *conn).await.unwrap_or_else(|error| panic!("{rule}, {part}: {error}"));
        let found = audit::run(&mut conn).await.expect("audit");
        let mut fired: Vec<_> = found.iter().map(|violation| violation.invariant).collect();
        fired.dedup();
        if fired != [*rule] {
            wrong.push(format!("{rule}, {part}: {fired:?}"));
        }
        let mine =
            |user: Option<uuid::Uuid>| user == Some(bench.user) || (user.is_some() && sql.contains("of another"));
        assert!(found.iter().all(|violation| mine(violation.user)), "{rule}, {part}: {found:?}");
        let (.., query) = INVARIANTS.iter().find(|(name, ..)| name == rule).expect("a rule");
        assert!(query.contains(part), "{rule} does not say {part}");
        let blind = AssertSqlSafe(query.replacen(part, without, 1));
        let rows = sqlx::query(blind).fetch_all(&mut *conn).await.unwrap_or_else(|e| panic!("{rule}, {part}: {e}"));
        let seen: Vec<String> = rows.iter().map(|row| row.try_get(0).expect("subject")).collect();
        if found.iter().any(|violation| seen.contains(&violation.subject)) {
            wrong.push(format!("{rule} catches it without {part}: {seen:?}"));
        }
        sqlx::raw_sql("rollback").execute(&mut *conn).await.expect("rollback");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(bench.violations().await, [""; 0]);
}
